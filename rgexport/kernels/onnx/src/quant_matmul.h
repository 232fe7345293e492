// The product of float32 rows with a block-wise quantized matrix: what each instruction set gives.
//
// y[m, n] = Σ_b s_w[n, b] · s_x[m, b] · Σ_{k in block b} (w[n, k] − z[n, b]) · x̂[m, k]
//
// x̂ are the activations of a row, rounded to int8 with one scale for each block of weights, as
// ONNX Runtime's MatMulNBits does at accuracy level 4. With two digits, what that leaves of them is
// rounded to int8 once more, with 1/254 of the scale, and x̂ is the sum of both. The inner sum is exact
// in int32, with two exceptions for many rows: on AMX and i8mm, what zero points of 8 bits are beside the
// middle of the levels goes through floats; and for small blocks on AMX there is amx_bf16.h.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "scales.h"

namespace rgexport {

// A matrix [rows, columns] as MatMulNBits stores it: each row in whole blocks, 4 bits with the
// even column in the low half of a byte, levels without sign. It is read where it lies.
struct QuantMatrix {
  int64_t rows = 0, columns = 0;
  int bits;                    // 4 or 8
  int64_t block;               // columns that share a scale: a power of two from 16 on
  const uint8_t* data;         // [rows, blocks, block · bits / 8]
  Scales scales;               // [rows, blocks]
  const uint8_t* zero_points;  // [rows, blocks · bits / 8 rounded up], or null: 2^(bits − 1)
  const float* bias;           // [rows], or null
  int64_t y_stride = rows;     // from one row of y to the next

  int64_t blocks() const { return (columns + block - 1) / block; }
  int64_t row_bytes() const { return blocks() * block * bits / 8; }
  int64_t zero_point_bytes() const { return (blocks() * bits + 7) / 8; }
};

// A matrix with levels of 2 to 6 bits in planes, see two_level.h; the scale of a block is a code times
// the unit of its run.
constexpr int64_t kRun = 16;  // blocks that share a unit

// The most unpacked bytes of a tile, whose levels have `bits` bits: a vector of AVX-512 for each group of
// the finest plane.
constexpr int64_t most_tile(int bits) {
  constexpr int kGroups[] = {2, 4, 1, 8, 4};
  return 64 * kGroups[bits - 2];
}

struct TwoLevelMatrix {
  QuantMatrix unpacked;   // what its rows become: without data and scales
  int bits;               // of a level: 2 to 6
  const uint8_t* planes;  // [rows, tiles(), tile_bytes()]
  const int8_t* codes;    // [rows, blocks]
  Scales units;           // [rows, runs]

  const int64_t row_bytes = unpacked.row_bytes() * bits / unpacked.bits;
  const int64_t runs = (unpacked.blocks() + kRun - 1) / kRun;

  int64_t tile() const {  // unpacked bytes
    if (bits == 4) return unpacked.block / 2;
    const int64_t width = unpacked.row_bytes(), most = most_tile(bits), even = width & -width;
    return even < most ? even : most;
  }
  int64_t tiles() const { return unpacked.row_bytes() / tile(); }
  int64_t tile_bytes() const { return tile() * bits / unpacked.bits; }
};

// The scale of a digit of activations in that of the next one, which has what the first one leaves:
// half a unit of the one is 127 of the other.
constexpr int kDigit = 254;

// Rounded rows of activations; `codes` are what a kernel reads, in its order. For few rows they lie
// otherwise than said here: a line of codes of each row, then the next line of each; and the numbers of
// one block of all rows, then those of the next block, where rows are those of x.
struct Activations {
  int64_t count;    // rows: of x, times digits
  int64_t digits;   // rows, one behind another, that are one of x: 1, or 2 with weights of 8 bits
  int64_t stride;   // bytes of codes from row to row
  int8_t* codes;    // [count, stride]
  int64_t blocks;   // the matrix's, padded with zeros to a whole number of lines
  float* scales;    // [count, blocks]
  int32_t* sums;    // [count, blocks]: sums of codes
  int32_t* starts;  // [count, blocks]: what a kernel's dot products start from
};

struct QuantKernel {
  // Bytes of codes, and number of blocks, that the activations of one row take.
  int64_t (*code_bytes)(const QuantMatrix&);
  int64_t (*padded_blocks)(const QuantMatrix&);
  // Rounds x [columns] to a digit, into row `index` of the activations; after the digits before it.
  void (*round)(const QuantMatrix&, const float* x, const Activations&, int64_t index);
  // Columns [first, last) of y.
  void (*multiply)(const QuantMatrix&, const Activations&, int64_t first, int64_t last, float* y);
  int64_t rows = 1;  // of activations that lie together: there is memory for whole groups of them
};

constexpr int kReadings = 7, kTwoLevelReadings = 2;
constexpr int kWithoutFetching = 4;  // the one that fetches nothing ahead: for weights in the cache

// Columns [first, last) of y, for one row of activations.
using TwoLevelProduct = void (*)(const TwoLevelMatrix&, const Activations&, int64_t first,
                                 int64_t last, float* y);

struct QuantKernels {
  // For one row of activations: as fast as the weights can be read. All give the same result, and
  // only read the weights in different ways; each may be the fastest one somewhere.
  std::array<QuantKernel, kReadings> few;
  // The same with weights in planes; null where the matrix has no whole tiles or no such block.
  TwoLevelProduct (*two_level)(const TwoLevelMatrix&, int reading);
  // For several: the same result for each of them.
  QuantKernel several;
  // For many, by panels of weights that are unpacked once for all rows.
  QuantKernel (*many)(const QuantMatrix&);
  // Unpacks rows [first, last): bytes as `data` of QuantMatrix has them, and their scales.
  void (*unpack)(const TwoLevelMatrix&, int64_t first, int64_t last, uint8_t* bytes, float* scales);
  int64_t most_several;     // rows of activations; for more, `many` is the faster one
  int64_t panel;            // columns of y that `many` takes at a time: `first` is a multiple of it
  int64_t most_panels = 1;  // for one call of `many`, if there are enough for all threads
};
// y is [count / digits, rows of the matrix].

// Those of instruction_set().
const QuantKernels& quant_kernels();

}  // namespace rgexport
