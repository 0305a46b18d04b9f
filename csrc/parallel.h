// How a stack is divided among threads, and how a call that may take minutes is interrupted.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <thread>

namespace fastspec {

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
  void poll();

  void stop() { stopped_ = true; }
  bool calling() const { return std::this_thread::get_id() == caller_; }

  // Between two looks at the signals: what a person takes for at once, and no cost to a step.
  static constexpr auto kInterval = std::chrono::milliseconds(100);

 private:
  const std::thread::id caller_ = std::this_thread::get_id();
  std::chrono::steady_clock::time_point next_ = std::chrono::steady_clock::now();
  std::atomic<bool> stopped_{false};
};

// Calls `work(i)` for every matrix of a stack of `count`, a thread to each where that keeps the threads busy.
// A failure in one ends all of them.
void for_each_matrix(int64_t count, Interrupt& interrupt, const std::function<void(int64_t)>& work);

}  // namespace fastspec
