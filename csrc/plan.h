// A plan of fastspec/ops/plan.py as the compiled operators know it.
#pragma once
#include <array>
#include <string_view>

#include "layer.h"

namespace fastspec {

enum class Forward { Merged, Resident, Factored, Spectral };
enum class Gradient { None, TwoSided, Short, Dense };

constexpr std::array<std::string_view, 3> kCores = {"diag", "band", "dense"};
constexpr std::array<std::string_view, 4> kForwards = {"merged", "resident", "factored", "spectral"};
constexpr std::array<std::string_view, 4> kGradients = {"none", "two_sided", "short", "dense"};

struct Plan {
  Core core;
  Forward forward;
  Gradient gradient;

  Plan(std::string_view core_name, std::string_view forward_name, std::string_view gradient_name)
      : core(core_named(core_name)),
        forward(choice<Forward>(forward_name, "forward",
                                {{"merged", Forward::Merged},
                                 {"resident", Forward::Resident},
                                 {"factored", Forward::Factored},
                                 {"spectral", Forward::Spectral}})),
        gradient(choice<Gradient>(gradient_name, "gradient",
                                  {{"none", Gradient::None},
                                   {"two_sided", Gradient::TwoSided},
                                   {"short", Gradient::Short},
                                   {"dense", Gradient::Dense}})) {}

  explicit Plan(Core core) : core(core), forward(Forward::Merged), gradient(Gradient::None) {}

  // From and to one number.
  explicit Plan(int64_t code)
      : core(Core(code & 3)), forward(Forward(code >> 2 & 3)), gradient(Gradient(code >> 4 & 3)) {}
  int64_t code() const { return int64_t(core) | int64_t(forward) << 2 | int64_t(gradient) << 4; }

  std::string_view core_name() const { return kCores[int(core)]; }
  std::string_view forward_name() const { return kForwards[int(forward)]; }
  std::string_view gradient_name() const { return kGradients[int(gradient)]; }

  // Whether one product with W + U C Vh computes the layer.
  bool one_product() const { return forward == Forward::Merged || forward == Forward::Resident; }
  bool saves_p() const { return gradient == Gradient::TwoSided || gradient == Gradient::Short; }
};

}  // namespace fastspec
