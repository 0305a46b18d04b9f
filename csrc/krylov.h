// The leading right subspace of a stack by block Krylov iteration on W^T W (see fastspec/svd/krylov.py).
#pragma once

#include <ATen/ATen.h>

#include <functional>

#include "svd_options.h"

namespace fastspec {

// The k leading right vectors [A, n, k] of w [A, m, n], m >= n, float32 or float64, any device. `check_interrupt` is called
// once a step and may throw.
at::Tensor krylov_subspace(const at::Tensor& w, const SvdOptions& options,
                           const std::function<void()>& check_interrupt);

}  // namespace fastspec
