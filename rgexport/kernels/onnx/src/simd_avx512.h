// The Simd of quant_matmul_template.h for AVX-512 with VNNI: sixteen dot products of four bytes at a
// time.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace rgexport {
namespace {

struct Avx512 {
  static constexpr int kLanes = 16;
  // For many rows of activations: vectors of outputs in a tile, and rows with weights of 8 and 4 bits.
  static constexpr int kWide = 3, kTall = 6, kTallHalves = 6;
  static constexpr int kTogether = 16;       // rows of activations, where there are several
  static constexpr bool kShortSums = false;  // see add_short
  static constexpr bool kSignedBytes = false;
  using Int = __m512i;
  using Float = __m512;

  static Int load(const void* p) { return _mm512_loadu_si512(p); }
  static Int load_once(const void* p) {
    Int x = load(p);
    __asm__("" : "+v"(x));  // GCC would load it for each of its uses
    return x;
  }
  static void store(void* p, Int x) { _mm512_storeu_si512(p, x); }
  static Int zero() { return _mm512_setzero_si512(); }
  static Int broadcast(int32_t x) { return _mm512_set1_epi32(x); }
  static Int broadcast_bytes(const int8_t* four) {
    int32_t word;
    std::memcpy(&word, four, 4);
    return _mm512_set1_epi32(word);
  }
  // The low bits of each byte, or of its high half.
  template <int kMask = 15>
  static Int low_half(Int x) {
    return _mm512_and_si512(x, _mm512_set1_epi8(kMask));
  }
  template <int kMask = 15>
  static Int high_half(Int x) {
#if defined(__GFNI__)
    // Bit i of a byte becomes bit i − 4: a shift crosses bytes, and needs a mask.
    constexpr int64_t kRows = kMask == 15  ? 0x1020408000000000
                              : kMask == 7 ? 0x1020400000000000
                                           : 0x1020000000000000;
    return _mm512_gf2p8affine_epi64_epi8(x, _mm512_set1_epi64(kRows), 0);
#else
    return low_half<kMask>(_mm512_srli_epi16(x, 4));
#endif
  }
  static Int flip_sign(Int x) { return _mm512_xor_si512(x, _mm512_set1_epi8(-128)); }
  // Of each byte, the bits of x where the mask has ones, and those of y.
  template <int kMask>
  static Int select(Int x, Int y) {
    return _mm512_ternarylogic_epi32(_mm512_set1_epi8(kMask), x, y, 0xca);
  }
  // The bits that stay in their byte are right.
  static Int shift_bytes(Int x, int right) {
    using Shorts [[gnu::vector_size(64)]] = uint16_t;
    return (Int)(right > 0 ? (Shorts)x >> right : (Shorts)x << -right);
  }
  // Bytes, or the halves of bytes with the low one first, to a lane each.
  static Int widen(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Int widen_halves(const uint8_t* p) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    const __m128i high = _mm_srli_epi16(bytes, 4);
    const __m128i halves = _mm_unpacklo_epi8(bytes, high);
    return _mm512_cvtepu8_epi32(_mm_and_si128(halves, _mm_set1_epi8(15)));
  }
  static Int add(Int x, Int y) { return _mm512_add_epi32(x, y); }
  static Int sub(Int x, Int y) { return _mm512_sub_epi32(x, y); }
  template <int kBits>
  static Int shift_left(Int x) {
    return _mm512_slli_epi32(x, kBits);
  }
  static Int times(Int x, Int y) { return _mm512_mullo_epi32(x, y); }
  static Int dot(Int sum, Int weights, Int codes) {
    return _mm512_dpbusd_epi32(sum, weights, codes);
  }

  static Float zero_float() { return _mm512_setzero_ps(); }
  static Float load_float(const float* p) { return _mm512_loadu_ps(p); }
  // A vector, or zeros behind the `count` numbers that are there: nothing is read behind a matrix.
  static Float load_first(const float* p, int64_t count) {
    const uint32_t lanes = (1u << (count < kLanes ? count : kLanes)) - 1;
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes), p);
  }
  // Likewise of float16 numbers.
  static Float load_first_half(const void* p, int64_t count, int64_t) {
    const uint32_t lanes = (1u << (count < kLanes ? count : kLanes)) - 1;
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(lanes), p));
  }
  // Likewise of int8 numbers.
  static Float load_first_codes(const int8_t* p, int64_t count, int64_t) {
    const auto* from = reinterpret_cast<const __m128i*>(p);
    const auto lanes = static_cast<__mmask16>((1u << (count & (kLanes - 1))) - 1);
    const __m128i codes =
        count >= kLanes ? _mm_loadu_si128(from) : _mm_maskz_loadu_epi8(lanes, from);
    return to_float(_mm512_cvtepi8_epi32(codes));
  }
  static void store_float(float* p, Float x) { _mm512_storeu_ps(p, x); }
  static Int bits(Float x) { return _mm512_castps_si512(x); }
  static Float broadcast_float(float x) { return _mm512_set1_ps(x); }
  static Float to_float(Int x) { return _mm512_cvtepi32_ps(x); }
  static Int to_int(Float x) { return _mm512_cvtps_epi32(x); }
  // Numbers of four vectors, as bytes; and every other byte of two vectors.
  static Int pack(Int a, Int b, Int c, Int d) {
    const Int bytes = _mm512_packs_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
    return _mm512_permutexvar_epi32(
        _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0), bytes);
  }
  static Int even_bytes(Int a, Int b) {
    const Int low = _mm512_set1_epi16(255);
    return in_order(_mm512_packus_epi16(_mm512_and_si512(a, low), _mm512_and_si512(b, low)));
  }
  static Int odd_bytes(Int a, Int b) {
    return in_order(_mm512_packus_epi16(_mm512_srli_epi16(a, 8), _mm512_srli_epi16(b, 8)));
  }
  static Int in_order(Int packed) {
    return _mm512_permutexvar_epi64(_mm512_set_epi64(7, 5, 3, 1, 6, 4, 2, 0), packed);
  }
  static Float add(Float x, Float y) { return _mm512_add_ps(x, y); }
  static Float mul(Float x, Float y) { return _mm512_mul_ps(x, y); }
  static Float fma(Float x, Float y, Float z) { return _mm512_fmadd_ps(x, y, z); }
  // Sizes as whole numbers, whose order is theirs; what is no number is above all of them and stays.
  static Float max_size(Float most, Float x) {
    const Int size = _mm512_castps_si512(_mm512_abs_ps(x));
    return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(most), size));
  }
  static float max(Float sizes) {
    return _mm_cvtss_f32(
        _mm_castsi128_ps(_mm_cvtsi32_si128(_mm512_reduce_max_epi32(_mm512_castps_si512(sizes)))));
  }
  // The first half and the second one, and so on.
  static float sum(Float x) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
  }

  // Sums of pairs of neighbours, in each 128 bits those of x before those of y.
  static Int pair_sums(Int x, Int y) {
    const Float a = _mm512_castsi512_ps(x), b = _mm512_castsi512_ps(y);
    return add(_mm512_castps_si512(_mm512_shuffle_ps(a, b, 0x88)),
               _mm512_castps_si512(_mm512_shuffle_ps(a, b, 0xdd)));
  }
  // Sums of blocks of kShare lanes, in order, from groups of lines: 128 bits of each are such sums of the
  // lines' 128 bits.
  template <int kShare>
  static Int blocks_in_order(const Int* groups) {
    if constexpr (kShare == 16) {
      return quarter_sums(quarter_sums(groups[0], groups[1]), quarter_sums(groups[2], groups[3]));
    } else if constexpr (kShare == 8) {
      return _mm512_permutexvar_epi32(
          _mm512_set_epi32(15, 11, 14, 10, 13, 9, 12, 8, 7, 3, 6, 2, 5, 1, 4, 0),
          quarter_sums(groups[0], groups[1]));
    } else if constexpr (kShare == 4) {
      return _mm512_permutexvar_epi32(
          _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0), groups[0]);
    } else {
      return _mm512_permutexvar_epi64(_mm512_set_epi64(7, 5, 3, 1, 6, 4, 2, 0), groups[0]);
    }
  }
  // Sums of neighbours among the quarters.
  static Int quarter_sums(Int x, Int y) {
    return add(_mm512_shuffle_i32x4(x, y, 0x88), _mm512_shuffle_i32x4(x, y, 0xdd));
  }

  // 16 bytes from each of four places.
  template <class From>
  [[gnu::always_inline]] static Int load_quarters(const From& from) {
    const auto quarter = [&](int q) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from(q)));
    };
    Int all = _mm512_castsi128_si512(quarter(0));
    all = _mm512_inserti32x4(all, quarter(1), 1);
    all = _mm512_inserti32x4(all, quarter(2), 2);
    return _mm512_inserti32x4(all, quarter(3), 3);
  }

  // In each 128 bits, four rows of four become columns.
  static void transpose_fours(Int* rows) {
    const Int low0 = _mm512_unpacklo_epi32(rows[0], rows[1]);
    const Int low1 = _mm512_unpacklo_epi32(rows[2], rows[3]);
    const Int high0 = _mm512_unpackhi_epi32(rows[0], rows[1]);
    const Int high1 = _mm512_unpackhi_epi32(rows[2], rows[3]);
    rows[0] = _mm512_unpacklo_epi64(low0, low1);
    rows[1] = _mm512_unpackhi_epi64(low0, low1);
    rows[2] = _mm512_unpacklo_epi64(high0, high1);
    rows[3] = _mm512_unpackhi_epi64(high0, high1);
  }

  static void transpose(Int (&rows)[16]) {
    Int fours[16];
    for (int i = 0; i < 16; ++i) fours[i] = rows[i];
    for (int i = 0; i < 16; i += 4) transpose_fours(fours + i);
    // fours[4 i + c] has, in 128-bit lane q, column 4 q + c of rows 4 i … 4 i + 3.
    for (int c = 0; c < 4; ++c) {
      const Int low = _mm512_shuffle_i32x4(fours[c], fours[4 + c], 0x88);
      const Int high = _mm512_shuffle_i32x4(fours[c], fours[4 + c], 0xdd);
      const Int low2 = _mm512_shuffle_i32x4(fours[8 + c], fours[12 + c], 0x88);
      const Int high2 = _mm512_shuffle_i32x4(fours[8 + c], fours[12 + c], 0xdd);
      rows[c] = _mm512_shuffle_i32x4(low, low2, 0x88);
      rows[8 + c] = _mm512_shuffle_i32x4(low, low2, 0xdd);
      rows[4 + c] = _mm512_shuffle_i32x4(high, high2, 0x88);
      rows[12 + c] = _mm512_shuffle_i32x4(high, high2, 0xdd);
    }
  }
};

}  // namespace
}  // namespace rgexport
