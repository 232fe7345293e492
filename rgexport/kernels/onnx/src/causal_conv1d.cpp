#include <cstring>

#include "floats.h"
#include "ops.h"

namespace rgexport {
namespace {

constexpr int64_t kChannels = 256;  // of a task, or fewer where there are many taps

}  // namespace

void CausalConv1d::run(Context& context) const {
  const Tensor x = context.input(0), weight = context.input(1);
  const Tensor bias = context.input(2), state = context.input(3);
  if (context.refused()) return;
  if (x.rank != 3)
    return context.refuse("x must be [batch, tokens, channels], not %s", ShapeText(x).text());
  const int64_t batch = x.dims[0], steps = x.dims[1], channels = x.dims[2], taps = weight.dims[2];
  if (!weight.is({channels, 1, taps}) || taps < 1 || taps > kMaxConvWeights)
    return context.refuse("weight must be [channels, 1, taps], with 1 to 2048 taps, not %s",
                          ShapeText(weight).text());
  if (!bias.is({channels}))
    return context.refuse("bias must be [channels], not %s", ShapeText(bias).text());
  if (!state.is({batch, taps - 1, channels}))
    return context.refuse("state must be [batch, taps - 1, channels], not %s",
                          ShapeText(state).text());

  float* y = context.output(0, x.dims, 3);
  float* present = context.output(1, state.dims, 3);
  if (!y || !present) return;
  if (steps == 0) {
    if (present != state.data && state.size() > 0)
      std::memcpy(present, state.data, state.size() * sizeof(float));
    return;
  }

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
}

}  // namespace rgexport
