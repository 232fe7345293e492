// RgLruScan and CausalConv1d, token by token.
#include "oracles.h"

namespace fuzz {
namespace {

// The exponential as float32 arithmetic has it.
float exponential(float x) { return static_cast<float>(std::exp(static_cast<double>(x))); }

// Sums of products, with what float32 may lose.
struct Sum {
  double value, size;  // of all terms; the size of those that are finite
  explicit Sum(double start) : value(start), size(0) { grow(start); }
  void add(float a, float b) {
    const double term = static_cast<double>(a) * b;
    value += term;
    grow(term);
  }
  bool matches(float found) const { return is_near(found, value, room(), size > kLarge); }
  double room() const { return 3e-6 * size + 1e-40; }

 private:
  void grow(double term) { size += std::isfinite(term) ? std::fabs(term) : 0; }
};

struct Step {
  float x, input_gate, recurrence_gate, decay, before;
  bool first;
};

// h of a step, from what the kernel itself has found for gates and for the step before: float32
// operations in the order of the body, where 1 - a² is but a few units of the last place.
bool is_right(const Step& s, float found, double& h, double& room) {
  const float open = 1.0f / (1.0f + exponential(-s.input_gate));
  const float gated = s.x * open;
  bool unsure = !std::isfinite(s.x) && open < 1e-30f;  // 0 or nearly: infinite, or no number
  room = std::fabs(gated) * 2e-6 + std::fabs(static_cast<double>(s.x)) * 1e-38 + 1e-44;
  if (s.first) {
    h = 0.0f * s.before + gated;
    return is_near(found, h, room, unsure);
  }
  const float log_a = s.decay / (1.0f + exponential(-s.recurrence_gate));
  const float a = exponential(log_a), squared = exponential(2.0f * log_a);
  const float scale = std::sqrt(1.0f - squared);
  unsure |= !std::isfinite(s.before) && a < 1e-30f;
  unsure |= !std::isfinite(gated) && !(scale > 1e-2f);
  unsure |= log_a > 0 && log_a < 1e-6f;  // a root of nearly 0, from above or below
  h = static_cast<double>(a) * s.before + static_cast<double>(gated) * scale;
  const double size = std::min(std::fabs(log_a), 200.0f);  // beyond, a is 0 or infinite
  const double relative = 2e-6 + 4e-7 * size;
  const double lost = 2e-7 + 5e-7 * size * squared;  // of 1 - a²
  const double of_scale = std::min(1.5 * std::sqrt(lost), scale > 0 ? lost / scale : 1.0);
  if (!std::isfinite(h)) return unsure ? true : is_near(found, h, 0, !std::isfinite(found) &&
                                                        std::isinf(h) && log_a > 80);
  room += std::fabs(static_cast<double>(a) * s.before) * relative;
  room += std::fabs(gated) * (of_scale + scale * relative);
  return is_near(found, h, room, unsure);
}

}  // namespace

bool is_sound_scan(const Question& q) {
  const Array& x = q.input(0);
  const Dims& w = q.input(1).dims;
  if (!x.given || x.type != stand_in::kFloat || x.dims.size() != 3 || w.size() != 3) return false;
  const int64_t batch = x.dims[0], tokens = x.dims[1], channels = x.dims[2];
  if (w[0] * w[1] != channels) return false;
  const Dims matrices = {w[0], w[1], w[1]};
  for (size_t i : {1, 3})
    if (!(q.input(i).is(stand_in::kFloat, matrices) || q.input(i).is(stand_in::kBfloat16, matrices)) ||
        !q.input(i + 1).is(stand_in::kFloat, {w[0], w[1]}))
      return false;
  return q.input(5).is(stand_in::kFloat, {channels}) &&
         q.input(6).is(stand_in::kInt64, {batch, tokens}) &&
         q.input(7).is(stand_in::kFloat, {batch, channels});
}

std::string judge_scan(const Question& q, const std::vector<Array>& outputs) {
  const Array& x = q.input(0);
  const int64_t batch = x.dims[0], tokens = x.dims[1], channels = x.dims[2];
  const int64_t block = q.input(1).dims[1];
  if (outputs[1].dims != Dims{batch, channels}) return "present has another shape";
  for (size_t i : {0, 2, 3})
    if (outputs[i].dims != x.dims) return "an output has another shape";
  std::vector<float> state = q.input(7).floats;
  for (int64_t row = 0; row < batch * tokens; ++row)
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t at = row * channels + c, head = c / block;
      for (int gate : {0, 1}) {
        const Array &weight = q.input(1 + 2 * gate), &bias = q.input(2 + 2 * gate);
        Sum sum(bias.floats[c]);
        for (int64_t k = 0; k < block; ++k)
          sum.add(x.floats[row * channels + head * block + k],
                  weight.floats[(head * block + k) * block + c % block]);
        if (!sum.matches(outputs[2 + gate].floats[at]))
          return wrong_at("a gate", at, outputs[2 + gate].floats[at], sum.value, sum.room());
      }
      float& before = state[row / tokens * channels + c];
      const Step step = {x.floats[at],          outputs[2].floats[at], outputs[3].floats[at],
                         q.input(5).floats[c],  before,
                         q.input(6).positions[row] == 0};
      double h, room = 0;
      const float found = outputs[0].floats[at];
      if (!is_right(step, found, h, room)) return wrong_at("h", at, found, h, room);
      before = found;
    }
  return is_same(outputs[1].floats, state) ? "" : "present is not the last h";
}

bool is_sound_convolution(const Question& q) {
  const Array& x = q.input(0);
  const Dims& w = q.input(1).dims;
  if (!x.given || x.type != stand_in::kFloat || x.dims.size() != 3 || w.size() != 3) return false;
  const int64_t channels = x.dims[2];
  return w[2] >= 1 && w[2] <= 2048 && q.input(1).is(stand_in::kFloat, {channels, 1, w[2]}) &&
         q.input(2).is(stand_in::kFloat, {channels}) &&
         q.input(3).is(stand_in::kFloat, {x.dims[0], w[2] - 1, channels});
}

std::string judge_convolution(const Question& q, const std::vector<Array>& outputs) {
  const Array &x = q.input(0), &weight = q.input(1), &state = q.input(3);
  const int64_t batch = x.dims[0], tokens = x.dims[1], channels = x.dims[2];
  const int64_t taps = weight.dims[2], before = taps - 1;
  if (outputs[0].dims != x.dims || outputs[1].dims != state.dims) return "another shape";
  // Number `t` of the state followed by the tokens.
  const auto input = [&](int64_t b, int64_t t, int64_t c) {
    return t < before ? state.floats[(b * before + t) * channels + c]
                      : x.floats[(b * tokens + t - before) * channels + c];
  };
  std::vector<float> present;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t c = 0; c < channels; ++c) {
        Sum sum(q.input(2).floats[c]);
        for (int64_t tap = 0; tap < taps; ++tap)
          sum.add(input(b, t + tap, c), weight.floats[c * taps + tap]);
        const int64_t at = (b * tokens + t) * channels + c;
        if (!sum.matches(outputs[0].floats[at]))
          return wrong_at("y", at, outputs[0].floats[at], sum.value, sum.room());
      }
    for (int64_t t = 0; t < before; ++t)
      for (int64_t c = 0; c < channels; ++c) present.push_back(input(b, tokens + t, c));
  }
  return is_same(outputs[1].floats, present) ? "" : "present is another";
}

}  // namespace fuzz
