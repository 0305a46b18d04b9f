// Registration of the operators, and how a stack is divided among threads.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "built_for.h"
#include "dense.h"
#include "jacobi.h"
#include "krylov.h"
#include "stacks.h"
#include "triplets.h"

FASTSPEC_BUILT_FOR(PY_VERSION)

namespace fastspec {
namespace {

// Where a call that may take minutes asks whether it is to end: every step of every thread.
class Interrupt {
 public:
  struct Stopped {};  // thrown in the threads that end because of another one

  void operator()() {
    if (stopped_) throw Stopped{};
    poll();
  }

  // Raises what Python's signal handlers raise (Ctrl-C). The operators run without the interpreter's lock,
  // which is taken back for this ten times a second, by the thread that called the operator alone.
  void poll() {
    if (!calling()) return;
    const auto now = std::chrono::steady_clock::now();
    if (now < next_ || !Py_IsInitialized()) return;
    next_ = now + kInterval;
    const pybind11::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw pybind11::error_already_set();
  }

  void stop() { stopped_ = true; }
  bool calling() const { return std::this_thread::get_id() == caller_; }

  static constexpr auto kInterval = std::chrono::milliseconds(100);

 private:
  const std::thread::id caller_ = std::this_thread::get_id();
  std::chrono::steady_clock::time_point next_ = std::chrono::steady_clock::now();
  std::atomic<bool> stopped_{false};
};

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

// Calls `work(i)` for every matrix of a stack: a thread to each, because LAPACK's own threads fight each other
// over small matrices, but for the last few where they would leave most threads idle. A matrix alone runs
// about sqrt(threads) times as fast on all threads as on one, so that many at most take turns.
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

Triplets leading_triplets(const at::Tensor& w, const KrylovOptions& options,
                          const std::function<void()>& check_interrupt) {
  const auto type = w.scalar_type();
  const Method iterated = [&](const at::Tensor& x) {
    return rayleigh_ritz(x, leading_subspace(x, options, check_interrupt), type);
  };
  check_interrupt();
  const auto found = options.width ? iterated(w) : gram_triplets(w, options.k);
  if (options.width && options.max_steps) return found;
  const auto late = [&] { return (found.residual <= options.tol).logical_not(); };
  if (options.width && type != at::kDouble) {
    // s_1 / s_k is so large that rounding W^T W v to float32 costs more than tol
    redo(found, w, late(), iterated);
  }
  auto rest = late();
  if (type != at::kDouble) {  // else it is the rounding of the result
    rest = rest.logical_and(found.s.select(1, options.k - 1) <= found.s.select(1, 0) * kSmall);
  }
  redo(found, w, rest, [&](const at::Tensor& x) {
    check_interrupt();
    return exact_triplets(x, options.k, type);
  });
  return found;
}

void check_problem(const at::Tensor& w, const KrylovOptions& o) {
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
Result topk_svd_cpu(const at::Tensor& w,  // [L, m, n], m >= n
                    int64_t k, double tol, double floor, int64_t max_steps, int64_t seed, int64_t width,
                    int64_t gram_short, int64_t most) {
  const KrylovOptions options{k, tol, floor, max_steps, seed, width, gram_short, most};
  check_problem(w, options);
  const int64_t count = w.size(0);
  auto left = at::empty({count, w.size(1), k}, w.options()), s = at::empty({count, k}, w.options());
  auto right = at::empty({count, w.size(2), k}, w.options()), residual = at::empty({count}, w.options());
  Interrupt interrupt;
  for_each_matrix(count, interrupt, [&](int64_t i) {
    const auto found = named(i, [&] {
      return leading_triplets(w.narrow(0, i, 1), options, std::ref(interrupt));
    });
    left[i].copy_(found.left[0]);
    s[i].copy_(found.s[0]);
    right[i].copy_(found.right[0]);
    residual[i].copy_(found.residual[0]);
  });
  return {left, s, right, residual};
}

// Other devices take the whole stack in step; converged matrices leave it. On the CPU only the tests call it.
Result topk_svd_stack(const at::Tensor& w, int64_t k, double tol, double floor, int64_t max_steps,
                      int64_t seed, int64_t width, int64_t gram_short, int64_t most) {
  const KrylovOptions options{k, tol, floor, max_steps, seed, width, gram_short, most};
  check_problem(w, options);
  at::AutoDispatchBelowADInplaceOrView guard;
  Interrupt interrupt;
  const auto found = leading_triplets(w, options, std::ref(interrupt));
  return {found.left.contiguous(), found.s.contiguous(), found.right.contiguous(), found.residual};
}

// Shapes alone, for the compiler's traces.
Result topk_svd_meta(const at::Tensor& w, int64_t k, double, double, int64_t, int64_t, int64_t, int64_t,
                     int64_t) {
  check_stack(w, "w");
  const auto count = w.sym_size(0);
  return {w.new_empty_symint({count, w.sym_size(1), k}), w.new_empty_symint({count, k}),
          w.new_empty_symint({count, w.sym_size(2), k}), w.new_empty_symint({count})};
}

std::tuple<at::Tensor, at::Tensor> jacobi_eigh_meta(const at::Tensor& a) {
  check_stack(a, "a");
  const auto count = a.sym_size(0), n = a.sym_size(1);
  return {a.new_empty_symint({count, n}), a.new_empty_symint({count, n, n}).mT()};
}

template <typename T>
void jacobi_one(const at::Tensor& a, const at::Tensor& values, const at::Tensor& rows) {
  const int n = a.size(0), even = jacobi_even(n);
  const auto work = at::empty_like(a);
  std::vector<T> packed(even * (even + 1) / 2);
  std::vector<JacobiRotation<T>> rotations(even / 2);
  std::vector<int> place(n);
  int latest;
  jacobi_eigh<T>(a.const_data_ptr<T>(), n, {packed.data(), rotations.data(), place.data(), &latest},
                 work.mutable_data_ptr<T>(), values.mutable_data_ptr<T>(), rows.mutable_data_ptr<T>());
}

// Eigenvalues [L, n], ascending, and eigenvectors [L, n, n] in columns, of symmetric matrices of which the
// lower triangles are read. The code that runs on a GPU; on a CPU LAPACK is faster (bench/test_svd.py).
std::tuple<at::Tensor, at::Tensor> jacobi_eigh_cpu(const at::Tensor& matrices) {
  check_jacobi_stack(matrices);
  const auto a = matrices.contiguous();
  auto values = at::empty({a.size(0), a.size(1)}, a.options());
  auto rows = at::empty_like(a);
  Interrupt interrupt;
  for_each_matrix(a.size(0), interrupt, [&](int64_t i) {
    AT_DISPATCH_FLOATING_TYPES(a.scalar_type(), "jacobi_eigh",
                               [&] { jacobi_one<scalar_t>(a[i], values[i], rows[i]); });
  });
  return {values, rows.mT()};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> symmetric_eigh(const at::Tensor& a) {
  static const auto jacobi = c10::Dispatcher::singleton().findSchemaOrThrow("fastspec::jacobi_eigh", "");
  // cuSOLVER loops over a batch
  if (a.is_cuda() && a.size(1) <= kJacobiOrder && jacobi.hasKernelForDispatchKey(c10::DispatchKey::CUDA)) {
    return jacobi.typed<std::tuple<at::Tensor, at::Tensor>(const at::Tensor&)>().call(a);
  }
  return at::linalg_eigh(a);
}

TORCH_LIBRARY_FRAGMENT(fastspec, m) {
  const std::string arguments =
      "(Tensor w, int k, float tol, float floor, int max_steps, int seed, int width, int gram_short, int most)"
      " -> (Tensor left, Tensor s, Tensor right, Tensor residual)";
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(("topk_svd" + arguments).c_str(), tags);
  m.def(("topk_svd_in_step" + arguments).c_str(), tags);
  m.def("jacobi_eigh(Tensor a) -> (Tensor values, Tensor vectors)", tags);
}

TORCH_LIBRARY_IMPL(fastspec, Meta, m) {
  m.impl("topk_svd", topk_svd_meta);
  m.impl("topk_svd_in_step", topk_svd_meta);
  m.impl("jacobi_eigh", jacobi_eigh_meta);
}

TORCH_LIBRARY_IMPL(fastspec, CPU, m) {
  m.impl("topk_svd", topk_svd_cpu);
  m.impl("topk_svd_in_step", topk_svd_stack);
  m.impl("jacobi_eigh", jacobi_eigh_cpu);
}

TORCH_LIBRARY_IMPL(fastspec, CUDA, m) { m.impl("topk_svd", topk_svd_stack); }

}  // namespace fastspec
