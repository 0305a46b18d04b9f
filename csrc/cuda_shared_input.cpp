// fastspec::shared_input: layers with kept copies that are called on the same x, such as query, key and value, in one
// product. fastspec/nn/shared_input.py lays their copies out in one matrix, for ranks k rounded up to k', here of two:
//
//     [[W_1,  U_1, 0  ],      [out_1 + out_2 + K, in + K],  K = k_1' + k_2'
//      [W_2,  0,   U_2],
//      [Vh_1, 0,   0  ],
//      [Vh_2, 0,   0  ]]
//
// The forward is one product with its first columns: every y and p. The backward adds up the products of every g with
// its rows: dx, and every q beside it.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <numeric>
#include <optional>
#include <vector>

#include "cuda_reduce.h"
#include "layer.h"

namespace fastspec::on_cuda {
namespace {

using at::Tensor;
using OptTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

int64_t sum(at::IntArrayRef sizes) { return std::accumulate(sizes.begin(), sizes.end(), int64_t{0}); }

// Every y, and p [N, K] of all layers where it is wanted, else without rows.
variable_list forward_of_all(const Tensor& x, const Tensor& matrix, const OptTensor& bias, at::IntArrayRef outs,
                             at::IntArrayRef ranks, bool wants_p) {
  const at::AutoDispatchBelowADInplaceOrView below;  // results are no views that autograd knows
  const int64_t in = x.size(-1), wide = sum(outs), all_ranks = sum(ranks);
  const int64_t rows = wide + (wants_p ? all_ranks : 0);
  const Tensor x2 = x.reshape({-1, in}), w = matrix.narrow(0, 0, rows).narrow(1, 0, in).t();
  const Tensor both = bias ? at::addmm(bias->narrow(0, 0, rows), x2, w) : at::mm(x2, w);
  variable_list found;
  int64_t column = 0;
  for (const int64_t out : outs) {
    const Tensor y = both.narrow(1, column, out);
    found.push_back(x.dim() == 2 ? y : y.view(with_last(x, out)));
    column += out;
  }
  if (!wants_p) {
    found.push_back(at::empty({0, all_ranks}, x.options()));
    return found;
  }
  // a copy, so that what is saved is p alone
  const Tensor p = both.narrow(1, wide, all_ranks);
  found.push_back(bias ? at::sub(p, bias->narrow(0, wide, all_ranks)) : p.clone(at::MemoryFormat::Contiguous));
  return found;
}

// The gradients of every delta, then dx [N, in], each where it is needed, from every g [..., out_i]; some may be
// undefined, not all.
struct Backward {
  const Tensor& matrix;
  const std::vector<int64_t>&outs, &ranks;
  int64_t in;
  bool needs_dx, needs_delta;

  variable_list run(at::TensorList gs, const Tensor& p, at::TensorList deltas) const {
    const at::AutoDispatchBelowADInplaceOrView below;
    const int64_t begin = needs_dx ? 0 : in, end = needs_delta ? in + sum(ranks) : in;
    Tensor both;  // dx and every q, or one of them
    int64_t row = 0;
    for (size_t i = 0; i < outs.size(); ++i) {
      if (gs[i].defined()) {
        const Tensor g = gs[i].reshape({-1, outs[i]}),
                     part = matrix.narrow(0, row, outs[i]).narrow(1, begin, end - begin);
        // the columns of other layers' q are zero
        if (both.defined())
          both.addmm_(g, part);
        else
          both = at::mm(g, part);
      }
      row += outs[i];
    }
    variable_list found(outs.size());
    if (needs_delta) {
      const Tensor sums = reduce_diagonal(both.narrow(1, in - begin, sum(ranks)), p);
      int64_t column = 0;
      for (size_t i = 0; i < outs.size(); ++i) {
        if (gs[i].defined()) found[i] = sums.narrow(0, column, deltas[i].size(0)).clone();
        column += ranks[i];
      }
    }
    found.push_back(needs_dx ? both.narrow(1, 0, in) : Tensor());
    return found;
  }

  // By formulas that autograd follows, for a backward that is differentiated itself.
  variable_list differentiable(at::TensorList gs, const Tensor& p, at::TensorList deltas) const {
    Tensor dx;
    variable_list found(outs.size());
    int64_t row = 0, column = 0;
    for (size_t i = 0; i < outs.size(); ++i) {
      const int64_t k = deltas[i].size(0);
      if (gs[i].defined()) {
        const Tensor rows = matrix.narrow(0, row, outs[i]), g = gs[i].reshape({-1, outs[i]});
        const Tensor vh = matrix.narrow(0, sum(outs) + column, k).narrow(1, 0, in);
        const Tensor q = at::mm(g, rows.narrow(1, in + column, k));
        if (needs_dx) {
          // W_eff holds U C Vh already, as a constant: its derivative alone is added
          const Tensor z = at::mul(q.to(at::kFloat), deltas[i] - deltas[i].detach()).to(g.scalar_type());
          const Tensor one = at::mm(g, rows.narrow(1, 0, in)) + at::mm(z, vh);
          dx = dx.defined() ? dx + one : one;
        }
        if (needs_delta) found[i] = at::mul(q.to(at::kFloat), p.narrow(1, column, k)).sum(0);
      }
      row += outs[i];
      column += ranks[i];
    }
    found.push_back(dx);
    return found;
  }
};

// Saves p, and nothing where no coefficient gradient is wanted.
struct SharedInput : torch::autograd::Function<SharedInput> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& matrix, const OptTensor& bias,
                               at::IntArrayRef outs, at::IntArrayRef ranks, at::TensorList deltas) {
    bool wanted = false;
    for (const Tensor& delta : deltas) wanted = wanted || delta.requires_grad();
    variable_list found = forward_of_all(x, matrix, bias, outs, ranks, wanted);
    ctx->set_materialize_grads(false);
    ctx->saved_data["sizes"] = x.sym_sizes();
    ctx->saved_data["bias"] = bias.has_value();
    ctx->saved_data["outs"] = outs.vec();
    ctx->saved_data["ranks"] = ranks.vec();
    variable_list saved{matrix, wanted ? found.back() : Tensor()};
    saved.insert(saved.end(), deltas.begin(), deltas.end());
    ctx->save_for_backward(saved);
    if (!wanted) ctx->mark_non_differentiable({found.back()});
    return found;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const auto outs = ctx->saved_data["outs"].toIntVector(), ranks = ctx->saved_data["ranks"].toIntVector();
    const auto sizes = ctx->saved_data["sizes"].toSymIntVector();
    const size_t layers = outs.size(), first = ctx->saved_data["bias"].toBool() ? 3 : 2;
    const Tensor& dp = grads[layers];  // of a second backward
    variable_list found(5 + layers);   // one for every argument of forward
    bool needs_delta = false, any = false;
    for (size_t i = 0; i < layers; ++i) {
      needs_delta = needs_delta || ctx->needs_input_grad(first + i);
      any = any || grads[i].defined();
    }
    const Backward of{saved[0], outs, ranks, sizes.back().expect_int(), ctx->needs_input_grad(0), needs_delta};
    Tensor dx;
    if (any && (of.needs_dx || needs_delta)) {
      const at::TensorList deltas(saved.data() + 2, layers), gs(grads.data(), layers);
      variable_list all =
          at::GradMode::is_enabled() ? of.differentiable(gs, saved[1], deltas) : of.run(gs, saved[1], deltas);
      dx = all.back();
      for (size_t i = 0; i < layers; ++i)
        if (ctx->needs_input_grad(first + i)) found[5 + i] = all[i];
    }
    if (of.needs_dx && dp.defined()) {
      const Tensor vh = of.matrix.narrow(0, sum(outs), sum(ranks)).narrow(1, 0, of.in);
      const Tensor more = at::mm(dp, vh);
      dx = dx.defined() ? at::add(dx, more) : more;
    }
    if (of.needs_dx && dx.defined()) found[0] = dx.dim() == int64_t(sizes.size()) ? dx : dx.view_symint(sizes);
    return found;
  }
};

variable_list shared_input(const Tensor& x, const Tensor& matrix, const OptTensor& bias, at::IntArrayRef outs,
                           at::IntArrayRef ranks, at::TensorList deltas) {
  bool wanted = x.requires_grad();
  for (const Tensor& delta : deltas) wanted = wanted || delta.requires_grad();
  variable_list found = at::GradMode::is_enabled() && wanted
                            ? SharedInput::apply(x, matrix, bias, outs, ranks, deltas)
                            : forward_of_all(x, matrix, bias, outs, ranks, false);
  found.pop_back();
  return found;
}

}  // namespace
}  // namespace fastspec::on_cuda

TORCH_LIBRARY_FRAGMENT(fastspec, m) {
  m.def("shared_input(Tensor x, Tensor matrix, Tensor? bias, int[] outs, int[] ranks, Tensor[] deltas) -> Tensor[]",
        &fastspec::on_cuda::shared_input);
}
