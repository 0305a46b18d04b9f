// Thin float32 products of the spectral layer on x86 CPUs with AVX-512 or AVX2 (design section 2, F1 and F2).
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>

namespace fastspec {

// Above this rank a BLAS is at its full speed and these products are no faster.
constexpr int64_t kThinRank = 64;

// Whether this processor runs the projections, and whether it runs the merge.
bool thin_supported();
bool thin_merge_supported();

// Whether they take this matrix: float32 on the CPU, unit column stride.
bool thin_operand(const at::Tensor& matrix);

// X B diag(scale) - shift  [N, k]  for x [N, d] and basis [d, k <= kThinRank] of any strides; scale and
// shift [k] or undefined.
at::Tensor thin_project(const at::Tensor& x, const at::Tensor& basis, const at::Tensor& scale = {},
                        const at::Tensor& shift = {});

// sum_n (X B)_ni p_ni  [k]  for x [N, d], basis [d, k], p [N, k]; X B is never written. Bitwise the same
// for any number of threads.
at::Tensor thin_project_dot(const at::Tensor& x, const at::Tensor& basis, const at::Tensor& p);

// W + L R into `out` [m, n] for l [m, k], r [k, n].
void thin_merge(const at::Tensor& w, const at::Tensor& left, const at::Tensor& right, const at::Tensor& out);

}  // namespace fastspec
