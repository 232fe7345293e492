// Softmax and what else is done to each number apart.
#pragma once

#include "floats.h"
#include "floats_vector.h"

namespace rgexport {
namespace {

bool softmax(float* scores, int64_t keys, const SoftmaxState& state, float* rescale) {
  bool any = false;
  for (int64_t i = 0; i < state.lanes; i += kLanes) {
    const Vector before = load(state.largest + i);
    Vector largest = before;
    for (int64_t key = 0; key < keys; ++key)
      largest = larger(load(scores + key * state.lanes + i), largest);
    Vector total{};
    for (int64_t key = 0; key < keys; ++key) {
      float* score = scores + key * state.lanes + i;
      const Vector weight = exponential(load(score) - largest);
      store(score, weight);
      total += weight;
    }
    const Vector factor = exponential(before - largest);
    store(rescale + i, factor);
    store(state.largest + i, largest);
    store(state.sum + i, load(state.sum + i) * factor + total);
    for (int lane = 0; lane < kLanes; ++lane) any |= factor[lane] != 1.0f;
  }
  return any;
}

// gelu(x) = x/2 (1 + tanh u) = x / (1 + exp(-2u)), u = √(2/π) (x + 0.044715 x³)
void gelu_mul(const float* gate, const float* up, float* y, int64_t count) {
  constexpr float kLinear = -1.5957691216057308f, kCubic = -0.07135481627265756f;
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t n = count - i;
    const Vector x = load(gate + i, n);
    const Vector odds = exponential(x * (x * x * kCubic + kLinear));
    store(y + i, x / (1.0f + odds) * load(up + i, n), n);
  }
}

void rms_norm(const RmsNormRow& p) {
  const float* numbers = p.residual ? p.sum : p.x;
  Vector squares[4] = {};
  for (int64_t i = 0; i < p.count; i += kLanes) {
    const int64_t n = p.count - i;
    Vector x = load(p.x + i, n);
    if (p.residual) store(p.sum + i, x += load(p.residual + i, n), n);
    squares[i / kLanes % 4] += x * x;
  }
  const float total = sum(squares[0] + squares[1] + (squares[2] + squares[3]));
  const Vector factor = splat(1.0f / __builtin_sqrtf(total / static_cast<float>(p.count) + p.eps));
  for (int64_t i = 0; i < p.count; i += kLanes) {
    const int64_t n = p.count - i;
    store(p.y + i, load(numbers + i, n) * factor * (1.0f + load(p.weight + i, n)), n);
  }
}

// (tanh(z) / z - 1) / z² for |z| < 0.625, by powers of z² from the highest; Cephes' tanhf.
constexpr float kTanh[] = {-5.70498872745e-3f, 2.06390887954e-2f, -5.37397155531e-2f,
                           1.33314422036e-1f, -3.33332819422e-1f};

inline Vector hyperbolic_tangent(Vector z) {
  const Vector square = z * z;
  Vector p = splat(kTanh[0]);
  p = p * square + kTanh[1];
  p = p * square + kTanh[2];
  p = p * square + kTanh[3];
  p = p * square + kTanh[4];
  const Vector small = p * square * z + z;
  const Vector large = 1.0f - 2.0f / (exponential(2.0f * z) + 1.0f);
  return ((z < 0.625f) & (z > -0.625f)) ? small : large;
}

void soft_cap(const float* x, float cap, float* y, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes)
    store(y + i, hyperbolic_tangent(load(x + i, count - i) / cap) * cap, count - i);
}

}  // namespace
}  // namespace rgexport
