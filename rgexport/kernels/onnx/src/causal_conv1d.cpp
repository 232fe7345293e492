#include "floats.h"
#include "ops.h"

namespace rgexport {
namespace {

constexpr int64_t kChannels = 256;  // of a task, or fewer where there are many taps

}  // namespace

const char* CausalConv1d::run(Context& context) const {
  const Tensor x = context.input(0), weight = context.input(1);
  const Tensor bias = context.input(2), state = context.input(3);
  if (x.rank != 3) return "CausalConv1d: x must be [batch, tokens, channels]";
  const int64_t batch = x.dims[0], steps = x.dims[1], channels = x.dims[2];
  if (weight.rank != 3 || weight.dims[0] != channels || weight.dims[1] != 1 ||
      weight.dims[2] < 1 || weight.dims[2] > kMaxConvWeights)
    return "CausalConv1d: weight must be [channels, 1, taps], with 1 to 2048 taps";
  const int64_t taps = weight.dims[2];
  if (bias.size() != channels) return "CausalConv1d: bias must be [channels]";
  if (state.size() != batch * (taps - 1) * channels)
    return "CausalConv1d: state must be [batch, taps - 1, channels]";

  const int64_t present_dims[] = {batch, taps - 1, channels};
  float* y = context.output(0, x.dims, 3);
  float* present = context.output(1, present_dims, 3);
  if (!y || (!present && taps > 1)) return nullptr;

  const FloatKernels& kernels = floats();
  const int64_t most = kMaxConvWeights / taps, part = most < kChannels ? most : kChannels;
  const int64_t parts = (channels + part - 1) / part;
  context.parallel_for(batch * parts, [&](size_t index) {
    const int64_t row = index / parts, first = index % parts * part;
    const int64_t at = row * steps * channels + first;
    const int64_t state_at = row * (taps - 1) * channels + first;
    CausalConv task;
    task.steps = steps;
    task.channels = channels - first < part ? channels - first : part;
    task.stride = channels;
    task.taps = taps;
    task.x = x.as<float>() + at;
    task.weight = weight.as<float>() + first * taps;
    task.bias = bias.as<float>() + first;
    task.state = state.as<float>() + state_at;
    task.y = y + at;
    task.present = present + state_at;
    kernels.causal_conv(task);
  });
  return nullptr;
}

}  // namespace rgexport
