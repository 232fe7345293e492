// Which kernels of quant_matmul.h run on which instruction set.
#include "cpu.h"
#include "quant_matmul.h"

namespace rgexport {

QuantKernels quant_kernels_scalar();
#if defined(__x86_64__)
QuantKernels quant_kernels_avx2();
QuantKernels quant_kernels_avxvnni();
QuantKernels quant_kernels_avx512();
QuantKernels quant_kernels_amx();
#elif defined(__aarch64__)
QuantKernels quant_kernels_neon();
QuantKernels quant_kernels_i8mm();
#endif

namespace {

QuantKernels pick() {
  switch (instruction_set()) {
#if defined(__x86_64__)
    case InstructionSet::kAmx: return quant_kernels_amx();
    case InstructionSet::kAvx512Vnni: return quant_kernels_avx512();
    case InstructionSet::kAvxVnni: return quant_kernels_avxvnni();
    case InstructionSet::kAvx2: return quant_kernels_avx2();
#elif defined(__aarch64__)
    case InstructionSet::kI8mm: return quant_kernels_i8mm();
    case InstructionSet::kNeon: return quant_kernels_neon();
#endif
    default: return quant_kernels_scalar();
  }
}

}  // namespace

const QuantKernels& quant_kernels() {
  static const QuantKernels found = pick();
  return found;
}

}  // namespace rgexport
