// AMX for blocks of 64 and more: products of int8, whose sums over a block are exact.
#pragma once

#include "amx_int8_layout.h"

namespace rgexport {
namespace {

// Products of two blocks, or of one, that wait to be added to sums.
struct Waiting {
  int64_t blocks = 0;
  const int32_t* products;   // [blocks][4 tiles]
  const float* x_scales[2];  // of a tile of rows: [blocks][16]
  const int32_t* x_sums[2];
  const float *scales, *zeros;  // [blocks][32]
  float* sums;                  // [4 tiles]

  // Adds `kCount` rows of tile `tall` of rows, from `first` on.
  template <int kBlocks, bool kZeros, int kCount>
  [[gnu::always_inline]] inline void add(int64_t tall, int64_t first) const {
    const int64_t at = tall * 2 * kTile + first * kLanes;
    __m512 scale[kBlocks][2], zero[kBlocks][2];
    unrolled<kBlocks * 2>([&](auto i) {
      scale[i / 2][i % 2] = _mm512_load_ps(scales + i * kLanes);
      if (kZeros) zero[i / 2][i % 2] = _mm512_load_ps(zeros + i * kLanes);
    });
    for (int64_t r = 0; r < kCount; ++r) {
      float* to = sums + at + r * kLanes;
      __m512 sum[2] = {_mm512_load_ps(to), _mm512_load_ps(to + kTile)};
      unrolled<kBlocks>([&](auto b) {
        const int32_t* from = products + b * 4 * kTile + at + r * kLanes;
        const int64_t row = b * kRows + first + r;
        const __m512 x_scale = _mm512_set1_ps(x_scales[tall][row]);
        unrolled<2>([&](auto j) {
          const __m512 product = _mm512_cvtepi32_ps(_mm512_load_si512(from + j * kTile));
          sum[j] = _mm512_fmadd_ps(product, _mm512_mul_ps(scale[b][j], x_scale), sum[j]);
        });
        if (kZeros) {
          const float x_sum = x_scales[tall][row] * static_cast<float>(x_sums[tall][row]);
          const __m512 wide = _mm512_set1_ps(x_sum);
          unrolled<2>([&](auto j) { sum[j] = _mm512_fnmadd_ps(zero[b][j], wide, sum[j]); });
        }
      });
      _mm512_store_ps(to, sum[0]);
      _mm512_store_ps(to + kTile, sum[1]);
    }
  }

  template <bool kZeros>
  void add_tile(int64_t tall) const {
    if (blocks == 2) add<2, kZeros, kRows>(tall, 0);
    if (blocks == 1) add<1, kZeros, kRows>(tall, 0);
  }
};

class AmxInt8 : AmxInt8Layout {
 public:
  static QuantKernel kernel() { return {code_bytes, blocks, round, multiply, kPair}; }

 private:
  struct Memory {
    alignas(64) int8_t weights[kColumns / kStep * 2 * kTileBytes];
    alignas(64) float scales[kColumns / kStep * kPanel];
    alignas(64) float zeros[kColumns / kStep * kPanel];
    alignas(64) int32_t products[2][2][4 * kTile];  // of two blocks, now and before
  };

  static void multiply(const QuantMatrix& w, const Activations& a, int64_t first, int64_t last,
                       float* y) {
    static thread_local Memory memory;
    const auto unpack_columns = w.bits == 4 ? unpack<4> : unpack<8>;
    const auto run = zeros_are_left(w) ? Panel<true>::run : Panel<false>::run;
    const Tiles tiles(kStep);
    by_parts(w, a, first, last, y, [&](const Part& p) {
      const int64_t block = p.column / w.block, count = p.columns / w.block;
      unpack_columns(w, p.panel, p.column, p.columns, memory.weights);
      unpack_scales(w, p.panel, block, count, memory.scales, memory.zeros);
      memory_is_read();
      fetch_next(w, p);
      run(w, a, p.from, p.to, block, count, memory, p.sums);
    });
  }

  // Some blocks of a panel times rows.
  //
  // What a step needs is loaded behind the products of the step before. While a block's products
  // leave the tiles, those of the two blocks before are added, in small pieces close enough for the
  // processor to overlap the two.
  template <bool kZeros>
  class Panel {
   public:
    static void run(const QuantMatrix& w, const Activations& a, int64_t from, int64_t to,
                    int64_t block, int64_t count, Memory& memory, float* sums) {
      Panel(w, a, block, count, memory).multiply_rows(from, to, sums);
    }

   private:
    Panel(const QuantMatrix& w, const Activations& a, int64_t block, int64_t count, Memory& memory)
        : a_(a), block_(block), count_(count), steps_(w.block / kStep), memory_(memory) {}

    void multiply_rows(int64_t from, int64_t to, float* sums) {
      load_step(codes(from), codes(from + kRows), memory_.weights, kStep);
      for (int64_t m = from; m < to; m += kPair, sums += 4 * kTile) {
        const int64_t next = m + kPair < to ? m + kPair : from;
        for (int64_t b = 0; b < count_; ++b) {
          multiply_block(m, b, b + 1 < count_ ? m : next);
          empty(b % 2);
          if (b % 2 || b + 1 == count_) wait(m, b / 2 * 2, b % 2 + 1, sums);
        }
      }
      waiting_.template add_tile<kZeros>(0);
      waiting_.template add_tile<kZeros>(1);
    }

    const int8_t* codes(int64_t m) const {
      return a_.codes + m * a_.stride + block_ * steps_ * kTileBytes;
    }

    // The first step is loaded already. Loads the one behind the block: of rows from `next` on.
    void multiply_block(int64_t m, int64_t b, int64_t next) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t s = b * steps_; s < (b + 1) * steps_; ++s) {
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
        const bool last = s + 1 == (b + 1) * steps_;
        const int64_t row = last ? next : m, step = last && next != m ? 0 : s + 1;
        if (step < count_ * steps_) load(row, step);
      }
    }

    void load(int64_t m, int64_t step) {
      load_step(codes(m) + step * kTileBytes, codes(m + kRows) + step * kTileBytes,
                memory_.weights + step * 2 * kTileBytes, kStep);
    }

    void empty(int64_t tall) {
      int32_t* products = memory_.products[turn_][tall];
      if (waiting_.blocks == 2)
        store_and_add<2>(products, tall);
      else if (waiting_.blocks == 1)
        store_and_add<1>(products, tall);
      else
        store_and_add<0>(products, tall);
    }

    template <int kBlocks>
    void store_and_add(int32_t* products, int64_t tall) {
      _tile_stored(0, products, kLine);
      add_quarter<kBlocks>(tall, 0);
      _tile_stored(1, products + kTile, kLine);
      add_quarter<kBlocks>(tall, 1);
      _tile_stored(2, products + 2 * kTile, kLine);
      add_quarter<kBlocks>(tall, 2);
      _tile_stored(3, products + 3 * kTile, kLine);
      add_quarter<kBlocks>(tall, 3);
    }

    template <int kBlocks>
    [[gnu::always_inline]] inline void add_quarter(int64_t tall, int64_t quarter) {
      if constexpr (kBlocks > 0)
        waiting_.template add<kBlocks, kZeros, kRows / 4>(tall, quarter * kRows / 4);
    }

    // Blocks [b, b + blocks) of the rows from m on are multiplied. Of those that waited, a single
    // block has added only its first tile of rows.
    void wait(int64_t m, int64_t b, int64_t blocks, float* sums) {
      if (blocks == 1) waiting_.template add_tile<kZeros>(1);
      waiting_.blocks = blocks;
      waiting_.products = memory_.products[turn_][0];
      waiting_.scales = memory_.scales + b * kPanel;
      waiting_.zeros = memory_.zeros + b * kPanel;
      waiting_.sums = sums;
      for (int64_t i = 0; i < 2; ++i) {
        const int64_t at = (m + i * kRows) * a_.blocks + (block_ + b) * kRows;
        waiting_.x_scales[i] = a_.scales + at;
        waiting_.x_sums[i] = a_.sums + at;
      }
      turn_ ^= 1;
    }

    const Activations& a_;
    const int64_t block_, count_, steps_;
    Memory& memory_;
    Waiting waiting_;
    int turn_ = 0;
  };
};

}  // namespace
}  // namespace rgexport
