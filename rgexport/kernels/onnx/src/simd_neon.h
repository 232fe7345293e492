// The Simd of quant_matmul_template.h for Arm: four dot products of four bytes at a time.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace rgexport {
namespace {

struct Neon {
  static constexpr int kLanes = 4;
  // For many rows of activations: vectors of outputs in a tile, and rows with weights of 8 and 4 bits.
  static constexpr int kWide = 4, kTall = 6, kTallHalves = 6;
  static constexpr int kTogether = 8;         // rows of activations, where there are several
  static constexpr bool kShortSums = false;   // see add_short
  static constexpr bool kSignedBytes = true;  // both factors of vdotq_s32 have a sign
  using Int = int32x4_t;
  using Float = float32x4_t;

  static uint8x16_t bytes(Int x) { return vreinterpretq_u8_s32(x); }
  static Int words(uint8x16_t x) { return vreinterpretq_s32_u8(x); }

  static Int load(const void* p) { return words(vld1q_u8(static_cast<const uint8_t*>(p))); }
  static Int load_once(const void* p) { return load(p); }
  static void store(void* p, Int x) { vst1q_u8(static_cast<uint8_t*>(p), bytes(x)); }
  static Int zero() { return vdupq_n_s32(0); }
  static Int broadcast(int32_t x) { return vdupq_n_s32(x); }
  static Int broadcast_bytes(const int8_t* four) {
    int32_t word;
    std::memcpy(&word, four, 4);
    return vdupq_n_s32(word);
  }
  template <int kMask = 15>
  static Int low_half(Int x) {
    return words(vandq_u8(bytes(x), vdupq_n_u8(kMask)));
  }
  template <int kMask = 15>
  static Int high_half(Int x) {
    const Int high = words(vshrq_n_u8(bytes(x), 4));
    return kMask == 15 ? high : low_half<kMask>(high);
  }
  static Int flip_sign(Int x) { return words(veorq_u8(bytes(x), vdupq_n_u8(128))); }
  // Of each byte, the bits of x where the mask has ones, and those of y.
  template <int kMask>
  static Int select(Int x, Int y) {
    return words(vbslq_u8(vdupq_n_u8(kMask), bytes(x), bytes(y)));
  }
  static Int shift_bytes(Int x, int right) {
    return words(vshlq_u8(bytes(x), vdupq_n_s8(static_cast<int8_t>(-right))));
  }
  // Bytes, or the halves of bytes with the low one first, to a lane each.
  static Int widen(const uint8_t* p) {
    const int32_t all[4] = {p[0], p[1], p[2], p[3]};
    return vld1q_s32(all);
  }
  static Int widen_halves(const uint8_t* p) {
    const int32_t all[4] = {p[0] & 15, p[0] >> 4, p[1] & 15, p[1] >> 4};
    return vld1q_s32(all);
  }
  static Int add(Int x, Int y) { return vaddq_s32(x, y); }
  static Int sub(Int x, Int y) { return vsubq_s32(x, y); }
  template <int kBits>
  static Int shift_left(Int x) {
    return vshlq_n_s32(x, kBits);
  }
  static Int times(Int x, Int y) { return vmulq_s32(x, y); }
  static Int dot(Int sum, Int weights, Int codes) {
    return vdotq_s32(sum, vreinterpretq_s8_s32(weights), vreinterpretq_s8_s32(codes));
  }

  static Float zero_float() { return vdupq_n_f32(0); }
  static Float load_float(const float* p) { return vld1q_f32(p); }
  static Float load_first(const float* p, int64_t count) {
    if (count >= kLanes) return load_float(p);
    float all[4] = {};
    for (int i = 0; i < count; ++i) all[i] = p[i];
    return vld1q_f32(all);
  }
  static Float load_first_half(const void* p, int64_t count, int64_t) {
    if (count >= kLanes) return vcvt_f32_f16(vld1_f16(static_cast<const float16_t*>(p)));
    float16_t some[4] = {};
    std::memcpy(some, p, count * sizeof *some);
    return vcvt_f32_f16(vld1_f16(some));
  }
  static Float load_first_codes(const int8_t* p, int64_t count, int64_t) {
    int8_t some[8] = {};
    std::memcpy(some, p, count < kLanes ? count : kLanes);
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vld1_s8(some)))));
  }
  static void store_float(float* p, Float x) { vst1q_f32(p, x); }
  static Int bits(Float x) { return vreinterpretq_s32_f32(x); }
  static Float broadcast_float(float x) { return vdupq_n_f32(x); }
  static Float to_float(Int x) { return vcvtq_f32_s32(x); }
  static Int to_int(Float x) { return vcvtnq_s32_f32(x); }
  // Numbers of four vectors, as bytes; and every other byte of two vectors.
  static Int pack(Int a, Int b, Int c, Int d) {
    const int16x8_t low = vcombine_s16(vqmovn_s32(a), vqmovn_s32(b));
    const int16x8_t high = vcombine_s16(vqmovn_s32(c), vqmovn_s32(d));
    return vreinterpretq_s32_s8(vcombine_s8(vqmovn_s16(low), vqmovn_s16(high)));
  }
  static Int even_bytes(Int a, Int b) { return words(vuzp1q_u8(bytes(a), bytes(b))); }
  static Int odd_bytes(Int a, Int b) { return words(vuzp2q_u8(bytes(a), bytes(b))); }
  static Float add(Float x, Float y) { return vaddq_f32(x, y); }
  static Float mul(Float x, Float y) { return vmulq_f32(x, y); }
  static Float fma(Float x, Float y, Float z) { return vfmaq_f32(z, x, y); }
  // What is no number is above all sizes, and stays: so it is in these instructions.
  static Float max_size(Float most, Float x) { return vmaxq_f32(most, vabsq_f32(x)); }
  static float max(Float x) { return vmaxvq_f32(x); }
  // The first half and the second one, and again.
  static float sum(Float x) {
    const float32x2_t both = vadd_f32(vget_low_f32(x), vget_high_f32(x));
    return vget_lane_f32(both, 0) + vget_lane_f32(both, 1);
  }

  // Sums of pairs of neighbours, those of x before those of y.
  static Int pair_sums(Int x, Int y) { return vpaddq_s32(x, y); }
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
    const Int even0 = vtrn1q_s32(rows[0], rows[1]), odd0 = vtrn2q_s32(rows[0], rows[1]);
    const Int even1 = vtrn1q_s32(rows[2], rows[3]), odd1 = vtrn2q_s32(rows[2], rows[3]);
    rows[0] = vcombine_s32(vget_low_s32(even0), vget_low_s32(even1));
    rows[1] = vcombine_s32(vget_low_s32(odd0), vget_low_s32(odd1));
    rows[2] = vcombine_s32(vget_high_s32(even0), vget_high_s32(even1));
    rows[3] = vcombine_s32(vget_high_s32(odd0), vget_high_s32(odd1));
  }
  static void transpose(Int (&rows)[4]) { transpose_fours(rows); }
};

}  // namespace
}  // namespace rgexport
