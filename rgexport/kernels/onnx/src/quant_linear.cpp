// The op around the kernels of quant_matmul.h: shapes, scratch memory, threads.
#include <cstdlib>
#include <memory>
#include <thread>

#include "ops.h"
#include "quant_matmul.h"
#include "ranges.h"

namespace rgexport {
namespace {

constexpr int64_t kGrainBytes = 64 << 10;  // of weights that a thread takes at once in decode
constexpr int64_t kAhead = 8 << 10;  // bytes of them that are fetched before the first is used
constexpr int64_t kAlignment = 64;

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

// Scratch memory for rounded activations, cut into its arrays.
class Scratch {
 public:
  Scratch(const QuantKernel& kernel, const QuantMatrix& w, int64_t count, bool lanes) {
    const int64_t stride = kernel.code_bytes(w), blocks = kernel.padded_blocks(w);
    const int64_t starts = lanes ? stride * w.bits / 8 : 0;  // four bytes for four bytes of weights
    const int64_t rows = (count + kernel.rows - 1) / kernel.rows * kernel.rows;
    const int64_t sizes[] = {rows * stride, rows * blocks * 4, rows * blocks * 4, rows * starts};
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

  // The rows [first, first + count).
  Activations rows(const QuantMatrix& w, int64_t first, int64_t count) const {
    Activations some = activations_;
    some.count = count;
    some.codes += first * some.stride;
    some.scales += first * some.blocks;
    some.sums += first * some.blocks;
    if (some.lane_starts) some.lane_starts += first * (some.stride * w.bits / 32);
    return some;
  }

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

// Few rows: each thread streams through its own part of the weights. It fetches the first of them
// while it rounds the activations, for itself: that takes less time than to wait for another.
bool stream(Context& context, const QuantMatrix& w, const float* x, int64_t count, float* y,
            const Upcoming& upcoming) {
  const QuantKernel& kernel = quant_kernels().few;
  Ranges parts(w.rows, (kGrainBytes / w.row_bytes() + 4) / 4 * 4, processors());
  const Scratch scratch(kernel, w, parts.parts() * count, true);
  if (!scratch) return false;
  upcoming.begin(w.data, w.rows * w.row_bytes());
  const std::thread::id caller = std::this_thread::get_id();
  context.parallel_for(parts.parts(), [&](size_t index) {
    const int own = static_cast<int>(index);
    const uint8_t* first = w.data + parts.first(own) * w.row_bytes();
    for (int64_t i = 0; i < kAhead; i += kAlignment) __builtin_prefetch(first + i, 0, 2);
    const Activations a = scratch.rows(w, own * count, count);
    for (int64_t m = 0; m < count; ++m) kernel.round(w, x + m * w.columns, a, m);
    parts.run(own, [&](int64_t from, int64_t to) { kernel.multiply(w, a, from, to, y); });
    if (std::this_thread::get_id() != caller) upcoming.fetch(own, parts.parts());
  });
  return true;
}

// Panels for one call of `many`: several parts for each thread, so that none waits long for
// another, and as even ones as there are.
int64_t panels_at_once(const QuantKernels& kernels, const QuantMatrix& w) {
  constexpr int64_t kPartsOfThread = 4;
  const int64_t panels = (w.rows + kernels.panel - 1) / kernels.panel, threads = processors();
  const int64_t share = panels / (threads * kPartsOfThread);
  const int64_t most = share < kernels.most_panels ? share : kernels.most_panels;
  int64_t best = 1, least = panels;
  for (int64_t part = 1; part <= most; ++part) {
    const int64_t longest = (panels + part * threads - 1) / (part * threads) * part;
    if (longest <= least) best = part, least = longest;
  }
  return best;
}

// Many rows: each thread takes panels of weights, which all rows of activations share.
bool multiply(Context& context, const QuantMatrix& w, const float* x, int64_t count, float* y) {
  const QuantKernels& kernels = quant_kernels();
  const QuantKernel kernel = kernels.many(w);
  const Scratch scratch(kernel, w, count, false);
  if (!scratch) return false;
  const Activations a = scratch.rows(w, 0, count);
  context.parallel_for(count, [&](size_t m) { kernel.round(w, x + m * w.columns, a, m); });
  const int64_t part = kernels.panel * panels_at_once(kernels, w);
  context.parallel_for((w.rows + part - 1) / part, [&](size_t i) {
    const int64_t first = i * part, last = first + part;
    kernel.multiply(w, a, first, last < w.rows ? last : w.rows, y);
  });
  return true;
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

  const float* rows = x.as<float>();
  const bool few = count < quant_kernels().most_few;
  const bool enough =
      few ? stream(context, w, rows, count, y, upcoming_) : multiply(context, w, rows, count, y);
  return enough ? nullptr : "QuantLinear: out of memory";
}

}  // namespace rgexport
