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

// Up to this order the vectors lie in shared memory beside the matrix (98 kB in float32, 197 kB in float64)
// where a device has so much of it, beyond in global memory.
constexpr int kVectorsOrder = 128;
// The same of the matrix: 132 kB in float32, 66 kB in float64.
template <typename T>
constexpr int kMatrixOrder = sizeof(T) == 4 ? kJacobiOrder : 128;
// Most threads of a block, which leaves each 128 registers.
constexpr int kThreads = 512;

enum Shared { kNothing, kMatrix, kMatrixAndVectors };  // what lies in shared memory

struct ThreadBlock {
  __device__ int lane() const { return threadIdx.x; }
  __device__ int lanes() const { return blockDim.x; }
  __device__ void barrier() const { __syncthreads(); }
  __device__ bool any(bool mine) const { return __syncthreads_or(mine); }
};

constexpr int64_t vectors_of(int n) { return int64_t(jacobi_padded(n)) * jacobi_padded(n) / 4; }

template <typename T>
constexpr int64_t shared_bytes(int n, Shared what) {
  const int64_t matrix = what == kNothing ? 0 : jacobi_triangle(n) * sizeof(T);
  return matrix + (what == kMatrixAndVectors ? vectors_of(n) * sizeof(JacobiFour<T>) : 0);
}

template <typename T, Shared what>
__global__ void __launch_bounds__(kThreads, 1)
    jacobi_eigh_kernel(const T* a,  // [L, n, n]
                       int n,
                       T* triangles,            // [L, N (N + 1) / 2], unused where the matrix is in shared memory
                       JacobiFour<T>* vectors,  // [L, N, N / 4], likewise
                       T* values,               // [L, n]
                       T* rows) {               // [L, n, n]
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ JacobiTurn<T> turns[kJacobiOrder / 4];
  __shared__ JacobiGroup groups[kJacobiOrder / 4];
  __shared__ int place[kJacobiOrder];
  const int64_t l = blockIdx.x, size = int64_t(n) * n;
  JacobiScratch<T> own{nullptr, nullptr, turns, groups, place};
  if constexpr (what == kMatrixAndVectors) {
    own.vectors = reinterpret_cast<JacobiFour<T>*>(shared);
    own.packed = reinterpret_cast<T*>(own.vectors + vectors_of(n));
  } else {
    own.vectors = vectors + l * vectors_of(n);
    if constexpr (what == kMatrix) {
      own.packed = reinterpret_cast<T*>(shared);
    } else {
      own.packed = triangles + l * jacobi_triangle(n);
    }
  }
  jacobi_eigh(ThreadBlock{}, a + l * size, n, own, values + l * n, rows + l * size);
}

// Threads of a block with so much shared memory: a multiprocessor of 227 kB holds seven blocks, or three, or few.
int threads_of(int64_t bytes) {
  constexpr int64_t kKilobyte = 1024;
  if (bytes == 0 || bytes > 72 * kKilobyte) return kThreads;
  return bytes > 32 * kKilobyte ? 256 : 128;
}

template <typename T, Shared what>
void launch(const at::Tensor& a, const at::Tensor& values, const at::Tensor& rows) {
  const int n = a.size(2);
  const int64_t bytes = shared_bytes<T>(n, what), count = a.size(0);
  const auto triangles = at::empty({what == kNothing ? count : 0, jacobi_triangle(n)}, a.options());
  const auto vectors = at::empty({what == kMatrixAndVectors ? 0 : count, vectors_of(n), 4}, a.options());
  jacobi_eigh_kernel<T, what><<<count, threads_of(bytes), bytes, c10::cuda::getCurrentCUDAStream()>>>(
      a.const_data_ptr<T>(), n, triangles.mutable_data_ptr<T>(),
      reinterpret_cast<JacobiFour<T>*>(vectors.mutable_data_ptr<T>()), values.mutable_data_ptr<T>(),
      rows.mutable_data_ptr<T>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// Whether a kernel can serve this order. Its limit of shared memory is state of the whole process: every call
// sets the same one, whatever its order, so that threads do not lower each other's.
template <typename T, Shared what>
bool serves(int n, int largest) {
  const auto kernel = jacobi_eigh_kernel<T, what>;
  cudaFuncAttributes own;
  C10_CUDA_CHECK(cudaFuncGetAttributes(&own, kernel));
  int device;
  C10_CUDA_CHECK(
      cudaDeviceGetAttribute(&device, cudaDevAttrMaxSharedMemoryPerBlockOptin, c10::cuda::current_device()));
  const int64_t most = std::min<int64_t>(shared_bytes<T>(largest, what), device - int64_t(own.sharedSizeBytes));
  C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(most)));
  return shared_bytes<T>(n, what) <= most;
}

std::tuple<at::Tensor, at::Tensor> jacobi_eigh_cuda(const at::Tensor& matrices) {
  check_jacobi_stack(matrices);
  const c10::cuda::CUDAGuard guard(matrices.device());
  const auto a = matrices.contiguous();
  auto values = at::empty({a.size(0), a.size(1)}, a.options());
  auto rows = at::empty_like(a);
  if (a.numel()) {
    const int n = a.size(1);
    AT_DISPATCH_FLOATING_TYPES(a.scalar_type(), "jacobi_eigh", [&] {
      if (serves<scalar_t, kMatrixAndVectors>(n, kVectorsOrder)) {
        launch<scalar_t, kMatrixAndVectors>(a, values, rows);
      } else if (serves<scalar_t, kMatrix>(n, kMatrixOrder<scalar_t>)) {
        launch<scalar_t, kMatrix>(a, values, rows);
      } else {
        launch<scalar_t, kNothing>(a, values, rows);
      }
    });
  }
  return {values, rows.mT()};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastspec, CUDA, m) { m.impl("jacobi_eigh", jacobi_eigh_cuda); }

}  // namespace fastspec
