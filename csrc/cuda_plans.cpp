// See cuda_plans.h. The thin product is written first and the layer's own added to it: what is rounded on its
// way is the small correction, not y.
#include "cuda_plans.h"

#include <ATen/ATen.h>

#include "cuda_joined.h"
#include "cuda_reduce.h"

namespace fastspec::on_cuda {
namespace {

// A matrix [k, k + 2 h] whose every row holds C's from column h on; `diagonals` sees entry (i, i + o) of C at
// (i, h + o).
Tensor padded(const Tensor& like, int64_t k, int64_t h) { return at::zeros({k, k + 2 * h}, like.options()); }

Tensor diagonals(const Tensor& padded_core, int64_t k, int64_t h) {
  return padded_core.as_strided({k, 2 * h + 1}, {k + 2 * h + 1, 1});
}

// t C, or t C^T  [N, k], in the dtype of t; the arithmetic is in float32 at least.
Tensor apply_core(const Tensor& t, const Tensor& delta, Core core, bool transpose) {
  const auto wide = accumulation_dtype(t, delta);
  if (core == Core::Diag) {
    Tensor out = at::empty_like(t);
    return at::mul_out(out, t, delta);  // one launch, rounded to the dtype of t as it is stored
  }
  const Tensor c = (core == Core::Band ? band_matrix(delta) : delta).to(wide);
  return at::mm(t.to(wide), transpose ? c.t() : c).to(t.scalar_type());
}

// The trained entries of q^T p, in delta's shape and dtype; they are summed in float32 at least.
Tensor reduce_core(const Tensor& q, const Tensor& p, const Tensor& delta, Core core) {
  const auto wide = accumulation_dtype(delta, delta);
  if (core == Core::Diag && delta.scalar_type() == at::kFloat) return reduce_diagonal(q, p);
  if (core == Core::Diag) {
    return at::mul(q.to(wide), p).sum(0).to(delta.scalar_type());  // p is widened on its way in
  }
  const Tensor c = at::mm(q.to(wide).t(), p.to(wide)).to(delta.scalar_type());
  return core == Core::Dense ? c : band_storage(c, delta);
}

// W + U C Vh, row-major or transposed as W is.
Tensor effective(const Tensor& weight, const Tensor& u, const Tensor& vh, const Tensor& delta, const Plan& plan) {
  if (plan.forward == Forward::Resident) return weight;
  const Tensor left = apply_core(u, delta, plan.core, false);
  return weight.stride(1) == 1 ? at::addmm(weight, left, vh) : at::addmm(weight.t(), vh.t(), left.t()).t();
}

// Entries of U^T (g^T x) V (F4).
Tensor dense_gradient(const Tensor& g, const Tensor& x, const Tensor& u, const Tensor& vh, const Tensor& delta,
                      Core core) {
  const auto dtype = g.scalar_type();
  const Tensor rows = at::mm(u.to(dtype).t(), at::mm(g.t(), x));  // [k, in]
  if (core == Core::Dense) return at::mm(rows, vh.to(dtype).t()).to(delta.scalar_type());
  return reduce_core(rows.t(), vh.to(dtype).t(), delta, core);
}

}  // namespace

Tensor band_matrix(const Tensor& band) {
  const int64_t k = band.size(1), h = band.size(0) / 2;
  const Tensor wide = padded(band, k, h);
  diagonals(wide, k, h).copy_(band.t());
  return wide.narrow(1, h, k).clone(at::MemoryFormat::Contiguous);  // of one entry too: on 16 bytes
}

Tensor band_storage(const Tensor& c, const Tensor& like) {
  const int64_t k = c.size(0), h = like.size(0) / 2;
  const Tensor wide = padded(c, k, h);
  wide.narrow(1, h, k).copy_(c);
  return diagonals(wide, k, h).t().contiguous();
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, const OptTensor& bias, const Tensor& u,
                                   const Tensor& vh, const Tensor& delta, const Plan& plan) {
  const auto dtype = x.scalar_type();
  const int64_t in = weight.size(1), out = weight.size(0);
  const Tensor x2 = x.reshape({-1, in});
  if (plan.forward == Forward::Resident && plan.saves_p()) {
    if (const auto both = joined_forward(x, x2, weight, bias, vh)) return *both;
  }
  Tensor p, y;
  if (!plan.one_product() || plan.saves_p()) p = at::mm(x2, vh.to(dtype).t());
  if (plan.one_product()) {
    y = at::linear(x, effective(weight, u, vh, delta, plan).to(dtype), bias);
  } else {
    const Tensor z = apply_core(p, delta, plan.core, true), ut = u.to(dtype).t();
    y = bias ? at::addmm(*bias, z, ut) : at::mm(z, ut);
    y = y.addmm_(x2, weight.to(dtype).t()).view(with_last(x, out));
  }
  return {y, plan.saves_p() ? p : at::empty({0, u.size(1)}, x.options())};
}

std::tuple<Tensor, Tensor> backward(const Tensor& g, const OptTensor& x, const OptTensor& p, const Tensor& weight,
                                    const Tensor& u, const Tensor& vh, const Tensor& delta, const Plan& plan,
                                    bool needs_dx, bool needs_delta) {
  const auto dtype = g.scalar_type();
  const int64_t in = weight.size(1), out = weight.size(0);
  const Tensor g2 = g.reshape({-1, out});
  const bool by_p = needs_delta && plan.gradient != Gradient::Dense;
  Tensor q, dx;
  if (plan.forward == Forward::Resident && by_p && needs_dx) {
    if (const auto both = joined_backward(g, g2, weight, u))
      return {std::get<0>(*both), reduce_core(std::get<1>(*both), *p, delta, plan.core)};
  }
  if (by_p || (needs_dx && !plan.one_product())) q = at::mm(g2, u.to(dtype));
  if (needs_dx && plan.one_product())
    dx = at::mm(g2, effective(weight, u, vh, delta, plan).to(dtype)).view(with_last(g, in));
  else if (needs_dx)
    dx = at::mm(apply_core(q, delta, plan.core, false), vh.to(dtype))
             .addmm_(g2, weight.to(dtype))
             .view(with_last(g, in));
  if (!needs_dx) dx = at::empty({0}, g.options());
  if (!needs_delta) return {dx, at::empty({0}, delta.options())};
  if (!by_p) return {dx, dense_gradient(g2, x->reshape({-1, in}), u, vh, delta, plan.core)};
  return {dx, reduce_core(q, *p, delta, plan.core)};
}

}  // namespace fastspec::on_cuda
