// What AMX's two kernels share. A pair of tiles of 16 rows of activations meets a panel of two
// tiles of 16 outputs. Rows are padded to pairs: what is behind the last one is never read back.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "quant_layout.h"
#include "simd_avx512.h"
#include "unrolled.h"

namespace rgexport {
namespace {

constexpr int64_t kRows = 16;   // of activations in a tile
constexpr int64_t kLanes = 16;  // outputs in a tile
constexpr int64_t kPair = 2 * kRows, kPanel = 2 * kLanes;
constexpr int64_t kLine = 64;       // bytes of a row of a tile, and of stored weights read at once
constexpr int64_t kTile = 256;      // numbers of 32 bits
constexpr int64_t kMostRows = 512;  // of activations that share a panel
constexpr int64_t kColumns = 256;   // of a panel at a time, which stay in L1
constexpr int64_t kPanels = 16;     // that share those of the activations, which stay in L2
constexpr int64_t kAhead = 512;     // floats of x that are fetched before they are read

// Up to 16 of the numbers that are left, and zeros.
__m512 load_some(const float* x, int64_t left) {
  if (left < 1) return _mm512_setzero_ps();
  return Avx512::load_first(x, left);
}

// The largest size in a block of columns, of which some may be left.
float largest(const float* x, int64_t block, int64_t left) {
  __m512 lanes = _mm512_setzero_ps();
  for (int64_t k = 0; k < block; k += kLanes) {
    __builtin_prefetch(x + k + kAhead);
    lanes = Avx512::max_size(lanes, load_some(x + k, left - k));
  }
  return Avx512::max(lanes);
}

// Some columns of y for up to 512 rows: [panel][pair][4 tiles][16][16].
struct Sums {
  alignas(64) float panels[kPanels][kMostRows / kPair][4 * kTile];

  void clear(int64_t count) { std::memset(panels, 0, ceil_div(count, kPanel) * sizeof panels[0]); }

  // Columns [first, last), rows [from, to) of activations, of which each `digits` are one of y. Whole
  // rows at once: in y they lie on their own pages, of which no pattern announces the next.
  void write(const QuantMatrix& w, int64_t first, int64_t last, int64_t from, int64_t to,
             int64_t digits, float* y) const {
    for (int64_t m = 0; m < to - from; m += digits) {
      float* row = y + (from + m) / digits * w.y_stride;
      for (int64_t n = first; n < last; n += kLanes) {
        __builtin_prefetch(row + 2 * w.y_stride + n, 1);
        __m512 sum = at(m, n - first);
        if (digits == 2) sum = _mm512_add_ps(sum, at(m + 1, n - first));
        const __mmask16 there = static_cast<__mmask16>((1u << smaller_of(last - n, kLanes)) - 1);
        const __m512 bias = w.bias ? _mm512_maskz_loadu_ps(there, w.bias + n) : _mm512_setzero_ps();
        _mm512_mask_storeu_ps(row + n, there, _mm512_add_ps(sum, bias));
      }
    }
  }

 private:
  // The sums of a row of activations for 16 columns.
  __m512 at(int64_t m, int64_t column) const {
    const int64_t tile = m / kRows % 2 * 2 + column / kLanes % 2;
    const float* tiles = panels[column / kPanel][m / kPair];
    return _mm512_load_ps(tiles + tile * kTile + m % kRows * kLanes);
  }
};

Sums& thread_sums() {
  static thread_local Sums sums;
  return sums;
}

// The tiles of this thread, for `step` bytes of columns: 0 … 3 are what is summed, 4 and 5
// activations, 6 and 7 weights.
//
// Leaves them as they were: llama.cpp configures a thread's once, and never looks again.
class Tiles {
 public:
  explicit Tiles(int64_t step) {
    _tile_storeconfig(&before_);
    Config config = {1, {}, {}, {}};
    for (int i = 0; i < 8; ++i) {
      config.rows[i] = static_cast<uint8_t>(i < 6 ? kRows : step / 4);
      config.row_bytes[i] = static_cast<uint16_t>(i == 4 || i == 5 ? step : kLine);
    }
    _tile_loadconfig(&config);
  }
  ~Tiles() {
    if (before_.palette)
      _tile_loadconfig(&before_);
    else
      _tile_release();
  }
  Tiles(const Tiles&) = delete;

 private:
  struct alignas(64) Config {
    uint8_t palette, reserved[15];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  Config before_;
};

// GCC does not know that _tile_loadd reads memory.
inline void memory_is_read() {
#if defined(__GNUC__)
  __asm__ volatile("" ::: "memory");
#endif
}

// Loads what one product of tiles takes: of a pair of tiles of rows, and of a panel.
inline void load_step(const int8_t* x0, const int8_t* x1, const int8_t* weights, int64_t step) {
  _tile_loadd(4, x0, step);
  _tile_loadd(6, weights, kLine);
  _tile_loadd(7, weights + step / 4 * kLine, kLine);
  _tile_loadd(5, x1, step);
}

// A line of stored weights of 16 outputs: four bytes of each output for each lane, or zeros.
void load_line(const QuantMatrix& w, int64_t first, int64_t at, __m512i (&lanes)[kLanes]) {
  const int64_t row_bytes = w.row_bytes();
  const __mmask64 there = ~__mmask64{0} >> (kLine - smaller_of(row_bytes - at, kLine));
  for (int64_t n = 0; n < kLanes; ++n) {
    const int64_t row = smaller_of(first + n, w.rows - 1);
    lanes[n] = _mm512_maskz_loadu_epi8(there, w.data + row * row_bytes + at);
  }
  Avx512::transpose(lanes);
}

int zero_point(const QuantMatrix& w, int64_t row, int64_t block) {
  const uint8_t* packed = w.zero_points + row * w.zero_point_bytes();
  return w.bits == 8 ? packed[block] : packed[block / 2] >> (block % 2 * 4) & 15;
}

// Columns of a panel, up to kColumns of them and padded to whole blocks, for rows [from, to).
struct Part {
  int64_t panel, column, columns, from, to;
  float* sums;  // [pair][4 tiles][16][16], to which their products are to be added
  int64_t next_panel, next_column;
};

// From memory into L2, while products are computed: the weights of the next part.
void fetch_next(const QuantMatrix& w, const Part& p) {
  for (int64_t row = p.next_panel; row < smaller_of(p.next_panel + kPanel, w.rows); ++row)
    for (int64_t at = 0; at < kColumns * w.bits / 8; at += kLine)
      __builtin_prefetch(w.data + row * w.row_bytes() + p.next_column * w.bits / 8 + at, 0, 2);
}

// Columns [first, last) of y, by parts of panels: many share columns of the activations.
template <class Add>
void by_parts(const QuantMatrix& w, const Activations& a, int64_t first, int64_t last, float* y,
              const Add& add) {
  Sums& sums = thread_sums();
  const int64_t padded = w.blocks() * w.block;
  for (int64_t n = first; n < last; n += kPanels * kPanel) {
    const int64_t end = smaller_of(last, n + kPanels * kPanel);
    for (int64_t from = 0; from < a.count; from += kMostRows) {
      const int64_t to = smaller_of(a.count, from + kMostRows);
      sums.clear(end - n);
      for (int64_t column = 0; column < padded; column += kColumns) {
        const int64_t columns = smaller_of(padded - column, kColumns);
        for (int64_t panel = n; panel < end; panel += kPanel) {
          const bool last_panel = panel + kPanel >= end;
          add(Part{panel, column, columns, from, to, sums.panels[(panel - n) / kPanel][0],
                   last_panel ? n : panel + kPanel, last_panel ? column + kColumns : column});
        }
      }
      sums.write(w, n, end, from, to, a.digits, y);
    }
  }
}

}  // namespace
}  // namespace rgexport
