#include "parallel.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <condition_variable>
#include <exception>
#include <mutex>

namespace fastspec {

void Interrupt::poll() {
  if (!calling()) return;
  const auto now = std::chrono::steady_clock::now();
  if (now < next_ || !Py_IsInitialized()) return;
  next_ = now + kInterval;
  const pybind11::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw pybind11::error_already_set();
}

namespace {

// Calls `work(i)` for the first `count` matrices on `threads` threads, BLAS single-threaded inside. A failure
// in one ends all of them.
void for_each_together(int64_t count, int64_t threads, Interrupt& interrupt,
                       const std::function<void(int64_t)>& work) {
  std::atomic<int64_t> next{0};
  int64_t working = threads;
  std::exception_ptr failure;
  std::mutex mutex;  // of the two
  std::condition_variable done;
  const auto attempt = [&](const std::function<void()>& body) {
    try {
      body();
    } catch (const Interrupt::Stopped&) {
    } catch (...) {
      interrupt.stop();
      const std::lock_guard<std::mutex> lock(mutex);
      if (!failure) failure = std::current_exception();
    }
  };
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    at::AutoDispatchBelowADInplaceOrView guard;
    for (int64_t thread = begin; thread < end; ++thread) {
      attempt([&] {
        for (int64_t i; (i = next++) < count;) {
          interrupt();
          work(i);
        }
      });
      const std::lock_guard<std::mutex> lock(mutex);
      --working;
      done.notify_all();
    }
    if (!interrupt.calling()) return;
    attempt([&] {  // nobody else hears of a signal
      std::unique_lock<std::mutex> lock(mutex);
      while (!done.wait_for(lock, Interrupt::kInterval, [&] { return working == 0; })) {
        lock.unlock();
        interrupt.poll();
        lock.lock();
      }
    });
  });
  if (failure) std::rethrow_exception(failure);
}

}  // namespace

// A thread to each matrix, because LAPACK's own threads fight each other over small matrices, but for the last
// few where they would leave most threads idle. A matrix alone runs about sqrt(threads) times as fast on all
// threads as on one, so that many at most take turns.
void for_each_matrix(int64_t count, Interrupt& interrupt, const std::function<void(int64_t)>& work) {
  const int64_t threads = at::get_num_threads(), rest = count % threads;
  const int64_t together = rest * rest <= threads ? count - rest : count;
  if (together) for_each_together(together, std::min(together, threads), interrupt, work);
  at::AutoDispatchBelowADInplaceOrView guard;
  for (int64_t i = together; i < count; ++i) {
    interrupt();
    work(i);
  }
}

}  // namespace fastspec
