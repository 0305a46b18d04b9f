// The inner loops of the thin products (thin_products.h), compiled once for each kind of register.
//
// There are two such sets of products, and a third way to the same registers, each for another job:
//   thin_*          many rows of activations times a basis of up to 64 columns, float32, and W + L R: the layers'.
//                   Bound by fetching, so the tiles prefetch; masked loads and stores for odd ranks; fused with a
//                   scale, a shift or a reduction.
//   row_*           a few rows times a matrix, and Gram matrices, float32 and float64, on any processor: what
//                   topk_svd runs on. Bound by arithmetic; the compiler's vector types, and panels copied together.
//   diagonals.cpp   elementwise loops, which the compiler vectorises by itself (target_clones).
// Written on the vector types of row_*, the thin products gave the same bits. Median time over that of the masked
// ones, 61 alternating calls on one thread, AMD EPYC with AVX-512, 3 shapes, on a machine that was not idle:
//   projections at ranks 32 and 64, AVX-512    0.98 to 1.01
//   projections at rank 8 (no masks)           0.95 to 1.06; on AVX2 mostly 1.02 to 1.04
//   the merge of 3072 x 768                    0.95 to 1.02 in one build, 1.04 to 1.14 in another
// So they stay apart.
#pragma once

#include <cstdint>

namespace fastspec {

// Rows whose products make one partial sum: a multiple of the rows of every tile.
constexpr int64_t kThinBlock = 48;

// Floats of a cache line.
constexpr int64_t kLine = 16;

// X B is written to p [N, k], times `scale` less `shift`; both are padded to whole vectors.
struct Store {
  float* p;
  int64_t ldp;
  const float *scale, *shift;
};

// X B is multiplied by p [N, k] and summed over the rows of each block into sums [blocks, width].
struct Dot {
  const float* p;
  int64_t ldp;
  float* sums;
  int64_t width;
};

// Row-major x [N, d] and the panel b [d, width] at columns `column` of a basis of k columns.
struct ThinOperands {
  const float* x;
  int64_t ldx, d;
  const float* b;
  int64_t column, k;
};

// m = w + l r  for w, m [rows, cols], l [rows, k], r [k, cols].
struct MergeOperands {
  const float *w, *l, *r;
  float* m;
  int64_t ldw, ldl, ldr, ldm, k, cols;
};

// What one kind of register offers. A panel of the basis is one or two vectors wide.
struct ThinKernels {
  int64_t lanes;       // floats of a vector
  int64_t merge_rows;  // rows of a merge's tile
  void (*store)(const ThinOperands&, int64_t vectors, int64_t begin, int64_t end, const Store&);
  void (*dot)(const ThinOperands&, int64_t vectors, int64_t begin, int64_t end, const Dot&);
  void (*merge)(const MergeOperands&, int64_t begin, int64_t end);  // null where a BLAS is faster
};

// Null where this compiler or this processor does not have them.
const ThinKernels* thin_avx512();
const ThinKernels* thin_avx2();

}  // namespace fastspec
