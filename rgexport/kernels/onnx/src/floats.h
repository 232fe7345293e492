// Arithmetic on float32, as fast as an instruction set makes it: what each of them gives.
//
// floats_table.h is compiled once for each, and floats() is the table for this processor. No
// kernel allocates, and none starts a thread: an op cuts its work into tasks by shapes alone, so a
// result does not depend on the number of threads.
#pragma once

#include <array>
#include <cstdint>

namespace rgexport {

// Up to so many tokens of a step, each gives the bits that it gives alone.
constexpr int64_t kEachAlone = 16;

// c[m, n] (+)= Σ_k a[m, k] · b[k, n]. Both columns of a and its rows may be apart; b and c have
// their columns side by side.
struct Product {
  int64_t rows, columns, depth;
  const float* a;
  int64_t a_row, a_step;  // floats from row to row, and from k to k + 1
  const float* b;
  int64_t b_step;
  float* c;
  int64_t c_row;
  bool add;  // to what c holds; otherwise it is overwritten
  // What will be read next, or null: it is brought near meanwhile.
  const float* ahead = nullptr;
  int64_t ahead_count = 0;
  // Adds products to c one after another, as `stream` does: the same bits. Else sums of parts.
  bool in_order = false;
  const uint16_t* b_bfloat16 = nullptr;  // b in bfloat16; then b is null
};

// Some channels of one sequence of the RG-LRU; all rows are `stride` floats apart.
struct Recurrence {
  int64_t steps, channels, stride;
  const float *x, *input_gate, *recurrence_gate;  // [steps, channels]
  const float* decay;                             // [channels]: -8 softplus(a_param)
  const int64_t* positions;                       // [steps]
  const float* state;                             // [channels]
  float* h;                                       // [steps, channels]
  float* present;                                 // [channels]: may be `state`
};

// Some channels of one sequence of a convolution over time; all rows are `stride` floats apart.
struct CausalConv {
  int64_t steps, channels, stride, taps;
  const float* x;       // [steps, channels]
  const float* weight;  // [channels, taps], side by side; the last tap is for the current step
  const float* bias;    // [channels]
  const float* state;   // [taps - 1, channels]
  float* y;             // [steps, channels]
  float* present;       // [taps - 1, channels]: may be `state`
};

// The most numbers of `CausalConv::weight` in one call.
constexpr int64_t kMaxConvWeights = 2048;

// y = s · (1 + weight) / sqrt(mean of s² + eps) for s = x + residual, or s = x where there is none.
struct RmsNormRow {
  int64_t count;
  const float *x, *residual, *weight;
  float eps;
  float* sum;  // gets s where there is a residual
  float* y;
};

// What softmax knows of each lane: the largest score so far, and the sum of exp(score - largest).
struct SoftmaxState {
  int64_t lanes;  // a multiple of FloatKernels::lanes
  float *largest, *sum;
};

constexpr int kStreams = 3;

struct FloatKernels {
  int64_t lanes;  // floats of a vector
  void (*product)(const Product&);
  // The same for few rows and a b without gaps, at the speed at which b can be read. All give the
  // same result, and only read b in different ways; each may be the fastest one somewhere.
  std::array<void (*)(const Product&), kStreams> stream;
  // to[column, row] = factor · from[row, column]; `to` has rows of `lanes` floats, padded with 0.
  void (*transpose)(const float* from, int64_t rows, int64_t columns, float factor, float* to,
                    int64_t lanes);
  // Replaces scores [keys, lanes] by exp(score - largest) and takes them into the state. What was
  // summed by older weights must be multiplied by `rescale` [lanes]; false where all of it is 1.
  bool (*softmax)(float* scores, int64_t keys, const SoftmaxState&, float* rescale);
  void (*rg_lru)(const Recurrence&);
  void (*causal_conv)(const CausalConv&);
  // y = gelu(gate) · up, by the tanh approximation of gelu.
  void (*gelu_mul)(const float* gate, const float* up, float* y, int64_t count);
  void (*rms_norm)(const RmsNormRow&);
  // y = cap · tanh(x / cap).
  void (*soft_cap)(const float* x, float cap, float* y, int64_t count);
};

// Those of instruction_set().
const FloatKernels& floats();

}  // namespace rgexport
