// What the operators of one task and of many share on a CPU (design section 2).
#pragma once
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <string_view>
#include <utility>
#include <vector>

#include "thin_products.h"

namespace fastspec {

// A direction with |sigma_i| below this share of the largest leaves the short side (F3). fastspec/ops/aten.py
// holds it and sets it by fastspec::set_short_limits when csrc/ is loaded; until then none is taken.
inline double sigma_floor = std::numeric_limits<double>::infinity();

// A bias whose part in U is above this many times (y - b) U leaves the short side too; held and set likewise.
inline double bias_ceiling = 0;

// Below this many rows laying out the basis costs more than the thin products save.
constexpr int64_t kThinRows = 128;

enum class Core { Diag, Band, Dense };

template <class Enum>
Enum choice(std::string_view given, const char* name,
            std::initializer_list<std::pair<std::string_view, Enum>> all) {
  for (const auto& [text, value] : all)
    if (text == given) return value;
  TORCH_CHECK_VALUE(false, name, " is not known: ", given);
}

inline Core core_named(std::string_view name) {
  return choice<Core>(name, "core", {{"diag", Core::Diag}, {"band", Core::Band}, {"dense", Core::Dense}});
}

inline bool thin(int64_t k, std::initializer_list<at::Tensor> operands) {
  return k <= kThinRank && thin_supported() && std::all_of(operands.begin(), operands.end(), thin_operand);
}

// x B  [N, k], times diag(scale) less `shift` where they are given.
inline at::Tensor project(const at::Tensor& x, const at::Tensor& basis, const at::Tensor& scale = {},
                          const at::Tensor& shift = {}) {
  if (x.size(0) >= kThinRows && thin(basis.size(1), {x}) && basis.scalar_type() == at::kFloat)
    return thin_project(x, basis, scale, shift);
  at::Tensor p = at::mm(x, basis);
  if (scale.defined()) p.mul_(scale);
  return shift.defined() ? p.sub_(shift) : p;
}

constexpr int64_t kSampledRows = 128;

// Whether p [N, k], found from y - b, lacks digits because y's rounding is that of its bias [out], not of x W^T.
// That rounding reaches direction i of (y - b) U = p M^T, M = `sigma` [k] or [k, k], as the root of
// sum_j (b_j U_ji)^2. Means of |p|, for a few large rows would hide the others; rows at equal distances stand for all.
inline bool drowned(const at::Tensor& p, const at::Tensor& u, const at::Tensor& sigma, const at::Tensor& bias) {
  if (p.size(0) == 0) return false;
  const at::Tensor noise = at::mv(at::square(u).t(), at::square(bias)).sqrt_();
  const at::Tensor some = p.slice(0, 0, p.size(0), std::max<int64_t>(1, p.size(0) / kSampledRows));
  const at::Tensor size = at::linalg_vector_norm(some, 1, at::IntArrayRef{0}) / some.size(0);
  const at::Tensor along = at::mul(sigma, size).abs();
  const at::Tensor signal = sigma.dim() == 1 ? along : at::linalg_vector_norm(along, 2, at::IntArrayRef{1});
  return !(noise.sum().item<double>() <= bias_ceiling * signal.sum().item<double>());
}

// The dtype in which the arithmetic of a core is done: the widest, float32 at least.
inline at::ScalarType accumulation_dtype(const at::Tensor& a, const at::Tensor& b) {
  return at::promote_types(at::promote_types(a.scalar_type(), b.scalar_type()), at::kFloat);
}

// Calls f(h + o, rows of C on diagonal o, their columns, how many) for every diagonal of a band
// [..., 2 h + 1, k].
template <class F>
void each_diagonal(const at::Tensor& band, F f) {
  const int64_t h = band.size(-2) / 2, k = band.size(-1);
  for (int64_t o = std::max(-h, 1 - k); o <= std::min(h, k - 1); ++o) {
    const int64_t begin = std::max<int64_t>(0, -o), count = k - std::abs(o);
    f(h + o, begin, begin + o, count);
  }
}

// The sizes of `like` but for the last.
inline std::vector<int64_t> with_last(const at::Tensor& like, int64_t last) {
  auto sizes = like.sizes().vec();
  sizes.back() = last;
  return sizes;
}

template <class Function>
auto operator_handle(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Function>();
}

}  // namespace fastspec
