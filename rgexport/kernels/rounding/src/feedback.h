// Levels by error feedback: each weight makes up for what those before it were off by.
#pragma once

#include "grid.h"
#include "panels.h"

namespace rgexport {
namespace {

// `choose(row, levels, column, target)` gives the level of a weight whose best value is `target`.
template <class Levels, class Choose>
void feed_back(const float* weights, int64_t rows, const Grid& grid, const float* m, const float* d,
               double* loss, const Choose& choose) {
  const int64_t columns = grid.columns;
  Memory<float> sums(kRows * columns);
  for (int64_t first = 0; first < rows; first += kRows) {
    const int64_t count = lesser(rows - first, kRows);
    sums.clear();
    for (int64_t r = 0; r < count; ++r) loss[first + r] = 0;
    in_turn(sums.data(), count, columns, m, [&](int64_t r, int64_t column, float sum) {
      const int64_t row = first + r;
      const float weight = weights[row * columns + column], target = weight + sum;
      const Levels levels(grid, row);
      const float value = levels.value(column, choose(row, levels, column, target));
      const double off = static_cast<double>(target) - value;
      loss[row] += off * off * d[column];
      return weight - value;
    });
  }
}

template <class Levels>
void feedback_on(const float* weights, int64_t rows, const Grid& grid, const float* m,
                 const float* d, uint8_t* levels, double* loss) {
  feed_back<Levels>(weights, rows, grid, m, d, loss,
                    [&](int64_t row, const Levels& own, int64_t column, float target) {
                      return levels[row * grid.columns + column] = own.nearest(column, target);
                    });
}

template <class Levels>
void loss_on(const float* weights, int64_t rows, const Grid& grid, const float* m, const float* d,
             const uint8_t* levels, double* loss) {
  feed_back<Levels>(weights, rows, grid, m, d, loss,
                    [&](int64_t row, const Levels&, int64_t column, float) {
                      return levels[row * grid.columns + column];
                    });
}

void feedback(const float* weights, int64_t rows, Grid grid, const float* m, const float* d,
              uint8_t* levels, double* loss) {
  (grid.table ? feedback_on<TableLevels> : feedback_on<EvenLevels>)(weights, rows, grid, m, d,
                                                                    levels, loss);
}

void loss(const float* weights, int64_t rows, Grid grid, const float* m, const float* d,
          const uint8_t* levels, double* loss) {
  (grid.table ? loss_on<TableLevels> : loss_on<EvenLevels>)(weights, rows, grid, m, d, levels,
                                                            loss);
}

}  // namespace
}  // namespace rgexport
