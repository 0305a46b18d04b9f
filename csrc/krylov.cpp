#include "krylov.h"

#include <ATen/CPUGeneratorImpl.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace fastspec {
namespace {

// Values within this many tolerances of one another may be copies of one value (see krylov.py).
constexpr double kCopies = 30;

// Lower Cholesky factor of the b x b matrix `a`, in place. False where it is made of rounding errors.
bool cholesky(std::vector<double>& a, int64_t b, double smallest_pivot) {
  double low = std::numeric_limits<double>::infinity();
  for (int64_t i = 0; i < b; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      double sum = a[i * b + j];
      for (int64_t l = 0; l < j; ++l) sum -= a[i * b + l] * a[j * b + l];
      if (i == j) {
        if (!(sum > 0)) return false;
        a[i * b + i] = std::sqrt(sum);
        low = std::min(low, a[i * b + i]);
      } else {
        a[i * b + j] = sum / a[j * b + j];
      }
    }
  }
  return low > smallest_pivot;
}

// W^T W, the blocks below the diagonal mirrored instead of multiplied: 5/8 of the work.
at::Tensor gram_of(const at::Tensor& w) {
  const int64_t n = w.size(1), block = (n + 3) / 4;
  auto gram = at::empty({n, n}, w.options());
  for (int64_t start = 0; start < n; start += block) {
    const int64_t size = std::min(block, n - start), rest = n - start - size;
    auto rows = gram.narrow(0, start, size).narrow(1, start, n - start);
    at::mm_out(rows, w.narrow(1, start, size).t(), w.narrow(1, start, n - start));
    if (rest)
      gram.narrow(0, start + size, rest).narrow(1, start, size).copy_(rows.narrow(1, size, rest).t());
  }
  return gram;
}

template <typename T>
class Iteration {
 public:
  Iteration(const at::Tensor& w, const KrylovOptions& options, int64_t width)
      : w_(w),
        short_(w.size(1)),
        width_(width),
        eps_(std::numeric_limits<T>::epsilon()),
        generator_(at::detail::createCPUGenerator(options.seed)) {
    if (short_ <= options.gram_short) gram_ = gram_of(w);
    next_ = std::get<0>(at::linalg_qr(random(width).t())).t().contiguous();
  }

  int64_t size() const { return size_; }
  bool complete() const { return size_ == short_; }

  // Takes the next block into the basis and makes the one after it.
  void step() {
    const int64_t before = size_, b = next_.size(0), c = coupling_.defined() ? coupling_.size(0) : 0;
    append();
    const auto local = basis_.narrow(0, before - c, c + b);
    auto block = basis_.narrow(0, before, b);
    if (c) {
      t_.narrow(0, before - c, c).narrow(1, before, b).copy_(coupling_);
      t_.narrow(0, before, b).narrow(1, before - c, c).copy_(coupling_.t());
    }
    auto rest = gram_.defined() ? at::mm(block, gram_) : at::mm(at::mm(block, w_.t()), w_);
    const auto h = at::mm(rest, local.t());
    const auto diagonal = h.narrow(1, c, b);
    t_.narrow(0, before, b).narrow(1, before, b).copy_(diagonal);
    scale_ = std::max(scale_, diagonal.diagonal().max().template item<double>());
    const int64_t room = std::min(b, short_ - size_);
    if (room == 0) return;
    rest.addmm_(h, local, 1, -1);
    orthonormalise(rest);
    if (room < b) {
      next_ = next_.narrow(0, 0, room).contiguous();
      coupling_ = coupling_.narrow(1, 0, room).contiguous();
    }
  }

  // k leading eigenpairs of T, descending, and the norms of W^T W v - value v.
  void ritz(int64_t k) {
    const auto projected = t_.narrow(0, 0, size_).narrow(1, 0, size_);
    auto [values, vectors] = at::linalg_eigh(projected);
    values = values.narrow(0, size_ - k, k).flip(0);
    vectors_ = vectors.narrow(1, size_ - k, k).flip(1);
    values_.assign(k, 0);
    errors_.assign(k, 0);
    std::copy_n(values.contiguous().template data_ptr<T>(), k, values_.begin());
    if (complete()) return;
    const int64_t b = coupling_.size(0);
    const auto leak = at::mm(coupling_.t(), vectors_.narrow(0, size_ - b, b));
    const auto norms = at::linalg_vector_norm(leak, 2, at::IntArrayRef{0}).contiguous();
    std::copy_n(norms.template data_ptr<T>(), k, errors_.begin());
  }

  // Largest error over the one allowed; at most 1 when converged. What rounding leaves in T cannot be
  // improved on, so it counts as converged here, and the measured residual decides.
  double share_of_tolerance(double tol, double floor) const {
    const double first = std::max<double>(values_[0], std::numeric_limits<T>::min());
    double worst = 1e-30;
    for (size_t i = 0; i < values_.size(); ++i) {
      const double wanted = 0.5 * tol * std::max<double>(values_[i], floor * floor * first);
      worst = std::max(worst, errors_[i] / std::max(wanted, 4 * eps_ * first));
    }
    return worst;
  }

  // Whether `width` values in a row coincide: a start block of b vectors reaches b copies at most.
  bool crowded(double tol) const {
    for (size_t i = 0; i + width_ <= values_.size(); ++i) {
      if (values_[i] - values_[i + width_ - 1] <= kCopies * tol * values_[0]) return true;
    }
    return false;
  }

  at::Tensor right() const { return at::mm(basis_.narrow(0, 0, size_).t(), vectors_); }

 private:
  void append() {
    const int64_t needed = size_ + next_.size(0);
    const int64_t capacity = basis_.defined() ? basis_.size(0) : 0;
    if (needed > capacity) {
      const int64_t grown = std::min(short_, std::max({2 * capacity, 24 * width_, needed}));
      auto basis = at::empty({grown, short_}, w_.options());
      auto t = at::zeros({grown, grown}, w_.options());
      if (size_) {
        basis.narrow(0, 0, size_).copy_(basis_.narrow(0, 0, size_));
        t.narrow(0, 0, size_).narrow(1, 0, size_).copy_(
            t_.narrow(0, 0, size_).narrow(1, 0, size_));
      }
      basis_ = basis;
      t_ = t;
    }
    basis_.narrow(0, size_, next_.size(0)).copy_(next_);
    size_ = needed;
  }

  // Sets next_ to an orthonormal block spanning `rest`, orthogonal to the basis too, and coupling_ to
  // rest next_^T. `rest` is free of the last two blocks already. Normalised twice by Cholesky; where
  // that breaks down the subspace is invariant, and random vectors take the empty places.
  void orthonormalise(const at::Tensor& rest) {
    const auto q = basis_.narrow(0, 0, size_);
    const int64_t b = rest.size(0);
    next_ = rest.clone();
    next_.addmm_(at::mm(rest, q.t()), q, 1, -1);
    if (!normalise(64 * eps_ * scale_) || !normalise(0)) next_ = repaired(rest, q);
    coupling_ = at::mm(rest, next_.t());
    TORCH_INTERNAL_ASSERT(next_.size(0) == b);
  }

  // next_ <- L^-1 next_ with next_ next_^T = L L^T. False, with next_ spoiled, where L is no good.
  bool normalise(double negligible) {
    const int64_t b = next_.size(0);
    const auto g = at::mm(next_, next_.t());
    const T* gram = g.template data_ptr<T>();
    std::vector<double> factor(gram, gram + b * b);
    double high = 0;
    for (int64_t i = 0; i < b; ++i) high = std::max(high, factor[i * b + i]);
    // below sqrt(eps) of the largest row, what is left of another one is rounding
    const double smallest = std::max(negligible, 8 * std::sqrt(eps_ * high));
    if (!cholesky(factor, b, smallest)) return false;
    T* rows = next_.template data_ptr<T>();
    for (int64_t i = 0; i < b; ++i) {
      T* row = rows + i * short_;
      for (int64_t j = 0; j < i; ++j) {
        const T f = static_cast<T>(factor[i * b + j]);
        const T* other = rows + j * short_;
        for (int64_t l = 0; l < short_; ++l) row[l] -= f * other[l];
      }
      const T inverse = static_cast<T>(1 / factor[i * b + i]);
      for (int64_t l = 0; l < short_; ++l) row[l] *= inverse;
    }
    return true;
  }

  at::Tensor repaired(const at::Tensor& rest, const at::Tensor& q) {
    const auto svd = at::linalg_svd(rest, /*full_matrices=*/false);
    const auto kept = (std::get<1>(svd) > 64 * eps_ * scale_).unsqueeze(1);
    auto fresh = random(rest.size(0));
    fresh.div_(at::linalg_vector_norm(fresh, 2, at::IntArrayRef{1}, /*keepdim=*/true));
    auto block = at::where(kept, std::get<2>(svd), fresh);
    for (int pass = 0; pass < 3; ++pass) {
      block = at::addmm(block, at::mm(block, q.t()), q, 1, -1);
      block = std::get<0>(at::linalg_qr(block.t())).t().contiguous();
    }
    return block;
  }

  at::Tensor random(int64_t rows) {
    return at::randn({rows, short_}, generator_, w_.options());
  }

  at::Tensor w_;         // [m, n]
  at::Tensor gram_;      // [n, n], where forming it pays
  at::Tensor basis_;     // [capacity, n], orthonormal rows
  at::Tensor t_;         // [capacity, capacity], basis W^T W basis^T
  at::Tensor next_;      // [b, n]
  at::Tensor coupling_;  // [b, b'] between the last block of the basis and next_
  at::Tensor vectors_;   // [p, k]
  std::vector<double> values_, errors_;
  int64_t short_, width_, size_ = 0;
  double eps_, scale_ = 0;
  at::Generator generator_;
};

template <typename T>
at::Tensor iterate(const at::Tensor& w, const KrylovOptions& o) {
  for (int64_t width = std::min(o.width, w.size(1));; width = std::min(2 * width, w.size(1))) {
    Iteration<T> run(w, o, width);
    const int64_t n = w.size(1);
    int64_t check = std::min(3 * o.k + 10 * width, n);
    double last_size = o.k + width, last_log = -std::log10(o.tol);
    for (int64_t steps = 1;; ++steps) {
      run.step();
      const bool stopped = o.max_steps && steps >= o.max_steps;
      const bool final = run.complete() || (stopped && run.size() >= o.k);
      if (run.size() < check && !final) continue;
      run.ritz(o.k);
      const double share = run.share_of_tolerance(o.tol, o.floor);
      if (final || share <= 1) {
        if (!final && run.crowded(o.tol)) break;  // again, with a block that sees more copies
        return run.right();
      }
      // a check costs about as much as two steps, and a long extrapolation is not to be trusted
      const double here = std::log10(share);
      const double slope = (last_log - here) / (run.size() - last_size);
      const double ahead = slope > 0 ? here / slope : std::numeric_limits<double>::infinity();
      const double most = std::max(0.3 * run.size(), 2.0 * width);
      check = std::min(n, run.size() + int64_t(std::clamp(ahead, double(width), most)));
      last_size = run.size();
      last_log = here;
    }
  }
}

}  // namespace

at::Tensor leading_subspace(const at::Tensor& w, const KrylovOptions& options) {
  return w.scalar_type() == at::kDouble ? iterate<double>(w, options) : iterate<float>(w, options);
}

}  // namespace fastspec
