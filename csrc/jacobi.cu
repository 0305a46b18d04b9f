// Launches the Jacobi eigensolver of jacobi.h: one thread block to a matrix.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>

#include "built_for.h"
#include "checks.h"
#include "jacobi.h"

FASTSPEC_BUILT_FOR("any")

namespace fastspec {
namespace {

// Up to this order the matrix lies in shared memory (66 kB in float64) where a device has so much of it, beyond
// in global memory.
constexpr int kSharedOrder = 128;
// Of a block; with four blocks to a multiprocessor each has 64 registers.
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

int64_t triangle_of(int n) {
  const int64_t even = jacobi_even(n);
  return even * (even + 1) / 2;
}

template <typename T, bool kShared>
void launch(const at::Tensor& a, int64_t bytes, const at::Tensor& values, const at::Tensor& rows) {
  const int n = a.size(2);
  const auto triangles = at::empty({kShared ? 0 : a.size(0), triangle_of(n)}, a.options());
  const auto work = at::empty_like(a);
  jacobi_eigh_kernel<T, kShared><<<a.size(0), kThreads, bytes, c10::cuda::getCurrentCUDAStream()>>>(
      a.const_data_ptr<T>(), n, triangles.mutable_data_ptr<T>(), work.mutable_data_ptr<T>(),
      values.mutable_data_ptr<T>(), rows.mutable_data_ptr<T>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// Bytes that a packed matrix may take in this device's shared memory. The kernel's limit is state of the whole
// process: every call sets the same one, whatever its order, so that threads do not lower each other's.
template <typename T>
int64_t allow_shared() {
  const auto kernel = jacobi_eigh_kernel<T, true>;
  cudaFuncAttributes own;
  C10_CUDA_CHECK(cudaFuncGetAttributes(&own, kernel));
  int device;
  C10_CUDA_CHECK(
      cudaDeviceGetAttribute(&device, cudaDevAttrMaxSharedMemoryPerBlockOptin, c10::cuda::current_device()));
  const int64_t most =
      std::min<int64_t>(triangle_of(kSharedOrder) * sizeof(T), device - int64_t(own.sharedSizeBytes));
  C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(most)));
  return most;
}

std::tuple<at::Tensor, at::Tensor> jacobi_eigh_cuda(const at::Tensor& matrices) {
  check_jacobi_stack(matrices);
  const c10::cuda::CUDAGuard guard(matrices.device());
  const auto a = matrices.contiguous();
  auto values = at::empty({a.size(0), a.size(1)}, a.options());
  auto rows = at::empty_like(a);
  if (a.numel()) {
    AT_DISPATCH_FLOATING_TYPES(a.scalar_type(), "jacobi_eigh", [&] {
      const int64_t bytes = triangle_of(a.size(1)) * sizeof(scalar_t);
      if (bytes <= allow_shared<scalar_t>()) {
        launch<scalar_t, true>(a, bytes, values, rows);
      } else {
        launch<scalar_t, false>(a, 0, values, rows);
      }
    });
  }
  return {values, rows.mT()};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastspec, CUDA, m) { m.impl("jacobi_eigh", jacobi_eigh_cuda); }

}  // namespace fastspec
