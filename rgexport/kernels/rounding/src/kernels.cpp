// The functions of kernels.h for the instruction set that this file is compiled for.
#include "kernels.h"

#include "codebook.h"
#include "factor.h"
#include "feedback.h"
#include "refine.h"
#include "search.h"

#define RGEXPORT_NAME_(set) set##_kernels
#define RGEXPORT_NAME(set) RGEXPORT_NAME_(set)

namespace rgexport {

const Kernels& RGEXPORT_NAME(RGEXPORT_SET)() {
  static const Kernels kernels = {search, factor, feedback, loss, refine, codebook};
  return kernels;
}

}  // namespace rgexport
