// Cores of few diagonals (see diagonals.h).
//
// What it buys: with all directions k is the short side of the layer, and every ATen call, three or four a
// diagonal, passes over matrices as large as the activations. Here one pass does them all.
#include "diagonals.h"

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "layer.h"

// Compiled for wider registers too, and chosen when the library is loaded.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FASTSPEC_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FASTSPEC_CLONES
#endif

namespace fastspec {
namespace {

using at::Tensor;

constexpr int64_t kBlockRows = 32;  // rows whose products make one partial sum

// One diagonal of C: entries [count], their first row and column.
template <typename T>
struct Diagonal {
  const T* entries;
  int64_t index, row, column, count;
};

template <typename T>
std::vector<Diagonal<T>> all_diagonals(const Tensor& band) {
  std::vector<Diagonal<T>> found;
  each_diagonal(band, [&](int64_t index, int64_t row, int64_t column, int64_t count) {
    found.push_back({band.const_data_ptr<T>() + index * band.size(1) + row, index, row, column, count});
  });
  return found;
}

Tensor as_band(const Tensor& delta) { return (delta.dim() == 1 ? delta.unsqueeze(0) : delta).contiguous(); }

template <typename T>
FASTSPEC_CLONES void multiply(T* __restrict out, const T* __restrict a, const T* __restrict t, int64_t count) {
  for (int64_t j = 0; j < count; ++j) out[j] = a[j] * t[j];
}

template <typename T>
FASTSPEC_CLONES void add_products(T* __restrict out, const T* __restrict a, const T* __restrict t, int64_t count) {
  for (int64_t j = 0; j < count; ++j) out[j] += a[j] * t[j];
}

}  // namespace

Tensor diagonals_apply(const Tensor& t_in, const Tensor& s, const Tensor& delta, bool transpose) {
  const Tensor t = t_in.contiguous();
  Tensor band = as_band(delta);
  const int64_t k = t.size(1), h = band.size(0) / 2;
  Tensor main = s.defined() ? at::add(s, band[h]) : band[h];
  Tensor out = at::empty_like(t);
  AT_DISPATCH_FLOATING_TYPES(t.scalar_type(), "diagonals_apply", [&] {
    const auto diagonals = all_diagonals<scalar_t>(band);
    const auto* const main_entries = main.const_data_ptr<scalar_t>();
    const auto* const from = t.const_data_ptr<scalar_t>();
    auto* const to = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, t.size(0), kBlockRows, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const auto* const x = from + n * k;
        auto* const y = to + n * k;
        multiply(y, main_entries, x, k);
        for (const auto& d : diagonals) {
          if (d.index == h) continue;
          if (transpose)
            add_products(y + d.row, d.entries, x + d.column, d.count);
          else
            add_products(y + d.column, d.entries, x + d.row, d.count);
        }
      }
    });
  });
  return out;
}

Tensor diagonals_reduce(const Tensor& q_in, const Tensor& p_in, const Tensor& like) {
  const Tensor q = q_in.contiguous(), p = p_in.contiguous();
  const Tensor band = as_band(like);
  const int64_t rows = q.size(0), k = q.size(1), blocks = (rows + kBlockRows - 1) / kBlockRows;
  Tensor partial = at::zeros({blocks, band.size(0), k}, q.options());
  AT_DISPATCH_FLOATING_TYPES(q.scalar_type(), "diagonals_reduce", [&] {
    const auto diagonals = all_diagonals<scalar_t>(band);
    const auto* const left = q.const_data_ptr<scalar_t>();
    const auto* const right = p.const_data_ptr<scalar_t>();
    auto* const sums = partial.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin * kBlockRows; n < std::min(end * kBlockRows, rows); ++n)
        for (const auto& d : diagonals)
          add_products(sums + ((n / kBlockRows) * band.size(0) + d.index) * k + d.row, left + n * k + d.row,
                       right + n * k + d.column, d.count);
    });
  });
  return partial.sum(0).view(like.sizes());
}

}  // namespace fastspec
