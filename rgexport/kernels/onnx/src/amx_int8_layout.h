// AMX for blocks of 64 and more: how numbers of int8 lie for its tiles.
#pragma once

#include "amx.h"

namespace rgexport {
namespace {

// A step is 64 columns. With 4 bits these are eight lanes of a line of stored weights: first what
// the low halves of their bytes hold, the even columns, then the odd ones.
class AmxInt8Layout {
 protected:
  static constexpr int64_t kStep = 64;
  static constexpr int64_t kTileBytes = kRows * kStep;

  static int64_t code_bytes(const QuantMatrix& w) { return w.blocks() * w.block; }

  static int64_t blocks(const QuantMatrix& w) { return w.blocks(); }
  static int64_t none(const QuantMatrix&) { return 0; }

  // Codes lie by tiles of rows, by steps, by rows; scales and sums by tiles, by blocks, by rows.
  static void round(const QuantMatrix& w, const float* x, const Activations& a, int64_t index) {
    const int64_t row = index % kRows, tile = index - row;
    int8_t* codes = a.codes + tile * a.stride + row * kStep;
    for (int64_t b = 0; b < w.blocks(); ++b) {
      const int64_t first = b * w.block;
      const float most = largest(x + first, w.block, w.columns - first);
      const Digit<Avx512> digit(most, index % a.digits == 1);
      __m512i sum = _mm512_setzero_si512();
      for (int64_t k = first; k < first + w.block; k += kStep)
        round_step(w, x + k, w.columns - k, digit, codes + k / kStep * kTileBytes, sum);
      const int64_t at = tile * a.blocks + b * kRows + row;
      a.scales[at] = digit.scale();
      a.sums[at] = _mm512_reduce_add_epi32(sum);
    }
    if (index + 1 == a.count) clear_padding(a);
  }

  // Columns [column, column + columns) of a panel, with a sign: by steps, by tiles of outputs, by
  // groups of four columns. Zero points are gone, unless they are 8 bits of a block's own.
  template <int kBits>
  static void unpack(const QuantMatrix& w, int64_t first, int64_t column, int64_t columns,
                     int8_t* tiles) {
    constexpr int64_t kLineColumns = kLine * 8 / kBits;
    for (int64_t k = 0; k < columns; k += kLineColumns)
      for (int64_t half = 0; half < 2; ++half)
        unpack_line<kBits>(w, first + half * kLanes, (column + k) * kBits / 8,
                           tiles + (k / kStep * 2 + half) * kTileBytes);
  }

  // Scales of a panel, and their products with zero points that are left: [blocks][32 outputs].
  static void unpack_scales(const QuantMatrix& w, int64_t first, int64_t block, int64_t count,
                            float* scales, float* zeros) {
    const int64_t blocks = w.blocks();
    for (int64_t n = 0; n < kPanel; ++n) {
      const int64_t row = first + n;
      for (int64_t b = 0; b < count; ++b) {
        const float scale = row < w.rows ? number_at(w.scales, row * blocks + block + b) : 0.0f;
        scales[b * kPanel + n] = scale;
        if (zeros_are_left(w) && row < w.rows)
          zeros[b * kPanel + n] = scale * static_cast<float>(zero_point(w, row, block + b) - 128);
      }
    }
  }

  static bool zeros_are_left(const QuantMatrix& w) { return w.bits == 8 && w.zero_points; }

 private:
  // Codes of 64 columns, with 4 bits first those of the even ones. Adds them to a sum.
  static void round_step(const QuantMatrix& w, const float* x, int64_t left,
                         const Digit<Avx512>& digit, int8_t* to, __m512i& sum) {
    __m512i rounded[kStep / kLanes];
    unrolled<kStep / kLanes>([&](auto i) {
      rounded[i] = digit.codes(load_some(x + i * kLanes, left - i * kLanes));
      sum = Avx512::add(sum, rounded[i]);
    });
    const __m512i codes = Avx512::pack(rounded[0], rounded[1], rounded[2], rounded[3]);
    if (w.bits == 8) return Avx512::store(to, codes);
    auto* halves = reinterpret_cast<__m256i*>(to);
    _mm256_storeu_si256(halves, _mm512_cvtepi16_epi8(codes));
    _mm256_storeu_si256(halves + 1, _mm512_cvtepi16_epi8(_mm512_srli_epi16(codes, 8)));
  }

  // Rows behind the last one are multiplied, too: with scales that cost no time.
  static void clear_padding(const Activations& a) {
    for (int64_t m = a.count; m < ceil_div(a.count, kPair) * kPair; ++m)
      for (int64_t b = 0; b < a.blocks; ++b) {
        const int64_t at = m / kRows * kRows * a.blocks + b * kRows + m % kRows;
        a.scales[at] = 0, a.sums[at] = 0;
      }
  }

  // What is taken from the weights of 16 outputs, in each byte.
  template <int kBits>
  static __m512i shifts(const QuantMatrix& w, int64_t first, int64_t block) {
    if (kBits == 8 || !w.zero_points) return _mm512_set1_epi8(kBits == 8 ? -128 : 8);
    alignas(64) uint32_t bytes[kLanes] = {};
    for (int64_t n = 0; n < smaller_of(w.rows - first, kLanes) && block < w.blocks(); ++n)
      bytes[n] = 0x01010101u * static_cast<uint32_t>(zero_point(w, first + n, block));
    return _mm512_load_si512(bytes);
  }

  template <int kBits>
  static void unpack_line(const QuantMatrix& w, int64_t first, int64_t at, int8_t* tiles) {
    constexpr int kParts = 8 / kBits, kStepLanes = kLanes / kParts;
    __m512i lanes[kLanes];
    load_line(w, first, at, lanes);
    unrolled<kParts>([&](auto step) {
      const __m512i shift = shifts<kBits>(w, first, (at * kParts + step * kStep) / w.block);
      int8_t* tile = tiles + step * 2 * kTileBytes;
      unrolled<kStepLanes>([&](auto lane) {
        const __m512i stored = lanes[step * kStepLanes + lane];
        const __m512i low = kBits == 8 ? stored : Avx512::low_half(stored);
        _mm512_store_si512(tile + lane * kLine, _mm512_sub_epi8(low, shift));
        if (kBits == 4)
          _mm512_store_si512(tile + (kStepLanes + lane) * kLine,
                             _mm512_sub_epi8(Avx512::high_half(stored), shift));
      });
    });
  }
};

}  // namespace
}  // namespace rgexport
