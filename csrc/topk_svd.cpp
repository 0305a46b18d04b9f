// The operator fastspec::topk_svd: which method finds the triplets of a matrix (as in fastspec/svd/topk.py, which
// serves where this is not built), and its registration.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <functional>
#include <string>
#include <tuple>

#include "built_for.h"
#include "checks.h"
#include "krylov.h"
#include "parallel.h"
#include "svd_options.h"
#include "triplets.h"

FASTSPEC_BUILT_FOR("any")

namespace fastspec {
namespace {

using Method = std::function<Triplets(const at::Tensor& w)>;

// Replaces the triplets of the matrices under the mask `late [A]` by those that `method` finds in float64.
void redo(const Triplets& found, const at::Tensor& w, const at::Tensor& late, const Method& method) {
  const auto rows = at::nonzero(late).select(1, 0);
  if (rows.numel() == 0) return;
  const auto better = method(w.index_select(0, rows).to(at::kDouble));
  found.left.index_copy_(0, rows, better.left);
  found.s.index_copy_(0, rows, better.s);
  found.right.index_copy_(0, rows, better.right);
  found.residual.index_copy_(0, rows, better.residual);
}

Triplets leading_triplets(const at::Tensor& w, const SvdOptions& options,
                          const std::function<void()>& check_interrupt) {
  const auto type = w.scalar_type();
  const Method iterated = [&](const at::Tensor& x) {
    return rayleigh_ritz(x, krylov_subspace(x, options, check_interrupt), options, type);
  };
  check_interrupt();
  const auto found = options.width ? iterated(w) : gram_triplets(w, options);
  if (options.width && options.max_steps) return found;
  const auto late = [&] { return (found.residual <= options.tol).logical_not(); };
  if (options.width && type != at::kDouble) {
    // s_1 / s_k is so large that rounding W^T W v to float32 costs more than tol
    redo(found, w, late(), iterated);
  }
  auto rest = late();
  if (type != at::kDouble) {  // else it is the rounding of the result
    rest = rest.logical_and(found.s.select(1, options.k - 1) <= found.s.select(1, 0) * options.small);
  }
  redo(found, w, rest, [&](const at::Tensor& x) {
    check_interrupt();
    return exact_triplets(x, options, type);
  });
  return found;
}

void check_problem(const at::Tensor& w, const SvdOptions& o) {
  check_stack(w, "w");
  TORCH_CHECK_VALUE(w.size(1) >= w.size(2), "w must have its short side last, got ", w.sizes());
  TORCH_CHECK_VALUE(1 <= o.k && o.k <= w.size(2), "k must lie between 1 and ", w.size(2), ", got ", o.k);
  TORCH_CHECK_VALUE(o.width >= 0, "width must be 0 or more, got ", o.width);
}

using Result = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// What `work` returns; a failure of LAPACK in it says which matrix of the stack it was.
Triplets named(int64_t i, const std::function<Triplets()>& work) {
  try {
    return work();
  } catch (const c10::LinAlgError& error) {
    TORCH_CHECK_LINALG(false, "matrix ", i, " of the stack: ", error.what_without_backtrace());
  }
}

// A CPU takes the matrices one by one, each on its own thread.
Result each_alone(const at::Tensor& w, const SvdOptions& options) {  // [L, m, n], m >= n
  check_problem(w, options);
  const int64_t count = w.size(0), k = options.k;
  auto left = at::empty({count, w.size(1), k}, w.options()), s = at::empty({count, k}, w.options());
  auto right = at::empty({count, w.size(2), k}, w.options()), residual = at::empty({count}, w.options());
  Interrupt interrupt;
  for_each_matrix(count, interrupt, [&](int64_t i) {
    const auto found = named(i, [&] { return leading_triplets(w.narrow(0, i, 1), options, std::ref(interrupt)); });
    left[i].copy_(found.left[0]);
    s[i].copy_(found.s[0]);
    right[i].copy_(found.right[0]);
    residual[i].copy_(found.residual[0]);
  });
  return {left, s, right, residual};
}

// Other devices take the whole stack in step; converged matrices leave it. On the CPU only the tests call it.
Result in_step(const at::Tensor& w, const SvdOptions& options) {
  check_problem(w, options);
  at::AutoDispatchBelowADInplaceOrView guard;
  Interrupt interrupt;
  const auto found = leading_triplets(w, options, std::ref(interrupt));
  return {found.left.contiguous(), found.s.contiguous(), found.right.contiguous(), found.residual};
}

// Shapes alone, for the compiler's traces.
Result shapes(const at::Tensor& w, const SvdOptions& options) {
  check_stack(w, "w");
  const auto count = w.sym_size(0);
  const int64_t k = options.k;
  return {w.new_empty_symint({count, w.sym_size(1), k}), w.new_empty_symint({count, k}),
          w.new_empty_symint({count, w.sym_size(2), k}), w.new_empty_symint({count})};
}

// One parameter for every argument of the schema below.
template <Result (*run)(const at::Tensor& w, const SvdOptions& options)>
Result with_options(const at::Tensor& w, int64_t k, double tol, double floor, int64_t max_steps, int64_t seed,
                    int64_t width, int64_t gram_short, int64_t most, int64_t first_check, int64_t restarted_lengths,
                    double margin, double coincidence, double small, double wide_ratio, double stagnation,
                    double negligible, double breakdown) {
  return run(w, {.k = k,
                 .tol = tol,
                 .floor = floor,
                 .max_steps = max_steps,
                 .seed = seed,
                 .width = width,
                 .gram_short = gram_short,
                 .most = most,
                 .first_check = first_check,
                 .restarted_lengths = restarted_lengths,
                 .margin = margin,
                 .coincidence = coincidence,
                 .small = small,
                 .wide_ratio = wide_ratio,
                 .stagnation = stagnation,
                 .negligible = negligible,
                 .breakdown = breakdown});
}

}  // namespace
}  // namespace fastspec

TORCH_LIBRARY_FRAGMENT(fastspec, m) {
  // by name and without a default: a caller who lacks one, or has one too many, hears of it
  const std::string arguments =
      "(Tensor w, *, int k, float tol, float floor, int max_steps, int seed, int width, int gram_short, int most,"
      " int first_check, int restarted_lengths, float margin, float coincidence, float small, float wide_ratio,"
      " float stagnation, float negligible, float breakdown)"
      " -> (Tensor left, Tensor s, Tensor right, Tensor residual)";
  for (const auto* const name : {"topk_svd", "topk_svd_in_step"})
    m.def((name + arguments).c_str(), {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(fastspec, Meta, m) {
  m.impl("topk_svd", &fastspec::with_options<fastspec::shapes>);
  m.impl("topk_svd_in_step", &fastspec::with_options<fastspec::shapes>);
}

TORCH_LIBRARY_IMPL(fastspec, CPU, m) {
  m.impl("topk_svd", &fastspec::with_options<fastspec::each_alone>);
  m.impl("topk_svd_in_step", &fastspec::with_options<fastspec::in_step>);
}

TORCH_LIBRARY_IMPL(fastspec, CUDA, m) { m.impl("topk_svd", &fastspec::with_options<fastspec::in_step>); }
