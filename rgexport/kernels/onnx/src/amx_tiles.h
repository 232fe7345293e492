// What AMX's tiles multiply, and how AVX-512 adds it up.
#pragma once

#include "amx_layout.h"

namespace rgexport {
namespace {

// Registers 0 … 3 are the products, 4 and 5 activations, 6 and 7 weights.
void configure(int64_t step, const int64_t (&rows)[kTall]) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  const auto set = [&](int tile, int64_t count, int64_t bytes) {
    config.rows[tile] = static_cast<uint8_t>(count);
    config.row_bytes[tile] = static_cast<uint16_t>(count ? bytes : 0);
  };
  for (int i = 0; i < 4; ++i) set(i, rows[i / 2], 4 * kLanes);
  for (int i = 0; i < 2; ++i) {
    set(4 + i, rows[i], step);
    set(6 + i, step / 4, 4 * kLanes);
  }
  _tile_loadconfig(&config);
}

// GCC does not know that _tile_loadd reads memory.
inline void memory_is_read() {
#if defined(__GNUC__)
  __asm__ volatile("" ::: "memory");
#endif
}

// Codes of one or two tiles of rows; those of the next step are behind those of all rows.
struct Codes {
  const int8_t* at[kTall];
  int64_t rows[kTall];
};

// The products of one block, from step `first` on.
template <bool kBoth>
inline void multiply(const Codes& codes, int64_t first, const int8_t* weights, const Shape& shape) {
  const int64_t step = shape.step, tile = step * kLanes;
  const int8_t* x0 = codes.at[0] + first * codes.rows[0] * step;
  const int8_t* x1 = codes.at[1] + first * codes.rows[1] * step;
  weights += first * kWide * tile;
  _tile_zero(0);
  _tile_zero(1);
  if (kBoth) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t s = 0; s < shape.per_block; ++s) {
    _tile_loadd(6, weights, kLine);
    _tile_loadd(4, x0, step);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(7, weights + tile, kLine);
    _tile_dpbssd(1, 4, 7);
    if (kBoth) {
      _tile_loadd(5, x1, step);
      _tile_dpbssd(2, 5, 6);
      _tile_dpbssd(3, 5, 7);
    }
    weights += kWide * tile;
    x0 += codes.rows[0] * step;
    x1 += codes.rows[1] * step;
  }
}

// They are then [kTall][16 rows][32 outputs].
template <bool kBoth>
inline void store(int32_t* products) {
  constexpr int64_t kStride = kPanel * sizeof(int32_t);
  _tile_stored(0, products, kStride);
  _tile_stored(1, products + kLanes, kStride);
  if (kBoth) {
    _tile_stored(2, products + kTileInts, kStride);
    _tile_stored(3, products + kTileInts + kLanes, kStride);
  }
}

// ---- Floats ---------------------------------------------------------------------------------

// Products that wait to be added to y.
struct Waiting {
  int64_t blocks = 0;          // 1 or 2; 0 for none
  int64_t rows[kTall];
  const int32_t* products;     // [blocks][kTall][16][32]
  const float* x_scales[kTall];  // [blocks][rows]
  const int32_t* x_sums[kTall];
  const float *scales, *zeros;   // [blocks][32]
  float* y;                      // [kTall · 16][32]
};

template <bool kZeros, int kBlocks>
inline void add(const Waiting& w, int64_t tall) {
  const int64_t rows = w.rows[tall];
  __m512 scales[kBlocks][kWide], zeros[kBlocks][kWide];
  for (int b = 0; b < kBlocks; ++b) {
    for (int j = 0; j < kWide; ++j) {
      scales[b][j] = _mm512_load_ps(w.scales + b * kPanel + j * kLanes);
      if (kZeros) zeros[b][j] = _mm512_load_ps(w.zeros + b * kPanel + j * kLanes);
    }
  }
  const int32_t* products = w.products + tall * kTileInts;
  float* y = w.y + tall * kTileInts;
  for (int64_t r = 0; r < rows; ++r, products += kPanel, y += kPanel) {
    __m512 sums[kWide];
    for (int j = 0; j < kWide; ++j) sums[j] = _mm512_load_ps(y + j * kLanes);
    for (int b = 0; b < kBlocks; ++b) {
      const float x_scale = w.x_scales[tall][b * rows + r];
      for (int j = 0; j < kWide; ++j) {
        const int32_t* from = products + b * kTall * kTileInts + j * kLanes;
        const __m512 scale = _mm512_mul_ps(scales[b][j], _mm512_set1_ps(x_scale));
        sums[j] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(from)), scale, sums[j]);
      }
      if (kZeros) {
        const __m512 x_sum = _mm512_set1_ps(x_scale * static_cast<float>(w.x_sums[tall][b * rows + r]));
        for (int j = 0; j < kWide; ++j) sums[j] = _mm512_fnmadd_ps(zeros[b][j], x_sum, sums[j]);
      }
    }
    for (int j = 0; j < kWide; ++j) _mm512_store_ps(y + j * kLanes, sums[j]);
  }
}

template <bool kZeros>
inline void add(const Waiting& w, int64_t tall) {
  if (w.blocks == 2) return add<kZeros, 2>(w, tall);
  if (w.blocks == 1) return add<kZeros, 1>(w, tall);
}

}  // namespace
}  // namespace rgexport
