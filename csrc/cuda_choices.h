// What serves a call on CUDA, remembered: Python chooses once for calls that are the same in all that a launch
// depends on, and is asked no more.
#pragma once
#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <vector>

#include "cuda_plans.h"

namespace fastspec::on_cuda {

// All that a choice and a launch depend on but the addresses: sizes, strides, dtypes, what lies on 16 bytes,
// what is wanted, and the settings that a choice obeys.
class CallKey {
 public:
  enum What : int64_t { Forward, Backward, Reduction };

  CallKey(What what, const Plan& plan, bool first_need, bool second_need, const at::Tensor& a,
          std::initializer_list<const at::Tensor*> operands);

  // Whether calls of this key may be remembered: contiguous bias, core and p, rows at all, a known setting.
  bool valid() const { return valid_; }
  bool operator==(const CallKey& other) const { return size_ == other.size_ && values_ == other.values_; }
  size_t hash() const;

 private:
  void add(int64_t value) { values_[size_++] = value; }

  std::array<int64_t, 64> values_{};
  size_t size_ = 0;
  bool valid_ = true;
};

// What serves: a plan of cuda_plans.h, or a kernel that Python starts.
struct Served {
  enum How : int64_t { Aten, Merged, Launch };
  How how;
  int64_t record = 0;   // of fastspec/kernels/records.py
  int64_t slots = 0;    // of the coefficient gradient's partial sums
  bool summed = false;  // by the kernel
};

std::optional<Served> known(const CallKey& key);

// Keeps what Python answered: empty where another call of the key could be served otherwise, else the fields of
// `Served`.
void remember(const CallKey& key, const std::vector<int64_t>& answer);

void forget_all();

inline int64_t address(const at::Tensor& t) { return reinterpret_cast<int64_t>(t.const_data_ptr()); }

// Repeats a launch on other addresses, in the order of fastspec/kernels/records.py.
void start(int64_t record, at::IntArrayRef addresses);

}  // namespace fastspec::on_cuda
