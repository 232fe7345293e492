#include "floats.h"
#include "ops.h"

namespace rgexport {
namespace {

constexpr int64_t kChannels = 256;  // of a task

}  // namespace

const char* RgLruScan::run(Context& context) const {
  const Tensor x = context.input(0), input_gate = context.input(1);
  const Tensor recurrence_gate = context.input(2), decay = context.input(3);
  const Tensor positions = context.input(4), state = context.input(5);
  if (x.rank != 3) return "RgLruScan: x must be [batch, tokens, channels]";
  const int64_t batch = x.dims[0], steps = x.dims[1], channels = x.dims[2];
  if (input_gate.size() != x.size() || recurrence_gate.size() != x.size())
    return "RgLruScan: the gates must have the shape of x";
  if (decay.size() != channels) return "RgLruScan: decay must be [channels]";
  if (positions.size() != batch * steps) return "RgLruScan: position_ids must be [batch, tokens]";
  if (state.size() != batch * channels) return "RgLruScan: state must be [batch, channels]";

  const int64_t present_dims[] = {batch, channels};
  float* h = context.output(0, x.dims, 3);
  float* present = context.output(1, present_dims, 2);
  if (!h || !present) return nullptr;

  const FloatKernels& kernels = floats();
  const int64_t parts = (channels + kChannels - 1) / kChannels;
  context.parallel_for(batch * parts, [&](size_t index) {
    const int64_t row = index / parts, first = index % parts * kChannels;
    const int64_t at = row * steps * channels + first, state_at = row * channels + first;
    RgLru task;
    task.steps = steps;
    task.channels = channels - first < kChannels ? channels - first : kChannels;
    task.stride = channels;
    task.x = x.as<float>() + at;
    task.input_gate = input_gate.as<float>() + at;
    task.recurrence_gate = recurrence_gate.as<float>() + at;
    task.decay = decay.as<float>() + first;
    task.positions = positions.as<int64_t>() + row * steps;
    task.state = state.as<float>() + state_at;
    task.h = h + at;
    task.present = present + state_at;
    kernels.rg_lru(task);
  });
  return nullptr;
}

}  // namespace rgexport
