// The ops around the kernels of quant_matmul.h: shapes, scratch memory, threads.
#include "ops.h"
#include "quant_matmul.h"
#include "ranges.h"
#include "scratch.h"

namespace rgexport {
namespace {

constexpr int64_t kGrainBytes = 64 << 10;  // of weights that a thread takes at once in decode

// Matrices of one format, and the result of each: [count of x, rows of the matrix].
struct Products {
  int matrices = 0;
  QuantMatrix w[QuantLinears::kMost];
  float* y[QuantLinears::kMost];

  int64_t rows() const {
    int64_t sum = 0;
    for (int i = 0; i < matrices; ++i) sum += w[i].rows;
    return sum;
  }

  // body(i, first, last) for the rows of each matrix that are in [first, last) of the rows of all.
  template <class Body>
  void each(int64_t first, int64_t last, const Body& body) const {
    for (int i = 0; i < matrices; ++i) {
      const int64_t rows = w[i].rows, to = last < rows ? last : rows;
      if (first < to) body(i, first, to);
      first = first > rows ? first - rows : 0;
      last -= rows;
    }
  }
};

// Rounded activations in scratch memory, cut into their arrays.
class Rounded {
  struct Places {
    int64_t stride, blocks, starts, at[5] = {};
    Places(const QuantKernel& kernel, const QuantMatrix& w, int64_t count)
        : stride(kernel.code_bytes(w)), blocks(kernel.padded_blocks(w)), starts(kernel.starts(w)) {
      const int64_t rows = (count + kernel.rows - 1) / kernel.rows * kernel.rows;
      const int64_t sizes[] = {rows * stride, rows * blocks * 4, rows * blocks * 4,
                               rows * starts * 4};
      constexpr int64_t kPart = Scratch::kAlignment;
      for (int i = 0; i < 4; ++i) at[i + 1] = at[i] + (sizes[i] + kPart - 1) / kPart * kPart;
    }
  };

 public:
  Rounded(const QuantKernel& kernel, const QuantMatrix& w, int64_t count)
      : places_(kernel, w, count), memory_(places_.at[4] / 4) {
    auto* base = reinterpret_cast<uint8_t*>(memory_.data());
    activations_ = {count,
                    places_.stride,
                    reinterpret_cast<int8_t*>(base),
                    places_.blocks,
                    reinterpret_cast<float*>(base + places_.at[1]),
                    reinterpret_cast<int32_t*>(base + places_.at[2]),
                    places_.starts,
                    reinterpret_cast<int32_t*>(base + places_.at[3])};
  }
  explicit operator bool() const { return memory_.data() != nullptr; }

  // The rows [first, first + count).
  Activations rows(int64_t first, int64_t count) const {
    Activations some = activations_;
    some.count = count;
    some.codes += first * some.stride;
    some.scales += first * some.blocks;
    some.sums += first * some.blocks;
    some.starts += first * some.start_count;
    return some;
  }

 private:
  const Places places_;
  const Scratch memory_;
  Activations activations_;
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
bool stream(Context& context, const QuantKernel& kernel, const Products& all, const float* x,
            int64_t count, const Upcoming& upcoming) {
  const QuantMatrix& format = all.w[0];
  const int64_t row_bytes = format.row_bytes(), rows = all.rows();
  Span weights[QuantLinears::kMost];
  for (int i = 0; i < all.matrices; ++i)
    weights[i] = {all.w[i].data, all.w[i].rows * row_bytes};
  Ranges parts(rows, (kGrainBytes / row_bytes + 4) / 4 * 4, processors());
  const Rounded rounded(kernel, format, parts.parts() * count);
  if (!rounded) return false;
  Upcoming::Next next = upcoming.begin(weights, all.matrices);
  context.parallel_for(parts.parts(), [&](size_t index) {
    const int own = static_cast<int>(index);
    const int64_t first = parts.first(own);
    all.each(first, first + 1, [&](int i, int64_t row, int64_t) {
      fetch(all.w[i].data + row * row_bytes, kAhead);
    });
    const Activations a = rounded.rows(own * count, count);
    for (int64_t m = 0; m < count; ++m) kernel.round(format, x + m * format.columns, a, m);
    parts.run(own, [&](int64_t from, int64_t to) {
      all.each(from, to, [&](int i, int64_t row, int64_t end) {
        kernel.multiply(all.w[i], a, row, end, all.y[i]);
      });
    });
    next.fetch(own, parts.parts());
  });
  return true;
}

// Of quant_kernels().few, the one that reads weights of this format best.
Fastest<kReadings>& reading_of(const QuantMatrix& format) {
  static Fastest<kReadings> all[2][5];
  int size = 0;
  while (16 << size < format.block) ++size;
  return all[format.bits == 8][size];
}

// Panels for one call of `many`: several parts for each thread, so that none waits long for
// another, and as even ones as there are.
int64_t panels_at_once(const QuantKernels& kernels, int64_t panels) {
  constexpr int64_t kPartsOfThread = 4;
  const int64_t threads = processors();
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
bool multiply(Context& context, const Products& all, const float* x, int64_t count) {
  const QuantKernels& kernels = quant_kernels();
  const QuantMatrix& format = all.w[0];
  const QuantKernel kernel = kernels.many(format);
  const Rounded rounded(kernel, format, count);
  if (!rounded) return false;
  const Activations a = rounded.rows(0, count);
  context.parallel_for(count,
                       [&](size_t m) { kernel.round(format, x + m * format.columns, a, m); });

  int64_t sizes[QuantLinears::kMost], ends[QuantLinears::kMost], parts = 0;  // of each matrix
  for (int i = 0; i < all.matrices; ++i) {
    const int64_t panels = (all.w[i].rows + kernels.panel - 1) / kernels.panel;
    const int64_t at_once = panels_at_once(kernels, panels);
    sizes[i] = at_once * kernels.panel;
    ends[i] = parts += (panels + at_once - 1) / at_once;
  }
  context.parallel_for(parts, [&](size_t index) {
    int64_t part = index;
    int i = 0;
    while (part >= ends[i]) ++i;
    if (i > 0) part -= ends[i - 1];
    const int64_t first = part * sizes[i], last = first + sizes[i];
    kernel.multiply(all.w[i], a, first, last < all.w[i].rows ? last : all.w[i].rows, all.y[i]);
  });
  return true;
}

}  // namespace

QuantLinears::QuantLinears(const Attributes& attributes, int matrices)
    : matrices_(matrices),
      columns_(attributes.integer("K", 0)),
      bits_(attributes.integer("bits", 4)),
      block_(attributes.integer("block_size", 32)) {
  constexpr const char* kRows[kMost] = {"N", "N2", "N3"};
  for (int i = 0; i < matrices; ++i) rows_[i] = attributes.integer(kRows[i], 0);
}

const char* QuantLinears::run(Context& context) const {
  const Tensor x = context.input(0);
  Products all;
  for (int i = 0; i < matrices_; ++i) {
    const auto part = [&](int which) { return context.input(1 + which * matrices_ + i); };
    const Tensor data = part(0), scales = part(1), zero_points = part(2), bias = part(3);
    all.w[i] = {rows_[i],
                columns_,
                static_cast<int>(bits_),
                block_,
                data.as<uint8_t>(),
                scales.as<float>(),
                zero_points.as<uint8_t>(),
                bias.as<float>()};
    if (const char* wrong = wrong_shapes(all.w[i], x, data, scales, zero_points, bias))
      return wrong;
  }
  int64_t dims[kMaxRank];
  for (size_t i = 0; i < x.rank; ++i) dims[i] = x.dims[i];
  for (; all.matrices < matrices_; ++all.matrices) {
    dims[x.rank - 1] = rows_[all.matrices];
    all.y[all.matrices] = context.output(all.matrices, dims, x.rank);
    if (!all.y[all.matrices]) return nullptr;
  }
  const int64_t count = x.size() / columns_;
  if (count == 0) return nullptr;

  const float* rows = x.as<float>();
  const auto few = [&](int reading) {
    return stream(context, quant_kernels().few[reading], all, rows, count, upcoming_);
  };
  const int64_t amount = telling_.amount(all.rows() * all.w[0].row_bytes(), count);
  const bool enough = count < quant_kernels().most_few ? reading_of(all.w[0]).run(amount, few)
                                                       : multiply(context, all, rows, count);
  return enough ? nullptr : "QuantLinear: out of memory";
}

}  // namespace rgexport
