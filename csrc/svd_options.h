// All that the two implementations of topk_svd read beside the matrices.
#pragma once

#include <cstdint>

namespace fastspec {

// Explained, field by field, in fastspec/svd/options.py, from which every value comes with the call: nothing
// here has a default, so the two implementations can't come to differ in one.
struct SvdOptions {
  int64_t k;
  double tol, floor;
  int64_t max_steps, seed, width, gram_short, most, first_check, restarted_lengths;
  double margin, coincidence;     // in parts of tol, in tolerances
  double small, wide_ratio;       // parts of s_1, s_1 / s_k
  double stagnation, negligible;  // in roundings of s_1^2
  double breakdown;               // in square roots of a rounding
};

}  // namespace fastspec
