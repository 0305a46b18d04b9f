// The thin products on registers of 8 floats, of which there are 16.
#include "thin_kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#define FASTSPEC_SIMD __attribute__((target("avx2,fma")))

namespace fastspec {
namespace {

struct Simd {
  using V = __m256;
  static constexpr int64_t kLanes = 8;
  static constexpr int kRows = 6, kMergeRows = 6, kMergeVectors = 2;  // 12 accumulators each
  static constexpr bool kMerges = false;                              // half the registers: a BLAS was faster

  FASTSPEC_SIMD static inline __m256i first(int64_t lanes) {
    const __m256i places = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(lanes)), places);
  }
  FASTSPEC_SIMD static inline V zero() { return _mm256_setzero_ps(); }
  FASTSPEC_SIMD static inline V all(float value) { return _mm256_set1_ps(value); }
  FASTSPEC_SIMD static inline V load(const float* from) { return _mm256_loadu_ps(from); }
  // masked loads and stores cost some processors tens of cycles: only where a vector is not whole
  FASTSPEC_SIMD static inline V load(const float* from, int64_t lanes) {
    return lanes >= kLanes ? load(from) : _mm256_maskload_ps(from, first(lanes));
  }
  FASTSPEC_SIMD static inline void store(float* to, V value, int64_t lanes) {
    if (lanes >= kLanes)
      _mm256_storeu_ps(to, value);
    else
      _mm256_maskstore_ps(to, first(lanes), value);
  }
  FASTSPEC_SIMD static inline V add(V a, V b) { return _mm256_add_ps(a, b); }
  FASTSPEC_SIMD static inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  FASTSPEC_SIMD static inline V fms(V a, V b, V c) { return _mm256_fmsub_ps(a, b, c); }
};

}  // namespace
}  // namespace fastspec

#include "thin_tiles.h"

const fastspec::ThinKernels* fastspec::thin_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &kKernels : nullptr;
}

#else

const fastspec::ThinKernels* fastspec::thin_avx2() { return nullptr; }

#endif
