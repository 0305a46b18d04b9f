// csrc/jacobi.h on a block of several lanes, each a thread, against one lane, bit for bit; built with a
// sanitizer, which sees what a lane reads or writes without a barrier in between, or past an end.
#include <pthread.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "jacobi.h"

namespace {

using namespace fastspec;

struct Shared {
  explicit Shared(int lanes) : lanes(lanes) { pthread_barrier_init(&barrier, nullptr, lanes); }
  ~Shared() { pthread_barrier_destroy(&barrier); }
  const int lanes;
  pthread_barrier_t barrier;
  std::atomic<bool> answer{false};
};

struct Lane {
  Shared& shared;
  int own;
  int lane() const { return own; }
  int lanes() const { return shared.lanes; }
  void barrier() const { pthread_barrier_wait(&shared.barrier); }
  bool any(bool mine) const {
    if (mine) shared.answer = true;
    barrier();
    const bool answer = shared.answer;
    barrier();
    if (own == 0) shared.answer = false;
    barrier();
    return answer;
  }
};

template <typename T>
struct Problem {  // and its result, every array as long as it has to be
  Problem(const std::vector<T>& a, int n)
      : a(a),
        n(n),
        packed(jacobi_triangle(n)),
        values(n),
        rows(n * n),
        vectors(jacobi_padded(n) * jacobi_padded(n) / 4),
        turns(jacobi_padded(n) / 4),
        groups(jacobi_padded(n) / 4),
        place(n) {}

  template <typename Block>
  void solve(const Block& block) {
    const JacobiScratch<T> own{packed.data(), vectors.data(), turns.data(), groups.data(), place.data()};
    jacobi_eigh(block, a.data(), n, own, values.data(), rows.data());
  }

  bool operator==(const Problem& other) const {  // NaN equals NaN
    return std::memcmp(values.data(), other.values.data(), n * sizeof(T)) == 0 &&
           std::memcmp(rows.data(), other.rows.data(), n * n * sizeof(T)) == 0;
  }

  const std::vector<T>& a;
  int n;
  std::vector<T> packed, values, rows;
  std::vector<JacobiFour<T>> vectors;
  std::vector<JacobiTurn<T>> turns;
  std::vector<JacobiGroup> groups;
  std::vector<int> place;
};

template <typename T>
bool same(int n, int lanes, bool finite) {
  std::mt19937 generator(n);
  std::uniform_real_distribution<T> entry(-1, 1);
  std::vector<T> a(n * n);
  for (T& each : a) each = entry(generator);  // its lower triangle is read
  if (!finite) a[n * n - 1] = std::numeric_limits<T>::infinity();
  Problem<T> alone(a, n), together(a, n);
  alone.solve(JacobiOneLane{});
  Shared shared(lanes);
  std::vector<std::thread> threads;
  for (int i = 0; i < lanes; ++i) threads.emplace_back([&, i] { together.solve(Lane{shared, i}); });
  for (auto& thread : threads) thread.join();
  if (alone == together) return true;
  std::printf("order %d on %d lanes differs from one lane\n", n, lanes);
  return false;
}

}  // namespace

int main() {
  bool good = true;
  for (int lanes : {2, 3, 8}) {
    for (int n : {1, 2, 3, 4, 5, 7, 8, 12, 16, 22}) {
      for (bool finite : {true, false}) good = same<float>(n, lanes, finite) && good;
    }
    good = same<double>(9, lanes, true) && good;
  }
  return good ? 0 : 1;
}
