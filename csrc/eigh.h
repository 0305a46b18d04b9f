// Small symmetric eigenproblems, by what is fastest on their device.
#pragma once

#include <ATen/ATen.h>

#include <tuple>

namespace fastspec {

// Ascending eigenvalues [A, n] and eigenvectors in columns [A, n, n] of symmetric matrices.
std::tuple<at::Tensor, at::Tensor> symmetric_eigh(const at::Tensor& a);

}  // namespace fastspec
