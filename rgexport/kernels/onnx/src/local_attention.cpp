#include <atomic>
#include <cinttypes>
#include <memory>
#include <new>

#include "attention_tile.h"
#include "ops.h"
#include "scratch.h"

namespace rgexport {
namespace {

// A ring that nothing enters.
void keep(const Tensor& past, float* present) {
  if (present != past.data && past.size() > 0)
    std::memcpy(present, past.data, past.size() * sizeof(float));
}

// The ring of a row after the step: the last `window` keys of it are in their slots.
void enter(const Shape& shape, int64_t position, const float* past, const float* added,
           float* present) {
  const int64_t row = shape.dim * sizeof(float);
  if (present != past) std::memcpy(present, past, shape.window * row);
  for (int64_t i = most(0, shape.tokens - shape.window); i < shape.tokens; ++i) {
    const int64_t slot = (position + i) % shape.window;
    std::memcpy(present + slot * shape.dim, added + i * shape.dim, row);
  }
}

// Whether positions go up from where slots and distances can be computed; refuses them otherwise.
bool are_positions(Context& context, const int64_t* positions, const Shape& shape) {
  constexpr int64_t kMost = int64_t{1} << 62;
  for (int64_t row = 0; row < shape.batch; ++row, positions += shape.tokens) {
    if (positions[0] < 0 || positions[0] > kMost)
      context.refuse("position_ids must not be negative, nor above 2^62, but there is %" PRId64,
                     positions[0]);
    for (int64_t i = 1; i < shape.tokens && !context.refused(); ++i)
      if (positions[i] != positions[0] + i)
        context.refuse("position_ids must go up by one from token to token, but %" PRId64
                       " comes after %" PRId64,
                       positions[i], positions[i - 1]);
    if (context.refused()) return false;
  }
  return true;
}

// Whether all are numbers, and none is infinite.
bool are_finite(const float* x, int64_t count) {
  constexpr uint32_t kExponent = 0x7f800000;
  uint32_t found = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    found |= (bits & kExponent) == kExponent;
  }
  return !found;
}

// How the queries of a row are cut.
struct Plan {
  int64_t tokens, lanes;     // of a tile
  int64_t tiles;             // of a row
  int64_t parts, part_keys;  // of a tile, of a part

  Plan(const Shape& shape, int64_t vector) {
    const int64_t fit = most(kTileLanes / shape.heads, 1);
    tokens = least(fit < kTokens ? fit : fit / kTokens * kTokens, shape.tokens);
    lanes = parts_of(tokens * shape.heads, vector) * vector;
    tiles = parts_of(shape.tokens, tokens);
    // What few tokens have for parts is the same for each number of them.
    const int64_t keys = shape.few() ? shape.window : shape.window + shape.tokens;
    const int64_t tasks = shape.few() ? kMostTasks : kMostTasks / tiles;
    const int64_t whole = most(least(keys / kPartKeys, tasks), 1);
    const bool cut = shape.few() || whole > 1;
    part_keys = cut ? parts_of(parts_of(keys, whole), kKeys) * kKeys : INT64_MAX;
    parts = cut ? (shape.window + shape.tokens - 2) / part_keys + 2 : 1;
  }
};

// Some rows of the batch.
struct Rows {
  Sequence* first;
  int64_t count;
};

// y of all rows, a task for each tile; whether there was memory.
bool attend_by_tiles(Context& context, const Plan& plan, const Shape& shape, const Rows& rows) {
  const FloatKernels& kernels = floats();
  std::atomic<bool> complete{true};
  context.parallel_for(rows.count * plan.tiles, [&](size_t index) {
    const Scratch scratch(Size(shape.dim + Tile::kScratch) * plan.lanes);
    if (!scratch.data()) return complete.store(false);
    const Sequence& row = rows.first[index / plan.tiles];
    const int64_t first = index % plan.tiles * plan.tokens;
    const int64_t last = least(first + plan.tokens, shape.tokens);
    const Tile tile(shape, row, first, last, plan.lanes, row.y + first * shape.heads * shape.dim,
                    scratch.data(), scratch.data() + shape.dim * plan.lanes);
    prepare(kernels, tile);
    attend(kernels, tile, 0, plan.part_keys);
    for (int64_t lane = 0; lane < tile.count(); ++lane) {
      const float factor = 1 / sum_of_weights(tile.largest[lane], tile.sum[lane]);
      for (int64_t i = 0; i < shape.dim; ++i) tile.y[lane * shape.dim + i] *= factor;
    }
  });
  return complete.load();
}

// The same, a task for each part of the keys of each tile.
bool attend_by_parts(Context& context, const Plan& plan, const Shape& shape, const Rows& rows) {
  const FloatKernels& kernels = floats();
  const int64_t tiles = rows.count * plan.tiles;
  // Of a tile: the queries, y of each part, and what else a part needs.
  const int64_t queries = shape.dim * plan.lanes;
  const int64_t y_floats = plan.tokens * shape.heads * shape.dim;
  const int64_t each = Tile::kScratch * plan.lanes;
  const int64_t tile_floats = queries + plan.parts * (y_floats + each);
  const Scratch scratch(Size(tiles) * tile_floats);
  const int64_t seam_floats = shape.few() ? 2 * kKeys * shape.dim : 0;
  const Scratch seams(Size(rows.count) * seam_floats);
  if (!scratch.data() || !seams.data()) return false;
  const auto part_of = [&](int64_t index, int64_t part) {
    const Sequence& row = rows.first[index / plan.tiles];
    const int64_t first = index % plan.tiles * plan.tokens;
    const int64_t last = least(first + plan.tokens, shape.tokens);
    float* here = scratch.data() + index * tile_floats;
    float* y = here + queries + part * (last - first) * shape.heads * shape.dim;
    return Tile(shape, row, first, last, plan.lanes, y, here,
                here + queries + plan.parts * y_floats + part * each);
  };
  context.parallel_for(tiles, [&](size_t index) {
    const int64_t row = index / plan.tiles;
    if (shape.few() && index % plan.tiles == 0)
      sew(shape, rows.first[row], seams.data() + row * seam_floats);
    prepare(kernels, part_of(index, 0));
  });
  context.parallel_for(tiles * plan.parts, [&](size_t index) {
    const int64_t part = index % plan.parts;
    attend(kernels, part_of(index / plan.parts, part), part, plan.part_keys);
  });
  for (int64_t index = 0; index < tiles; ++index) {
    const auto part = [&](int64_t i) { return part_of(index, i); };
    join(kernels, part, plan.parts,
         rows.first[index / plan.tiles].y + index % plan.tiles * y_floats);
  }
  return true;
}

// The size of the axis before the last one.
int64_t window_of(const Tensor& ring) { return ring.rank < 2 ? 0 : ring.dims[ring.rank - 2]; }

// Whether the shapes fit one another and there is something to attend to; refuses them otherwise.
// The number of heads is held against what q has of them: it is multiplied by nothing before.
bool are_right(Context& context, const Tensor (&inputs)[6], int64_t heads) {
  const Tensor &q = inputs[0], &k = inputs[1], &v = inputs[2];
  const Tensor &past_key = inputs[3], &past_value = inputs[4], &positions = inputs[5];
  const auto refuse = [&](const char* what, const Tensor& found) {
    context.refuse("%s, not %s; k is %s, past_key %s, heads %" PRId64, what,
                   ShapeText(found).text(), ShapeText(k).text(), ShapeText(past_key).text(), heads);
    return false;
  };
  if (k.rank != 3 || k.dims[2] < 1) return refuse("k must be [batch, tokens, dim]", k);
  const int64_t batch = k.dims[0], tokens = k.dims[1], dim = k.dims[2],
                window = window_of(past_key);
  if (heads < 1 || q.rank != 3 || q.dims[2] % dim != 0 || q.dims[2] / dim != heads ||
      !q.is({batch, tokens, q.dims[2]}))
    return refuse("q must be [batch, tokens, heads x dim]", q);
  if (!v.has_shape_of(k)) return refuse("v must be as k", v);
  if (!(past_key.is({batch, 1, window, dim}) || past_key.is({batch, window, dim})) || window < 1)
    return refuse("past_key must be [batch, 1, window, dim]", past_key);
  if (!past_value.has_shape_of(past_key))
    return refuse("past_value must be as past_key", past_value);
  if (!positions.is({batch, tokens}))
    return refuse("position_ids must be [batch, tokens]", positions);
  return true;
}

}  // namespace

LocalAttention::LocalAttention(const Attributes& attributes)
    : heads_(attributes.integer("heads", 1)) {}

void LocalAttention::run(Context& context) const {
  const Tensor inputs[6] = {context.input(0), context.input(1), context.input(2),
                            context.input(3), context.input(4), context.input(5)};
  const auto& [q, k, v, past_key, past_value, positions] = inputs;
  if (context.refused() || !are_right(context, inputs, heads_)) return;
  const Shape shape = {k.dims[0], k.dims[1], heads_, k.dims[2], window_of(past_key)};
  const int64_t* at = positions.as<int64_t>();
  if (shape.tokens > 0 && !are_positions(context, at, shape)) return;

  float* y = context.output(0, q.dims, 3);
  float* present_key = context.output(1, past_key.dims, past_key.rank);
  float* present_value = context.output(2, past_key.dims, past_key.rank);
  if (!y || !present_key || !present_value) return;

  const int64_t ring = shape.window * shape.dim, step = shape.tokens * shape.dim;
  if (shape.tokens == 0) {
    keep(past_key, present_key);
    keep(past_value, present_value);
    return;
  }
  const Plan plan(shape, floats().lanes);
  const auto attend_rows = plan.parts > 1 ? attend_by_parts : attend_by_tiles;
  const std::unique_ptr<Sequence[]> rows(new (std::nothrow) Sequence[shape.batch]);
  for (int64_t b = 0; b < shape.batch && rows; ++b)
    rows[b] = {q.as<float>() + b * step * heads_,
               k.as<float>() + b * step,
               v.as<float>() + b * step,
               past_key.as<float>() + b * ring,
               past_value.as<float>() + b * ring,
               y + b * step * heads_,
               at[b * shape.tokens]};
  bool enough = rows && attend_rows(context, plan, shape, {rows.get(), shape.batch});
  for (int64_t b = 0; b < shape.batch && enough; ++b) {
    Sequence& row = rows[b];
    if (shape.tokens > 1 && !(are_finite(row.y, step * heads_) && are_finite(row.k, step))) {
      row.sees_all = true;
      enough = attend_rows(context, plan, shape, {&row, 1});
    }
    if (!enough) break;
    // Only now, since the ring may be the one that was read.
    enter(shape, row.position, row.past_key, row.k, present_key + b * ring);
    enter(shape, row.position, row.past_value, row.v, present_value + b * ring);
  }
  if (!enough) context.refuse("out of memory for %" PRId64 " tokens", shape.tokens);
}

}  // namespace rgexport
