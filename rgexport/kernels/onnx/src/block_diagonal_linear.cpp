#include <cstring>

#include "floats.h"
#include "ops.h"
#include "ranges.h"

namespace rgexport {
namespace {

constexpr int64_t kRows = 64;    // of a task
constexpr int64_t kFewRows = 3;  // up to so many, time goes into reading the weights

}  // namespace

const char* BlockDiagonalLinear::run(Context& context) const {
  const Tensor x = context.input(0), weight = context.input(1), bias = context.input(2);
  if (x.rank != 3) return "BlockDiagonalLinear: x must be [batch, tokens, channels]";
  if (weight.rank != 3 || weight.dims[1] != weight.dims[2])
    return "BlockDiagonalLinear: weight must be [heads, block, block]";
  const int64_t heads = weight.dims[0], block = weight.dims[1], channels = x.dims[2];
  if (heads * block != channels)
    return "BlockDiagonalLinear: x must have heads x block channels";
  if (bias.size() != channels) return "BlockDiagonalLinear: bias must be [heads, block]";

  float* y = context.output(0, x.dims, 3);
  if (!y) return nullptr;

  const FloatKernels& kernels = floats();
  const int64_t rows = x.dims[0] * x.dims[1], parts = (rows + kRows - 1) / kRows;
  const auto multiply = [&](int64_t head, int64_t first) {
    const int64_t at = first * channels + head * block;
    Product task;
    task.rows = rows - first < kRows ? rows - first : kRows;
    task.columns = task.depth = block;
    task.a = x.as<float>() + at;
    task.a_row = channels;
    task.a_step = 1;
    task.b = weight.as<float>() + head * block * block;
    task.b_step = block;
    task.c = y + at;
    task.c_row = channels;
    task.add = true;
    for (int64_t row = 0; row < task.rows; ++row)
      std::memcpy(task.c + row * channels, bias.as<float>() + head * block, block * sizeof(float));
    (rows <= kFewRows ? kernels.stream : kernels.product)(task);
  };
  if (rows <= kFewRows) {
    Ranges threads(heads, 1, processors());
    context.parallel_for(threads.parts(), [&](size_t own) {
      threads.run(static_cast<int>(own), [&](int64_t head, int64_t) { multiply(head, 0); });
    });
  } else {
    context.parallel_for(heads * parts,
                         [&](size_t i) { multiply(i / parts, i % parts * kRows); });
  }
  return nullptr;
}

}  // namespace rgexport
