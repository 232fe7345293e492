// Holds the kernels of quant_matmul.h against the definition of the product, in double.
//
// Built with -D'EACH_SET(X)=X(scalar) X(avx2)': the instruction sets whose kernels are linked.
// Prints a line for each product that is wrong; exits 1 if there was one.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "cpu.h"
#include "quant_matmul.h"

namespace rgexport {
#define DECLARE(set) QuantKernels quant_kernels_##set();
EACH_SET(DECLARE)
#undef DECLARE
}  // namespace rgexport

using namespace rgexport;

namespace {

struct Set {
  const char* name;
  QuantKernels kernels;
};

struct Shape {
  int64_t count, rows, columns;
};

struct Kind {
  int bits;
  int64_t block;
  bool zero_points;
  bool whole;  // whole numbers, whose sums are exact
  bool half;   // scales in float16
  int digits = 1;
};

// Memory of exactly that size: a sanitizer sees what is read or written behind it.
template <class T>
class Exact {
 public:
  explicit Exact(size_t count) : size_(count) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, count * sizeof(T) + (count == 0))) std::abort();
    data_ = static_cast<T*>(memory);
    std::memset(memory, 0xee, count * sizeof(T));
  }
  ~Exact() { std::free(data_); }
  Exact(const Exact&) = delete;
  T* data() const { return data_; }
  size_t size() const { return size_; }
  T& operator[](size_t i) const { return data_[i]; }

 private:
  T* data_;
  size_t size_;
};

std::mt19937 random_bits(1);

float uniform(float low, float high) {
  return std::uniform_real_distribution<float>(low, high)(random_bits);
}

// The nearest bfloat16, halves to even.
double bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
  std::memcpy(&x, &bits, 4);
  return x;
}

// The float16 that a number is, if it is one and not too small.
uint16_t half_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>((bits >> 13) - (112 << 10));
}

int64_t blocks_of(const Shape& s, const Kind& k) { return (s.columns + k.block - 1) / k.block; }
int64_t zero_bytes(const Shape& s, const Kind& k) { return (blocks_of(s, k) * k.bits + 7) / 8; }

// A product and what it is by definition.
class Product {
 public:
  Product(const Shape& shape, const Kind& kind)
      : shape_(shape),
        kind_(kind),
        blocks_(blocks_of(shape, kind)),
        data_(shape.rows * blocks_ * kind.block * kind.bits / 8),
        scales_(shape.rows * blocks_),
        halves_(kind.half ? scales_.size() : 0),
        zero_points_(kind.zero_points ? shape.rows * zero_bytes(shape, kind) : 0),
        bias_(shape.rows),
        x_(shape.count * shape.columns),
        expected_(shape.count * shape.rows),
        in_bfloat16_(shape.count * shape.rows),
        sizes_(shape.count * shape.rows) {
    for (size_t i = 0; i < data_.size(); ++i) data_[i] = static_cast<uint8_t>(random_bits());
    for (size_t i = 0; i < zero_points_.size(); ++i)
      zero_points_[i] = static_cast<uint8_t>(random_bits());
    for (size_t i = 0; i < scales_.size(); ++i)
      scales_[i] = kind.whole ? 1.0f : static_cast<float>(160 + random_bits() % 300) / 16384;
    for (size_t i = 0; i < halves_.size(); ++i) halves_[i] = half_of(scales_[i]);
    for (size_t i = 0; i < bias_.size(); ++i)
      bias_[i] = kind.whole ? static_cast<float>(i % 7) : uniform(-1, 1);
    fill_x();
    expect();
  }

  QuantMatrix matrix() const {
    const void* scales = kind_.half ? static_cast<void*>(halves_.data()) : scales_.data();
    return {shape_.rows,   shape_.columns, kind_.bits,
            kind_.block,   data_.data(),   {scales, kind_.half},
            kind_.zero_points ? zero_points_.data() : nullptr, bias_.data()};
  }
  float* x() const { return x_.data(); }
  int digits() const { return kind_.digits; }

  // How many of the outputs are too far off, where factors are rounded to bfloat16 or not.
  int64_t wrong(const float* y, bool in_bfloat16) const {
    const Exact<double>& expected = in_bfloat16 ? in_bfloat16_ : expected_;
    int64_t found = 0;
    for (size_t i = 0; i < expected.size(); ++i) {
      const bool exact = kind_.whole && sizes_[i] < 1 << 24;
      const double far = std::fabs(y[i] - expected[i]);
      found += !(far <= (exact ? 0.0 : 1e-6 * sizes_[i]));  // a NaN is wrong, too
    }
    return found;
  }

 private:
  // Multiples of a scale that no order of rounding takes to another code; the first is the largest.
  void fill_x() {
    for (int64_t m = 0; m < shape_.count; ++m) {
      float scale = 1;
      for (int64_t k = 0; k < shape_.columns; ++k) {
        const bool first = k % kind_.block == 0;
        if (first && !kind_.whole) scale = k == kind_.block ? 0.0f : uniform(0.001f, 0.1f);
        const int code = first ? 127 : static_cast<int>(random_bits() % 253) - 126;
        const float number = static_cast<float>(code) + (first ? 0.0f : beside());
        // In units of the last digit, whole numbers stay whole.
        const float unit = kind_.whole && kind_.digits == 2 ? kDigit : scale;
        x_[m * shape_.columns + k] = unit * number;
      }
    }
  }

  // What a number is beside its code: less than a half, and where there is a second digit, no half of
  // that either.
  float beside() const {
    if (kind_.digits == 1) return kind_.whole ? 0.0f : uniform(-0.4f, 0.4f);
    const auto next = static_cast<float>(static_cast<int>(random_bits() % 203) - 101);
    return (next + (kind_.whole ? 0.0f : uniform(-0.3f, 0.3f))) / kDigit;
  }

  int weight(int64_t n, int64_t column) const {
    const int64_t i = n * blocks_ * kind_.block + column;
    return kind_.bits == 8 ? data_[i] : data_[i / 2] >> (i % 2 * 4) & 15;
  }

  int zero_point(int64_t n, int64_t block) const {
    if (!kind_.zero_points) return 1 << (kind_.bits - 1);
    const uint8_t* row = zero_points_.data() + n * zero_bytes(shape_, kind_);
    return kind_.bits == 8 ? row[block] : row[block / 2] >> (block % 2 * 4) & 15;
  }

  void expect() {
    for (size_t i = 0; i < expected_.size(); ++i) {
      expected_[i] = in_bfloat16_[i] = bias_[i % shape_.rows];
      sizes_[i] = std::fabs(expected_[i]);
    }
    std::vector<int> codes(kind_.block), seconds(kind_.block), levels(kind_.block * shape_.rows);
    for (int64_t b = 0; b < blocks_; ++b) {
      const int64_t first = b * kind_.block;
      const int64_t count = std::min(kind_.block, shape_.columns - first);
      for (int64_t n = 0; n < shape_.rows; ++n)
        for (int64_t k = 0; k < count; ++k)
          levels[n * kind_.block + k] = weight(n, first + k) - zero_point(n, b);
      for (int64_t m = 0; m < shape_.count; ++m) {
        const float* x = x_.data() + m * shape_.columns + first;
        const float scale = round(x, count, codes.data(), seconds.data());
        const float last_scale = kind_.digits == 2 ? scale / kDigit : scale;
        for (int64_t n = 0; n < shape_.rows; ++n) {
          int64_t dot = 0, size = 0;
          double rounded = 0;
          const float w_scale = scales_[n * blocks_ + b];
          for (int64_t k = 0; k < count; ++k) {
            const int level = levels[n * kind_.block + k];
            const int code = kind_.digits == 2 ? kDigit * codes[k] + seconds[k] : codes[k];
            dot += level * code;
            size += std::abs(level * code);
            const double number = bfloat16(scale * static_cast<float>(codes[k])) +
                                  bfloat16(last_scale * static_cast<float>(seconds[k]));
            rounded += bfloat16(w_scale * static_cast<float>(level)) * number;
          }
          const double unit = static_cast<double>(w_scale) * last_scale;
          in_bfloat16_[m * shape_.rows + n] += rounded;
          expected_[m * shape_.rows + n] += unit * static_cast<double>(dot);
          sizes_[m * shape_.rows + n] += unit * static_cast<double>(size);
        }
      }
    }
  }

  // The codes of a block, of the second digit too if there is one, and the scale of the first.
  float round(const float* x, int64_t count, int* codes, int* seconds) const {
    float most = 0;
    for (int64_t k = 0; k < count; ++k) most = std::fmax(most, std::fabs(x[k]));
    const float inverse = most > 0 ? 127.0f / most : 0.0f;
    const float scale = most / 127.0f;
    for (int64_t k = 0; k < count; ++k) {
      const float code = std::nearbyint(x[k] * inverse);
      const float rest = std::fma(-code, scale, x[k]);
      codes[k] = static_cast<int>(code);
      seconds[k] = 0;
      if (kind_.digits == 2) seconds[k] = static_cast<int>(std::nearbyint(rest * inverse * kDigit));
    }
    return scale;
  }

  Shape shape_;
  Kind kind_;
  int64_t blocks_;
  Exact<uint8_t> data_;
  Exact<float> scales_;
  Exact<uint16_t> halves_;
  Exact<uint8_t> zero_points_;
  Exact<float> bias_, x_;
  Exact<double> expected_, in_bfloat16_, sizes_;  // sizes_: of all terms that are added
};

// `rows` rows of x, from `row` on, as the op calls for them: rows of weights in parts.
void run_rows(const QuantKernel& kernel, const Product& product, const Shape& shape, int64_t row,
              int64_t x_rows, int64_t part, float* y) {
  const QuantMatrix w = product.matrix();
  const int64_t stride = kernel.code_bytes(w), blocks = kernel.padded_blocks(w);
  const int64_t digits = product.digits(), count = x_rows * digits;
  const int64_t rows = (count + kernel.rows - 1) / kernel.rows * kernel.rows;
  const Exact<int8_t> codes(rows * stride);
  const Exact<float> scales(rows * blocks);
  const Exact<int32_t> sums(rows * blocks);
  const Exact<int32_t> starts(rows * blocks);
  const Activations a = {count,  digits,        stride,      codes.data(),
                         blocks, scales.data(), sums.data(), starts.data()};
  y += row * shape.rows;
  for (int64_t i = 0; i < x_rows * shape.rows; ++i) y[i] = NAN;
  for (int64_t m = x_rows - 1; m >= 0; --m)
    for (int64_t digit = 0; digit < digits; ++digit)
      kernel.round(w, product.x() + (row + m) * shape.columns, a, m * digits + digit);
  for (int64_t first = 0; first < shape.rows; first += part)
    kernel.multiply(w, a, first, std::min(first + part, shape.rows), y);
}

void run(const QuantKernel& kernel, const Product& product, const Shape& shape, int64_t part,
         float* y) {
  run_rows(kernel, product, shape, 0, shape.count, part, y);
}

// One row after another, as `few` takes them.
void run_each(const QuantKernel& kernel, const Product& product, const Shape& shape, int64_t part,
              float* y) {
  for (int64_t m = 0; m < shape.count; ++m) run_rows(kernel, product, shape, m, 1, part, y);
}

int64_t check(const Set& set, const Product& product, const Shape& shape, const Kind& kind) {
  int64_t failed = 0;
  const auto tell = [&](const char* kernel, int64_t wrong, const char* what) {
    if (!wrong) return;
    ++failed;
    std::printf("%s %s M=%d N=%d K=%d bits=%d block=%d zero_points=%d whole=%d half=%d digits=%d: "
                "%d of %d %s\n",
                set.name, kernel, int(shape.count), int(shape.rows), int(shape.columns), kind.bits,
                int(kind.block), kind.zero_points, kind.whole, kind.half, kind.digits, int(wrong),
                int(shape.count * shape.rows), what);
  };
  const Exact<float> y(shape.count * shape.rows), other(shape.count * shape.rows);
  const int64_t panels = shape.count % 2 ? set.kernels.most_panels : 1;
  run(set.kernels.many(product.matrix()), product, shape, set.kernels.panel * panels, y.data());
  const bool in_bfloat16 = kind.block < 64 && !std::strcmp(set.name, "amx");
  tell("many", product.wrong(y.data(), in_bfloat16), "wrong");
  if (shape.count > set.kernels.most_several) return failed;

  const int64_t part = shape.rows / 3 + 1;
  run_each(set.kernels.few[0], product, shape, part, y.data());
  tell("few", product.wrong(y.data(), false), "wrong");
  const auto differing = [&] {
    int64_t count = 0;
    for (size_t i = 0; i < y.size(); ++i) count += std::memcmp(&y[i], &other[i], sizeof y[i]) != 0;
    return count;
  };
  for (int reading = 1; reading < kReadings; ++reading) {
    run_each(set.kernels.few[reading], product, shape, part, other.data());
    tell("few", differing(), "not the same in every reading");
  }
  run(set.kernels.several, product, shape, part, other.data());
  tell("several", differing(), "not what each row gives alone");
  return failed;
}

// One number of the middle row becomes `bad`: all of its y are NaN, and no other's.
bool poisons_its_row(decltype(run) run, const QuantKernel& kernel, const Product& product,
                     const Shape& shape, int64_t part, float bad, float* y) {
  const int64_t row = shape.count / 2, column = shape.columns * 2 / 3;
  float& x = product.x()[row * shape.columns + column];
  const float before = x;
  x = bad;
  run(kernel, product, shape, part, y);
  x = before;
  for (int64_t i = 0; i < shape.count * shape.rows; ++i)
    if (std::isnan(y[i]) != (i / shape.rows == row)) return false;
  return true;
}

int64_t check_not_finite(const Set& set, const Product& product, const Shape& shape) {
  const Exact<float> y(shape.count * shape.rows);
  const int64_t part = set.kernels.panel * set.kernels.most_panels;
  const QuantKernel many = set.kernels.many(product.matrix());
  int64_t failed = 0;
  for (const float bad : {NAN, -NAN, INFINITY, -INFINITY}) {
    bool good = poisons_its_row(run, many, product, shape, part, bad, y.data());
    if (shape.count <= set.kernels.most_several) {
      const int64_t all = shape.rows;
      good &= poisons_its_row(run_each, set.kernels.few[0], product, shape, all, bad, y.data());
      good &= poisons_its_row(run, set.kernels.several, product, shape, all, bad, y.data());
    }
    if (!good) {
      ++failed;
      std::printf("%s M=%d N=%d K=%d: an activation of %f is lost, or spreads\n", set.name,
                  int(shape.count), int(shape.rows), int(shape.columns), bad);
    }
  }
  return failed;
}

const Shape kShapes[] = {{1, 1, 1},    {2, 1, 33},   {3, 15, 128},  {4, 16, 100}, {5, 33, 257},
                         {17, 32, 64}, {31, 100, 640}, {33, 7, 1300}, {127, 5, 96},
                         {19, 300, 700}, {6, 9, 203}, {7, 41, 1290}, {8, 22, 530},
                         {16, 33, 203}, {13, 18, 530}, {5, 3, 1100}};
const Shape kLongShapes[] = {{512, 33, 48}, {513, 16, 272}, {4, 9, 17000},
                             {12, 37, 9000}, {16, 17, 4500}};

}  // namespace

// With an argument N, only every Nth product, where each takes long.
int main(int count, char** arguments) {
  const int64_t every = count > 1 ? std::atoll(arguments[1]) : 1;
  instruction_set();  // Linux grants AMX's tiles to those who ask.
#define ROW(set) {#set, quant_kernels_##set()},
  const Set sets[] = {EACH_SET(ROW)};
#undef ROW
  int64_t failed = 0, products = 0, seen = 0;
  const auto check_all = [&](const Shape& shape, const Kind& kind) {
    if (seen++ % every) return;
    const Product product(shape, kind);
    for (const Set& set : sets)
      failed += check(set, product, shape, kind) + check_not_finite(set, product, shape);
    ++products;
  };
  std::vector<Kind> kinds;
  for (const int bits : {4, 8})
    for (const int64_t block : {16, 32, 64, 128, 256})
      for (const bool zero_points : {false, true})
        for (const bool whole : {false, true})
          for (int digits = 1; digits <= bits / 4; ++digits)
            kinds.push_back({bits, block, zero_points, whole, kinds.size() % 3 == 0, digits});
  for (const Kind& kind : kinds)
    for (const Shape& shape : kShapes) check_all(shape, kind);
  for (size_t i = 0; i < kinds.size(); i += 5)
    for (const Shape& shape : kLongShapes) check_all(shape, kinds[i]);
  for (int64_t rows = 1; rows <= 70; ++rows)
    check_all({rows, 33, 200}, kinds[rows % kinds.size()]);
  std::printf("%d products, %d wrong\n", int(products), int(failed));
  return failed != 0;
}
