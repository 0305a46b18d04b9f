#include "row_products.h"

#include <algorithm>

#define FASTSPEC_INLINE inline __attribute__((always_inline))

namespace fastspec {
namespace {

// A kind of processor: bytes of a vector, and vectors of a tile of kRows rows. Its accumulators, the vectors
// they are made from and one operand more have to fit the registers: what the compiler keeps on the stack
// takes a tile to half its speed.
constexpr int kRows = 4;
struct Avx512 {  // 32 registers
  static constexpr int kBytes = 64, kVectors = 4;
};
struct Fma {  // 16
  static constexpr int kBytes = 32, kVectors = 3;
};
struct Plain {  // 16 or more, and products that take one until they are added
  static constexpr int kBytes = 16, kVectors = 2;
};

constexpr int64_t kCache = 1 << 18;  // bytes of w that one pass over its Gram matrix reads again and again

template <typename K, typename T>
struct Lanes {
  typedef T type __attribute__((vector_size(K::kBytes), aligned(alignof(T)), may_alias));
  static constexpr int64_t count = K::kBytes / sizeof(T);
};

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

// [b, m] of x [b, n] a [n, m]
template <typename K, typename T, Into I>
FASTSPEC_INLINE void times(View<const T> x, int64_t b, View<const T> a, int64_t n, int64_t m, View<T> out) {
  constexpr int64_t lanes = Lanes<K, T>::count, wide = K::kVectors * lanes;
  int64_t j = 0;
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

// `rows` rows from `row` on of w^T w, from the diagonal's tile on.
template <typename K, typename T, Into I>
FASTSPEC_INLINE void gram_rows(const T* w, int64_t m, int64_t n, int64_t row, int64_t rows, T* out) {
  constexpr int64_t wide = K::kVectors * Lanes<K, T>::count;
  const int64_t j = row / wide * wide;
  times<K, T, I>({w + row, 1, n}, rows, {w + j, n, 1}, m, n - j, {out + row * n + j, n, 1});
}

template <typename K, typename T, Into I>
FASTSPEC_INLINE void gram_pass(const T* w, int64_t m, int64_t n, int64_t begin, int64_t end, T* out) {
  for (; begin < end; begin += kRows)
    gram_rows<K, T, I>(w, m, n, begin, std::min<int64_t>(kRows, end - begin), out);
}

template <typename K, typename T>
FASTSPEC_INLINE void gram(const T* w, int64_t m, int64_t n, int64_t begin, int64_t end, T* out) {
  const int64_t chunk = std::max<int64_t>(1, kCache / (n * int64_t(sizeof(T))));
  gram_pass<K, T, Into::kSet>(w, std::min(chunk, m), n, begin, end, out);
  for (int64_t start = chunk; start < m; start += chunk)
    gram_pass<K, T, Into::kAdd>(w + start * n, std::min(chunk, m - start), n, begin, end, out);
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

// The products as one kind of processor runs them.
template <typename T>
struct Products {
  void (*times)(const T* x, int64_t b, const T* a, int64_t n, int64_t m, T* out);
  void (*add)(const T* x, int64_t b, const T* a, int64_t n, int64_t m, T* out);
  void (*subtract)(const T* x, int64_t b, const T* a, int64_t n, int64_t m, T* out);
  void (*dot)(const T* x, int64_t b, const T* q, int64_t p, int64_t n, T* out, int64_t ld);
  void (*gram)(const T* w, int64_t m, int64_t n, int64_t begin, int64_t end, T* out);
};

#define FASTSPEC_PRODUCTS_OF(K, ATTRIBUTE)                                                          \
  template <typename T>                                                                             \
  struct K##Products {                                                                              \
    ATTRIBUTE static void times_(const T* x, int64_t b, const T* a, int64_t n, int64_t m, T* out) { \
      times<K, T, Into::kSet>({x, n, 1}, b, {a, m, 1}, n, m, {out, m, 1});                          \
    }                                                                                               \
    ATTRIBUTE static void add_(const T* x, int64_t b, const T* a, int64_t n, int64_t m, T* out) {   \
      times<K, T, Into::kAdd>({x, n, 1}, b, {a, m, 1}, n, m, {out, m, 1});                          \
    }                                                                                               \
    ATTRIBUTE static void subtract_(const T* x, int64_t b, const T* a, int64_t n, int64_t m,        \
                                    T* out) {                                                       \
      times<K, T, Into::kSubtract>({x, n, 1}, b, {a, m, 1}, n, m, {out, m, 1});                     \
    }                                                                                               \
    ATTRIBUTE static void dot_(const T* x, int64_t b, const T* q, int64_t p, int64_t n, T* out,     \
                               int64_t ld) {                                                        \
      dot<K, T>(x, b, q, p, n, out, ld);                                                            \
    }                                                                                               \
    ATTRIBUTE static void gram_(const T* w, int64_t m, int64_t n, int64_t begin, int64_t end,       \
                                T* out) {                                                           \
      gram<K, T>(w, m, n, begin, end, out);                                                         \
    }                                                                                               \
    static constexpr Products<T> all = {times_, add_, subtract_, dot_, gram_};                      \
  };

FASTSPEC_PRODUCTS_OF(Plain, )
#if defined(__x86_64__) && defined(__GNUC__)
FASTSPEC_PRODUCTS_OF(Avx512, __attribute__((target("avx512f"))))
FASTSPEC_PRODUCTS_OF(Fma, __attribute__((target("avx2,fma"))))

template <typename T>
const Products<T>& best() {
  if (__builtin_cpu_supports("avx512f")) return Avx512Products<T>::all;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return FmaProducts<T>::all;
  return PlainProducts<T>::all;
}
#else
template <typename T>
const Products<T>& best() {
  return PlainProducts<T>::all;
}
#endif

template <typename T>
const Products<T>& products() {
  static const Products<T>& chosen = best<T>();
  return chosen;
}

}  // namespace

#define FASTSPEC_ROW_PRODUCTS(T)                                                                       \
  void rows_times(const T* x, int64_t b, const T* a, int64_t n, int64_t m, T* out) {                   \
    products<T>().times(x, b, a, n, m, out);                                                           \
  }                                                                                                    \
  void rows_add(const T* x, int64_t b, const T* a, int64_t n, int64_t m, T* out) {                     \
    products<T>().add(x, b, a, n, m, out);                                                             \
  }                                                                                                    \
  void rows_subtract(const T* x, int64_t b, const T* a, int64_t n, int64_t m, T* out) {                \
    products<T>().subtract(x, b, a, n, m, out);                                                        \
  }                                                                                                    \
  void rows_dot(const T* x, int64_t b, const T* q, int64_t p, int64_t n, T* out, int64_t ld) {         \
    products<T>().dot(x, b, q, p, n, out, ld);                                                         \
  }                                                                                                    \
  void gram_upper(const T* w, int64_t m, int64_t n, int64_t begin, int64_t end, T* out) {              \
    products<T>().gram(w, m, n, begin, end, out);                                                      \
  }

FASTSPEC_ROW_PRODUCTS(float)
FASTSPEC_ROW_PRODUCTS(double)

}  // namespace fastspec
