// The RG-LRU with its gates. A head's channels need no other's, so each thread takes whole heads,
// some rows at a time: what the gates give is read again while it is in the caches.
#include <cstring>

#include "floats.h"
#include "ops.h"
#include "ranges.h"
#include "scratch.h"

namespace rgexport {
namespace {

constexpr int64_t kRows = 64;    // of a product
constexpr int64_t kFewRows = 3;  // up to so many, time goes into reading the weights

struct Gate {
  const float *weight, *bias;  // [heads, block, block], [heads, block]
};

struct Layer {
  int64_t tokens, rows, block, channels;  // of a sequence, of all of them, of a head, of all
  const float *x, *decay, *state;
  Gate gates[2];  // of the input, of the recurrence
  const int64_t* positions;
  float *h, *present;

  // What a thread needs for the gates of a head.
  int64_t scratch() const { return 2 * least_rows() * block; }
  int64_t least_rows() const { return rows < kRows ? rows : kRows; }
};

// Rows [first, first + count) of one gate of a head, before the sigmoid: [count, block].
void gate_rows(const Layer& layer, const Gate& gate, int64_t head, int64_t first, int64_t count,
               float* y) {
  const int64_t block = layer.block;
  Product task;
  task.rows = count;
  task.columns = task.depth = block;
  task.a = layer.x + first * layer.channels + head * block;
  task.a_row = layer.channels;
  task.a_step = 1;
  task.b = gate.weight + head * block * block;
  task.b_step = block;
  task.c = y;
  task.c_row = block;
  task.add = true;
  for (int64_t row = 0; row < count; ++row)
    std::memcpy(y + row * block, gate.bias + head * block, block * sizeof(float));
  (layer.rows <= kFewRows ? floats().stream : floats().product)(task);
}

// The rows of a batch lie one sequence after another: a few rows may be of several.
void scan_rows(const Layer& layer, int64_t head, int64_t first, int64_t count,
               const float* gates) {
  for (int64_t row = first; row < first + count;) {
    const int64_t sequence = row / layer.tokens, token = row % layer.tokens;
    const int64_t here = layer.tokens - token, left = first + count - row;
    const int64_t at = row * layer.channels + head * layer.block;
    const int64_t state_at = sequence * layer.channels + head * layer.block;
    Recurrence task;
    task.steps = here < left ? here : left;
    task.channels = task.gate_stride = layer.block;
    task.stride = layer.channels;
    task.x = layer.x + at;
    task.input_gate = gates + (row - first) * layer.block;
    task.recurrence_gate = task.input_gate + count * layer.block;
    task.decay = layer.decay + head * layer.block;
    task.positions = layer.positions + row;
    task.present = layer.present + state_at;
    task.state = token ? task.present : layer.state + state_at;
    task.h = layer.h + at;
    floats().rg_lru(task);
    row += task.steps;
  }
}

void run_head(const Layer& layer, int64_t head, float* gates) {
  for (int64_t first = 0; first < layer.rows; first += kRows) {
    const int64_t left = layer.rows - first, count = left < kRows ? left : kRows;
    for (int i = 0; i < 2; ++i)
      gate_rows(layer, layer.gates[i], head, first, count, gates + i * count * layer.block);
    scan_rows(layer, head, first, count, gates);
  }
}

const char* wrong_shapes(const Tensor& x, const Tensor (&weights)[2], const Tensor (&biases)[2],
                         const Tensor& decay, const Tensor& positions, const Tensor& state) {
  if (x.rank != 3) return "RgLruScan: x must be [batch, tokens, channels]";
  const int64_t channels = x.dims[2];
  for (const Tensor& weight : weights)
    if (weight.rank != 3 || weight.dims[1] != weight.dims[2] ||
        weight.dims[0] != weights[0].dims[0] || weight.dims[0] * weight.dims[1] != channels)
      return "RgLruScan: weights must be [heads, block, block], and x have heads x block channels";
  for (const Tensor& bias : biases)
    if (bias.size() != channels) return "RgLruScan: biases must be [heads, block]";
  if (decay.size() != channels) return "RgLruScan: decay must be [channels]";
  if (positions.size() != x.dims[0] * x.dims[1])
    return "RgLruScan: position_ids must be [batch, tokens]";
  if (state.size() != x.dims[0] * channels) return "RgLruScan: state must be [batch, channels]";
  return nullptr;
}

}  // namespace

const char* RgLruScan::run(Context& context) const {
  const Tensor x = context.input(0), weights[2] = {context.input(1), context.input(3)};
  const Tensor biases[2] = {context.input(2), context.input(4)}, decay = context.input(5);
  const Tensor positions = context.input(6), state = context.input(7);
  if (const char* wrong = wrong_shapes(x, weights, biases, decay, positions, state)) return wrong;

  const int64_t heads = weights[0].dims[0], block = weights[0].dims[1], channels = x.dims[2];
  const int64_t present_dims[] = {x.dims[0], channels};
  float* h = context.output(0, x.dims, 3);
  float* present = context.output(1, present_dims, 2);
  if (!h || !present) return nullptr;
  const Layer layer = {x.dims[1], x.dims[0] * x.dims[1], block, channels,
                       x.as<float>(), decay.as<float>(), state.as<float>(),
                       {{weights[0].as<float>(), biases[0].as<float>()},
                        {weights[1].as<float>(), biases[1].as<float>()}},
                       positions.as<int64_t>(), h, present};

  Ranges threads(heads, 1, processors());
  const Scratch scratch(threads.parts() * layer.scratch());
  if (!scratch.data()) return "RgLruScan: out of memory";
  const Upcoming::Next next = upcoming_.begin({{weights[0].data, weights[0].size() * 4}});
  context.parallel_for(threads.parts(), [&](size_t own) {
    const int64_t at = threads.first(own) * block * block;
    for (const Gate& gate : layer.gates) fetch(gate.weight + at, kAhead);
    float* gates = scratch.data() + own * layer.scratch();
    threads.run(own, [&](int64_t head, int64_t) { run_head(layer, head, gates); });
    next.fetch(own, threads.parts());
  });
  return nullptr;
}

}  // namespace rgexport
