// The leading right subspace of a stack by block Krylov iteration on W^T W (see fastspec/svd/krylov.py).
#pragma once

#include <ATen/ATen.h>

#include <functional>

namespace fastspec {

struct KrylovOptions {
  int64_t k;           // vectors wanted
  double tol;          // relative residual allowed
  double floor;        // part of the largest singular value below which it is relative to that part
  int64_t max_steps;   // 0: no limit
  int64_t seed;        // of the start block
  int64_t width;       // columns of a block
  int64_t gram_short;  // short side up to which the Gram matrix is formed
  int64_t most;        // basis vectors at once, k + 2 width at least; beyond, a restart with the best
};

// Right vectors [A, n, k] of w [A, m, n], m >= n, float32 or float64, any device. `check_interrupt` is called
// once a step and may throw.
at::Tensor leading_subspace(const at::Tensor& w, const KrylovOptions& options,
                            const std::function<void()>& check_interrupt);

}  // namespace fastspec
