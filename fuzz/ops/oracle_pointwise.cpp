// Ops on each number, or each row, apart; and which oracle an op has.
#include <cstdio>

#include "oracles.h"

namespace fuzz {
namespace {

std::string judge_gelu(const Question& q, const std::vector<Array>& outputs) {
  for (size_t i = 0; i < outputs[0].floats.size(); ++i) {
    const double x = q.input(0).floats[i], up = q.input(1).floats[i];
    const double u = 1.5957691216057308 * (x + 0.044715 * x * x * x);
    const double gelu = x / (1 + std::exp(-u)), y = gelu * up;
    const double room = std::fabs(y) * 3e-5 + std::fabs(up) * (1 + std::fabs(x)) * 0x1p-120 + 1e-44;
    const bool unsure = !std::isfinite(up) && std::fabs(gelu) < 1e-30;
    const float found = outputs[0].floats[i];
    if (!is_near(found, y, std::isfinite(room) ? room : 0, unsure))
      return wrong_at("y", i, found, y, room);
  }
  return "";
}

std::string judge_cap(const Question& q, const std::vector<Array>& outputs) {
  const double cap = q.real("cap", 1);
  for (size_t i = 0; i < outputs[0].floats.size(); ++i) {
    const double y = cap * std::tanh(q.input(0).floats[i] / cap);
    const double room = std::fabs(y) * 2e-6 + std::fabs(cap) * 0x1p-145 + 1e-44;
    if (!is_near(outputs[0].floats[i], y, std::isfinite(room) ? room : 0))
      return wrong_at("y", i, outputs[0].floats[i], y, room);
  }
  return "";
}

// A row of RmsNorm: x and y are `width` numbers.
std::string judge_norm_row(const float* x, const float* weight, int64_t width, float eps,
                           const float* y) {
  constexpr double kMost = 3.4028234663852886e38;
  double total = 0;
  for (int64_t i = 0; i < width; ++i) total += static_cast<double>(x[i]) * x[i];
  if (total > 3e38 && total < 3.8e38) return "";  // as a float it may be infinite, or not
  if (total > kMost) total = INFINITY;
  const double mean = total / static_cast<double>(width) + eps;
  // Squares that vanish, or a difference of nearly nothing.
  if (std::fabs(mean) < 1e-30 || std::fabs(mean) < 1e-3 * std::fabs(eps)) return "";
  const double factor = 1 / std::sqrt(mean);
  for (int64_t i = 0; i < width; ++i) {
    const double scaled = x[i] * factor, expected = scaled * (1.0 + weight[i]);
    const double room = std::fabs(expected) * 1e-5 + 1e-37 * (1 + std::fabs(weight[i])) + 1e-44;
    const bool unsure =
        std::fabs(scaled) > kLarge || (!std::isfinite(weight[i]) && std::fabs(scaled) < 1e-37);
    if (!is_near(y[i], expected, std::isfinite(room) ? room : 0, unsure))
      return wrong_at("y", i, y[i], expected, room);
  }
  return "";
}

std::string judge_norm(const Question& q, const std::vector<float>& x, const Array& weight,
                       const Array& y) {
  const int64_t width = weight.dims[0];
  for (int64_t at = 0; at < y.size(); at += width) {
    const std::string wrong = judge_norm_row(x.data() + at, weight.floats.data(), width,
                                             q.real("eps", 1e-6f), y.floats.data() + at);
    if (!wrong.empty()) return wrong;
  }
  return "";
}

std::string judge_added_norm(const Question& q, const std::vector<Array>& outputs) {
  std::vector<float> sums = q.input(0).floats;
  for (size_t i = 0; i < sums.size(); ++i) {
    sums[i] += q.input(1).floats[i];
    const float found = outputs[0].floats[i];
    if (!(found == sums[i] || (std::isnan(found) && std::isnan(sums[i]))))
      return wrong_at("sum", i, found, sums[i], 0);
  }
  return judge_norm(q, sums, q.input(2), outputs[1]);
}

bool is_floats(const Array& array) { return array.given && array.type == stand_in::kFloat; }

}  // namespace

bool is_sound_pointwise(const Question& q) {
  const Array& x = q.input(0);
  if (!is_floats(x)) return false;
  if (q.op == "SoftCap") return true;
  const Array& other = q.input(1);
  if (q.op == "GeluMul") return other.is(stand_in::kFloat, x.dims);
  const bool added = q.op == "AddRmsNorm";
  if (added && !other.is(stand_in::kFloat, x.dims)) return false;
  return !x.dims.empty() && q.input(added ? 2 : 1).is(stand_in::kFloat, {x.dims.back()});
}

std::string judge_pointwise(const Question& q, const std::vector<Array>& outputs) {
  for (const Array& output : outputs)
    if (output.dims != q.input(0).dims) return "an output has another shape";
  if (q.op == "GeluMul") return judge_gelu(q, outputs);
  if (q.op == "SoftCap") return judge_cap(q, outputs);
  if (q.input(0).size() == 0) return "";
  if (q.op == "AddRmsNorm") return judge_added_norm(q, outputs);
  return judge_norm(q, q.input(0).floats, q.input(1), outputs[0]);
}

namespace {

struct Oracle {
  bool (*is_sound)(const Question&);
  std::string (*judge)(const Question&, const std::vector<Array>&);
};

const Oracle& oracle_of(const Question& q) {
  static const std::map<std::string, Oracle> all = {
      {"LocalAttention", {is_sound_attention, judge_attention}},
      {"RgLruScan", {is_sound_scan, judge_scan}},
      {"CausalConv1d", {is_sound_convolution, judge_convolution}},
      {"QuantLinear", {is_sound_linear, judge_linear}},
      {"QuantLinear2", {is_sound_linear, judge_linear}},
      {"QuantLinear3", {is_sound_linear, judge_linear}},
      {"TwoLevelLinear2", {is_sound_two_level, judge_two_level}},
      {"TwoLevelLinear3", {is_sound_two_level, judge_two_level}},
      {"TwoLevelLinear4", {is_sound_two_level, judge_two_level}},
      {"TwoLevelLinear5", {is_sound_two_level, judge_two_level}},
      {"TwoLevelLinear6", {is_sound_two_level, judge_two_level}},
  };
  static const Oracle pointwise = {is_sound_pointwise, judge_pointwise};
  const auto found = all.find(q.op);
  return found == all.end() ? pointwise : found->second;
}

// What no op takes: dimensions that are negative, too many, or of no possible memory.
bool is_tensor(const Array& array) {
  if (!array.given) return true;
  if (array.dims.size() > 4) return false;
  double all = 1;
  for (int64_t d : array.dims) {
    if (d < 0) return false;
    all *= d ? static_cast<double>(d) : 1.0;
  }
  return all <= 0x1p56;
}

}  // namespace

bool is_sound(const Question& question) {
  for (const Array& input : question.inputs)
    if (!is_tensor(input)) return false;
  return oracle_of(question).is_sound(question);
}

std::string judge(const Question& question, const std::vector<Array>& outputs) {
  return oracle_of(question).judge(question, outputs);
}

std::string wrong_at(const char* what, int64_t index, float found, double expected, double room) {
  char text[200];
  std::snprintf(text, sizeof text, "%s [%lld] is %.9g instead of %.17g, give or take %.3g", what,
                static_cast<long long>(index), static_cast<double>(found), expected, room);
  return text;
}

}  // namespace fuzz
