// Arm with products of 2 × 8 by 8 × 2 bytes (armv8.6-a+i8mm), for many rows. For few, NEON's kernels.
//
// Rows of activations and outputs go in pairs, columns in groups of eight. A line of 16 bytes of
// stored weights has two halves, which with 4 bits hold one group in low and one in high halves of
// bytes: groups lie in that order. Weights lose their zero points as they are unpacked, and get a
// sign; only if there are 8 bits with zero points of their own, that is left to the floats.
#include <arm_neon.h>

#include <cstring>

#include "quant_matmul.h"
#include "unrolled.h"

namespace rgexport {

QuantKernels quant_kernels_neon();

namespace {

constexpr int64_t kPairs = 4;  // of rows, and of outputs, in a tile
constexpr int64_t kRows = 2 * kPairs;
constexpr int64_t kTiles = 4;  // that share packed activations
constexpr int64_t kPanel = kTiles * kRows;
constexpr int64_t kGroup = 16 * kPairs;  // bytes of eight columns of all pairs
constexpr int64_t kLine = 16;            // bytes of stored weights that are unpacked at once
constexpr int64_t kColumns = 512;        // of a panel at a time
constexpr int64_t kGroups = kColumns / 8;
constexpr int64_t kMostBlocks = kColumns / 16;
constexpr int64_t kMostRows = 512;  // of activations that share a panel

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Some columns of a panel and of eight rows of activations. Numbers for a product of pairs are in
// its order: row 0 with outputs 0 and 1, row 1 with outputs 0 and 1.
struct Panel {
  alignas(64) int8_t weights[kTiles][kGroups * kGroup];
  alignas(64) int8_t codes[kGroups * kGroup];
  float scales[kMostBlocks][kTiles][kPairs][4];
  float zeros[kMostBlocks][kTiles][kPairs][4];  // zero points times scales, for the floats
  float x_scales[kMostBlocks][kPairs][4];
  float x_sums[kMostBlocks][kPairs][4];  // times scales
  float y[kMostRows / kRows][kTiles][kPairs][kPairs][4];
};

Panel& scratch() {
  static thread_local Panel panel;
  return panel;
}

// The blocks of a matrix that a panel holds.
struct Blocks {
  int64_t first, count, size, columns, all;

  Blocks(const QuantMatrix& w, int64_t at) : first(at), size(w.block), all(w.blocks()) {
    count = least(all - first, kColumns / size);
    columns = count * size;
  }
};

// ---- Weights --------------------------------------------------------------------------------

int zero_point(const QuantMatrix& w, int64_t row, int64_t block) {
  const uint8_t* packed = w.zero_points + row * w.zero_point_bytes();
  return w.bits == 8 ? packed[block] : packed[block / 2] >> (block % 2 * 4) & 15;
}

uint8x16_t load_line(const uint8_t* data, int64_t left) {
  if (left >= kLine) return vld1q_u8(data);
  uint8_t padded[kLine] = {};
  std::memcpy(padded, data, left);
  return vld1q_u8(padded);
}

// What is taken from the weights of an output, in each byte.
uint8x8_t shift(const QuantMatrix& w, const Blocks& blocks, int64_t row, int64_t column) {
  if (w.bits == 8) return vdup_n_u8(128);
  if (!w.zero_points) return vdup_n_u8(8);
  const int64_t block = blocks.first + column / blocks.size;
  return vdup_n_u8(static_cast<uint8_t>(zero_point(w, row, least(block, blocks.all - 1))));
}

// Two outputs: eight bytes of each for each group.
void unpack_pair(const QuantMatrix& w, const Blocks& blocks, int64_t row, int8_t* out) {
  const int64_t parts = 8 / w.bits, row_bytes = w.row_bytes();
  const int64_t start = blocks.first * blocks.size / parts, bytes = blocks.columns / parts;
  const int64_t rows[2] = {least(row, w.rows - 1), least(row + 1, w.rows - 1)};
  for (int64_t at = 0; at < bytes; at += kLine) {
    uint8x16_t lines[2];
    for (int i = 0; i < 2; ++i)
      lines[i] = load_line(w.data + rows[i] * row_bytes + start + at, bytes - at);
    const uint8x16_t halves[2] = {vcombine_u8(vget_low_u8(lines[0]), vget_low_u8(lines[1])),
                                  vcombine_u8(vget_high_u8(lines[0]), vget_high_u8(lines[1]))};
    for (int64_t half = 0; half < 2 && at + 8 * half < bytes; ++half) {
      const int64_t column = (at + 8 * half) * parts;
      const uint8x16_t shifts =
          vcombine_u8(shift(w, blocks, rows[0], column), shift(w, blocks, rows[1], column));
      for (int64_t part = 0; part < parts; ++part) {
        uint8x16_t levels = halves[half];
        if (w.bits == 4) levels = part ? vshrq_n_u8(levels, 4) : vandq_u8(levels, vdupq_n_u8(15));
        vst1q_s8(out + (column / 8 + part) * kGroup, vreinterpretq_s8_u8(vsubq_u8(levels, shifts)));
      }
    }
  }
}

void unpack(const QuantMatrix& w, const Blocks& blocks, int64_t first, Panel& panel) {
  for (int64_t i = 0; i < kPanel; ++i) {
    const int64_t tile = i / kRows, pair = i % kRows / 2, side = i % 2, row = first + i;
    if (side == 0) unpack_pair(w, blocks, row, panel.weights[tile] + 16 * pair);
    for (int64_t b = 0; b < blocks.count; ++b) {
      const int64_t block = blocks.first + b;
      const float scale = row < w.rows ? number_at(w.scales, row * blocks.all + block) : 0.0f;
      const bool own = w.bits == 8 && w.zero_points && row < w.rows;
      const int zero = own ? zero_point(w, row, block) - 128 : 0;
      for (int64_t r = 0; r < 2; ++r) {
        panel.scales[b][tile][pair][2 * r + side] = scale;
        panel.zeros[b][tile][pair][2 * r + side] = scale * static_cast<float>(zero);
      }
    }
  }
}

// ---- Activations ----------------------------------------------------------------------------

// NEON has for each line of weights the codes that low halves meet, then those for high halves.
template <int64_t kParts>
void pack_row(const int8_t* codes, int64_t columns, int8_t* out) {
  for (int64_t g = 0; g < columns / 8; ++g) {
    const int64_t line = g / (2 * kParts), half = g / kParts % 2, part = g % kParts;
    std::memcpy(out + g * kGroup, codes + (line * kParts + part) * kLine + half * 8, 8);
  }
}

void pack(const QuantMatrix& w, const Activations& a, const Blocks& blocks, int64_t first,
          Panel& panel) {
  const int64_t at = blocks.first * blocks.size;
  const auto pack_codes = w.bits == 4 ? pack_row<2> : pack_row<1>;
  for (int64_t i = 0; i < kRows; ++i) {
    const int64_t pair = i / 2, side = i % 2, row = least(first + i, a.count - 1);
    pack_codes(a.codes + row * a.stride + at, blocks.columns, panel.codes + 16 * pair + 8 * side);
    for (int64_t b = 0; b < blocks.count; ++b) {
      const int64_t from = row * a.blocks + blocks.first + b;
      const float scale = a.scales[from], sum = scale * static_cast<float>(a.sums[from]);
      for (int64_t n = 0; n < 2; ++n) {
        panel.x_scales[b][pair][2 * side + n] = scale;
        panel.x_sums[b][pair][2 * side + n] = sum;
      }
    }
  }
}

// ---- Products -------------------------------------------------------------------------------

// Eight rows times the eight outputs of a tile; added to y.
template <bool kZeros>
void multiply(const Blocks& blocks, const Panel& panel, int64_t tile, float (*y)[kPairs][4]) {
  const int64_t groups = blocks.size / 8;
  for (int64_t b = 0; b < blocks.count; ++b) {
    int32x4_t dots[kPairs][kPairs];
    unrolled<kPairs * kPairs>([&](auto i) { dots[i / kPairs][i % kPairs] = vdupq_n_s32(0); });
    for (int64_t g = b * groups; g < (b + 1) * groups; ++g) {
      int8x16_t weights[kPairs];
      unrolled<kPairs>(
          [&](auto j) { weights[j] = vld1q_s8(panel.weights[tile] + g * kGroup + 16 * j); });
      unrolled<kPairs>([&](auto i) {
        const int8x16_t codes = vld1q_s8(panel.codes + g * kGroup + 16 * i);
        unrolled<kPairs>([&](auto j) { dots[i][j] = vmmlaq_s32(dots[i][j], codes, weights[j]); });
      });
    }
    unrolled<kPairs>([&](auto i) {
      const float32x4_t x_scale = vld1q_f32(panel.x_scales[b][i]);
      unrolled<kPairs>([&](auto j) {
        const float32x4_t scale = vmulq_f32(vld1q_f32(panel.scales[b][tile][j]), x_scale);
        float32x4_t sum = vfmaq_f32(vld1q_f32(y[i][j]), vcvtq_f32_s32(dots[i][j]), scale);
        if (kZeros)
          sum = vfmsq_f32(sum, vld1q_f32(panel.zeros[b][tile][j]), vld1q_f32(panel.x_sums[b][i]));
        vst1q_f32(y[i][j], sum);
      });
    });
  }
}

float sum_of(const Panel& panel, int64_t i, int64_t j) {
  return panel.y[i / kRows][j / kRows][i % kRows / 2][j % kRows / 2][i % 2 * 2 + j % 2];
}

void write(const QuantMatrix& w, int64_t digits, int64_t first, int64_t from, int64_t to,
           const Panel& panel, float* y) {
  for (int64_t m = from; m < to; m += digits) {
    const int64_t i = m - from;
    for (int64_t j = 0; j < kPanel && first + j < w.rows; ++j) {
      float sum = sum_of(panel, i, j);
      if (digits == 2) sum += sum_of(panel, i + 1, j);
      y[m / digits * w.y_stride + first + j] = sum + (w.bias ? w.bias[first + j] : 0.0f);
    }
  }
}

void many(const QuantMatrix& w, const Activations& a, int64_t first, int64_t last, float* y) {
  Panel& panel = scratch();
  const auto run = w.bits == 8 && w.zero_points ? multiply<true> : multiply<false>;
  for (int64_t n = first; n < last; n += kPanel) {
    for (int64_t from = 0; from < a.count; from += kMostRows) {
      const int64_t to = least(a.count, from + kMostRows);
      std::memset(panel.y, 0, (to - from + kRows - 1) / kRows * sizeof panel.y[0]);
      for (int64_t block = 0; block < w.blocks(); block += kColumns / w.block) {
        const Blocks blocks(w, block);
        unpack(w, blocks, n, panel);
        for (int64_t m = from; m < to; m += kRows) {
          pack(w, a, blocks, m, panel);
          for (int64_t tile = 0; tile < kTiles; ++tile)
            run(blocks, panel, tile, panel.y[(m - from) / kRows][tile]);
        }
      }
      write(w, a.digits, n, from, to, panel, y);
    }
  }
}

}  // namespace

QuantKernels quant_kernels_i8mm() {
  QuantKernels kernels = quant_kernels_neon();
  kernels.many = [](const QuantMatrix& w) {
    QuantKernel kernel = quant_kernels_neon().many(w);
    kernel.multiply = many;
    return kernel;
  };
  kernels.panel = kPanel;
  return kernels;
}

}  // namespace rgexport
