// What the autograd of the operators of one task and of many shares. Their arguments begin alike: x, weight,
// bias or none, u, s, vh, and what is trained.
#pragma once
#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <optional>

namespace fastspec {

// Keeps what `Asked` and the functions below look at.
inline void keep_for_backward(torch::autograd::AutogradContext* ctx, const at::Tensor& x,
                              const std::optional<at::Tensor>& bias) {
  ctx->set_materialize_grads(false);
  ctx->saved_data["x_sizes"] = x.sym_sizes();
  if (bias) ctx->saved_data["bias"] = bias->scalar_type();
}

// The gradients that a backward is asked for.
struct Asked {
  bool dx, bias, trained;

  explicit Asked(torch::autograd::AutogradContext* ctx) {
    const bool has_bias = ctx->saved_data.count("bias") > 0;
    // edges are counted over the tensors that were given
    dx = ctx->needs_input_grad(0);
    bias = has_bias && ctx->needs_input_grad(2);
    trained = ctx->needs_input_grad(5 + has_bias);
  }
};

// What the gradient of p = x Vh^T, which only a second backward has, adds to that of x.
inline at::Tensor through_projection(torch::autograd::AutogradContext* ctx, const at::Tensor& dp,
                                     const at::Tensor& vh) {
  return at::mm(dp, vh.to(dp.scalar_type())).view_symint(ctx->saved_data["x_sizes"].toSymIntVector());
}

inline at::Tensor bias_gradient(torch::autograd::AutogradContext* ctx, const at::Tensor& g) {
  return g.reshape({-1, g.size(-1)}).sum(0).to(ctx->saved_data["bias"].toScalarType());
}

}  // namespace fastspec
