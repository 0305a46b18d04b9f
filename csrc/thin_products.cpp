// Thin float32 products on AVX-512 (see thin_products.h).
//
//   thin_project:      P [N, k]    = X [N, d] B [d, k]                   a tile of P stays in registers
//   thin_project_dot:  r [k]       = diag(P^T X B)                       X B is reduced as it is made
//   thin_merge:        M [out, in] = W [out, in] + L [out, k] R [k, in]  one pass: W is read once, M written once
//
// A BLAS is built for large inner and outer sizes, and its merge copies W first. In a training step the
// operands come from beyond the second cache, and the rows of a tile are too short for the processor to
// foresee: each tile asks for the next one's lines while it multiplies.
#include "thin_products.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <type_traits>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define FASTSPEC_AVX512 __attribute__((target("avx512f")))
#endif

namespace fastspec {

using at::Tensor;

bool thin_supported() {
#ifdef FASTSPEC_AVX512
  static const bool supported = __builtin_cpu_supports("avx512f");
  return supported;
#else
  return false;
#endif
}

bool thin_operand(const Tensor& matrix) {
  return matrix.scalar_type() == at::kFloat && matrix.is_cpu() && matrix.stride(-1) == 1;
}

#ifdef FASTSPEC_AVX512
namespace {

constexpr int64_t LANES = 16;
constexpr int ROWS = 12;        // rows of a projection tile: 12 x 2 accumulators of 32 registers
constexpr int64_t BLOCK = 48;   // rows whose products make one partial sum: a multiple of ROWS

FASTSPEC_AVX512 inline __mmask16 first(int64_t lanes) {
  return lanes >= LANES ? 0xffff : static_cast<__mmask16>((1u << std::max<int64_t>(lanes, 0)) - 1);
}

// acc[MR, NV * 16] = X[MR, d] B[d, NV * 16]. Three rows share a base address, which leaves the compiler
// a register for each. The rows after these are fetched meanwhile.
template <int MR, int NV>
FASTSPEC_AVX512 inline __attribute__((always_inline)) void multiply_tile(
    __m512 (&acc)[MR][NV], const float* __restrict x, int64_t ldx, const float* __restrict b,
    int64_t d) {
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[r][v] = _mm512_setzero_ps();
  const float* const base[4] = {x, x + 3 * ldx, x + 6 * ldx, x + 9 * ldx};
  for (int64_t line = 0; line < d; line += LANES) {
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) _mm_prefetch(base[r / 3] + (r % 3 + MR) * ldx + line, _MM_HINT_T0);
    const int64_t end = std::min(line + LANES, d);
    for (int64_t j = line; j < end; ++j, b += NV * LANES) {
      __m512 bv[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) bv[v] = _mm512_loadu_ps(b + v * LANES);
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r) {
        const __m512 xv = _mm512_set1_ps(base[r / 3][(r % 3) * ldx + j]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[r][v] = _mm512_fmadd_ps(xv, bv[v], acc[r][v]);
      }
    }
  }
}

// What becomes of a tile of X B: written, scaled and shifted.
struct Store {
  float* p;
  int64_t ldp;
  std::array<float, THIN_RANK> scale, shift;

  template <int MR, int NV>
  FASTSPEC_AVX512 inline __attribute__((always_inline)) void take(
      const __m512 (&acc)[MR][NV], int64_t row, int64_t column, int64_t k) const {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const int64_t c = column + v * LANES;
      const __m512 a = _mm512_loadu_ps(&scale[c]), s = _mm512_loadu_ps(&shift[c]);
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r)
        _mm512_mask_storeu_ps(p + (row + r) * ldp + c, first(k - c), _mm512_fmsub_ps(acc[r][v], a, s));
    }
  }
};

// Multiplied by the tile of p and summed over its rows, into `sum` of the row's block.
struct Dot {
  const float* p;
  int64_t ldp;
  float* sums;  // [blocks, width], zeroed
  int64_t width;

  template <int MR, int NV>
  FASTSPEC_AVX512 inline __attribute__((always_inline)) void take(
      const __m512 (&acc)[MR][NV], int64_t row, int64_t column, int64_t k) const {
    float* const sum = sums + row / BLOCK * width + column;
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const __mmask16 mask = first(k - column - v * LANES);
      __m512 total = _mm512_loadu_ps(sum + v * LANES);
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r)
        total = _mm512_fmadd_ps(
            acc[r][v], _mm512_maskz_loadu_ps(mask, p + (row + r) * ldp + column + v * LANES), total);
      _mm512_storeu_ps(sum + v * LANES, total);
    }
  }
};

template <int MR, int NV, class Sink>
FASTSPEC_AVX512 void tile(const float* x, int64_t ldx, const float* b, int64_t d, int64_t row,
                          int64_t column, int64_t k, const Sink& sink) {
  __m512 acc[MR][NV];
  multiply_tile<MR, NV>(acc, x + row * ldx, ldx, b, d);
  sink.take(acc, row, column, k);
}

// B in panels [d, width] of NV * 16 columns, zero-padded; `own` holds them where the basis does not lie so.
struct Panels {
  int64_t nv, width, count;
  Tensor own;
  const float* data;

  explicit Panels(const Tensor& basis) {
    const int64_t d = basis.size(0), k = basis.size(1);
    nv = k <= LANES ? 1 : 2;
    width = nv * LANES;
    count = (k + width - 1) / width;
    if (k == width && basis.is_contiguous()) {
      data = basis.const_data_ptr<float>();
      return;
    }
    own = at::empty({count, d, width}, basis.options());
    float* const to = own.mutable_data_ptr<float>();
    const float* const from = basis.const_data_ptr<float>();
    const int64_t row = basis.stride(0), column = basis.stride(1);
    for (int64_t panel = 0; panel < count; ++panel)
      for (int64_t begin = 0; begin < d; begin += LANES)  // squares, so that either layout is cached
        for (int64_t c = 0; c < width; ++c) {
          const int64_t source = panel * width + c;
          for (int64_t j = begin; j < std::min(begin + LANES, d); ++j)
            to[(panel * d + j) * width + c] = source < k ? from[j * row + source * column] : 0.f;
        }
    data = to;
  }
};

template <class Sink>
void multiply(const Tensor& x, const Panels& panels, int64_t k, const Sink& sink) {
  const int64_t n = x.size(0), d = x.size(1), ldx = x.stride(0);
  const float* const xp = x.const_data_ptr<float>();
  const auto rows = [&](auto nv, const float* b, int64_t begin, int64_t end, int64_t column) {
    int64_t row = begin;
    for (; row + ROWS <= end; row += ROWS) tile<ROWS, nv()>(xp, ldx, b, d, row, column, k, sink);
    for (; row < end; ++row) tile<1, nv()>(xp, ldx, b, d, row, column, k, sink);
  };
  const int64_t blocks = (n + BLOCK - 1) / BLOCK;
  const int64_t grain = std::max<int64_t>(1, (1 << 18) / (BLOCK * d * k + 1));
  at::parallel_for(0, blocks, grain, [&](int64_t first_block, int64_t last_block) {
    for (int64_t block = first_block; block < last_block; ++block)
      for (int64_t i = 0; i < panels.count; ++i) {
        const float* const b = panels.data + i * d * panels.width;
        const int64_t begin = block * BLOCK, end = std::min(n, begin + BLOCK);
        if (panels.nv == 1)
          rows(std::integral_constant<int, 1>(), b, begin, end, i * panels.width);
        else
          rows(std::integral_constant<int, 2>(), b, begin, end, i * panels.width);
      }
  });
}

// W + L R on MR rows and NV * 16 columns. The tile to the right is fetched meanwhile; W is added last,
// so that its own lines have the whole product's time to arrive.
template <int MR, int NV>
FASTSPEC_AVX512 void merge_tile(
    const float* __restrict w, int64_t ldw,
    const float* __restrict l, int64_t ldl,
    const float* __restrict r, int64_t ldr,
    float* __restrict m, int64_t ldm,
    int64_t k, __mmask16 mask) {
  __m512 acc[MR][NV];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[i][v] = _mm512_setzero_ps();
  const int64_t each = (MR * NV + k - 1) / k;  // lines to fetch in every step of the product
  int64_t line = 0;
  for (int64_t j = 0; j < k; ++j) {
    for (const int64_t stop = std::min<int64_t>(line + each, MR * NV); line < stop; ++line)
      _mm_prefetch(w + line / NV * ldw + (NV + line % NV) * LANES, _MM_HINT_T1);
    __m512 rv[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) rv[v] = _mm512_maskz_loadu_ps(mask, r + j * ldr + v * LANES);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      const __m512 lv = _mm512_set1_ps(l[i * ldl + j]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[i][v] = _mm512_fmadd_ps(lv, rv[v], acc[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const __m512 wv = _mm512_maskz_loadu_ps(mask, w + i * ldw + v * LANES);
      _mm512_mask_storeu_ps(m + i * ldm + v * LANES, mask, _mm512_add_ps(wv, acc[i][v]));
    }
}

template <int MR>
void merge_rows(
    const float* w, int64_t ldw, const float* l, int64_t ldl, const float* r, int64_t ldr,
    float* m, int64_t ldm, int64_t k, int64_t cols) {
  constexpr int NV = 4;
  int64_t c = 0;
  for (; c + NV * LANES <= cols; c += NV * LANES)
    merge_tile<MR, NV>(w + c, ldw, l, ldl, r + c, ldr, m + c, ldm, k, 0xffff);
  for (; c < cols; c += LANES)
    merge_tile<MR, 1>(w + c, ldw, l, ldl, r + c, ldr, m + c, ldm, k, first(cols - c));
}

std::array<float, THIN_RANK> padded(const Tensor& values, float otherwise) {
  std::array<float, THIN_RANK> out;
  out.fill(otherwise);
  if (values.defined()) {
    const Tensor flat = values.contiguous();
    std::copy_n(flat.const_data_ptr<float>(), flat.numel(), out.begin());
  }
  return out;
}

}  // namespace

Tensor thin_project(const Tensor& x, const Tensor& basis, const Tensor& scale, const Tensor& shift) {
  const int64_t n = x.size(0), k = basis.size(1);
  Tensor p = at::empty({n, k}, x.options());
  if (n == 0 || k == 0) return p;
  const Panels panels(basis);
  multiply(x, panels, k, Store{p.mutable_data_ptr<float>(), k, padded(scale, 1), padded(shift, 0)});
  return p;
}

Tensor thin_project_dot(const Tensor& x, const Tensor& basis, const Tensor& p) {
  const int64_t k = basis.size(1);
  const Panels panels(basis);
  const int64_t blocks = (x.size(0) + BLOCK - 1) / BLOCK, width = panels.count * panels.width;
  const Tensor sums = at::zeros({blocks, width}, x.options());
  multiply(x, panels, k,
           Dot{p.const_data_ptr<float>(), p.stride(0), sums.mutable_data_ptr<float>(), width});
  return sums.sum(0).slice(0, 0, k);
}

void thin_merge(const Tensor& w, const Tensor& left, const Tensor& right, const Tensor& out) {
  const int64_t rows = w.size(0), cols = w.size(1), k = left.size(1);
  constexpr int64_t MR = 6;
  const float *wp = w.const_data_ptr<float>(), *lp = left.const_data_ptr<float>(),
              *rp = right.const_data_ptr<float>();
  float* mp = out.mutable_data_ptr<float>();
  const int64_t ldw = w.stride(0), ldl = left.stride(0), ldr = right.stride(0), ldm = out.stride(0);
  const int64_t grain = std::max<int64_t>(1, (1 << 17) / (MR * cols * k + 1));
  at::parallel_for(0, (rows + MR - 1) / MR, grain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      int64_t i = t * MR;
      if (i + MR <= rows)
        merge_rows<MR>(wp + i * ldw, ldw, lp + i * ldl, ldl, rp, ldr, mp + i * ldm, ldm, k, cols);
      else
        for (; i < rows; ++i)
          merge_rows<1>(wp + i * ldw, ldw, lp + i * ldl, ldl, rp, ldr, mp + i * ldm, ldm, k, cols);
    }
  });
}

#else

Tensor thin_project(const Tensor&, const Tensor&, const Tensor&, const Tensor&) {
  TORCH_CHECK(false, "thin_project was compiled without AVX-512: ask thin_supported() first");
}

Tensor thin_project_dot(const Tensor&, const Tensor&, const Tensor&) {
  TORCH_CHECK(false, "thin_project_dot was compiled without AVX-512: ask thin_supported() first");
}

void thin_merge(const Tensor&, const Tensor&, const Tensor&, const Tensor&) {
  TORCH_CHECK(false, "thin_merge was compiled without AVX-512: ask thin_supported() first");
}

#endif

namespace {

// The products as operators, for tests and benchmarks: checked, where the layer's own calls are valid.
void check_project(const Tensor& x, const Tensor& basis) {
  TORCH_CHECK(x.dim() == 2 && basis.dim() == 2 && thin_operand(x) && basis.scalar_type() == at::kFloat,
              "expected float32 x [N, d] with unit column stride and basis [d, k], got ",
              x.scalar_type(), " ", x.sizes(), " and ", basis.scalar_type(), " ", basis.sizes());
  TORCH_CHECK(basis.size(0) == x.size(1) && basis.size(1) <= THIN_RANK, "expected a basis [", x.size(1),
              ", k <= ", THIN_RANK, "], got ", basis.sizes());
}

Tensor thin_project_op(const Tensor& x, const Tensor& basis) {
  check_project(x, basis);
  return thin_project(x, basis);
}

Tensor thin_project_dot_op(const Tensor& x, const Tensor& basis, const Tensor& p) {
  check_project(x, basis);
  TORCH_CHECK(p.dim() == 2 && thin_operand(p) && p.size(0) == x.size(0) && p.size(1) == basis.size(1),
              "expected float32 p [N, k] with unit column stride, got ", p.scalar_type(), " ", p.sizes());
  return thin_project_dot(x, basis, p);
}

void thin_merge_op(const Tensor& w, const Tensor& left, const Tensor& right, const Tensor& out) {
  for (const Tensor& t : {w, left, right, out})
    TORCH_CHECK(t.dim() == 2 && thin_operand(t),
                "thin_merge: expected float32 matrices with unit column stride");
  TORCH_CHECK(left.size(0) == w.size(0) && right.size(0) == left.size(1) &&
                  right.size(1) == w.size(1) && out.sizes() == w.sizes(),
              "thin_merge: expected w and out [m, n], left [m, k], right [k, n]");
  thin_merge(w, left, right, out);
}

}  // namespace
}  // namespace fastspec

TORCH_LIBRARY_FRAGMENT(fastspec, m) {
  m.def("thin_supported() -> bool", &fastspec::thin_supported);
  m.def("thin_project(Tensor x, Tensor basis) -> Tensor");
  m.def("thin_project_dot(Tensor x, Tensor basis, Tensor p) -> Tensor");
  m.def("thin_merge(Tensor w, Tensor left, Tensor right, Tensor(a!) out) -> ()");
}

TORCH_LIBRARY_IMPL(fastspec, CPU, m) {
  m.impl("thin_project", &fastspec::thin_project_op);
  m.impl("thin_project_dot", &fastspec::thin_project_dot_op);
  m.impl("thin_merge", &fastspec::thin_merge_op);
}
