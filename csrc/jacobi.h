// The eigenproblem of one small symmetric matrix by two-sided Jacobi rotations, for a CUDA thread block or
// a CPU thread: the same body compiles for both, so what a GPU runs is tested on the CPU.
//
// Each step rotates N/2 disjoint index pairs at once, in the order of a round-robin tournament (Brent and Luk,
// SIAM J. Sci. Stat. Comput. 6, 1985), so that every 2 x 2 block of the matrix is changed by one lane alone;
// angles as in Golub and Van Loan, Matrix Computations, section 8.5; rotations in Rutishauser's form, whose
// errors shrink with the angle (Handbook for Automatic Computation II, contribution 1): c and s themselves,
// rounded, would change the length of every row by the same factor in each of a thousand steps.
//
// A GPU is kept busy here by shared memory's bandwidth, at some 16 reads or writes of a number to 16
// multiplications: what surrounds them has to stay small. So the inner loops walk their grids by addition, the
// indices of a step are worked out once, and the vectors move four numbers at a time.
#pragma once

#include <cmath>
#include <limits>

#ifdef __CUDACC__
#define FASTSPEC_BODY __device__ inline
#else
#define FASTSPEC_BODY inline
#endif

namespace fastspec {

// Largest order: what a thread block holds of its rotations has this size on a GPU.
constexpr int kJacobiOrder = 256;
// Round-robin Jacobi ends after some ten sweeps at this order; the limit only bounds the loop.
constexpr int kJacobiSweeps = 40;

// Odd orders get one zero row, which no rotation ever touches.
constexpr int jacobi_even(int n) { return n + (n & 1); }

constexpr int jacobi_triangle(int n) { return jacobi_even(n) * (jacobi_even(n) + 1) / 2; }

// `JacobiFour`s that hold n numbers.
constexpr int jacobi_quads(int n) { return (n + 3) / 4; }

// How a thread block works together; a CPU thread is a block of one lane.
//   lane(), lanes()   this lane's number and how many there are
//   barrier()         until every lane is here
//   any(bool)         the same, and whether it was true in any lane
struct JacobiOneLane {
  FASTSPEC_BODY int lane() const { return 0; }
  FASTSPEC_BODY int lanes() const { return 1; }
  FASTSPEC_BODY void barrier() const {}
  FASTSPEC_BODY bool any(bool mine) const { return mine; }
};

// A lane's cells of a grid of rows of `columns` cells, counted along the rows: the only divisions are here.
struct JacobiCells {
  int row, column, columns, row_step, column_step;

  template <typename Block>
  FASTSPEC_BODY JacobiCells(const Block& block, int columns)
      : row(block.lane() / columns),
        column(block.lane() % columns),
        columns(columns),
        row_step(block.lanes() / columns),
        column_step(block.lanes() % columns) {}

  FASTSPEC_BODY void next() {
    row += row_step;
    column += column_step;
    if (column >= columns) column -= columns, ++row;
  }
};

struct alignas(8) JacobiPair {
  int p, q;  // p < q
};

// Pair `i` of step `step`: the last player stays, the others move round the table.
FASTSPEC_BODY JacobiPair jacobi_pair(int step, int i, int even) {
  const int circle = even - 1;
  int first = step + i, second = step - i;
  if (first >= circle) first -= circle;
  if (second < 0) second += circle;
  if (i == 0) first = circle;
  return first < second ? JacobiPair{first, second} : JacobiPair{second, first};
}

// Where (i, j) of the packed upper triangle lies.
FASTSPEC_BODY int jacobi_at(int i, int j) { return i < j ? j * (j + 1) / 2 + i : i * (i + 1) / 2 + j; }

template <typename T>
struct alignas(2 * sizeof(T)) JacobiRotation {
  T s, half;  // sine of the angle, tangent of its half

  // x <- c x - s y, y <- s x + c y
  FASTSPEC_BODY void rotate(T& x, T& y) const {
    const T old = x;
    x -= s * (y + half * x);
    y += s * (old - half * y);
  }
};

template <typename T>
struct alignas(16) JacobiFour {
  T at[4];
};

// What the lanes share, with N = jacobi_even(n).
template <typename T>
struct JacobiScratch {
  T* packed;                     // [N (N + 1) / 2]
  JacobiFour<T>* vectors;        // [n, jacobi_quads(n)], the rows
  JacobiRotation<T>* rotations;  // [N / 2] of a step
  JacobiPair* pairs;             // [N / 2] of a step
  int* place;                    // [n] of each value in ascending order
};

// Decides on the rotation of `pair` and applies it to the pair's own 2 x 2 block.
template <typename T>
FASTSPEC_BODY JacobiRotation<T> jacobi_decide(T* packed, JacobiPair pair, T negligible) {
  T &at_pp = packed[jacobi_at(pair.p, pair.p)], &at_qq = packed[jacobi_at(pair.q, pair.q)];
  T& at_pq = packed[jacobi_at(pair.p, pair.q)];
  const T app = at_pp, aqq = at_qq, apq = at_pq;
  if (!(std::abs(apq) > negligible)) return {T(0), T(0)};
  const T tau = (aqq - app) / (2 * apq);
  const T t = std::copysign(T(1), tau) / (std::abs(tau) + std::sqrt(1 + tau * tau));
  const T c = 1 / std::sqrt(1 + t * t), s = t * c;
  at_pp = app - t * apq;
  at_qq = aqq + t * apq;
  at_pq = 0;
  return {s, s / (1 + c)};
}

// Rotates the 2 x 2 block where the rows of pair `r` cross the columns of pair `c`.
template <typename T>
FASTSPEC_BODY void jacobi_rotate_block(T* packed, JacobiPair r, JacobiPair c, const JacobiRotation<T>& left,
                                       const JacobiRotation<T>& right) {
  T* const at[4] = {packed + jacobi_at(r.p, c.p), packed + jacobi_at(r.p, c.q), packed + jacobi_at(r.q, c.p),
                    packed + jacobi_at(r.q, c.q)};
  T pp = *at[0], pq = *at[1], qp = *at[2], qq = *at[3];
  left.rotate(pp, qp);
  left.rotate(pq, qq);
  right.rotate(pp, pq);
  right.rotate(qp, qq);
  *at[0] = pp, *at[1] = pq, *at[2] = qp, *at[3] = qq;
}

template <typename T>
FASTSPEC_BODY T jacobi_larger(T a, T b) {  // NaN where one is
  return b > a || b != b ? b : a;
}

// Eigenvalues of `a [n, n]` (its lower triangle), ascending, into `values [n]` and the vectors into the rows of
// `rows [n, n]`; NaN where an entry is not finite or so large that a sum of n would not be. All lanes of the
// block call it.
template <typename T, typename Block>
FASTSPEC_BODY void jacobi_eigh(const Block& block, const T* a, int n, const JacobiScratch<T>& own, T* values,
                               T* rows) {
  const int even = jacobi_even(n), pairs = even / 2, steps = even - 1, quads = jacobi_quads(n);
  const int lane = block.lane(), lanes = block.lanes();
  T* const packed = own.packed;
  for (JacobiCells at(block, even); at.row < even; at.next()) {
    if (at.column <= at.row) {
      packed[jacobi_at(at.row, at.column)] = at.row < n ? a[at.row * n + at.column] : T(0);
    }
  }
  for (JacobiCells at(block, quads); at.row < n; at.next()) {
    JacobiFour<T> unit;
    for (int k = 0; k < 4; ++k) unit.at[k] = T(at.row == 4 * at.column + k);
    own.vectors[at.row * quads + at.column] = unit;
  }
  for (int i = lane; i < n; i += lanes) {
    T largest = 0;
    for (int j = 0; j <= i; ++j) largest = jacobi_larger(largest, std::abs(a[i * n + j]));
    values[i] = largest;
  }
  block.barrier();
  T largest = 0;
  for (int i = 0; i < n; ++i) largest = jacobi_larger(largest, values[i]);
  if (!(n * largest <= std::numeric_limits<T>::max())) {
    block.barrier();  // every lane has read the values
    for (int i = lane; i < n; i += lanes) values[i] = std::numeric_limits<T>::quiet_NaN();
    for (int i = lane; i < n * n; i += lanes) rows[i] = std::numeric_limits<T>::quiet_NaN();
    return;
  }
  // n^2 entries below this leave less than one rounding of the largest
  const T negligible = std::numeric_limits<T>::epsilon() * largest / n;

  // Between two steps, and between what a step decides and what it applies, lies a barrier each; a step that
  // rotates nothing needs no second one, since no lane reads what the next step overwrites.
  const JacobiCells first_block(block, pairs), first_quad(block, quads);
  int step = 0;
  for (int done = 0, still = 0; done < kJacobiSweeps * steps && still < steps; ++done) {
    bool rotates = false;
    for (int i = lane; i < pairs; i += lanes) {
      const JacobiPair pair = jacobi_pair(step, i, even);
      const JacobiRotation<T> rotation = jacobi_decide(packed, pair, negligible);
      own.pairs[i] = pair;
      own.rotations[i] = rotation;
      rotates |= rotation.s != 0;
    }
    step = step + 1 == steps ? 0 : step + 1;
    ++still;
    if (!block.any(rotates)) continue;
    still = 0;
    // blocks (g, g + distance), every unordered pair of pairs once
    for (JacobiCells at = first_block; at.row < pairs / 2; at.next()) {
      const int g = at.column, distance = at.row + 1,
                h = g + distance < pairs ? g + distance : g + distance - pairs;
      if (2 * distance == pairs && g > h) continue;
      const JacobiRotation<T> left = own.rotations[g], right = own.rotations[h];
      if (left.s == 0 && right.s == 0) continue;
      jacobi_rotate_block(packed, own.pairs[g], own.pairs[h], left, right);
    }
    for (JacobiCells at = first_quad; at.row < pairs; at.next()) {
      const JacobiRotation<T> rotation = own.rotations[at.row];
      if (rotation.s == 0) continue;
      const JacobiPair pair = own.pairs[at.row];
      JacobiFour<T>&p = own.vectors[pair.p * quads + at.column], &q = own.vectors[pair.q * quads + at.column];
      JacobiFour<T> x = p, y = q;
      for (int k = 0; k < 4; ++k) rotation.rotate(x.at[k], y.at[k]);
      p = x;
      q = y;
    }
    block.barrier();
  }

  for (int i = lane; i < n; i += lanes) {
    const T value = packed[jacobi_at(i, i)];
    int place = 0;
    for (int l = 0; l < n; ++l) {
      const T other = packed[jacobi_at(l, l)];
      place += other < value || (other == value && l < i);
    }
    own.place[i] = place;
    values[place] = value;
  }
  block.barrier();
  for (JacobiCells at(block, n); at.row < n; at.next()) {
    rows[own.place[at.row] * n + at.column] = own.vectors[at.row * quads + at.column / 4].at[at.column % 4];
  }
}

}  // namespace fastspec
