// Products of a few rows with a matrix on the CPU, which a BLAS runs at a third of its speed.
//
// Beside the thin products of the layers: thin_kernels.h says why there are both.
//
// Row-major, the rows of each operand adjacent where nothing else is said. Sums run in an order that depends on
// the sizes alone.
#pragma once

#include <cstdint>

namespace fastspec {

// out [b, m] = x [b, n] a [n, m]
void rows_times(const float* x, int64_t b, const float* a, int64_t n, int64_t m, float* out);
void rows_times(const double* x, int64_t b, const double* a, int64_t n, int64_t m, double* out);

// out [b, m] += x [b, n] a [n, m]
void rows_add(const float* x, int64_t b, const float* a, int64_t n, int64_t m, float* out);
void rows_add(const double* x, int64_t b, const double* a, int64_t n, int64_t m, double* out);

// out [b, m] -= x [b, n] a [n, m]
void rows_subtract(const float* x, int64_t b, const float* a, int64_t n, int64_t m, float* out);
void rows_subtract(const double* x, int64_t b, const double* a, int64_t n, int64_t m, double* out);

// out [b, p] = x [b, n] q [p, n]^T, the rows of `out` ld apart
void rows_dot(const float* x, int64_t b, const float* q, int64_t p, int64_t n, float* out, int64_t ld);
void rows_dot(const double* x, int64_t b, const double* q, int64_t p, int64_t n, double* out, int64_t ld);

// Rows `begin` to `end` of out [n, n] = w^T w for w [m, n], on and above the diagonal and a little below; the rows
// of w lie `row` apart, its columns `column`, and `begin` is a multiple of kGramRows.
constexpr int64_t kGramRows = 4;
void gram_upper(const float* w, int64_t row, int64_t column, int64_t m, int64_t n, int64_t begin, int64_t end,
                float* out);
void gram_upper(const double* w, int64_t row, int64_t column, int64_t m, int64_t n, int64_t begin, int64_t end,
                double* out);

}  // namespace fastspec
