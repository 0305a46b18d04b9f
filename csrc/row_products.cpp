#include "row_products.h"

#include "row_tiles.h"

namespace fastspec {
namespace {

// The products as one kind of processor runs them.
template <typename T>
struct Products {
  void (*times)(const T* x, int64_t b, const T* a, int64_t n, int64_t m, T* out);
  void (*add)(const T* x, int64_t b, const T* a, int64_t n, int64_t m, T* out);
  void (*subtract)(const T* x, int64_t b, const T* a, int64_t n, int64_t m, T* out);
  void (*dot)(const T* x, int64_t b, const T* q, int64_t p, int64_t n, T* out, int64_t ld);
  void (*gram)(const T* w, int64_t row, int64_t column, int64_t m, int64_t n, int64_t begin, int64_t end, T* out);
};

#define FASTSPEC_PRODUCTS_OF(K, ATTRIBUTE)                                                                    \
  template <typename T>                                                                                       \
  struct K##Products {                                                                                        \
    ATTRIBUTE static void times_(const T* x, int64_t b, const T* a, int64_t n, int64_t m, T* out) {           \
      times<K, T, Into::Set>({x, n, 1}, b, {a, m, 1}, n, m, {out, m, 1});                                     \
    }                                                                                                         \
    ATTRIBUTE static void add_(const T* x, int64_t b, const T* a, int64_t n, int64_t m, T* out) {             \
      times<K, T, Into::Add>({x, n, 1}, b, {a, m, 1}, n, m, {out, m, 1});                                     \
    }                                                                                                         \
    ATTRIBUTE static void subtract_(const T* x, int64_t b, const T* a, int64_t n, int64_t m, T* out) {        \
      times<K, T, Into::Subtract>({x, n, 1}, b, {a, m, 1}, n, m, {out, m, 1});                                \
    }                                                                                                         \
    ATTRIBUTE static void dot_(const T* x, int64_t b, const T* q, int64_t p, int64_t n, T* out, int64_t ld) { \
      dot<K, T>(x, b, q, p, n, out, ld);                                                                      \
    }                                                                                                         \
    ATTRIBUTE static void gram_(const T* w, int64_t row, int64_t column, int64_t m, int64_t n, int64_t begin, \
                                int64_t end, T* out) {                                                        \
      gram<K, T>({w, row, column}, m, n, begin, end, out);                                                    \
    }                                                                                                         \
    static constexpr Products<T> all = {times_, add_, subtract_, dot_, gram_};                                \
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

#define FASTSPEC_ROW_PRODUCTS(T)                                                                             \
  void rows_times(const T* x, int64_t b, const T* a, int64_t n, int64_t m, T* out) {                         \
    products<T>().times(x, b, a, n, m, out);                                                                 \
  }                                                                                                          \
  void rows_add(const T* x, int64_t b, const T* a, int64_t n, int64_t m, T* out) {                           \
    products<T>().add(x, b, a, n, m, out);                                                                   \
  }                                                                                                          \
  void rows_subtract(const T* x, int64_t b, const T* a, int64_t n, int64_t m, T* out) {                      \
    products<T>().subtract(x, b, a, n, m, out);                                                              \
  }                                                                                                          \
  void rows_dot(const T* x, int64_t b, const T* q, int64_t p, int64_t n, T* out, int64_t ld) {               \
    products<T>().dot(x, b, q, p, n, out, ld);                                                               \
  }                                                                                                          \
  void gram_upper(const T* w, int64_t row, int64_t column, int64_t m, int64_t n, int64_t begin, int64_t end, \
                  T* out) {                                                                                  \
    products<T>().gram(w, row, column, m, n, begin, end, out);                                               \
  }

FASTSPEC_ROW_PRODUCTS(float)
FASTSPEC_ROW_PRODUCTS(double)

}  // namespace fastspec
