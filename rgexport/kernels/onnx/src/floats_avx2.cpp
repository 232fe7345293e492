#include "floats_table.h"

namespace rgexport {

FloatKernels floats_avx2() { return float_kernels(); }

}  // namespace rgexport
