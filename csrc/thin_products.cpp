// Thin float32 products (see thin_products.h).
//
//   thin_project:      P [N, k]    = X [N, d] B [d, k]                   a tile of P stays in registers
//   thin_project_dot:  r [k]       = diag(P^T X B)                       X B is reduced as it is made
//   thin_merge:        M [out, in] = W [out, in] + L [out, k] R [k, in]  one pass: W is read once, M written once
//
// A BLAS is built for large inner and outer sizes, and its merge copies W first. In a training step the
// operands come from beyond the second cache, and the rows of a tile are too short for the processor to
// foresee: each tile asks for the next one's lines while it multiplies (thin_tiles.h).
#include "thin_products.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <array>

#include "thin_kernels.h"

namespace fastspec {

using at::Tensor;

namespace {

// The widest registers of this processor; null where it has none that are worth it.
const ThinKernels* kernels() {
  static const ThinKernels* const best = thin_avx512() ? thin_avx512() : thin_avx2();
  return best;
}

const ThinKernels& needed_kernels() {
  TORCH_CHECK(kernels(), "this processor has no thin products: ask thin_supported() first");
  return *kernels();
}

// Columns of a matrix [d, cols], `width` at a time, as [count, d, width], zero-padded.
Tensor panels_of(const Tensor& matrix, int64_t width) {
  const int64_t d = matrix.size(0), cols = matrix.size(1), count = (cols + width - 1) / width;
  Tensor out = at::empty({count, d, width}, matrix.options());
  float* const to = out.mutable_data_ptr<float>();
  const float* const from = matrix.const_data_ptr<float>();
  const int64_t row = matrix.stride(0), column = matrix.stride(1);
  for (int64_t panel = 0; panel < count; ++panel)
    for (int64_t begin = 0; begin < d; begin += kLine)  // squares, so that either layout is cached
      for (int64_t c = 0; c < width; ++c) {
        const int64_t source = panel * width + c;
        for (int64_t j = begin; j < std::min(begin + kLine, d); ++j)
          to[(panel * d + j) * width + c] = source < cols ? from[j * row + source * column] : 0.f;
      }
  return out;
}

// B in panels [d, width] of one or two vectors; `own` holds them where the basis does not lie so.
struct Panels {
  int64_t vectors, width, count;
  Tensor own;
  const float* data;

  explicit Panels(const Tensor& basis) {
    const int64_t k = basis.size(1), lanes = needed_kernels().lanes;
    vectors = k <= lanes ? 1 : 2;
    width = vectors * lanes;
    count = (k + width - 1) / width;
    own = k == width && basis.is_contiguous() ? basis : panels_of(basis, width);
    data = own.const_data_ptr<float>();
  }
};

// Runs `product` (a member of ThinKernels) on every block of rows and panel of the basis.
template <class Product, class To>
void multiply(Product product, const Tensor& x, const Panels& panels, int64_t k, const To& to) {
  const int64_t n = x.size(0), d = x.size(1);
  const float* const xp = x.const_data_ptr<float>();
  const int64_t ldx = x.stride(0), blocks = (n + kThinBlock - 1) / kThinBlock;
  const int64_t grain = std::max<int64_t>(1, (1 << 18) / (kThinBlock * d * k + 1));
  at::parallel_for(0, blocks, grain, [&](int64_t first_block, int64_t last_block) {
    for (int64_t block = first_block; block < last_block; ++block)
      for (int64_t i = 0; i < panels.count; ++i) {
        const float* const b = panels.data + i * d * panels.width;
        const int64_t begin = block * kThinBlock, end = std::min(n, begin + kThinBlock);
        product({xp, ldx, d, b, i * panels.width, k}, panels.vectors, begin, end, to);
      }
  });
}

std::array<float, kThinRank> padded(const Tensor& values, float otherwise) {
  std::array<float, kThinRank> out;
  out.fill(otherwise);
  if (values.defined()) {
    const Tensor flat = values.contiguous();
    std::copy_n(flat.const_data_ptr<float>(), flat.numel(), out.begin());
  }
  return out;
}

}  // namespace

bool thin_supported() { return kernels() != nullptr; }

bool thin_merge_supported() { return kernels() && kernels()->merge; }

bool thin_operand(const Tensor& matrix) {
  return matrix.scalar_type() == at::kFloat && matrix.is_cpu() && matrix.stride(-1) == 1;
}

Tensor thin_project(const Tensor& x, const Tensor& basis, const Tensor& scale, const Tensor& shift) {
  const int64_t n = x.size(0), k = basis.size(1);
  Tensor p = at::empty({n, k}, x.options());
  if (n == 0 || k == 0) return p;
  const auto scales = padded(scale, 1), shifts = padded(shift, 0);
  multiply(needed_kernels().store, x, Panels(basis), k,
           Store{p.mutable_data_ptr<float>(), k, scales.data(), shifts.data()});
  return p;
}

Tensor thin_project_dot(const Tensor& x, const Tensor& basis, const Tensor& p) {
  const int64_t k = basis.size(1);
  const Panels panels(basis);
  const int64_t blocks = (x.size(0) + kThinBlock - 1) / kThinBlock, width = panels.count * panels.width;
  const Tensor sums = at::zeros({blocks, width}, x.options());
  multiply(needed_kernels().dot, x, panels, k,
           Dot{p.const_data_ptr<float>(), p.stride(0), sums.mutable_data_ptr<float>(), width});
  return sums.sum(0).slice(0, 0, k);
}

void thin_merge(const Tensor& w, const Tensor& left, const Tensor& right, const Tensor& out) {
  TORCH_CHECK(thin_merge_supported(), "this processor has no thin_merge: ask thin_merge_supported() first");
  const ThinKernels& with = *kernels();
  const int64_t rows = w.size(0), cols = w.size(1), k = left.size(1), tile = with.merge_rows;
  const MergeOperands of{w.const_data_ptr<float>(),
                         left.const_data_ptr<float>(),
                         right.const_data_ptr<float>(),
                         out.mutable_data_ptr<float>(),
                         w.stride(0),
                         left.stride(0),
                         right.stride(0),
                         out.stride(0),
                         k,
                         cols};
  const int64_t grain = std::max<int64_t>(1, (1 << 17) / (tile * cols * k + 1));
  at::parallel_for(0, (rows + tile - 1) / tile, grain,
                   [&](int64_t begin, int64_t end) { with.merge(of, begin * tile, std::min(rows, end * tile)); });
}

namespace {

// The products as operators, for tests and benchmarks: checked, where the layer's own calls are valid.
void check_project(const Tensor& x, const Tensor& basis) {
  TORCH_CHECK(x.dim() == 2 && basis.dim() == 2 && thin_operand(x) && basis.scalar_type() == at::kFloat,
              "expected float32 x [N, d] with unit column stride and basis [d, k], got ", x.scalar_type(), " ",
              x.sizes(), " and ", basis.scalar_type(), " ", basis.sizes());
  TORCH_CHECK(basis.size(0) == x.size(1) && basis.size(1) <= kThinRank, "expected a basis [", x.size(1),
              ", k <= ", kThinRank, "], got ", basis.sizes());
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
    TORCH_CHECK(t.dim() == 2 && thin_operand(t), "thin_merge: expected float32 matrices with unit column stride");
  TORCH_CHECK(left.size(0) == w.size(0) && right.size(0) == left.size(1) && right.size(1) == w.size(1) &&
                  out.sizes() == w.sizes(),
              "thin_merge: expected w and out [m, n], left [m, k], right [k, n]");
  thin_merge(w, left, right, out);
}

}  // namespace
}  // namespace fastspec

TORCH_LIBRARY_FRAGMENT(fastspec, m) {
  m.def("thin_supported() -> bool", &fastspec::thin_supported);
  m.def("thin_merge_supported() -> bool", &fastspec::thin_merge_supported);
  m.def("thin_project(Tensor x, Tensor basis) -> Tensor");
  m.def("thin_project_dot(Tensor x, Tensor basis, Tensor p) -> Tensor");
  m.def("thin_merge(Tensor w, Tensor left, Tensor right, Tensor(a!) out) -> ()");
}

TORCH_LIBRARY_IMPL(fastspec, CPU, m) {
  m.impl("thin_project", &fastspec::thin_project_op);
  m.impl("thin_project_dot", &fastspec::thin_project_dot_op);
  m.impl("thin_merge", &fastspec::thin_merge_op);
}
