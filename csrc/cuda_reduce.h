// The coefficient gradient of a diagonal core on CUDA, in one launch.
#pragma once
#include <ATen/core/Tensor.h>

namespace fastspec::on_cuda {

// sum_n q[n, i] p[n, i]  [k] in float32, summed in float32, from q and p [N, k]. A kernel makes it where rows of q
// and p lie in memory in order (fastspec/kernels/reduce.py), else three calls of ATen.
at::Tensor reduce_diagonal(const at::Tensor& q, const at::Tensor& p);

}  // namespace fastspec::on_cuda
