// What chooses the levels of quantized weights; one table of functions for each instruction set.
//
// All arrays are row-major. Rows are independent of one another, sums have a fixed order, and a
// product and a sum are one operation only where the code says fma: so the result does not
// depend on the processor, on threads, or on which rows are given together.
#pragma once

#include <cstdint>

namespace rgexport {

// Even levels: the weight of level q is scale * q + offset, for q from 0 to `top`. A row of
// `columns` has a scale for every `group` columns, the last group may be shorter.
struct Grid {
  int64_t columns, group;
  float top;
  const float* scale;   // [rows, groups]
  const float* offset;  // [rows, groups]
  const float* table;   // [rows, top + 1] ascending: uneven levels instead of these; or null

  int64_t groups() const { return (columns + group - 1) / group; }
};

// Columns [first, first + count) of rows [rows, columns], and what weighs their errors: H [count, count]
// and its factors M and D.
struct CodeTask {
  const float* weights;
  int64_t rows, columns, first, count;
  const float *m, *d, *h;
};

struct Kernels {
  // Chooses scales [rows, blocks] and zero points for blocks [rows, blocks, block] by trying
  // fractions of the given ones; `importance` [blocks, block], or null, weighs squared errors.
  // `half`: scales are stored as float16, and weights beyond its range are to be avoided. `levels`
  // [rows, blocks, block] become the nearest levels.
  void (*search)(const float* weights, const float* importance, int64_t rows, int64_t blocks,
                 int64_t block, int bits, int symmetric, bool half, float* scales, float* zeros,
                 uint8_t* levels);

  // H = (I + M) D (I + M)', M strictly upper, for a symmetric positive H [k, k] of which the upper
  // triangle is read and lost: M [k, k] float32 and D [k]. Returns 0, or 1 if H is not positive.
  int (*factor)(double* h, int64_t k, float* m, float* d);

  // Chooses the levels [rows, columns] one column after another, each for the sum of what the
  // weights before it were off by (LDLQ, arXiv 2307.13304, which equals GPTQ). `loss` [rows] is
  // (w - v) H (w - v)' of weights w and their levels' values v.
  void (*feedback)(const float* weights, int64_t rows, Grid grid, const float* m, const float* d,
                   uint8_t* levels, double* loss);

  // The same loss of levels that were chosen otherwise.
  void (*loss)(const float* weights, int64_t rows, Grid grid, const float* m, const float* d,
               const uint8_t* levels, double* loss);

  // `rounds` times: where there are `zeros` [rows, groups], scales become those of least loss for
  // the levels (`scale` and `offset` are written); then each level in turn becomes the best for all
  // others.
  void (*refine)(const float* weights, int64_t rows, Grid grid, const float* zeros, bool half,
                 const float* h, int rounds, uint8_t* levels);

  // Chooses the codes of packed rows of a ggml i-quant, of number `type` in ggml, by feedback, then by
  // descent; their scales stay, and no row gets more loss. `values` [size, entries] is the type's
  // codebook, of which an entry has `size` weights; `first` and `count` are multiples of 8.
  void (*codebook)(int type, const float* values, int entries, CodeTask task, uint8_t* packed);
};

const Kernels& base_kernels();
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();

}  // namespace rgexport
