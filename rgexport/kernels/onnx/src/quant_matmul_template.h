// The kernels of quant_matmul.h for any vector unit with a dot product of four bytes.
//
// A `Simd` has kLanes lanes of 32 bits. A line is one vector of stored weights: kLanes groups of
// four bytes. With 4 bits, a lane of a line holds eight columns, the even ones in the low halves;
// the codes of the activations lie as the unpacked weights do: for each line first what its low
// halves meet, then what its high halves meet. So no weight is ever moved across lanes.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "quant_matmul.h"
#include "unrolled.h"

namespace rgexport {

template <class Simd, int kBits>
struct Line {
  static constexpr int64_t kBytes = 4 * Simd::kLanes;
  static constexpr int64_t kParts = 8 / kBits;  // vectors of codes that a line of weights meets
  static constexpr int64_t kCodes = kParts * kBytes;
  static constexpr int64_t kLaneColumns = 4 * kParts;
};

inline int64_t whole(int64_t count, int64_t of) { return (count + of - 1) / of; }

template <class Simd>
class QuantMatmul {
  using Float = typename Simd::Float;
  using Int = typename Simd::Int;
  static constexpr int kLanes = Simd::kLanes;
  static constexpr int64_t kVector = 4 * kLanes;
  // Vectors of outputs in a panel; with them, rows of activations in a tile, as registers allow.
  static constexpr int kWide = Simd::kWide, kTall = Simd::kTall;
  static constexpr int64_t kPanel = kWide * kLanes;
  static constexpr int64_t kAhead = 8192;           // bytes that a stream of weights is prefetched by
  static constexpr int64_t kPanelBytes = 24 << 10;  // of unpacked weights, which stay in L1
  static constexpr int64_t kMostCodes = 2 * kVector;  // of a line
  static constexpr int64_t kMostRows = 512;         // of activations that share a panel

 public:
  static QuantKernels kernels() {
    return {code_bytes, padded_blocks, round, few, many, /*most_few=*/4, kPanel};
  }

 private:
  // How the blocks of a matrix lie in lines.
  struct Shape {
    int64_t lanes;      // of a line that share a scale
    int64_t per_block;  // lines with one scale, where a block is not less than a line
    int64_t per_line;   // blocks in a line, where it is less
    int64_t lines, full_lines, row_bytes, blocks;

    Shape(const QuantMatrix& w) {
      const int64_t block_lanes = w.block * w.bits / 32;
      lanes = block_lanes < kLanes ? block_lanes : kLanes;
      per_block = block_lanes / lanes;
      per_line = kLanes / lanes;
      row_bytes = w.row_bytes();
      blocks = w.blocks();
      lines = whole(row_bytes, kVector);
      full_lines = row_bytes / kVector;
    }
  };

  static int64_t parts(const QuantMatrix& w) { return 8 / w.bits; }

  static int64_t code_bytes(const QuantMatrix& w) {
    return whole(w.row_bytes(), kVector) * kVector * parts(w);
  }

  static int64_t padded_blocks(const QuantMatrix& w) {
    const Shape shape(w);
    return whole(whole(shape.lines, shape.per_block) * shape.per_line, kLanes) * kLanes;
  }

  // ---- Activations ------------------------------------------------------------------------

  static float absmax(const float* x, int64_t count) {
    Float lanes = Simd::zero_float();
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) lanes = Simd::max_size(lanes, Simd::load_float(x + i));
    float most = Simd::max(lanes);
    for (; i < count; ++i) most = std::fmax(most, std::fabs(x[i]));
    return most;
  }

  // Nearest integers, halves to even: what adding 1.5 · 2^23 leaves in the low bits.
  static int32_t round_codes(const float* x, int64_t count, float inverse, int8_t* codes) {
    constexpr float kMagic = 12582912.0f;
    if (count > kMostCodes) __builtin_unreachable();
    int32_t sum = 0;
    for (int64_t i = 0; i < count; ++i) {
      const float shifted = x[i] * inverse + kMagic;
      int32_t bits;
      std::memcpy(&bits, &shifted, 4);
      const int32_t code = bits - 0x4B400000;
      codes[i] = static_cast<int8_t>(code);
      sum += code;
    }
    return sum;
  }

  static void round(const QuantMatrix& w, const float* x, const Activations& a, int64_t index) {
    alignas(64) int8_t natural[kMostCodes];
    int8_t* codes = a.codes + index * a.stride;
    float* scales = a.scales + index * a.blocks;
    int32_t* sums = a.sums + index * a.blocks;
    const int64_t line_columns = kVector * parts(w), step = w.block > line_columns ? line_columns : w.block;
    std::memset(codes, 0, a.stride);
    for (int64_t b = 0; b < a.blocks; ++b) scales[b] = 0, sums[b] = 0;
    for (int64_t b = 0; b < w.blocks(); ++b) {
      const int64_t first = b * w.block;
      const int64_t count = w.columns - first < w.block ? w.columns - first : w.block;
      const float most = absmax(x + first, count);
      scales[b] = most / 127.0f;
      const float inverse = most > 0 ? 127.0f / most : 0.0f;
      for (int64_t at = 0; at < count; at += step) {
        const int64_t n = count - at < step ? count - at : step;
        std::memset(natural, 0, step);
        sums[b] += round_codes(x + first + at, n, inverse, natural);
        place(w, natural, step, first + at, codes);
      }
    }
    if (a.lane_starts) {
      const int32_t offset = w.zero_points ? 0 : common_zero_point(w);
      start_lanes(w, codes, offset, a.lane_starts + index * (a.stride / parts(w) / 4));
    }
  }

  // Puts codes of consecutive columns where the unpacked weights will be.
  static void place(const QuantMatrix& w, const int8_t* natural, int64_t count, int64_t column,
                    int8_t* codes) {
    if (w.bits == 8) {
      std::memcpy(codes + column, natural, count);
      return;
    }
    const int64_t line = column / (2 * kVector), within = column % (2 * kVector) / 2;
    int8_t* even = codes + line * 2 * kVector + within;
    int8_t* odd = even + kVector;
    for (int64_t i = 0; i < count / 2; ++i) {
      even[i] = natural[2 * i];
      odd[i] = natural[2 * i + 1];
    }
  }

  // What the dot products of the lanes start from: less the common zero point times the codes.
  static void start_lanes(const QuantMatrix& w, const int8_t* codes, int32_t offset,
                          int32_t* starts) {
    const int64_t lines = whole(w.row_bytes(), kVector), n = parts(w);
    for (int64_t line = 0; line < lines; ++line) {
      const int8_t* at = codes + line * n * kVector;
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        int32_t sum = 0;
        for (int64_t part = 0; part < n; ++part)
          for (int64_t i = 0; i < 4; ++i) sum += at[part * kVector + 4 * lane + i];
        starts[line * kLanes + lane] = -offset * sum;
      }
    }
  }

  // ---- Zero points ------------------------------------------------------------------------

  static int32_t zero_point(const QuantMatrix& w, int64_t row, int64_t block) {
    const uint8_t* packed = w.zero_points + row * w.zero_point_bytes();
    return w.bits == 8 ? packed[block] : packed[block / 2] >> (block % 2 * 4) & 15;
  }

  // What the dot products' own weights are shifted by: none, or 128 where bytes must have a sign.
  static int32_t shift(const QuantMatrix& w) {
    return w.bits == 8 && Simd::kSignedBytes ? 128 : 0;
  }

  static int32_t common_zero_point(const QuantMatrix& w) { return (1 << (w.bits - 1)) - shift(w); }

  // ---- Few rows: the weights stream by ----------------------------------------------------

  // One line of weights times the activations that it meets: a sum for each lane.
  template <int kBits>
  static Int line_dot(Int start, Int weights, const int8_t* codes) {
    if constexpr (kBits == 8) {
      if constexpr (Simd::kSignedBytes) weights = Simd::flip_sign(weights);
      return Simd::dot(start, weights, Simd::load(codes));
    } else {
      const Int low = Simd::dot(start, Simd::low_half(weights), Simd::load(codes));
      return Simd::dot(low, Simd::high_half(weights), Simd::load(codes + kVector));
    }
  }

  template <int kBits, int kShare>
  struct Stream {
    static constexpr int64_t kCodes = Line<Simd, kBits>::kCodes;

    // Products of scales that a segment of a row needs, each in L1 for one use.
    static constexpr int64_t kSegment = 256;  // blocks

    static void multiply(const float* scales, const float* x_scales, int64_t count, int64_t ahead,
                         float* products) {
      for (int64_t b = 0; b < count; b += kLanes) {
        Simd::prefetch(scales + b + ahead);
        const Float product = Simd::mul(load_some(scales + b, count - b), Simd::load_float(x_scales + b));
        Simd::store_float(products + b, product);
      }
    }

    // kRows rows of weights from `first` on, times one row of activations.
    template <int kRows>
    static void rows(const QuantMatrix& w, const Shape& shape, const Activations& a, int64_t index,
                     int64_t first, float* y) {
      alignas(64) float products[kRows][kSegment];  // the first `count` are set
      const uint8_t* data = w.data + first * shape.row_bytes;
      const float* scales = w.scales + first * shape.blocks;
      const int8_t* codes = a.codes + index * a.stride;
      const int32_t* starts = a.lane_starts + index * (shape.lines * kLanes);
      const float* x_scales = a.scales + index * a.blocks;
      const int64_t per_line = kLanes / kShare, per_block = kShare < kLanes ? 1 : shape.per_block;
      const int64_t blocks = kShare < kLanes ? shape.full_lines * per_line : shape.blocks;
      const uint8_t* ahead = data + kAhead;
      const int64_t ahead_rows = kRows + kAhead / shape.row_bytes;
      Float sums[kRows];
      for (int r = 0; r < kRows; ++r) sums[r] = Simd::zero_float();
      for (int64_t block = 0; block < blocks; block += kSegment) {
        const int64_t count = blocks - block < kSegment ? blocks - block : kSegment;
        for (int r = 0; r < kRows; ++r)
          multiply(scales + r * shape.blocks + block, x_scales + block, count, ahead_rows * shape.blocks,
                   products[r]);
        for (int64_t b = 0; b < count; b += per_line) {
          Int dots[kRows];
          for (int r = 0; r < kRows; ++r) dots[r] = Simd::zero();
          for (int64_t l = 0; l < per_block; ++l) {
            const Int start = Simd::load(starts);
            for (int r = 0; r < kRows; ++r) {
              Simd::prefetch(ahead + r * kVector);
              const Int weights = Simd::load(data + r * shape.row_bytes);
              dots[r] = line_dot<kBits>(Simd::add(dots[r], start), weights, codes);
            }
            data += kVector, ahead += kRows * kVector, codes += kCodes, starts += kLanes;
          }
          for (int r = 0; r < kRows; ++r)
            sums[r] = Simd::fma(Simd::to_float(dots[r]),
                                Simd::template spread<kShare>(products[r] + b), sums[r]);
        }
      }
      for (int r = 0; r < kRows; ++r) {
        if (w.zero_points) sums[r] = take_zeros(sums[r], w, shape, a, index, first + r);
        float sum = Simd::sum(sums[r]);
        if (shape.lines > shape.full_lines) sum += last_line(w, shape, a, index, first + r);
        y[r] = sum + (w.bias ? w.bias[first + r] : 0.0f);
      }
    }

    // The part of a row behind its last whole line, lane by lane: nothing is read behind the row.
    static float last_line(const QuantMatrix& w, const Shape& shape, const Activations& a,
                           int64_t index, int64_t row) {
      alignas(64) uint8_t data[kVector] = {};
      alignas(64) int32_t dots[kLanes];
      const int64_t done = shape.full_lines * kVector, left = shape.row_bytes - done;
      std::memcpy(data, w.data + row * shape.row_bytes + done, left);
      const Int start = Simd::load(a.lane_starts + index * (shape.lines * kLanes) + shape.full_lines * kLanes);
      const int8_t* codes = a.codes + index * a.stride + shape.full_lines * kCodes;
      Simd::store(dots, line_dot<kBits>(start, Simd::load(data), codes));
      const float* scales = w.scales + row * shape.blocks;
      const float* x_scales = a.scales + index * a.blocks;
      float sum = 0;
      for (int64_t lane = 0; lane < left / 4; ++lane) {
        const int64_t block = (shape.full_lines * kLanes + lane) / (w.block * kBits / 32);
        sum += static_cast<float>(dots[lane]) * (scales[block] * x_scales[block]);
      }
      return sum;
    }
  };

  // `sums`, whose lanes are to be added up, less Σ_b s_w · z · s_x · Σ x̂ of a row.
  static Float take_zeros(Float sums, const QuantMatrix& w, const Shape& shape,
                          const Activations& a, int64_t index, int64_t row) {
    const float* scales = w.scales + row * shape.blocks;
    const float* x_scales = a.scales + index * a.blocks;
    const int32_t* x_sums = a.sums + index * a.blocks;
    for (int64_t b = 0; b < shape.blocks; b += kLanes) {
      const int64_t left = shape.blocks - b;
      const Float scale = Simd::mul(load_some(scales + b, left), Simd::load_float(x_scales + b));
      const Float x_sum = Simd::to_float(Simd::load(x_sums + b));
      const Float offsets = Simd::mul(scale, zero_offsets(w, row, b, left));
      sums = Simd::fma(offsets, Simd::negative(x_sum), sums);
    }
    return sums;
  }

  // The zero points of a row's blocks from an even `block` on, less what the weights were moved by.
  static Float zero_offsets(const QuantMatrix& w, int64_t row, int64_t block, int64_t left) {
    alignas(8) uint8_t some[kLanes];
    const uint8_t* from = w.zero_points + row * w.zero_point_bytes() + block * w.bits / 8;
    if (left < kLanes) from = copy_some(from, (left * w.bits + 7) / 8, some);
    const Int zeros = w.bits == 8 ? Simd::widen(from) : Simd::widen_halves(from);
    return Simd::to_float(Simd::add(zeros, Simd::broadcast(-shift(w))));
  }

  static const uint8_t* copy_some(const uint8_t* from, int64_t bytes, uint8_t* to) {
    for (int64_t i = 0; i < bytes; ++i) to[i] = from[i];
    return to;
  }

  // The numbers that are there, and zeros: nothing is read behind a matrix.
  static Float load_some(const float* p, int64_t count) {
    if (count >= kLanes) return Simd::load_float(p);
    return Simd::load_first(p, static_cast<int>(count));
  }

  template <int kBits, int kShare>
  static void stream(const QuantMatrix& w, const Activations& a, int64_t first, int64_t last,
                     float* y) {
    constexpr int kRows = 2;  // more are read from too many places at once
    const Shape shape(w);
    int64_t row = first;
    for (; row + kRows <= last; row += kRows)
      for (int64_t m = 0; m < a.count; ++m)
        Stream<kBits, kShare>::template rows<kRows>(w, shape, a, m, row, y + m * w.rows + row);
    for (; row < last; ++row)
      for (int64_t m = 0; m < a.count; ++m)
        Stream<kBits, kShare>::template rows<1>(w, shape, a, m, row, y + m * w.rows + row);
  }

  static void few(const QuantMatrix& w, const Activations& a, int64_t first, int64_t last,
                  float* y) {
    const int64_t lanes = Shape(w).lanes;
    (w.bits == 4 ? pick<4>(lanes) : pick<8>(lanes)).few(w, a, first, last, y);
  }

  // ---- Many rows: panels of unpacked weights ----------------------------------------------

  // Some columns of a panel, unpacked: for each group of four columns, kWide vectors of outputs.
  struct Panel {
    alignas(64) uint8_t weights[kPanelBytes];
    alignas(64) float scales[kPanelBytes / 16];
    alignas(64) float zeros[kPanelBytes / 16];
    alignas(64) float y[kMostRows * kPanel];
  };

  static Panel& scratch() {
    static thread_local Panel panel;
    return panel;
  }

  template <int kBits>
  static void unpack(const QuantMatrix& w, const Shape& shape, int64_t first, int64_t line,
                     int64_t lines, Panel& panel) {
    constexpr int64_t n = Line<Simd, kBits>::kParts;
    Int rows[kLanes];
    for (int64_t l = 0; l < lines; ++l) {
      uint8_t* out = panel.weights + l * kLanes * n * kWide * kVector;
      const int64_t at = (line + l) * kVector;
      const int64_t left = shape.row_bytes - at;
      for (int wide = 0; wide < kWide; ++wide) {
        for (int lane = 0; lane < kLanes; ++lane) {
          const int64_t row = first + wide * kLanes + lane;
          const uint8_t* data = w.data + row * shape.row_bytes + at;
          rows[lane] = row < w.rows ? load_up_to(data, left) : Simd::zero();
        }
        Simd::transpose(rows);
        for (int lane = 0; lane < kLanes; ++lane) {
          uint8_t* to = out + (lane * n * kWide + wide) * kVector;
          if constexpr (kBits == 8) {
            Simd::store(to, Simd::kSignedBytes ? Simd::flip_sign(rows[lane]) : rows[lane]);
          } else {
            Simd::store(to, Simd::low_half(rows[lane]));
            Simd::store(to + kWide * kVector, Simd::high_half(rows[lane]));
          }
        }
      }
    }
  }

  static Int load_up_to(const uint8_t* data, int64_t left) {
    if (left >= kVector) return Simd::load(data);
    alignas(64) uint8_t padded[kVector] = {};
    std::memcpy(padded, data, left);
    return Simd::load(padded);
  }

  // The scales of some blocks, and their products with zero points, by blocks instead of rows.
  static void unpack_scales(const QuantMatrix& w, const Shape& shape, int64_t first, int64_t block,
                            int64_t blocks, Panel& panel) {
    alignas(64) float scales[kLanes] = {}, zeros[kLanes] = {};
    for (int64_t n = 0; n < kPanel; ++n) {
      const int64_t row = first + n;
      for (int64_t b = 0; b < blocks; b += kLanes) {
        const int64_t count = blocks - b < kLanes ? blocks - b : kLanes;
        if (row < w.rows) {
          const Float scale = load_some(w.scales + row * shape.blocks + block + b, count);
          Simd::store_float(scales, scale);
          if (w.zero_points)
            Simd::store_float(zeros, Simd::mul(scale, zero_offsets(w, row, block + b, count)));
        } else if (b == 0) {
          for (int i = 0; i < kLanes; ++i) scales[i] = zeros[i] = 0;
        }
        for (int64_t i = 0; i < count; ++i) panel.scales[(b + i) * kPanel + n] = scales[i];
        if (w.zero_points)
          for (int64_t i = 0; i < count; ++i) panel.zeros[(b + i) * kPanel + n] = zeros[i];
      }
    }
  }

  // kRows rows of activations times a panel, over `blocks` blocks; added to y [kRows, kPanel].
  template <int kBits, int kShare, int kRows, bool kZeros>
  static void tile(const Activations& a, int64_t index, int64_t line, int64_t block,
                   int64_t blocks, int64_t per_block, int32_t offset, const Panel& panel,
                   float* y) {
    constexpr int64_t kCodes = Line<Simd, kBits>::kCodes;
    constexpr int64_t per_line = kLanes / kShare;
    const int8_t* codes = a.codes + index * a.stride + line * kCodes;
    const uint8_t* weights = panel.weights;
    const float* x_scales = a.scales + index * a.blocks + block;
    const int32_t* x_sums = a.sums + index * a.blocks + block;
    for (int64_t b = 0; b < blocks; ++b) {
      Int dots[kRows][kWide];
      unrolled<kRows>([&](auto r) {
        const Int start = kZeros ? Simd::zero() : Simd::broadcast(-offset * x_sums[r * a.blocks + b]);
        unrolled<kWide>([&](auto j) { dots[r][j] = start; });
      });
      if constexpr (kShare < kLanes) {
        const int8_t* from = codes + b / per_line * kCodes + b % per_line * kShare * 4;
        weights = multiply_lanes<kBits, kShare, kRows>(from, a.stride, weights, dots);
      } else {
        for (int64_t l = 0; l < per_block; ++l, codes += kCodes)
          weights = multiply_lanes<kBits, kShare, kRows>(codes, a.stride, weights, dots);
      }
      unrolled<kRows>([&](auto r) {
        const float x_scale = x_scales[r * a.blocks + b];
        const Float wide = Simd::broadcast_float(x_scale);
        unrolled<kWide>([&](auto j) {
          float* to = y + r * kPanel + j * kLanes;
          const int64_t at = b * kPanel + j * kLanes;
          const Float scale = Simd::mul(Simd::load_float(panel.scales + at), wide);
          Float sum = Simd::fma(Simd::to_float(dots[r][j]), scale, Simd::load_float(to));
          if constexpr (kZeros) {
            const float x_sum = -x_scale * static_cast<float>(x_sums[r * a.blocks + b]);
            sum = Simd::fma(Simd::load_float(panel.zeros + at), Simd::broadcast_float(x_sum), sum);
          }
          Simd::store_float(to, sum);
        });
      });
      // The sums stay in memory, in L1: the registers are for the products.
      asm volatile("" ::: "memory");
    }
  }

  // The columns of some lanes of a line; returns the weights behind them.
  template <int kBits, int kShare, int kRows>
  [[gnu::always_inline]] static const uint8_t* multiply_lanes(const int8_t* codes, int64_t stride,
                                                              const uint8_t* weights,
                                                              Int (&dots)[kRows][kWide]) {
    for (int lane = 0; lane < kShare; ++lane, codes += 4) {
      unrolled<Line<Simd, kBits>::kParts>([&](auto part) {
        Int columns[kWide];
        unrolled<kWide>([&](auto j) { columns[j] = Simd::load(weights + j * kVector); });
        weights += kWide * kVector;
        unrolled<kRows>([&](auto r) {
          const Int x = Simd::broadcast_bytes(codes + r * stride + part * kVector);
          unrolled<kWide>([&](auto j) { dots[r][j] = Simd::dot(dots[r][j], columns[j], x); });
        });
      });
    }
    return weights;
  }

  template <int kBits, int kShare, bool kZeros, int kRows = kTall>
  static void tiles(const Activations& a, int64_t from, int64_t to, int64_t line, int64_t block,
                    int64_t blocks, int64_t per_block, int32_t offset, Panel& panel) {
    int64_t m = from;
    for (; m + kRows <= to; m += kRows)
      tile<kBits, kShare, kRows, kZeros>(a, m, line, block, blocks, per_block, offset, panel,
                                         panel.y + (m - from) * kPanel);
    if constexpr (kRows > 1) {
      if (m < to) {
        // The rest of the rows, by a tile of their number.
        rest<kBits, kShare, kZeros, kRows - 1>(a, m, to - m, line, block, blocks, per_block, offset,
                                               panel, panel.y + (m - from) * kPanel);
      }
    }
  }

  template <int kBits, int kShare, bool kZeros, int kRows>
  static void rest(const Activations& a, int64_t m, int64_t left, int64_t line, int64_t block,
                   int64_t blocks, int64_t per_block, int32_t offset, Panel& panel, float* y) {
    if (left == kRows) {
      tile<kBits, kShare, kRows, kZeros>(a, m, line, block, blocks, per_block, offset, panel, y);
    } else if constexpr (kRows > 1) {
      rest<kBits, kShare, kZeros, kRows - 1>(a, m, left, line, block, blocks, per_block, offset,
                                             panel, y);
    }
  }

  static void copy_columns(const float* from, int64_t width, float* to) {
    if (width == kPanel)
      std::memcpy(to, from, kPanel * sizeof(float));
    else
      std::memcpy(to, from, width * sizeof(float));
  }

  template <int kBits, int kShare>
  static void panels(const QuantMatrix& w, const Activations& a, int64_t first, int64_t last,
                     float* y) {
    constexpr int64_t kUnpacked = Line<Simd, kBits>::kCodes * kPanel;  // bytes of a line
    const Shape shape(w);
    Panel& panel = scratch();
    // Whole blocks, and an even number of them: the zero points of two share a byte.
    const int64_t pair = 2 * shape.per_block;
    static_assert(kPanelBytes >= 2 * 256 * kPanel, "a pair of the largest blocks fits");
    const int64_t step = kPanelBytes / kUnpacked / pair * pair;
    for (int64_t n = first; n < last; n += kPanel) {
      const int64_t width = w.rows - n < kPanel ? w.rows - n : kPanel;
      float start[kPanel] = {};
      if (w.bias) std::memcpy(start, w.bias + n, width * sizeof(float));
      for (int64_t from = 0; from < a.count; from += kMostRows) {
        const int64_t to = a.count - from < kMostRows ? a.count : from + kMostRows;
        float* sums = panel.y;
        for (int64_t m = from; m < to; ++m, sums += kPanel)
          std::memcpy(sums, start, sizeof(start));
        for (int64_t line = 0; line < shape.lines; line += step) {
          const int64_t lines = shape.lines - line < step ? shape.lines - line : step;
          const int64_t block = line / shape.per_block * shape.per_line;
          int64_t blocks = whole(lines, shape.per_block) * shape.per_line;
          if (block + blocks > shape.blocks) blocks = shape.blocks - block;
          unpack<kBits>(w, shape, n, line, lines, panel);
          unpack_scales(w, shape, n, block, blocks, panel);
          if (w.zero_points)
            tiles<kBits, kShare, true>(a, from, to, line, block, blocks, shape.per_block, 0, panel);
          else
            tiles<kBits, kShare, false>(a, from, to, line, block, blocks, shape.per_block,
                                        common_zero_point(w), panel);
        }
        for (int64_t m = from; m < to; ++m)
          copy_columns(panel.y + (m - from) * kPanel, width, y + m * w.rows + n);
      }
    }
  }

  static void many(const QuantMatrix& w, const Activations& a, int64_t first, int64_t last,
                   float* y) {
    const int64_t lanes = Shape(w).lanes;
    (w.bits == 4 ? pick<4>(lanes) : pick<8>(lanes)).many(w, a, first, last, y);
  }

  // ---- The instance for a number of lanes that share a scale --------------------------------

  struct Instance {
    void (*few)(const QuantMatrix&, const Activations&, int64_t, int64_t, float*);
    void (*many)(const QuantMatrix&, const Activations&, int64_t, int64_t, float*);
  };

  template <int kBits, int kShare = kLanes>
  static Instance pick(int64_t lanes) {
    if constexpr (kShare > 2) {
      if (lanes < kShare) return pick<kBits, kShare / 2>(lanes);
    }
    return {stream<kBits, kShare>, panels<kBits, kShare>};
  }
};

}  // namespace rgexport
