// Levels from the codebooks of ggml's i-quants, whose entries are several weights at once.
//
// The packed rows keep their scales. Feedback and descent are those of feedback.h and refine.h, with an
// entry and its signs in the place of a level: of all entries, the one with the least loss is taken.
#pragma once

#include "i_quants.h"
#include "panels.h"

namespace rgexport {
namespace {

// The loss of errors x of kSize columns: Σ_i d[i] (x U)_i², U being upper triangular with ones.
template <int kSize>
struct Metric {
  float u[kSize][kSize], d[kSize];

  // Of H = U D U' where U = I + M.
  void take(const float* m, int64_t stride, const float* diagonal) {
    for (int i = 0; i < kSize; ++i) {
      d[i] = diagonal[i];
      for (int k = 0; k < kSize; ++k) u[k][i] = k < i ? m[k * stride + i] : k == i;
    }
  }
  // Of H = U D U', from its last column on. A `d` that is not positive has no best entry.
  void factor(const float* h, int64_t stride) {
    float rest[kSize][kSize];
    for (int i = 0; i < kSize; ++i)
      for (int j = 0; j < kSize; ++j) rest[i][j] = h[i * stride + j];
    for (int i = kSize - 1; i >= 0; --i) {
      d[i] = rest[i][i];
      for (int k = 0; k < kSize; ++k) u[k][i] = k < i && d[i] > 0 ? rest[k][i] / d[i] : k == i;
      for (int k = 0; k < i; ++k)
        for (int j = 0; j < i; ++j) rest[k][j] -= u[k][i] * d[i] * u[j][i];
    }
  }
  void times(const float* x, float* product) const {
    for (int i = 0; i < kSize; ++i) {
      product[i] = x[i];
      for (int k = 0; k < i; ++k) product[i] += x[k] * u[k][i];
    }
  }
  float loss(const float* a, const float* product) const {
    float sum = 0;
    for (int i = 0; i < kSize; ++i) sum += d[i] * (a[i] - product[i]) * (a[i] - product[i]);
    return sum;
  }
};

inline bool is_odd(int bits) { return __builtin_parity(static_cast<unsigned>(bits)); }

enum class Parity { kAny, kEven, kOdd };

// A row of a codebook's [kSize, entries] is what one of its weights has in all entries.
template <int kSize>
struct Codebook {
  const float* values;
  int entries;
  bool has_signs;

  float value(const Code& code, float scale, int i) const {
    const float size = scale * values[i * entries + code.entry];
    return code.signs >> i & 1 ? -size : size;
  }

  // The code with the least loss of x where (x + q) U = a, q being the values of the code.
  Code best(const Metric<kSize>& metric, const float* a, float scale, Parity parity) const {
    Code code = {0, has_signs ? signs(metric, a, scale, parity) : 0};
    constexpr int kWide = 16;
    float target[kSize], factors[kSize][kSize];
    for (int i = 0; i < kSize; ++i) {
      const float root = __builtin_sqrtf(metric.d[i]);
      target[i] = a[i] * root;
      for (int k = 0; k <= i; ++k)
        factors[k][i] = metric.u[k][i] * root * (code.signs >> k & 1 ? -scale : scale);
    }
    float least = __builtin_inff();
    for (int first = 0; first < entries; first += kWide) {
      float losses[kWide] = {};
#pragma GCC unroll 8
      for (int i = 0; i < kSize; ++i) {
        float off[kWide];
        for (int lane = 0; lane < kWide; ++lane) off[lane] = target[i];
#pragma GCC unroll 8
        for (int k = 0; k <= i; ++k)
          for (int lane = 0; lane < kWide; ++lane)
            off[lane] = fma(-factors[k][i], values[k * entries + first + lane], off[lane]);
        for (int lane = 0; lane < kWide; ++lane)
          losses[lane] = fma(off[lane], off[lane], losses[lane]);
      }
      for (int lane = 0; lane < kWide; ++lane)
        if (losses[lane] < least) least = losses[lane], code.entry = first + lane;
    }
    return code;
  }

 private:
  // Those of the values without any loss. For another parity, the one that costs least changes.
  int signs(const Metric<kSize>& metric, const float* a, float scale, Parity parity) const {
    float exact[kSize], least = __builtin_inff();
    int bits = 0, cheapest = 0;
    for (int i = 0; i < kSize; ++i) {
      exact[i] = a[i];
      for (int k = 0; k < i; ++k) exact[i] -= exact[k] * metric.u[k][i];
      bits |= (exact[i] * scale < 0) << i;
      const float cost = metric.d[i] * exact[i] * exact[i];
      if (cost < least) least = cost, cheapest = i;
    }
    const bool is_wrong = parity != Parity::kAny && is_odd(bits) != (parity == Parity::kOdd);
    return is_wrong ? bits ^ 1 << cheapest : bits;
  }
};

// Some rows whose codes are chosen for the columns of one H.
template <int kSize>
class CodeRows {
 public:
  CodeRows(const IQuant& format, const Codebook<kSize>& book, const float* weights,
           int64_t weights_stride, int64_t rows, int64_t columns)
      : format_(format), book_(book), weights_(weights), stride_(weights_stride), rows_(rows),
        columns_(columns), codes_(rows * columns / kSize), scales_(rows * columns / kSize),
        off_(rows * columns), pull_(rows * columns) {}

  void read(const uint8_t* packed, int64_t first) {
    each([&](int64_t r, int64_t group) {
      const int64_t at = first / kSize + group;
      codes_[index(r, group)] = format_.code(row(packed, r), at);
      scales_[index(r, group)] = format_.scale(row(packed, r), at * kSize);
    });
  }
  void write(uint8_t* packed, int64_t first) const {
    each([&](int64_t r, int64_t group) {
      format_.set_code(const_cast<uint8_t*>(row(packed, r)), first / kSize + group,
                       codes_[index(r, group)]);
    });
  }

  // The loss of each row.
  void losses(const float* h, double* loss) {
    find_pull(h);
    for (int64_t r = 0; r < rows_; ++r)
      loss[r] = dot(off_.data() + r * columns_, pull_.data() + r * columns_, columns_);
  }

  // `metrics` are those of the columns of each code, by M and D.
  void feed_back(const float* m, const Metric<kSize>* metrics) {
    pull_.clear();
    const auto decide = [&](int64_t r, int64_t column, const float* sums, float* off) {
      const Metric<kSize>& metric = metrics[column / kSize];
      const int64_t at = index(r, column / kSize);
      const float* w = weights_ + r * stride_ + column;
      float a[kSize];
      metric.times(w, a);
      for (int i = 0; i < kSize; ++i) a[i] += sums[i];
      if (scales_[at] != 0)
        codes_[at] = book_.best(metric, a, scales_[at], parity_after(r, column));
      for (int i = 0; i < kSize; ++i) off[i] = w[i] - book_.value(codes_[at], scales_[at], i);
    };
    in_groups<kSize>(pull_.data(), rows_, columns_, m, decide);
  }

  // One sweep of coordinate descent; `metrics` are by H.
  void descend(const float* h, const Metric<kSize>* metrics) {
    find_pull(h);
    in_groups<kSize>(
        pull_.data(), rows_, columns_, h,
        [&](int64_t r, int64_t column, const float* pull, float* off) {
          const Metric<kSize>& metric = metrics[column / kSize];
          const int64_t at = index(r, column / kSize);
          float before[kSize], after[kSize], a[kSize], off_now[kSize], product[kSize], x[kSize];
          bool is_positive = scales_[at] != 0;
          for (int i = 0; i < kSize; ++i) off[i] = 0, is_positive &= metric.d[i] > 0;
          if (!is_positive) return;
          for (int i = kSize - 1; i >= 0; --i) {
            x[i] = pull[i];
            for (int k = i + 1; k < kSize; ++k) x[i] -= x[k] * metric.u[i][k];
          }
          for (int i = 0; i < kSize; ++i) before[i] = book_.value(codes_[at], scales_[at], i);
          metric.times(before, product);
          for (int i = 0; i < kSize; ++i)
            off_now[i] = x[i] / metric.d[i], a[i] = product[i] + off_now[i];
          const Parity parity = format_.even_signs
                                    ? (is_odd(codes_[at].signs) ? Parity::kOdd : Parity::kEven)
                                    : Parity::kAny;
          const Code code = book_.best(metric, a, scales_[at], parity);
          for (int i = 0; i < kSize; ++i) after[i] = book_.value(code, scales_[at], i);
          const float now = metric.loss(a, product);
          metric.times(after, product);
          if (!(metric.loss(a, product) < now)) return;
          codes_[at] = code;
          for (int i = 0; i < kSize; ++i) off[i] = before[i] - after[i];
        });
  }

  // Takes the codes of `other` for the rows in which those have less loss.
  void take_better(const CodeRows& other, const double* loss, const double* of_other) {
    const int64_t groups = columns_ / kSize;
    for (int64_t r = 0; r < rows_; ++r)
      for (int64_t group = 0; of_other[r] < loss[r] && group < groups; ++group)
        codes_[index(r, group)] = other.codes_[index(r, group)];
  }

 private:
  int64_t index(int64_t r, int64_t group) const { return r * (columns_ / kSize) + group; }
  const uint8_t* row(const uint8_t* packed, int64_t r) const {
    return packed + r * format_.row_bytes(stride_);
  }
  template <class Body>
  void each(const Body& body) const {
    for (int64_t r = 0; r < rows_; ++r)
      for (int64_t group = 0; group < columns_ / kSize; ++group) body(r, group);
  }

  // Signs of eight weights may have to be even in number; an entry of four leaves it to the next one.
  Parity parity_after(int64_t r, int64_t column) const {
    if (!format_.even_signs || column % 8 + kSize < 8) return Parity::kAny;
    const bool before = kSize < 8 && is_odd(codes_[index(r, column / kSize - 1)].signs);
    return before ? Parity::kOdd : Parity::kEven;
  }

  void find_pull(const float* h) {
    each([&](int64_t r, int64_t group) {
      const Code& code = codes_[index(r, group)];
      for (int i = 0; i < kSize; ++i) {
        const int64_t column = group * kSize + i;
        off_[r * columns_ + column] =
            weights_[r * stride_ + column] - book_.value(code, scales_[index(r, group)], i);
      }
    });
    pull_.clear();
    add_products(pull_.data(), columns_, off_.data(), columns_, rows_, h, columns_, columns_,
                 columns_);
  }

  const IQuant& format_;
  const Codebook<kSize>& book_;
  const float* const weights_;
  const int64_t stride_, rows_, columns_;
  Memory<Code> codes_;
  Memory<float> scales_, off_, pull_;
};

template <int kSize>
void choose_codes(const IQuant& format, const float* values, int entries, const CodeTask& task,
                  uint8_t* packed) {
  const Codebook<kSize> book = {values, entries, format.has_signs()};
  const int64_t groups = task.count / kSize;
  const Memory<Metric<kSize>> forward(groups), alone(groups);
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t column = group * kSize, corner = column * (task.count + 1);
    forward[group].take(task.m + corner, task.count, task.d + column);
    alone[group].factor(task.h + corner, task.count);
  }
  for (int64_t from = 0; from < task.rows; from += kRows) {
    const int64_t rows = lesser(task.rows - from, kRows);
    const float* weights = task.weights + from * task.columns + task.first;
    uint8_t* part = packed + from * format.row_bytes(task.columns);
    CodeRows<kSize> stored(format, book, weights, task.columns, rows, task.count);
    CodeRows<kSize> chosen(format, book, weights, task.columns, rows, task.count);
    stored.read(part, task.first);
    chosen.read(part, task.first);
    chosen.feed_back(task.m, forward.data());
    double before[kRows], after[kRows];
    stored.losses(task.h, before);
    chosen.losses(task.h, after);
    chosen.take_better(stored, after, before);
    chosen.descend(task.h, alone.data());
    chosen.write(part, task.first);
  }
}

void codebook(int type, const float* values, int entries, CodeTask task, uint8_t* packed) {
  const IQuant format = {type};
  const int size = format.size();
  (size == 1   ? choose_codes<1>
   : size == 4 ? choose_codes<4>
               : choose_codes<8>)(format, values, entries, task, packed);
}

}  // namespace
}  // namespace rgexport
