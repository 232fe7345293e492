// Which kernels of floats.h run on which instruction set.
#include "floats.h"

#include "cpu.h"

namespace rgexport {

FloatKernels floats_scalar();
#if defined(__x86_64__)
FloatKernels floats_avx2();
FloatKernels floats_avx512();
#endif

namespace {

FloatKernels pick() {
  switch (instruction_set()) {
#if defined(__x86_64__)
    case InstructionSet::kAmx:
    case InstructionSet::kAvx512Vnni: return floats_avx512();
    case InstructionSet::kAvxVnni:
    case InstructionSet::kAvx2: return floats_avx2();
#endif
    default: return floats_scalar();  // on Arm: NEON
  }
}

}  // namespace

const FloatKernels& floats() {
  static const FloatKernels found = pick();
  return found;
}

}  // namespace rgexport
