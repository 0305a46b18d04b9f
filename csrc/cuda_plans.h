// The plans of fastspec/ops/aten.py on CUDA: products by ATen, in as few launches as they allow.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "plan.h"

namespace fastspec::on_cuda {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

// Whether these formulas hold the plan: not where values of sigma decide.
inline bool serves(const Plan& plan) {
  return plan.forward != Forward::Spectral && plan.gradient != Gradient::Short;
}

// y [..., out] and p [N, k] (no rows where the plan saves none).
std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, const OptTensor& bias, const Tensor& u,
                                   const Tensor& vh, const Tensor& delta, const Plan& plan);

// dx [..., in] and d delta in delta's shape; what is not needed comes back empty.
std::tuple<Tensor, Tensor> backward(const Tensor& g, const OptTensor& x, const OptTensor& p, const Tensor& weight,
                                    const Tensor& u, const Tensor& vh, const Tensor& delta, const Plan& plan,
                                    bool needs_dx, bool needs_delta);

// The core C [k, k] of a band [2 h + 1, k], contiguous.
Tensor band_matrix(const Tensor& band);

// The entries of C [k, k] that a band of the size of `like` trains, as it stores them; zero beyond C.
Tensor band_storage(const Tensor& c, const Tensor& like);

}  // namespace fastspec::on_cuda
