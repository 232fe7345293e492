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

}  // namespace

const char* GeluMul::run(Context& context) const {
  const Tensor gate = context.input(0), up = context.input(1);
  if (gate.size() != up.size()) return "GeluMul: gate and up must have one shape";
  float* y = context.output(0, gate.dims, gate.rank);
  if (!y) return nullptr;
  each_part(context, gate.size(), [&](int64_t first, int64_t count) {
    floats().gelu_mul(gate.as<float>() + first, up.as<float>() + first, y + first, count);
  });
  return nullptr;
}

SoftCap::SoftCap(const Attributes& attributes) : cap_(attributes.real("cap", 1)) {}

const char* SoftCap::run(Context& context) const {
  const Tensor x = context.input(0);
  float* y = context.output(0, x.dims, x.rank);
  if (!y) return nullptr;
  each_part(context, x.size(), [&](int64_t first, int64_t count) {
    floats().soft_cap(x.as<float>() + first, cap_, y + first, count);
  });
  return nullptr;
}

RmsNorm::RmsNorm(const Attributes& attributes) : eps_(attributes.real("eps", 1e-6f)) {}

const char* RmsNorm::run(Context& context) const {
  const Tensor x = context.input(0), weight = context.input(1);
  const int64_t width = weight.size();
  if (weight.rank != 1 || x.rank < 1 || x.dims[x.rank - 1] != width)
    return "RmsNorm: weight must be as wide as x";
  float* y = context.output(0, x.dims, x.rank);
  if (!y) return nullptr;
  if (x.size() == 0) return nullptr;
  const int64_t rows = x.size() / width, together = kNumbers / width > 1 ? kNumbers / width : 1;
  context.parallel_for((rows + together - 1) / together, [&](size_t index) {
    const int64_t last = (index + 1) * together < static_cast<size_t>(rows)
                             ? (index + 1) * together : rows;
    for (int64_t row = index * together; row < last; ++row)
      floats().rms_norm(x.as<float>() + row * width, weight.as<float>(), eps_, y + row * width,
                        width);
  });
  return nullptr;
}

}  // namespace rgexport
