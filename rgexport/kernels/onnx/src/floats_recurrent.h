// The recurrent block: a step at a time, some channels side by side.
#pragma once

#include "floats.h"
#include "floats_vector.h"

namespace rgexport {
namespace {

// h of a step from h of the step before it, for one vector of channels; rounded operation by
// operation like the graph that is this op's body (rgexport/export/onnx/functions.py).
inline Vector rg_lru_step(Vector h, Vector x, Vector input_gate, Vector recurrence_gate,
                          Vector decay, bool first) {
  const Vector gated = x * (1.0f / (1.0f + exponential(-input_gate)));
  if (first) return 0.0f * h + gated;  // a state that is no number stays
  const Vector log_a = decay / (1.0f + exponential(-recurrence_gate));
  const Vector scale = square_root(1.0f - exponential(2.0f * log_a));
  return exponential(log_a) * h + gated * scale;
}

void rg_lru(const Recurrence& p) {
  const float* before = p.state;
  for (int64_t t = 0; t < p.steps; ++t) {
    const int64_t at = t * p.stride;
    float* after = p.h + at;
    const bool first = p.positions[t] == 0;
    for (int64_t i = 0; i < p.channels; i += kLanes) {
      const int64_t n = p.channels - i;
      const auto in = [=](const float* row) { return load(row + i, n); };
      const Vector h = rg_lru_step(in(before), in(p.x + at), in(p.input_gate + at),
                                   in(p.recurrence_gate + at), in(p.decay), first);
      store(after + i, h, n);
    }
    before = after;
  }
  for (int64_t i = 0; i < p.channels; i += kLanes)
    store(p.present + i, load(before + i, p.channels - i), p.channels - i);
}

// Taps by channels: weights for all channels of a tap side by side.
template <int64_t Taps>
void by_tap(const CausalConv& p, float* weights) {
  const int64_t taps = Taps ? Taps : p.taps;
  for (int64_t i = 0; i < p.channels; ++i)
    for (int64_t tap = 0; tap < taps; ++tap)
      weights[tap * p.channels + i] = p.weight[i * taps + tap];
}

void causal_conv(const CausalConv& p) {
  float weights[kMaxConvWeights];
  p.taps == 4 ? by_tap<4>(p, weights) : by_tap<0>(p, weights);
  const int64_t before = p.taps - 1;
  // Row `t` of the state followed by the steps.
  const auto row = [&](int64_t t) {
    return t < before ? p.state + t * p.stride : p.x + (t - before) * p.stride;
  };
  for (int64_t t = 0; t < p.steps; ++t) {
    for (int64_t i = 0; i < p.channels; i += kLanes) {
      const int64_t n = p.channels - i;
      Vector y = load(p.bias + i, n);
      for (int64_t tap = 0; tap < p.taps; ++tap)
        y += load(row(t + tap) + i, n) * load(weights + tap * p.channels + i, n);
      store(p.y + t * p.stride + i, y, n);
    }
  }
  // Upwards, since a row of the state may come from a later one in the same place.
  for (int64_t t = 0; t < before; ++t)
    for (int64_t i = 0; i < p.channels; i += kLanes) {
      const int64_t n = p.channels - i;
      store(p.present + t * p.stride + i, load(row(t + p.steps) + i, n), n);
    }
}

}  // namespace
}  // namespace rgexport
