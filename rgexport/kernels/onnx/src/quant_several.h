// Several rows of activations, such as conversations or a few tokens of one: weights are read from memory
// once, and unpacked once for Simd::kTogether rows.
//
// Outputs lie side by side: of kLanes rows of weights, 16 bytes each become four vectors, which all rows
// of activations meet. A row gives what it gives alone, see quant_few.h, to the last bit: block b has its
// place in sum b mod kLanes of an output, and those are added as Simd::sum adds lanes.
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
  static constexpr int kGroup = 4;        // lanes of a line that are transposed at a time
  static constexpr int64_t kAhead = 512;  // bytes of a row, from what is read to what is fetched
  static constexpr int64_t kMostBlock = 256;  // bytes
  static constexpr int64_t kPieceLines = 32;  // that all rows of x meet: whole blocks
  // An even number of blocks of 4 bits, whose zero points share a byte in pairs: they have 128 bytes.
  static_assert(kPieceLines * kVector % kMostBlock == 0);

 public:
  static constexpr int64_t kMost = 16;  // rows of x

  // Columns of y, where kShare lanes of a line share a scale.
  template <int kBits, int kShare, int kDigits>
  static void stream(const QuantMatrix& w, const Activations& a, int64_t first, int64_t last,
                     float* y) {
    const Shape shape(w);
    for (int64_t n = first; n < last; n += kLanes) {
      Panel<kBits, kShare, kDigits>(w, shape, a, n, least(last - n, kLanes)).multiply(y + n);
    }
  }

 private:
  // Where kLanes rows are read: each fourth one has a pointer. (x86 has no addresses with a factor of 3.)
  class Rows {
   public:
    Rows(const uint8_t* data, int64_t stride) : stride_(stride), three_(3 * stride) {
      unrolled<kLanes / 4>([&](auto i) { fourth_[i] = data + 4 * i * stride; });
    }
    [[gnu::always_inline]] const uint8_t* at(int row) const {
      return fourth_[row / 4] + (row % 4 == 3 ? three_ : row % 4 * stride_);
    }
    void advance(int64_t bytes) {
      unrolled<kLanes / 4>([&](auto i) { fourth_[i] += bytes; });
    }

   private:
    const uint8_t* fourth_[kLanes / 4];
    int64_t stride_, three_;
  };

  // The next lines of the cache to fetch: one of each row in turn, then the next one of each.
  class Fetched {
   public:
    Fetched(const uint8_t* data, int64_t stride) : at_(data), stride_(stride), three_(3 * stride) {}
    [[gnu::always_inline]] const uint8_t* row(int i) const {
      return at_ + i / 4 * 4 * stride_ + (i % 4 == 3 ? three_ : i % 4 * stride_);
    }
    void advance(int rows) {
      at_ += rows * stride_;
      row_ += rows;
      if (row_ < kLanes) return;
      at_ += kCacheLine - kLanes * stride_;
      row_ = 0;
    }

   private:
    const uint8_t* at_;
    int64_t stride_, three_;
    int row_ = 0;
  };

  // Outputs [first, first + width), with others beside them that fill a vector.
  template <int kBits, int kShare, int kDigits>
  class Panel {
    static constexpr int kParts = Base::template kParts<kBits>;
    static constexpr int64_t kLineCodes = Base::template kCodes<kBits>;
    static constexpr bool kShort = Base::template kShort<kBits>;
    static constexpr int kLineBlocks = kLanes / kShare;  // with scales of their own
    static constexpr bool kInLine = kShare < kLanes;
    // Lanes that are multiplied between open and close: those with one scale, but not fewer than kGroup.
    static constexpr int kRun = kShare < kGroup ? kGroup : kShare, kRuns = kLanes / kRun;
    static constexpr int kFetchEvery = kCacheLine / kVector;
    static constexpr int kRunBlocks = kRun / kShare;

   public:
    Panel(const QuantMatrix& w, const Shape& shape, const Activations& a, int64_t first,
          int64_t width)
        : w_(w), shape_(shape), a_(a), first_(w.rows < kLanes           ? 0
                                              : first + kLanes < w.rows ? first
                                                                        : w.rows - kLanes),
          there_(w.rows < kLanes ? w.rows : kLanes), before_(first - first_), width_(width),
          rows_(w.data + first_ * shape.row_bytes), ahead_(least(shape.row_bytes, kAhead)),
          behind_(ahead_ + (kLanes - 1) * shape.row_bytes) {}

    void multiply(float* y) {
      const int64_t count = a_.count / kDigits;
      std::memset(sums_, 0, count * sizeof *sums_);
      // Nothing is read behind the matrix.
      const int64_t readable = there_ == kLanes ? shape_.full_lines : 0;
      for (int64_t line = 0; line < shape_.lines;) {
        int64_t lines = least(readable - line, kPieceLines);
        data_ = rows_ + line * kVector;
        stride_ = shape_.row_bytes;
        // An even number of blocks: the zero points of two share a byte.
        if (lines <= 0) copy(line, lines = least(2 * shape_.per_block, shape_.lines - line));
        take(line, lines);
        add(0, count);
        line += lines;
      }
      for (int64_t m = 0; m < count; ++m) write(sums_[m], y + m * w_.y_stride);
    }

   private:
    // One row of y, from the sums of its blocks.
    void write(float (&sums)[kLanes][kLanes], float* y) const {
      for (int half = kLanes / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i)
          Simd::store_float(sums[i],
                            Simd::add(Simd::load_float(sums[i]), Simd::load_float(sums[i + half])));
      if (w_.bias) {
        alignas(64) float bias[kLanes] = {};
        std::memcpy(bias, w_.bias + first_, there_ * sizeof(float));
        Simd::store_float(sums[0], Simd::add(Simd::load_float(sums[0]), Simd::load_float(bias)));
      }
      if (width_ == kLanes)
        std::memcpy(y, sums[0], kLanes * sizeof(float));
      else
        std::memcpy(y, sums[0] + before_, width_ * sizeof(float));
    }

    // Some lines of each row, and zeros where there is none.
    void copy(int64_t line, int64_t lines) {
      const int64_t at = line * kVector, left = shape_.row_bytes - at, bytes = lines * kVector;
      std::memset(copy_, 0, sizeof copy_);
      for (int64_t row = 0; row < there_; ++row)
        std::memcpy(copy_[row], rows_ + row * shape_.row_bytes + at, least(left, bytes));
      data_ = copy_[0];
      stride_ = sizeof *copy_;
    }

    // Makes some lines those that are multiplied next.
    void take(int64_t line, int64_t lines) {
      line_ = line, lines_ = lines;
      block_ = line / shape_.per_block * kLineBlocks;
      const int64_t blocks = lines / shape_.per_block * kLineBlocks;
      for (int64_t b = 0; b < blocks; b += kLanes) take_blocks(b, shape_.blocks - block_ - b);
    }

    // The scales of a vector of blocks, of which `left` are there, by blocks instead of rows; and what
    // the middle is beside their zero points.
    void take_blocks(int64_t b, int64_t left) {
      Int scales[kLanes], points[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        const int64_t at = row(lane) * shape_.blocks + block_ + b;
        fetch_into<Cache::kL2>(address_of(w_.scales, at + kLanes * shape_.blocks));
        scales[lane] = Simd::bits(Base::scales_of(w_, shape_, at, left));
      }
      Simd::transpose(scales);
      for (int64_t i = 0; i < kLanes; ++i) Simd::store(scales_[b + i], scales[i]);
      if (!w_.zero_points) return;
      const uint8_t* end = w_.zero_points + w_.rows * shape_.zero_point_bytes;
      for (int lane = 0; lane < kLanes; ++lane) {
        const uint8_t* from =
            w_.zero_points + row(lane) * shape_.zero_point_bytes + (block_ + b) * kBits / 8;
        points[lane] = Base::template offsets<kBits>(from, end, left);
      }
      Simd::transpose(points);
      for (int64_t i = 0; i < kLanes; ++i) Simd::store(offsets_[b + i], points[i]);
    }

    int64_t row(int lane) const { return first_ + least(lane, there_ - 1); }

    // The lines times the rows of x from number m on: each time as many as there are instances for.
    template <int kRows = Simd::kTogether>
    void add(int64_t m, int64_t count) {
      for (; m + kRows <= count; m += kRows) add_rows<kRows>(m);
      if constexpr (kRows > 1) add<kRows - (kRows > 8 ? 4 : kRows > 4 ? 2 : 1)>(m, count);
    }

    // Products with the blocks of a run; with two digits, `before` has those of the first one. Where rows
    // are few, a block has several sums: each would have to wait for the one before.
    template <int kRows>
    struct Dots {
      static constexpr int kSplit = kInLine || kShort || kRows > 7 ? 1 : kRows > 3 ? 2 : 4;
      static constexpr int kSums = kRunBlocks * kSplit;
      Int last[kRows][kSums], before[kRows][kSums];
    };

    // What belongs to the next block, for the first of some rows of x.
    struct Numbers {
      const int32_t *starts, *x_sums;
      const float* x_scales;
      const float (*scales)[kLanes];
      const int32_t (*offsets)[kLanes];
      int64_t count;  // of rows of x
      int64_t block;

      void advance() {
        starts += count, x_sums += count, x_scales += count;
        ++scales, ++offsets, ++block;
      }
    };

    template <int kRows>
    [[gnu::noinline]] void add_rows(int64_t m) {
      const int64_t lines = lines_, per_block = shape_.per_block;
      const int64_t count = a_.count / kDigits, at = block_ * count + m;
      const int64_t line_codes = a_.count * kLineCodes;
      // Lanes in one piece of code: with many rows, GCC would keep the sums in memory if they were more.
      constexpr int kUnrolled = kRows > 8 ? kGroup : kRun;
      const int8_t* codes = a_.codes + line_ * line_codes + m * kDigits * kLineCodes;
      Numbers numbers = {a_.starts + at, a_.sums + at, a_.scales + at, scales_,
                         offsets_,       count,        block_};
      Rows rows(data_, stride_);
      Fetched fetched(rows_ + line_ * kVector, shape_.row_bytes);
      for (int64_t line = 0; line < lines;) {
        const int64_t ahead = ahead_of(line);
#pragma GCC unroll 1
        for (int run = 0; run < kRuns; ++run) {
          Dots<kRows> dots;
          open<kRows>(numbers, dots);
#pragma GCC unroll 1
          for (int64_t left = kInLine ? 1 : per_block; left > 0; --left) {
#pragma GCC unroll 1
            for (int lane = 0; lane < kRun; lane += kUnrolled) {
              unrolled<kUnrolled / kGroup>(
                  [&](auto g) { add_group<kRows, g>(rows, fetched, ahead, codes, dots); });
              rows.advance(4 * kUnrolled);
              fetched.advance(kUnrolled / kFetchEvery);
              codes += 4 * kUnrolled;
            }
            if (!kInLine) codes += line_codes - kVector;
          }
          close<kRows>(numbers, dots, sums_ + m);
        }
        line += kInLine ? 1 : per_block;
        if (kInLine) codes += line_codes - kVector;
      }
    }

    template <int kRows>
    [[gnu::always_inline]] static void open(const Numbers& numbers, Dots<kRows>& dots) {
      constexpr int kSums = Dots<kRows>::kSums;
      unrolled<kRows * kSums>([&](auto i) {
        dots.last[i / kSums][i % kSums] = Simd::zero();
        dots.before[i / kSums][i % kSums] = Simd::zero();
      });
      unrolled<kRows * kRunBlocks>([&](auto i) {
        constexpr int r = i / kRunBlocks, block = i % kRunBlocks;
        dots.last[r][block] = Simd::broadcast(numbers.starts[block * numbers.count + r]);
      });
    }

    template <int kRows>
    [[gnu::always_inline]] void close(Numbers& numbers, const Dots<kRows>& dots,
                                      float (*sums)[kLanes][kLanes]) const {
      unrolled<kRunBlocks>([&](auto block) {
        const Float scale = Simd::load_float(*numbers.scales);
        unrolled<kRows>([&](auto r) {
          const Int before = total(dots.before[r], block);
          Int dot = Base::template both<kDigits>(before, total(dots.last[r], block));
          if (w_.zero_points)
            dot = Simd::add(
                dot, Simd::times(Simd::load(*numbers.offsets), Simd::broadcast(numbers.x_sums[r])));
          const Float x_scale = Simd::broadcast_float(numbers.x_scales[r]);
          float* sum = sums[r][numbers.block % kLanes];
          Simd::store_float(sum, Simd::fma(Simd::to_float(dot), Simd::mul(scale, x_scale),
                                           Simd::load_float(sum)));
        });
        numbers.advance();
      });
    }

    template <int kSums>
    [[gnu::always_inline]] static Int total(const Int (&sums)[kSums], int block) {
      Int all = sums[block];
      unrolled<kSums / kRunBlocks - 1>(
          [&](auto i) { all = Simd::add(all, sums[(i + 1) * kRunBlocks + block]); });
      return all;
    }

    // kGroup lanes of a line.
    template <int kRows, int kIndex>
    [[gnu::always_inline]] static void add_group(const Rows& rows, const Fetched& fetched,
                                                 int64_t ahead, const int8_t* codes,
                                                 Dots<kRows>& dots) {
      Int columns[kGroup], sums[kRows][kRunBlocks];
      unrolled<kGroup>([&](auto i) {
        columns[i] = Simd::load_quarters(
            [&](int quarter) { return rows.at(4 * quarter + i) + kIndex * 4 * kGroup; });
      });
      Simd::transpose_fours(columns);
      if constexpr (kShort)
        unrolled<kRows * kRunBlocks>(
            [&](auto i) { sums[i / kRunBlocks][i % kRunBlocks] = Simd::zero(); });
      unrolled<kGroup>([&](auto i) {
        constexpr int lane = kIndex * kGroup + i, block = i * kRunBlocks / kGroup;
        fetch<lane>(fetched, ahead);
        const auto weights = Base::template unpacked<kBits>(columns[i]);
        unrolled<kParts>([&](auto part) {
          [[maybe_unused]] constexpr int sum =
              (lane * kParts + part) * kRunBlocks % Dots<kRows>::kSums + block;
          unrolled<kRows>([&](auto r) {
            // Those of the last digit.
            const int8_t* code =
                codes + ((r + 1) * kDigits - 1) * kLineCodes + 4 * lane + part * kVector;
            const Int x = Simd::broadcast_bytes(code);
            if constexpr (kShort)
              sums[r][block] = Simd::add_short(sums[r][block], weights.parts[part], x);
            else
              dots.last[r][sum] = Simd::dot(dots.last[r][sum], weights.parts[part], x);
            if constexpr (kDigits == 2)
              dots.before[r][sum] = Simd::dot(dots.before[r][sum], weights.parts[part],
                                              Simd::broadcast_bytes(code - kLineCodes));
          });
        });
      });
      if constexpr (kShort)
        unrolled<kRows * kRunBlocks>([&](auto i) {
          constexpr int r = i / kRunBlocks, block = i % kRunBlocks;
          dots.last[r][block] = Simd::add_pairs(dots.last[r][block], sums[r][block]);
        });
    }

    // How far ahead of a line is fetched: in these rows, or behind their end in the next kLanes rows.
    int64_t ahead_of(int64_t line) const {
      return (line_ + line) * kVector + ahead_ < shape_.row_bytes ? ahead_ : behind_;
    }

    // One line of the cache for each 64 bytes that are multiplied: many at once would keep loads waiting.
    template <int kLane>
    [[gnu::always_inline]] static void fetch(const Fetched& fetched, int64_t ahead) {
      if constexpr (kLane % kFetchEvery == 0) {
        const uint8_t* from = fetched.row(kLane / kFetchEvery);
        fetch_into<Cache::kL2>(from + ahead);
        fetch_into<Cache::kL1>(from + kCacheLine);
      }
    }

    const QuantMatrix& w_;
    const Shape& shape_;
    const Activations& a_;
    const int64_t first_, there_;  // rows of weights that a vector of outputs has
    const int64_t before_,
        width_;  // how many of them are before those that are wanted, and the latter
    const uint8_t* const rows_;
    const int64_t ahead_, behind_;  // what is fetched in these rows, and in the next ones
    int64_t line_, lines_, block_, stride_;
    const uint8_t* data_;
    alignas(64) float sums_[kMost][kLanes][kLanes];
    alignas(64) float scales_[kPieceLines * kLanes / 2][kLanes];
    alignas(64) int32_t offsets_[kPieceLines * kLanes / 2][kLanes];
    alignas(64) uint8_t copy_[kLanes][2 * kMostBlock];
  };
};

}  // namespace rgexport
