// One run of an op, as its oracle sees it: what went in, and what came out.
#pragma once

#include <cmath>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "stand_in.h"

namespace fuzz {

using stand_in::Dims;
using stand_in::ElementType;

// A copy of a tensor. What is float16 has its numbers in `floats`, too.
struct Array {
  bool given = false;
  ElementType type = stand_in::kFloat;
  Dims dims;
  std::vector<float> floats;
  std::vector<uint8_t> bytes;
  std::vector<int64_t> positions;

  bool is(ElementType wanted, const Dims& shape) const {
    return given && type == wanted && dims == shape;
  }
  int64_t size() const {
    int64_t count = given;
    for (int64_t d : dims) count *= d;
    return count;
  }
};

struct Question {
  std::string op;
  std::map<std::string, int64_t> integers;
  std::map<std::string, float> reals;
  std::vector<Array> inputs;
  bool in_bfloat16;  // whether many rows and small blocks have factors in bfloat16

  int64_t integer(const char* name, int64_t otherwise) const {
    const auto found = integers.find(name);
    return found == integers.end() ? otherwise : found->second;
  }
  float real(const char* name, float otherwise) const {
    const auto found = reals.find(name);
    return found == reals.end() ? otherwise : found->second;
  }
  // Input `index`; one that is not given behind the last.
  const Array& input(size_t index) const {
    static const Array none;
    return index < inputs.size() ? inputs[index] : none;
  }
};

// Whether the op's definition allows this. Then it has to run; otherwise, to refuse.
bool is_sound(const Question& question);

// What is wrong with the outputs of a sound question; empty if nothing is.
std::string judge(const Question& question, const std::vector<Array>& outputs);

// ---- For the oracles ------------------------------------------------------------------------

constexpr double kLarge = 1e37;  // a float that is larger may be infinite in another order of sums

// Whether a kernel's number is the expected one, give or take `room`. What may have overflowed on
// the way is `loose`: then it may be infinite, or none.
inline bool is_near(float found, double expected, double room, bool loose = false) {
  if (!std::isfinite(found) && loose) return true;
  if (std::isnan(expected)) return std::isnan(found);
  if (std::isinf(expected)) return found == expected;
  if (std::fabs(expected) + room > kLarge && !std::isfinite(found)) return true;
  return std::isfinite(found) && std::fabs(found - expected) <= room;
}

// The same bits, whatever they mean.
inline bool is_same(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && (a.empty() || !std::memcmp(a.data(), b.data(), a.size() * 4));
}

std::string wrong_at(const char* what, int64_t index, float found, double expected, double room);

}  // namespace fuzz
