// How quantized weights and rounded activations lie in memory, for a vector unit.
//
// A `Simd` has kLanes lanes of 32 bits. A line is one vector of stored weights: kLanes groups of
// four bytes. With 4 bits, a lane of a line holds eight columns, the even ones in the low halves;
// the codes of the activations lie as the unpacked weights do: for each line first what its low
// halves meet, then what its high halves meet. So no weight is ever moved across lanes.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "quant_matmul.h"
#include "unrolled.h"

namespace rgexport {

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t whole(int64_t count, int64_t of) { return (count + of - 1) / of; }

// The scale of a block of activations whose largest size is `most`, and what they are multiplied by
// to become codes. One number of a row that is infinite, or none, makes all of the row's y NaN: its
// scale is, and each y has a product with it. A block of numbers so small that their scale would have
// no inverse has codes of 0.
static inline float scale_of(float most) { return most / 127.0f + (most - most); }
static inline float inverse_of(float most) { return most >= 0x1p-118f ? 127.0f / most : 0.0f; }

// Rounds numbers of a block to the first digit, or to the second one.
template <class Simd>
class Digit {
  using Float = typename Simd::Float;

 public:
  Digit() = default;
  Digit(float most, bool second)  // `most` is the largest size in the block
      : inverse_(Simd::broadcast_float(inverse_of(most))), next_(Simd::broadcast_float(kDigit)),
        taken_(Simd::broadcast_float(-scale_of(most))),
        scale_(second ? scale_of(most) / kDigit : scale_of(most)), second_(second) {}

  float scale() const { return scale_; }
  typename Simd::Int codes(Float x) const {
    const auto first = Simd::to_int(Simd::mul(x, inverse_));
    if (!second_) return first;
    const Float rest = Simd::fma(Simd::to_float(first), taken_, x);
    return Simd::to_int(Simd::mul(Simd::mul(rest, inverse_), next_));
  }

 private:
  Float inverse_, next_, taken_;
  float scale_;
  bool second_;
};

template <class Simd>
class QuantLayout {
 protected:
  using Float = typename Simd::Float;
  using Int = typename Simd::Int;
  static constexpr int kLanes = Simd::kLanes;
  static constexpr int64_t kVector = 4 * kLanes;  // bytes
  static constexpr int64_t kCacheLine = 64;

  // Vectors of codes that a line of weights meets, and their bytes.
  template <int kBits>
  static constexpr int64_t kParts = 8 / kBits;
  template <int kBits>
  static constexpr int64_t kCodes = kParts<kBits> * kVector;

  // How the blocks of a matrix lie in lines.
  struct Shape {
    int64_t lanes;      // of a line that share a scale
    int64_t per_block;  // lines with one scale, where a block is not less than a line
    int64_t per_line;   // blocks in a line, where it is less
    int64_t lines, full_lines, row_bytes, blocks, zero_point_bytes;

    Shape(const QuantMatrix& w) {
      const int64_t block_lanes = w.block * w.bits / 32;
      lanes = block_lanes < kLanes ? block_lanes : kLanes;
      per_block = block_lanes / lanes;
      per_line = kLanes / lanes;
      row_bytes = w.row_bytes();
      blocks = w.blocks();
      zero_point_bytes = w.zero_point_bytes();
      lines = whole(row_bytes, kVector);
      full_lines = row_bytes / kVector;
    }
  };

  // What `instance` gives for the matrix's bits and block, which are constants to it.
  template <int kBlock = 256, class Instance>
  static auto pick(const QuantMatrix& w, const Instance& instance) {
    if constexpr (kBlock > 16) {
      if (w.block < kBlock) return pick<kBlock / 2>(w, instance);
    }
    constexpr std::integral_constant<int, kBlock> block;
    return w.bits == 4 ? instance(std::integral_constant<int, 4>(), block)
                       : instance(std::integral_constant<int, 8>(), block);
  }

  static int64_t code_bytes(const QuantMatrix& w) {
    return whole(w.row_bytes(), kVector) * kVector * 8 / w.bits;
  }

  static int64_t padded_blocks(const QuantMatrix& w) {
    const Shape shape(w);
    return whole(whole(shape.lines, shape.per_block) * shape.per_line, kLanes) * kLanes;
  }

  // What the starts take from all weights, exactly: the middle of the levels, but bytes that must
  // have a sign have lost it before; for many rows of 4 bits what was added for the zero points.
  template <int kBits>
  static constexpr int32_t kMiddle = kBits == 8 && Simd::kSignedBytes ? 0 : 1 << (kBits - 1);
  static constexpr int32_t kMostHalf = 15;  // the largest level of 4 bits
  template <int kBits>
  static constexpr int32_t kAdded = kBits == 4 ? kMostHalf : kMiddle<kBits>;

  // The zero points of a vector of blocks, from an even one on. They lie at `from`; `left` of the
  // blocks are there, and at `end` the matrix has its last.
  template <int kBits>
  static Int zeros_of(const uint8_t* from, const uint8_t* end, int64_t left) {
    // Only at the very end: what is written by bytes is slow to read as a whole.
    if (__builtin_expect(end - from < kLanes * kBits / 8, 0)) return last_zeros<kBits>(from, left);
    return kBits == 8 ? Simd::widen(from) : Simd::widen_halves(from);
  }
  template <int kBits>
  [[gnu::noinline]] static Int last_zeros(const uint8_t* from, int64_t left) {
    alignas(8) uint8_t some[kLanes] = {};
    for (int64_t i = 0; i < (left * kBits + 7) / 8; ++i) some[i] = from[i];
    return kBits == 8 ? Simd::widen(some) : Simd::widen_halves(some);
  }

  // What the middle of the levels is beside them.
  template <int kBits>
  static Int offsets(const uint8_t* from, const uint8_t* end, int64_t left) {
    return Simd::sub(Simd::broadcast(1 << (kBits - 1)), zeros_of<kBits>(from, end, left));
  }

  // The scales of a vector of blocks, from number `at` of the matrix's on; of them, `left` are wanted,
  // and zeros behind them.
  static Float scales_of(const QuantMatrix& w, const Shape& shape, int64_t at, int64_t left) {
    const void* from = address_of(w.scales, at);
    if (w.scales.half) return Simd::load_first_half(from, left, w.rows * shape.blocks - at);
    const auto* floats = static_cast<const float*>(from);
    // Masked only where it must be: prompts with blocks of 32 take 6 % less time.
    return left < kLanes ? Simd::load_first(floats, left) : Simd::load_float(floats);
  }

  // A line of stored weights, as dot products take it: 4 bits in two parts.
  template <int kBits>
  struct Line {
    Int parts[kParts<kBits>];
  };
  template <int kBits>
  static Line<kBits> unpacked(Int line) {
    if constexpr (kBits == 4) return {{Simd::low_half(line), Simd::high_half(line)}};
    if constexpr (kBits == 8) return {{Simd::kSignedBytes ? Simd::flip_sign(line) : line}};
  }

  // Sums of products of one block, lane by lane: open(start), add for some vectors of weights, and
  // close(…, start). In between, those of 4 bits may be in 16 bits: kMostShort of them fit.
  template <int kBits>
  static constexpr bool kShort = kBits == 4 && Simd::kShortSums;
  static constexpr int64_t kMostShort = 8;  // of weights from 0 to 15
  template <int kBits, int64_t kLines, int kDigits>
  static constexpr bool kFits =
      !kShort<kBits> || (kLines * kParts<kBits> <= kMostShort && kDigits == 1);
  template <int kBits>
  static Int open(Int start) {
    return kShort<kBits> ? Simd::zero() : start;
  }
  template <int kBits>
  static Int add(Int sums, Int weights, Int codes) {
    if constexpr (kShort<kBits>)
      return Simd::add_short(sums, weights, codes);
    else
      return Simd::dot(sums, weights, codes);
  }
  // All of a line.
  template <int kBits>
  static Int line_dot(Int sums, const Line<kBits>& line, const int8_t* codes) {
    unrolled<kParts<kBits>>([&](auto part) {
      sums = add<kBits>(sums, line.parts[part], Simd::load(codes + part * kVector));
    });
    return sums;
  }
  template <int kBits>
  static Int close(Int sums, Int start) {
    if constexpr (kShort<kBits>)
      return Simd::add_pairs(start, sums);
    else
      return sums;
  }

  // Sums of products with both digits.
  template <int kDigits>
  static Int both(Int before, Int dots) {
    return kDigits == 2 ? Simd::add(Simd::times(before, Simd::broadcast(kDigit)), dots) : dots;
  }
};

}  // namespace rgexport
