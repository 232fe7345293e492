// The RG-LRU with its gates. What a channel needs of others is only their x, so each thread takes
// some channels of a head, and some rows at a time: what the gates give is read again while it is in
// the caches.
#include <cstring>

#include "floats.h"
#include "ops.h"
#include "ranges.h"

namespace rgexport {
namespace {

constexpr int64_t kRows = 64;      // of a product
constexpr int64_t kColumns = 128;  // of a product, which is what a thread takes of a head
constexpr int64_t kFewRows = 3;    // up to so many, time goes into reading whole weights

struct Gate {
  const Tensor& weight;  // [heads, block, block], float32 or bfloat16
  const float* bias;     // [heads, block]
  float* y;              // [rows, channels], before the sigmoid

  bool is_bfloat16() const { return weight.type == ort::kBfloat16; }
  int64_t bytes() const { return weight.size() * (is_bfloat16() ? 2 : 4); }
  const void* of_head(int64_t head) const {
    return static_cast<const char*>(weight.data) + head * (bytes() / weight.dims[0]);
  }
};

struct Layer {
  int64_t tokens, rows, block, channels;  // of a sequence, of all of them, of a head, of all
  const float *x, *decay, *state;
  Gate gates[2];  // of the input, of the recurrence
  const int64_t* positions;
  float *h, *present;
  void (*stream)(const Product&);

  bool few() const { return rows <= kFewRows; }
  int64_t most_columns() const { return few() || block < kColumns ? block : kColumns; }
  int64_t parts_of_head() const { return (block + most_columns() - 1) / most_columns(); }
};

// Channels of a head, and rows.
struct Part {
  int64_t head, first, columns;
  int64_t row, rows;
};

// A part of what a gate gives.
void multiply_gate(const Layer& layer, const Gate& gate, const Part& part) {
  const int64_t block = layer.block, columns = part.columns;
  float* y = gate.y + part.row * layer.channels + part.head * block + part.first;
  Product task;
  task.rows = part.rows;
  task.columns = columns;
  task.depth = block;
  task.a = layer.x + part.row * layer.channels + part.head * block;
  task.a_row = layer.channels;
  task.a_step = 1;
  const int64_t at = part.head * block * block + part.first;
  task.b = gate.is_bfloat16() ? nullptr : gate.weight.as<float>() + at;
  task.b_bfloat16 = gate.is_bfloat16() ? gate.weight.as<uint16_t>() + at : nullptr;
  task.b_step = block;
  task.c = y;
  task.c_row = layer.channels;
  task.add = true;
  task.in_order = layer.rows <= kEachAlone;
  const float* bias = gate.bias + part.head * block + part.first;
  for (int64_t row = 0; row < part.rows; ++row)
    std::memcpy(y + row * layer.channels, bias, columns * sizeof(float));
  (layer.few() ? layer.stream : floats().product)(task);
}

// The rows of a batch lie one sequence after another: those of a part may be of several.
void scan(const Layer& layer, const Part& part) {
  const int64_t channel = part.head * layer.block + part.first;
  for (int64_t done = 0; done < part.rows;) {
    const int64_t row = part.row + done, sequence = row / layer.tokens, token = row % layer.tokens;
    const int64_t here = layer.tokens - token, left = part.rows - done;
    const int64_t at = row * layer.channels + channel;
    const int64_t state_at = sequence * layer.channels + channel;
    Recurrence task;
    task.steps = here < left ? here : left;
    task.channels = part.columns;
    task.stride = layer.channels;
    task.x = layer.x + at;
    task.input_gate = layer.gates[0].y + at;
    task.recurrence_gate = layer.gates[1].y + at;
    task.decay = layer.decay + channel;
    task.positions = layer.positions + row;
    task.present = layer.present + state_at;
    task.state = token ? task.present : layer.state + state_at;
    task.h = layer.h + at;
    floats().rg_lru(task);
    done += task.steps;
  }
}

// All rows of some channels: part `index` of all heads'.
void run_part(const Layer& layer, int64_t index) {
  const int64_t most = layer.most_columns(), first = index % layer.parts_of_head() * most;
  const int64_t left = layer.block - first;
  Part part = {index / layer.parts_of_head(), first, left < most ? left : most, 0, 0};
  for (; part.row < layer.rows; part.row += kRows) {
    const int64_t rows = layer.rows - part.row;
    part.rows = rows < kRows ? rows : kRows;
    for (const Gate& gate : layer.gates) multiply_gate(layer, gate, part);
    scan(layer, part);
  }
}

// Whether the shapes fit one another; refuses them otherwise.
bool are_right(Context& context, const Tensor& x, const Tensor (&weights)[2],
               const Tensor (&biases)[2], const Tensor& decay, const Tensor& positions,
               const Tensor& state) {
  const int64_t batch = x.dims[0], tokens = x.dims[1], channels = x.dims[2];
  const int64_t heads = weights[0].dims[0], block = weights[0].dims[1];
  const auto refuse = [&](const char* what, const Tensor& found) {
    context.refuse("%s, not %s; x is %s", what, ShapeText(found).text(), ShapeText(x).text());
    return false;
  };
  if (x.rank != 3) return refuse("x must be [batch, tokens, channels]", x);
  for (const Tensor& weight : weights)
    if (!weight.is({heads, block, block}) || heads * block != channels)
      return refuse("weights must be [heads, block, block], and x have heads x block channels",
                    weight);
  for (const Tensor& bias : biases)
    if (!bias.is({heads, block})) return refuse("biases must be [heads, block]", bias);
  if (!decay.is({channels})) return refuse("decay must be [channels]", decay);
  if (!positions.is({batch, tokens}))
    return refuse("position_ids must be [batch, tokens]", positions);
  if (!state.is({batch, channels})) return refuse("state must be [batch, channels]", state);
  return true;
}

}  // namespace

void RgLruScan::run(Context& context) const {
  const Tensor x = context.input(0), weights[2] = {context.input(1), context.input(3)};
  const Tensor biases[2] = {context.input(2), context.input(4)}, decay = context.input(5);
  const Tensor positions = context.input(6), state = context.input(7);
  if (context.refused()) return;
  if (!are_right(context, x, weights, biases, decay, positions, state)) return;

  const int64_t heads = weights[0].dims[0], block = weights[0].dims[1], channels = x.dims[2];
  const int64_t present_dims[] = {x.dims[0], channels};
  float* h = context.output(0, x.dims, 3);
  float* present = context.output(1, present_dims, 2);
  float* results[] = {context.output(2, x.dims, 3), context.output(3, x.dims, 3)};
  if (!h || !present || !results[0] || !results[1]) return;
  const int64_t rows = x.dims[0] * x.dims[1];
  if (x.size() == 0) {  // no token: the state is what it was
    if (present != state.data && state.size() > 0)
      std::memcpy(present, state.data, state.size() * sizeof(float));
    return;
  }

  static Fastest<kStreams> streams;
  const Gate both[] = {{weights[0], biases[0].as<float>(), results[0]},
                       {weights[1], biases[1].as<float>(), results[1]}};
  streams.run(timed_runs_.amount(both[0].bytes() + both[1].bytes(), rows), [&](int way) {
    const Layer layer = {x.dims[1],
                         rows,
                         block,
                         channels,
                         x.as<float>(),
                         decay.as<float>(),
                         state.as<float>(),
                         {both[0], both[1]},
                         positions.as<int64_t>(),
                         h,
                         present,
                         floats().stream[way]};
    Ranges threads(heads * layer.parts_of_head(), 1, processors());
    NextWeights::Next next = next_weights_.begin({{weights[0].data, both[0].bytes()}});
    context.parallel_for(threads.parts(), [&](size_t own) {
      if (!threads.any()) return;
      next.enter();
      const int64_t head = threads.first(own) / layer.parts_of_head();
      for (const Gate& gate : layer.gates) fetch(gate.of_head(head), kAhead);
      threads.run(own, [&](int64_t part, int64_t) { run_part(layer, part); });
      next.fetch(own, threads.parts());
    });
  });
}

}  // namespace rgexport
