// What sanitized_ops.cpp runs: for each op of the library, shapes that are easily got wrong.
// Nothing is in them that an op refuses; for that, there is refusals.h.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "stand_in.h"

namespace {

using stand_in::Dims;
using stand_in::ElementType;
using stand_in::kBfloat16;
using stand_in::kFloat;
using stand_in::kFloat16;
using stand_in::kInt64;
using stand_in::kUint8;

struct Input {
  ElementType type = {};  // none: missing
  Dims dims;
  int64_t start = 0;  // of positions
  float middle = 0;   // of numbers, which are at most 1 away
};

struct Case {
  std::string op;
  std::map<std::string, int64_t> attributes;
  std::vector<Input> inputs;
  std::map<size_t, size_t> in_place;  // output → input
};

const Input kMissing = {};

std::unique_ptr<stand_in::Tensor> tensor_of(const Input& input, stand_in::Memory memory,
                                            uint32_t seed) {
  if (!stand_in::size_of(input.type)) return nullptr;
  auto tensor = std::make_unique<stand_in::Tensor>();
  tensor->type = input.type;
  tensor->dims = input.dims;
  const size_t count = stand_in::elements(input.dims);
  const size_t bytes = count * stand_in::size_of(input.type);
  tensor->buffer = std::make_shared<stand_in::Buffer>(memory, bytes);
  for (size_t i = 0; i < count; ++i) {
    seed = seed * 1664525 + 1013904223;
    if (input.type == kFloat) tensor->as<float>()[i] = input.middle + int32_t(seed) * 0x1p-31f;
    // Of both signs and below 0.5, also the smallest ones.
    const uint32_t half = input.type == kFloat16 ? 0x3800 : 0x3f00;
    if (stand_in::size_of(input.type) == 2)
      tensor->as<uint16_t>()[i] = (seed >> 16) % half + (seed >> 16 & 0x8000);
    if (stand_in::size_of(input.type) == 1) tensor->as<uint8_t>()[i] = seed >> 24;
    if (input.type == kInt64) tensor->as<int64_t>()[i] = input.start + i % input.dims[1];
  }
  return tensor;
}

// What runs a case: with states in place or not, and all but them and the first input constant or not.
stand_in::Node node_of(const Case& one, stand_in::Memory memory, bool in_place, bool constants) {
  stand_in::Node node;
  node.memory = memory;
  node.integers = one.attributes;
  if (in_place) node.in_place = one.in_place;
  for (const Input& input : one.inputs)
    node.inputs.push_back(tensor_of(input, memory, node.inputs.size() + 1));
  node.constant.assign(node.inputs.size(), constants);
  node.constant[0] = false;
  for (const auto& state : one.in_place) node.constant[state.second] = false;
  return node;
}

Input floats(Dims dims) { return {kFloat, std::move(dims)}; }
Input halves(Dims dims) { return {kFloat16, std::move(dims)}; }
Input bytes(Dims dims) { return {kUint8, std::move(dims)}; }
Input positions(int64_t batch, int64_t tokens, int64_t start) {
  return {kInt64, {batch, tokens}, start};
}

struct Step {
  int64_t batch, tokens;
};
const Step kSteps[] = {{1, 1}, {1, 2}, {1, 3}, {1, 7}, {5, 1}, {5, 3}, {1, 33}, {1, 127}};

void quant_linear(std::vector<Case>& cases) {
  struct Matrix {
    int64_t columns, rows;
  };
  for (int64_t bits : {4, 8})
    for (int64_t block : {16, 32, 64, 128, 256})
      for (Matrix m : {Matrix{1, 1}, {12, 5}, {70, 37}, {256, 64}, {330, 1}, {519, 33}})
        for (Step step : kSteps)
          for (int64_t digits = 1; digits <= bits / 4; ++digits)
            for (bool full : {false, true}) {
              const int64_t blocks = (m.columns + block - 1) / block;
              Case one = {"QuantLinear",
                          {{"K", m.columns}, {"N", m.rows}, {"bits", bits}, {"block_size", block}},
                          {floats({step.batch, step.tokens, m.columns}),
                           bytes({m.rows, blocks, block * bits / 8}),
                           cases.size() % 3 ? floats({m.rows, blocks}) : halves({m.rows, blocks}),
                           full ? bytes({m.rows, (blocks * bits + 7) / 8}) : kMissing,
                           full ? floats({m.rows}) : kMissing},
                          {}};
              if (digits > 1) one.attributes["digits"] = digits;
              cases.push_back(std::move(one));
            }
}

constexpr int64_t kMostTiles[] = {128, 256, 0, 512, 256};  // of 2 to 6 bits

template <int kBits>
void two_level(std::vector<Case>& cases) {
  for (int64_t block : {16, 32, 256})
    for (int64_t columns : {12, 264, 519, 1024})
      for (int64_t rows : {1, 5, 37})
        for (Step step : kSteps) {
          const int64_t blocks = (columns + block - 1) / block, unpacked = kBits <= 4 ? 4 : 8;
          const int64_t width = blocks * block * unpacked / 8;
          const int64_t tile =
              kBits == 4 ? block / 2 : std::min<int64_t>(kMostTiles[kBits - 2], width & -width);
          cases.push_back({"TwoLevelLinear" + std::to_string(kBits),
                           {{"K", columns}, {"N", rows}, {"block_size", block}},
                           {floats({step.batch, step.tokens, columns}),
                            bytes({rows, width / tile, tile * kBits / unpacked}),
                            {static_cast<ElementType>(3), {rows, blocks}},  // int8
                            halves({rows, (blocks + 15) / 16}),
                            cases.size() % 2 ? floats({rows}) : kMissing},
                           {}});
        }
}

template <int kMatrices>
void quant_linear_of(std::vector<Case>& cases) {
  const char* const sizes[] = {"N", "N2", "N3"};
  for (int64_t bits : {4, 8})
    for (int64_t columns : {12, 519})
      for (int64_t rows : {1, 5, 37})
        for (Step step : kSteps)
          for (bool full : {false, true}) {
            constexpr int64_t kBlock = 32;
            const int64_t blocks = (columns + kBlock - 1) / kBlock;
            Case one = {"QuantLinear" + std::to_string(kMatrices),
                        {{"K", columns}, {"bits", bits}, {"block_size", kBlock}},
                        {floats({step.batch, step.tokens, columns})},
                        {}};
            if (bits == 8 && rows == 5) one.attributes["digits"] = 2;
            Dims each;
            for (int i = 0; i < kMatrices; ++i) {
              each.push_back(i % 2 ? 40 - rows : rows);
              one.attributes[sizes[i]] = each.back();
            }
            const auto add = [&](auto make) {
              for (int64_t n : each) one.inputs.push_back(make(n));
            };
            add([&](int64_t n) { return bytes({n, blocks, kBlock * bits / 8}); });
            const bool half = cases.size() % 3 == 0;
            add([&](int64_t n) { return half ? halves({n, blocks}) : floats({n, blocks}); });
            add([&](int64_t n) { return full ? bytes({n, (blocks * bits + 7) / 8}) : kMissing; });
            add([&](int64_t n) { return full ? floats({n}) : kMissing; });
            cases.push_back(one);
          }
}

void convolution(std::vector<Case>& cases) {
  for (Step step : kSteps)
    for (int64_t channels : {1, 7, 64, 250})
      for (int64_t taps : {2, 4, 5})
        cases.push_back({"CausalConv1d",
                         {},
                         {floats({step.batch, step.tokens, channels}), floats({channels, 1, taps}),
                          floats({channels}), floats({step.batch, taps - 1, channels})},
                         {{1, 3}}});
}

void scan(std::vector<Case>& cases) {
  struct Blocks {
    int64_t heads, block;
  };
  for (Step step : kSteps)
    for (Blocks b : {Blocks{1, 1}, {3, 5}, {4, 16}, {10, 25}, {2, 130}}) {
      const int64_t channels = b.heads * b.block;
      const Input weight = floats({b.heads, b.block, b.block}), bias = floats({b.heads, b.block});
      const Input bfloat16 = {kBfloat16, weight.dims};
      const Input decay = {kFloat, {channels}, 0, -2}, state = floats({step.batch, channels});
      for (const Input& second : {weight, bfloat16})
        cases.push_back(
            {"RgLruScan",
             {},
             {floats({step.batch, step.tokens, channels}), b.heads > 2 ? bfloat16 : weight, bias,
              second, bias, decay, positions(step.batch, step.tokens, step.batch == 1), state},
             {{1, 7}}});
    }
}

void attention(std::vector<Case>& cases) {
  struct Heads {
    int64_t heads, dim;
  };
  for (Step step : kSteps)
    for (Heads h : {Heads{1, 8}, {3, 20}, {2, 64}})
      for (int64_t window : {1, 16, 33})
        for (int64_t start : {0, 5, 1000}) {
          const Input new_ones = floats({step.batch, step.tokens, h.dim});
          const Input ring = start == 5 ? floats({step.batch, window, h.dim})
                                        : floats({step.batch, 1, window, h.dim});
          cases.push_back({"LocalAttention",
                           {{"heads", h.heads}},
                           {floats({step.batch, step.tokens, h.heads * h.dim}), new_ones, new_ones,
                            ring, ring, positions(step.batch, step.tokens, start)},
                           {{1, 3}, {2, 4}}});
        }
}

const Dims kShapes[] = {{1}, {7}, {3, 64}, {5, 3, 250}, {1, 127, 320}, {2, 2, 5, 33}};

void gelu_mul(std::vector<Case>& cases) {
  for (const Dims& dims : kShapes)
    cases.push_back({"GeluMul", {}, {floats(dims), floats(dims)}, {}});
}

void rms_norm(std::vector<Case>& cases) {
  for (const Dims& dims : kShapes)
    cases.push_back({"RmsNorm", {}, {floats(dims), floats({dims.back()})}, {}});
}

void add_rms_norm(std::vector<Case>& cases) {
  for (const Dims& dims : kShapes)
    cases.push_back({"AddRmsNorm", {}, {floats(dims), floats(dims), floats({dims.back()})}, {}});
}

void soft_cap(std::vector<Case>& cases) {
  for (const Dims& dims : kShapes) cases.push_back({"SoftCap", {}, {floats(dims)}, {}});
}

const std::map<std::string, void (*)(std::vector<Case>&)> kCases = {
    {"QuantLinear", quant_linear},
    {"QuantLinear2", quant_linear_of<2>},
    {"QuantLinear3", quant_linear_of<3>},
    {"TwoLevelLinear2", two_level<2>},
    {"TwoLevelLinear3", two_level<3>},
    {"TwoLevelLinear4", two_level<4>},
    {"TwoLevelLinear5", two_level<5>},
    {"TwoLevelLinear6", two_level<6>},
    {"RgLruScan", scan},
    {"CausalConv1d", convolution},
    {"LocalAttention", attention},
    {"GeluMul", gelu_mul},
    {"RmsNorm", rms_norm},
    {"AddRmsNorm", add_rms_norm},
    {"SoftCap", soft_cap},
};

}  // namespace
