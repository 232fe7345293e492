#include <atomic>

#include "attention_tile.h"
#include "ops.h"
#include "scratch.h"

namespace rgexport {
namespace {

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

const char* wrong_positions(const int64_t* positions, const Shape& shape) {
  for (int64_t row = 0; row < shape.batch; ++row, positions += shape.tokens) {
    if (positions[0] < 0) return "LocalAttention: position_ids must not be negative";
    for (int64_t i = 1; i < shape.tokens; ++i)
      if (positions[i] != positions[0] + i)
        return "LocalAttention: position_ids must go up by one from token to token";
  }
  return nullptr;
}

// How the queries of a row are cut.
struct Plan {
  int64_t tokens, lanes;  // of a tile
  int64_t tiles, parts;   // of a row, of a tile

  Plan(const Shape& shape, int64_t vector) {
    const int64_t fit = most(kTileLanes / shape.heads, 1);
    tokens = least(fit < kTokens ? fit : fit / kTokens * kTokens, shape.tokens);
    lanes = parts_of(tokens * shape.heads, vector) * vector;
    tiles = parts_of(shape.tokens, tokens);
    parts = most(least((shape.window + shape.tokens) / kPartKeys, kMostTasks / tiles), 1);
  }
};

// y [tokens · heads, dim] of a row of the batch, a task for each tile; whether there was memory.
bool attend_by_tiles(Context& context, const Plan& plan, const Shape& shape, const Sequence& row,
                     float* y) {
  const FloatKernels& kernels = floats();
  std::atomic<bool> complete{true};
  context.parallel_for(plan.tiles, [&](size_t index) {
    const Scratch scratch((shape.dim + Tile::kScratch) * plan.lanes);
    if (!scratch.data()) return complete.store(false);
    const int64_t first = index * plan.tokens, last = least(first + plan.tokens, shape.tokens);
    const Tile tile(shape, row, first, last, plan.lanes, y + first * shape.heads * shape.dim,
                    scratch.data(), scratch.data() + shape.dim * plan.lanes);
    prepare(kernels, tile);
    attend(kernels, tile, 0, 1);
    for (int64_t lane = 0; lane < tile.count(); ++lane) {
      const float factor = 1 / tile.sum[lane];
      for (int64_t i = 0; i < shape.dim; ++i) tile.y[lane * shape.dim + i] *= factor;
    }
  });
  return complete.load();
}

// The same, a task for each part of the keys of each tile.
bool attend_by_parts(Context& context, const Plan& plan, const Shape& shape, const Sequence& row,
                     float* y) {
  const FloatKernels& kernels = floats();
  // Of a tile: the queries, y of each part, and what else a part needs.
  const int64_t queries = shape.dim * plan.lanes;
  const int64_t y_floats = plan.tokens * shape.heads * shape.dim;
  const int64_t each = Tile::kScratch * plan.lanes;
  const int64_t tile_floats = queries + plan.parts * (y_floats + each);
  const Scratch scratch(plan.tiles * tile_floats);
  if (!scratch.data()) return false;
  const auto part_of = [&](int64_t index, int64_t part) {
    const int64_t first = index * plan.tokens, last = least(first + plan.tokens, shape.tokens);
    float* here = scratch.data() + index * tile_floats;
    float* y = here + queries + part * (last - first) * shape.heads * shape.dim;
    return Tile(shape, row, first, last, plan.lanes, y, here,
                here + queries + plan.parts * y_floats + part * each);
  };
  context.parallel_for(plan.tiles, [&](size_t index) { prepare(kernels, part_of(index, 0)); });
  context.parallel_for(plan.tiles * plan.parts, [&](size_t index) {
    const int64_t part = index % plan.parts;
    attend(kernels, part_of(index / plan.parts, part), part, plan.parts);
  });
  for (int64_t index = 0; index < plan.tiles; ++index) {
    const auto part = [&](int64_t i) { return part_of(index, i); };
    join(kernels, part, plan.parts, y + index * y_floats);
  }
  return true;
}

}  // namespace

LocalAttention::LocalAttention(const Attributes& attributes)
    : heads_(attributes.integer("heads", 1)) {}

const char* LocalAttention::run(Context& context) const {
  const Tensor q = context.input(0), k = context.input(1), v = context.input(2);
  const Tensor past_key = context.input(3), past_value = context.input(4);
  const Tensor positions = context.input(5);
  if (k.rank != 3 || past_key.rank != 3)
    return "LocalAttention: k and past_key must have three dimensions";
  const Shape shape = {k.dims[0], k.dims[1], heads_, k.dims[2], past_key.dims[1]};
  if (heads_ < 1 || q.rank != 3 || q.dims[2] != heads_ * shape.dim ||
      q.size() != k.size() * heads_ || v.size() != k.size())
    return "LocalAttention: q must be [batch, tokens, heads x dim], k and v [batch, tokens, dim]";
  const int64_t ring = shape.window * shape.dim;
  if (shape.window < 1 || past_key.size() != shape.batch * ring ||
      past_key.dims[2] != shape.dim || past_value.size() != past_key.size())
    return "LocalAttention: past_key and past_value must be [batch, window, dim]";
  if (positions.size() != shape.batch * shape.tokens)
    return "LocalAttention: position_ids must be [batch, tokens]";
  if (shape.batch < 1 || shape.tokens < 1) return "LocalAttention: there must be a token";
  const int64_t* at = positions.as<int64_t>();
  if (const char* wrong = wrong_positions(at, shape)) return wrong;

  float* y = context.output(0, q.dims, 3);
  float* present_key = context.output(1, past_key.dims, 3);
  float* present_value = context.output(2, past_key.dims, 3);
  if (!y || !present_key || !present_value) return nullptr;

  const Plan plan(shape, floats().lanes);
  const int64_t step = shape.tokens * shape.dim;
  for (int64_t b = 0; b < shape.batch; ++b) {
    const Sequence row = {q.as<float>() + b * step * heads_, k.as<float>() + b * step,
                          v.as<float>() + b * step,          past_key.as<float>() + b * ring,
                          past_value.as<float>() + b * ring, at[b * shape.tokens]};
    const auto attend_row = plan.parts > 1 ? attend_by_parts : attend_by_tiles;
    if (!attend_row(context, plan, shape, row, y + b * step * heads_))
      return "LocalAttention: out of memory";
    // Only now, since the ring may be the one that was read.
    enter(shape, row.position, row.past_key, row.k, present_key + b * ring);
    enter(shape, row.position, row.past_value, row.v, present_value + b * ring);
  }
  return nullptr;
}

}  // namespace rgexport
