// The thin products on registers of 16 floats, of which there are 32.
#include "thin_kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#define FASTSPEC_SIMD __attribute__((target("avx512f")))

namespace fastspec {
namespace {

struct Simd {
  using V = __m512;
  static constexpr int64_t kLanes = 16;
  static constexpr int kRows = 12, kMergeRows = 6, kMergeVectors = 4;  // 24 accumulators each
  static constexpr bool kMerges = true;

  FASTSPEC_SIMD static inline __mmask16 first(int64_t lanes) {
    return lanes >= kLanes ? 0xffff : static_cast<__mmask16>((1u << (lanes > 0 ? lanes : 0)) - 1);
  }
  FASTSPEC_SIMD static inline V zero() { return _mm512_setzero_ps(); }
  FASTSPEC_SIMD static inline V all(float value) { return _mm512_set1_ps(value); }
  FASTSPEC_SIMD static inline V load(const float* from) { return _mm512_loadu_ps(from); }
  FASTSPEC_SIMD static inline V load(const float* from, int64_t lanes) {
    return _mm512_maskz_loadu_ps(first(lanes), from);
  }
  FASTSPEC_SIMD static inline void store(float* to, V value, int64_t lanes) {
    _mm512_mask_storeu_ps(to, first(lanes), value);
  }
  FASTSPEC_SIMD static inline V add(V a, V b) { return _mm512_add_ps(a, b); }
  FASTSPEC_SIMD static inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  FASTSPEC_SIMD static inline V fms(V a, V b, V c) { return _mm512_fmsub_ps(a, b, c); }
};

}  // namespace
}  // namespace fastspec

#include "thin_tiles.h"

const fastspec::ThinKernels* fastspec::thin_avx512() {
  return __builtin_cpu_supports("avx512f") ? &kKernels : nullptr;
}

#else

const fastspec::ThinKernels* fastspec::thin_avx512() { return nullptr; }

#endif
