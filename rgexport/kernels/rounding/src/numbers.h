// Numbers as they are stored, sums in a fixed order, and memory.
//
// Each file is compiled for several instruction sets, and a linker may merge inline functions of the
// standard library: so there are none here, everything is in unnamed namespaces.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace rgexport {
namespace {

constexpr int kLanes = 16;
constexpr float kTiny = 0x1p-126f, kHuge = 0x1p120f;
constexpr float kHalfMost = 65504.0f;

inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
inline float size_of(float x) { return __builtin_fabsf(x); }
inline int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }

// The float16 nearest to x, ties to even; infinite beyond its range.
inline float nearest_half(float x) {
  // Float16's last place is 2^-10 of the power of two below x, and 2^-24 at least. The sum with
  // 1.5 * 2^23 such units is rounded to a whole number of them.
  const float size = size_of(x);
  uint32_t bits;
  std::memcpy(&bits, &size, 4);
  const uint32_t least = (127 - 14) << 23, power = bits & 0xff800000u;
  const uint32_t shift_bits = (power < least ? least : power) + (13 << 23);
  float shift;
  std::memcpy(&shift, &shift_bits, 4);
  shift *= 1.5f;
  const float rounded = (size + shift) - shift;
  return __builtin_copysignf(size < 65520.0f ? rounded : __builtin_inff(), x);
}

inline float stored(float scale, bool half) { return half ? nearest_half(scale) : scale; }

// The nearest whole number to x, which is below 2^22 in size.
inline float whole_number(float x) {
  constexpr float kShift = 0x1.8p23f;
  return (x + kShift) - kShift;
}

inline float limited(float x, float low, float high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}

// Sums of kLanes numbers, pairwise.
inline double sum_of(const float* lanes) {
  double sums[kLanes];
  for (int i = 0; i < kLanes; ++i) sums[i] = lanes[i];
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  return sums[0];
}

inline double dot(const float* a, const float* b, int64_t count) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane)
      lanes[lane] = fma(a[i + lane], b[i + lane], lanes[lane]);
  for (int lane = 0; i + lane < count; ++lane)
    lanes[lane] = fma(a[i + lane], b[i + lane], lanes[lane]);
  return sum_of(lanes);
}

// Zeros at first.
template <class T>
class Memory {
 public:
  explicit Memory(int64_t count)
      : data_(static_cast<T*>(std::calloc(count, sizeof(T)))), count_(count) {
    if (!data_) std::abort();  // a few MB: the process has no more memory at all
  }
  Memory(const Memory&) = delete;
  ~Memory() { std::free(data_); }
  void clear() { std::memset(data_, 0, count_ * sizeof(T)); }
  T* data() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_;
  int64_t count_;
};

}  // namespace
}  // namespace rgexport
