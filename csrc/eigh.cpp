#include "eigh.h"

#include <ATen/Dispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <vector>

#include "checks.h"
#include "jacobi.h"
#include "parallel.h"

namespace fastspec {
namespace {

template <typename T>
void jacobi_one(const at::Tensor& a, const at::Tensor& values, const at::Tensor& rows) {
  const int n = a.size(0), padded = jacobi_padded(n);
  std::vector<T> packed(jacobi_triangle(n));
  std::vector<JacobiFour<T>> vectors(padded * padded / 4);
  std::vector<JacobiTurn<T>> turns(padded / 4);
  std::vector<JacobiGroup> groups(padded / 4);
  std::vector<int> place(n);
  const JacobiScratch<T> own{packed.data(), vectors.data(), turns.data(), groups.data(), place.data()};
  jacobi_eigh(JacobiOneLane{}, a.const_data_ptr<T>(), n, own, values.mutable_data_ptr<T>(),
              rows.mutable_data_ptr<T>());
}

// Eigenvalues [L, n], ascending, and eigenvectors [L, n, n] in columns, of symmetric matrices of which the
// lower triangles are read. The code that runs on a GPU; on a CPU LAPACK is faster (bench/test_svd.py).
std::tuple<at::Tensor, at::Tensor> jacobi_eigh_cpu(const at::Tensor& matrices) {
  check_jacobi_stack(matrices);
  const auto a = matrices.contiguous();
  auto values = at::empty({a.size(0), a.size(1)}, a.options());
  auto rows = at::empty_like(a);
  Interrupt interrupt;
  for_each_matrix(a.numel() ? a.size(0) : 0, interrupt, [&](int64_t i) {
    AT_DISPATCH_FLOATING_TYPES(a.scalar_type(), "jacobi_eigh",
                               [&] { jacobi_one<scalar_t>(a[i], values[i], rows[i]); });
  });
  return {values, rows.mT()};
}

std::tuple<at::Tensor, at::Tensor> jacobi_eigh_meta(const at::Tensor& a) {
  check_stack(a, "a");
  const auto count = a.sym_size(0), n = a.sym_size(1);
  return {a.new_empty_symint({count, n}), a.new_empty_symint({count, n, n}).mT()};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> symmetric_eigh(const at::Tensor& a) {
  static const auto jacobi = c10::Dispatcher::singleton().findSchemaOrThrow("fastspec::jacobi_eigh", "");
  // cuSOLVER loops over a batch
  if (a.is_cuda() && a.size(1) <= kJacobiOrder && jacobi.hasKernelForDispatchKey(c10::DispatchKey::CUDA)) {
    return jacobi.typed<std::tuple<at::Tensor, at::Tensor>(const at::Tensor&)>().call(a);
  }
  return at::linalg_eigh(a);
}

}  // namespace fastspec

TORCH_LIBRARY_FRAGMENT(fastspec, m) {
  m.def("jacobi_eigh(Tensor a) -> (Tensor values, Tensor vectors)", {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(fastspec, Meta, m) { m.impl("jacobi_eigh", &fastspec::jacobi_eigh_meta); }

TORCH_LIBRARY_IMPL(fastspec, CPU, m) { m.impl("jacobi_eigh", &fastspec::jacobi_eigh_cpu); }
