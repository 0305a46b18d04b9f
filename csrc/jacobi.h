// The eigenproblem of one small symmetric matrix by two-sided Jacobi rotations, for a CUDA thread block or
// a CPU thread: the same body compiles for both, so what a GPU runs is tested on the CPU.
//
// Each step rotates N/2 disjoint index pairs at once, in the order of a round-robin tournament (Brent and Luk,
// SIAM J. Sci. Stat. Comput. 6, 1985), so that every 2 x 2 block of the matrix is changed by one lane alone;
// angles as in Golub and Van Loan, Matrix Computations, section 8.5; rotations in Rutishauser's form, whose
// errors shrink with the angle (Handbook for Automatic Computation II, contribution 1): c and s themselves,
// rounded, would change the length of every row by the same factor in each of a thousand steps.
#pragma once

#include <cmath>
#include <limits>

#ifdef __CUDACC__
#define FASTSPEC_BODY __device__ inline
#define FASTSPEC_BARRIER() __syncthreads()
#define FASTSPEC_FOR_EACH(i, count) for (int i = threadIdx.x; i < (count); i += blockDim.x)
#define FASTSPEC_FOR_EACH_2D(i, j, rows, columns)                                              \
  for (int flat_ = threadIdx.x, i, j;                                                          \
       flat_ < (rows) * (columns) && (i = flat_ / (columns), j = flat_ - i * (columns), true); \
       flat_ += blockDim.x)
#else
#define FASTSPEC_BODY inline
#define FASTSPEC_BARRIER() ((void)0)
#define FASTSPEC_FOR_EACH(i, count) for (int i = 0; i < (count); ++i)
#define FASTSPEC_FOR_EACH_2D(i, j, rows, columns) \
  for (int i = 0; i < (rows); ++i)                \
    for (int j = 0; j < (columns); ++j)
#endif

namespace fastspec {

// Largest order: what a thread block holds of its rotations has this size on a GPU.
constexpr int kJacobiOrder = 256;
// Round-robin Jacobi ends after some ten sweeps at this order; the limit only bounds the loop.
constexpr int kJacobiSweeps = 40;

// Odd orders get one zero row, which no rotation ever touches.
constexpr int jacobi_even(int n) { return n + (n & 1); }

struct JacobiPair {
  int p, q;  // p < q
};

// Pair `i` of step `step`: the last player stays, the others move round the table.
FASTSPEC_BODY JacobiPair jacobi_pair(int step, int i, int even) {
  const int circle = even - 1;
  const int first = i == 0 ? circle : (step + i) % circle;
  const int second = (step + circle - i) % circle;
  return first < second ? JacobiPair{first, second} : JacobiPair{second, first};
}

// Where (i, j) of the packed upper triangle lies.
FASTSPEC_BODY int jacobi_at(int i, int j) { return i < j ? j * (j + 1) / 2 + i : i * (i + 1) / 2 + j; }

template <typename T>
struct JacobiRotation {
  T s, half;  // sine of the angle, tangent of its half

  // x <- c x - s y, y <- s x + c y
  FASTSPEC_BODY void rotate(T& x, T& y) const {
    const T old = x;
    x -= s * (y + half * x);
    y += s * (old - half * y);
  }
};

// What the lanes share, with N = jacobi_even(n).
template <typename T>
struct JacobiScratch {
  T* packed;                     // [N (N + 1) / 2]
  JacobiRotation<T>* rotations;  // [N / 2]
  int* place;                    // [n] of each value in ascending order
  int* latest;                   // [1] the last step, counted through all sweeps, in which anything was rotated
};

// Decides on rotation `i` of a step and applies it to its own 2 x 2 block.
template <typename T>
FASTSPEC_BODY void jacobi_decide(const JacobiScratch<T>& own, int i, JacobiPair pair, T negligible, int step) {
  T& app = own.packed[jacobi_at(pair.p, pair.p)];
  T& aqq = own.packed[jacobi_at(pair.q, pair.q)];
  T& apq = own.packed[jacobi_at(pair.p, pair.q)];
  own.rotations[i] = {T(0), T(0)};
  if (!(std::abs(apq) > negligible)) return;
  const T tau = (aqq - app) / (2 * apq);
  const T t = std::copysign(T(1), tau) / (std::abs(tau) + std::sqrt(1 + tau * tau));
  const T c = 1 / std::sqrt(1 + t * t), s = t * c;
  own.rotations[i] = {s, s / (1 + c)};
  app -= t * apq;
  aqq += t * apq;
  apq = 0;
  *own.latest = step;
}

template <typename T>
FASTSPEC_BODY T jacobi_larger(T a, T b) {  // NaN where one is
  return b > a || b != b ? b : a;
}

// Eigenvalues of `a [n, n]` (its lower triangle), ascending, into `values [n]` and the vectors into the rows of
// `rows [n, n]`; NaN where an entry is not finite or so large that a sum of n would not be. `work [n, n]` is
// scratch. All lanes of the thread block call it.
template <typename T>
FASTSPEC_BODY void jacobi_eigh(const T* a, int n, const JacobiScratch<T>& own, T* work, T* values, T* rows) {
  const int even = jacobi_even(n), pairs = even / 2, steps = even - 1;
  T* packed = own.packed;
  FASTSPEC_FOR_EACH_2D(i, j, even, even) {
    if (j <= i) packed[jacobi_at(i, j)] = i < n ? a[i * n + j] : T(0);
  }
  FASTSPEC_FOR_EACH_2D(i, j, n, n) { work[i * n + j] = T(i == j); }
  FASTSPEC_FOR_EACH(i, n) {
    T largest = 0;
    for (int j = 0; j <= i; ++j) largest = jacobi_larger(largest, std::abs(a[i * n + j]));
    values[i] = largest;
  }
  FASTSPEC_FOR_EACH(i, 1) { *own.latest = -1; }
  FASTSPEC_BARRIER();
  T largest = 0;
  for (int i = 0; i < n; ++i) largest = jacobi_larger(largest, values[i]);
  if (!(n * largest <= std::numeric_limits<T>::max())) {
    FASTSPEC_BARRIER();  // every lane has read the values
    FASTSPEC_FOR_EACH(i, n) { values[i] = std::numeric_limits<T>::quiet_NaN(); }
    FASTSPEC_FOR_EACH_2D(i, j, n, n) { rows[i * n + j] = std::numeric_limits<T>::quiet_NaN(); }
    return;
  }
  // n^2 entries below this leave less than one rounding of the largest
  const T negligible = std::numeric_limits<T>::epsilon() * largest / n;

  for (int sweep = 0; sweep < kJacobiSweeps; ++sweep) {
    for (int step = 0; step < steps; ++step) {
      const int stamp = sweep * steps + step;
      FASTSPEC_FOR_EACH(i, pairs) { jacobi_decide(own, i, jacobi_pair(step, i, even), negligible, stamp); }
      FASTSPEC_BARRIER();
      const bool rotated = *own.latest == stamp;
      if (rotated) {
        // blocks (g, g + distance), every unordered pair of pairs once
        FASTSPEC_FOR_EACH_2D(shift, g, pairs / 2, pairs) {
          const int distance = shift + 1, h = (g + distance) % pairs;
          if (2 * distance == pairs && g > h) continue;
          const JacobiRotation<T> left = own.rotations[g], right = own.rotations[h];
          if (left.s == 0 && right.s == 0) continue;
          const JacobiPair r = jacobi_pair(step, g, even), c = jacobi_pair(step, h, even);
          T &pp = packed[jacobi_at(r.p, c.p)], &pq = packed[jacobi_at(r.p, c.q)];
          T &qp = packed[jacobi_at(r.q, c.p)], &qq = packed[jacobi_at(r.q, c.q)];
          left.rotate(pp, qp);
          left.rotate(pq, qq);
          right.rotate(pp, pq);
          right.rotate(qp, qq);
        }
        FASTSPEC_FOR_EACH_2D(g, j, pairs, n) {
          const JacobiRotation<T> rotation = own.rotations[g];
          if (rotation.s == 0) continue;
          const JacobiPair r = jacobi_pair(step, g, even);
          rotation.rotate(work[r.p * n + j], work[r.q * n + j]);
        }
      }
      FASTSPEC_BARRIER();
    }
    if (*own.latest < sweep * steps) break;
  }

  FASTSPEC_FOR_EACH(i, n) {
    const T value = packed[jacobi_at(i, i)];
    int place = 0;
    for (int l = 0; l < n; ++l) {
      const T other = packed[jacobi_at(l, l)];
      place += other < value || (other == value && l < i);
    }
    own.place[i] = place;
    values[place] = value;
  }
  FASTSPEC_BARRIER();
  FASTSPEC_FOR_EACH_2D(i, j, n, n) { rows[own.place[i] * n + j] = work[i * n + j]; }
}

}  // namespace fastspec
