// The inner loops of the thin products (thin_products.h), compiled once for each kind of register.
#pragma once

#include <cstdint>

namespace fastspec {

// Rows whose products make one partial sum: a multiple of the rows of every tile.
constexpr int64_t THIN_BLOCK = 48;

// Floats of a cache line.
constexpr int64_t LINE = 16;

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
