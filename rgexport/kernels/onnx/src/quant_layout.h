// The memory layout of quantized weights and rounded activations, and the steps that all kernels share.
//
// A `Simd` is a vector unit (simd_avx2.h and others): kLanes lanes of 32 bits, so a vector has
// kVector = 4 · kLanes bytes. A *line* is one vector of stored weights of one row. Its lane i holds four
// bytes, which are columns of one output:
//
//     8 bits    lane i of line l: columns 4j, 4j+1, 4j+2, 4j+3       with j = l · kLanes + i
//     4 bits    lane i of line l: bytes 4j … 4j+3, each with two columns (low nibble: the even one)
//
//               byte:   0        1        2        3
//               nibble: 8j+1|8j  8j+3|8j+2 8j+5|8j+4 8j+7|8j+6      (high|low)
//
// A line of 4 bits is unpacked into two vectors: its low nibbles (the even columns), then its high
// nibbles (the odd ones). The codes of the activations are stored in that order, too: for each line
// first the codes of the even columns, then those of the odd ones. So the kernels never move a weight
// from one lane to another.
//
// A block of columns has one scale. It covers lanes of one line, or several lines:
//
//     block · bits / 32 ≥ kLanes    one block is Shape::lines_per_block lines
//     block · bits / 32 < kLanes    one line has Shape::blocks_per_line blocks, each Shape::lanes lanes
//
// A product of a block with levels w, zero point z and codes x̂ is
//
//     Σ (w − z) · x̂ = Σ w · x̂ − d · Σ x̂ + (d − z) · Σ x̂
//
// where d = 2^(bits − 1) is the default zero point. −d · Σ x̂ is computed once for all outputs and is
// what the accumulators start from (`Activations::starts`). The last term is added only where a matrix
// has zero points of its own.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "quant_matmul.h"
#include "unrolled.h"

namespace rgexport {

static inline int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t ceil_div(int64_t count, int64_t divisor) {
  return (count + divisor - 1) / divisor;
}

// Returns the scale of a block of activations with the largest absolute value `max_abs`. The term
// `max_abs - max_abs` is zero for finite numbers, and NaN otherwise: an infinite or NaN activation
// makes every y of its row NaN, because every y has a product with this scale.
static inline float scale_of(float max_abs) { return max_abs / 127.0f + (max_abs - max_abs); }

// Returns the factor that turns the activations of a block into codes. A block whose numbers are too
// small for a finite factor gets codes of 0.
static inline float inverse_scale_of(float max_abs) {
  return max_abs >= 0x1p-118f ? 127.0f / max_abs : 0.0f;
}

// Rounds the activations of one block to int8 codes: the first digit, q1 = round(x / s), or the second
// digit, q2 = round(254 · (x − s · q1) / s). See "Two digits of activations" in ../README.md.
template <class Simd>
class Digit {
  using Float = typename Simd::Float;

 public:
  Digit() = default;
  Digit(float max_abs, bool is_second)
      : inverse_scale_(Simd::broadcast_float(inverse_scale_of(max_abs))),
        digit_ratio_(Simd::broadcast_float(kDigit)),
        negative_scale_(Simd::broadcast_float(-scale_of(max_abs))),
        scale_(is_second ? scale_of(max_abs) / kDigit : scale_of(max_abs)),
        is_second_(is_second) {}

  float scale() const { return scale_; }

  typename Simd::Int codes(Float x) const {
    const auto first = Simd::to_int(Simd::mul(x, inverse_scale_));
    if (!is_second_) return first;
    const Float residual = Simd::fma(Simd::to_float(first), negative_scale_, x);
    return Simd::to_int(Simd::mul(Simd::mul(residual, inverse_scale_), digit_ratio_));
  }

 private:
  Float inverse_scale_;   // 1 / s
  Float digit_ratio_;     // 254
  Float negative_scale_;  // −s
  float scale_;           // of this digit
  bool is_second_;
};

template <class Simd>
class QuantLayout {
 protected:
  using Float = typename Simd::Float;
  using Int = typename Simd::Int;
  static constexpr int kLanes = Simd::kLanes;
  static constexpr int64_t kVector = 4 * kLanes;  // bytes
  static constexpr int64_t kCacheLine = 64;

  // Number of vectors that a line is unpacked into, and of codes that it is multiplied with; their bytes.
  template <int kBits>
  static constexpr int64_t kParts = 8 / kBits;
  template <int kBits>
  static constexpr int64_t kCodes = kParts<kBits> * kVector;

  // How the blocks of a matrix lie in lines. It is computed once per product, because it takes divisions.
  struct Shape {
    int64_t lanes;             // lanes of a line that share a scale
    int64_t lines_per_block;   // 1 if a block is smaller than a line
    int64_t blocks_per_line;   // 1 if a block is not smaller than a line
    int64_t lines;             // lines of a row; the last one may be partial
    int64_t full_lines;        // lines of a row that are complete
    int64_t row_bytes;         // bytes of a row of stored weights
    int64_t blocks;            // blocks of a row
    int64_t zero_point_bytes;  // bytes of a row of zero points

    Shape(const QuantMatrix& w) {
      const int64_t block_lanes = w.block * w.bits / 32;
      lanes = block_lanes < kLanes ? block_lanes : kLanes;
      lines_per_block = block_lanes / lanes;
      blocks_per_line = kLanes / lanes;
      row_bytes = w.row_bytes();
      blocks = w.blocks();
      zero_point_bytes = w.zero_point_bytes();
      lines = ceil_div(row_bytes, kVector);
      full_lines = row_bytes / kVector;
    }
  };

  // Calls `instance` with the matrix's bits (4 or 8) and block size (16 to 256) as compile-time constants,
  // and returns its result. The recursion halves kBlock until it is the matrix's block size.
  template <int kBlock = 256, class Instance>
  static auto pick(const QuantMatrix& w, const Instance& instance) {
    if constexpr (kBlock > 16) {
      if (w.block < kBlock) return pick<kBlock / 2>(w, instance);
    }
    constexpr std::integral_constant<int, kBlock> block;
    return w.bits == 4 ? instance(std::integral_constant<int, 4>(), block)
                       : instance(std::integral_constant<int, 8>(), block);
  }

  // Returns the bytes of codes for a row of activations, padded to whole lines.
  static int64_t code_bytes(const QuantMatrix& w) {
    return ceil_div(w.row_bytes(), kVector) * kVector * 8 / w.bits;
  }

  // Returns the number of blocks of a row, padded so that vectors of kLanes blocks can be loaded.
  static int64_t padded_blocks(const QuantMatrix& w) {
    const Shape shape(w);
    const int64_t blocks = ceil_div(shape.lines, shape.lines_per_block) * shape.blocks_per_line;
    return ceil_div(blocks, kLanes) * kLanes;
  }

  // The zero point in the bytes that kernels for few and several rows multiply: the default one, 2^(bits−1);
  // 0 where the vector unit needs signed bytes, because `unpacked` has then subtracted 128 already.
  template <int kBits>
  static constexpr int32_t kZeroPoint = kBits == 8 && Simd::kSignedBytes ? 0 : 1 << (kBits - 1);
  static constexpr int32_t kMaxNibble = 15;
  // The zero point in the bytes of quant_many.h, which stores w − z + 15 for levels of 4 bits.
  template <int kBits>
  static constexpr int32_t kPanelZeroPoint = kBits == 4 ? kMaxNibble : kZeroPoint<kBits>;

  // Loads the zero points of kLanes blocks, from an even block on, as int32. `from` is the address of the
  // first one, `end` the end of the matrix's zero points; only the first `count` blocks exist.
  template <int kBits>
  static Int load_zero_points(const uint8_t* from, const uint8_t* end, int64_t count) {
    // The copy is needed only at the very end: reading a vector right after its bytes were stored one by
    // one stalls the processor.
    if (__builtin_expect(end - from < kLanes * kBits / 8, 0))
      return load_last_zero_points<kBits>(from, count);
    return kBits == 8 ? Simd::widen(from) : Simd::widen_halves(from);
  }
  template <int kBits>
  [[gnu::noinline]] static Int load_last_zero_points(const uint8_t* from, int64_t count) {
    alignas(8) uint8_t copy[kLanes] = {};
    for (int64_t i = 0; i < (count * kBits + 7) / 8; ++i) copy[i] = from[i];
    return kBits == 8 ? Simd::widen(copy) : Simd::widen_halves(copy);
  }

  // Returns d − z for kLanes blocks: the default zero point minus the stored ones.
  template <int kBits>
  static Int load_zero_point_offsets(const uint8_t* from, const uint8_t* end, int64_t count) {
    const Int zero_points = load_zero_points<kBits>(from, end, count);
    return Simd::sub(Simd::broadcast(1 << (kBits - 1)), zero_points);
  }

  // Loads the scales of kLanes blocks from scale `index` of the matrix on, as float32: the first `count`
  // of them, and zeros in the other lanes.
  static Float load_scales(const QuantMatrix& w, const Shape& shape, int64_t index,
                           int64_t count) {
    const void* from = address_of(w.scales, index);
    if (w.scales.half) return Simd::load_first_half(from, count, w.rows * shape.blocks - index);
    const auto* floats = static_cast<const float*>(from);
    // A masked load is used only where it is needed: prompts with blocks of 32 take 6 % less time.
    return count < kLanes ? Simd::load_first(floats, count) : Simd::load_float(floats);
  }

  // An unpacked line, as dot products take it: one vector of bytes for 8 bits, two for 4 bits.
  template <int kBits>
  struct Line {
    Int parts[kParts<kBits>];
  };
  template <int kBits>
  static Line<kBits> unpacked(Int line) {
    if constexpr (kBits == 4) return {{Simd::low_half(line), Simd::high_half(line)}};
    if constexpr (kBits == 8) return {{Simd::kSignedBytes ? Simd::flip_sign(line) : line}};
  }

  // Accumulators of one block, lane by lane: begin_block(start), accumulate(…) for some vectors of weights,
  // end_block(…, start). On AVX2 (kShortSums) the products of 4-bit weights are accumulated in 16 bits and
  // widened to 32 bits by end_block: up to kMaxShortProducts products of weights from 0 to 15 fit.
  template <int kBits>
  static constexpr bool kShort = kBits == 4 && Simd::kShortSums;
  static constexpr int64_t kMaxShortProducts = 8;
  template <int kBits, int64_t kLines, int kDigits>
  static constexpr bool kFitsShort =
      !kShort<kBits> || (kLines * kParts<kBits> <= kMaxShortProducts && kDigits == 1);

  template <int kBits>
  static Int begin_block(Int start) {
    return kShort<kBits> ? Simd::zero() : start;
  }
  template <int kBits>
  static Int accumulate(Int sums, Int weights, Int codes) {
    if constexpr (kShort<kBits>)
      return Simd::add_short(sums, weights, codes);
    else
      return Simd::dot(sums, weights, codes);
  }
  // Accumulates all parts of a line.
  template <int kBits>
  static Int accumulate_line(Int sums, const Line<kBits>& line, const int8_t* codes) {
    unrolled<kParts<kBits>>([&](auto part) {
      sums = accumulate<kBits>(sums, line.parts[part], Simd::load(codes + part * kVector));
    });
    return sums;
  }
  template <int kBits>
  static Int end_block(Int sums, Int start) {
    if constexpr (kShort<kBits>)
      return Simd::add_pairs(start, sums);
    else
      return sums;
  }

  // Returns the dot products in units of the last digit: 254 · (dots with the first digit) + dots with the
  // second one. With one digit, `first_digit` is not read.
  template <int kDigits>
  static Int combine_digits(Int first_digit, Int last_digit) {
    if constexpr (kDigits == 1) return last_digit;
    return Simd::add(Simd::times(first_digit, Simd::broadcast(kDigit)), last_digit);
  }
};

}  // namespace rgexport
