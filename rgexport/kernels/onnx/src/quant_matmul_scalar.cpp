// Plain C++, for any processor: vectors are arrays of four lanes.
#include <cmath>

#include "quant_matmul_template.h"

namespace rgexport {
namespace {

struct Scalar {
  static constexpr int kLanes = 4;
  // For many rows of activations: vectors of outputs in a tile, and rows with weights of 8 and 4 bits.
  static constexpr int kWide = 2, kTall = 2, kTallHalves = 2;
  static constexpr int kTogether = 2;        // rows of activations, where there are several
  static constexpr bool kShortSums = false;  // see add_short
  static constexpr bool kSignedBytes = false;
  struct Int {
    uint8_t bytes[16];
  };
  struct Float {
    float lanes[4];
  };

  static Int load(const void* p) {
    Int x;
    std::memcpy(&x, p, 16);
    return x;
  }
  static Int load_once(const void* p) { return load(p); }
  static void store(void* p, Int x) { std::memcpy(p, &x, 16); }
  static Int zero() { return broadcast(0); }
  static Int words(int32_t a, int32_t b, int32_t c, int32_t d) {
    const int32_t all[4] = {a, b, c, d};
    return load(all);
  }
  static int32_t word(const Int& x, int lane) {
    int32_t found;
    std::memcpy(&found, x.bytes + 4 * lane, 4);
    return found;
  }
  static Int broadcast(int32_t x) { return words(x, x, x, x); }
  static Int broadcast_bytes(const int8_t* four) {
    int32_t all;
    std::memcpy(&all, four, 4);
    return broadcast(all);
  }
  template <class Function>
  static Int each(Int x, Function function) {
    for (uint8_t& byte : x.bytes) byte = static_cast<uint8_t>(function(byte));
    return x;
  }
  template <int kMask = 15>
  static Int low_half(Int x) {
    return each(x, [](int byte) { return byte & kMask; });
  }
  template <int kMask = 15>
  static Int high_half(Int x) {
    return each(x, [](int byte) { return byte >> 4 & kMask; });
  }
  static Int flip_sign(Int x) {
    return each(x, [](int byte) { return byte ^ 128; });
  }
  // Of each byte, the bits of x where the mask has ones, and those of y.
  template <int kMask>
  static Int select(Int x, const Int& y) {
    for (int i = 0; i < 16; ++i) x.bytes[i] ^= (x.bytes[i] ^ y.bytes[i]) & ~kMask;
    return x;
  }
  static Int shift_bytes(Int x, int right) {
    return each(x, [=](int byte) { return right > 0 ? byte >> right : byte << -right; });
  }
  // Bytes, or the halves of bytes with the low one first, to a lane each.
  static Int widen(const uint8_t* p) { return words(p[0], p[1], p[2], p[3]); }
  static Int widen_halves(const uint8_t* p) {
    return words(p[0] & 15, p[0] >> 4, p[1] & 15, p[1] >> 4);
  }
  static Int add(Int x, Int y) {
    return words(word(x, 0) + word(y, 0), word(x, 1) + word(y, 1), word(x, 2) + word(y, 2),
                 word(x, 3) + word(y, 3));
  }
  static Int sub(Int x, Int y) {
    return words(word(x, 0) - word(y, 0), word(x, 1) - word(y, 1), word(x, 2) - word(y, 2),
                 word(x, 3) - word(y, 3));
  }
  template <int kBits>
  static Int shift_left(Int x) {
    return times(x, broadcast(1 << kBits));
  }
  static Int times(Int x, Int y) {
    return words(word(x, 0) * word(y, 0), word(x, 1) * word(y, 1), word(x, 2) * word(y, 2),
                 word(x, 3) * word(y, 3));
  }
  static Int dot(Int sum, Int weights, Int codes) {
    int32_t lanes[4];
    std::memcpy(lanes, &sum, 16);
    for (int i = 0; i < 16; ++i) {
      lanes[i / 4] += weights.bytes[i] * static_cast<int8_t>(codes.bytes[i]);
    }
    return load(lanes);
  }

  static Float zero_float() { return broadcast_float(0); }
  static Float load_float(const float* p) { return {{p[0], p[1], p[2], p[3]}}; }
  static Float load_first(const float* p, int64_t count) {
    if (count >= kLanes) return load_float(p);
    Float x = zero_float();
    for (int i = 0; i < count; ++i) x.lanes[i] = p[i];
    return x;
  }
  static Float load_first_half(const void* p, int64_t count, int64_t) {
    Float x = zero_float();
    for (int i = 0; i < kLanes && i < count; ++i)
      x.lanes[i] = half_to_float(static_cast<const uint16_t*>(p) + i);
    return x;
  }
  static Float load_first_codes(const int8_t* p, int64_t count, int64_t) {
    Float x = zero_float();
    for (int i = 0; i < kLanes && i < count; ++i) x.lanes[i] = p[i];
    return x;
  }
  static void store_float(float* p, Float x) { std::memcpy(p, &x, 16); }
  static Int bits(Float x) { return load(x.lanes); }
  static Float broadcast_float(float x) { return {{x, x, x, x}}; }
  static Float to_float(Int x) {
    Float y;
    for (int i = 0; i < 4; ++i) y.lanes[i] = static_cast<float>(word(x, i));
    return y;
  }
  // Halves to even: what adding 1.5 · 2^23 leaves in the low bits.
  static Int to_int(Float x) {
    Int bits;
    for (float& lane : x.lanes) lane += 12582912.0f;
    std::memcpy(bits.bytes, x.lanes, 16);
    return add(bits, broadcast(-0x4B400000));
  }
  // Numbers of four vectors, as bytes; and every other byte of two vectors.
  static Int pack(Int a, Int b, Int c, Int d) {
    const Int* all[] = {&a, &b, &c, &d};
    Int x;
    for (int i = 0; i < 16; ++i) x.bytes[i] = static_cast<uint8_t>(word(*all[i / 4], i % 4));
    return x;
  }
  static Int even_bytes(Int a, Int b) { return every_other(a, b, 0); }
  static Int odd_bytes(Int a, Int b) { return every_other(a, b, 1); }
  static Int every_other(const Int& a, const Int& b, int first) {
    Int x;
    for (int i = 0; i < 8; ++i) {
      x.bytes[i] = a.bytes[2 * i + first];
      x.bytes[8 + i] = b.bytes[2 * i + first];
    }
    return x;
  }
  static Float add(Float x, Float y) {
    for (int i = 0; i < 4; ++i) x.lanes[i] += y.lanes[i];
    return x;
  }
  static Float mul(Float x, Float y) {
    for (int i = 0; i < 4; ++i) x.lanes[i] *= y.lanes[i];
    return x;
  }
  static Float fma(Float x, Float y, Float z) {
    for (int i = 0; i < 4; ++i) z.lanes[i] += x.lanes[i] * y.lanes[i];
    return z;
  }
  // What is no number is above all sizes, and stays.
  static float larger(float a, float b) { return a > b || std::isnan(a) ? a : b; }
  static Float max_size(Float most, Float x) {
    for (int i = 0; i < 4; ++i) most.lanes[i] = larger(most.lanes[i], std::fabs(x.lanes[i]));
    return most;
  }
  static float max(Float sizes) {
    const float* lanes = sizes.lanes;
    return larger(larger(lanes[0], lanes[1]), larger(lanes[2], lanes[3]));
  }
  // The first half and the second one, and again.
  static float sum(Float x) { return (x.lanes[0] + x.lanes[2]) + (x.lanes[1] + x.lanes[3]); }

  // Sums of pairs of neighbours, those of x before those of y.
  static Int pair_sums(Int x, Int y) {
    return words(word(x, 0) + word(x, 1), word(x, 2) + word(x, 3), word(y, 0) + word(y, 1),
                 word(y, 2) + word(y, 3));
  }
  // Sums of blocks of kShare lanes, in order, from groups of lines that are such sums.
  template <int kShare>
  static Int blocks_in_order(const Int* groups) {
    return groups[0];
  }

  // 16 bytes from one place: as many 128 bits as a vector has.
  template <class From>
  static Int load_quarters(const From& from) {
    return load(from(0));
  }

  static void transpose_fours(Int* rows) {
    Int columns[4];
    for (int c = 0; c < 4; ++c) {
      columns[c] = words(word(rows[0], c), word(rows[1], c), word(rows[2], c), word(rows[3], c));
    }
    std::memcpy(rows, columns, sizeof(columns));
  }
  static void transpose(Int (&rows)[4]) { transpose_fours(rows); }
};

}  // namespace

QuantKernels quant_kernels_scalar() { return QuantMatmul<Scalar>::kernels(); }

}  // namespace rgexport
