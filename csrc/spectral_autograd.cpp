// Autograd of fastspec::spectral_linear, on a CPU and on CUDA. Without this file fastspec/ops/spectral_linear.py
// says the same in Python, 50 us a direction slower.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "autograd.h"
#include "plan.h"

namespace fastspec {
namespace {

using at::Tensor;
using OptTensor = std::optional<Tensor>;
using ForwardFunction = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const OptTensor&, const Tensor&,
                                                   const Tensor&, const Tensor&, const Tensor&, std::string_view,
                                                   std::string_view, std::string_view);
using BackwardFunction = std::tuple<Tensor, Tensor>(const Tensor&, const OptTensor&, const OptTensor&,
                                                    const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                                    const Tensor&, std::string_view, std::string_view,
                                                    std::string_view, bool, bool);

std::tuple<Tensor, Tensor> call(const Tensor& x, const Tensor& weight, const OptTensor& bias, const Tensor& u,
                                const Tensor& s, const Tensor& vh, const Tensor& delta, std::string_view core,
                                std::string_view forward, std::string_view gradient) {
  static const auto op = operator_handle<ForwardFunction>("fastspec::spectral_linear");
  const at::AutoDispatchBelowADInplaceOrView below;
  return op.call(x, weight, bias, u, s, vh, delta, core, forward, gradient);
}

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Saves p [N, k] (F1), or x on the dense route (F4), and nothing where no coefficient gradient is wanted.
struct SpectralLinear : torch::autograd::Function<SpectralLinear> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const OptTensor& bias,
                               const Tensor& u, const Tensor& s, const Tensor& vh, const Tensor& delta,
                               std::string_view core, std::string_view forward, std::string_view gradient) {
    auto [y, p] = call(x, weight, bias, u, s, vh, delta, core, forward, gradient);
    const bool wanted = delta.requires_grad();
    const Plan plan(core, forward, gradient);
    const bool keeps_x = wanted && plan.gradient == Gradient::Dense;
    const bool keeps_p = wanted && plan.saves_p();
    keep_for_backward(ctx, x, bias);
    if (!keeps_p) ctx->mark_non_differentiable({p});
    ctx->save_for_backward({keeps_x ? x : Tensor(), keeps_p ? p : Tensor(), weight, u, s, vh, delta});
    ctx->saved_data["plan"] = plan.code();
    return {y, p};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    static const auto fast = operator_handle<BackwardFunction>("fastspec::spectral_linear_backward");
    static const auto differentiable = operator_handle<BackwardFunction>("fastspec::spectral_linear_double");
    variable_list out(10);  // one for every argument of forward
    const Tensor& g = grads[0];
    const Tensor& dp = grads[1];  // of a second backward
    if (!g.defined() && !dp.defined()) return out;
    const Asked asked(ctx);
    const auto saved = ctx->get_saved_variables();
    if (asked.dx && dp.defined()) out[0] = through_projection(ctx, dp, saved[5]);
    if (!g.defined()) return out;
    if (asked.dx || asked.trained) {
      const auto given = [](const Tensor& t) { return t.defined() ? OptTensor(t) : std::nullopt; };
      const Plan plan(ctx->saved_data["plan"].toInt());
      const auto run = [&](const auto& op) {
        return op.call(g, given(saved[0]), given(saved[1]), saved[2], saved[3], saved[4], saved[5], saved[6],
                       plan.core_name(), plan.forward_name(), plan.gradient_name(), asked.dx, asked.trained);
      };
      const auto below = [&] {
        const at::AutoDispatchBelowADInplaceOrView guard;
        return run(fast);
      };
      auto [dx, ddelta] = at::GradMode::is_enabled() ? run(differentiable) : below();
      if (asked.dx) out[0] = out[0].defined() ? at::add(out[0], dx) : dx;
      if (asked.trained) out[6] = ddelta;
    }
    if (asked.bias) out[2] = bias_gradient(ctx, g);
    return out;
  }
};

std::tuple<Tensor, Tensor> spectral_linear_autograd(const Tensor& x, const Tensor& weight, const OptTensor& bias,
                                                    const Tensor& u, const Tensor& s, const Tensor& vh,
                                                    const Tensor& delta, std::string_view core,
                                                    std::string_view forward, std::string_view gradient) {
  if (!at::GradMode::is_enabled() ||
      !(x.requires_grad() || delta.requires_grad() || (bias && bias->requires_grad())))
    return call(x, weight, bias, u, s, vh, delta, core, forward, gradient);
  auto out = SpectralLinear::apply(x, weight, bias, u, s, vh, delta, core, forward, gradient);
  return {out[0], out[1]};
}

}  // namespace
}  // namespace fastspec

TORCH_LIBRARY_IMPL(fastspec, AutogradCPU, m) { m.impl("spectral_linear", &fastspec::spectral_linear_autograd); }
TORCH_LIBRARY_IMPL(fastspec, AutogradCUDA, m) { m.impl("spectral_linear", &fastspec::spectral_linear_autograd); }
