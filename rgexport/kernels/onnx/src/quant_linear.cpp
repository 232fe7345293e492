// The op around the kernels of quant_matmul.h: shapes, scratch memory, threads.
#include <cstdlib>
#include <memory>

#include "ops.h"
#include "quant_matmul.h"
#include "ranges.h"

namespace rgexport {
namespace {

constexpr int64_t kGrainBytes = 64 << 10;  // of weights that a thread takes at once in decode
constexpr int64_t kAlignment = 64;

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

// Scratch memory for rounded activations, cut into its arrays.
class Scratch {
 public:
  Scratch(const QuantKernels& kernels, const QuantMatrix& w, int64_t count, bool lanes) {
    const int64_t stride = kernels.code_bytes(w), blocks = kernels.padded_blocks(w);
    const int64_t starts = lanes ? stride * w.bits / 8 : 0;  // four bytes for four bytes of weights
    const int64_t sizes[] = {count * stride, count * blocks * 4, count * blocks * 4, count * starts};
    int64_t places[5] = {};
    for (int i = 0; i < 4; ++i)
      places[i + 1] = places[i] + (sizes[i] + kAlignment - 1) / kAlignment * kAlignment;
    memory_.reset(std::malloc(places[4] + kAlignment));
    if (!memory_) return;
    const auto start = reinterpret_cast<uintptr_t>(memory_.get());
    auto* base = reinterpret_cast<uint8_t*>((start + kAlignment - 1) / kAlignment * kAlignment);
    activations_ = {count,
                    stride,
                    reinterpret_cast<int8_t*>(base),
                    blocks,
                    reinterpret_cast<float*>(base + places[1]),
                    reinterpret_cast<int32_t*>(base + places[2]),
                    lanes ? reinterpret_cast<int32_t*>(base + places[3]) : nullptr};
  }
  explicit operator bool() const { return memory_ != nullptr; }
  const Activations& activations() const { return activations_; }

 private:
  std::unique_ptr<void, Free> memory_;
  Activations activations_{};
};

const char* wrong_shapes(const QuantMatrix& w, const Tensor& x, const Tensor& data,
                         const Tensor& scales, const Tensor& zero_points, const Tensor& bias) {
  if (w.columns < 1 || w.rows < 1) return "QuantLinear: K and N are not positive";
  if (w.bits != 4 && w.bits != 8) return "QuantLinear: bits is neither 4 nor 8";
  if (w.block < 16 || w.block > 256 || (w.block & (w.block - 1)))
    return "QuantLinear: block_size is no power of two from 16 to 256";
  if (x.rank < 1 || x.rank > kMaxRank || x.dims[x.rank - 1] != w.columns)
    return "QuantLinear: the last dimension of x is not K";
  if (data.size() != w.rows * w.row_bytes()) return "QuantLinear: data is not N rows of blocks";
  if (scales.size() != w.rows * w.blocks()) return "QuantLinear: scales is not N rows of blocks";
  if (zero_points.data && zero_points.size() != w.rows * w.zero_point_bytes())
    return "QuantLinear: zero_points is not N rows of packed blocks";
  if (bias.data && bias.size() != w.rows) return "QuantLinear: bias is not N numbers";
  return nullptr;
}

}  // namespace

QuantLinear::QuantLinear(const Attributes& attributes)
    : columns_(attributes.integer("K", 0)),
      rows_(attributes.integer("N", 0)),
      bits_(attributes.integer("bits", 4)),
      block_(attributes.integer("block_size", 32)) {}

const char* QuantLinear::run(Context& context) const {
  const Tensor x = context.input(0), data = context.input(1), scales = context.input(2);
  const Tensor zero_points = context.input(3), bias = context.input(4);
  const QuantMatrix w = {rows_,
                         columns_,
                         static_cast<int>(bits_),
                         block_,
                         data.as<uint8_t>(),
                         scales.as<float>(),
                         zero_points.as<uint8_t>(),
                         bias.as<float>()};
  if (const char* wrong = wrong_shapes(w, x, data, scales, zero_points, bias)) return wrong;
  int64_t dims[kMaxRank];
  for (size_t i = 0; i < x.rank; ++i) dims[i] = x.dims[i];
  dims[x.rank - 1] = w.rows;
  float* y = context.output(0, dims, x.rank);
  const int64_t count = x.size() / w.columns;
  if (!y || count == 0 || w.rows == 0) return nullptr;

  const QuantKernels& kernels = quant_kernels();
  const bool few = count < kernels.most_few;
  const Scratch scratch(kernels, w, count, few);
  if (!scratch) return "QuantLinear: out of memory";
  const Activations& a = scratch.activations();
  const float* rows = x.as<float>();
  const auto round = [&](size_t m) { kernels.round(w, rows + m * w.columns, a, m); };
  if (few) {
    for (int64_t m = 0; m < count; ++m) round(m);
  } else {
    context.parallel_for(count, round);
  }
  if (few) {
    Ranges parts(w.rows, (kGrainBytes + w.row_bytes() - 1) / w.row_bytes(), processors());
    context.parallel_for(parts.parts(), [&](size_t own) {
      parts.run(static_cast<int>(own), [&](int64_t first, int64_t last) {
        kernels.few(w, a, first, last, y);
      });
    });
  } else {
    const int64_t panel = kernels.panel;
    context.parallel_for((w.rows + panel - 1) / panel, [&](size_t i) {
      const int64_t first = i * panel, last = first + panel < w.rows ? first + panel : w.rows;
      kernels.many(w, a, first, last, y);
    });
  }
  return nullptr;
}

}  // namespace rgexport
