#include "floats_table.h"

namespace rgexport {

FloatKernels floats_avx512() { return float_kernels(); }

}  // namespace rgexport
