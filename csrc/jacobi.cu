// Launches the Jacobi eigensolver of jacobi.h: one thread block to a matrix.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "jacobi.h"
#include "stacks.h"

namespace fastspec {
namespace {

// Up to this order the matrix lies in shared memory (66 kB in float64), beyond it in global memory.
constexpr int kSharedOrder = 128;
constexpr int kThreads = 256;

template <typename T, bool kShared>
__global__ void __launch_bounds__(kThreads, 4)
    jacobi_eigh_kernel(const T* a,  // [L, n, n]
                       int n,
                       T* triangles,  // [L, N (N + 1) / 2], unused where the matrix is in shared memory
                       T* work,       // [L, n, n]
                       T* values,     // [L, n]
                       T* rows) {     // [L, n, n]
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ JacobiRotation<T> rotations[kJacobiOrder / 2];
  __shared__ int place[kJacobiOrder];
  __shared__ int latest;
  const int64_t l = blockIdx.x, size = int64_t(n) * n, even = jacobi_even(n);
  T* packed;
  if constexpr (kShared) {
    packed = reinterpret_cast<T*>(shared);
  } else {
    packed = triangles + l * (even * (even + 1) / 2);
  }
  const JacobiScratch<T> own{packed, rotations, place, &latest};
  jacobi_eigh(a + l * size, n, own, work + l * size, values + l * n, rows + l * size);
}

template <typename T, bool kShared>
void launch(const at::Tensor& a, const at::Tensor& values, const at::Tensor& rows) {
  const int n = a.size(2), even = jacobi_even(n);
  const int64_t triangle = int64_t(even) * (even + 1) / 2;
  const auto triangles = at::empty({kShared ? 0 : a.size(0), triangle}, a.options());
  const auto work = at::empty_like(a);
  const int bytes = kShared ? triangle * sizeof(T) : 0;
  const auto kernel = jacobi_eigh_kernel<T, kShared>;
  C10_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  kernel<<<a.size(0), kThreads, bytes, c10::cuda::getCurrentCUDAStream()>>>(
      a.const_data_ptr<T>(), n, triangles.mutable_data_ptr<T>(), work.mutable_data_ptr<T>(),
      values.mutable_data_ptr<T>(), rows.mutable_data_ptr<T>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<at::Tensor, at::Tensor> jacobi_eigh_cuda(const at::Tensor& matrices) {
  check_jacobi_stack(matrices);
  const c10::cuda::CUDAGuard guard(matrices.device());
  const auto a = matrices.contiguous();
  auto values = at::empty({a.size(0), a.size(1)}, a.options());
  auto rows = at::empty_like(a);
  if (a.numel()) {
    AT_DISPATCH_FLOATING_TYPES(a.scalar_type(), "jacobi_eigh", [&] {
      if (a.size(1) <= kSharedOrder) {
        launch<scalar_t, true>(a, values, rows);
      } else {
        launch<scalar_t, false>(a, values, rows);
      }
    });
  }
  return {values, rows.mT()};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastspec, CUDA, m) { m.impl("jacobi_eigh", jacobi_eigh_cuda); }

}  // namespace fastspec
