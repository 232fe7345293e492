// The ops around the kernels of quant_matmul.h: shapes, scratch memory, threads.
#include <atomic>
#include <cinttypes>
#include <cstring>

#include "ops.h"
#include "quant_matmul.h"
#include "ranges.h"
#include "scratch.h"

namespace rgexport {
namespace {

constexpr int64_t kGrainBytes = 64 << 10;  // of weights that a thread takes at once in decode
constexpr int64_t kUnpackedRows = 32;      // that a thread unpacks at once
constexpr int64_t kGrainRows = 16;         // or a multiple: the most outputs that lie side by side

// Matrices of one format, and the result of each: [count of x, rows of the matrix].
struct Products {
  int matrices = 0;
  int64_t digits = 1;  // of the activations
  QuantMatrix w[QuantLinears::kMost];
  float* y[QuantLinears::kMost];
  const TwoLevelMatrix* two_level = nullptr;  // what a single matrix is unpacked from
  TwoLevelProduct product = nullptr;          // what unpacks it in registers, for one row of x

  const uint8_t* data(int i) const { return two_level ? two_level->planes : w[i].data; }
  int64_t row_bytes() const { return two_level ? two_level->row_bytes : w[0].row_bytes(); }

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

// Rounded activations in scratch memory, cut into their arrays: `count` rows of x, each in digits.
class Rounded {
  struct Places {
    int64_t stride, blocks, at[5] = {};
    Size all = 0;  // bytes
    Places(const QuantKernel& kernel, const QuantMatrix& w, int64_t codes)
        : stride(kernel.code_bytes(w)), blocks(kernel.padded_blocks(w)) {
      const Size rows = (codes + kernel.rows - 1) / kernel.rows * kernel.rows;
      const Size sizes[] = {rows * stride, rows * blocks * 4, rows * blocks * 4, rows * blocks * 4};
      constexpr int64_t kPart = Scratch::kAlignment;
      for (int i = 0; i < 4; ++i) {
        all = all + sizes[i] + (kPart - 1);
        if (!all.fits()) return;  // nor will there be memory
        all = at[i + 1] = all.count() / kPart * kPart;
      }
    }
    Size floats() const { return all.fits() ? Size(all.count() / 4) : all; }
  };

 public:
  Rounded(const QuantKernel& kernel, const QuantMatrix& w, int64_t count, int64_t digits)
      : places_(kernel, w, count * digits), memory_(places_.floats()) {
    auto* base = reinterpret_cast<uint8_t*>(memory_.data());
    activations_ = {count * digits,
                    digits,
                    places_.stride,
                    reinterpret_cast<int8_t*>(base),
                    places_.blocks,
                    reinterpret_cast<float*>(base + places_.at[1]),
                    reinterpret_cast<int32_t*>(base + places_.at[2]),
                    reinterpret_cast<int32_t*>(base + places_.at[3])};
  }
  explicit operator bool() const { return memory_.data() != nullptr; }

  // Those of the rows [first, first + count) of x.
  Activations rows(int64_t first, int64_t count) const {
    Activations some = activations_;
    first *= some.digits;
    some.count = count * some.digits;
    some.codes += first * some.stride;
    some.scales += first * some.blocks;
    some.sums += first * some.blocks;
    some.starts += first * some.blocks;
    return some;
  }

 private:
  const Places places_;
  const Scratch memory_;
  Activations activations_;
};

// Columns [first, last) of the y of matrix `i`; false where there is no memory to unpack weights.
bool multiply(const QuantKernel& kernel, const Products& all, int i, const Activations& a,
              int64_t first, int64_t last) {
  const TwoLevelMatrix* packed = all.two_level;
  const QuantMatrix& whole = all.w[i];
  if (!packed || all.product) {
    packed ? all.product(*packed, a, first, last, all.y[i])
           : kernel.multiply(whole, a, first, last, all.y[i]);
    return true;
  }
  QuantMatrix some = whole;
  some.rows = last - first;
  const int64_t row_floats = packed->bits == 4 ? 0 : whole.row_bytes() / 4;
  const Scratch memory(Size(some.rows) * (row_floats + whole.blocks()));
  if (!memory.data()) return false;
  float* scales = memory.data() + some.rows * row_floats;
  auto* bytes = reinterpret_cast<uint8_t*>(memory.data());
  quant_kernels().unpack(*packed, first, last, bytes, scales);
  some.data = packed->bits == 4 ? packed->planes + first * packed->row_bytes : bytes;
  some.scales = {scales, false};
  if (some.bias) some.bias += first;
  kernel.multiply(some, a, 0, some.rows, all.y[i] + first);
  return true;
}

// Rounds row `m` of x.
void round(const QuantKernel& kernel, const QuantMatrix& format, const float* x, int64_t m,
           const Activations& a) {
  for (int64_t digit = 0; digit < a.digits; ++digit)
    kernel.round(format, x + m * format.columns, a, m * a.digits + digit);
}

// Whether attributes tell a format that kernels know, for rows as long as those of x; refuses it
// otherwise. From here on the sizes of a row are about those of memory that is there.
bool is_format(Context& context, const Tensor& x, int64_t columns, int64_t bits, int64_t block,
               int64_t digits) {
  if (x.rank < 1 || columns < 1 || x.dims[x.rank - 1] != columns)
    context.refuse("the last dimension of x is not K, a positive number: %s, and K is %" PRId64,
                   ShapeText(x).text(), columns);
  else if (bits != 4 && bits != 8)
    context.refuse("bits is neither 4 nor 8 but %" PRId64, bits);
  else if (block < 16 || block > 256 || (block & (block - 1)))
    context.refuse("block_size is no power of two from 16 to 256 but %" PRId64, block);
  else if (digits != 1 && (digits != 2 || bits != 8))
    context.refuse("digits is neither 1, nor 2 with 8 bits, but %" PRId64, digits);
  return !context.refused();
}

// A matrix's numbers for each block of each row may also lie in one dimension.
bool has_rows_of(const Tensor& tensor, int64_t rows, int64_t count) {
  return tensor.is({rows, count}) ||
         (tensor.given && tensor.rank == 1 && (Size(rows) * count).is(tensor.size()));
}

// Whether a matrix's parts fit one another; refuses them otherwise.
bool are_right(Context& context, const QuantMatrix& w, const Tensor& data, const Tensor& scales,
               const Tensor& zero_points, const Tensor& bias,
               const TwoLevelMatrix* packed = nullptr) {
  constexpr int64_t kMostRows = INT32_MAX;
  const auto refuse = [&](const char* what, const Tensor& found) {
    context.refuse("%s: %s, where N is %" PRId64 " and K %" PRId64, what, ShapeText(found).text(),
                   w.rows, w.columns);
    return false;
  };
  if (w.rows < 1 || w.rows > kMostRows) return refuse("N is no possible number of rows", data);
  const bool is_whole = packed ? data.is({w.rows, packed->tiles(), packed->tile_bytes()})
                               : data.is({w.rows, w.blocks(), w.block * w.bits / 8});
  if (!is_whole)
    return refuse(packed ? "planes is not N rows of tiles" : "data is not N rows of blocks", data);
  if (!has_rows_of(scales, w.rows, w.blocks()))
    return refuse("scales is not N rows of blocks", scales);
  if (zero_points.given && !has_rows_of(zero_points, w.rows, w.zero_point_bytes()))
    return refuse("zero_points is not N rows of packed blocks", zero_points);
  if (bias.given && !bias.is({w.rows})) return refuse("bias is not N numbers", bias);
  return true;
}

// Few rows: each thread streams through its own part of the weights. It fetches the first of them
// while it rounds the activations, for itself: that takes less time than to wait for another.
bool stream(Context& context, const QuantKernel& kernel, const Products& all, const float* x,
            int64_t count, const NextWeights& next_weights) {
  const QuantMatrix& format = all.w[0];
  const int64_t row_bytes = all.row_bytes(), rows = all.rows();
  Span weights[QuantLinears::kMost];
  for (int i = 0; i < all.matrices; ++i) weights[i] = {all.data(i), all.w[i].rows * row_bytes};
  Ranges parts(rows, (kGrainBytes / row_bytes / kGrainRows + 1) * kGrainRows, processors());
  const Rounded rounded(kernel, format, parts.parts() * count, all.digits);
  if (!rounded) return false;
  NextWeights::Next next = next_weights.begin(weights, all.matrices);
  std::atomic<bool> enough{true};
  context.parallel_for(parts.parts(), [&](size_t index) {
    if (!parts.any()) return;  // there are fewer threads than parts
    next.enter();
    const int own = static_cast<int>(index);
    const int64_t first = parts.first(own);
    all.each(first, first + 1,
             [&](int i, int64_t row, int64_t) { fetch(all.data(i) + row * row_bytes, kAhead); });
    const Activations a = rounded.rows(own * count, count);
    for (int64_t m = 0; m < count; ++m) round(kernel, format, x, m, a);
    parts.run(own, [&](int64_t from, int64_t to) {
      all.each(from, to, [&](int i, int64_t row, int64_t end) {
        const int64_t most = all.two_level && !all.product ? kUnpackedRows : end - row;
        for (; row < end; row += most)
          if (!multiply(kernel, all, i, a, row, row + most < end ? row + most : end))
            enough = false;
      });
    });
    next.fetch(own, parts.parts());
  });
  return enough;
}

// Of quant_kernels().few, the one that reads weights of this format best.
Fastest<kReadings>& reading_of(const QuantMatrix& format, int64_t digits) {
  static Fastest<kReadings> all[3][5];
  int size = 0;
  while (16 << size < format.block) ++size;
  return all[format.bits == 4 ? 0 : digits][size];
}

// Likewise of the readings of quant_kernels().two_level.
Fastest<kTwoLevelReadings>& reading_of(const TwoLevelMatrix& w) {
  static Fastest<kTwoLevelReadings> all[5][3];
  return all[w.bits - 2][w.unpacked.block / 32];
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
  const Rounded rounded(kernel, format, count, all.digits);
  if (!rounded) return false;
  const Activations a = rounded.rows(0, count);
  context.parallel_for(count, [&](int64_t m) { round(kernel, format, x, m, a); });

  int64_t sizes[QuantLinears::kMost], ends[QuantLinears::kMost], parts = 0;  // of each matrix
  for (int i = 0; i < all.matrices; ++i) {
    const int64_t panels = (all.w[i].rows + kernels.panel - 1) / kernels.panel;
    const int64_t at_once = panels_at_once(kernels, panels);
    sizes[i] = at_once * kernels.panel;
    ends[i] = parts += (panels + at_once - 1) / at_once;
  }
  std::atomic<bool> enough{true};
  context.parallel_for(parts, [&](size_t index) {
    int64_t part = index;
    int i = 0;
    while (part >= ends[i]) ++i;
    if (i > 0) part -= ends[i - 1];
    const int64_t first = part * sizes[i], last = first + sizes[i];
    if (!multiply(kernel, all, i, a, first, last < all.w[i].rows ? last : all.w[i].rows))
      enough = false;
  });
  return enough;
}

// Makes the outputs and fills them; of `few`, `one` says which kernel runs.
template <class One>
void compute(Context& context, Products& all, int matrices, const Tensor& x,
             const NextWeights& next_weights, const One& one) {
  int64_t dims[kMaxRank];
  for (size_t i = 0; i < x.rank; ++i) dims[i] = x.dims[i];
  for (; all.matrices < matrices; ++all.matrices) {
    dims[x.rank - 1] = all.w[all.matrices].rows;
    all.y[all.matrices] = context.output(all.matrices, dims, x.rank);
    if (!all.y[all.matrices]) return;
  }
  const int64_t count = x.size() / all.w[0].columns;
  if (count == 0) return;
  const float* rows = x.as<float>();
  const QuantKernels& kernels = quant_kernels();
  const bool enough = count == 1 ? one([&](int reading) {
    return stream(context, kernels.few[reading], all, rows, 1, next_weights);
  })
                      : count <= kernels.most_several
                          ? stream(context, kernels.several, all, rows, count, next_weights)
                          : multiply(context, all, rows, count);
  if (!enough) context.refuse("out of memory for %" PRId64 " rows of activations", count);
}

}  // namespace

QuantLinears::QuantLinears(const Attributes& attributes, int matrices)
    : matrices_(matrices), columns_(attributes.integer("K", 0)),
      bits_(attributes.integer("bits", 4)), block_(attributes.integer("block_size", 32)),
      digits_(attributes.integer("digits", 1)) {
  constexpr const char* kRows[kMost] = {"N", "N2", "N3"};
  for (int i = 0; i < matrices; ++i) rows_[i] = attributes.integer(kRows[i], 0);
}

void QuantLinears::run(Context& context) const {
  const Tensor x = context.input(0);
  if (context.refused() || !is_format(context, x, columns_, bits_, block_, digits_)) return;
  Products all;
  all.digits = digits_;
  for (int i = 0; i < matrices_; ++i) {
    const auto part = [&](int which) { return context.input(1 + which * matrices_ + i); };
    const Tensor data = part(0), scales = part(1), zero_points = part(2), bias = part(3);
    if (context.refused()) return;
    all.w[i] = {rows_[i],
                columns_,
                static_cast<int>(bits_),
                block_,
                data.as<uint8_t>(),
                {scales.data, scales.type == ort::kFloat16},
                zero_points.as<uint8_t>(),
                bias.as<float>()};
    if (!are_right(context, all.w[i], data, scales, zero_points, bias)) return;
  }
  const int64_t amount = timed_runs_.amount(all.rows() * all.w[0].row_bytes(), x.size() / columns_);
  compute(context, all, matrices_, x, next_weights_,
          [&](const auto& one) { return reading_of(all.w[0], digits_).run(amount, one); });
}

TwoLevelLinears::TwoLevelLinears(const Attributes& attributes, int bits)
    : bits_(bits), columns_(attributes.integer("K", 0)), rows_(attributes.integer("N", 0)),
      block_(attributes.integer("block_size", 32)) {}

void TwoLevelLinears::run(Context& context) const {
  const Tensor x = context.input(0);
  const int unpacked_bits = bits_ <= 4 ? 4 : 8;
  if (context.refused() || !is_format(context, x, columns_, unpacked_bits, block_, 1)) return;
  const Tensor planes = context.input(1), codes = context.input(2), units = context.input(3),
               bias = context.input(4);
  if (context.refused()) return;
  const QuantMatrix unpacked = {rows_,   columns_, unpacked_bits, block_,
                                nullptr, {},       nullptr,       bias.as<float>()};
  const TwoLevelMatrix packed = {
      unpacked, bits_, planes.as<uint8_t>(), codes.as<int8_t>(), {units.data, true}};
  if (!are_right(context, unpacked, planes, codes, Tensor(), bias, &packed)) return;
  if (!units.is({rows_, packed.runs}))
    return context.refuse("units is not N rows of runs: %s", ShapeText(units).text());
  Products all;
  all.w[0] = unpacked;
  all.two_level = &packed;
  const QuantKernels& kernels = quant_kernels();
  const int64_t amount = timed_runs_.amount(rows_ * packed.row_bytes, x.size() / columns_);
  compute(context, all, 1, x, next_weights_, [&](const auto& one) {
    if (!kernels.two_level(packed, 0)) return one(bits_ == 4 ? 0 : kWithoutFetching);
    return reading_of(packed).run(amount, [&](int reading) {
      all.product = kernels.two_level(packed, reading);
      return one(0);
    });
  });
}

}  // namespace rgexport
