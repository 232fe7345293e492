// LocalAttention in double, as the function's body has it: all keys that were ever written, of which
// those that a query does not see have minus infinity added to their scores.
#include <limits>

#include "oracles.h"

namespace fuzz {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Sizes {
  int64_t batch, tokens, heads, dim, window;
};

Sizes sizes_of(const Question& q) {
  const Dims &k = q.input(1).dims, &ring = q.input(3).dims;
  return {k[0], k[1], q.integer("heads", 1), k[2], ring[ring.size() - 2]};
}

// A row of the batch. Key c < window is that of the position c - window before the step's first one.
struct Row {
  const Sizes& s;
  const float *q, *k, *v, *past_key, *past_value;
  int64_t position;

  int64_t first() const { return std::max<int64_t>(0, s.window - position); }
  int64_t keys() const { return s.window + s.tokens; }
  int64_t slot(int64_t c) const { return (position % s.window + c) % s.window; }
  const float* key(int64_t c) const {
    return c < s.window ? past_key + slot(c) * s.dim : k + (c - s.window) * s.dim;
  }
  const float* value(int64_t c) const {
    return c < s.window ? past_value + slot(c) * s.dim : v + (c - s.window) * s.dim;
  }
  bool sees(int64_t token, int64_t c) const { return c >= token && c <= token + s.window; }
};

struct Scores {
  std::vector<double> of;        // [keys]
  double error = 0;              // of a score that is seen
  bool overflow = false;         // a float may have been infinite
  double largest = -kInfinity;   // of those that are seen

  Scores(const Row& row, int64_t token, const float* q) : of(row.keys()) {
    const double factor = 1 / std::sqrt(static_cast<double>(row.s.dim));
    for (int64_t c = row.first(); c < row.keys(); ++c) {
      const float* key = row.key(c);
      double sum = 0, size = 0;
      for (int64_t d = 0; d < row.s.dim; ++d) {
        sum += static_cast<double>(q[d]) * key[d];
        size += std::isfinite(q[d]) && std::isfinite(key[d]) ? std::fabs(1.0 * q[d] * key[d]) : 0;
      }
      of[c] = sum * factor;
      overflow |= size > kLarge;
      if (!row.sees(token, c)) continue;
      error = std::max(error, 2e-6 * size * factor + 1e-30);
      if (!(of[c] <= largest)) largest = of[c];
    }
  }

  // Whether the softmax is NaN: of the keys that are seen, or of all.
  bool spoilt(const Row& row, int64_t token, bool all) const {
    for (int64_t c = row.first(); c < row.keys(); ++c)
      if ((all || row.sees(token, c)) && (std::isnan(of[c]) || of[c] == kInfinity)) return true;
    return largest == -kInfinity;
  }
};

bool is_right(const Row& row, int64_t token, const Scores& scores, int64_t d, bool all, float found,
              double& expected, double& room) {
  if (scores.spoilt(row, token, all)) {
    expected = std::nan(""), room = 0;
    return std::isnan(found);
  }
  double sum = 0, weights = 0, most = 0;
  bool unsure = false, poisoned = false;
  for (int64_t c = row.first(); c < row.keys(); ++c) {
    const float value = row.value(c)[d];
    if (!row.sees(token, c)) {
      poisoned |= all && !std::isfinite(value);
      continue;
    }
    const double weight = std::exp(scores.of[c] - scores.largest);
    // A weight that is 0 in float32 and not in double makes NaN of what is infinite here.
    unsure |= !std::isfinite(value) && weight < 1e-30;
    sum += weight * value, weights += weight;
    if (std::isfinite(value)) most = std::max<double>(most, std::fabs(value));
  }
  expected = poisoned ? std::nan("") : sum / weights;
  room = scores.error > 0.3 ? 2.001 * most : (4 * scores.error + 1e-5) * most;
  room += 1e-44;
  return is_near(found, expected, room, unsure || most > kLarge);
}

bool any_infinite(const Row& row) {
  for (int64_t c = row.first(); c < row.s.window; ++c)
    for (int64_t d = 0; d < row.s.dim; ++d)
      if (std::isinf(row.key(c)[d])) return true;
  return false;
}

std::string judge_row(const Row& row, const float* y) {
  // An infinite key that weighs nothing for all that see it may be left to weigh nothing.
  const bool either = any_infinite(row);
  for (int64_t i = 0; i < row.s.tokens * row.s.heads; ++i) {
    const int64_t token = i / row.s.heads;
    const Scores scores(row, token, row.q + i * row.s.dim);
    if (scores.overflow) continue;
    for (int64_t d = 0; d < row.s.dim; ++d) {
      double expected, room;
      const float found = y[i * row.s.dim + d];
      if (either && is_right(row, token, scores, d, false, found, expected, room)) continue;
      if (!is_right(row, token, scores, d, true, found, expected, room))
        return wrong_at("y", i * row.s.dim + d, found, expected, room);
    }
  }
  return "";
}

// The ring after the step.
std::vector<float> ring_after(const Question& q, const Sizes& s, size_t past, size_t added) {
  std::vector<float> ring = q.input(past).floats;
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t t = std::max<int64_t>(0, s.tokens - s.window); t < s.tokens; ++t) {
      const int64_t slot = q.input(5).positions[b * s.tokens + t] % s.window;
      for (int64_t d = 0; d < s.dim; ++d)
        ring[(b * s.window + slot) * s.dim + d] =
            q.input(added).floats[(b * s.tokens + t) * s.dim + d];
    }
  return ring;
}

}  // namespace

bool is_sound_attention(const Question& q) {
  for (size_t i = 0; i < 5; ++i) {
    const size_t rank = q.input(i).dims.size();
    const bool right = rank == 3 || (i >= 3 && rank == 4);  // rings of earlier files have 3
    if (!q.input(i).given || q.input(i).type != stand_in::kFloat || !right) return false;
  }
  const Sizes s = sizes_of(q);
  const Dims earlier = {s.batch, s.window, s.dim}, ring = {s.batch, 1, s.window, s.dim};
  const Array& positions = q.input(5);
  if (s.dim < 1 || s.window < 1 || s.heads < 1 || s.heads > 1 << 20) return false;
  if (!q.input(0).is(stand_in::kFloat, {s.batch, s.tokens, s.heads * s.dim}) ||
      q.input(2).dims != q.input(1).dims || q.input(4).dims != q.input(3).dims ||
      (q.input(3).dims != earlier && q.input(3).dims != ring) ||
      !positions.is(stand_in::kInt64, {s.batch, s.tokens}))
    return false;
  for (int64_t i = 0; i < s.batch * s.tokens; ++i) {
    const int64_t first = positions.positions[i / s.tokens * s.tokens];
    if (first < 0 || first > int64_t{1} << 62) return false;
    if (positions.positions[i] != first + i % s.tokens) return false;
  }
  return true;
}

std::string judge_attention(const Question& q, const std::vector<Array>& outputs) {
  const Sizes s = sizes_of(q);
  if (outputs[0].dims != q.input(0).dims || outputs[1].dims != q.input(3).dims ||
      outputs[2].dims != q.input(3).dims)
    return "an output has another shape";
  if (!is_same(outputs[1].floats, ring_after(q, s, 3, 1))) return "present_key is another";
  if (!is_same(outputs[2].floats, ring_after(q, s, 4, 2))) return "present_value is another";
  const int64_t step = s.tokens * s.dim, ring = s.window * s.dim;
  for (int64_t b = 0; b < s.batch && s.tokens > 0; ++b) {
    const auto at = [&](size_t i, int64_t offset) { return q.input(i).floats.data() + offset; };
    const Row row = {s,
                     at(0, b * step * s.heads),
                     at(1, b * step),
                     at(2, b * step),
                     at(3, b * ring),
                     at(4, b * ring),
                     q.input(5).positions[b * s.tokens]};
    const std::string wrong = judge_row(row, outputs[0].floats.data() + b * step * s.heads);
    if (!wrong.empty()) return wrong;
  }
  return "";
}

}  // namespace fuzz
