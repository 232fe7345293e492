// All ops; each is implemented in the file of its name.
#pragma once

#include "fastest.h"
#include "next_weights.h"
#include "op.h"

namespace rgexport {

// y = x · dequantized(data)ᵀ + bias, as com.microsoft::MatMulNBits with int8 activations: for one
// matrix, or for several of the same columns and format, which share the rounded activations. With
// two `digits`, what rounding leaves of x is rounded once more, see quant_matmul.h.
class QuantLinears {
 public:
  static constexpr int kMost = 3;
  void run(Context&) const;

 protected:
  QuantLinears(const Attributes&, int matrices);

  // x; then for each matrix data; scales in float32 or float16; zero points, or none; bias, or none.
  static constexpr Signature signature(int matrices) {
    constexpr const char* kNames[] = {"QuantLinear", "QuantLinear2", "QuantLinear3"};
    constexpr ort::ElementType kParts[] = {ort::kUint8, kFloatOrHalf, ort::kUint8, ort::kFloat};
    Signature made{};
    made.name = kNames[matrices - 1];
    made.inputs = 1 + 4 * matrices;
    made.required = 1 + 2 * matrices;
    made.input_types[0] = ort::kFloat;
    for (int i = 0; i < 4 * matrices; ++i) made.input_types[1 + i] = kParts[i / matrices];
    made.outputs = matrices;
    return made;
  }

 private:
  int matrices_;
  int64_t columns_, bits_, block_, digits_, rows_[kMost];
  NextWeights next_weights_;
  TimedRuns timed_runs_;
};

template <int kCount>
class QuantLinear : public QuantLinears {
 public:
  static constexpr Signature kSignature = signature(kCount);
  explicit QuantLinear(const Attributes& attributes) : QuantLinears(attributes, kCount) {}
};

// The same for one matrix with levels of kBits bits in planes and scales of two levels, see two_level.h:
// x, planes, codes, units, bias or none.
class TwoLevelLinears {
 public:
  void run(Context&) const;

 protected:
  TwoLevelLinears(const Attributes&, int bits);

  static constexpr Signature signature(const char* name) {
    return {name, 5, 4, {ort::kFloat, ort::kUint8, ort::kInt8, ort::kFloat16, ort::kFloat}, 1};
  }

 private:
  int bits_;
  int64_t columns_, rows_, block_;
  TimedRuns timed_runs_;
  NextWeights next_weights_;
};

template <int kBits>
class TwoLevelLinear : public TwoLevelLinears {
  static constexpr const char* kNames[] = {"TwoLevelLinear2", "TwoLevelLinear3", "TwoLevelLinear4",
                                           "TwoLevelLinear5", "TwoLevelLinear6"};

 public:
  static constexpr Signature kSignature = signature(kNames[kBits - 2]);
  explicit TwoLevelLinear(const Attributes& attributes) : TwoLevelLinears(attributes, kBits) {}
};

// The RG-LRU of arXiv 2402.19427 with its gates: x [B, T, R]; weight [heads, block, block], in float32
// or in bfloat16, and bias [heads, block] of the input gate and of the recurrence gate, R = heads ·
// block; decay [R], position_ids [B, T], state [B, R] → h [B, T, R], present [B, R], and what the gates
// give before the sigmoid, each [B, T, R], for who looks into a model.
class RgLruScan {
 public:
  static constexpr Signature kSignature = {
      "RgLruScan",
      8,
      8,
      {ort::kFloat, kFloatOrBfloat16, ort::kFloat, kFloatOrBfloat16, ort::kFloat, ort::kFloat,
       ort::kInt64, ort::kFloat},
      4,
      2};
  explicit RgLruScan(const Attributes&) {}
  void run(Context&) const;

 private:
  NextWeights next_weights_;
  TimedRuns timed_runs_;
};

// q [B, T, heads · D], k, v [B, T, D], past_key, past_value [B, 1, window, D], position_ids [B, T]
// → y [B, T, heads · D], present_key, present_value. Position p has slot p modulo window; a query
// sees its own key and `window` before it. Positions go up by one in a row of the batch. Earlier
// files have past_key and past_value [B, window, D].
class LocalAttention {
 public:
  static constexpr Signature kSignature = {
      "LocalAttention",
      6,
      6,
      {ort::kFloat, ort::kFloat, ort::kFloat, ort::kFloat, ort::kFloat, ort::kInt64},
      3};
  explicit LocalAttention(const Attributes&);
  void run(Context&) const;

 private:
  int64_t heads_;
};

// x [B, T, R], weight [R, 1, taps], bias [R], state [B, taps - 1, R] → y, present.
class CausalConv1d {
 public:
  static constexpr Signature kSignature = {
      "CausalConv1d", 4, 4, {ort::kFloat, ort::kFloat, ort::kFloat, ort::kFloat}, 2};
  explicit CausalConv1d(const Attributes&) {}
  void run(Context&) const;
};

// y = gelu(gate) · up, gelu by its tanh approximation.
class GeluMul {
 public:
  static constexpr Signature kSignature = {"GeluMul", 2, 2, {ort::kFloat, ort::kFloat}, 1};
  explicit GeluMul(const Attributes&) {}
  void run(Context&) const;
};

// y = x · (1 + weight) / sqrt(mean of x² + eps), the mean over the last axis.
class RmsNorm {
 public:
  static constexpr Signature kSignature = {"RmsNorm", 2, 2, {ort::kFloat, ort::kFloat}, 1};
  explicit RmsNorm(const Attributes&);
  void run(Context&) const;

 private:
  float eps_;
};

// sum = x + residual, and y as RmsNorm of it: x, residual, weight → sum, y.
class AddRmsNorm {
 public:
  static constexpr Signature kSignature = {
      "AddRmsNorm", 3, 3, {ort::kFloat, ort::kFloat, ort::kFloat}, 2};
  explicit AddRmsNorm(const Attributes&);
  void run(Context&) const;

 private:
  float eps_;
};

// y = cap · tanh(x / cap).
class SoftCap {
 public:
  static constexpr Signature kSignature = {"SoftCap", 1, 1, {ort::kFloat}, 1};
  explicit SoftCap(const Attributes&);
  void run(Context&) const;

 private:
  float cap_;
};

}  // namespace rgexport
