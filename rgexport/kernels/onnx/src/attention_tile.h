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
constexpr int64_t kMostTasks = 16;   // keys are cut until a row of the batch has so many tasks
constexpr int64_t kPartKeys = 256;   // of a part, about
// The score of a key that is not seen: finite, and a weight of 0 next to any key that is.
constexpr float kUnseen = std::numeric_limits<float>::lowest();

constexpr float kInfinity = std::numeric_limits<float>::infinity();

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t parts_of(int64_t count, int64_t part) { return (count + part - 1) / part; }

struct Shape {
  int64_t batch, tokens, heads, dim, window;
};

// A row of the batch.
struct Sequence {
  const float *q, *k, *v, *past_key, *past_value;
  int64_t position;  // of its first token
  // Whether queries also meet the keys that they do not see, as in the graph that is this op's body:
  // with minus infinity added to their scores. Only what is not a number makes a difference to that.
  bool sees_all;
};

// Keys that lie side by side in memory, and their values.
struct Keys {
  int64_t first, count;
  const float *k, *v;
};

// The block of keys from c on that lie side by side and come before `end`.
Keys keys_from(const Shape& shape, const Sequence& row, int64_t c, int64_t end) {
  const int64_t limit = least(kKeys, end - c);
  if (limit <= 0) return {c, 0, nullptr, nullptr};
  if (c >= shape.window) {
    const int64_t at = (c - shape.window) * shape.dim;
    return {c, limit, row.k + at, row.v + at};
  }
  const int64_t slot = (row.position + c) % shape.window;
  const int64_t count = least(limit, shape.window - most(slot, c));
  return {c, count, row.past_key + slot * shape.dim, row.past_value + slot * shape.dim};
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
  kernels.product({keys.count, tile.lanes, dim, keys.k, dim, 1, tile.queries, tile.lanes,
                   tile.scores, tile.lanes, false, keys.v, keys.count * dim});
  if (keys.first < tile.last - 1 || keys.first + keys.count - 1 > tile.first + tile.shape.window)
    mask(tile, keys);
  if (kernels.softmax(tile.scores, keys.count, {tile.lanes, tile.largest, tile.sum}, tile.rescale))
    rescale(tile);
  kernels.product({tile.count(), dim, keys.count, tile.scores, 1, tile.lanes, keys.v, dim, tile.y,
                   dim, true, next.k, next.count * dim});
}

// Attends to part `part` of `parts` of the keys that any query of the tile sees.
void attend(const FloatKernels& kernels, const Tile& tile, int64_t part, int64_t parts) {
  const Shape& shape = tile.shape;
  const bool all = tile.row.sees_all;
  const int64_t begin = most(all ? 0 : tile.first, shape.window - tile.row.position);
  const int64_t end = shape.window + (all ? shape.tokens : tile.last);
  const int64_t blocks = parts_of(end - begin, kKeys);
  const int64_t first = begin + blocks * part / parts * kKeys;
  const int64_t last = least(begin + blocks * (part + 1) / parts * kKeys, end);
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
    float factors[kMostTasks], largest = kUnseen, sum = 0;
    for (int64_t i = 0; i < count; ++i) largest = std::fmax(largest, part(i).largest[lane]);
    for (int64_t i = 0; i < count; ++i) {
      factors[i] = std::exp(part(i).largest[lane] - largest);
      sum += factors[i] * part(i).sum[lane];
    }
    sum = sum_of_weights(largest, sum);
    for (int64_t i = 0; i < count; ++i) factors[i] /= sum;
    kernels.product({1, dim, count, factors, count, 1, tile.y + lane * dim, queries * dim,
                     y + lane * dim, dim, false});
  }
}

}  // namespace
}  // namespace rgexport
