// AMX: tiles of 16 rows of activations times 16 outputs, for many rows. For few, AVX-512's kernels.
//
// A step is what one product of tiles takes: up to 64 columns of one block. Codes lie by tiles of
// rows, in them by steps, then by rows, so that a tile is one run of memory; scales and sums lie by
// tiles, blocks, rows. Weights lose their zero points as they are unpacked, and get a sign; only if
// there are 8 bits with zero points of their own, that is left to the floats.
#include <immintrin.h>

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
        panel.zeros[b * kPanel + n] = scale * static_cast<float>(zero_point(w, shape, row, block + b) - 128);
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

// ---- Tiles ----------------------------------------------------------------------------------

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

// ---- Panels ---------------------------------------------------------------------------------

// The unpacked blocks [block, block + blocks) of a panel, times rows [from, to).
//
// The tile unit multiplies two blocks while the products of the two before are added: behind each
// half of the one work is half of the other, close enough for the processor to overlap them. Of 1024
// products, 128 columns cost (Sapphire Rapids) 128 cycles of tiles, 128 of loads, 96 of stores, 96 of
// floats with a block of 128; 64 of tiles, 96 of each of the others for 32 columns with one of 32.
template <bool kZeros>
class Columns {
 public:
  Columns(const Shape& shape, const Activations& a, int64_t block, int64_t blocks, Panel& panel)
      : shape_(shape), a_(a), block_(block), blocks_(blocks), panel_(panel) {}

  void run(int64_t from, int64_t to, float* y) {
    for (int64_t m = from; m < to; m += kTall * kRows) {
      const int64_t rows[kTall] = {least(to - m, kRows), least(to - m - least(to - m, kRows), kRows)};
      if (m == from || rows[0] + rows[1] < kTall * kRows) configure(shape_.step, rows);
      rows[1] ? pair<true>(m, rows, y) : pair<false>(m, rows, y);
      y += kTall * kRows * kPanel;
    }
    add<kZeros>(waiting_, 0);
    add<kZeros>(waiting_, 1);
  }

 private:
  template <bool kBoth>
  void pair(int64_t m, const int64_t (&rows)[kTall], float* y) {
    const int8_t* first = a_.codes + m * a_.stride + block_ * shape_.block * rows[0];
    const int8_t* second = a_.codes + (m + kRows) * a_.stride + block_ * shape_.block * rows[1];
    const Codes codes = {{first, kBoth ? second : first}, {rows[0], rows[1]}};
    for (int64_t b = 0; b < blocks_; b += 2) {
      int32_t(&products)[2][kTall * kTileInts] = panel_.products[turn_];
      const bool two = b + 1 < blocks_;
      multiply<kBoth>(codes, b * shape_.per_block, panel_.weights, shape_);
      add<kZeros>(waiting_, 0);
      store<kBoth>(products[0]);
      if (two) multiply<kBoth>(codes, (b + 1) * shape_.per_block, panel_.weights, shape_);
      add<kZeros>(waiting_, 1);
      if (two) store<kBoth>(products[1]);
      wait(m, rows, b, products[0], y);
      turn_ ^= 1;
    }
  }

  void wait(int64_t m, const int64_t (&rows)[kTall], int64_t b, const int32_t* products, float* y) {
    waiting_.blocks = least(blocks_ - b, 2);
    waiting_.products = products;
    waiting_.scales = panel_.scales + b * kPanel;
    waiting_.zeros = panel_.zeros + b * kPanel;
    waiting_.y = y;
    for (int64_t i = 0; i < kTall; ++i) {
      const int64_t at = (m + (rows[i] ? i * kRows : 0)) * a_.blocks + (block_ + b) * rows[i];
      waiting_.rows[i] = rows[i];
      waiting_.x_scales[i] = a_.scales + at;
      waiting_.x_sums[i] = a_.sums + at;
    }
  }

  const Shape& shape_;
  const Activations& a_;
  const int64_t block_, blocks_;
  Panel& panel_;
  Waiting waiting_;
  int turn_ = 0;
};

void write(const QuantMatrix& w, int64_t first, int64_t from, int64_t to, const float* sums,
           float* y) {
  for (int64_t j = 0; j < kPanel && first + j < w.rows; j += kLanes) {
    const int64_t n = first + j, left = least(w.rows - n, kLanes);
    const __mmask16 there = static_cast<__mmask16>((1u << left) - 1);
    const __m512 bias = w.bias ? _mm512_maskz_loadu_ps(there, w.bias + n) : _mm512_setzero_ps();
    for (int64_t m = from; m < to; ++m) {
      const __m512 sum = _mm512_load_ps(sums + (m - from) * kPanel + j);
      _mm512_mask_storeu_ps(y + m * w.rows + n, there, _mm512_add_ps(sum, bias));
    }
  }
}

// One piece of the activations after the other, which stays in L2, times all panels.
void multiply_panels(const QuantMatrix& w, const Shape& shape, const Activations& a, int64_t first,
                     int64_t last, int64_t from, int64_t to, Panel& panel) {
  const auto unpack = layout(w, shape).unpack;
  const int64_t step = kColumns / shape.block;
  for (int64_t block = 0; block < shape.blocks; block += step) {
    const int64_t blocks = least(shape.blocks - block, step);
    for (int64_t n = first; n < last; n += kPanel) {
      unpack(w, shape, n, block * shape.block, blocks * shape.block, panel);
      unpack_scales(w, shape, n, block, blocks, panel);
      memory_is_read();
      float* y = panel.y[(n - first) / kPanel];
      if (w.bits == 8 && w.zero_points)
        Columns<true>(shape, a, block, blocks, panel).run(from, to, y);
      else
        Columns<false>(shape, a, block, blocks, panel).run(from, to, y);
    }
  }
}

void many(const QuantMatrix& w, const Activations& a, int64_t first, int64_t last, float* y) {
  const Shape shape(w);
  Panel& panel = scratch();
  for (int64_t n = first; n < last; n += kPanels * kPanel) {
    const int64_t end = least(last, n + kPanels * kPanel);
    for (int64_t from = 0; from < a.count; from += kMostRows) {
      const int64_t to = least(a.count, from + kMostRows);
      for (int64_t i = 0; i < whole(end - n, kPanel); ++i)
        std::memset(panel.y[i], 0, (to - from) * kPanel * sizeof(float));
      multiply_panels(w, shape, a, n, end, from, to, panel);
      for (int64_t i = 0; i < whole(end - n, kPanel); ++i)
        write(w, n + i * kPanel, from, to, panel.y[i], y);
    }
  }
  _tile_release();
}

}  // namespace

QuantKernels quant_kernels_amx() {
  QuantKernels kernels = quant_kernels_avx512();
  kernels.round = round;
  kernels.many = many;
  kernels.panel = kPanel;
  kernels.most_panels = kPanels;
  return kernels;
}

}  // namespace rgexport
