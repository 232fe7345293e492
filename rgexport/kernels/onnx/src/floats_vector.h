// A vector of float32 as wide as the instruction set that this is compiled for.
//
// All of it is in an unnamed namespace, and nothing of the standard library is called: code for one
// instruction set must never be linked into that for another.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if defined(__clang__)
#pragma clang fp contract(fast)  // GCC's default
#endif

namespace rgexport {
namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kLanes = kBytes / sizeof(float);

typedef float Vector __attribute__((vector_size(kBytes), may_alias));
typedef float Unaligned __attribute__((vector_size(kBytes), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(kBytes), may_alias));
typedef uint16_t Halves __attribute__((vector_size(kBytes / 2), aligned(2), may_alias));

// x · y + z, rounded once where there is an instruction for that.
inline Vector multiply_add(Vector x, Vector y, Vector z) {
#if defined(__AVX512F__)
  using Wide = __m512;
  return reinterpret_cast<Vector>(_mm512_fmadd_ps(
      reinterpret_cast<Wide>(x), reinterpret_cast<Wide>(y), reinterpret_cast<Wide>(z)));
#elif defined(__FMA__)
  using Wide = __m256;
  return reinterpret_cast<Vector>(_mm256_fmadd_ps(
      reinterpret_cast<Wide>(x), reinterpret_cast<Wide>(y), reinterpret_cast<Wide>(z)));
#elif defined(__aarch64__)
  using Wide = float32x4_t;
  return reinterpret_cast<Vector>(
      vfmaq_f32(reinterpret_cast<Wide>(z), reinterpret_cast<Wide>(x), reinterpret_cast<Wide>(y)));
#else
  return x * y + z;
#endif
}

inline Vector splat(float x) { return x - Vector{}; }

inline Vector load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }

// Numbers in bfloat16, which are the first halves of floats.
inline Vector load(const uint16_t* from) {
  const Halves first = *reinterpret_cast<const Halves*>(from);
  return reinterpret_cast<Vector>(__builtin_convertvector(first, Integers) << 16);
}

inline void store(float* to, Vector x) { *reinterpret_cast<Unaligned*>(to) = x; }

// The first `count` lanes, zeros after them.
template <class Stored>
inline Vector load(const Stored* from, int64_t count) {
  if (count >= kLanes) return load(from);
  Stored some[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) some[i] = from[i];
  return load(some);
}

inline void store(float* to, Vector x, int64_t count) {
  if (count >= kLanes) return store(to, x);
  for (int64_t i = 0; i < count; ++i) to[i] = x[i];
}

// b where one of the two is not a number.
inline Vector larger(Vector a, Vector b) { return a > b ? a : b; }

inline float sum(Vector x) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += x[i];
  return total;
}

inline Vector square_root(Vector x) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vector>(_mm512_sqrt_ps(reinterpret_cast<__m512>(x)));
#elif defined(__AVX2__)
  return reinterpret_cast<Vector>(_mm256_sqrt_ps(reinterpret_cast<__m256>(x)));
#elif defined(__SSE2__)
  return reinterpret_cast<Vector>(_mm_sqrt_ps(reinterpret_cast<__m128>(x)));
#elif defined(__aarch64__)
  return reinterpret_cast<Vector>(vsqrtq_f32(reinterpret_cast<float32x4_t>(x)));
#else
  for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

// 2 to the power of whole numbers of -126 … 127.
inline Vector power_of_two(Integers n) { return reinterpret_cast<Vector>((n + 127) << 23); }

// (exp(r) - 1 - r) / r² for |r| ≤ ln 2 / 2, highest power first: with the least error of exp(r),
// 3e-9.
constexpr float kExp[] = {0x1.6a215ap-10f, 0x1.123b9ap-7f, 0x1.5558fcp-5f, 0x1.555490p-3f,
                          0x1.fffffcp-2f};

// e to the power of x, to less than one unit of the last place. Next to 0 it is rounded like the
// real number but for one case in thousands, and that is what the RG-LRU needs of it: it asks for
// 1 - exp(x), which is but a few units there.
inline Vector exponential(Vector x) {
  x = x < -104.0f ? splat(-104.0f) : x;  // gives 0
  x = x > 89.0f ? splat(89.0f) : x;      // gives infinity
  // x = n · ln 2 + r with |r| ≤ ln 2 / 2. Adding and subtracting 1.5 · 2²³ rounds to a whole
  // number; the first part of ln 2 has so few bits that its product with n is exact.
  constexpr float kRound = 12582912.0f;
  const Vector shifted = x * 1.44269504f + kRound;
  const Vector whole = shifted - kRound;
  const Vector r = x - whole * 0.693359375f - whole * -2.12194440e-4f;
  const Integers n =
      reinterpret_cast<Integers>(shifted) - reinterpret_cast<Integers>(splat(kRound));
  // exp(r) = 1 + r + r² q(r)
  Vector q = splat(kExp[0]);
  q = q * r + kExp[1];
  q = q * r + kExp[2];
  q = q * r + kExp[3];
  q = q * r + kExp[4];
  const Vector e = 1.0f + (r * r * q + r);
  // In two steps, since 2ⁿ may be too large or too small for a number of its own.
  const Integers half = n >> 1;
  return e * power_of_two(half) * power_of_two(n - half);
}

}  // namespace
}  // namespace rgexport
