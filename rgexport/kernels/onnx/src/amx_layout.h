// How activations and weights lie in memory for AMX's tiles.
//
// A step is what one product of tiles takes: up to 64 columns of one block. Codes lie by tiles of
// rows, in them by steps, then by rows, so that a tile is one run of memory; scales and sums lie by
// tiles, blocks, rows. Weights lose their zero points as they are unpacked, and get a sign; only if
// there are 8 bits with zero points of their own, that is left to the floats.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "quant_matmul.h"
#include "simd_avx512.h"
#include "unrolled.h"

namespace rgexport {

QuantKernels quant_kernels_avx512();

namespace {

constexpr int64_t kRows = 16;             // of activations in a tile
constexpr int64_t kLanes = 16;            // outputs in a tile
constexpr int64_t kWide = 2, kTall = 2;   // tiles that are multiplied at once
constexpr int64_t kPanel = kWide * kLanes;
constexpr int64_t kLine = 64;             // bytes of stored weights that are unpacked at once
constexpr int64_t kColumns = 512;         // of a panel at a time: 16 KB of weights, which stay in L1
constexpr int64_t kMostRows = 512;        // of activations that share a panel
constexpr int64_t kPanels = 8;            // that share a piece of the activations
constexpr int64_t kMostBlocks = kColumns / 16;
constexpr int64_t kTileInts = kRows * kPanel;  // products of one row of tiles

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

int64_t whole(int64_t count, int64_t of) { return (count + of - 1) / of; }

// How the columns of a matrix lie in steps.
struct Shape {
  int64_t blocks, row_bytes, zero_point_bytes, block, step, per_block;
  int64_t share;  // lanes of a line that share a scale

  explicit Shape(const QuantMatrix& w)
      : blocks(w.blocks()),
        row_bytes(w.row_bytes()),
        zero_point_bytes(w.zero_point_bytes()),
        block(w.block),
        step(least(w.block, 64)),
        per_block(w.block / step),
        share(least(w.block * w.bits / 32, kLanes)) {}
};

// ---- Activations ----------------------------------------------------------------------------

// The rows of activations in the tile of row m.
int64_t tile_rows(const Activations& a, int64_t m) { return least(a.count - m / kRows * kRows, kRows); }

// AVX-512 has for each line of weights the codes that low halves meet, then those for high halves;
// here the two alternate by blocks, where blocks are shorter than lines.
template <int kBits, int kShare>
void place(const int8_t* from, int64_t count, int8_t* to, int64_t stride) {
  constexpr int64_t kParts = 8 / kBits, kRun = 4 * kShare, kPerLine = kLanes / kShare;
  constexpr int64_t kRunsOfStep = kRun * kParts <= 64 ? kParts : 1;
  for (int64_t i = 0; i < count / kRun; ++i) {
    const int64_t line = i / (kParts * kPerLine), part = i % kParts, q = i / kParts % kPerLine;
    const int64_t step = i / kRunsOfStep, at = i % kRunsOfStep * kRun;
    std::memcpy(to + step * stride + at, from + line * kParts * kLine + part * kLine + q * kRun, kRun);
  }
}

// ---- Weights --------------------------------------------------------------------------------

// Some columns of a panel, unpacked, and what becomes of them.
struct Panel {
  alignas(64) int8_t weights[kColumns * kPanel];      // [step][kWide][step / 4] rows of a tile
  alignas(64) float scales[kMostBlocks * kPanel];
  alignas(64) float zeros[kMostBlocks * kPanel];      // zero points times scales, for the floats
  alignas(64) int32_t products[2][2][kTall * kTileInts];  // of two blocks, now and before
  alignas(64) float y[kPanels][kMostRows * kPanel];
};

Panel& scratch() {
  static thread_local Panel panel;
  return panel;
}

int zero_point(const QuantMatrix& w, const Shape& shape, int64_t row, int64_t block) {
  const uint8_t* packed = w.zero_points + row * shape.zero_point_bytes;
  return w.bits == 8 ? packed[block] : packed[block / 2] >> (block % 2 * 4) & 15;
}

// What is taken from the weights of 16 outputs, in each byte.
template <int kBits>
__m512i shifts(const QuantMatrix& w, const Shape& shape, int64_t first, int64_t block) {
  if (kBits == 8 || !w.zero_points) return _mm512_set1_epi8(kBits == 8 ? -128 : 8);
  alignas(64) uint32_t bytes[kLanes] = {};
  for (int64_t n = 0; n < least(w.rows - first, kLanes) && block < shape.blocks; ++n)
    bytes[n] = 0x01010101u * static_cast<uint32_t>(zero_point(w, shape, first + n, block));
  return _mm512_load_si512(bytes);
}

// A line of 16 outputs: four bytes of each output for each lane, or zeros.
void load_line(const QuantMatrix& w, const Shape& shape, int64_t first, int64_t at,
               __m512i (&lanes)[kLanes]) {
  const int64_t left = least(shape.row_bytes - at, kLine);
  const __mmask64 there = ~__mmask64{0} >> (kLine - left);
  for (int64_t n = 0; n < kLanes; ++n) {
    const int64_t row = least(first + n, w.rows - 1);
    lanes[n] = _mm512_maskz_loadu_epi8(there, w.data + row * shape.row_bytes + at);
  }
  Avx512::transpose(lanes);
}

// Lane l of a line has the columns 4 · kParts · l … of its outputs; where 4 bits halve it, the even
// ones first. They are rows of the tile of their step.
template <int kBits, int kShare>
void unpack_line(const QuantMatrix& w, const Shape& shape, int64_t first, int64_t at, int64_t wide,
                 int8_t* out) {
  constexpr int kParts = 8 / kBits, kStepRows = kShare * kParts < 16 ? kShare * kParts : 16;
  const int64_t block = at * kParts / shape.block;
  __m512i lanes[kLanes], shift{};
  load_line(w, shape, first, at, lanes);
  unrolled<kLanes>([&](auto lane) {
    constexpr int kBlock = lane / kShare, kIn = lane % kShare;
    if (kIn == 0) shift = shifts<kBits>(w, shape, first, block + kBlock);
    unrolled<kParts>([&](auto part) {
      constexpr int kGroup = (kBlock * kParts + part) * kShare + kIn;
      const int64_t row = (kGroup / kStepRows * kWide + wide) * kStepRows + kGroup % kStepRows;
      const __m512i levels = kBits == 8   ? lanes[lane]
                             : part == 0 ? Avx512::low_half(lanes[lane])
                                         : Avx512::high_half(lanes[lane]);
      _mm512_store_si512(out + row * kLine, _mm512_sub_epi8(levels, shift));
    });
  });
}

template <int kBits, int kShare>
void unpack(const QuantMatrix& w, const Shape& shape, int64_t first, int64_t column, int64_t columns,
            Panel& panel) {
  constexpr int64_t kLineColumns = kLine * 8 / kBits;
  for (int64_t k = 0; k < columns; k += kLineColumns)
    for (int64_t wide = 0; wide < kWide; ++wide)
      unpack_line<kBits, kShare>(w, shape, first + wide * kLanes, (column + k) * kBits / 8, wide,
                                 panel.weights + k * kPanel);
}

void unpack_scales(const QuantMatrix& w, const Shape& shape, int64_t first, int64_t block,
                   int64_t blocks, Panel& panel) {
  for (int64_t n = 0; n < kPanel; ++n) {
    const int64_t row = first + n;
    for (int64_t b = 0; b < blocks; ++b) {
      const float scale = row < w.rows ? w.scales[row * shape.blocks + block + b] : 0.0f;
      panel.scales[b * kPanel + n] = scale;
      if (w.bits == 8 && w.zero_points && row < w.rows)
        panel.zeros[b * kPanel + n] =
            scale * static_cast<float>(zero_point(w, shape, row, block + b) - 128);
    }
  }
}

// ---- Layouts ---------------------------------------------------------------------------------

// What depends on how many bits a weight has and how many lanes of a line share a scale.
struct Layout {
  void (*place)(const int8_t*, int64_t, int8_t*, int64_t);
  void (*unpack)(const QuantMatrix&, const Shape&, int64_t, int64_t, int64_t, Panel&);
};

template <int kBits, int kShare = kLanes>
Layout layout(int64_t share) {
  if constexpr (kShare > 2) {
    if (share < kShare) return layout<kBits, kShare / 2>(share);
  }
  return {place<kBits, kShare>, unpack<kBits, kShare>};
}

Layout layout(const QuantMatrix& w, const Shape& shape) {
  return w.bits == 4 ? layout<4>(shape.share) : layout<8>(shape.share);
}

void round(const QuantMatrix& w, const float* x, const Activations& a, int64_t index) {
  constexpr int64_t kPiece = 1024;
  static const QuantKernels base = quant_kernels_avx512();
  if (a.lane_starts) return base.round(w, x, a, index);  // for few
  alignas(64) int8_t codes[kPiece];
  float scales[kPiece / 16];
  int32_t sums[kPiece / 16];
  const Shape shape(w);
  const auto place = layout(w, shape).place;
  const int64_t rows = tile_rows(a, index), row = index % kRows, tile = index - row;
  for (int64_t at = 0; at < w.columns; at += kPiece) {
    QuantMatrix piece = w;
    piece.columns = least(w.columns - at, kPiece);
    const int64_t blocks = piece.blocks(), first = at / w.block;
    base.round(piece, x + at, {1, kPiece, codes, base.padded_blocks(piece), scales, sums, nullptr}, 0);
    int8_t* to = a.codes + tile * a.stride + (at / shape.step * rows + row) * shape.step;
    place(codes, blocks * w.block, to, rows * shape.step);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t to_block = tile * a.blocks + (first + b) * rows + row;
      a.scales[to_block] = scales[b];
      a.sums[to_block] = sums[b];
    }
  }
}

}  // namespace
}  // namespace rgexport
