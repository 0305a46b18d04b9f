// Passes over [N, k] with a core of few diagonals: t C and the trained entries of q^T p, all at once.
#pragma once
#include <ATen/core/Tensor.h>

namespace fastspec {

// t (diag(s) + C), or t (diag(s) + C)^T  [N, k], for t [N, k] float32 or float64, s [k] or undefined and
// delta [k] or [2 h + 1, k] of the dtype of t.
at::Tensor diagonals_apply(const at::Tensor& t, const at::Tensor& s, const at::Tensor& delta, bool transpose);

// The entries of q^T p on the diagonals of `like` [k] or [2 h + 1, k], for q and p [N, k] of its dtype. Bitwise the
// same for any number of threads.
at::Tensor diagonals_reduce(const at::Tensor& q, const at::Tensor& p, const at::Tensor& like);

}  // namespace fastspec
