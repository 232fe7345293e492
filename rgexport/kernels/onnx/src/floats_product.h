// The product of two float32 matrices, by tiles of the result that stay in registers.
#pragma once

#include "floats.h"
#include "floats_vector.h"
#include "reading.h"

namespace rgexport {
namespace {

// As many rows as there are registers for their sums: 32, or else 16.
#if defined(__AVX512F__) || defined(__aarch64__)
#define RGEXPORT_TILE_ROWS 8
#else
#define RGEXPORT_TILE_ROWS 4
#endif

constexpr int kTileRows = RGEXPORT_TILE_ROWS;
constexpr int kTileVectors = 2;
constexpr int kTileColumns = kTileVectors * kLanes;

// Rows of b at a time. For many rows of a, so many that a panel of kTileColumns of them stays in
// the first cache; for a few, so few that b is read from memory in one go.
constexpr int64_t kDepth = 256;
constexpr int64_t kStreamDepth = 8;

// From this number of rows on it pays to copy each panel of b to where its rows are side by side.
constexpr int64_t kPackRows = 3 * kTileRows;

struct Tile {
  int64_t depth;
  const float* a;
  int64_t a_row, a_step;
  const float* b;
  int64_t b_step;
  float* c;
  int64_t c_row;
  bool add, in_order;
  const float* ahead;
  int64_t ahead_step;
};

template <int Rows, int Vectors>
void multiply_tile(const Tile& t) {
  Vector sums[Rows][Vectors] = {};
  const auto each = [&](const auto& body) {
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < Vectors; ++j) body(sums[i][j], t.c + i * t.c_row + j * kLanes);
    }
  };
  if (t.add && t.in_order) each([](Vector& sum, const float* c) { sum = load(c); });
  for (int64_t k = 0; k < t.depth; ++k) {
    __builtin_prefetch(t.ahead + k * t.ahead_step);
    Vector b[Vectors];
#pragma GCC unroll 8
    for (int j = 0; j < Vectors; ++j) b[j] = load(t.b + k * t.b_step + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      const Vector a = splat(t.a[i * t.a_row + k * t.a_step]);
#pragma GCC unroll 8
      for (int j = 0; j < Vectors; ++j) sums[i][j] = multiply_add(a, b[j], sums[i][j]);
    }
  }
  // What was summed before is added last: the sum of a long row is one of sums of its parts.
  if (t.add && !t.in_order) each([](Vector& sum, const float* c) { sum = load(c) + sum; });
  each([](const Vector& sum, float* c) { store(c, sum); });
}

using MultiplyTile = void (*)(const Tile&);

template <int Rows>
constexpr MultiplyTile kOfRows[kTileVectors] = {multiply_tile<Rows, 1>, multiply_tile<Rows, 2>};

// By rows - 1.
constexpr const MultiplyTile* kTiles[] = {
    kOfRows<1>, kOfRows<2>, kOfRows<3>, kOfRows<4>,
#if RGEXPORT_TILE_ROWS == 8
    kOfRows<5>, kOfRows<6>, kOfRows<7>, kOfRows<8>,
#endif
};

int64_t row_tiles(const Product& p) { return (p.rows + kTileRows - 1) / kTileRows; }

// Floats to bring near in each step of each tile.
int64_t ahead_step(const Product& p) {
  const int64_t panels = (p.columns + kTileColumns - 1) / kTileColumns;
  const int64_t steps = p.depth * panels * row_tiles(p);
  return p.ahead ? (p.ahead_count + steps - 1) / steps : 0;
}

// Some columns of the product, at most kTileColumns and whole vectors: all rows, in tiles of
// nearly the same number of them.
void multiply_rows(const Product& p, Tile& whole, int64_t vectors) {
  const int64_t tiles = row_tiles(p);
  Tile tile = whole;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t first = p.rows * i / tiles, last = p.rows * (i + 1) / tiles;
    tile.a = whole.a + first * whole.a_row;
    tile.c = whole.c + first * whole.c_row;
    kTiles[last - first - 1][vectors - 1](tile);
    tile.ahead += tile.depth * tile.ahead_step;
  }
  whole.ahead = tile.ahead;
}

// Copies a panel of b of `depth` rows, with zeros after its last column.
template <class Stored>
void pack(const Stored* b, int64_t step, int64_t depth, int64_t columns, float* to) {
  for (int64_t k = 0; k < depth; ++k) {
    for (int64_t j = 0; j < kTileVectors; ++j) {
      const int64_t left = columns - j * kLanes;
      const Vector x = left > 0 ? load(b + k * step + j * kLanes, left) : Vector{};
      store(to + k * kTileColumns + j * kLanes, x);
    }
  }
}

// The last columns, fewer than whole vectors: row by row through a buffer.
void multiply_last(const Product& p, const Tile& whole, int64_t columns) {
  float row[kTileColumns] = {};
  Tile tile = whole;
  tile.c = row;
  for (int64_t i = 0; i < p.rows; ++i) {
    tile.a = whole.a + i * whole.a_row;
    float* c = whole.c + i * whole.c_row;
    for (int64_t j = 0; j < columns && whole.add; ++j) row[j] = c[j];
    multiply_tile<1, kTileVectors>(tile);
    for (int64_t j = 0; j < columns; ++j) c[j] = row[j];
  }
}

void product(const Product& p) {
  alignas(kBytes) float packed[kDepth * kTileColumns];
  const int64_t depth = p.rows < kTileRows ? kStreamDepth : kDepth;
  Tile tile;
  tile.ahead = p.ahead ? p.ahead : p.a;
  tile.ahead_step = ahead_step(p);
  for (int64_t k = 0; k < p.depth; k += depth) {
    for (int64_t first = 0; first < p.columns; first += kTileColumns) {
      tile.depth = p.depth - k < depth ? p.depth - k : depth;
      tile.a = p.a + k * p.a_step;
      tile.a_row = p.a_row;
      tile.a_step = p.a_step;
      tile.c = p.c + first;
      tile.c_row = p.c_row;
      tile.add = p.add || k > 0;
      tile.in_order = p.in_order;
      const int64_t left = p.columns - first;
      const int64_t columns = left < kTileColumns ? left : kTileColumns;
      const bool whole = columns % kLanes == 0;
      const bool apart = p.b_step > kTileColumns && p.rows >= kPackRows;
      const int64_t at = k * p.b_step + first;
      const bool direct = whole && !apart && !p.b_bfloat16;
      tile.b = direct ? p.b + at : packed;
      tile.b_step = direct ? p.b_step : kTileColumns;
      if (p.b_bfloat16) {
        pack(p.b_bfloat16 + at, p.b_step, tile.depth, columns, packed);
      } else if (!direct) {
        pack(p.b + at, p.b_step, tile.depth, columns, packed);
      }
      if (whole) {
        multiply_rows(p, tile, columns / kLanes);
      } else {
        multiply_last(p, tile, columns);
      }
    }
  }
}

// Adds a multiple of a row of b to a row of c.
template <Cache kCache, class Stored>
void add_row(Vector factor, const Stored* b, int64_t columns, float* c) {
  const auto add = [&](int64_t i, int64_t count) {
    fetch_into<kCache>(b + i + kReadAhead / sizeof(Stored));
    store(c + i, multiply_add(factor, load(b + i, count), load(c + i, count)), count);
  };
  int64_t i = 0;
  for (; i + kLanes <= columns; i += kLanes) add(i, kLanes);
  if (i < columns) add(i, columns - i);
}

// Goes once through b, from its first number to its last: read four rows at a time, it comes a
// seventh slower on AMD's Zen 4.
template <Cache kCache, class Stored>
void stream(const Product& p, const Stored* b) {
  for (int64_t row = 0; row < p.rows && !p.add; ++row)
    for (int64_t i = 0; i < p.columns; ++i) p.c[row * p.c_row + i] = 0;
  for (int64_t k = 0; k < p.depth; ++k)
    for (int64_t row = 0; row < p.rows; ++row)
      add_row<kCache>(splat(p.a[row * p.a_row + k * p.a_step]), b + k * p.columns, p.columns,
                      p.c + row * p.c_row);
}
template <Cache kCache>
void stream(const Product& p) {
  p.b_bfloat16 ? stream<kCache>(p, p.b_bfloat16) : stream<kCache>(p, p.b);
}

// `to` [columns, lanes] = factor · from [rows, columns], transposed.
void transpose(const float* from, int64_t rows, int64_t columns, float factor, float* to,
               int64_t lanes) {
  for (int64_t column = 0; column < columns; ++column) {
    float* row = to + column * lanes;
    for (int64_t i = 0; i < rows; ++i) row[i] = factor * from[i * columns + column];
    for (int64_t i = rows; i < lanes; ++i) row[i] = 0;
  }
}

}  // namespace
}  // namespace rgexport
