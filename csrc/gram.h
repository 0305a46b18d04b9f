// The Gram matrix W^T W of float32 or float64 matrices, formed and applied.
#pragma once

#include <ATen/ATen.h>

namespace fastspec {

// W^T W [A, n, n] of w [A, m, n].
at::Tensor gram_matrix(const at::Tensor& w);

// x W^T W [1, b, n] of a row-major matrix w [1, m, n] and x [1, b, n], both contiguous, on the CPU. W is read
// once: each of its blocks of rows stays in a core's cache for both products.
at::Tensor gram_times(const at::Tensor& x, const at::Tensor& w);

}  // namespace fastspec
