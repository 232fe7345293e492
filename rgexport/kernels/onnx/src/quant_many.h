// Many rows of activations: panels of weights are unpacked once for all rows.
#pragma once

#include "quant_layout.h"
#include "unrolled.h"

namespace rgexport {

template <class Simd>
class QuantMany : QuantLayout<Simd> {
  using Base = QuantLayout<Simd>;
  using Base::kCacheLine;
  using Base::kLanes;
  using Base::kMaxNibble;
  using Base::kVector;
  using typename Base::Float;
  using typename Base::Int;
  using typename Base::Shape;
  // Vectors of outputs in a panel; with them, rows of activations in a tile, as registers allow.
  static constexpr int kWide = Simd::kWide;
  template <int kBits>
  static constexpr int kTall = kBits == 4 ? Simd::kTallHalves : Simd::kTall;
  static constexpr int64_t kPanelBytes = 24 << 10;  // of unpacked weights, which stay in L1
  static constexpr int64_t kMostRows = 512;         // of activations that share a panel
  static constexpr int32_t kFourBytes = 0x01010101;

 public:
  static constexpr int64_t kPanel = kWide * kLanes;
  static constexpr int64_t kPanels = 4;  // that share columns of the activations, which stay in L2

  // Columns [first, last) of y, where kShare lanes of a line share a scale.
  template <int kBits, int kShare, int kDigits>
  static void panels(const QuantMatrix& w, const Activations& a, int64_t first, int64_t last,
                     float* y) {
    constexpr int64_t kUnpacked = Base::template kCodes<kBits> * kPanel;  // bytes of a line
    const Shape shape(w);
    Panel& panel = scratch();
    // Whole blocks, and an even number of them: the zero points of two share a byte.
    const int64_t pair = 2 * shape.lines_per_block;
    static_assert(kPanelBytes >= 2 * 256 * kPanel, "a pair of the largest blocks fits");
    const int64_t step = kPanelBytes / kUnpacked / pair * pair;
    for (int64_t n = first; n < last; n += kPanels * kPanel) {
      const int64_t end = last - n < kPanels * kPanel ? last : n + kPanels * kPanel;
      for (int64_t from = 0; from < a.count; from += kMostRows) {
        const int64_t to = a.count - from < kMostRows ? a.count : from + kMostRows;
        start(w, n, end, (to - from) / kDigits, panel);
        for (int64_t line = 0; line < shape.lines; line += step) {
          const int64_t lines = shape.lines - line < step ? shape.lines - line : step;
          add_lines<kBits, kShare, kDigits>(w, shape, a, {n, end, from, to, line, lines}, panel);
        }
        for (int64_t m = from / kDigits; m < to / kDigits; ++m)
          write(panel, m - from / kDigits, end - n, w.y_stride, y + m * w.y_stride + n);
      }
    }
  }

 private:
  // Some columns of a panel, unpacked: for each group of four columns, kWide vectors of outputs.
  struct Panel {
    alignas(64) uint8_t weights[kPanelBytes];
    alignas(64) float scales[kPanelBytes / 16];
    alignas(
        64) int32_t moves[kPanelBytes / 16];  // by zero points: of levels of 4 bits; of sums of 8
    alignas(64) float y[kPanels][kMostRows * kPanel];
  };

  static Panel& scratch() {
    static thread_local Panel panel;
    return panel;
  }

  // Columns of y, rows of activations, lines of both.
  struct Part {
    int64_t first, last, from, to, line, lines;
  };

  template <int kBits, int kShare, int kDigits>
  static void add_lines(const QuantMatrix& w, const Shape& shape, const Activations& a,
                        const Part& p, Panel& panel) {
    const int64_t block = p.line / shape.lines_per_block * shape.blocks_per_line;
    int64_t blocks = ceil_div(p.lines, shape.lines_per_block) * shape.blocks_per_line;
    if (block + blocks > shape.blocks) blocks = shape.blocks - block;
    const bool zeros = kBits == 8 && w.zero_points;
    const auto run =
        zeros ? tiles<kBits, kShare, kBits == 8, kDigits> : tiles<kBits, kShare, false, kDigits>;
    for (int64_t n = p.first; n < p.last; n += kPanel) {
      unpack_scales<kBits>(w, shape, n, block, blocks, panel);
      unpack<kBits, kShare>(w, shape, n, p.line, p.lines, panel);
      const bool last = n + kPanel >= p.last;
      fetch_weights(w, shape, last ? p.first : n + kPanel, p.line + (last ? p.lines : 0), p.lines);
      run(a, p.from, p.to, p.line, block, blocks, shape.lines_per_block, panel,
          panel.y[(n - p.first) / kPanel]);
    }
  }

  // Levels of 4 bits are moved by what Panel::moves has.
  template <int kBits, int kShare>
  static void unpack(const QuantMatrix& w, const Shape& shape, int64_t first, int64_t line,
                     int64_t lines, Panel& panel) {
    constexpr int64_t n = Base::template kParts<kBits>, per_line = kLanes / kShare;
    Int rows[kLanes];
    for (int64_t l = 0; l < lines; ++l) {
      const int32_t* moves = panel.moves + l / shape.lines_per_block * per_line * kPanel;
      uint8_t* out = panel.weights + l * kLanes * n * kWide * kVector;
      const int64_t at = (line + l) * kVector;
      const int64_t left = shape.row_bytes - at;
      for (int wide = 0; wide < kWide; ++wide) {
        const int64_t row = first + wide * kLanes, there = w.rows - row;
        const uint8_t* data = w.data + row * shape.row_bytes + at;
        if (there >= kLanes && left >= kVector) {
          for (int lane = 0; lane < kLanes; ++lane, data += shape.row_bytes) {
            __builtin_prefetch(data + kVector);  // from L2
            rows[lane] = Simd::load(data);
          }
        } else {
          for (int lane = 0; lane < kLanes; ++lane, data += shape.row_bytes)
            rows[lane] = lane < there ? load_up_to(data, left) : Simd::zero();
        }
        Simd::transpose(rows);
        for (int lane = 0; lane < kLanes; ++lane) {
          uint8_t* to = out + (lane * n * kWide + wide) * kVector;
          if constexpr (kBits == 8) {
            Simd::store(to, Simd::kSignedBytes ? Simd::flip_sign(rows[lane]) : rows[lane]);
          } else {
            const auto moved = [&](Int half) {
              const int64_t block = lane / kShare;
              return Simd::add(half, Simd::load(moves + block * kPanel + wide * kLanes));
            };
            Simd::store(to, moved(Simd::low_half(rows[lane])));
            Simd::store(to + kWide * kVector, moved(Simd::high_half(rows[lane])));
          }
        }
      }
    }
  }

  // From memory into L2, while the tiles are computed: what is unpacked after them.
  static void fetch_weights(const QuantMatrix& w, const Shape& shape, int64_t first, int64_t line,
                            int64_t lines) {
    const int64_t end = w.rows - first < kPanel ? w.rows : first + kPanel;
    for (int64_t row = first; row < end; ++row)
      for (int64_t at = line * kVector; at < (line + lines) * kVector; at += kCacheLine)
        __builtin_prefetch(w.data + row * shape.row_bytes + at, 0, 2);
  }

  static Int load_up_to(const uint8_t* data, int64_t left) {
    if (left >= kVector) return Simd::load(data);
    alignas(64) uint8_t padded[kVector] = {};
    std::memcpy(padded, data, left);
    return Simd::load(padded);
  }

  // The scales of some blocks by blocks instead of rows, and what their zero points need.
  template <int kBits>
  static void unpack_scales(const QuantMatrix& w, const Shape& shape, int64_t first, int64_t block,
                            int64_t blocks, Panel& panel) {
    const bool zeros = w.zero_points;
    for (int64_t b = 0; b < blocks; b += kLanes)
      for (int64_t n = 0; n < kPanel; n += kLanes) {
        const int64_t count = blocks - b < kLanes ? blocks - b : kLanes;
        Int scales[kLanes], points[kLanes];
        for (int lane = 0; lane < kLanes; ++lane) {
          const int64_t row = first + n + lane;
          const int64_t there = row < w.rows ? row : w.rows - 1;  // its results are not written
          const int64_t at = there * shape.blocks + block + b;
          scales[lane] = Simd::bits(Base::load_scales(w, shape, at, count));
          if (zeros) points[lane] = zero_points<kBits>(w, shape, there, block + b, count);
        }
        Simd::transpose(scales);
        if (zeros) Simd::transpose(points);
        for (int64_t i = 0; i < count; ++i) {
          const int64_t to = (b + i) * kPanel + n;
          Simd::store(panel.scales + to, scales[i]);
          if (kBits == 4) Simd::store(panel.moves + to, zeros ? moves(points[i]) : middle_moves());
          if (kBits == 8 && zeros)
            Simd::store(panel.moves + to, Simd::sub(Simd::broadcast(128), points[i]));
        }
      }
  }

  template <int kBits>
  static Int zero_points(const QuantMatrix& w, const Shape& shape, int64_t row, int64_t block,
                         int64_t count) {
    const uint8_t* from = w.zero_points + row * shape.zero_point_bytes + block * kBits / 8;
    const uint8_t* end = w.zero_points + w.rows * shape.zero_point_bytes;
    return Base::template load_zero_points<kBits>(from, end, count);
  }

  // Zero points of 4 bits go into the levels: w − z + 15 is a level without sign, and each group of four
  // columns is moved by four times the same byte. Of 8 bits, what the middle is beside them meets the sums
  // of codes.
  static Int moves(Int points) {
    const Int most = Simd::broadcast(kMaxNibble * kFourBytes);
    return Simd::add(most, Simd::times(points, Simd::broadcast(-kFourBytes)));
  }
  static Int middle_moves() {
    return Simd::broadcast((kMaxNibble - Base::template kZeroPoint<4>)*kFourBytes);
  }

  // kRows rows of activations times a panel, over `blocks` blocks; added to y [kRows / kDigits,
  // kPanel].
  template <int kBits, int kShare, int kRows, bool kZeros, int kDigits>
  static void tile(const Activations& a, int64_t index, int64_t line, int64_t block, int64_t blocks,
                   int64_t per_block, const Panel& panel, float* y) {
    constexpr int64_t kLineCodes = Base::template kCodes<kBits>;
    constexpr int64_t per_line = kLanes / kShare;
    const int8_t* codes = a.codes + index * a.stride + line * kLineCodes;
    const uint8_t* weights = panel.weights;
    const float* x_scales = a.scales + index * a.blocks + block;
    const int32_t* x_sums = a.sums + index * a.blocks + block;
    const int32_t* starts = a.starts + index * a.blocks + block;
    for (int64_t b = 0; b < blocks; ++b) {
      Int dots[kRows][kWide];
      unrolled<kRows>([&](auto r) {
        const Int start = Simd::broadcast(starts[r * a.blocks + b]);
        unrolled<kWide>([&](auto j) { dots[r][j] = start; });
      });
      if constexpr (kShare < kLanes) {
        const int8_t* from = codes + b / per_line * kLineCodes;
        if (b % per_line == 0) fetch_next<kBits, kRows>(from, a.stride);
        from += b % per_line * kShare * 4;
        weights = multiply_lanes<kBits, kShare, kRows>(from, a.stride, weights, dots);
      } else {
        for (int64_t l = 0; l < per_block; ++l, codes += kLineCodes) {
          fetch_next<kBits, kRows>(codes, a.stride);
          weights = multiply_lanes<kBits, kShare, kRows>(codes, a.stride, weights, dots);
        }
      }
      unrolled<kRows / kDigits>([&](auto r) {
        constexpr int kFirst = r * kDigits, kLast = kFirst + kDigits - 1;
        const Float x_scale = Simd::broadcast_float(x_scales[kLast * a.blocks + b]);
        unrolled<kWide>([&](auto j) {
          float* to = y + r * kPanel + j * kLanes;
          const int64_t at = b * kPanel + j * kLanes;
          const Float scale = Simd::mul(Simd::load_float(panel.scales + at), x_scale);
          Int dot = dots[kLast][j];
          dot = Base::template combine_digits<kDigits>(dots[kFirst][j], dot);
          if constexpr (kZeros) {
            int32_t codes = x_sums[kLast * a.blocks + b];
            if constexpr (kDigits == 2) codes += kDigit * x_sums[kFirst * a.blocks + b];
            dot = Simd::add(dot, Simd::times(Simd::load(panel.moves + at), Simd::broadcast(codes)));
          }
          Simd::store_float(to, Simd::fma(Simd::to_float(dot), scale, Simd::load_float(to)));
        });
      });
      // The sums stay in memory, in L1: the registers are for the products.
      asm volatile("" ::: "memory");
    }
  }

  // Into L1: what a line meets in the next tile of rows, which no pattern announces.
  template <int kBits, int kRows>
  [[gnu::always_inline]] static void fetch_next(const int8_t* codes, int64_t stride) {
    unrolled<kRows>([&](auto r) {
      for (int64_t at = 0; at < Base::template kCodes<kBits>; at += kVector)
        __builtin_prefetch(codes + (kRows + r) * stride + at);
    });
  }

  // The columns of some lanes of a line; returns the weights behind them.
  template <int kBits, int kShare, int kRows>
  [[gnu::always_inline]] static const uint8_t* multiply_lanes(const int8_t* codes, int64_t stride,
                                                              const uint8_t* weights,
                                                              Int (&dots)[kRows][kWide]) {
    constexpr int kParts = Base::template kParts<kBits>;
    constexpr int kGroups = kParts;  // lanes at a time
    static_assert(2 * kGroups * kParts <= Base::kMaxShortProducts, "weights are from 0 to 30");
    for (int lane = 0; lane < kShare; lane += kGroups, codes += 4 * kGroups) {
      Int sums[kRows][kWide];
      const auto each = [](const auto& body) {
        unrolled<kRows>([&](auto r) { unrolled<kWide>([&](auto j) { body(r, j); }); });
      };
      each([&](auto r, auto j) { sums[r][j] = Base::template begin_block<kBits>(dots[r][j]); });
      unrolled<kGroups * kParts>([&](auto g) {
        Int columns[kWide];
        unrolled<kWide>([&](auto j) { columns[j] = Simd::load(weights + j * kVector); });
        weights += kWide * kVector;
        unrolled<kRows>([&](auto r) {
          const int8_t* four = codes + r * stride + g / kParts * 4 + g % kParts * kVector;
          const Int x = Simd::broadcast_bytes(four);
          unrolled<kWide>(
              [&](auto j) { sums[r][j] = Base::template accumulate<kBits>(sums[r][j], columns[j], x); });
        });
      });
      each([&](auto r, auto j) {
        dots[r][j] = Base::template end_block<kBits>(sums[r][j], dots[r][j]);
      });
    }
    return weights;
  }

  template <int kBits, int kShare, bool kZeros, int kDigits>
  static void tiles(const Activations& a, int64_t from, int64_t to, int64_t line, int64_t block,
                    int64_t blocks, int64_t per_block, const Panel& panel, float* sums) {
    int64_t m = from;
    constexpr int kHere = kTall<kBits> / kDigits * kDigits;
    for (; m + kHere <= to; m += kHere, sums += kHere / kDigits * kPanel)
      tile<kBits, kShare, kHere, kZeros, kDigits>(a, m, line, block, blocks, per_block, panel,
                                                  sums);
    // The rest of the rows, by a tile of their number.
    if constexpr (kHere > kDigits) {
      if (m < to)
        rest<kBits, kShare, kZeros, kDigits, kHere - kDigits>(a, m, to - m, line, block, blocks,
                                                              per_block, panel, sums);
    }
  }

  template <int kBits, int kShare, bool kZeros, int kDigits, int kRows>
  static void rest(const Activations& a, int64_t m, int64_t left, int64_t line, int64_t block,
                   int64_t blocks, int64_t per_block, const Panel& panel, float* y) {
    if (left == kRows) {
      tile<kBits, kShare, kRows, kZeros, kDigits>(a, m, line, block, blocks, per_block, panel, y);
    } else if constexpr (kRows > kDigits) {
      rest<kBits, kShare, kZeros, kDigits, kRows - kDigits>(a, m, left, line, block, blocks,
                                                            per_block, panel, y);
    }
  }

  static void start(const QuantMatrix& w, int64_t first, int64_t last, int64_t rows, Panel& panel) {
    for (int64_t n = first; n < last; n += kPanel) {
      float bias[kPanel] = {};
      const int64_t width = last - n < kPanel ? last - n : kPanel;
      if (w.bias) std::memcpy(bias, w.bias + n, width * sizeof(float));
      float* sums = panel.y[(n - first) / kPanel];
      for (int64_t m = 0; m < rows; ++m) std::memcpy(sums + m * kPanel, bias, sizeof(bias));
    }
  }

  // A row's columns of all panels at once: in y, rows lie on pages of their own, of which no pattern
  // announces the next.
  static void write(const Panel& panel, int64_t row, int64_t width, int64_t y_row, float* y) {
    constexpr int64_t kAhead = 2;
    for (int64_t n = 0; n < width; n += kCacheLine / sizeof(float))
      __builtin_prefetch(y + kAhead * y_row + n, 1);
    for (int64_t n = 0; n < width; n += kPanel)
      copy_columns(panel.y[n / kPanel] + row * kPanel, width - n, y + n);
  }

  static void copy_columns(const float* from, int64_t left, float* to) {
    if (left >= kPanel)
      std::memcpy(to, from, kPanel * sizeof(float));
    else
      std::memcpy(to, from, left * sizeof(float));
  }
};

}  // namespace rgexport
