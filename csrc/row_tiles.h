// Tiles of the products of row_products.h, templates over the kind of processor and the type of number.
#pragma once

#include <algorithm>
#include <vector>

#include "row_products.h"

#define FASTSPEC_INLINE inline __attribute__((always_inline))

namespace fastspec {
namespace {

// A kind of processor: bytes of a vector, and vectors of a tile of kRows rows. Its accumulators, the vectors
// they are made from and one operand more have to fit the registers: what the compiler keeps on the stack
// takes a tile to half its speed.
constexpr int kRows = kGramRows;
struct Avx512 {  // 32 registers
  static constexpr int kBytes = 64, kVectors = 4;
};
struct Fma {  // 16
  static constexpr int kBytes = 32, kVectors = 3;
};
struct Plain {  // 16 or more, and products that take one until they are added
  static constexpr int kBytes = 16, kVectors = 2;
};

// Columns of a row-major matrix are copied into panels of so many bytes, half a core's nearest cache, which many
// tiles read: left where they lie, each row of a panel would be in a page of its own, and at 768 columns all of
// them in the same few lines of the cache. On AVX2, Gram matrices are 1.4 times as fast, and 64 rows times
// 3072 x 768 twice. It pays from so many rows of x on, for so many panels at once.
constexpr int64_t kPanel = 1 << 14, kPanelUses = 24, kPanels = 8;

template <typename K, typename T>
struct Lanes {
  typedef T type __attribute__((vector_size(K::kBytes), aligned(alignof(T)), may_alias));
  static constexpr int64_t count = K::kBytes / sizeof(T);
};

enum class Into { Set, Add, Subtract };

template <Into I, typename V>
FASTSPEC_INLINE void put(V& to, const V& sum) {
  if constexpr (I == Into::Set) to = sum;
  if constexpr (I == Into::Add) to += sum;
  if constexpr (I == Into::Subtract) to -= sum;
}

// Row-major `data` whose rows lie `row` apart and columns `column`.
template <typename T>
struct View {
  T* data;
  int64_t row, column;

  FASTSPEC_INLINE View from(int64_t r) const { return {data + r * row, row, column}; }
  FASTSPEC_INLINE View at(int64_t c) const { return {data + c * column, row, column}; }
};

// A tile [R, C vectors] of x [R, n] a [n, ..], but for the first `skip` columns of a tile of one vector.
template <typename K, typename T, int R, int C, Into I>
FASTSPEC_INLINE void times_tile(View<const T> x, View<const T> a, int64_t n, View<T> out, int64_t skip) {
  using V = typename Lanes<K, T>::type;
  constexpr int64_t lanes = Lanes<K, T>::count;
  V sum[R][C] = {};
  for (int64_t i = 0; i < n; ++i, a.data += a.row, x.data += x.column) {
    V columns[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) columns[c] = *reinterpret_cast<const V*>(a.data + c * lanes);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sum[r][c] += x.data[r * x.row] * columns[c];
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    T* const to = out.data + r * out.row;
    if (skip) {
      for (int64_t l = skip; l < lanes; ++l) put<I, T>(to[l], sum[r][0][l]);
      continue;
    }
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) put<I>(*reinterpret_cast<V*>(to + c * lanes), sum[r][c]);
  }
}

// The columns [b, C vectors] of x [b, n] a [n, ..], all rows of x before the next columns: `a` is read once.
template <typename K, typename T, int C, Into I>
FASTSPEC_INLINE void times_columns(View<const T> x, int64_t b, View<const T> a, int64_t n, View<T> out,
                                   int64_t skip = 0) {
  int64_t r = 0;
  for (; r + kRows <= b; r += kRows) times_tile<K, T, kRows, C, I>(x.from(r), a, n, out.from(r), skip);
  for (; r < b; ++r) times_tile<K, T, 1, C, I>(x.from(r), a, n, out.from(r), skip);
}

// The columns from `j` on of x [b, n] a [n, m]
template <typename K, typename T, Into I>
FASTSPEC_INLINE void times_from(int64_t j, View<const T> x, int64_t b, View<const T> a, int64_t n, int64_t m,
                                View<T> out) {
  constexpr int64_t lanes = Lanes<K, T>::count, wide = K::kVectors * lanes;
  for (; j + wide <= m; j += wide) times_columns<K, T, K::kVectors, I>(x, b, a.at(j), n, out.at(j));
  for (; j + lanes <= m; j += lanes) times_columns<K, T, 1, I>(x, b, a.at(j), n, out.at(j));
  if (j == m) return;
  if (m >= lanes) {  // the last vector overlaps the one before
    const int64_t last = m - lanes;
    return times_columns<K, T, 1, I>(x, b, a.at(last), n, out.at(last), j - last);
  }
  for (int64_t r = 0; r < b; ++r) {
    for (j = 0; j < m; ++j) {
      T sum = 0;
      for (int64_t i = 0; i < n; ++i) sum += x.data[r * x.row + i * x.column] * a.data[i * a.row + j];
      put<I>(out.data[r * out.row + j], sum);
    }
  }
}

// Rows of a matrix that a panel as wide as a tile holds.
template <typename K>
constexpr int64_t kPanelRows = kPanel / (K::kBytes * K::kVectors);

// Copies `count` rows of `columns` columns into panels [kPanelRows, wide], in the order they lie in.
template <typename K, typename T>
FASTSPEC_INLINE void pack(View<const T> a, int64_t count, int64_t columns, T* panels) {
  constexpr int64_t wide = K::kVectors * Lanes<K, T>::count, size = kPanelRows<K> * wide;
  if (a.column == 1) {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = 0; j < columns; j += wide)
        std::copy_n(a.from(i).data + j, std::min(wide, columns - j), panels + j / wide * size + i * wide);
  } else {
    for (int64_t j = 0; j < columns; ++j)
      for (int64_t i = 0; i < count; ++i)
        panels[j / wide * size + i * wide + j % wide] = a.data[i * a.row + j * a.column];
  }
}

// times_from the first column on, for many rows of x, which take each panel of `a` in turn.
template <typename K, typename T, Into I>
FASTSPEC_INLINE void times_panels(View<const T> x, int64_t b, View<const T> a, int64_t n, int64_t m, View<T> out,
                                  T* panels) {
  constexpr int64_t wide = K::kVectors * Lanes<K, T>::count, size = kPanelRows<K> * wide;
  const int64_t whole = m / wide * wide;
  for (int64_t j = 0; j < whole; j += kPanels * wide) {
    const int64_t last = std::min(whole, j + kPanels * wide);
    pack<K, T>(a.at(j), n, last - j, panels);
    for (int64_t c = j; c < last; c += wide) {
      times_columns<K, T, K::kVectors, I>(x, b, {panels + (c - j) / wide * size, wide, 1}, n, out.at(c));
    }
  }
  times_from<K, T, I>(whole, x, b, a, n, m, out);
}

// [b, m] of x [b, n] a [n, m]
template <typename K, typename T, Into I>
FASTSPEC_INLINE void times(View<const T> x, int64_t b, View<const T> a, int64_t n, int64_t m, View<T> out) {
  if (b < kPanelUses) return times_from<K, T, I>(0, x, b, a, n, m, out);
  constexpr int64_t most = kPanelRows<K>;
  std::vector<T> panels(kPanels * kPanel / sizeof(T));
  times_panels<K, T, I>(x, b, a, std::min(most, n), m, out, panels.data());
  for (int64_t start = most; start < n; start += most) {
    times_panels<K, T, I == Into::Subtract ? I : Into::Add>(x.at(start), b, a.from(start),
                                                            std::min(most, n - start), m, out, panels.data());
  }
}

// A tile [R, C vectors] at row `r` and column `j` of the Gram matrix `out` [n, n], as much of it as lies inside.
template <typename K, typename T, Into I>
FASTSPEC_INLINE void gram_tile(View<const T> x, View<const T> a, int64_t count, T* out, int64_t n, int64_t r,
                               int64_t j) {
  constexpr int64_t wide = K::kVectors * Lanes<K, T>::count;
  if (r + kRows <= n && j + wide <= n) {
    return times_tile<K, T, kRows, K::kVectors, I>(x, a, count, {out + r * n + j, n, 1}, 0);
  }
  T tile[kRows * wide];
  times_tile<K, T, kRows, K::kVectors, Into::Set>(x, a, count, {tile, wide, 1}, 0);
  for (int64_t row = r; row < std::min(r + kRows, n); ++row)
    for (int64_t c = j; c < std::min(j + wide, n); ++c) put<I, T>(out[row * n + c], tile[(row - r) * wide + c - j]);
}

// Rows `begin` to `end` of w^T w, from the diagonal's tile on.
template <typename K, typename T>
FASTSPEC_INLINE void gram(View<const T> w, int64_t m, int64_t n, int64_t begin, int64_t end, T* out) {
  constexpr int64_t wide = K::kVectors * Lanes<K, T>::count;
  static_assert(wide % kRows == 0, "a tile of rows lies in one panel");
  const int64_t first = begin / wide, last = (n + wide - 1) / wide;
  const int64_t most = std::min(m, kPanelRows<K>);
  std::vector<T> packed((last - first) * kPanelRows<K> * wide);
  const auto panel = [&](int64_t p) { return packed.data() + (p - first) * kPanelRows<K> * wide; };
  for (int64_t start = 0; start < m; start += most) {
    const int64_t count = std::min(most, m - start);
    pack<K, T>(w.from(start).at(first * wide), count, n - first * wide, packed.data());
    for (int64_t p = first; p < last; ++p) {
      const View<const T> a{panel(p), wide, 1};
      for (int64_t r = begin; r < std::min(end, (p + 1) * wide); r += kRows) {
        const View<const T> x{panel(r / wide) + r % wide, 1, wide};
        if (start) {
          gram_tile<K, T, Into::Add>(x, a, count, out, n, r, p * wide);
        } else {
          gram_tile<K, T, Into::Set>(x, a, count, out, n, r, p * wide);
        }
      }
    }
  }
}

// The tile [R, C] of x q^T.
template <typename K, typename T, int R, int C>
FASTSPEC_INLINE void dot_tile(const T* x, const T* q, int64_t n, T* out, int64_t ld) {
  using V = typename Lanes<K, T>::type;
  constexpr int64_t lanes = Lanes<K, T>::count;
  V sum[R][C] = {};
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    V rows[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) rows[c] = *reinterpret_cast<const V*>(q + c * n + i);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sum[r][c] += *reinterpret_cast<const V*>(x + r * n + i) * rows[c];
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      T total = 0;
      for (int64_t l = 0; l < lanes; ++l) total += sum[r][c][l];
      for (int64_t l = i; l < n; ++l) total += x[r * n + l] * q[c * n + l];
      out[r * ld + c] = total;
    }
  }
}

// The columns [b, C] of x q^T, all rows of x before the next rows of q.
template <typename K, typename T, int C>
FASTSPEC_INLINE void dot_columns(const T* x, int64_t b, const T* q, int64_t n, T* out, int64_t ld) {
  for (; b >= kRows; b -= kRows, x += kRows * n, out += kRows * ld) dot_tile<K, T, kRows, C>(x, q, n, out, ld);
  for (; b; --b, x += n, out += ld) dot_tile<K, T, 1, C>(x, q, n, out, ld);
}

template <typename K, typename T>
FASTSPEC_INLINE void dot(const T* x, int64_t b, const T* q, int64_t p, int64_t n, T* out, int64_t ld) {
  int64_t j = 0;
  for (; j + K::kVectors <= p; j += K::kVectors) dot_columns<K, T, K::kVectors>(x, b, q + j * n, n, out + j, ld);
  for (; j < p; ++j) dot_columns<K, T, 1>(x, b, q + j * n, n, out + j, ld);
}

}  // namespace
}  // namespace fastspec
