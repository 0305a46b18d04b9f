// Small dense algebra on stacks [A, ...]: what ATen does well for one matrix or for many, but not both.
#pragma once

#include <ATen/ATen.h>

namespace fastspec {

// a [A, p, q] b [A, q, r]; a lone pair goes to plain gemm, which costs less to start.
inline at::Tensor product(const at::Tensor& a, const at::Tensor& b) {
  return a.size(0) == 1 ? at::mm(a[0], b[0]).unsqueeze(0) : at::bmm(a, b);
}

// c <- c - a b
inline void subtract_product(const at::Tensor& c, const at::Tensor& a, const at::Tensor& b) {
  if (c.size(0) == 1) {
    c[0].addmm_(a[0], b[0], 1, -1);
  } else {
    c.baddbmm_(a, b, 1, -1);
  }
}

// Ascending eigenvalues [A, n] and eigenvectors in columns [A, n, n] of symmetric matrices.
std::tuple<at::Tensor, at::Tensor> symmetric_eigh(const at::Tensor& a);

}  // namespace fastspec
