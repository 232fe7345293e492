// In place of floats.cpp and quant_kernels.cpp: the instruction set, and the way to read weights, are
// chosen anew for each execution.
#include "dispatch.h"

#include <array>

#include "cpu.h"
#include "floats.h"
#include "quant_matmul.h"

namespace rgexport {

#if defined(__x86_64__)
#define EACH_SET(X) X(scalar) X(avx2) X(avxvnni) X(avx512) X(amx)
FloatKernels floats_avx2();
FloatKernels floats_avx512();
#elif defined(__aarch64__)
#define EACH_SET(X) X(scalar) X(neon) X(i8mm)
#endif
FloatKernels floats_scalar();
#define DECLARE(set) QuantKernels quant_kernels_##set();
EACH_SET(DECLARE)
#undef DECLARE

namespace {

FloatKernels float_kernels_of(const std::string& set) {
#if defined(__x86_64__)
  if (set == "avx512" || set == "amx") return floats_avx512();
  if (set == "avx2" || set == "avxvnni") return floats_avx2();
#endif
  (void)set;
  return floats_scalar();
}

QuantKernels quant_kernels_of(const std::string& set) {
#define ROW(name) \
  if (set == #name) return quant_kernels_##name();
  EACH_SET(ROW)
#undef ROW
  return quant_kernels_scalar();
}

FloatKernels current_floats;
QuantKernels current_products;

}  // namespace

const FloatKernels& floats() { return current_floats; }
const QuantKernels& quant_kernels() { return current_products; }

}  // namespace rgexport

namespace fuzz {
namespace {

#if defined(__x86_64__)
// AMX's tile instructions are emulated here: all else in its kernels is AVX-512.
bool has_all_but_tiles() {
  return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("gfni") && __builtin_cpu_supports("avx512dq");
}
#else
bool has_all_but_tiles() { return false; }
#endif

}  // namespace

const std::vector<std::string>& instruction_sets() {
  static const std::vector<std::string> found = [] {
    std::vector<std::string> all;
    for (size_t i = 0; const char* name = rgexport::level_name(i); ++i)
      if (rgexport::level_is_here(i) || (std::string(name) == "amx" && has_all_but_tiles()))
        all.emplace_back(name);
    return all;
  }();
  return found;
}

void choose(const std::string& set, int reading) {
  using namespace rgexport;
  current_floats = float_kernels_of(set);
  std::swap(current_floats.stream[0], current_floats.stream[reading % kStreams]);
  current_products = quant_kernels_of(set);
  std::swap(current_products.few[0], current_products.few[reading % kReadings]);
}

}  // namespace fuzz
