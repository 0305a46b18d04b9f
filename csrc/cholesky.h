// Normalising a block of a few vectors by the Cholesky factor of its Gram matrix, in float64.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace fastspec {

// Lower Cholesky factor of the b x b matrix `a`, in place. False where it is made of rounding errors.
inline bool cholesky(std::vector<double>& a, int64_t b, double smallest_pivot) {
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

// Inverse of the lower triangular b x b matrix `l`, into `out`.
template <typename T>
void invert_triangle(const std::vector<double>& l, int64_t b, T* out) {
  std::vector<double> x(b * b, 0);
  for (int64_t j = 0; j < b; ++j) {
    for (int64_t i = j; i < b; ++i) {
      double sum = i == j;
      for (int64_t m = j; m < i; ++m) sum -= l[i * b + m] * x[m * b + j];
      x[i * b + j] = sum / l[i * b + i];
    }
  }
  std::copy(x.begin(), x.end(), out);
}

// L^-1 with `gram` = L L^T, b x b, into `out`; false where a pivot of L is below `breakdown` of the longest row, or
// `negligible`: then it is made of rounding errors.
template <typename T>
bool inverse_factor(const T* gram, int64_t b, double breakdown, double negligible, T* out) {
  std::vector<double> factor(gram, gram + b * b);
  double high = 0;
  for (int64_t j = 0; j < b; ++j) high = std::max(high, factor[j * b + j]);
  if (!cholesky(factor, b, std::max(breakdown * std::sqrt(high), negligible))) return false;
  invert_triangle(factor, b, out);
  return true;
}

}  // namespace fastspec
