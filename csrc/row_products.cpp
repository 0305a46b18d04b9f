#include "row_products.h"

#include <algorithm>

// Compiled for each kind of processor, and chosen when the library is loaded.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define FASTSPEC_CLONES __attribute__((target_clones("avx512f", "fma", "default")))
#else
#define FASTSPEC_CLONES
#endif
#define FASTSPEC_INLINE inline __attribute__((always_inline))

namespace fastspec {
namespace {

// The compiler splits a vector where registers are narrower.
template <typename T>
struct Lanes {
  typedef T type __attribute__((vector_size(64), aligned(alignof(T)), may_alias));
  static constexpr int64_t count = 64 / sizeof(T);
};

constexpr int kRows = 4, kVectors = 4;  // of a tile: 16 accumulators
constexpr int64_t kCache = 1 << 18;     // bytes of w that one pass over its Gram matrix reads again and again

enum class Into { kSet, kAdd, kSubtract };

template <Into I, typename V>
FASTSPEC_INLINE void put(V& to, const V& sum) {
  if constexpr (I == Into::kSet) to = sum;
  if constexpr (I == Into::kAdd) to += sum;
  if constexpr (I == Into::kSubtract) to -= sum;
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
template <typename T, int R, int C, Into I>
FASTSPEC_INLINE void times_tile(View<const T> x, View<const T> a, int64_t n, View<T> out, int64_t skip) {
  using V = typename Lanes<T>::type;
  constexpr int64_t lanes = Lanes<T>::count;
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
template <typename T, int C, Into I>
FASTSPEC_INLINE void times_columns(View<const T> x, int64_t b, View<const T> a, int64_t n, View<T> out,
                                   int64_t skip = 0) {
  int64_t r = 0;
  for (; r + kRows <= b; r += kRows) times_tile<T, kRows, C, I>(x.from(r), a, n, out.from(r), skip);
  for (; r < b; ++r) times_tile<T, 1, C, I>(x.from(r), a, n, out.from(r), skip);
}

// [b, m] of x [b, n] a [n, m]
template <typename T, Into I>
FASTSPEC_INLINE void times(View<const T> x, int64_t b, View<const T> a, int64_t n, int64_t m, View<T> out) {
  constexpr int64_t lanes = Lanes<T>::count, wide = kVectors * lanes;
  int64_t j = 0;
  for (; j + wide <= m; j += wide) times_columns<T, kVectors, I>(x, b, a.at(j), n, out.at(j));
  for (; j + lanes <= m; j += lanes) times_columns<T, 1, I>(x, b, a.at(j), n, out.at(j));
  if (j == m) return;
  if (m >= lanes) {  // the last vector overlaps the one before
    const int64_t last = m - lanes;
    return times_columns<T, 1, I>(x, b, a.at(last), n, out.at(last), j - last);
  }
  for (int64_t r = 0; r < b; ++r) {
    for (j = 0; j < m; ++j) {
      T sum = 0;
      for (int64_t i = 0; i < n; ++i) sum += x.data[r * x.row + i * x.column] * a.data[i * a.row + j];
      put<I>(out.data[r * out.row + j], sum);
    }
  }
}

// `rows` rows from `row` on of w^T w, from the diagonal's tile on.
template <typename T, Into I>
FASTSPEC_INLINE void gram_rows(const T* w, int64_t m, int64_t n, int64_t row, int64_t rows, T* out) {
  constexpr int64_t wide = kVectors * Lanes<T>::count;
  const int64_t j = row / wide * wide;
  times<T, I>({w + row, 1, n}, rows, {w + j, n, 1}, m, n - j, {out + row * n + j, n, 1});
}

template <typename T, Into I>
FASTSPEC_INLINE void gram_pass(const T* w, int64_t m, int64_t n, int64_t begin, int64_t end, T* out) {
  for (; begin < end; begin += kRows)
    gram_rows<T, I>(w, m, n, begin, std::min<int64_t>(kRows, end - begin), out);
}

template <typename T>
FASTSPEC_INLINE void gram(const T* w, int64_t m, int64_t n, int64_t begin, int64_t end, T* out) {
  const int64_t chunk = std::max<int64_t>(1, kCache / (n * int64_t(sizeof(T))));
  gram_pass<T, Into::kSet>(w, std::min(chunk, m), n, begin, end, out);
  for (int64_t start = chunk; start < m; start += chunk)
    gram_pass<T, Into::kAdd>(w + start * n, std::min(chunk, m - start), n, begin, end, out);
}

// The tile [R, C] of x q^T.
template <typename T, int R, int C>
FASTSPEC_INLINE void dot_tile(const T* x, const T* q, int64_t n, T* out, int64_t ld) {
  using V = typename Lanes<T>::type;
  constexpr int64_t lanes = Lanes<T>::count;
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
template <typename T, int C>
FASTSPEC_INLINE void dot_columns(const T* x, int64_t b, const T* q, int64_t n, T* out, int64_t ld) {
  for (; b >= kRows; b -= kRows, x += kRows * n, out += kRows * ld) dot_tile<T, kRows, C>(x, q, n, out, ld);
  for (; b; --b, x += n, out += ld) dot_tile<T, 1, C>(x, q, n, out, ld);
}

template <typename T>
FASTSPEC_INLINE void dot(const T* x, int64_t b, const T* q, int64_t p, int64_t n, T* out, int64_t ld) {
  int64_t j = 0;
  for (; j + kVectors <= p; j += kVectors) dot_columns<T, kVectors>(x, b, q + j * n, n, out + j, ld);
  for (; j < p; ++j) dot_columns<T, 1>(x, b, q + j * n, n, out + j, ld);
}

}  // namespace

#define FASTSPEC_ROW_PRODUCTS(T)                                                                       \
  FASTSPEC_CLONES void rows_times(const T* x, int64_t b, const T* a, int64_t n, int64_t m, T* out) {   \
    times<T, Into::kSet>({x, n, 1}, b, {a, m, 1}, n, m, {out, m, 1});                                  \
  }                                                                                                    \
  FASTSPEC_CLONES void rows_subtract(const T* x, int64_t b, const T* a, int64_t n, int64_t m, T* out) {\
    times<T, Into::kSubtract>({x, n, 1}, b, {a, m, 1}, n, m, {out, m, 1});                             \
  }                                                                                                    \
  FASTSPEC_CLONES void rows_dot(const T* x, int64_t b, const T* q, int64_t p, int64_t n, T* out,       \
                                int64_t ld) {                                                          \
    dot<T>(x, b, q, p, n, out, ld);                                                                    \
  }                                                                                                    \
  FASTSPEC_CLONES void gram_upper(const T* w, int64_t m, int64_t n, int64_t begin, int64_t end,        \
                                  T* out) {                                                            \
    gram<T>(w, m, n, begin, end, out);                                                                 \
  }

FASTSPEC_ROW_PRODUCTS(float)
FASTSPEC_ROW_PRODUCTS(double)

}  // namespace fastspec
