// The bodies of thin_kernels.h for the vectors of `Simd`, which the including file defines; each of their
// functions carries FASTSPEC_SIMD, the attribute that admits its instructions.
#pragma once

#include <algorithm>

#include "thin_kernels.h"

#define FASTSPEC_TILE FASTSPEC_SIMD inline __attribute__((always_inline))

namespace fastspec {
namespace {

using V = Simd::V;
constexpr int64_t kLanes = Simd::kLanes;

// acc[MR, NV vectors] = X[MR, d] B[d, NV vectors]. Three rows share a base address, which leaves the
// compiler a register for each. The rows after these are fetched meanwhile.
template <int MR, int NV>
FASTSPEC_TILE void multiply_tile(V (&acc)[MR][NV], const float* __restrict x, int64_t ldx,
                                 const float* __restrict b, int64_t d) {
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[r][v] = Simd::zero();
  const float* const base[4] = {x, x + 3 * ldx, x + 6 * ldx, x + 9 * ldx};
  for (int64_t line = 0; line < d; line += kLine) {
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) __builtin_prefetch(base[r / 3] + (r % 3 + MR) * ldx + line);
    const int64_t end = std::min(line + kLine, d);
    for (int64_t j = line; j < end; ++j, b += NV * kLanes) {
      V bv[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) bv[v] = Simd::load(b + v * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r) {
        const V xv = Simd::all(base[r / 3][(r % 3) * ldx + j]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[r][v] = Simd::fma(xv, bv[v], acc[r][v]);
      }
    }
  }
}

template <int MR, int NV>
FASTSPEC_TILE void take(const V (&acc)[MR][NV], int64_t row, int64_t column, int64_t k, const Store& to) {
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) {
    const int64_t c = column + v * kLanes;
    const V scale = Simd::load(to.scale + c), shift = Simd::load(to.shift + c);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
      Simd::store(to.p + (row + r) * to.ldp + c, Simd::fms(acc[r][v], scale, shift), k - c);
  }
}

template <int MR, int NV>
FASTSPEC_TILE void take(const V (&acc)[MR][NV], int64_t row, int64_t column, int64_t k, const Dot& to) {
  float* const sum = to.sums + row / kThinBlock * to.width + column;
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) {
    const int64_t c = column + v * kLanes;
    V total = Simd::load(sum + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
      total = Simd::fma(acc[r][v], Simd::load(to.p + (row + r) * to.ldp + c, k - c), total);
    Simd::store(sum + v * kLanes, total, kLanes);
  }
}

template <int MR, int NV, class To>
FASTSPEC_SIMD void tile(const ThinOperands& of, int64_t row, const To& to) {
  V acc[MR][NV];
  multiply_tile<MR, NV>(acc, of.x + row * of.ldx, of.ldx, of.b, of.d);
  take<MR, NV>(acc, row, of.column, of.k, to);
}

template <int NV, class To>
void rows(const ThinOperands& of, int64_t begin, int64_t end, const To& to) {
  for (; begin + Simd::kRows <= end; begin += Simd::kRows) tile<Simd::kRows, NV>(of, begin, to);
  for (; begin < end; ++begin) tile<1, NV>(of, begin, to);
}

template <class To>
void project(const ThinOperands& of, int64_t vectors, int64_t begin, int64_t end, const To& to) {
  if (vectors == 1)
    rows<1>(of, begin, end, to);
  else
    rows<2>(of, begin, end, to);
}

// W + L R on MR rows and NV vectors, of which the last may be short. The tile to the right is fetched
// meanwhile; W is added last, so that its own lines have the whole product's time to arrive.
template <int MR, int NV>
FASTSPEC_SIMD void merge_tile(const MergeOperands& of, int64_t row, int64_t column) {
  const float* const w = of.w + row * of.ldw + column;
  const float* const l = of.l + row * of.ldl;
  const float* r = of.r + column;
  const int64_t lanes = std::min(kLanes, of.cols - column);  // of each vector: several are always whole
  constexpr int64_t kLines = MR * ((NV * kLanes + kLine - 1) / kLine), kAcross = kLines / MR;
  V acc[MR][NV];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[i][v] = Simd::zero();
  const int64_t each = (kLines + of.k - 1) / of.k;  // lines to fetch in every step of the product
  int64_t line = 0;
  for (int64_t j = 0; j < of.k; ++j, r += of.ldr) {
    for (const int64_t stop = std::min<int64_t>(line + each, kLines); line < stop; ++line)
      __builtin_prefetch(w + line / kAcross * of.ldw + NV * kLanes + line % kAcross * kLine, 0, 2);
    V rv[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) rv[v] = Simd::load(r + v * kLanes, lanes);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      const V lv = Simd::all(l[i * of.ldl + j]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[i][v] = Simd::fma(lv, rv[v], acc[i][v]);
    }
  }
  float* const m = of.m + row * of.ldm + column;
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const V sum = Simd::add(Simd::load(w + i * of.ldw + v * kLanes, lanes), acc[i][v]);
      Simd::store(m + i * of.ldm + v * kLanes, sum, lanes);
    }
}

template <int MR>
void merge_row(const MergeOperands& of, int64_t row) {
  constexpr int NV = Simd::kMergeVectors;
  int64_t column = 0;
  for (; column + NV * kLanes <= of.cols; column += NV * kLanes) merge_tile<MR, NV>(of, row, column);
  for (; column < of.cols; column += kLanes) merge_tile<MR, 1>(of, row, column);
}

void merge(const MergeOperands& of, int64_t begin, int64_t end) {
  for (; begin + Simd::kMergeRows <= end; begin += Simd::kMergeRows) merge_row<Simd::kMergeRows>(of, begin);
  for (; begin < end; ++begin) merge_row<1>(of, begin);
}

constexpr ThinKernels kKernels = {kLanes, Simd::kMergeRows, project<Store>, project<Dot>,
                                  Simd::kMerges ? merge : nullptr};

}  // namespace
}  // namespace fastspec
