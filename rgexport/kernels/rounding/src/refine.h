// Scales fitted to levels, and levels to one another, by the loss (w - v) H (w - v)'.
#pragma once

#include "grid.h"
#include "panels.h"

namespace rgexport {
namespace {

// The scales of a row's blocks that give the least loss: A s = b, with A[g][f] = u_g H u_f' and
// b[g] = u_g H w', u_g being the levels of block g less its zero point. Of A, the lower triangle is
// read.
class ScaleFit {
 public:
  explicit ScaleFit(int64_t groups)
      : groups_(groups), factors_(groups * groups), column_(groups), s_(groups), fitted_(groups) {}

  // `scale` changes only if what is stored has less loss.
  void apply(const double* a, const double* b, float* scale, const float* zero, float top,
             bool half) {
    if (!solve(a, b)) return;
    for (int64_t g = 0; g < groups_; ++g) {
      const float found = stored(static_cast<float>(s_[g]), half), size = size_of(found);
      const float reach = top - zero[g] > zero[g] ? top - zero[g] : zero[g];
      const bool fits = size >= kTiny && size <= (half ? kHalfMost / reach : kHuge);
      fitted_[g] = fits && a[g * groups_ + g] > 0 ? found : scale[g];
    }
    if (loss(a, b, fitted_.data()) < loss(a, b, scale))
      for (int64_t g = 0; g < groups_; ++g) scale[g] = fitted_[g];
  }

 private:
  // s A s' - 2 b s': the loss but for what scales do not change.
  double loss(const double* a, const double* b, const float* s) const {
    double sum = 0;
    for (int64_t g = 0; g < groups_; ++g) {
      double row = -b[g];
      for (int64_t f = 0; f < g; ++f) row += a[g * groups_ + f] * s[f];
      sum += s[g] * (2 * row + a[g * groups_ + g] * s[g]);
    }
    return sum;
  }

  // By Cholesky's factors. A block of zeros has a scale without effect.
  bool solve(const double* a, const double* b) {
    for (int64_t i = 0; i < groups_ * groups_; ++i) factors_[i] = a[i];
    for (int64_t g = 0; g < groups_; ++g) {
      double* row = factors(g);
      if (a[g * groups_ + g] == 0) row[g] = 1;
      if (!(row[g] > 0)) return false;
      row[g] = __builtin_sqrt(row[g]);
      for (int64_t i = g + 1; i < groups_; ++i) column_[i] = factors(i)[g] /= row[g];
      for (int64_t i = g + 1; i < groups_; ++i)
        for (int64_t j = g + 1; j <= i; ++j) factors(i)[j] -= column_[i] * column_[j];
    }
    for (int64_t g = 0; g < groups_; ++g) {
      double sum = b[g];
      for (int64_t e = 0; e < g; ++e) sum -= factors(g)[e] * s_[e];
      s_[g] = sum / factors(g)[g];
    }
    for (int64_t g = groups_ - 1; g >= 0; --g) {
      double sum = s_[g];
      for (int64_t e = g + 1; e < groups_; ++e) sum -= factors(e)[g] * s_[e];
      s_[g] = sum / factors(g)[g];
    }
    return true;
  }

  double* factors(int64_t g) const { return factors_.data() + g * groups_; }

  const int64_t groups_;
  const Memory<double> factors_, column_, s_;
  const Memory<float> fitted_;
};

constexpr int64_t kFitBytes = 16 << 20;  // for A of the rows that are fitted together

// How many rows are fitted together.
int64_t rows_to_fit(const Grid& grid) {
  const int64_t held = kFitBytes / (grid.groups() * grid.groups() * sizeof(double));
  return lesser(kRows, held < kTileRows ? kTileRows : held);
}

// Fits the scales of `rows` rows.
void fit_scales(const float* weights, int64_t rows, const Grid& grid, float* scale,
                const float* zero, bool half, const float* h, const uint8_t* levels) {
  const int64_t columns = grid.columns, groups = grid.groups(), squares = groups * groups;
  const Memory<float> u(rows * columns);
  Memory<float> products(rows * columns);
  const Memory<double> a(rows * squares), b(rows * groups);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c)
      u[r * columns + c] = levels[r * columns + c] - zero[r * groups + c / grid.group];
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t from = g * grid.group;
    products.clear();
    add_products(products.data(), columns, u.data() + from, columns, rows, h + from * columns,
                 columns, lesser(columns - from, grid.group), columns);
    for (int64_t r = 0; r < rows; ++r) {
      const float *row = products.data() + r * columns, *own = u.data() + r * columns;
      for (int64_t f = 0; f <= g; ++f) {
        const int64_t start = f * grid.group;
        a[r * squares + g * groups + f] =
            dot(own + start, row + start, lesser(columns - start, grid.group));
      }
      b[r * groups + g] = dot(weights + r * columns, row, columns);
    }
  }
  ScaleFit fit(groups);
  for (int64_t r = 0; r < rows; ++r)
    fit.apply(a.data() + r * squares, b.data() + r * groups, scale + r * groups, zero + r * groups,
              grid.top, half);
}

void fit_all_scales(const float* weights, int64_t rows, const Grid& grid, float* scale,
                    const float* zero, bool half, const float* h, const uint8_t* levels) {
  const int64_t step = rows_to_fit(grid), groups = grid.groups(), columns = grid.columns;
  for (int64_t first = 0; first < rows; first += step)
    fit_scales(weights + first * columns, lesser(step, rows - first), grid, scale + first * groups,
               zero + first * groups, half, h, levels + first * columns);
}

// One sweep of coordinate descent over `rows` rows, at most kRows.
template <class Levels>
void descend(const float* weights, int64_t rows, const Grid& grid, const float* h,
             uint8_t* levels) {
  const int64_t columns = grid.columns;
  const Memory<float> off(rows * columns), pull(rows * columns);
  for (int64_t r = 0; r < rows; ++r) {
    const Levels own(grid, r);
    for (int64_t c = 0; c < columns; ++c)
      off[r * columns + c] = weights[r * columns + c] - own.value(c, levels[r * columns + c]);
  }
  add_products(pull.data(), columns, off.data(), columns, rows, h, columns, columns, columns);
  in_turn(pull.data(), rows, columns, h, [&](int64_t r, int64_t column, float sum) {
    const Levels own(grid, r);
    uint8_t& level = levels[r * columns + column];
    const float value = own.value(column, level), curvature = h[column * columns + column];
    if (!(curvature > 0)) return 0.0f;
    const uint8_t better = own.nearest(column, value + sum / curvature);
    const float change = own.value(column, better) - value;
    if (!(change * (change * curvature - 2 * sum) < 0)) return 0.0f;
    level = better;
    return -change;
  });
}

void refine(const float* weights, int64_t rows, Grid grid, const float* zeros, bool half,
            const float* h, int rounds, uint8_t* levels) {
  const int64_t groups = grid.groups();
  for (int64_t first = 0; first < rows; first += kRows) {
    const int64_t count = lesser(rows - first, kRows);
    const float* w = weights + first * grid.columns;
    uint8_t* q = levels + first * grid.columns;
    Grid part = grid;
    if (grid.table) {
      part.table += first * (static_cast<int64_t>(grid.top) + 1);
      for (int i = 0; i < rounds; ++i) descend<TableLevels>(w, count, part, h, q);
      continue;
    }
    float* scale = const_cast<float*>(grid.scale) + first * groups;
    float* offset = const_cast<float*>(grid.offset) + first * groups;
    part.scale = scale, part.offset = offset;
    for (int i = 0; i < rounds; ++i) {
      if (zeros) {
        const float* zero = zeros + first * groups;
        fit_all_scales(w, count, grid, scale, zero, half, h, q);
        for (int64_t g = 0; g < count * groups; ++g) offset[g] = -scale[g] * zero[g];
      }
      descend<EvenLevels>(w, count, part, h, q);
    }
  }
}

}  // namespace
}  // namespace rgexport
