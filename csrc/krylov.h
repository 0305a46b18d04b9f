// Block Krylov iteration on W^T W of one matrix: the compiled twin of fastspec/krylov.py.
#pragma once

#include <ATen/ATen.h>

namespace fastspec {

struct KrylovOptions {
  int64_t k;          // right vectors wanted
  double tol;         // relative residual asked of every triplet
  double floor;       // part of s_1 below which a residual is measured against that part
  int64_t max_steps;  // 0: as many as the short side allows
  int64_t seed;
  int64_t width;       // columns multiplied at once
  int64_t gram_short;  // up to this short side W^T W is formed first
};

// Right vectors [n, k] of w [m, n], m >= n, float32 or float64 on the CPU. Runs on the calling thread,
// with whatever threads BLAS may use there.
at::Tensor leading_subspace(const at::Tensor& w, const KrylovOptions& options);

}  // namespace fastspec
