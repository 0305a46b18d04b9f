// The eigenproblem of one small symmetric matrix by two-sided Jacobi rotations, for a CUDA thread block or
// a CPU thread: the same body compiles for both, so what a GPU runs is tested on the CPU.
//
// Indices are taken two by two. A step brings each of the N/2 twos together with another, in the order of a
// round-robin tournament (Brent and Luk, SIAM J. Sci. Stat. Comput. 6, 1985), and rotates the four index pairs
// across, disjoint ones at once, so that every 4 x 4 block of the matrix is changed by one lane alone; the first
// step of a sweep rotates the pairs inside the twos too. Angles as in Golub and Van Loan, Matrix Computations,
// section 8.5; rotations in Rutishauser's form, whose errors shrink with the angle (Handbook for Automatic
// Computation II, contribution 1): c and s themselves, rounded, would change the length of every row by the same
// factor in each of a thousand steps.
//
// What a GPU is short of here are instructions and the bandwidth of shared memory: a 4 x 4 block is read and
// written once for eight rotations, the inner loops walk their grids without dividing, the indices of a step are
// worked out once, and the vectors move four numbers at a time.
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

// Orders are filled up with zero rows, which no rotation ever touches.
constexpr int jacobi_padded(int n) { return (n + 3) / 4 * 4; }

constexpr int jacobi_triangle(int n) { return jacobi_padded(n) * (jacobi_padded(n) + 1) / 2; }

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

// Four indices: p, p + 1, q and q + 1.
struct alignas(16) JacobiGroup {
  int p, q;      // p < q
  bool rotates;  // whether any of its rotations in this step is one
};

// Group `i` of step `step`: the last two stays, the others move round the table.
FASTSPEC_BODY JacobiGroup jacobi_group(int step, int i, int twos) {
  const int circle = twos - 1;
  int first = step + i, second = step - i;
  if (first >= circle) first -= circle;
  if (second < 0) second += circle;
  if (i == 0) first = circle;
  return first < second ? JacobiGroup{2 * first, 2 * second, false} : JacobiGroup{2 * second, 2 * first, false};
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
struct alignas(4 * sizeof(T)) JacobiRound {  // two disjoint pairs
  JacobiRotation<T> one, other;
};

template <typename T>
struct JacobiTurn {         // of a group in a step
  JacobiRound<T> straight;  // (p, q) and (p + 1, q + 1)
  JacobiRound<T> crossed;   // (p, q + 1) and (p + 1, q)
  JacobiRound<T> inside;    // (p, p + 1) and (q, q + 1), in a sweep's first step
};

template <typename T>
struct alignas(16) JacobiFour {
  T at[4];
};

// What the lanes share, with N = jacobi_padded(n).
template <typename T>
struct JacobiScratch {
  T* packed;               // [N (N + 1) / 2]
  JacobiFour<T>* vectors;  // [N, N / 4], the rows
  JacobiTurn<T>* turns;    // [N / 4] of a step
  JacobiGroup* groups;     // [N / 4] of a step
  int* place;              // [n] of each value in ascending order
};

// The rotation that makes apq zero, applied to its own 2 x 2 block; none where apq is negligible, or would be lost
// in rounding were it added to app or to aqq: among equal values such entries are rotated on and on.
template <typename T>
FASTSPEC_BODY JacobiRotation<T> jacobi_annihilate(T& app, T& apq, T& aqq, T negligible) {
  const T lost = std::numeric_limits<T>::epsilon() / 4 * std::fmin(std::abs(app), std::abs(aqq));
  if (!(std::abs(apq) > std::fmax(negligible, lost))) return {T(0), T(0)};
  const T tau = (aqq - app) / (2 * apq);
  const T t = std::copysign(T(1), tau) / (std::abs(tau) + std::sqrt(1 + tau * tau));
  // the sine from what rounding left of the half: the pair comes closer to a rotation
  const T half = t / (1 + std::sqrt(1 + t * t)), s = 2 * half / (1 + half * half);
  app -= t * apq;
  aqq += t * apq;
  apq = 0;
  return {s, half};
}

// Annihilates (i, j) and (k, l) of the upper triangle `m` of a symmetric 4 x 4 block.
template <int i, int j, int k, int l, typename T>
FASTSPEC_BODY JacobiRound<T> jacobi_round(T (&m)[4][4], T negligible) {
  const JacobiRotation<T> one = jacobi_annihilate(m[i][i], m[i][j], m[j][j], negligible);
  const JacobiRotation<T> other = jacobi_annihilate(m[k][k], m[k][l], m[l][l], negligible);
  T &ik = i < k ? m[i][k] : m[k][i], &il = i < l ? m[i][l] : m[l][i];
  T &jk = j < k ? m[j][k] : m[k][j], &jl = j < l ? m[j][l] : m[l][j];
  one.rotate(ik, jk);
  one.rotate(il, jl);
  other.rotate(ik, il);
  other.rotate(jk, jl);
  return {one, other};
}

// Decides on a group's rotations and applies them to the group's own 4 x 4 block; whether there are any.
template <typename T>
FASTSPEC_BODY bool jacobi_decide(T* packed, const JacobiGroup& group, bool inside, T negligible,
                                 JacobiTurn<T>& turn) {
  const int index[4] = {group.p, group.p + 1, group.q, group.q + 1};
  T m[4][4];
  for (int i = 0; i < 4; ++i) {
    for (int j = i; j < 4; ++j) m[i][j] = packed[jacobi_at(index[i], index[j])];
  }
  const JacobiRound<T> straight = jacobi_round<0, 2, 1, 3>(m, negligible);
  const JacobiRound<T> crossed = jacobi_round<0, 3, 1, 2>(m, negligible);
  bool rotates = straight.one.s != 0 || straight.other.s != 0 || crossed.one.s != 0 || crossed.other.s != 0;
  if (inside) {
    const JacobiRound<T> last = jacobi_round<0, 1, 2, 3>(m, negligible);
    rotates = rotates || last.one.s != 0 || last.other.s != 0;
    turn.inside = last;
  }
  if (!rotates) return false;
  turn.straight = straight;
  turn.crossed = crossed;
  for (int i = 0; i < 4; ++i) {
    for (int j = i; j < 4; ++j) packed[jacobi_at(index[i], index[j])] = m[i][j];
  }
  return true;
}

// Rotates the rows of x, or its columns.
template <bool rows, typename T>
FASTSPEC_BODY void jacobi_turn(const JacobiTurn<T>& turn, bool inside, JacobiFour<T> (&x)[4]) {
  const JacobiRound<T> straight = turn.straight, crossed = turn.crossed;
  for (int k = 0; k < 4; ++k) {
    T &a = rows ? x[0].at[k] : x[k].at[0], &b = rows ? x[1].at[k] : x[k].at[1];
    T &c = rows ? x[2].at[k] : x[k].at[2], &d = rows ? x[3].at[k] : x[k].at[3];
    straight.one.rotate(a, c);
    straight.other.rotate(b, d);
    crossed.one.rotate(a, d);
    crossed.other.rotate(b, c);
  }
  if (!inside) return;
  const JacobiRound<T> last = turn.inside;
  for (int k = 0; k < 4; ++k) {
    T &a = rows ? x[0].at[k] : x[k].at[0], &b = rows ? x[1].at[k] : x[k].at[1];
    T &c = rows ? x[2].at[k] : x[k].at[2], &d = rows ? x[3].at[k] : x[k].at[3];
    last.one.rotate(a, b);
    last.other.rotate(c, d);
  }
}

// The 4 x 4 block where the rows of one group cross the columns of another, in the packed triangle: of each
// 2 x 2 block of it where the first number is, and how far the next row and the next column are.
struct JacobiTile {
  int first[2][2], row[2][2], column[2][2];

  FASTSPEC_BODY JacobiTile(const JacobiGroup& rows, const JacobiGroup& columns) {
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < 2; ++j) {
        const int r = i ? rows.q : rows.p, c = j ? columns.q : columns.p;
        first[i][j] = jacobi_at(r, c);
        row[i][j] = r < c ? 1 : r + 1;
        column[i][j] = r < c ? c + 1 : 1;
      }
    }
  }

  FASTSPEC_BODY int at(int i, int j) const {
    const int down = i / 2, across = j / 2;
    return first[down][across] + (i % 2 ? row[down][across] : 0) + (j % 2 ? column[down][across] : 0);
  }
};

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
  const int padded = jacobi_padded(n), groups = padded / 4, steps = padded / 2 - 1;
  const int lane = block.lane(), lanes = block.lanes();
  T* const packed = own.packed;
  for (JacobiCells at(block, padded); at.row < padded; at.next()) {
    if (at.column <= at.row) {
      packed[jacobi_at(at.row, at.column)] = at.row < n ? a[at.row * n + at.column] : T(0);
    }
  }
  for (JacobiCells at(block, groups); at.row < padded; at.next()) {
    JacobiFour<T> unit;
    for (int k = 0; k < 4; ++k) unit.at[k] = T(at.row == 4 * at.column + k);
    own.vectors[at.row * groups + at.column] = unit;
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
  const JacobiCells first(block, groups);
  int step = 0;
  for (int done = 0, still = 0; done < kJacobiSweeps * steps && still < steps; ++done) {
    const bool inside = step == 0;
    bool rotates = false;
    for (int i = lane; i < groups; i += lanes) {
      JacobiGroup group = jacobi_group(step, i, 2 * groups);
      group.rotates = jacobi_decide(packed, group, inside, negligible, own.turns[i]);
      own.groups[i] = group;
      rotates |= group.rotates;
    }
    step = step + 1 == steps ? 0 : step + 1;
    ++still;
    if (!block.any(rotates)) continue;
    still = 0;
    // groups (g, g + distance), every unordered pair of groups once
    for (JacobiCells at = first; at.row < groups / 2; at.next()) {
      const int g = at.column, distance = at.row + 1;
      const int h = g + distance < groups ? g + distance : g + distance - groups;
      if (2 * distance == groups && g > h) continue;
      const JacobiGroup left = own.groups[g], right = own.groups[h];
      if (!left.rotates && !right.rotates) continue;
      const JacobiTile tile(left, right);
      JacobiFour<T> x[4];
      for (int i = 0; i < 4; ++i) {
        for (int j = 0; j < 4; ++j) x[i].at[j] = packed[tile.at(i, j)];
      }
      if (left.rotates) jacobi_turn<true>(own.turns[g], inside, x);
      if (right.rotates) jacobi_turn<false>(own.turns[h], inside, x);
      for (int i = 0; i < 4; ++i) {
        for (int j = 0; j < 4; ++j) packed[tile.at(i, j)] = x[i].at[j];
      }
    }
    for (JacobiCells at = first; at.row < groups; at.next()) {
      const JacobiGroup group = own.groups[at.row];
      if (!group.rotates) continue;
      JacobiFour<T>* const p = own.vectors + group.p * groups + at.column;
      JacobiFour<T>* const q = own.vectors + group.q * groups + at.column;
      JacobiFour<T> x[4] = {p[0], p[groups], q[0], q[groups]};
      jacobi_turn<true>(own.turns[at.row], inside, x);
      p[0] = x[0], p[groups] = x[1], q[0] = x[2], q[groups] = x[3];
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
    rows[own.place[at.row] * n + at.column] = own.vectors[at.row * groups + at.column / 4].at[at.column % 4];
  }
}

}  // namespace fastspec
