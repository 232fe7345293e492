// The product of 2 to 16 rows of activations, such as conversations that share a step, or a few tokens of
// one: weights are read from memory once, and unpacked once for up to Simd::kTogether rows.
//
//   y[m, n] = Σ_b s_w[n, b] · s_x[m, b] · (starts[m, b] + Σ_{k in b} w[n, k] · x̂[m, k])
//
// Layout: outputs lie side by side. A panel is kLanes rows of weights, so that a vector has one lane for
// each output. 16 bytes of each of these rows are loaded and transposed, four lanes of a line at a time:
//
//     row 0    | a0 a1 a2 a3 |            column 0  | a0 b0 c0 d0 |
//     row 1    | b0 b1 b2 b3 |      →     column 1  | a1 b1 c1 d1 |     (each letter with its number:
//     row 2    | c0 c1 c2 c3 |            column 2  | a2 b2 c2 d2 |      32 bits, four bytes of weights)
//     row 3    | d0 d1 d2 d3 |            column 3  | a3 b3 c3 d3 |
//
// A column is multiplied with four codes of each row of activations, broadcast to all lanes.
//
// Loop order: panels of outputs; pieces of up to kPieceLines lines (the panel's weights for a piece stay in
// L1, so that a second group of rows finds them there); groups of rows of activations; lines; lanes.
//
// A row of activations gives the same bits as alone (quant_few.h): the product of block b is added to partial
// sum b mod kLanes of its output, and these partial sums are added in the order of Simd::sum.
//
// Needs of a Simd: load_quarters, transpose_fours, transpose, dot (or add_short and add_pairs), fma.
#pragma once

#include "quant_layout.h"
#include "reading.h"
#include "unrolled.h"

namespace rgexport {

template <class Simd>
class QuantSeveral : QuantLayout<Simd> {
  using Base = QuantLayout<Simd>;
  using Base::kCacheLine;
  using Base::kLanes;
  using Base::kVector;
  using typename Base::Float;
  using typename Base::Int;
  using typename Base::Shape;
  static constexpr int kGroup = 4;            // lanes of a line that are transposed at a time
  static constexpr int64_t kAheadBytes = 512;  // of a row: from the bytes that are read to the prefetch
  static constexpr int64_t kMaxBlockBytes = 256;
  static constexpr int64_t kPieceLines = 32;  // lines that all rows of activations use: whole blocks
  // A piece has an even number of blocks of 4 bits (at most 128 bytes), whose zero points share bytes.
  static_assert(kPieceLines * kVector % kMaxBlockBytes == 0);

 public:
  static constexpr int64_t kMaxRows = 16;  // of activations

  // Computes columns [first, last) of y. kShare lanes of a line share a scale.
  template <int kBits, int kShare, int kDigits>
  static void stream(const QuantMatrix& w, const Activations& a, int64_t first, int64_t last,
                     float* y) {
    const Shape shape(w);
    for (int64_t n = first; n < last; n += kLanes) {
      const int64_t width = smaller_of(last - n, kLanes);
      Panel<kBits, kShare, kDigits>(w, shape, a, n, width).multiply(y + n);
    }
  }

 private:
  // Read pointers of kLanes rows of weights. There is one pointer for every fourth row; the rows between are
  // reached by multiples of the stride, because x86 has too few registers for kLanes pointers. Its addressing
  // modes have no factor of 3, so that multiple is kept.
  class RowPointers {
   public:
    RowPointers(const uint8_t* data, int64_t stride) : stride_(stride), stride3_(3 * stride) {
      unrolled<kLanes / 4>([&](auto i) { fourth_rows_[i] = data + 4 * i * stride; });
    }
    [[gnu::always_inline]] const uint8_t* at(int row) const {
      return fourth_rows_[row / 4] + (row % 4 == 3 ? stride3_ : row % 4 * stride_);
    }
    void advance(int64_t bytes) {
      unrolled<kLanes / 4>([&](auto i) { fourth_rows_[i] += bytes; });
    }

   private:
    const uint8_t* fourth_rows_[kLanes / 4];
    int64_t stride_, stride3_;
  };

  // The next cache lines to prefetch: one of each row in turn, then the next one of each row.
  class PrefetchPointer {
   public:
    PrefetchPointer(const uint8_t* data, int64_t stride)
        : data_(data), stride_(stride), stride3_(3 * stride) {}
    [[gnu::always_inline]] const uint8_t* row(int i) const {
      return data_ + i / 4 * 4 * stride_ + (i % 4 == 3 ? stride3_ : i % 4 * stride_);
    }
    void advance(int rows) {
      data_ += rows * stride_;
      row_ += rows;
      if (row_ < kLanes) return;
      data_ += kCacheLine - kLanes * stride_;
      row_ = 0;
    }

   private:
    const uint8_t* data_;
    int64_t stride_, stride3_;
    int row_ = 0;
  };

  // Computes outputs [first, first + width). At the end of the matrix the panel begins earlier, so that it
  // still has kLanes rows; the outputs before `first` are computed a second time and not written.
  template <int kBits, int kShare, int kDigits>
  class Panel {
    static constexpr int kParts = Base::template kParts<kBits>;
    static constexpr int64_t kLineCodes = Base::template kCodes<kBits>;
    static constexpr bool kShort = Base::template kShort<kBits>;
    static constexpr int kLineBlocks = kLanes / kShare;   // blocks in a line, or 1
    static constexpr bool kInLine = kShare < kLanes;      // whether a line has several blocks
    // A run is the lanes that are multiplied between begin_run and end_run: those with one scale, but at
    // least kGroup.
    static constexpr int kRun = kShare < kGroup ? kGroup : kShare;
    static constexpr int kRuns = kLanes / kRun;
    static constexpr int kRunBlocks = kRun / kShare;
    static constexpr int kPrefetchLanes = kCacheLine / kVector;  // from one prefetch to the next

   public:
    Panel(const QuantMatrix& w, const Shape& shape, const Activations& a, int64_t first,
          int64_t width)
        : w_(w), shape_(shape), a_(a), first_(first_row(w, first)),
          valid_rows_(w.rows < kLanes ? w.rows : kLanes), skipped_(first - first_), width_(width),
          rows_(w.data + first_ * shape.row_bytes),
          ahead_(smaller_of(shape.row_bytes, kAheadBytes)),
          ahead_next_rows_(ahead_ + (kLanes - 1) * shape.row_bytes) {}

    // Writes the panel's outputs for all rows of activations; y is [rows of x, w.y_stride].
    void multiply(float* y) {
      const int64_t count = a_.count / kDigits;
      std::memset(sums_, 0, count * sizeof *sums_);
      // Vectors are loaded only where all of their bytes are inside the matrix.
      const int64_t readable_lines = valid_rows_ == kLanes ? shape_.full_lines : 0;
      for (int64_t line = 0; line < shape_.lines;) {
        int64_t lines = smaller_of(readable_lines - line, kPieceLines);
        data_ = rows_ + line * kVector;
        stride_ = shape_.row_bytes;
        if (lines <= 0) {
          // An even number of blocks: the zero points of two blocks of 4 bits share a byte.
          lines = smaller_of(2 * shape_.lines_per_block, shape_.lines - line);
          copy_last_lines(line, lines);
        }
        select_piece(line, lines);
        accumulate_rows(0, count);
        line += lines;
      }
      for (int64_t m = 0; m < count; ++m) write_row(sums_[m], y + m * w_.y_stride);
    }

   private:
    // Returns the first row of the panel that computes row `first`.
    static int64_t first_row(const QuantMatrix& w, int64_t first) {
      if (w.rows < kLanes) return 0;
      return first + kLanes < w.rows ? first : w.rows - kLanes;
    }

    // Writes one row of y from its kLanes partial sums. They are added by halves, as Simd::sum adds lanes.
    void write_row(float (&sums)[kLanes][kLanes], float* y) const {
      for (int half = kLanes / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) {
          const Float sum = Simd::add(Simd::load_float(sums[i]), Simd::load_float(sums[i + half]));
          Simd::store_float(sums[i], sum);
        }
      }
      if (w_.bias) {
        alignas(64) float bias[kLanes] = {};
        std::memcpy(bias, w_.bias + first_, valid_rows_ * sizeof(float));
        Simd::store_float(sums[0], Simd::add(Simd::load_float(sums[0]), Simd::load_float(bias)));
      }
      if (width_ == kLanes)
        std::memcpy(y, sums[0], kLanes * sizeof(float));
      else
        std::memcpy(y, sums[0] + skipped_, width_ * sizeof(float));
    }

    // Copies lines that reach beyond the rows or the matrix into padded_, with zeros behind them.
    void copy_last_lines(int64_t line, int64_t lines) {
      const int64_t start = line * kVector;
      const int64_t bytes = smaller_of(shape_.row_bytes - start, lines * kVector);
      std::memset(padded_, 0, sizeof padded_);
      for (int64_t row = 0; row < valid_rows_; ++row)
        std::memcpy(padded_[row], rows_ + row * shape_.row_bytes + start, bytes);
      data_ = padded_[0];
      stride_ = sizeof *padded_;
    }

    // Makes [line, line + lines) the lines that accumulate_rows multiplies, and loads their scales.
    void select_piece(int64_t line, int64_t lines) {
      line_ = line;
      lines_ = lines;
      block_ = line / shape_.lines_per_block * kLineBlocks;
      const int64_t blocks = lines / shape_.lines_per_block * kLineBlocks;
      for (int64_t b = 0; b < blocks; b += kLanes) load_block_scales(b, shape_.blocks - block_ - b);
    }

    // Loads the scales and zero points of kLanes blocks, from block b of the piece on, and transposes them
    // from [row][block] to [block][row]. Only the first `count` blocks exist.
    void load_block_scales(int64_t b, int64_t count) {
      Int scales[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        const int64_t index = row_of(lane) * shape_.blocks + block_ + b;
        fetch_into<Cache::kL2>(address_of(w_.scales, index + kLanes * shape_.blocks));
        scales[lane] = Simd::bits(Base::load_scales(w_, shape_, index, count));
      }
      Simd::transpose(scales);
      for (int64_t i = 0; i < kLanes; ++i) Simd::store(scales_[b + i], scales[i]);
      if (!w_.zero_points) return;

      Int offsets[kLanes];
      const uint8_t* end = w_.zero_points + w_.rows * shape_.zero_point_bytes;
      for (int lane = 0; lane < kLanes; ++lane) {
        const uint8_t* row = w_.zero_points + row_of(lane) * shape_.zero_point_bytes;
        const uint8_t* from = row + (block_ + b) * kBits / 8;
        offsets[lane] = Base::template load_zero_point_offsets<kBits>(from, end, count);
      }
      Simd::transpose(offsets);
      for (int64_t i = 0; i < kLanes; ++i) Simd::store(offsets_[b + i], offsets[i]);
    }

    // Returns the matrix's row of a lane; lanes without a row repeat the last one.
    int64_t row_of(int lane) const { return first_ + smaller_of(lane, valid_rows_ - 1); }

    // Accumulates the piece for rows [m, count) of activations: kRows at a time, then the rest by instances
    // for fewer rows. There are instances for 16, 12, 8, 6, 4, 3, 2, 1 rows, up to Simd::kTogether.
    template <int kRows = Simd::kTogether>
    void accumulate_rows(int64_t m, int64_t count) {
      for (; m + kRows <= count; m += kRows) accumulate_piece<kRows>(m);
      if constexpr (kRows > 1) {
        constexpr int kFewerRows = kRows - (kRows > 8 ? 4 : kRows > 4 ? 2 : 1);
        accumulate_rows<kFewerRows>(m, count);
      }
    }

    // Dot products of the blocks of a run. With few rows, a block has kSplit accumulators: with one, each dot
    // product would have to wait for the one before. `first_digit` is used with two digits only.
    template <int kRows>
    struct Dots {
      static constexpr int kSplit = kInLine || kShort || kRows > 7 ? 1 : kRows > 3 ? 2 : 4;
      static constexpr int kSums = kRunBlocks * kSplit;
      Int last_digit[kRows][kSums], first_digit[kRows][kSums];
    };

    // Position in the data that belongs to blocks, for the first of kRows rows of activations.
    struct BlockCursor {
      const int32_t* starts;
      const int32_t* x_sums;
      const float* x_scales;
      const float (*scales)[kLanes];
      const int32_t (*offsets)[kLanes];
      int64_t count;  // rows of activations, from one block to the next
      int64_t block;

      void advance() {
        starts += count;
        x_sums += count;
        x_scales += count;
        ++scales;
        ++offsets;
        ++block;
      }
    };

    // Adds the products of the piece with rows [m, m + kRows) of activations to their partial sums.
    template <int kRows>
    [[gnu::noinline]] void accumulate_piece(int64_t m) {
      const int64_t lines = lines_;
      const int64_t lines_per_block = shape_.lines_per_block;
      const int64_t count = a_.count / kDigits;
      const int64_t first_number = block_ * count + m;
      const int64_t line_codes = a_.count * kLineCodes;  // from one line of codes to the next
      // Lanes in one piece of code: with many rows and more lanes, GCC would keep the sums in memory.
      constexpr int kUnrolled = kRows > 8 ? kGroup : kRun;
      const int8_t* codes = a_.codes + line_ * line_codes + m * kDigits * kLineCodes;
      BlockCursor cursor = {a_.starts + first_number,
                            a_.sums + first_number,
                            a_.scales + first_number,
                            scales_,
                            offsets_,
                            count,
                            block_};
      RowPointers rows(data_, stride_);
      PrefetchPointer prefetch(rows_ + line_ * kVector, shape_.row_bytes);
      for (int64_t line = 0; line < lines;) {
        const int64_t ahead = prefetch_distance(line);
#pragma GCC unroll 1
        for (int run = 0; run < kRuns; ++run) {
          Dots<kRows> dots;
          begin_run<kRows>(cursor, dots);
#pragma GCC unroll 1
          for (int64_t block_line = kInLine ? 1 : lines_per_block; block_line > 0; --block_line) {
#pragma GCC unroll 1
            for (int lane = 0; lane < kRun; lane += kUnrolled) {
              unrolled<kUnrolled / kGroup>([&](auto group) {
                accumulate_group<kRows, group>(rows, prefetch, ahead, codes, dots);
              });
              rows.advance(4 * kUnrolled);
              prefetch.advance(kUnrolled / kPrefetchLanes);
              codes += 4 * kUnrolled;
            }
            if (!kInLine) codes += line_codes - kVector;
          }
          end_run<kRows>(cursor, dots, sums_ + m);
        }
        line += kInLine ? 1 : lines_per_block;
        if (kInLine) codes += line_codes - kVector;
      }
    }

    // Sets the accumulators of a run to what its blocks start from.
    template <int kRows>
    [[gnu::always_inline]] static void begin_run(const BlockCursor& cursor, Dots<kRows>& dots) {
      constexpr int kSums = Dots<kRows>::kSums;
      unrolled<kRows * kSums>([&](auto i) {
        dots.last_digit[i / kSums][i % kSums] = Simd::zero();
        dots.first_digit[i / kSums][i % kSums] = Simd::zero();
      });
      unrolled<kRows * kRunBlocks>([&](auto i) {
        constexpr int r = i / kRunBlocks, block = i % kRunBlocks;
        dots.last_digit[r][block] = Simd::broadcast(cursor.starts[block * cursor.count + r]);
      });
    }

    // Scales the dot products of a run and adds them to the partial sums of their blocks.
    template <int kRows>
    [[gnu::always_inline]] void end_run(BlockCursor& cursor, const Dots<kRows>& dots,
                                        float (*sums)[kLanes][kLanes]) const {
      unrolled<kRunBlocks>([&](auto block) {
        const Float scale = Simd::load_float(*cursor.scales);
        unrolled<kRows>([&](auto r) {
          const Int first_digit = total(dots.first_digit[r], block);
          const Int last_digit = total(dots.last_digit[r], block);
          Int dot = Base::template combine_digits<kDigits>(first_digit, last_digit);
          if (w_.zero_points) {
            const Int x_sum = Simd::broadcast(cursor.x_sums[r]);
            dot = Simd::add(dot, Simd::times(Simd::load(*cursor.offsets), x_sum));
          }
          const Float x_scale = Simd::broadcast_float(cursor.x_scales[r]);
          float* sum = sums[r][cursor.block % kLanes];
          Simd::store_float(sum, Simd::fma(Simd::to_float(dot), Simd::mul(scale, x_scale),
                                           Simd::load_float(sum)));
        });
        cursor.advance();
      });
    }

    // Returns the sum of the kSplit accumulators of a block.
    template <int kSums>
    [[gnu::always_inline]] static Int total(const Int (&sums)[kSums], int block) {
      Int sum = sums[block];
      unrolled<kSums / kRunBlocks - 1>(
          [&](auto i) { sum = Simd::add(sum, sums[(i + 1) * kRunBlocks + block]); });
      return sum;
    }

    // Multiplies lanes [kIndex · kGroup, (kIndex + 1) · kGroup) of a line with kRows rows of activations.
    template <int kRows, int kIndex>
    [[gnu::always_inline]] static void accumulate_group(const RowPointers& rows,
                                                        const PrefetchPointer& prefetch,
                                                        int64_t ahead, const int8_t* codes,
                                                        Dots<kRows>& dots) {
      Int columns[kGroup];
      unrolled<kGroup>([&](auto i) {
        columns[i] = Simd::load_quarters(
            [&](int quarter) { return rows.at(4 * quarter + i) + kIndex * 4 * kGroup; });
      });
      Simd::transpose_fours(columns);

      Int short_sums[kRows][kRunBlocks];
      if constexpr (kShort)
        unrolled<kRows * kRunBlocks>(
            [&](auto i) { short_sums[i / kRunBlocks][i % kRunBlocks] = Simd::zero(); });
      unrolled<kGroup>([&](auto i) {
        constexpr int lane = kIndex * kGroup + i, block = i * kRunBlocks / kGroup;
        prefetch_lane<lane>(prefetch, ahead);
        const auto weights = Base::template unpacked<kBits>(columns[i]);
        unrolled<kParts>([&](auto part) {
          [[maybe_unused]] constexpr int sum =
              (lane * kParts + part) * kRunBlocks % Dots<kRows>::kSums + block;
          unrolled<kRows>([&](auto r) {
            const int8_t* last_digit_codes =
                codes + ((r + 1) * kDigits - 1) * kLineCodes + 4 * lane + part * kVector;
            const Int x = Simd::broadcast_bytes(last_digit_codes);
            if constexpr (kShort)
              short_sums[r][block] = Simd::add_short(short_sums[r][block], weights.parts[part], x);
            else
              dots.last_digit[r][sum] =
                  Simd::dot(dots.last_digit[r][sum], weights.parts[part], x);
            if constexpr (kDigits == 2)
              dots.first_digit[r][sum] =
                  Simd::dot(dots.first_digit[r][sum], weights.parts[part],
                            Simd::broadcast_bytes(last_digit_codes - kLineCodes));
          });
        });
      });
      if constexpr (kShort)
        unrolled<kRows * kRunBlocks>([&](auto i) {
          constexpr int r = i / kRunBlocks, block = i % kRunBlocks;
          Int& dot = dots.last_digit[r][block];
          dot = Simd::add_pairs(dot, short_sums[r][block]);
        });
    }

    // Returns the distance from a line to what is prefetched with it: in the same rows, or, near their end,
    // at the start of the next kLanes rows.
    int64_t prefetch_distance(int64_t line) const {
      const int64_t position = (line_ + line) * kVector;
      return position + ahead_ < shape_.row_bytes ? ahead_ : ahead_next_rows_;
    }

    // Prefetches one cache line for each 64 bytes that are multiplied; many prefetches at once would keep
    // loads waiting.
    template <int kLane>
    [[gnu::always_inline]] static void prefetch_lane(const PrefetchPointer& prefetch,
                                                     int64_t ahead) {
      if constexpr (kLane % kPrefetchLanes == 0) {
        const uint8_t* from = prefetch.row(kLane / kPrefetchLanes);
        fetch_into<Cache::kL2>(from + ahead);
        fetch_into<Cache::kL1>(from + kCacheLine);
      }
    }

    const QuantMatrix& w_;
    const Shape& shape_;
    const Activations& a_;
    const int64_t first_;       // first row of weights of the panel
    const int64_t valid_rows_;  // rows of weights: kLanes, or fewer if the matrix has fewer
    const int64_t skipped_;     // outputs before those that are written
    const int64_t width_;       // outputs that are written
    const uint8_t* const rows_;
    const int64_t ahead_;            // prefetch distance in bytes, in the same rows
    const int64_t ahead_next_rows_;  // and across the end of the rows
    // The current piece: its first line, its number of lines, its first block, where its bytes are.
    int64_t line_, lines_, block_, stride_;
    const uint8_t* data_;
    alignas(64) float sums_[kMaxRows][kLanes][kLanes];  // [row of x][partial sum][output]
    alignas(64) float scales_[kPieceLines * kLanes / 2][kLanes];      // [block][output]
    alignas(64) int32_t offsets_[kPieceLines * kLanes / 2][kLanes];  // [block][output]
    alignas(64) uint8_t padded_[kLanes][2 * kMaxBlockBytes];
  };
};

}  // namespace rgexport
