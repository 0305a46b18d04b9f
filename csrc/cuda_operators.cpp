// fastspec::spectral_linear and its backward on CUDA: what serves a kind of call is looked up here, and run by
// ATen or by one call of Python, which starts the kernel. A call that is new goes to Python whole
// (fastspec/kernels/dispatch.py), which chooses and says what to remember.
//
// Nothing of CUDA is called by name, so this needs no toolkit; tests let it serve CPU tensors.
#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <memory>
#include <string_view>
#include <tuple>
#include <vector>

#include "cuda_choices.h"
#include "cuda_plans.h"

namespace fastspec::on_cuda {
namespace {

using Result = std::tuple<Tensor, Tensor>;
using Chosen = std::tuple<Tensor, Tensor, std::vector<int64_t>>;

const Tensor* given(const OptTensor& t) { return t ? &*t : nullptr; }

// The core as the kernels read it: contiguous, a band as its matrix.
Tensor stored(const Tensor& delta, Core core) { return core == Core::Band ? band_matrix(delta) : delta; }

Result forward_by_launch(const Served& served, const Tensor& x, const Tensor& x2, const Tensor& weight,
                         const OptTensor& bias, const Tensor& u, const Tensor& vh, const Tensor& delta,
                         const Plan& plan) {
  const Tensor y = at::empty({x2.size(0), weight.size(0)}, x.options());
  const Tensor p = at::empty({x2.size(0), u.size(1)}, x.options());
  const Tensor core = stored(delta, plan.core);
  start(served.record, {address(x2), address(weight), address(bias ? *bias : x2), address(u), address(vh),
                        address(core), address(y), address(p)});
  return {x.dim() == 2 ? y : y.view(with_last(x, weight.size(0))),
          plan.saves_p() ? p : at::empty({0, u.size(1)}, x.options())};
}

Result backward_by_launch(const Served& served, const Tensor& g, const Tensor& g2, const OptTensor& p,
                          const Tensor& weight, const Tensor& u, const Tensor& vh, const Tensor& delta,
                          const Plan& plan, bool needs_delta) {
  const int64_t k = u.size(1);
  const Tensor dx = at::empty({g2.size(0), weight.size(1)}, g.options());
  const Tensor core = stored(delta, plan.core);
  // a slot of shares for every row tile, which the kernel may sum itself
  Tensor shares = dx;
  if (needs_delta && plan.core == Core::Diag) shares = at::empty({served.slots, k}, delta.options());
  if (needs_delta && plan.core != Core::Diag) shares = at::empty({served.slots, k, k}, delta.options());
  Tensor sum = served.summed ? at::empty_like(core) : shares;
  start(served.record, {address(g2), address(p ? *p : g2), address(weight), address(u), address(vh), address(core),
                        address(dx), address(shares), address(sum)});
  const Tensor shaped = g.dim() == 2 ? dx : dx.view(with_last(g, weight.size(1)));
  if (!needs_delta) return {shaped, at::empty({0}, delta.options())};
  if (!served.summed) sum = served.slots == 1 ? shares.select(0, 0) : shares.sum(0);
  return {shaped, plan.core == Core::Band ? band_storage(sum, delta) : sum};
}

Result spectral_linear(const Tensor& x, const Tensor& weight, const OptTensor& bias, const Tensor& u,
                       const Tensor& s, const Tensor& vh, const Tensor& delta, std::string_view core,
                       std::string_view forward_name, std::string_view gradient) {
  const c10::OptionalDeviceGuard device(x.device());
  Plan plan(core, forward_name, gradient);
  const Tensor x2 = x.dim() == 2 ? x : x.reshape({-1, weight.size(1)});
  const bool whole = delta.is_contiguous() && (!bias || bias->is_contiguous());
  const CallKey key(CallKey::Forward, plan, plan.saves_p(), bias.has_value(), x2,
                    {&x2, &weight, given(bias), &u, &vh, &delta});
  const bool may_be_known = whole && key.valid();
  if (may_be_known) {
    if (const auto served = known(key)) {
      if (served->how == Served::Launch) return forward_by_launch(*served, x, x2, weight, bias, u, vh, delta, plan);
      if (served->how == Served::Merged) plan.forward = Forward::Merged;
      return forward(x, weight, bias, u, vh, delta, plan);
    }
  }
  static const auto choose =
      operator_handle<Chosen(const Tensor&, const Tensor&, const OptTensor&, const Tensor&, const Tensor&,
                             const Tensor&, const Tensor&, std::string_view, std::string_view, std::string_view)>(
          "fastspec::choose_spectral_linear");
  auto [y, p, answer] = choose.call(x, weight, bias, u, s, vh, delta, core, forward_name, gradient);
  if (may_be_known) remember(key, answer);
  return {y, p};
}

Result spectral_linear_backward(const Tensor& g, const OptTensor& x, const OptTensor& p, const Tensor& weight,
                                const Tensor& u, const Tensor& s, const Tensor& vh, const Tensor& delta,
                                std::string_view core, std::string_view forward_name, std::string_view gradient,
                                bool needs_dx, bool needs_delta) {
  const c10::OptionalDeviceGuard device(g.device());
  const at::AutoDispatchBelowADInplaceOrView below;  // a caller past fastspec's own autograd may have none
  Plan plan(core, forward_name, gradient);
  const Tensor g2 = g.dim() == 2 ? g : g.reshape({-1, weight.size(0)});
  const bool whole = delta.is_contiguous() && (!p || p->is_contiguous());
  const CallKey key(CallKey::Backward, plan, needs_dx, needs_delta, g2, {&g2, given(p), &weight, &u, &vh, &delta});
  const bool may_be_known = whole && key.valid();
  if (may_be_known) {
    if (const auto served = known(key)) {
      if (served->how == Served::Launch)
        return backward_by_launch(*served, g, g2, p, weight, u, vh, delta, plan, needs_delta);
      if (served->how == Served::Merged) plan.forward = Forward::Merged;
      return backward(g, x, p, weight, u, vh, delta, plan, needs_dx, needs_delta);
    }
  }
  static const auto choose =
      operator_handle<Chosen(const Tensor&, const OptTensor&, const OptTensor&, const Tensor&, const Tensor&,
                             const Tensor&, const Tensor&, const Tensor&, std::string_view, std::string_view,
                             std::string_view, bool, bool)>("fastspec::choose_spectral_linear_backward");
  auto [dx, ddelta, answer] =
      choose.call(g, x, p, weight, u, s, vh, delta, core, forward_name, gradient, needs_dx, needs_delta);
  if (may_be_known) remember(key, answer);
  return {dx, ddelta};
}

// Whether CPU tensors take this route, as in tests.
void serve_cpu(bool on) {
  static std::unique_ptr<torch::Library> library;
  library.reset();
  forget_all();
  if (!on) return;
  library =
      std::make_unique<torch::Library>(torch::Library::IMPL, "fastspec", c10::DispatchKey::CPU, __FILE__, __LINE__);
  library->impl("spectral_linear", &spectral_linear);
  library->impl("spectral_linear_backward", &spectral_linear_backward);
}

}  // namespace
}  // namespace fastspec::on_cuda

TORCH_LIBRARY_FRAGMENT(fastspec, m) { m.def("serve_cpu_as_cuda(bool on) -> ()", &fastspec::on_cuda::serve_cpu); }

TORCH_LIBRARY_IMPL(fastspec, CUDA, m) {
  m.impl("spectral_linear", &fastspec::on_cuda::spectral_linear);
  m.impl("spectral_linear_backward", &fastspec::on_cuda::spectral_linear_backward);
}
