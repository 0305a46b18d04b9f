// Certified singular triplets from a subspace or from the Gram matrix (see fastspec/svd/triplets.py).
#pragma once

#include <ATen/ATen.h>

#include "svd_options.h"

namespace fastspec {

struct Triplets {
  at::Tensor left;      // [A, m, k] orthonormal columns
  at::Tensor s;         // [A, k] descending
  at::Tensor right;     // [A, n, k]
  at::Tensor residual;  // [A] of these very tensors
};

// The best triplets within the span of `right [A, n, k]`, whose columns are nearly orthonormal. w [A, m, n],
// m >= n; the result has the dtype of `result`.
Triplets rayleigh_ritz(const at::Tensor& w, const at::Tensor& right, const SvdOptions& options,
                       at::ScalarType result);

// The k leading right vectors [A, n, k], float64, by all eigenvectors of W^T W accumulated in float64.
at::Tensor gram_subspace(const at::Tensor& w, int64_t k);

// The k leading triplets by all eigenvectors of W^T W, accumulated in float64.
Triplets gram_triplets(const at::Tensor& w, const SvdOptions& options);

// The k leading triplets by LAPACK's SVD of W itself; they have the dtype of `result`.
Triplets exact_triplets(const at::Tensor& w, const SvdOptions& options, at::ScalarType result);

}  // namespace fastspec
