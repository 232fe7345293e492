// The levels of one row of a grid.
#pragma once

#include "kernels.h"
#include "numbers.h"

namespace rgexport {
namespace {

struct EvenLevels {
  const float *scale, *offset;
  int64_t group;
  float top;

  EvenLevels(const Grid& grid, int64_t row)
      : scale(grid.scale + row * grid.groups()), offset(grid.offset + row * grid.groups()),
        group(grid.group), top(grid.top) {}
  float value(int64_t column, uint8_t level) const {
    const int64_t g = column / group;
    return fma(scale[g], static_cast<float>(level), offset[g]);
  }
  uint8_t nearest(int64_t column, float weight) const {
    const int64_t g = column / group;
    // A scale of 0 has all levels in one place, and any will do.
    const float level = scale[g] == 0 ? 0.0f : (weight - offset[g]) / scale[g];
    return static_cast<uint8_t>(whole_number(limited(level, 0, top)));
  }
};

struct TableLevels {
  const float* table;
  int last;

  TableLevels(const Grid& grid, int64_t row)
      : table(grid.table + row * (static_cast<int64_t>(grid.top) + 1)),
        last(static_cast<int>(grid.top)) {}
  float value(int64_t, uint8_t level) const { return table[level]; }
  uint8_t nearest(int64_t, float weight) const {
    int level = 0;
    for (int i = 0; i < last; ++i) level += weight > table[i] + (table[i + 1] - table[i]) / 2;
    return static_cast<uint8_t>(level);
  }
};

}  // namespace
}  // namespace rgexport
