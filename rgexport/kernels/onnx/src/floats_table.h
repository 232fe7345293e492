// All kernels of floats.h, for the instruction set that this is compiled for.
#pragma once

#include "floats_pointwise.h"
#include "floats_product.h"
#include "floats_recurrent.h"

namespace rgexport {
namespace {

FloatKernels float_kernels() {
  FloatKernels table;
  table.lanes = kLanes;
  table.product = product;
  table.stream = {stream<Cache::kL2>, stream<Cache::kL1>, stream<Cache::kNone>};
  table.transpose = transpose;
  table.softmax = softmax;
  table.rg_lru = rg_lru;
  table.causal_conv = causal_conv;
  table.gelu_mul = gelu_mul;
  table.rms_norm = rms_norm;
  table.soft_cap = soft_cap;
  return table;
}

}  // namespace
}  // namespace rgexport
