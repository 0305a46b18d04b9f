#include "triplets.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>

#include "eigh.h"
#include "row_products.h"

namespace fastspec {
namespace {

// Rows of W that are widened at a time, so that float64 products need no float64 copy of W.
constexpr int64_t kWidenedRows = 512;
// Columns of a thin product that are worth a thread: two tiles of rows_times.
constexpr int64_t kThreadColumns = 8;

// a [1, m, n] x [1, n, k] on the CPU for thin x, of which the result has the layout: columns adjacent.
at::Tensor times_alone(const at::Tensor& a, const at::Tensor& x) {
  const bool transposed = !a.is_contiguous();
  const auto matrix = transposed ? a.mT().contiguous() : a, rows = x.mT().contiguous();
  const int64_t m = a.size(1), n = a.size(2), k = x.size(2);
  auto out = at::empty({1, k, m}, x.options());
  AT_DISPATCH_FLOATING_TYPES(a.scalar_type(), "times_alone", [&] {
    const auto* const from = matrix.const_data_ptr<scalar_t>();
    at::parallel_for(0, k, kThreadColumns, [&](int64_t begin, int64_t end) {
      const auto* const own = rows.const_data_ptr<scalar_t>() + begin * n;
      auto* const to = out.mutable_data_ptr<scalar_t>() + begin * m;
      if (transposed) {
        rows_times(own, end - begin, from, n, m, to);
      } else {
        rows_dot(own, end - begin, from, m, n, to, m);
      }
    });
  });
  return out.mT();
}

at::Tensor product(const at::Tensor& a, const at::Tensor& x) {
  return a.is_cpu() && a.size(0) == 1 ? times_alone(a, x) : at::bmm(a, x);
}

// W x in the dtype of x.
at::Tensor times(const at::Tensor& w, const at::Tensor& x) {
  if (w.scalar_type() == x.scalar_type()) return product(w, x);
  auto out = at::empty({w.size(0), w.size(1), x.size(2)}, x.options());
  for (int64_t row = 0; row < w.size(1); row += kWidenedRows) {
    const int64_t size = std::min(kWidenedRows, w.size(1) - row);
    out.narrow(1, row, size).copy_(at::bmm(w.narrow(1, row, size).to(x.scalar_type()), x));
  }
  return out;
}

// W^T y in the dtype of y.
at::Tensor transposed_times(const at::Tensor& w, const at::Tensor& y) {
  if (w.scalar_type() == y.scalar_type()) return product(w.mT(), y);
  auto out = at::zeros({w.size(0), w.size(2), y.size(2)}, y.options());
  for (int64_t row = 0; row < w.size(1); row += kWidenedRows) {
    const int64_t size = std::min(kWidenedRows, w.size(1) - row);
    out.add_(at::bmm(w.narrow(1, row, size).to(y.scalar_type()).mT(), y.narrow(1, row, size)));
  }
  return out;
}

at::Tensor column_norms(const at::Tensor& x) {  // [A, m, k] -> [A, k]
  return at::linalg_vector_norm(x, 2, at::IntArrayRef{1});
}

// max_i of |W v_i - s_i u_i| and |W^T u_i - s_i v_i| over max(s_i, floor s_1), products in `compute`. 0 for a zero
// matrix.
at::Tensor residual_of(const at::Tensor& w, const Triplets& t, double floor, at::ScalarType compute) {
  const auto left = t.left.to(compute), s = t.s.to(compute), right = t.right.to(compute);
  const auto forward = column_norms(times(w, right).addcmul_(left, s.unsqueeze(1), -1));
  const auto backward = column_norms(transposed_times(w, left).addcmul_(right, s.unsqueeze(1), -1));
  auto scale = at::maximum(s, s.narrow(1, 0, 1) * floor);
  scale = at::where(scale > 0, scale, at::ones_like(scale));
  return (at::maximum(forward, backward) / scale).amax(1);
}

// Replaces the triplets of one matrix after the first `kept` by those of W on the remaining directions. The Q
// factor of [u_1 .. u_kept, W v_kept+1 ..] is orthonormal whatever the rank of its argument, so vanishing
// singular values get left vectors too.
void complete(const at::Tensor& w, const at::Tensor& left, const at::Tensor& s, const at::Tensor& right,
              int64_t kept) {
  const int64_t rest = s.size(1) - kept;
  const auto q = std::get<0>(at::linalg_qr(left.to(at::kDouble))).narrow(2, kept, rest);
  const auto directions = right.narrow(2, kept, rest).to(at::kDouble);
  const auto [a, values, bh] = at::linalg_svd(at::bmm(q.mT(), times(w, directions)));
  left.narrow(2, kept, rest).copy_(at::bmm(q, a));
  s.narrow(1, kept, rest).copy_(values);
  right.narrow(2, kept, rest).copy_(at::bmm(directions, bh.mT()));
}

// Brings s [A, k] and the columns of `a` and `b` into descending order: rounding may swap neighbours.
void sort_descending(at::Tensor& s, at::Tensor& a, at::Tensor& b) {
  const int64_t k = s.size(1);
  if (!(s.narrow(1, 1, k - 1) > s.narrow(1, 0, k - 1)).any().item<bool>()) return;
  const auto [sorted, order] = at::sort(s, /*stable=*/true, /*dim=*/1, /*descending=*/true);
  s = sorted;
  for (auto* const x : {&a, &b}) *x = x->gather(2, order.unsqueeze(1).expand_as(*x));
}

// u_i = W v_i / s_i from `image = W V` with orthogonal columns; `right` and `image` in the same dtype.
Triplets finish(const at::Tensor& w, at::Tensor right, at::Tensor image, const SvdOptions& options,
                at::ScalarType result) {
  auto s = column_norms(image);
  const int64_t k = s.size(1);
  sort_descending(s, right, image);
  const auto small = s <= s.narrow(1, 0, 1) * options.small;
  auto left = image / at::where(small, at::ones_like(s), s).unsqueeze(1);
  if (small.any().item<bool>()) {
    right = right.contiguous();
    const auto kept = small.logical_not().sum(1).cpu();
    for (int64_t i = 0; i < s.size(0); ++i) {
      const int64_t count = kept[i].item<int64_t>();
      if (count == k) continue;
      complete(w.narrow(0, i, 1), left.narrow(0, i, 1), s.narrow(0, i, 1), right.narrow(0, i, 1), count);
    }
    sort_descending(s, left, right);
  }
  const auto compute = image.scalar_type();
  Triplets found{left.to(result), s.to(result), right.to(result), {}};
  found.residual = residual_of(w, found, options.floor, compute).to(result);
  return found;
}

}  // namespace

Triplets rayleigh_ritz(const at::Tensor& w, const at::Tensor& subspace, const SvdOptions& options,
                       at::ScalarType result) {
  auto right = subspace, image = times(w, right);
  if (w.scalar_type() == at::kFloat && right.scalar_type() == at::kFloat) {
    // float32 would leave s_1 / s_k times its own rounding in the products
    const auto s = column_norms(image);
    if ((s.amin(1) * options.wide_ratio < s.amax(1)).any().item<bool>()) {
      right = right.to(at::kDouble);
      image = times(w, right);
    }
  }
  // V <- V C with C^T (V^T V) C = 1 and C^T (V^T W^T W V) C diagonal, in float64: the left vectors stay
  // orthogonal however far s_1 is above s_k
  const auto v = right.to(at::kDouble), y = image.to(at::kDouble);
  const auto metric = at::linalg_cholesky(at::bmm(v.mT(), v));
  const auto half = at::linalg_solve_triangular(metric, at::bmm(y.mT(), y), /*upper=*/false);
  const auto energy = at::linalg_solve_triangular(metric, half.mT(), /*upper=*/false);
  const auto vectors = std::get<1>(symmetric_eigh(energy)).flip(2);
  const auto c = at::linalg_solve_triangular(metric.mT(), vectors, /*upper=*/true).to(right.scalar_type());
  // in the layout of `image`: columns adjacent where the next products want them so
  const auto rotated = [&](const at::Tensor& x) { return at::bmm(c.mT(), x.mT()).mT(); };
  return finish(w, rotated(right), rotated(image), options, result);
}

at::Tensor gram_subspace(const at::Tensor& w, int64_t k) {
  const int64_t n = w.size(2);
  auto gram = at::zeros({w.size(0), n, n}, w.options().dtype(at::kDouble));
  for (int64_t row = 0; row < w.size(1); row += kWidenedRows) {
    const int64_t size = std::min(kWidenedRows, w.size(1) - row);
    const auto wide = w.narrow(1, row, size).to(at::kDouble);
    if (gram.size(0) == 1) {
      gram[0].addmm_(wide[0].t(), wide[0]);
    } else {
      gram.baddbmm_(wide.mT(), wide);
    }
  }
  return std::get<1>(symmetric_eigh(gram)).narrow(2, n - k, k).flip(2);
}

Triplets gram_triplets(const at::Tensor& w, const SvdOptions& options) {
  const auto right = gram_subspace(w, options.k);
  return finish(w, right, times(w, right), options, w.scalar_type());
}

Triplets exact_triplets(const at::Tensor& w, const SvdOptions& options, at::ScalarType result) {
  const int64_t k = options.k;
  const auto [left, s, rows] = at::linalg_svd(w, /*full_matrices=*/false);
  Triplets found{
      left.narrow(2, 0, k).to(result), s.narrow(1, 0, k).to(result), rows.narrow(1, 0, k).mT().to(result), {}};
  found.residual = residual_of(w, found, options.floor, w.scalar_type()).to(result);
  return found;
}

}  // namespace fastspec
