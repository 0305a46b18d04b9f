#include "gram.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "row_products.h"

namespace fastspec {
namespace {

// Rows of a Gram matrix that are worth a thread.
constexpr int64_t kThreadRows = 64;
// Columns mirrored at a time: what is written of a row is a cache line of floats.
constexpr int64_t kMirrored = 16;
// Of the rows of W that the two products of gram_times take in turn: few enough to stay in a core's cache.
constexpr int64_t kBlockBytes = 1 << 18;
// How many of them at least: a tile's (kGramRows).
constexpr int64_t kLeastRows = 4;

// W^T W of a matrix alone on the CPU.
at::Tensor gram_matrix_alone(const at::Tensor& w) {
  const int64_t m = w.size(1), n = w.size(2);
  const bool transposed = w.mT().is_contiguous();
  const auto matrix = transposed ? w : w.contiguous();
  auto gram = at::empty({1, n, n}, w.options());
  AT_DISPATCH_FLOATING_TYPES(w.scalar_type(), "gram_matrix_alone", [&] {
    const auto* const from = matrix.const_data_ptr<scalar_t>();
    auto* const to = gram.mutable_data_ptr<scalar_t>();
    const int64_t row = transposed ? 1 : n, column = transposed ? m : 1;
    const int64_t tiles = (n + kGramRows - 1) / kGramRows;
    at::parallel_for(0, tiles, kThreadRows / kGramRows, [&](int64_t begin, int64_t end) {
      gram_upper(from, row, column, m, n, begin * kGramRows, std::min(end * kGramRows, n), to);
    });
    for (int64_t left = 0; left < n; left += kMirrored) {
      for (int64_t i = left + 1; i < n; ++i) {
        for (int64_t j = left; j < std::min(i, left + kMirrored); ++j) to[i * n + j] = to[j * n + i];
      }
    }
  });
  return gram;
}

}  // namespace

// The blocks below the diagonal are mirrored instead of multiplied: 5/8 of the work.
at::Tensor gram_matrix(const at::Tensor& w) {
  if (w.is_cpu() && w.size(0) == 1) return gram_matrix_alone(w);
  const int64_t n = w.size(2), block = (n + 3) / 4;
  auto gram = at::empty({w.size(0), n, n}, w.options());
  for (int64_t start = 0; start < n; start += block) {
    const int64_t size = std::min(block, n - start), rest = n - start - size;
    const auto own = w.narrow(2, start, size).mT(), others = w.narrow(2, start, n - start);
    auto rows = gram.narrow(1, start, size).narrow(2, start, n - start);
    rows.copy_(at::bmm(own, others));
    if (rest) {
      gram.narrow(1, start + size, rest).narrow(2, start, size).copy_(rows.narrow(2, size, rest).mT());
    }
  }
  return gram;
}

at::Tensor gram_times(const at::Tensor& x, const at::Tensor& w) {
  const int64_t b = x.size(1), m = w.size(1), n = w.size(2), parts = at::get_num_threads();
  auto result = at::empty_like(x);
  AT_DISPATCH_FLOATING_TYPES(w.scalar_type(), "gram_times", [&] {
    using T = scalar_t;
    T* const out = result.mutable_data_ptr<T>();
    const int64_t most = std::max<int64_t>(kLeastRows, kBlockBytes / (n * int64_t(sizeof(T))));
    const T* const from = w.const_data_ptr<T>();
    const T* const rows = x.const_data_ptr<T>();
    std::vector<T> sums(parts * b * n);
    at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      std::vector<T> image(b * most);
      for (int64_t part = begin; part < end; ++part) {
        const int64_t last = m * (part + 1) / parts;
        for (int64_t row = m * part / parts; row < last; row += most) {
          const int64_t count = std::min(most, last - row);
          rows_dot(rows, b, from + row * n, count, n, image.data(), count);
          rows_add(image.data(), b, from + row * n, count, n, sums.data() + part * b * n);
        }
      }
    });
    std::copy_n(sums.data(), b * n, out);
    for (int64_t part = 1; part < parts; ++part)
      for (int64_t i = 0; i < b * n; ++i) out[i] += sums[part * b * n + i];
  });
  return result;
}

}  // namespace fastspec
