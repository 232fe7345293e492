// Ops on each number, or each row, apart.
#include "floats.h"
#include "ops.h"

namespace rgexport {
namespace {

constexpr int64_t kNumbers = 16384;  // of a task: less work than that is not worth a second thread

// Runs body(first, count) over parts of `count` numbers.
template <class Body>
void each_part(Context& context, int64_t count, const Body& body) {
  const int64_t parts = (count + kNumbers - 1) / kNumbers;
  context.parallel_for(parts, [&](size_t index) {
    const int64_t first = index * kNumbers;
    body(first, count - first < kNumbers ? count - first : kNumbers);
  });
}

// Whether a norm's weight fits; refuses it otherwise.
bool fits(Context& context, const Tensor& x, const Tensor& weight) {
  if (x.rank >= 1 && weight.is({x.dims[x.rank - 1]})) return true;
  context.refuse("weight must be as wide as x, %s, not %s", ShapeText(x).text(),
                 ShapeText(weight).text());
  return false;
}

// Whether two inputs that are added or multiplied have one shape; refuses them otherwise.
bool are_alike(Context& context, const char* what, const Tensor& x, const Tensor& y) {
  if (x.has_shape_of(y)) return true;
  context.refuse("%s must have one shape, not %s and %s", what, ShapeText(x).text(),
                 ShapeText(y).text());
  return false;
}

// All rows of `count` numbers, of which `first` is the first one.
void norm_rows(Context& context, int64_t count, const RmsNormRow& first) {
  if (count == 0) return;
  const int64_t width = first.count, rows = count / width;
  const int64_t task = kNumbers / width > 1 ? kNumbers / width : 1;
  context.parallel_for((rows + task - 1) / task, [&](size_t index) {
    const int64_t begin = index * task, end = begin + task < rows ? begin + task : rows;
    for (int64_t row = begin; row < end; ++row) {
      RmsNormRow p = first;
      p.x += row * width;
      p.y += row * width;
      if (p.residual) p.residual += row * width, p.sum += row * width;
      floats().rms_norm(p);
    }
  });
}

}  // namespace

void GeluMul::run(Context& context) const {
  const Tensor gate = context.input(0), up = context.input(1);
  if (context.refused() || !are_alike(context, "gate and up", gate, up)) return;
  float* y = context.output(0, gate.dims, gate.rank);
  if (!y) return;
  each_part(context, gate.size(), [&](int64_t first, int64_t count) {
    floats().gelu_mul(gate.as<float>() + first, up.as<float>() + first, y + first, count);
  });
}

SoftCap::SoftCap(const Attributes& attributes) : cap_(attributes.real("cap", 1)) {}

void SoftCap::run(Context& context) const {
  const Tensor x = context.input(0);
  if (context.refused()) return;
  float* y = context.output(0, x.dims, x.rank);
  if (!y) return;
  each_part(context, x.size(), [&](int64_t first, int64_t count) {
    floats().soft_cap(x.as<float>() + first, cap_, y + first, count);
  });
}

RmsNorm::RmsNorm(const Attributes& attributes) : eps_(attributes.real("eps", 1e-6f)) {}

void RmsNorm::run(Context& context) const {
  const Tensor x = context.input(0), weight = context.input(1);
  if (context.refused() || !fits(context, x, weight)) return;
  float* y = context.output(0, x.dims, x.rank);
  if (!y) return;
  norm_rows(context, x.size(),
            {weight.size(), x.as<float>(), nullptr, weight.as<float>(), eps_, nullptr, y});
}

AddRmsNorm::AddRmsNorm(const Attributes& attributes) : eps_(attributes.real("eps", 1e-6f)) {}

void AddRmsNorm::run(Context& context) const {
  const Tensor x = context.input(0), residual = context.input(1), weight = context.input(2);
  if (context.refused() || !fits(context, x, weight)) return;
  if (!are_alike(context, "x and residual", x, residual)) return;
  float* sum = context.output(0, x.dims, x.rank);
  float* y = context.output(1, x.dims, x.rank);
  if (!sum || !y) return;
  norm_rows(context, x.size(),
            {weight.size(), x.as<float>(), residual.as<float>(), weight.as<float>(), eps_, sum, y});
}

}  // namespace rgexport
