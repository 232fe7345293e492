// The factorization that error feedback needs: H = (I + M) D (I + M)'.
#pragma once

#include "numbers.h"

namespace rgexport {
namespace {

constexpr int64_t kBlock = 64;  // columns that are eliminated together

// a[i][j] -= Σ_t left[i][t] right[t][j] for a tile, each sum in the order of t.
template <int kTall, int kWide>
void subtract_tile(double* a, int64_t stride, const double* left, int64_t left_stride,
                   const double* right, int64_t right_stride, int64_t depth) {
  double kept[kTall][kWide];
#pragma GCC unroll 8
  for (int i = 0; i < kTall; ++i)
    for (int j = 0; j < kWide; ++j) kept[i][j] = a[i * stride + j];
  for (int64_t t = 0; t < depth; ++t) {
#pragma GCC unroll 8
    for (int i = 0; i < kTall; ++i) {
      const double factor = -left[i * left_stride + t];
      for (int j = 0; j < kWide; ++j)
        kept[i][j] = fma(factor, right[t * right_stride + j], kept[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kTall; ++i)
    for (int j = 0; j < kWide; ++j) a[i * stride + j] = kept[i][j];
}

// The upper triangle of the first `count` rows and columns of h, less panel · scaled: the panel is
// [count, wide] in h, `scaled` its transpose times D, [wide, count].
void subtract_products(double* h, int64_t k, int64_t count, const double* panel,
                       const double* scaled, int64_t wide) {
  constexpr int kTall = 6, kWide = 16;
  int64_t i = 0;
  for (; i + kTall <= count; i += kTall) {
    int64_t j = i / kWide * kWide;  // some of it is below the diagonal, and not used
    for (; j + kWide <= count; j += kWide)
      subtract_tile<kTall, kWide>(h + i * k + j, k, panel + i * k, k, scaled + j, count, wide);
    for (; j < count; ++j)
      subtract_tile<kTall, 1>(h + i * k + j, k, panel + i * k, k, scaled + j, count, wide);
  }
  for (; i < count; ++i)
    for (int64_t j = i; j < count; ++j)
      subtract_tile<1, 1>(h + i * k + j, k, panel + i * k, k, scaled + j, count, wide);
}

// Eliminates columns [from, to), the last first, in the rows up to them.
bool eliminate(double* h, int64_t k, int64_t from, int64_t to) {
  for (int64_t c = to - 1; c >= from; --c) {
    const double pivot = h[c * k + c];
    if (!(pivot > 0)) return false;
    for (int64_t i = 0; i < c; ++i) h[i * k + c] /= pivot;
    for (int64_t i = 0; i < c; ++i) {
      const double factor = -h[i * k + c] * pivot;
      for (int64_t j = i > from ? i : from; j < c; ++j)
        h[i * k + j] = fma(factor, h[j * k + c], h[i * k + j]);
    }
  }
  return true;
}

int factor(double* h, int64_t k, float* m, float* d) {
  const Memory<double> scaled(kBlock * k);
  for (int64_t to = k; to > 0;) {
    const int64_t from = to > kBlock ? to - kBlock : 0, wide = to - from;
    if (!eliminate(h, k, from, to)) return 1;
    for (int64_t i = 0; i < from; ++i)
      for (int64_t c = 0; c < wide; ++c)
        scaled[c * from + i] = h[i * k + from + c] * h[(from + c) * k + from + c];
    subtract_products(h, k, from, h + from, scaled.data(), wide);
    to = from;
  }
  for (int64_t i = 0; i < k; ++i) {
    d[i] = static_cast<float>(h[i * k + i]);
    for (int64_t j = 0; j < k; ++j) m[i * k + j] = j > i ? static_cast<float>(h[i * k + j]) : 0.0f;
  }
  return 0;
}

}  // namespace
}  // namespace rgexport
