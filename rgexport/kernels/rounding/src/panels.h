// Products of many rows with one matrix, column by column, in the order of the columns.
#pragma once

#include "numbers.h"

namespace rgexport {
namespace {

constexpr int64_t kRows = 192;   // that share what is read of a matrix
constexpr int64_t kPanel = 64;   // columns that are decided before the rest learns of them
constexpr int64_t kDepth = 256;  // rows of a matrix that are packed together
constexpr int kTileRows = 6, kTileColumns = 16;

// `#pragma GCC unroll` keeps the sums in registers.
template <int kCount>
void tile(float* sums, int64_t sums_stride, const float* factors, int64_t factors_stride,
          const float* matrix, int64_t depth) {
  float kept[kCount][kTileColumns];
#pragma GCC unroll 8
  for (int r = 0; r < kCount; ++r)
    for (int i = 0; i < kTileColumns; ++i) kept[r][i] = sums[r * sums_stride + i];
  for (int64_t j = 0; j < depth; ++j) {
    const float* row = matrix + j * kTileColumns;
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r) {
      const float factor = factors[r * factors_stride + j];
      for (int i = 0; i < kTileColumns; ++i) kept[r][i] = fma(factor, row[i], kept[r][i]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kCount; ++r)
    for (int i = 0; i < kTileColumns; ++i) sums[r * sums_stride + i] = kept[r][i];
}

// A part of a matrix, [kDepth, kTileColumns] without gaps: rows of a matrix lie so far apart that
// caches would not keep them together. Columns that are not there are zeros.
struct Packed {
  alignas(64) float numbers[kDepth * kTileColumns];

  void fill(const float* matrix, int64_t stride, int64_t depth, int64_t width) {
    for (int64_t j = 0; j < depth; ++j)
      for (int64_t i = 0; i < kTileColumns; ++i)
        numbers[j * kTileColumns + i] = i < width ? matrix[j * stride + i] : 0.0f;
  }
};

// The same at the right edge, where there are fewer columns than a tile has.
inline void edge(float* sums, const float* factors, const Packed& part, int64_t depth,
                 int64_t width) {
  float some[kTileColumns] = {};
  for (int64_t i = 0; i < width; ++i) some[i] = sums[i];
  tile<1>(some, 0, factors, 0, part.numbers, depth);
  for (int64_t i = 0; i < width; ++i) sums[i] = some[i];
}

// sums[r][i] += Σ_j factors[r][j] matrix[j][i], each sum in the order of j.
void add_products(float* sums, int64_t sums_stride, const float* factors, int64_t factors_stride,
                  int64_t rows, const float* matrix, int64_t matrix_stride, int64_t depth,
                  int64_t width) {
  Packed part;
  for (int64_t from = 0; from < depth; from += kDepth) {
    const int64_t deep = lesser(depth - from, kDepth);
    for (int64_t left = 0; left < width; left += kTileColumns) {
      const int64_t wide = lesser(width - left, kTileColumns);
      part.fill(matrix + from * matrix_stride + left, matrix_stride, deep, wide);
      const auto own = [&](int64_t r) { return sums + r * sums_stride + left; };
      const auto by = [&](int64_t r) { return factors + r * factors_stride + from; };
      int64_t r = 0;
      for (; wide == kTileColumns && r + kTileRows <= rows; r += kTileRows)
        tile<kTileRows>(own(r), sums_stride, by(r), factors_stride, part.numbers, deep);
      for (; r < rows; ++r) edge(own(r), by(r), part, deep, wide);
    }
  }
}

// Decides kSize columns after another: decide(row, column, sums, factors) sets the factors by which the
// matrix's rows of these columns are then added to the sums of the columns behind them. `sums` are
// [rows, columns]; kPanel is a multiple of kSize, and so is `columns`.
template <int kSize, class Decide>
void in_groups(float* sums, int64_t rows, int64_t columns, const float* matrix,
               const Decide& decide) {
  float factors[kRows * kPanel];
  for (int64_t from = 0; from < columns; from += kPanel) {
    const int64_t wide = lesser(columns - from, kPanel);
    for (int64_t r = 0; r < rows; ++r) {
      float* own = sums + r * columns + from;
      for (int64_t j = 0; j < wide; ++j) {
        float& factor = factors[r * kPanel + j];
        if (j % kSize == 0) decide(r, from + j, own + j, &factor);
        const float* row = matrix + (from + j) * columns + from;
        for (int64_t i = 0; i < wide; ++i) own[i] = fma(factor, row[i], own[i]);
      }
    }
    const int64_t next = from + wide;
    add_products(sums + next, columns, factors, kPanel, rows, matrix + from * columns + next,
                 columns, wide, columns - next);
  }
}

// The same for one column after another: decide(row, column, sum) returns the factor.
template <class Decide>
void in_turn(float* sums, int64_t rows, int64_t columns, const float* matrix,
             const Decide& decide) {
  in_groups<1>(sums, rows, columns, matrix,
               [&](int64_t r, int64_t column, const float* sum, float* factor) {
                 *factor = decide(r, column, *sum);
               });
}

}  // namespace
}  // namespace rgexport
