// Attention to a ring of past keys and to the step's own, without a matrix of all scores.
//
// Number the keys of a row by c = 0 … window + tokens - 1: first the `window` positions before the
// step, then the step's own. Query i then sees c = i … i + window, less those before position 0;
// and key c < window lies in slot (position of the step + c) modulo window of the ring.
//
// Queries are taken in tiles: some tokens with all their heads, which share the keys, side by side
// as lanes of vectors. A tile goes through its keys block by block with the largest score and the
// sum of weights so far (the online softmax of arXiv 1805.02867). Where there are few tiles to share
// among threads, the keys of each are cut into parts that are joined at the end.
//
// Where blocks and parts begin depends on the positions of keys, not on where a step begins. So a
// token of a short step gives the bits that it gives in a step of its own: the same keys are summed
// in the same order, and keys that it does not see add zeros.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "floats.h"
#include "next_weights.h"

namespace rgexport {
namespace {

constexpr int64_t kKeys = 32;        // of a block
constexpr int64_t kTileLanes = 128;  // of a tile, unless one token has more heads
constexpr int64_t kTokens = 8;       // of a tile, a multiple of this where that many fit
constexpr int64_t kMostTasks = 14;   // keys are cut until there are so many for a row, or a tile
constexpr int64_t kMostParts = kMostTasks + 2;  // of a tile: the first and the last may be short
constexpr int64_t kPartKeys = 256;              // of a part, about
// The score of a key that is not seen: finite, and a weight of 0 next to any key that is.
constexpr float kUnseen = std::numeric_limits<float>::lowest();

constexpr float kInfinity = std::numeric_limits<float>::infinity();

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t parts_of(int64_t count, int64_t part) { return (count + part - 1) / part; }

struct Shape {
  int64_t batch, tokens, heads, dim, window;

  bool few() const { return tokens <= kEachAlone; }
};

// A row of the batch.
struct Sequence {
  const float *q, *k, *v, *past_key, *past_value;
  float* y;          // [tokens · heads, dim]
  int64_t position;  // of its first token
  // Whether queries also meet the keys that they do not see, as in the graph that is this op's body:
  // with minus infinity added to their scores. Only what is not a number makes a difference to that.
  bool sees_all;
  // Of few tokens: the keys from number `seam` on to the end of their block, in which the ring ends
  // and the step begins, copied to lie side by side.
  int64_t seam;
  const float *seam_key, *seam_value;
};

// Keys that lie side by side in memory, and their values.
struct Keys {
  int64_t first, count;
  const float *k, *v;
};

// The number of the key that begins the block of key c. Blocks are cut at positions that are a
// multiple of kKeys, and where the ring begins anew, plus the window.
int64_t block_of(const Shape& shape, const Sequence& row, int64_t c) {
  const int64_t at = row.position + c;
  return most(at / kKeys * kKeys, at / shape.window * shape.window) - row.position;
}

int64_t next_block(const Shape& shape, const Sequence& row, int64_t c) {
  const int64_t at = row.position + c;
  return least((at / kKeys + 1) * kKeys, (at / shape.window + 1) * shape.window) - row.position;
}

// What is left of the block of key c before `end`.
Keys keys_from(const Shape& shape, const Sequence& row, int64_t c, int64_t end) {
  const int64_t last = least(next_block(shape, row, c), end);
  if (c >= last) return {c, 0, nullptr, nullptr};
  if (row.seam_key && c >= row.seam && c < shape.window) {
    const int64_t at = (c - row.seam) * shape.dim;
    return {c, last - c, row.seam_key + at, row.seam_value + at};
  }
  if (c >= shape.window) {
    const int64_t at = (c - shape.window) * shape.dim;
    return {c, last - c, row.k + at, row.v + at};
  }
  const int64_t slot = (row.position + c) % shape.window, count = least(last, shape.window) - c;
  return {c, count, row.past_key + slot * shape.dim, row.past_value + slot * shape.dim};
}

// Copies the block in which the ring ends and the step begins, if there is one, to `to`, which has
// room for kKeys keys and as many values.
void sew(const Shape& shape, Sequence& row, float* to) {
  const int64_t window = shape.window;
  const int64_t oldest = most(0, window - row.position);  // others are before the first token
  row.seam = most(block_of(shape, row, window), oldest);
  if (row.seam >= window) return;
  const int64_t old = window - row.seam;
  const int64_t added = least(next_block(shape, row, window), window + shape.tokens) - window;
  const int64_t slot = (row.position + row.seam) % window * shape.dim;
  float* value = to + kKeys * shape.dim;
  const auto copy = [&](float* at, const float* past, const float* now) {
    std::memcpy(at, past + slot, old * shape.dim * sizeof(float));
    std::memcpy(at + old * shape.dim, now, added * shape.dim * sizeof(float));
  };
  copy(to, row.past_key, row.k);
  copy(value, row.past_value, row.v);
  row.seam_key = to;
  row.seam_value = value;
}

// Some queries of a row with what they have attended to: lane = token · heads + head.
struct Tile {
  const Shape& shape;
  const Sequence& row;
  int64_t first, last;             // tokens
  int64_t lanes;                   // padded to whole vectors
  float* y;                        // [count, dim]: Σ weight · value
  float* queries;                  // [dim, lanes], see prepare()
  float* scores;                   // [kKeys, lanes]
  float *largest, *sum, *rescale;  // [lanes]

  // `queries` has dim · lanes floats of room, `scratch` kScratch · lanes.
  static constexpr int64_t kScratch = kKeys + 3;
  Tile(const Shape& shape, const Sequence& row, int64_t first, int64_t last, int64_t lanes,
       float* y, float* queries, float* scratch)
      : shape(shape), row(row), first(first), last(last), lanes(lanes), y(y), queries(queries),
        scores(scratch), largest(scores + kKeys * lanes), sum(largest + lanes),
        rescale(sum + lanes) {}

  int64_t count() const { return (last - first) * shape.heads; }
};

// Writes the queries of a tile, side by side and times dim ^ -0.5.
void prepare(const FloatKernels& kernels, const Tile& tile) {
  const int64_t dim = tile.shape.dim;
  kernels.transpose(tile.row.q + tile.first * tile.shape.heads * dim, tile.count(), dim,
                    1.0f / std::sqrt(static_cast<float>(dim)), tile.queries, tile.lanes);
}

// Hides the keys of a block that a query does not see.
void mask(const Tile& tile, const Keys& keys) {
  for (int64_t i = tile.first; i < tile.last; ++i)
    for (int64_t key = 0; key < keys.count; ++key) {
      const int64_t distance = keys.first + key - i;
      if (distance >= 0 && distance <= tile.shape.window) continue;
      float* scores = tile.scores + key * tile.lanes + (i - tile.first) * tile.shape.heads;
      for (int64_t head = 0; head < tile.shape.heads; ++head)
        scores[head] = tile.row.sees_all ? scores[head] - kInfinity : kUnseen;
    }
}

void rescale(const Tile& tile) {
  for (int64_t lane = 0; lane < tile.count(); ++lane) {
    const float factor = tile.rescale[lane];
    float* y = tile.y + lane * tile.shape.dim;
    if (factor == 1) continue;
    for (int64_t i = 0; i < tile.shape.dim; ++i) y[i] *= factor;
  }
}

void attend_block(const FloatKernels& kernels, const Tile& tile, const Keys& keys,
                  const Keys& next) {
  const int64_t dim = tile.shape.dim;
  const bool in_order = tile.shape.few();
  kernels.product({keys.count, tile.lanes, dim, keys.k, dim, 1, tile.queries, tile.lanes,
                   tile.scores, tile.lanes, false, keys.v, keys.count * dim, in_order});
  if (keys.first < tile.last - 1 || keys.first + keys.count - 1 > tile.first + tile.shape.window)
    mask(tile, keys);
  if (kernels.softmax(tile.scores, keys.count, {tile.lanes, tile.largest, tile.sum}, tile.rescale))
    rescale(tile);
  kernels.product({tile.count(), dim, keys.count, tile.scores, 1, tile.lanes, keys.v, dim, tile.y,
                   dim, true, next.k, next.count * dim, in_order});
}

// Attends to part `part`, of `part_keys`, of the keys that any query of the tile sees.
void attend(const FloatKernels& kernels, const Tile& tile, int64_t part, int64_t part_keys) {
  const Shape& shape = tile.shape;
  const bool all = tile.row.sees_all;
  const int64_t begin = most(all ? 0 : tile.first, shape.window - tile.row.position);
  const int64_t end = shape.window + (all ? shape.tokens : tile.last);
  const int64_t position = tile.row.position, index = (position + begin) / part_keys + part;
  const int64_t first = most(index * part_keys - position, begin);
  const int64_t last = least((index + 1) * part_keys - position, end);
  for (int64_t lane = 0; lane < tile.lanes; ++lane) {
    tile.largest[lane] = kUnseen;
    tile.sum[lane] = 0;
  }
  std::memset(tile.y, 0, tile.count() * shape.dim * sizeof(float));
  if (first >= last) return;
  Keys keys = keys_from(shape, tile.row, first, last);
  fetch(keys.k, keys.count * shape.dim * sizeof(float));  // those of later blocks are, meanwhile
  while (keys.count > 0) {
    const Keys next = keys_from(shape, tile.row, keys.first + keys.count, last);
    attend_block(kernels, tile, keys, next);
    keys = next;
  }
}

// What the sum of a query's weights is, if one of its keys has a score above minus infinity; otherwise
// NaN, as of a softmax: only keys that it does not see may have been weighed.
float sum_of_weights(float largest, float sum) {
  return largest == kUnseen ? std::numeric_limits<float>::quiet_NaN() : sum;
}

// y of all queries of a tile from its parts, whose own y lie one after another.
template <class Parts>
void join(const FloatKernels& kernels, const Parts& part, int64_t count, float* y) {
  const Tile tile = part(0);
  const int64_t dim = tile.shape.dim, queries = tile.count();
  for (int64_t lane = 0; lane < queries; ++lane) {
    float factors[kMostParts], largest = kUnseen, sum = 0;
    for (int64_t i = 0; i < count; ++i) largest = std::fmax(largest, part(i).largest[lane]);
    for (int64_t i = 0; i < count; ++i) {
      factors[i] = std::exp(part(i).largest[lane] - largest);
      sum += factors[i] * part(i).sum[lane];
    }
    sum = sum_of_weights(largest, sum);
    for (int64_t i = 0; i < count; ++i) factors[i] /= sum;
    kernels.product({1, dim, count, factors, count, 1, tile.y + lane * dim, queries * dim,
                     y + lane * dim, dim, false, nullptr, 0, tile.shape.few()});
  }
}

}  // namespace
}  // namespace rgexport
