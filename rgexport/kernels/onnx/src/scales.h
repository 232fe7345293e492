// Numbers that a file holds as float32 or as float16, read as float32; every float16 is one exactly.
//
// Only static functions: they are compiled with each instruction set's own flags.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace rgexport {

struct Scales {
  const void* data;  // aligned to its own type
  bool half;         // float16
};

static inline int64_t bytes_of(const Scales& scales) { return scales.half ? 2 : 4; }

static inline const char* address_of(const Scales& scales, int64_t index) {
  return static_cast<const char*>(scales.data) + index * bytes_of(scales);
}

static inline float half_to_float(const void* from) {
#if defined(__F16C__)
  uint16_t bits;
  std::memcpy(&bits, from, sizeof bits);
  return _cvtsh_ss(bits);
#elif defined(__aarch64__)
  __fp16 half;
  std::memcpy(&half, from, sizeof half);
  return static_cast<float>(half);
#else
  uint16_t half;
  std::memcpy(&half, from, sizeof half);
  const uint32_t sign = uint32_t{half} >> 15 << 31, exponent = half >> 10 & 31,
                 fraction = half & 1023;
  float size = static_cast<float>(fraction) * 0x1p-24f;  // of exponent 0: steps of the smallest one
  if (exponent > 0) {
    const uint32_t bits = (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13;
    std::memcpy(&size, &bits, sizeof size);
  }
  uint32_t bits;
  std::memcpy(&bits, &size, sizeof bits);
  bits |= sign;
  std::memcpy(&size, &bits, sizeof size);
  return size;
#endif
}

static inline float number_at(const Scales& scales, int64_t index) {
  if (scales.half) return half_to_float(address_of(scales, index));
  return static_cast<const float*>(scales.data)[index];
}

}  // namespace rgexport
