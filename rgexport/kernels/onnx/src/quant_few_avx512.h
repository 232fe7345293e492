// How processors with AVX-512 read weights that stream by.
#pragma once

#include "quant_few.h"
#include "simd_avx512.h"

namespace rgexport {

namespace {

struct ReadingOneRow : AnyReading<Avx512> {
  static constexpr int kRows = 1;
  static __m512i line(const uint8_t* p) {
    __m512i weights = Avx512::load(p);
    __asm__("" : "+v"(weights));  // GCC would load them twice
    return weights;
  }
};

}  // namespace

// A twentieth faster than with two rows. Lines that wait in L2 are brought near as well: what a load
// misses in L1 takes one of the places that prefetches need, and 3 to 6 % of the speed.
template <>
struct Reading<Avx512Intel> : ReadingOneRow {
  static constexpr int64_t kNear = 2048;
};

// Weights of 8 bits stream by a sixth faster where the processor's own prefetchers bring them. Those
// of 4 bits take longer to multiply, so that these do not look far enough ahead.
template <>
struct Reading<Avx512Zen4> : ReadingOneRow {
  template <int kBits>
  static constexpr bool kFetched = kBits == 4;
};

}  // namespace rgexport
