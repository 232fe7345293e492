// The Simd of quant_matmul_template.h for AVX2, and that for its successor with dot products.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace rgexport {
namespace {

// Pairs of bytes go to 16 bits first, where nothing saturates.
struct Avx2 {
  static constexpr int kLanes = 8;
  // For many rows of activations: vectors of outputs in a tile, and rows with weights of 8 and 4 bits.
  static constexpr int kWide = 2, kTall = 4, kTallHalves = 3;
  static constexpr int kTogether = 8;       // rows of activations, where there are several
  static constexpr bool kShortSums = true;  // see add_short
  // |w| · ±x fits: 128 · 127 · 2 < 2^15, as 255 · 127 · 2 would not.
  static constexpr bool kSignedBytes = true;
  using Int = __m256i;
  using Float = __m256;

  static Int load(const void* p) { return _mm256_loadu_si256(static_cast<const Int*>(p)); }
  static Int load_once(const void* p) { return load(p); }
  static void store(void* p, Int x) { _mm256_storeu_si256(static_cast<Int*>(p), x); }
  static Int zero() { return _mm256_setzero_si256(); }
  static Int broadcast(int32_t x) { return _mm256_set1_epi32(x); }
  static Int broadcast_bytes(const int8_t* four) {
    int32_t word;
    std::memcpy(&word, four, 4);
    return _mm256_set1_epi32(word);
  }
  template <int kMask = 15>
  static Int low_half(Int x) {
    return _mm256_and_si256(x, _mm256_set1_epi8(kMask));
  }
  template <int kMask = 15>
  static Int high_half(Int x) {
    return low_half<kMask>(_mm256_srli_epi16(x, 4));
  }
  static Int flip_sign(Int x) { return _mm256_xor_si256(x, _mm256_set1_epi8(-128)); }
  // Of each byte, the bits of x where the mask has ones, and those of y.
  template <int kMask>
  static Int select(Int x, Int y) {
    const Int mask = _mm256_set1_epi8(kMask);
    return _mm256_or_si256(_mm256_and_si256(mask, x), _mm256_andnot_si256(mask, y));
  }
  // The bits that stay in their byte are right.
  static Int shift_bytes(Int x, int right) {
    using Shorts [[gnu::vector_size(32)]] = uint16_t;
    return (Int)(right > 0 ? (Shorts)x >> right : (Shorts)x << -right);
  }
  // Bytes, or the halves of bytes with the low one first, to a lane each.
  static Int widen(const uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static Int widen_halves(const uint8_t* p) {
    const __m128i bytes = _mm_loadu_si32(p);
    const __m128i halves = _mm_unpacklo_epi8(bytes, _mm_srli_epi16(bytes, 4));
    return _mm256_cvtepu8_epi32(_mm_and_si128(halves, _mm_set1_epi8(15)));
  }
  static Int add(Int x, Int y) { return _mm256_add_epi32(x, y); }
  static Int sub(Int x, Int y) { return _mm256_sub_epi32(x, y); }
  template <int kBits>
  static Int shift_left(Int x) {
    return _mm256_slli_epi32(x, kBits);
  }
  static Int times(Int x, Int y) { return _mm256_mullo_epi32(x, y); }
  static Int dot(Int sum, Int weights, Int codes) {
    const Int pairs =
        _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(codes, weights));
    return add_pairs(sum, pairs);
  }
  // Sums in 16 bits, of at most eight products of weights from 0 to 15, or four of 0 to 30: with
  // 8 · 2 · 15 · 128 they stay below 2^15.
  static Int add_short(Int sums, Int weights, Int codes) {
    sums = _mm256_add_epi16(sums, _mm256_maddubs_epi16(weights, codes));
    __asm__("" : "+x"(sums));  // GCC would sum pairs, and have more of them than registers
    return sums;
  }
  static Int add_pairs(Int sum, Int pairs) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }

  static Float zero_float() { return _mm256_setzero_ps(); }
  static Float load_float(const float* p) { return _mm256_loadu_ps(p); }
  static Float load_first(const float* p, int64_t count) {
    const __m256i lanes = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    const __m256i there = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lanes);
    return _mm256_maskload_ps(p, there);
  }
  // Likewise of float16 numbers, of which `there` may be read: by bytes only at the very end.
  static Float load_first_half(const void* p, int64_t count, int64_t there) {
    alignas(16) uint16_t some[kLanes] = {};
    if (there < kLanes) {
      std::memcpy(some, p, there * sizeof *some);
      p = some;
    }
    const Float all = _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p)));
    if (count >= kLanes) return all;
    const __m256i lanes = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    const __m256i wanted = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lanes);
    return _mm256_and_ps(all, _mm256_castsi256_ps(wanted));
  }
  static Float load_first_codes(const int8_t* p, int64_t count, int64_t there) {
    int8_t some[kLanes] = {};
    if (there < kLanes) {
      std::memcpy(some, p, there);
      p = some;
    }
    const Float all = to_float(_mm256_cvtepi8_epi32(_mm_loadu_si64(p)));
    if (count >= kLanes) return all;
    const __m256i lanes = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    const __m256i wanted = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lanes);
    return _mm256_and_ps(all, _mm256_castsi256_ps(wanted));
  }
  static void store_float(float* p, Float x) { _mm256_storeu_ps(p, x); }
  static Int bits(Float x) { return _mm256_castps_si256(x); }
  static Float broadcast_float(float x) { return _mm256_set1_ps(x); }
  static Float to_float(Int x) { return _mm256_cvtepi32_ps(x); }
  static Int to_int(Float x) { return _mm256_cvtps_epi32(x); }
  // Numbers of four vectors, as bytes; and every other byte of two vectors.
  static Int pack(Int a, Int b, Int c, Int d) {
    const Int bytes = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
    return _mm256_permutevar8x32_epi32(bytes, _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0));
  }
  static Int even_bytes(Int a, Int b) {
    const Int low = _mm256_set1_epi16(255);
    return in_order(_mm256_packus_epi16(_mm256_and_si256(a, low), _mm256_and_si256(b, low)));
  }
  static Int odd_bytes(Int a, Int b) {
    return in_order(_mm256_packus_epi16(_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8)));
  }
  static Int in_order(Int packed) { return _mm256_permute4x64_epi64(packed, 0xd8); }
  static Float add(Float x, Float y) { return _mm256_add_ps(x, y); }
  static Float mul(Float x, Float y) { return _mm256_mul_ps(x, y); }
  static Float fma(Float x, Float y, Float z) { return _mm256_fmadd_ps(x, y, z); }
  // Sizes as whole numbers, whose order is theirs; what is no number is above all of them and stays.
  static Float max_size(Float most, Float x) {
    const Float size = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x);
    return _mm256_castsi256_ps(
        _mm256_max_epi32(_mm256_castps_si256(most), _mm256_castps_si256(size)));
  }
  static float max(Float sizes) {
    const __m256i all = _mm256_castps_si256(sizes);
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1));
    return _mm_cvtss_f32(_mm_castsi128_ps(four));
  }
  static float sum(Float x) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
  }

  // Sums of pairs of neighbours, in each 128 bits those of x before those of y.
  static Int pair_sums(Int x, Int y) {
    const Float a = _mm256_castsi256_ps(x), b = _mm256_castsi256_ps(y);
    return add(_mm256_castps_si256(_mm256_shuffle_ps(a, b, 0x88)),
               _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0xdd)));
  }
  // Sums of blocks of kShare lanes, in order, from groups of lines: 128 bits of each are such sums of the
  // lines' 128 bits.
  template <int kShare>
  static Int blocks_in_order(const Int* groups) {
    if constexpr (kShare == 8) {
      return add(_mm256_permute2x128_si256(groups[0], groups[1], 0x20),
                 _mm256_permute2x128_si256(groups[0], groups[1], 0x31));
    } else if constexpr (kShare == 4) {
      return _mm256_permutevar8x32_epi32(groups[0], _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0));
    } else {
      return _mm256_permute4x64_epi64(groups[0], 0xd8);
    }
  }

  // 16 bytes from each of two places.
  template <class From>
  [[gnu::always_inline]] static Int load_quarters(const From& from) {
    const auto half = [&](int i) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from(i)));
    };
    return _mm256_inserti128_si256(_mm256_castsi128_si256(half(0)), half(1), 1);
  }

  // In each 128 bits, four rows of four become columns.
  static void transpose_fours(Int* rows) {
    const Int low0 = _mm256_unpacklo_epi32(rows[0], rows[1]);
    const Int low1 = _mm256_unpacklo_epi32(rows[2], rows[3]);
    const Int high0 = _mm256_unpackhi_epi32(rows[0], rows[1]);
    const Int high1 = _mm256_unpackhi_epi32(rows[2], rows[3]);
    rows[0] = _mm256_unpacklo_epi64(low0, low1);
    rows[1] = _mm256_unpackhi_epi64(low0, low1);
    rows[2] = _mm256_unpacklo_epi64(high0, high1);
    rows[3] = _mm256_unpackhi_epi64(high0, high1);
  }

  static void transpose(Int (&rows)[8]) {
    Int fours[8];
    for (int i = 0; i < 8; ++i) fours[i] = rows[i];
    for (int i = 0; i < 8; i += 4) transpose_fours(fours + i);
    for (int c = 0; c < 4; ++c) {
      rows[c] = _mm256_permute2x128_si256(fours[c], fours[4 + c], 0x20);
      rows[4 + c] = _mm256_permute2x128_si256(fours[c], fours[4 + c], 0x31);
    }
  }
};

#if defined(__AVXVNNI__)
struct AvxVnni : Avx2 {
  static constexpr int kTall = 6, kTallHalves = 6;
  static constexpr bool kSignedBytes = false, kShortSums = false;

  static Int dot(Int sum, Int weights, Int codes) {
    return _mm256_dpbusd_avx_epi32(sum, weights, codes);
  }
};
#endif

}  // namespace
}  // namespace rgexport
