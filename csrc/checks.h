// What the operators ask of their input.
#pragma once

#include <ATen/ATen.h>

#include "jacobi.h"

namespace fastspec {

inline void check_stack(const at::Tensor& a, const char* name) {
  TORCH_CHECK_VALUE(a.dim() == 3, name, " must be a stack [L, m, n], got ", a.sizes());
  TORCH_CHECK_TYPE(a.scalar_type() == at::kFloat || a.scalar_type() == at::kDouble, name,
                   " must be float32 or float64, got ", a.scalar_type());
}

inline void check_symmetric_stack(const at::Tensor& a) {
  check_stack(a, "a");
  TORCH_CHECK_VALUE(a.size(1) == a.size(2), "a must hold square matrices, got ", a.sizes());
}

inline void check_jacobi_stack(const at::Tensor& a) {
  check_symmetric_stack(a);
  TORCH_CHECK_VALUE(a.size(1) <= kJacobiOrder, "a must hold matrices of order ", kJacobiOrder, " at most, got ",
                    a.sizes(), "; use torch.linalg.eigh");
}

}  // namespace fastspec
