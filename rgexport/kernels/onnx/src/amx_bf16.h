// AMX for blocks of 16 and 32: products of bfloat16.
//
// A product of int8 would leave the tiles in each block, to be scaled and added, and so keep them
// idle for three quarters of the time. Here scales are in the numbers, and sums stay in the tiles.
// Activations are first rounded to int8, as everywhere; rounding both factors to bfloat16 adds a
// quarter of that error.
#pragma once

#include "amx.h"

namespace rgexport {
namespace {

class AmxBf16 {
 public:
  static QuantKernel kernel() { return {code_bytes, none, round, multiply, kPair}; }

 private:
  static constexpr int64_t kStep = 32;  // columns that one product of tiles takes
  static constexpr int64_t kTileBytes = kRows * kLine;

  // ---- Activations: by tiles of rows, by steps, by rows; their scales are in them.

  static int64_t code_bytes(const QuantMatrix& w) { return ceil_div(w.columns, kStep) * kLine; }

  static int64_t none(const QuantMatrix&) { return 0; }

  static void round(const QuantMatrix& w, const float* x, const Activations& a, int64_t index) {
    int8_t* to = a.codes + index / kRows * kRows * a.stride + index % kRows * kLine;
    const int64_t padded = ceil_div(w.columns, kStep) * kStep;
    for (int64_t first = 0; first < padded; first += w.block) {
      const float most = largest(x + first, w.block, w.columns - first);
      const Digit<Avx512> digit(most, index % a.digits == 1);
      const __m512 scale = _mm512_set1_ps(digit.scale());
      for (int64_t k = first; k < first + w.block; k += kLanes) {
        const __m512 code = Avx512::to_float(digit.codes(load_some(x + k, w.columns - k)));
        int8_t* at = to + k / kStep * kTileBytes + k % kStep * 2;
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(at),
                            (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(code, scale)));
      }
    }
  }

  // ---- Weights: by steps, by tiles of outputs, by pairs of columns; (level − zero point) · scale.

  static constexpr float kMagic = 8388608.0f;        // 2^23: the low bits of such a float …
  static constexpr int32_t kMagicBits = 0x4B000000;  // … are a whole number

  // What makes numbers of the levels of a block of 16 outputs.
  struct Scales {
    __m512 zero_points, scales;

    Scales(const QuantMatrix& w, int64_t first, int64_t block) {
      alignas(64) float zeros[kLanes] = {}, some[kLanes] = {};
      const int64_t blocks = w.blocks();
      for (int64_t n = 0; n < smaller_of(w.rows - first, kLanes) && block < blocks; ++n) {
        some[n] = number_at(w.scales, (first + n) * blocks + block);
        if (w.zero_points) zeros[n] = kMagic + static_cast<float>(zero_point(w, first + n, block));
      }
      scales = _mm512_load_ps(some);
      zero_points = w.zero_points ? _mm512_load_ps(zeros)
                                  : _mm512_set1_ps(kMagic + static_cast<float>(1 << (w.bits - 1)));
    }
  };

  template <int kBits>
  static __m512 numbers(__m512i levels, const Scales& s) {
    const __m512i mask = _mm512_set1_epi32((1 << kBits) - 1), magic = _mm512_set1_epi32(kMagicBits);
    const __m512i bits = _mm512_or_si512(_mm512_and_si512(levels, mask), magic);
    return _mm512_mul_ps(_mm512_sub_ps(_mm512_castsi512_ps(bits), s.zero_points), s.scales);
  }

  // Sixteen pairs of neighbours.
  static __m512i pairs(__m512 even, __m512 odd) {
    const __m512i order =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
  }

  // A lane of a line has four pairs of neighbours in 4 bits each, or two in 8: rows of tiles.
  template <int kBits, int kBlock>
  static void unpack_line(const QuantMatrix& w, int64_t first, int64_t at, int8_t* tiles) {
    constexpr int kPairs = 16 / kBits, kBlockLanes = kBlock * kBits / 32;
    __m512i lanes[kLanes];
    load_line(w, first, at, lanes);
    unrolled<kLanes / kBlockLanes>([&](auto block) {
      const Scales scales(w, first, at * 8 / kBits / kBlock + block);
      unrolled<kBlockLanes * kPairs>([&](auto i) {
        constexpr int kRow = block * kBlockLanes * kPairs + i, kShift = i % kPairs * 2 * kBits;
        const __m512i lane = lanes[kRow / kPairs];
        const __m512 even = numbers<kBits>(_mm512_srli_epi32(lane, kShift), scales);
        const __m512 odd = numbers<kBits>(_mm512_srli_epi32(lane, kShift + kBits), scales);
        int8_t* tile = tiles + kRow / kRows * 2 * kTileBytes;
        _mm512_store_si512(tile + kRow % kRows * kLine, pairs(even, odd));
      });
    });
  }

  // Columns [column, column + columns) of a panel.
  template <int kBits, int kBlock>
  static void unpack(const QuantMatrix& w, int64_t first, int64_t column, int64_t columns,
                     int8_t* tiles) {
    constexpr int64_t kLineColumns = kLine * 8 / kBits;
    for (int64_t k = 0; k < columns; k += kLineColumns)
      for (int64_t half = 0; half < 2; ++half)
        unpack_line<kBits, kBlock>(w, first + half * kLanes, (column + k) * kBits / 8,
                                   tiles + (k / kStep * 2 + half) * kTileBytes);
  }

  static auto unpack(const QuantMatrix& w) {
    if (w.bits == 4) return w.block == 16 ? unpack<4, 16> : unpack<4, 32>;
    return w.block == 16 ? unpack<8, 16> : unpack<8, 32>;
  }

  // ---- Products

  struct Weights {
    alignas(64) int8_t tiles[kColumns / kStep * 2 * kTileBytes];
  };

  static void multiply(const QuantMatrix& w, const Activations& a, int64_t first, int64_t last,
                       float* y) {
    static thread_local Weights weights;
    const auto unpack_columns = unpack(w);
    const Tiles tiles(kLine);
    by_parts(w, a, first, last, y, [&](const Part& p) {
      unpack_columns(w, p.panel, p.column, p.columns, weights.tiles);
      memory_is_read();
      fetch_next(w, p);
      multiply_panel(a, p.from, p.to, p.column / kStep, ceil_div(p.columns, kStep), weights.tiles,
                     p.sums);
    });
  }

  // Steps [step, step + steps) of rows [from, to).
  static void multiply_panel(const Activations& a, int64_t from, int64_t to, int64_t step,
                             int64_t steps, const int8_t* weights, float* sums) {
    for (int64_t m = from; m < to; m += kPair, sums += 4 * kTile) {
      const int8_t *x0 = a.codes + m * a.stride + step * kTileBytes, *x1 = x0 + kRows * a.stride;
      _tile_loadd(0, sums, kLine);
      _tile_loadd(1, sums + kTile, kLine);
      _tile_loadd(2, sums + 2 * kTile, kLine);
      _tile_loadd(3, sums + 3 * kTile, kLine);
      for (int64_t s = 0; s < steps; ++s) {
        const int64_t at = s * kTileBytes;
        load_step(x0 + at, x1 + at, weights + 2 * at, kLine);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, sums, kLine);
      _tile_stored(1, sums + kTile, kLine);
      _tile_stored(2, sums + 2 * kTile, kLine);
      _tile_stored(3, sums + 3 * kTile, kLine);
    }
  }
};

}  // namespace
}  // namespace rgexport
