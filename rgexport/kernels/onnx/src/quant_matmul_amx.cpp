// AMX: tiles of 16 rows of activations times 16 outputs, for many rows. For few, AVX-512's kernels.
#include "amx_tiles.h"

namespace rgexport {
namespace {

// The unpacked blocks [block, block + blocks) of a panel, times rows [from, to).
//
// The tile unit multiplies two blocks while the products of the two before are added: behind each
// half of the one work is half of the other, close enough for the processor to overlap them.
//
// Cycles of Sapphire Rapids for a block of 32 × 32 products: with 128 columns 128 of tiles, 128 of
// loads, 96 of stores, 96 of floats; with 32 columns 64, 96, 96, 96.
template <bool kZeros>
class Columns {
 public:
  Columns(const Shape& shape, const Activations& a, int64_t block, int64_t blocks, Panel& panel)
      : shape_(shape), a_(a), block_(block), blocks_(blocks), panel_(panel) {}

  void run(int64_t from, int64_t to, float* y) {
    for (int64_t m = from; m < to; m += kTall * kRows) {
      const int64_t left = least(to - m, kTall * kRows);
      const int64_t rows[kTall] = {least(left, kRows), left - least(left, kRows)};
      if (m == from || left < kTall * kRows) configure(shape_.step, rows);
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
