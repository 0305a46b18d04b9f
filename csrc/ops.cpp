// Registration of the CPU operators, and how a stack is divided among threads.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <atomic>
#include <exception>
#include <functional>
#include <mutex>
#include <vector>

#include "jacobi.h"
#include "krylov.h"
#include "stacks.h"

namespace fastspec {
namespace {

// Calls `work(i)` for every matrix of a stack: one thread for each matrix, BLAS single-threaded inside,
// because LAPACK threads fight each other over small matrices. A lone matrix keeps all BLAS threads.
void for_each_matrix(int64_t count, const std::function<void(int64_t)>& work) {
  const int64_t threads = std::min<int64_t>(count, at::get_num_threads());
  std::atomic<int64_t> next{0};
  std::exception_ptr failure;
  std::mutex failing;
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    at::AutoDispatchBelowADInplaceOrView guard;
    for (int64_t thread = begin; thread < end; ++thread) {
      try {
        for (int64_t i; (i = next++) < count;) work(i);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(failing);
        failure = std::current_exception();
        next = count;
      }
    }
  });
  if (failure) std::rethrow_exception(failure);
}

at::Tensor leading_subspace_cpu(const at::Tensor& w,  // [L, m, n], m >= n
                                int64_t k, double tol, double floor, int64_t max_steps,
                                int64_t seed, int64_t width, int64_t gram_short) {
  check_stack(w, "w");
  TORCH_CHECK_VALUE(w.size(1) >= w.size(2), "w must have its short side last, got ", w.sizes());
  TORCH_CHECK_VALUE(1 <= k && k <= w.size(2), "k must lie between 1 and ", w.size(2), ", got ", k);
  TORCH_CHECK_VALUE(width >= 1, "width must be at least 1, got ", width);
  const KrylovOptions options{k, tol, floor, max_steps, seed, width, gram_short};
  auto right = at::empty({w.size(0), w.size(2), k}, w.options());
  for_each_matrix(w.size(0), [&](int64_t i) { right[i].copy_(leading_subspace(w[i], options)); });
  return right;
}

// Eigenvectors of symmetric matrices [L, n, n], in ascending order of their values.
at::Tensor eigenvectors_cpu(const at::Tensor& a) {
  check_symmetric_stack(a);
  auto vectors = at::empty_like(a);
  for_each_matrix(a.size(0),
                  [&](int64_t i) { vectors[i].copy_(std::get<1>(at::linalg_eigh(a[i]))); });
  return vectors;
}

template <typename T>
void jacobi_one(const at::Tensor& a, const at::Tensor& values, const at::Tensor& rows) {
  const int n = a.size(0), even = jacobi_even(n);
  const auto work = at::empty_like(a);
  std::vector<T> packed(even * (even + 1) / 2);
  std::vector<JacobiRotation<T>> rotations(even / 2);
  std::vector<int> place(n);
  int latest;
  jacobi_eigh<T>(a.const_data_ptr<T>(), n, {packed.data(), rotations.data(), place.data(), &latest},
                 work.mutable_data_ptr<T>(), values.mutable_data_ptr<T>(), rows.mutable_data_ptr<T>());
}

// Eigenvalues [L, n], ascending, and eigenvectors [L, n, n] in columns, of symmetric matrices of which the
// lower triangles are read. The code that runs on a GPU; on a CPU LAPACK is faster (bench/test_eigh.py).
std::tuple<at::Tensor, at::Tensor> jacobi_eigh_cpu(const at::Tensor& matrices) {
  check_jacobi_stack(matrices);
  const auto a = matrices.contiguous();
  auto values = at::empty({a.size(0), a.size(1)}, a.options());
  auto rows = at::empty_like(a);
  for_each_matrix(a.size(0), [&](int64_t i) {
    AT_DISPATCH_FLOATING_TYPES(a.scalar_type(), "jacobi_eigh",
                               [&] { jacobi_one<scalar_t>(a[i], values[i], rows[i]); });
  });
  return {values, rows.mT()};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastspec, m) {
  m.def(
      "leading_subspace(Tensor w, int k, float tol, float floor, int max_steps, int seed, int width, "
      "int gram_short) -> Tensor");
  m.def("eigenvectors(Tensor a) -> Tensor");
  m.def("jacobi_eigh(Tensor a) -> (Tensor values, Tensor vectors)");
}

TORCH_LIBRARY_IMPL(fastspec, CPU, m) {
  m.impl("leading_subspace", leading_subspace_cpu);
  m.impl("eigenvectors", eigenvectors_cpu);
  m.impl("jacobi_eigh", jacobi_eigh_cpu);
}

}  // namespace fastspec
