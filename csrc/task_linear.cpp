// The operators fastspec::task_linear and its backward on a CPU, with their autograd: the formulas of
// fastspec/ops/task_linear.py, which serves where this is not built.
//
// What it buys over Python is the time between the products, which counts where a batch is short.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "autograd.h"
#include "layer.h"

namespace fastspec {
namespace {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

// 1 / S, which turns a short-side product into the long side's projection (F3); undefined where a direction
// is too small to divide by.
Tensor inverse(const Tensor& s, at::ScalarType dtype) {
  const auto [low, high] = at::aminmax(s);
  if (!(low.item<double>() > sigma_floor * high.item<double>())) return {};
  return at::reciprocal(s).to(dtype);
}

// Zero where the row names no task, whatever stood there; `of_rows` is [B, ...].
Tensor without_unnamed(Tensor of_rows, const Tensor& task) {
  std::vector<int64_t> sizes(of_rows.dim(), 1);
  sizes[0] = task.size(0);
  return of_rows.masked_fill_(at::lt(task, 0).view(sizes), 0);
}

// t C, or t C^T  [N, k], every row of the batch with its task's core, and zero where it names none; the
// arithmetic is in float32 at least.
Tensor apply_cores(const Tensor& t, const Tensor& table, const Tensor& task, Core core, bool transpose) {
  const int64_t n = t.size(0), k = t.size(1);
  if (n == 0) return t;
  const auto wide = accumulation_dtype(t, table);
  const Tensor c = without_unnamed(at::index_select(table, 0, at::clamp_min(task, 0)).to(wide), task);
  const Tensor blocks = t.view({task.size(0), -1, k}).to(wide);
  Tensor out;
  if (core == Core::Diag) {
    out = at::mul(blocks, c.unsqueeze(1));
  } else if (core == Core::Dense) {
    out = at::bmm(blocks, transpose ? c.mT() : c);
  } else {
    out = at::zeros_like(blocks);
    each_diagonal(c, [&](int64_t row, int64_t i, int64_t j, int64_t count) {
      const int64_t source = transpose ? j : i, target = transpose ? i : j;
      out.narrow(2, target, count)
          .addcmul_(blocks.narrow(2, source, count), c.select(1, row).narrow(1, i, count).unsqueeze(1));
    });
  }
  return out.view({n, k}).to(t.scalar_type());
}

// The trained entries of q^T p of every task's rows, in the table's shape and dtype.
Tensor reduce_cores(const Tensor& q_in, const Tensor& p_in, const Tensor& table, const Tensor& task, Core core) {
  Tensor grad = at::zeros_like(table);
  const int64_t n = q_in.size(0), k = q_in.size(1);
  if (n == 0) return grad;
  const auto wide = accumulation_dtype(table, table);
  const Tensor q = q_in.to(wide).view({task.size(0), -1, k}), p = p_in.to(wide).view({task.size(0), -1, k});
  Tensor shares;
  if (core == Core::Diag) {
    shares = at::mul(q, p).sum(1);
  } else if (core == Core::Dense) {
    shares = at::bmm(q.mT(), p);
  } else {
    shares = at::zeros({task.size(0), table.size(1), k}, q.options());
    each_diagonal(table, [&](int64_t row, int64_t i, int64_t j, int64_t count) {
      shares.select(1, row).narrow(1, i, count).copy_(at::mul(q.narrow(2, i, count), p.narrow(2, j, count)).sum(1));
    });
  }
  return grad.index_add_(0, at::clamp_min(task, 0), without_unnamed(shares, task).to(table.scalar_type()));
}

// y [B, ..., out] and p [N, k] (no rows where it is not saved).
std::tuple<Tensor, Tensor> task_linear(const Tensor& x, const Tensor& weight, const OptTensor& bias,
                                       const Tensor& u, const Tensor& s, const Tensor& vh, const Tensor& table,
                                       const Tensor& task, std::string_view core, bool short_side, bool saves_p) {
  const int64_t out = weight.size(0), in = weight.size(1);
  const auto dtype = x.scalar_type();
  const Tensor y = at::linear(x, weight.to(dtype), bias), y2 = y.view({-1, out});
  const Tensor scale = short_side && out < in ? inverse(s, dtype) : Tensor();
  Tensor p;
  if (scale.defined()) {
    const Tensor shift = bias ? at::mv(u.t(), *bias).mul_(scale) : Tensor();
    p = project(y2, u, scale, shift);
    if (bias && drowned(p, u, s, *bias)) p = Tensor();
  }
  if (!p.defined()) {
    p = project(x.reshape({-1, in}), vh.to(dtype).t());
  }
  y2.addmm_(apply_cores(p, table, task, core_named(core), true), u.to(dtype).t());
  return {y, saves_p ? p : at::empty({0, u.size(1)}, x.options())};
}

// dx [B, ..., in] and d table in the table's shape; what is not needed comes back empty.
std::tuple<Tensor, Tensor> task_linear_backward(const Tensor& g, const OptTensor& p, const Tensor& weight,
                                                const Tensor& u, const Tensor& s, const Tensor& vh,
                                                const Tensor& table, const Tensor& task, std::string_view core_name,
                                                bool short_side, bool needs_dx, bool needs_table) {
  const int64_t out = weight.size(0), in = weight.size(1);
  const auto dtype = g.scalar_type();
  const Core core = core_named(core_name);
  const Tensor g2 = g.reshape({-1, out});
  Tensor dx = at::empty({0}, g.options()), dx2, scale;
  if (needs_dx) {
    dx2 = at::mm(g2, weight.to(dtype));
    if (short_side && in < out) scale = inverse(s, dtype);
  }
  const Tensor q = scale.defined() ? project(dx2, vh.t(), scale) : project(g2, u.to(dtype));
  if (needs_dx) {
    dx2.addmm_(apply_cores(q, table, task, core, false), vh.to(dtype));
    dx = dx2.view(with_last(g, in));
  }
  if (!needs_table) return {dx, at::empty({0}, table.options())};
  return {dx, reduce_cores(q, *p, table, task, core)};
}

std::tuple<Tensor, Tensor> call(const Tensor& x, const Tensor& weight, const OptTensor& bias, const Tensor& u,
                                const Tensor& s, const Tensor& vh, const Tensor& table, const Tensor& task,
                                std::string_view core, bool short_side, bool saves_p) {
  static const auto op = operator_handle<decltype(task_linear)>("fastspec::task_linear");
  const at::AutoDispatchBelowADInplaceOrView below;
  return op.call(x, weight, bias, u, s, vh, table, task, core, short_side, saves_p);
}

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct TaskLinear : torch::autograd::Function<TaskLinear> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const OptTensor& bias,
                               const Tensor& u, const Tensor& s, const Tensor& vh, const Tensor& table,
                               const Tensor& task, std::string_view core, bool short_side, bool saves_p) {
    auto [y, p] = call(x, weight, bias, u, s, vh, table, task, core, short_side, saves_p);
    keep_for_backward(ctx, x, bias);
    if (!saves_p) ctx->mark_non_differentiable({p});
    ctx->save_for_backward({saves_p ? p : Tensor(), weight, u, s, vh, table, task});
    ctx->saved_data["core"] = std::string(core);
    ctx->saved_data["short"] = short_side;
    return {y, p};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    using Backward = decltype(task_linear_backward);
    static const auto fast = operator_handle<Backward>("fastspec::task_linear_backward");
    static const auto differentiable = operator_handle<Backward>("fastspec::task_linear_double");
    variable_list out(11);  // one for every argument of forward
    const Tensor& g = grads[0];
    const Tensor& dp = grads[1];  // of a second backward
    if (!g.defined() && !dp.defined()) return out;
    const Asked asked(ctx);
    const auto saved = ctx->get_saved_variables();
    if (asked.dx && dp.defined()) out[0] = through_projection(ctx, dp, saved[4]);
    if (!g.defined()) return out;
    if (asked.dx || asked.trained) {
      const auto p = saved[0].defined() ? OptTensor(saved[0]) : std::nullopt;
      const auto& op = at::GradMode::is_enabled() ? differentiable : fast;
      auto [dx, dtable] = op.call(g, p, saved[1], saved[2], saved[3], saved[4], saved[5], saved[6],
                                  ctx->saved_data["core"].toStringRef(), ctx->saved_data["short"].toBool(),
                                  asked.dx, asked.trained);
      if (asked.dx) out[0] = out[0].defined() ? at::add(out[0], dx) : dx;
      if (asked.trained) out[6] = dtable;
    }
    if (asked.bias) out[2] = bias_gradient(ctx, g);
    return out;
  }
};

std::tuple<Tensor, Tensor> task_linear_autograd(const Tensor& x, const Tensor& weight, const OptTensor& bias,
                                                const Tensor& u, const Tensor& s, const Tensor& vh,
                                                const Tensor& table, const Tensor& task, std::string_view core,
                                                bool short_side, bool saves_p) {
  if (!at::GradMode::is_enabled() ||
      !(x.requires_grad() || table.requires_grad() || (bias && bias->requires_grad())))
    return call(x, weight, bias, u, s, vh, table, task, core, short_side, saves_p);
  auto out = TaskLinear::apply(x, weight, bias, u, s, vh, table, task, core, short_side, saves_p);
  return {out[0], out[1]};
}

}  // namespace
}  // namespace fastspec

// The schemas stand in fastspec/ops/task_linear.py, for they are there without this file too.
TORCH_LIBRARY_IMPL(fastspec, CPU, m) {
  m.impl("task_linear", &fastspec::task_linear);
  m.impl("task_linear_backward", &fastspec::task_linear_backward);
}

TORCH_LIBRARY_IMPL(fastspec, AutogradCPU, m) { m.impl("task_linear", &fastspec::task_linear_autograd); }
TORCH_LIBRARY_IMPL(fastspec, AutogradCUDA, m) { m.impl("task_linear", &fastspec::task_linear_autograd); }
