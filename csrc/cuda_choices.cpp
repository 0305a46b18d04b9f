#include "cuda_choices.h"

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <torch/version.h>

#include <cstdlib>
#include <mutex>
#include <string_view>
#include <unordered_map>

namespace fastspec::on_cuda {
namespace {

struct Hash {
  size_t operator()(const CallKey& key) const { return key.hash(); }
};

constexpr size_t kMost = 4096;  // keys; a training run of ever new lengths must not grow without end
std::unordered_map<CallKey, Served, Hash> table;
std::mutex table_lock;

// FASTSPEC_BACKEND as one number.
int64_t forced() {
  const char* const name = std::getenv("FASTSPEC_BACKEND");
  if (name == nullptr || *name == '\0') return 0;
  const std::string_view given(name);
  int64_t number = 1;
  for (const std::string_view one : {"triton", "tma", "merged", "aten"}) {
    if (given == one) return number;
    ++number;
  }
  return -1;  // Python refuses it
}

// Whether float32 products may use TF32; -1 where this torch has no safe way to ask.
int64_t tf32() {
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 11
  const auto& context = at::globalContext();
  return context.float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) == at::Float32Precision::TF32;
#else
  return -1;
#endif
}

}  // namespace

CallKey::CallKey(What what, const Plan& plan, bool first_need, bool second_need, const at::Tensor& a,
                 std::initializer_list<const at::Tensor*> operands) {
  const int64_t backend = forced();
  const int64_t precision = a.scalar_type() == at::kFloat ? tf32() : 0;
  const bool deterministic = at::globalContext().deterministicAlgorithms();
  valid_ = backend >= 0 && precision >= 0 && serves(plan);
  add(int64_t(first_need) | second_need << 1 | deterministic << 2 | precision << 3 | backend << 4 |
      plan.code() << 8 | what << 14 | int64_t(a.device().index() + 1) << 16);
  for (const at::Tensor* const t : operands) {
    if (t == nullptr) {
      add(-1);
      continue;
    }
    const bool fits = size_ + 1 + 2 * t->dim() <= values_.size();
    if (!fits || t->layout() != at::kStrided || t->numel() == 0 || t->device() != a.device()) {
      valid_ = false;
      return;
    }
    const bool aligned = reinterpret_cast<uintptr_t>(t->const_data_ptr()) % 16 == 0;
    add(int64_t(t->scalar_type()) | t->dim() << 8 | int64_t(aligned) << 16);
    for (const int64_t size : t->sizes()) add(size);
    for (const int64_t stride : t->strides()) add(stride);
  }
}

size_t CallKey::hash() const {
  uint64_t h = 1469598103934665603u;
  for (size_t i = 0; i < size_; ++i) {
    h = (h ^ static_cast<uint64_t>(values_[i])) * 1099511628211u;
    h ^= h >> 29;
  }
  return h;
}

std::optional<Served> known(const CallKey& key) {
  const std::lock_guard<std::mutex> guard(table_lock);
  const auto found = table.find(key);
  return found == table.end() ? std::nullopt : std::optional<Served>(found->second);
}

void remember(const CallKey& key, const std::vector<int64_t>& answer) {
  if (answer.empty()) return;
  TORCH_CHECK(answer.size() == 4, "a choice is four numbers, got ", answer.size());
  const std::lock_guard<std::mutex> guard(table_lock);
  if (table.size() >= kMost) table.clear();
  table.insert_or_assign(key, Served{Served::How(answer[0]), answer[1], answer[2], answer[3] != 0});
}

void forget_all() {
  const std::lock_guard<std::mutex> guard(table_lock);
  table.clear();
}

void start(int64_t record, at::IntArrayRef addresses) {
  static const auto op = operator_handle<void(int64_t, at::IntArrayRef)>("fastspec::launch");
  op.call(record, addresses);
}

}  // namespace fastspec::on_cuda
