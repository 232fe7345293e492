// The library's interface, for ctypes.
#include <cstdlib>
#include <cstring>

#include "cpu.h"
#include "kernels.h"

#if defined(_WIN32)
#define RGEXPORT_API extern "C" __declspec(dllexport)
#else
#define RGEXPORT_API extern "C" __attribute__((visibility("default")))
#endif

using namespace rgexport;

namespace {

#if defined(__x86_64__)
const Kernels& best() {
  const char* most = std::getenv("RGEXPORT_CPU");
  const bool scalar = most && !std::strcmp(most, "scalar");
  const bool no_512 = most && (!std::strcmp(most, "avx2") || !std::strcmp(most, "avxvnni"));
  if (scalar || !has_avx2()) return base_kernels();
  return has_avx512() && !no_512 ? avx512_kernels() : avx2_kernels();
}
#else
const Kernels& best() { return base_kernels(); }
#endif

const Kernels& kernels() {
  static const Kernels& chosen = best();
  return chosen;
}

}  // namespace

RGEXPORT_API void rgexport_search(const float* weights, const float* importance, int64_t rows,
                                  int64_t blocks, int64_t block, int bits, int symmetric, int half,
                                  float* scales, float* zeros, uint8_t* levels) {
  kernels().search(weights, importance, rows, blocks, block, bits, symmetric, half != 0, scales,
                   zeros, levels);
}

RGEXPORT_API int rgexport_factor(double* h, int64_t columns, float* m, float* d) {
  return kernels().factor(h, columns, m, d);
}

RGEXPORT_API void rgexport_feedback(const float* weights, int64_t rows, int64_t columns,
                                    int64_t group, float top, const float* scale,
                                    const float* offset, const float* table, const float* m,
                                    const float* d, uint8_t* levels, double* loss) {
  kernels().feedback(weights, rows, {columns, group, top, scale, offset, table}, m, d, levels,
                     loss);
}

RGEXPORT_API void rgexport_loss(const float* weights, int64_t rows, int64_t columns, int64_t group,
                                float top, const float* scale, const float* offset,
                                const float* table, const float* m, const float* d,
                                const uint8_t* levels, double* loss) {
  kernels().loss(weights, rows, {columns, group, top, scale, offset, table}, m, d, levels, loss);
}

RGEXPORT_API void rgexport_refine(const float* weights, int64_t rows, int64_t columns,
                                  int64_t group, float top, float* scale, float* offset,
                                  const float* table, const float* zeros, int half, const float* h,
                                  int rounds, uint8_t* levels) {
  kernels().refine(weights, rows, {columns, group, top, scale, offset, table}, zeros, half != 0, h,
                   rounds, levels);
}

RGEXPORT_API void rgexport_codebook(int type, const float* values, int entries,
                                    const float* weights, int64_t rows, int64_t columns,
                                    int64_t first, int64_t count, const float* m, const float* d,
                                    const float* h, uint8_t* packed) {
  kernels().codebook(type, values, entries, {weights, rows, columns, first, count, m, d, h},
                     packed);
}
