#include "krylov.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Dispatch.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cholesky.h"
#include "eigh.h"
#include "gram.h"
#include "row_products.h"
#include "triplets.h"

namespace fastspec {
namespace {

at::Tensor square(const at::Tensor& a, int64_t start, int64_t size) {
  return a.narrow(1, start, size).narrow(2, start, size);
}

// One run over a stack, all matrices in step: basis Q [A, p, n] of orthonormal rows, T = Q W^T W Q^T
// [A, p, p] and the next block [A, b, n].
class Iteration {
 public:
  Iteration(const at::Tensor& w, const SvdOptions& options, int64_t width)
      : options_(options),
        w_(w),
        short_(w.size(2)),
        width_(width),
        most_(std::min(std::max(options.most, options.k + 2 * width), short_)),
        eps_(w.scalar_type() == at::kDouble ? std::numeric_limits<double>::epsilon()
                                            : std::numeric_limits<float>::epsilon()),
        generator_(at::detail::createCPUGenerator(options.seed)) {
    if (short_ <= options.gram_short) gram_ = gram_matrix(w);
    const auto start = std::get<0>(at::linalg_qr(random(width).t())).t();
    next_ = start.expand({w.size(0), width, short_}).contiguous();
    scale_ = at::zeros({w.size(0)}, w.options());
  }

  int64_t size() const { return size_; }
  bool complete() const { return size_ == short_; }
  bool full() const { return size_ + next_.size(1) > most_; }

  // Takes the next block into the basis and makes the one after it.
  void step() {
    if (w_.is_cpu() && w_.size(0) == 1) {
      AT_DISPATCH_FLOATING_TYPES(w_.scalar_type(), "step", [&] { step_alone<scalar_t>(); });
      return;
    }
    const int64_t before = size_, b = next_.size(1), c = coupling_.defined() ? coupling_.size(1) : 0;
    append();
    const auto local = basis_.narrow(1, before - c, c + b), block = basis_.narrow(1, before, b);
    if (c) {
      t_.narrow(1, before - c, c).narrow(2, before, b).copy_(coupling_);
      t_.narrow(1, before, b).narrow(2, before - c, c).copy_(coupling_.mT());
    }
    auto rest = gram_.defined() ? at::bmm(block, gram_) : at::bmm(at::bmm(block, w_.mT()), w_);
    // T is block tridiagonal: what W^T W q has along older blocks is rounding, removed below
    const auto h = at::bmm(rest, local.mT());
    const auto diagonal = h.narrow(2, c, b);
    square(t_, before, b).copy_(diagonal);
    scale_ = at::maximum(scale_, diagonal.diagonal(0, 1, 2).amax(1));
    const int64_t room = std::min(b, short_ - size_);
    if (room == 0) return;
    rest.baddbmm_(h, local, 1, -1);
    orthonormalise(rest);
    if (room < b) {
      next_ = next_.narrow(1, 0, room).contiguous();
      coupling_ = coupling_.narrow(2, 0, room).contiguous();
    }
  }

  // Eigenpairs of T, descending, and the norms of W^T W v - value v of the first k.
  void ritz(int64_t k) {
    const auto found = symmetric_eigh(square(t_, 0, size_));
    values_ = std::get<0>(found).flip(1);
    vectors_ = std::get<1>(found).flip(2);
    errors_ = at::zeros({w_.size(0), k}, w_.options());
    if (!complete()) {
      const int64_t b = coupling_.size(1);
      const auto last = vectors_.narrow(1, size_ - b, b).narrow(2, 0, k);
      errors_ = at::linalg_vector_norm(at::bmm(coupling_.mT(), last), 2, at::IntArrayRef{1});
    }
    wanted_ = values_.narrow(1, 0, k);
  }

  // Largest error over the one allowed, of each matrix; at most 1 when converged. What rounding leaves in
  // T cannot be improved on, so it counts as converged here, and the measured residual decides.
  at::Tensor share_of_tolerance() const {
    const auto first = wanted_.narrow(1, 0, 1).clamp_min(std::numeric_limits<float>::min());
    const auto least = (wanted_.clamp_min(0) * first).sqrt() * options_.floor;
    const auto allowed = at::maximum(at::maximum(wanted_, least) * (options_.margin * options_.tol),
                                     first * (options_.stagnation * eps_));
    return (errors_ / allowed).amax(1).clamp_min(1e-30).to(at::kCPU, at::kDouble);
  }

  // Whether a value of multiplicity `width` is among the wanted: a start block of b vectors finds b at most of its
  // vectors, and there may be more.
  at::Tensor multiplicity_reaches_width() const {
    const int64_t k = wanted_.size(1);
    if (k < width_) return at::zeros({w_.size(0)}, at::kBool);
    const int64_t runs = k - width_ + 1;
    const auto spread = wanted_.narrow(1, 0, runs) - wanted_.narrow(1, width_ - 1, runs);
    return (spread <= wanted_.narrow(1, 0, 1) * (options_.coincidence * options_.tol)).any(1).cpu();
  }

  at::Tensor right() const {
    return at::bmm(basis_.narrow(1, 0, size_).mT(), vectors_.narrow(2, 0, wanted_.size(1)));
  }

  // Only the matrices `rows [A']` go on.
  void keep(const at::Tensor& rows) {
    for (auto* t : {&w_, &gram_, &basis_, &t_, &next_, &coupling_, &scale_, &values_, &vectors_}) {
      if (t->defined()) *t = t->index_select(0, rows);
    }
  }

  // The basis becomes the first `kept` Ritz vectors (thick restart: Wu and Simon, SIAM J. Matrix Anal. Appl.
  // 22, 2000). T becomes their values, bordered by what couples them to the next block.
  void restart(int64_t kept) {
    const int64_t b = coupling_.size(1);
    const auto best = vectors_.narrow(2, 0, kept);
    basis_.narrow(1, 0, kept).copy_(at::bmm(best.mT(), basis_.narrow(1, 0, size_)));
    coupling_ = at::bmm(best.narrow(1, size_ - b, b).mT(), coupling_);
    t_.zero_();
    square(t_, 0, kept).diagonal(0, 1, 2).copy_(values_.narrow(1, 0, kept));
    size_ = kept;
  }

 private:
  // The same for a matrix alone on the CPU, where calls of ATen would cost more than these products.
  template <typename T>
  void step_alone() {
    const int64_t n = short_, before = size_, b = next_.size(1);
    const int64_t c = coupling_.defined() ? coupling_.size(1) : 0;
    append();
    T* const t = t_.mutable_data_ptr<T>();
    const int64_t ld = t_.size(2);
    if (c) {
      const T* const coupling = coupling_.const_data_ptr<T>();
      for (int64_t i = 0; i < c; ++i) {
        for (int64_t j = 0; j < b; ++j) {
          const int64_t row = before - c + i, column = before + j;
          t[row * ld + column] = t[column * ld + row] = coupling[i * b + j];
        }
      }
    }
    const T* const basis = basis_.const_data_ptr<T>();
    const T* const block = basis + before * n;
    const T* const local = block - c * n;
    at::Tensor image;
    if (gram_.defined()) {
      image = at::empty_like(next_);
      // symmetric: read along its rows
      rows_dot(block, b, gram_.const_data_ptr<T>(), n, n, image.mutable_data_ptr<T>(), n);
    } else if (w_.is_contiguous()) {
      image = gram_times(basis_.narrow(1, before, b), w_);
    } else {
      image = at::bmm(at::bmm(basis_.narrow(1, before, b), w_.mT()), w_);
    }
    T* const rest = image.mutable_data_ptr<T>();
    std::vector<T> h(b * size_);
    rows_dot(rest, b, local, c + b, n, h.data(), c + b);
    T* const scale = scale_.mutable_data_ptr<T>();
    for (int64_t i = 0; i < b; ++i) {
      const T* const own = h.data() + i * (c + b) + c;
      std::copy(own, own + b, t + (before + i) * ld + before);
      *scale = std::max(*scale, own[i]);
    }
    const int64_t room = std::min(b, n - size_);
    if (room == 0) return;
    rows_subtract(h.data(), b, local, c + b, n, rest);

    next_ = image.clone();
    rows_dot(rest, b, basis, size_, n, h.data(), size_);
    rows_subtract(h.data(), b, basis, size_, n, next_.mutable_data_ptr<T>());
    const double negligible = options_.negligible * eps_ * *scale;
    if (!normalise_alone<T>(negligible) || !normalise_alone<T>(0)) {
      next_[0].copy_(repaired(image[0], basis_[0].narrow(0, 0, size_), negligible));
    }
    coupling_ = at::empty({1, b, room}, w_.options());
    next_ = next_.narrow(1, 0, room).contiguous();
    rows_dot(rest, b, next_.const_data_ptr<T>(), room, n, coupling_.mutable_data_ptr<T>(), room);
  }

  // One of the two normalisations; false where it breaks down.
  template <typename T>
  bool normalise_alone(double negligible) {
    const int64_t n = short_, b = next_.size(1);
    const T* const block = next_.const_data_ptr<T>();
    std::vector<T> gram(b * b), inverse(b * b);
    rows_dot(block, b, block, b, n, gram.data(), b);
    if (!inverse_factor(gram.data(), b, breakdown(), negligible, inverse.data())) return false;
    auto normal = at::empty_like(next_);
    rows_times(inverse.data(), b, block, b, n, normal.mutable_data_ptr<T>());
    next_ = normal;
    return true;
  }

  // Part of the longest row of a block below which what is left of another one is rounding.
  double breakdown() const { return options_.breakdown * std::sqrt(eps_); }

  void append() {
    const int64_t needed = size_ + next_.size(1);
    const int64_t capacity = basis_.defined() ? basis_.size(1) : 0;
    if (needed > capacity) {
      const int64_t grown = std::min(std::max(most_, needed), std::max({3 * capacity / 2, 30 * width_, needed}));
      auto basis = at::empty({w_.size(0), grown, short_}, w_.options());
      auto t = at::zeros({w_.size(0), grown, grown}, w_.options());
      if (size_) {
        basis.narrow(1, 0, size_).copy_(basis_.narrow(1, 0, size_));
        square(t, 0, size_).copy_(square(t_, 0, size_));
      }
      basis_ = basis;
      t_ = t;
    }
    basis_.narrow(1, size_, next_.size(1)).copy_(next_);
    size_ = needed;
  }

  // Sets next_ to an orthonormal block spanning `rest`, orthogonal to the basis too, and coupling_ to
  // rest next_^T. `rest` is free of the last two blocks already. Normalised twice by Cholesky; where
  // that breaks down the subspace is invariant, and random vectors take the empty places.
  void orthonormalise(const at::Tensor& rest) {
    const auto q = basis_.narrow(1, 0, size_);
    next_ = rest.clone();
    next_.baddbmm_(at::bmm(rest, q.mT()), q, 1, -1);
    std::vector<bool> broken(rest.size(0), false);
    const auto negligible = (scale_ * (options_.negligible * eps_)).to(at::kCPU, at::kDouble);
    normalise(negligible.const_data_ptr<double>(), broken);
    normalise(nullptr, broken);
    for (int64_t i = 0; i < rest.size(0); ++i) {
      if (broken[i]) next_[i].copy_(repaired(rest[i], q[i], negligible[i].item<double>()));
    }
    coupling_ = at::bmm(rest, next_.mT());
  }

  // next_ <- L^-1 next_ with next_ next_^T = L L^T; the b x b problems on the host, whatever the device.
  // Marks as broken the blocks whose L is made of rounding errors.
  void normalise(const double* negligible, std::vector<bool>& broken) {
    const auto gram = at::bmm(next_, next_.mT()).cpu();
    const auto inverse = at::zeros_like(gram);
    const int64_t b = gram.size(1);
    AT_DISPATCH_FLOATING_TYPES(gram.scalar_type(), "normalise", [&] {
      const auto* g = gram.const_data_ptr<scalar_t>();
      auto* out = inverse.mutable_data_ptr<scalar_t>();
      for (size_t i = 0; i < broken.size(); ++i, g += b * b, out += b * b) {
        if (!broken[i]) {
          broken[i] = !inverse_factor(g, b, breakdown(), negligible ? negligible[i] : 0.0, out);
        }
      }
    });
    next_ = at::bmm(inverse.to(next_.device()), next_);
  }

  at::Tensor repaired(const at::Tensor& rest, const at::Tensor& q, double negligible) {
    const auto svd = at::linalg_svd(rest, /*full_matrices=*/false);
    const auto kept = (std::get<1>(svd) > negligible).unsqueeze(1);
    auto fresh = random(rest.size(0));
    fresh.div_(at::linalg_vector_norm(fresh, 2, at::IntArrayRef{1}, /*keepdim=*/true));
    auto block = at::where(kept, std::get<2>(svd), fresh);
    for (int pass = 0; pass < 3; ++pass) {
      block = at::addmm(block, at::mm(block, q.t()), q, 1, -1);
      block = std::get<0>(at::linalg_qr(block.t())).t();
    }
    return block;
  }

  // drawn on the CPU, so that a device changes nothing
  at::Tensor random(int64_t rows) {
    return at::randn({rows, short_}, generator_, w_.options().device(at::kCPU)).to(w_.device());
  }

  const SvdOptions& options_;
  at::Tensor w_;                                   // [A, m, n]
  at::Tensor gram_;                                // [A, n, n], where forming it pays
  at::Tensor basis_;                               // [A, capacity, n], orthonormal rows
  at::Tensor t_;                                   // [A, capacity, capacity], basis W^T W basis^T
  at::Tensor next_;                                // [A, b, n]
  at::Tensor coupling_;                            // [A, c, b] between the last c rows of the basis and next_
  at::Tensor scale_;                               // [A] largest diagonal entry of T so far
  at::Tensor values_, vectors_, wanted_, errors_;  // [A, p], [A, p, p], [A, k], [A, k]
  int64_t short_, width_, most_, size_ = 0;
  double eps_;
  at::Generator generator_;
};

at::Tensor indices(const std::vector<int64_t>& rows, const at::Tensor& like) {
  return at::tensor(rows, at::kLong).to(like.device());
}

at::Tensor iterate(const at::Tensor& w, const SvdOptions& o, int64_t width,
                   const std::function<void()>& check_interrupt) {
  const int64_t n = w.size(2);
  auto right = at::empty({w.size(0), n, o.k}, w.options());
  std::vector<int64_t> active(w.size(0)), multiple;
  for (size_t i = 0; i < active.size(); ++i) active[i] = i;

  Iteration run(w, o, width);
  int64_t check = std::min(2 * o.k + 6 * width + o.first_check, n), made = 0;
  // basis vectors made, and log10 of the error over the one allowed; before the first check, a guess
  double last_made = o.k + width, last_log = -std::log10(o.tol);
  for (int64_t steps = 1; !active.empty(); ++steps) {
    check_interrupt();
    const int64_t before = run.size();
    run.step();
    made += run.size() - before;
    const bool stopped = (o.max_steps && steps >= o.max_steps) || made > o.restarted_lengths * n;
    const bool final = run.complete() || (stopped && run.size() >= o.k);
    const bool full = run.full() && !run.complete();
    if (made < check && !final && !full) continue;
    run.ritz(o.k);
    const auto share = run.share_of_tolerance();
    const auto reached = run.multiplicity_reaches_width();
    std::vector<int64_t> done, late;  // places among the active
    std::vector<double> ahead;
    for (size_t i = 0; i < active.size(); ++i) {
      const double s = share[i].item<double>();
      if (final || !(s > 1)) {
        done.push_back(i);
        if (!final && reached[i].item<bool>()) multiple.push_back(active[i]);
      } else {
        late.push_back(i);
        ahead.push_back(std::log10(s));
      }
    }
    if (!done.empty()) {
      const auto vectors = run.right();
      for (const int64_t i : done) right[active[i]].copy_(vectors[i]);
      if (late.empty()) break;
      run.keep(indices(late, w));
      std::vector<int64_t> left;
      for (const int64_t i : late) left.push_back(active[i]);
      active = left;
    }
    if (full) run.restart((o.k + run.size()) / 2);
    std::nth_element(ahead.begin(), ahead.begin() + ahead.size() / 2, ahead.end());
    const double here = ahead[ahead.size() / 2], slope = (last_log - here) / (made - last_made);
    const double wanted = slope > 0 ? here / slope : std::numeric_limits<double>::infinity();
    // a long extrapolation is not to be trusted
    const double longest = std::max(0.3 * made, 2.0 * width);
    check = std::min(o.restarted_lengths * n, made + int64_t(std::clamp(wanted, double(width), longest)));
    last_made = made;
    last_log = here;
  }
  if (!multiple.empty()) {  // again, with a block that finds more vectors of a value
    const auto rows = indices(multiple, w);
    const auto again = w.index_select(0, rows);
    const int64_t wider = std::min(2 * width, n);
    // where the Gram matrix is small, its eigenvectors cost less than a third run
    const bool direct = n <= o.gram_short && width > o.width;
    right.index_copy_(
        0, rows,
        direct ? gram_subspace(again, o.k).to(w.scalar_type()) : iterate(again, o, wider, check_interrupt));
  }
  return right;
}

}  // namespace

at::Tensor krylov_subspace(const at::Tensor& w, const SvdOptions& options,
                           const std::function<void()>& check_interrupt) {
  return iterate(w, options, std::min(options.width, w.size(2)), check_interrupt);
}

}  // namespace fastspec
