// Runs an op, and holds what it does against its oracle.
#pragma once

#include <memory>

#include "question.h"

namespace fuzz {

// What the bits of a float16 mean.
inline float half_value(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  float size = std::ldexp(static_cast<float>(exponent ? 1024 + fraction : fraction),
                          (exponent ? exponent : 1) - 25);
  if (exponent == 31) size = fraction ? NAN : INFINITY;
  return bits >> 15 ? -size : size;
}

// Likewise of a bfloat16: the first half of a float.
inline float bfloat16_value(uint16_t bits) {
  const uint32_t all = uint32_t{bits} << 16;
  float value;
  std::memcpy(&value, &all, sizeof value);
  return value;
}

inline Array copy_of(const stand_in::Tensor* tensor) {
  Array copy;
  if (!tensor) return copy;
  copy.given = true;
  copy.type = tensor->type;
  copy.dims = tensor->dims;
  const auto add = [&](auto& to) {
    const auto* from = tensor->as<typename std::decay_t<decltype(to)>::value_type>();
    to.assign(from, from + tensor->buffer->bytes() / sizeof *from);
  };
  if (tensor->type == stand_in::kFloat) add(copy.floats);
  const bool half = tensor->type == stand_in::kFloat16;
  if (half || tensor->type == stand_in::kBfloat16)
    for (size_t i = 0; i < tensor->buffer->bytes() / sizeof(uint16_t); ++i) {
      const uint16_t bits = tensor->as<uint16_t>()[i];
      copy.floats.push_back(half ? half_value(bits) : bfloat16_value(bits));
    }
  if (stand_in::size_of(tensor->type) == 1) add(copy.bytes);
  if (tensor->type == stand_in::kInt64) add(copy.positions);
  return copy;
}

inline std::vector<Array> copies_of(
    const std::vector<std::unique_ptr<stand_in::Tensor>>& tensors) {
  std::vector<Array> all;
  for (const auto& tensor : tensors) all.push_back(copy_of(tensor.get()));
  return all;
}

// What is asked, before states in place are written.
inline Question question_of(const stand_in::CustomOp* op, const stand_in::Node& node,
                            bool in_bfloat16) {
  return {op->GetName(op), node.integers, node.reals, copies_of(node.inputs), in_bfloat16};
}

struct Answer {
  bool refused;
  std::string finding;  // empty: it is right
};

inline Answer examine(const stand_in::CustomOp* op, stand_in::Node& node,
                      const Question& question) {
  const bool sound = is_sound(question);
  const std::string refusal = stand_in::run(op, node);
  if (refusal.empty()) {
    if (!sound) return {false, "runs what it has to refuse"};
    return {false, judge(question, copies_of(node.outputs))};
  }
  if (sound && refusal != "no memory for an output")
    return {true, "refuses what is sound: " + refusal};
  if (!sound && refusal.rfind(question.op + ": ", 0) != 0)
    return {true, "a refusal without the op's name: " + refusal};
  return {true, ""};
}

}  // namespace fuzz
