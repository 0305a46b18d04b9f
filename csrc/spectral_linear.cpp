// The operators fastspec::spectral_linear and its backward on a CPU: the formulas of fastspec/ops/aten.py,
// which serves where this is not built. Facts F1 to F4 are those of docs/design.md.
//
// What it buys over Python: the time between the products (0.25 ms a layer and step there, 0.08 ms here, on
// the processor of the README), and thin products fused with what surrounds them, the scale 1/sigma of the
// short side and the reduction of q against p.
#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "diagonals.h"
#include "plan.h"

namespace fastspec {
namespace {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

// The frozen factors and the core of one layer: u [out, k], s [k], vh [k, in].
struct Layer {
  const Tensor &weight, &u, &s, &vh, &delta;  // weight is W + U C Vh itself where the forward is resident
  Core core;
  Forward forward;

  int64_t out_features() const { return weight.size(0); }
  int64_t in_features() const { return weight.size(1); }
};

// One buffer per thread and dtype, as large as the largest weight that asked for it.
thread_local std::array<Tensor, 4> scratch_buffers;

Tensor scratch(int64_t rows, int64_t cols, at::ScalarType dtype) {
  const int slot = dtype == at::kFloat ? 0 : dtype == at::kDouble ? 1 : dtype == at::kBFloat16 ? 2 : 3;
  Tensor& buffer = scratch_buffers[slot];
  if (!buffer.defined() || buffer.numel() < rows * cols || buffer.scalar_type() != dtype) {
    const c10::InferenceMode outside(false);
    buffer = at::empty({rows * cols}, at::TensorOptions().dtype(dtype));
  }
  return buffer.slice(0, 0, rows * cols).view({rows, cols});
}

bool all_zero(const Tensor& delta) {
  if (delta.scalar_type() == at::kFloat && delta.is_contiguous()) {
    const float* const d = delta.const_data_ptr<float>();
    return std::all_of(d, d + delta.numel(), [](float v) { return v == 0; });
  }
  return !at::any(delta).item<bool>();
}

// t C, or t C^T  [N, k], in the dtype of t; the arithmetic is in float32 at least.
Tensor apply_core(const Tensor& t, const Tensor& delta, Core core, bool transpose) {
  const auto wide = accumulation_dtype(t, delta);
  const Tensor d = delta.to(wide), wide_t = t.to(wide);
  const Tensor out =
      core == Core::Dense ? at::mm(wide_t, transpose ? d.t() : d) : diagonals_apply(wide_t, {}, d, transpose);
  return out.to(t.scalar_type());
}

// t M, or t M^T  [N, k], with M = diag(S) + C, for t in float32 or float64.
Tensor apply_sigma(const Tensor& t, const Layer& layer, bool transpose) {
  const Tensor s = layer.s.to(t.scalar_type());
  if (layer.core == Core::Dense) return at::addcmul(apply_core(t, layer.delta, layer.core, transpose), t, s);
  return diagonals_apply(t, s, layer.delta.to(t.scalar_type()), transpose);
}

// The trained entries of q^T p, in delta's shape and dtype; they are summed in float32 at least.
Tensor reduce_core(const Tensor& q_in, const Tensor& p_in, const Tensor& delta, Core core) {
  const auto wide = accumulation_dtype(delta, delta);
  const Tensor q = q_in.to(wide), p = p_in.to(wide);
  return (core == Core::Dense ? at::mm(q.t(), p) : diagonals_reduce(q, p, delta.to(wide))).to(delta.scalar_type());
}

// W + L R into a row-major `out`.
void merge_rows(const Tensor& weight, const Tensor& left_in, const Tensor& right_in, Tensor& out) {
  const Tensor left = left_in.contiguous(), right = right_in.contiguous();
  if (thin_merge_supported() && thin(left.size(1), {weight, left, right, out}))
    thin_merge(weight, left, right, out);
  else
    at::addmm_out(out, weight, left, right);
}

// W + U C Vh in scratch (F2): valid until the next call on this thread takes the buffer.
Tensor merged(const Layer& layer) {
  if (layer.forward == Forward::Resident) return layer.weight;
  // the untouched weight: the first step is the pretrained model's bit for bit
  if (all_zero(layer.delta)) return layer.weight;
  const int64_t rows = layer.out_features(), cols = layer.in_features();
  const Tensor left = apply_core(layer.u, layer.delta, layer.core, false);
  if (layer.weight.stride(1) == 1) {
    Tensor out = scratch(rows, cols, layer.weight.scalar_type());
    merge_rows(layer.weight, left, layer.vh, out);
    return out;
  }
  Tensor out = scratch(cols, rows, layer.weight.scalar_type());
  merge_rows(layer.weight.t(), layer.vh.t(), left.t(), out);
  return out.t();
}

// M = diag(S) + C: [k] for a diagonal core, else [k, k].
Tensor sigma_of(const Layer& layer) {
  return at::add(layer.core == Core::Diag ? layer.s : at::diag(layer.s), layer.delta);
}

// What turns a short-side product into the long side's projection (F3). With M = diag(S) + C
//   p = (y - b) (U M^-T),  q = dx (V M^-1);  for a diagonal core M^-1 is a scale of the columns.
struct Unscaled {
  Tensor basis, scale;
};

// None where M is too close to singular for the identity to be exact to rounding.
std::optional<Unscaled> unscaled(const Tensor& basis, const Layer& layer, bool left) {
  const auto dtype = basis.scalar_type();
  const Tensor m = sigma_of(layer);
  if (layer.core == Core::Diag) {
    const auto [low, high] = at::aminmax(m.abs());
    if (!(low.item<double>() > sigma_floor * high.item<double>())) return std::nullopt;
    return Unscaled{basis, at::reciprocal(m).to(dtype)};
  }
  const auto [inverse, info] = at::linalg_inv_ex(m);
  const auto norm = [](const Tensor& a) { return a.abs().sum(0).max().item<double>(); };
  if (info.item<int>() != 0 || !(norm(m) * norm(inverse) * sigma_floor < 1)) return std::nullopt;
  const Tensor solve = inverse.to(dtype);
  return Unscaled{at::mm(basis, left ? solve.t() : solve), {}};
}

// d delta from g B (or dx B) and p, without writing the product where that is possible.
Tensor project_and_reduce(const Tensor& t, const Tensor& basis, const Tensor& scale, const Tensor& p,
                          const Layer& layer) {
  if (layer.core == Core::Diag && thin(basis.size(1), {t, p}) && basis.scalar_type() == at::kFloat) {
    const Tensor sum = thin_project_dot(t, basis, p);
    return (scale.defined() ? sum * scale : sum).to(layer.delta.scalar_type());
  }
  return reduce_core(project(t, basis, scale), p, layer.delta, layer.core);
}

// Entries of U^T (g^T x) V (F4): one weight gradient, in scratch, serves every diagonal.
Tensor dense_gradient(const Tensor& g, const Tensor& x, const Layer& layer) {
  Tensor grad = scratch(g.size(1), x.size(1), g.scalar_type());
  at::mm_out(grad, g.t(), x);
  const Tensor rows = at::mm(layer.u.to(g.scalar_type()).t(), grad);  // [k, in]
  const Tensor vh = layer.vh.to(g.scalar_type());
  if (layer.core == Core::Dense) return at::mm(rows, vh.t()).to(layer.delta.scalar_type());
  // rows of U^T G against (shifted) rows of Vh
  const auto entries = [&](int64_t i, int64_t j, int64_t count) {
    return at::mul(rows.narrow(0, i, count), vh.narrow(0, j, count)).sum(1);
  };
  if (layer.core == Core::Diag) return entries(0, 0, rows.size(0)).to(layer.delta.scalar_type());
  Tensor out = at::zeros_like(layer.delta);
  each_diagonal(layer.delta, [&](int64_t row, int64_t i, int64_t j, int64_t count) {
    out[row].narrow(0, i, count).copy_(entries(i, j, count));
  });
  return out;
}

// y [..., out] and p [N, k] (no rows where the plan saves none).
std::tuple<Tensor, Tensor> spectral_linear(const Tensor& x, const Tensor& weight, const OptTensor& bias,
                                           const Tensor& u, const Tensor& s, const Tensor& vh, const Tensor& delta,
                                           std::string_view core, std::string_view forward,
                                           std::string_view gradient) {
  const Plan plan(core, forward, gradient);
  const Layer layer{weight, u, s, vh, delta, plan.core, plan.forward};
  const int64_t in = layer.in_features(), out = layer.out_features(), k = u.size(1);
  const auto dtype = x.scalar_type();
  const Tensor x2 = x.reshape({-1, in});

  const bool p_from_y = plan.gradient == Gradient::Short && out < in;
  Tensor p, y;
  if (!plan.one_product() || (plan.saves_p() && !p_from_y)) p = project(x2, vh.to(dtype).t());
  if (plan.one_product()) {
    y = at::linear(x, merged(layer).to(dtype), bias);
  } else if (plan.forward == Forward::Factored) {
    y = at::linear(x, weight.to(dtype), bias);
    y.view({-1, out}).addmm_(apply_core(p, delta, plan.core, true), u.to(dtype).t());
  } else if (!all_zero(delta)) {
    y = at::mm(apply_sigma(p, layer, true), u.t()).view(with_last(x, out));
    if (bias) y.add_(*bias);
  } else {
    y = at::linear(x, weight, bias);  // the first step is the pretrained model's bit for bit
  }
  if (!plan.saves_p()) return {y, at::empty({0, k}, x.options())};
  if (!p.defined()) {  // from the short side, where that costs no digits
    if (const auto to_p = unscaled(u, layer, true)) {
      Tensor shift;
      if (bias) {
        shift = at::mv(to_p->basis.t(), *bias);
        if (to_p->scale.defined()) shift.mul_(to_p->scale);
      }
      p = project(y.view({-1, out}), to_p->basis, to_p->scale, shift);
      if (bias && drowned(p, u, sigma_of(layer), *bias)) p = Tensor();
    }
    if (!p.defined()) p = project(x2, vh.t());
  }
  return {y, p};
}

// dx [..., in] and d delta in delta's shape; what is not needed comes back empty.
std::tuple<Tensor, Tensor> spectral_linear_backward(const Tensor& g, const OptTensor& x, const OptTensor& p,
                                                    const Tensor& weight, const Tensor& u, const Tensor& s,
                                                    const Tensor& vh, const Tensor& delta, std::string_view core,
                                                    std::string_view forward, std::string_view gradient,
                                                    bool needs_dx, bool needs_delta) {
  const Plan plan(core, forward, gradient);
  const Layer layer{weight, u, s, vh, delta, plan.core, plan.forward};
  const int64_t in = layer.in_features(), out = layer.out_features();
  const auto dtype = g.scalar_type();
  const Tensor g2 = g.reshape({-1, out});
  Tensor q, dx2;
  if (needs_dx) {
    if (plan.forward == Forward::Spectral) {
      q = project(g2, u);
      dx2 = at::mm(apply_sigma(q, layer, false), vh);
    } else if (plan.forward == Forward::Factored) {
      q = project(g2, u.to(dtype));
      dx2 = at::mm(g2, weight.to(dtype)).addmm_(apply_core(q, delta, plan.core, false), vh.to(dtype));
    } else {
      dx2 = at::mm(g2, merged(layer).to(dtype));
    }
  }
  const Tensor dx = dx2.defined() ? dx2.view(with_last(g, in)) : at::empty({0}, g.options());
  if (!needs_delta) return {dx, at::empty({0}, delta.options())};
  if (plan.gradient == Gradient::Dense) return {dx, dense_gradient(g2, x->reshape({-1, in}), layer)};
  if (q.defined()) return {dx, reduce_core(q, *p, delta, plan.core)};
  if (plan.gradient == Gradient::Short && dx2.defined() && in < out)
    if (const auto to_q = unscaled(vh.t(), layer, false))
      return {dx, project_and_reduce(dx2, to_q->basis, to_q->scale, *p, layer)};
  return {dx, project_and_reduce(g2, u.to(dtype), {}, *p, layer)};
}

}  // namespace
}  // namespace fastspec

// The schemas stand in fastspec/ops/spectral_linear.py, for they are there without this file too.
TORCH_LIBRARY_FRAGMENT(fastspec, m) {
  m.def("set_short_limits(float sigma_floor, float bias_ceiling) -> ()", [](double share, double ceiling) {
    fastspec::sigma_floor = share;
    fastspec::bias_ceiling = ceiling;
  });
}

TORCH_LIBRARY_IMPL(fastspec, CPU, m) {
  m.impl("spectral_linear", &fastspec::spectral_linear);
  m.impl("spectral_linear_backward", &fastspec::spectral_linear_backward);
}
