// What no op may run: each is refused by an error that names the op and the value.
#pragma once

#include <cstdint>
#include <functional>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "stand_in.h"

namespace {

using stand_in::Buffer;
using stand_in::Dims;
using stand_in::ElementType;
using stand_in::Memory;
using stand_in::Node;
using stand_in::Tensor;

struct Refusal {
  std::string op, word;  // the word is somewhere in the error
  Node node;
};

constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
constexpr int64_t kLeast = std::numeric_limits<int64_t>::min();
constexpr auto kDouble = static_cast<ElementType>(11);

// A tensor of ones, or positions 1, 1 …. One that no memory has is lied about: it has one element.
std::unique_ptr<Tensor> ones(ElementType type, Dims dims) {
  auto tensor = std::make_unique<Tensor>();
  const int64_t count = stand_in::elements(dims) < 0 ? 1 : stand_in::elements(dims);
  tensor->type = type;
  tensor->dims = std::move(dims);
  tensor->buffer = std::make_shared<Buffer>(Memory::kHeap, count * stand_in::size_of(type));
  for (int64_t i = 0; i < count; ++i) {
    if (type == stand_in::kFloat) tensor->as<float>()[i] = 1;
    if (type == stand_in::kUint8) tensor->as<uint8_t>()[i] = 1;
    if (type == stand_in::kInt64) tensor->as<int64_t>()[i] = 1;
    if (type == kDouble) tensor->as<double>()[i] = 1;
  }
  return tensor;
}

Node node_of(std::map<std::string, int64_t> integers, std::vector<Dims> floats) {
  Node node;
  node.integers = std::move(integers);
  for (Dims& dims : floats) node.inputs.push_back(ones(stand_in::kFloat, std::move(dims)));
  return node;
}

Node attention_node() {
  Node node = node_of({{"heads", 2}}, {{1, 1, 8}, {1, 1, 4}, {1, 1, 4}, {1, 1, 5, 4}, {1, 1, 5, 4}});
  node.inputs.push_back(ones(stand_in::kInt64, {1, 1}));
  return node;
}

Node linear_node() {
  Node node = node_of({{"K", 40}, {"N", 3}, {"bits", 4}, {"block_size", 32}}, {{1, 2, 40}});
  node.inputs.push_back(ones(stand_in::kUint8, {3, 2, 16}));
  node.inputs.push_back(ones(stand_in::kFloat, {3, 2}));
  node.inputs.push_back(ones(stand_in::kUint8, {3, 1}));
  node.inputs.push_back(ones(stand_in::kFloat, {3}));
  return node;
}

Node scan_node() {
  Node node = node_of({}, {{1, 2, 6}, {2, 3, 3}, {2, 3}, {2, 3, 3}, {2, 3}, {6}});
  node.inputs.push_back(ones(stand_in::kInt64, {1, 2}));
  node.inputs.push_back(ones(stand_in::kFloat, {1, 6}));
  return node;
}

Node convolution_node() { return node_of({}, {{1, 2, 6}, {6, 1, 4}, {6}, {1, 3, 6}}); }

using Change = std::function<void(Node&)>;

Change attribute_is(const char* name, int64_t value) {
  return [=](Node& node) { node.integers[name] = value; };
}
Change input_is(size_t index, Dims dims, ElementType type = stand_in::kFloat) {
  return [=](Node& node) { node.inputs[index] = ones(type, dims); };
}
Change missing(size_t index) {
  return [=](Node& node) { node.inputs[index] = nullptr; };
}
Change first_position(int64_t value) {
  return [=](Node& node) { node.inputs[5]->as<int64_t>()[0] = value; };
}

// Two tokens at any two positions.
Change positions_are(int64_t first, int64_t second) {
  return [=](Node& node) {
    for (size_t i : {0, 1, 2}) node.inputs[i] = ones(stand_in::kFloat, {1, 2, i ? 4 : 8});
    node.inputs[5] = ones(stand_in::kInt64, {1, 2});
    node.inputs[5]->as<int64_t>()[0] = first;
    node.inputs[5]->as<int64_t>()[1] = second;
  };
}

struct Row {
  const char* word;
  Change change;
};

const int64_t kHuge = (int64_t{1} << 62) + 1;  // times 4 it is 4

const Row kAttention[] = {
    {"4611686018427387905", attribute_is("heads", kHuge)},
    {"heads 0", attribute_is("heads", 0)},
    {"heads -2", attribute_is("heads", -2)},
    {"heads 1", attribute_is("heads", 1)},
    {"9223372036854775807", positions_are(kMost, kLeast)},
    {"-9223372036854775808", positions_are(kLeast, kMost)},
    {"-1", first_position(-1)},
    {"9223372036854775807", first_position(kMost)},
    {"4611686018427387905", first_position(kHuge)},
    {"-9223372036854775808", first_position(kLeast)},
    {"comes after 7", positions_are(7, 9)},
    {"[1, 0, 4]", input_is(3, {1, 0, 4})},
    {"[1, 1, 0]", input_is(1, {1, 1, 0})},
    {"[1, 4]", input_is(2, {1, 4})},
    {"[2, 1, 5, 4]", input_is(4, {2, 1, 5, 4})},
    {"[1, 5, 4]", input_is(4, {1, 5, 4})},
    {"[1, 2, 5, 4]", input_is(3, {1, 2, 5, 4})},
    {"[4]", input_is(3, {4})},
    {"negative", input_is(0, {-1, -1, 8})},
    {"larger than any memory", input_is(0, {kMost, kMost, 8})},
    {"larger than any memory", input_is(0, {0, kMost, kMost})},
    {"more than four", input_is(0, {1, 1, 1, 1, 8})},
    {"type", input_is(5, {1, 1}, stand_in::kFloat)},
    {"type", input_is(0, {1, 1, 8}, kDouble)},
    {"input 4 is missing", missing(4)},
};

const Row kLinear[] = {
    {"9223372036854775807", attribute_is("K", kMost)},
    {"-9223372036854775808", attribute_is("K", kLeast)},
    {"K is 0", attribute_is("K", 0)},
    {"9223372036854775807", attribute_is("N", kMost)},
    {"4611686018427387905", attribute_is("N", kHuge)},
    {"N is -3", attribute_is("N", -3)},
    {"4294967300", attribute_is("bits", (int64_t{1} << 32) + 4)},
    {"but 2", attribute_is("bits", 2)},
    {"4294967328", attribute_is("block_size", (int64_t{1} << 32) + 32)},
    {"-9223372036854775808", attribute_is("block_size", kLeast)},
    {"but 0", attribute_is("block_size", 0)},
    {"digits is neither 1, nor 2 with 8 bits, but 2", attribute_is("digits", 2)},
    {"but 0", attribute_is("digits", 0)},
    {"4294967297", attribute_is("digits", (int64_t{1} << 32) + 1)},
    {"[40, 2]", input_is(0, {40, 2})},
    {"[3, 32]", input_is(1, {3, 32}, stand_in::kUint8)},
    {"type", input_is(1, {3, 2, 16}, static_cast<ElementType>(3))},
    {"[2, 3]", input_is(2, {2, 3})},
    {"type", input_is(2, {3, 2}, kDouble)},
    {"type", input_is(2, {3, 2}, stand_in::kUint8)},
    {"type", input_is(0, {1, 2, 40}, stand_in::kFloat16)},
    {"[3, 2]", input_is(3, {3, 2}, stand_in::kUint8)},
    {"[3, 1]", input_is(4, {3, 1})},
    {"input 0 is missing", missing(0)},
    {"input 1 is missing", missing(1)},
    {"input 2 is missing", missing(2)},
    {"negative", input_is(0, {-2, -1, 40})},
};

const Row kScan[] = {
    {"[1, 6]", input_is(0, {1, 6})},
    {"[2, 3, 3]", input_is(1, {3, 2, 2})},
    {"[2, 3, 3, 1]", input_is(3, {2, 3, 3, 1})},
    {"type", input_is(3, {2, 3, 3}, stand_in::kFloat16)},
    {"[6]", input_is(2, {6})},
    {"[5]", input_is(5, {5})},
    {"[2]", input_is(6, {2}, stand_in::kInt64)},
    {"type", input_is(6, {1, 2}, stand_in::kFloat)},
    {"[6, 1]", input_is(7, {6, 1})},
    {"missing", missing(5)},
    {"larger than any memory", input_is(1, {kMost, 1, 1})},
};

const Row kConvolution[] = {
    {"[1, 2, 2, 3]", input_is(0, {1, 2, 2, 3})},
    {"[6, 1, 0]", input_is(1, {6, 1, 0})},
    {"[6, 1, 2049]", input_is(1, {6, 1, 2049})},
    {"[6, 4, 1]", input_is(1, {6, 4, 1})},
    {"[1, 6]", input_is(2, {1, 6})},
    {"[3, 1, 6]", input_is(3, {3, 1, 6})},
    {"missing", missing(1)},
};

template <class Rows>
void add(std::vector<Refusal>& all, const char* op, Node (*make)(), const Rows& rows) {
  for (const Row& row : rows) {
    Refusal one{op, row.word, make()};
    row.change(one.node);
    all.push_back(std::move(one));
  }
}

void add_refusals(std::vector<Refusal>& all) {
  add(all, "LocalAttention", attention_node, kAttention);
  add(all, "QuantLinear", linear_node, kLinear);
  add(all, "RgLruScan", scan_node, kScan);
  add(all, "CausalConv1d", convolution_node, kConvolution);
  const Dims x = {2, 3}, turned = {3, 2}, wide = {3}, narrow = {2};
  all.push_back({"GeluMul", "[3, 2]", node_of({}, {x, turned})});
  all.push_back({"AddRmsNorm", "[3, 2]", node_of({}, {x, turned, wide})});
  all.push_back({"AddRmsNorm", "[2]", node_of({}, {x, x, narrow})});
  all.push_back({"RmsNorm", "[2]", node_of({}, {x, narrow})});
  all.push_back({"RmsNorm", "[]", node_of({}, {{}, wide})});
  all.push_back({"SoftCap", "missing", node_of({}, {})});
  all.push_back({"SoftCap", "negative", node_of({}, {{-1}})});
}

}  // namespace
