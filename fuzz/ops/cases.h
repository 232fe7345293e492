// Makes a run of an op out of a fuzzer's bytes: one that fits, then perhaps spoilt somewhere.
#pragma once

#include <algorithm>
#include <limits>
#include <memory>
#include <utility>

#include "bytes.h"
#include "question.h"

namespace fuzz {

using stand_in::Buffer;
using stand_in::kBfloat16;
using stand_in::kFloat;
using stand_in::kFloat16;
using stand_in::kInt64;
using stand_in::kUint8;
using stand_in::Memory;
using stand_in::Node;
using stand_in::Tensor;

constexpr auto kDouble = static_cast<ElementType>(11);
constexpr auto kInt8 = static_cast<ElementType>(3);

const float kSpecial[] = {NAN,     -NAN,   INFINITY, -INFINITY, 0.0f,    -0.0f,  1e-45f,
                          -1e-40f, 1e-38f, 3e-38f,   -1e-30f,   1e20f,   -1e19f, 3e38f,
                          -3e38f,  1.0f,   -1.0f,    100.0f,    -104.0f, 88.8f,  0x1p-118f};
const int64_t kStrange[] = {0,
                            -1,
                            1,
                            2,
                            3,
                            4,
                            5,
                            8,
                            16,
                            33,
                            (int64_t{1} << 31) - 1,
                            int64_t{1} << 32,
                            (int64_t{1} << 32) + 4,
                            (int64_t{1} << 32) + 32,
                            int64_t{1} << 61,
                            (int64_t{1} << 62) - 1,
                            int64_t{1} << 62,
                            (int64_t{1} << 62) + 1,
                            std::numeric_limits<int64_t>::max(),
                            std::numeric_limits<int64_t>::max() - 1,
                            std::numeric_limits<int64_t>::min(),
                            std::numeric_limits<int64_t>::min() + 1};

class Maker {
 public:
  explicit Maker(Bytes& bytes) : bytes_(bytes) {
    memory_ = bytes.one_in(16) ? Memory::kPageEnd : Memory::kHeap;
    constants_ = bytes.one_in(2);
  }

  // A node of op `name` that fits: every size is small, and the work is.
  void make(const std::string& name, Node& node) {
    node.memory = memory_;
    if (name.rfind("QuantLinear", 0) == 0)
      linear(node, name == "QuantLinear" ? 1 : name.back() - '0');
    if (name.rfind("TwoLevelLinear", 0) == 0) two_level(node, name.back() - '0');
    if (name == "RgLruScan") scan(node);
    if (name == "LocalAttention") attention(node);
    if (name == "CausalConv1d") convolution(node);
    if (name == "GeluMul" || name == "SoftCap" || name.find("RmsNorm") != std::string::npos)
      pointwise(name, node);
    if (!bytes_.one_in(2)) node.in_place.clear();
    node.constant.assign(node.inputs.size(), constants_);
    node.constant[0] = false;
    for (const auto& state : node.in_place) node.constant[state.second] = false;
    if (bytes_.one_in(3))
      for (int64_t left = 1 + bytes_.below(2); left > 0; --left) spoil(node);
  }

 private:
  // ---- Ops that fit ---------------------------------------------------------------------------

  struct Step {
    int64_t batch, tokens;
  };
  Step step(int64_t most) {
    const int64_t tokens = bytes_.one_in(8) ? 1 + bytes_.below(most) : some(6);
    return {some(2), tokens};
  }
  // Rarely none.
  int64_t some(int64_t most) { return bytes_.one_in(16) ? 0 : 1 + bytes_.below(most); }

  void linear(Node& node, int matrices) {
    constexpr const char* kRows[] = {"N", "N2", "N3"};
    const int64_t bits = bytes_.one_in(2) ? 8 : 4, block = int64_t{16} << bytes_.below(5);
    const int64_t columns = 1 + bytes_.below(400), blocks = (columns + block - 1) / block;
    Dims dims;
    for (int64_t left = bytes_.below(4); left > 0; --left)
      dims.push_back(some(dims.empty() ? 6 : 2));
    if (bytes_.one_in(16)) dims = {1 + bytes_.below(40)};
    int64_t count = 1;
    for (int64_t d : dims) count *= d;
    dims.push_back(columns);
    add_floats(node, dims);
    node.integers = {{"K", columns}, {"bits", bits}, {"block_size", block}};
    if (bits == 8 && bytes_.one_in(2)) node.integers["digits"] = 2;
    Dims rows;
    for (int i = 0; i < matrices; ++i) {
      const int64_t most = kWork / std::max<int64_t>(1, count * columns * matrices);
      rows.push_back(1 + bytes_.below(std::max<int64_t>(1, std::min<int64_t>(most, 100))));
      node.integers[kRows[i]] = rows.back();
    }
    for (int64_t n : rows) add_bytes(node, {n, blocks, block * bits / 8});
    const bool flat = bytes_.one_in(8);
    for (int64_t n : rows) {
      const Dims dims = flat ? Dims{n * blocks} : Dims{n, blocks};
      bytes_.one_in(2) ? add_halves(node, kFloat16, dims) : add_floats(node, dims);
    }
    for (int64_t n : rows)
      if (bytes_.one_in(2)) {
        const int64_t packed = (blocks * bits + 7) / 8;
        add_bytes(node, flat ? Dims{n * packed} : Dims{n, packed});
      } else {
        node.inputs.push_back(nullptr);
      }
    for (int64_t n : rows)
      if (bytes_.one_in(2))
        add_floats(node, {n});
      else
        node.inputs.push_back(nullptr);
    while (bytes_.one_in(2) && !node.inputs.back()) node.inputs.pop_back();
  }

  void two_level(Node& node, int64_t bits) {
    const int64_t block = int64_t{16} << bytes_.below(5);
    const int64_t columns = bytes_.one_in(2) ? 512 << bytes_.below(2) : 1 + bytes_.below(400);
    const int64_t blocks = (columns + block - 1) / block, rows = 1 + bytes_.below(60);
    const int64_t unpacked = bits <= 4 ? 4 : 8, width = blocks * block * unpacked / 8;
    const int64_t most[] = {128, 256, 0, 512, 256};
    const int64_t tile = bits == 4 ? block / 2 : std::min(most[bits - 2], width & -width);
    add_floats(node, {1, some(20), columns});
    node.integers = {{"K", columns}, {"N", rows}, {"block_size", block}};
    add_bytes(node, {rows, width / tile, tile * bits / unpacked});
    add_bytes(node, {rows, blocks});
    node.inputs.back()->type = kInt8;
    add_halves(node, kFloat16, {rows, (blocks + 15) / 16});
    if (bytes_.one_in(2)) add_floats(node, {rows});
  }

  void scan(Node& node) {
    const Step s = step(70);
    const int64_t block = bytes_.one_in(4) ? some(139) : some(12);
    const int64_t work = std::max<int64_t>(1, s.batch * s.tokens * block * block);
    const int64_t heads = some(std::clamp<int64_t>(kWork / work, 1, 5));
    const int64_t channels = heads * block;
    add_floats(node, {s.batch, s.tokens, channels});
    for (int gate = 0; gate < 2; ++gate) {
      const Dims dims = {heads, block, block};
      bytes_.one_in(2) ? add_halves(node, kBfloat16, dims) : add_floats(node, dims);
      add_floats(node, {heads, block});
    }
    add_floats(node, {channels});
    auto positions = tensor(kInt64, {s.batch, s.tokens});
    for (int64_t i = 0; i < s.batch * s.tokens; ++i)
      positions->as<int64_t>()[i] = bytes_.one_in(3) ? bytes_.one_of(kStrange) : i + 1;
    node.inputs.push_back(std::move(positions));
    add_floats(node, {s.batch, channels});
    node.in_place = {{1, 7}};
  }

  void attention(Node& node) {
    const Step s = step(40);
    const int64_t dim = bytes_.one_in(4) ? 1 + bytes_.below(40) : 1 + bytes_.below(8);
    const int64_t heads = 1 + bytes_.below(bytes_.one_in(4) ? 20 : 4);
    const int64_t work = std::max<int64_t>(1, s.batch * s.tokens * dim * heads);
    const int64_t most = std::clamp<int64_t>(kWork / work, 2, bytes_.one_in(8) ? 700 : 40);
    const int64_t window = 1 + bytes_.below(most);
    const int64_t starts[] = {0,
                              1,
                              window - 1,
                              window,
                              window + 1,
                              3 * window + 1,
                              bytes_.below(999),
                              int64_t{1} << 31,
                              int64_t{1} << 53,
                              int64_t{1} << 62};
    add_floats(node, {s.batch, s.tokens, heads * dim});
    for (int i = 0; i < 2; ++i) add_floats(node, {s.batch, s.tokens, dim});
    const bool older = bytes_.one_in(4);
    for (int i = 0; i < 2; ++i)
      add_floats(node, older ? Dims{s.batch, window, dim} : Dims{s.batch, 1, window, dim});
    auto positions = tensor(kInt64, {s.batch, s.tokens});
    for (int64_t b = 0; b < s.batch; ++b) {
      const int64_t start = bytes_.one_of(starts);
      for (int64_t t = 0; t < s.tokens; ++t) positions->as<int64_t>()[b * s.tokens + t] = start + t;
    }
    node.inputs.push_back(std::move(positions));
    node.integers = {{"heads", heads}};
    node.in_place = {{1, 3}, {2, 4}};
  }

  void convolution(Node& node) {
    const Step s = step(40);
    const int64_t taps = bytes_.one_in(8) ? 1 + bytes_.below(30) : 1 + bytes_.below(5);
    const int64_t channels = some(bytes_.one_in(4) ? 299 : 39);
    add_floats(node, {s.batch, s.tokens, channels});
    add_floats(node, {channels, 1, taps});
    add_floats(node, {channels});
    add_floats(node, {s.batch, taps - 1, channels});
    node.in_place = {{1, 3}};
  }

  void pointwise(const std::string& name, Node& node) {
    Dims dims;
    for (int64_t left = bytes_.below(5); left > 0; --left) dims.push_back(some(5));
    if (dims.empty() && name.find("Norm") != std::string::npos) dims = {4};
    if (!dims.empty() && bytes_.one_in(3)) dims.back() = bytes_.below(300);
    if (bytes_.one_in(64)) dims = {70, 300};  // more than one task
    add_floats(node, dims);
    if (name == "GeluMul" || name == "AddRmsNorm") add_floats(node, dims);
    if (name.find("Norm") != std::string::npos) add_floats(node, {dims.back()});
    if (bytes_.one_in(4)) node.reals[name == "SoftCap" ? "cap" : "eps"] = bytes_.one_of(kSpecial);
  }

  // ---- Tensors --------------------------------------------------------------------------------

  std::unique_ptr<Tensor> tensor(ElementType type, const Dims& dims) const {
    auto made = std::make_unique<Tensor>();
    const int64_t count = std::max<int64_t>(stand_in::elements(dims), -1);
    made->type = type;
    made->dims = dims;
    made->buffer =
        std::make_shared<Buffer>(memory_, (count < 0 ? 1 : count) * stand_in::size_of(type));
    std::memset(made->buffer->data(), 1, made->buffer->bytes());
    return made;
  }

  void add_bytes(Node& node, const Dims& dims) {
    auto made = tensor(kUint8, dims);
    uint32_t seed = bytes_.next();
    for (size_t i = 0; i < made->buffer->bytes(); ++i) made->as<uint8_t>()[i] = random(seed) >> 24;
    node.inputs.push_back(std::move(made));
  }

  // Mostly of sizes from 2^-8 to 2^-1, rarely of any bits.
  void add_halves(Node& node, ElementType type, const Dims& dims) {
    auto made = tensor(type, dims);
    const bool any = bytes_.one_in(4);
    const uint32_t least = type == kFloat16 ? 0x1c00 : 0x3b80;
    const uint32_t count = type == kFloat16 ? 0x1c00 : 0x380;
    uint32_t seed = bytes_.next();
    for (size_t i = 0; i < made->buffer->bytes() / sizeof(uint16_t); ++i) {
      const uint32_t bits = random(seed) >> 16;
      made->as<uint16_t>()[i] = any ? bits : (bits & 0x8000) | (least + bits % count);
    }
    node.inputs.push_back(std::move(made));
  }

  // Numbers of one size, and here and there a special one.
  void add_floats(Node& node, const Dims& dims) {
    auto made = tensor(kFloat, dims);
    const int64_t count = made->buffer->bytes() / sizeof(float);
    float* numbers = made->as<float>();
    uint32_t seed = bytes_.next();
    const uint8_t kind = bytes_.next();
    const float size = kind < 192 ? 1.0f : std::ldexp(1.0f, (kind - 224) * 4);
    for (int64_t i = 0; i < count; ++i)
      numbers[i] = size * static_cast<float>(static_cast<int32_t>(random(seed))) * 0x1p-31f;
    if (count > 0 && kind % 4 == 3)
      for (int64_t left = 1 + bytes_.below(3); left > 0; --left) {
        const int64_t at = bytes_.below(count);
        numbers[at] = bytes_.one_of(kSpecial);
      }
    node.inputs.push_back(std::move(made));
  }

  static uint32_t random(uint32_t& seed) { return seed = seed * 1664525 + 1013904223; }

  // ---- What does not fit ----------------------------------------------------------------------

  void spoil(Node& node) {
    if (node.inputs.empty()) return;
    const size_t index = bytes_.below(node.inputs.size());
    switch (bytes_.below(7)) {
      case 0: return attribute(node);
      case 1: return dimension(node, index);
      case 2: return rank(node, index);
      case 3: return type(node, index);
      case 4: return node.inputs[index].reset();
      case 5: return position(node);
      case 6: return node.inputs.resize(index + bytes_.below(2));
    }
  }

  void attribute(Node& node) {
    if (node.integers.empty()) return;
    auto at = node.integers.begin();
    std::advance(at, bytes_.below(node.integers.size()));
    if (bytes_.one_in(8))
      node.integers.erase(at);
    else if (bytes_.one_in(4))
      at->second += bytes_.one_in(2) ? 1 : -1;
    else if (bytes_.one_in(2))  // the same in a product of numbers that overflow
      at->second += int64_t{1} << (32 + bytes_.below(31));
    else
      at->second = bytes_.one_of(kStrange);
  }

  void dimension(Node& node, size_t index) {
    if (!node.inputs[index] || node.inputs[index]->dims.empty()) return;
    Dims dims = node.inputs[index]->dims;
    int64_t& d = dims[bytes_.below(dims.size())];
    d = bytes_.one_in(2) ? bytes_.one_of(kStrange) : std::max<int64_t>(0, d + bytes_.below(3) - 1);
    replace(node, index, node.inputs[index]->type, dims);
  }

  void rank(Node& node, size_t index) {
    if (!node.inputs[index]) return;
    Dims dims = node.inputs[index]->dims;
    if (!dims.empty() && bytes_.one_in(2))
      dims.erase(dims.begin() + bytes_.below(dims.size()));
    else
      dims.insert(dims.begin() + bytes_.below(dims.size() + 1), 1);
    replace(node, index, node.inputs[index]->type, dims);
  }

  void type(Node& node, size_t index) {
    const ElementType types[] = {kFloat, kFloat16, kBfloat16, kUint8, kInt64, kDouble, kInt8};
    if (node.inputs[index]) replace(node, index, bytes_.one_of(types), node.inputs[index]->dims);
  }

  void position(Node& node) {
    for (auto& input : node.inputs)
      if (input && input->type == kInt64 && input->buffer->bytes() >= 8) {
        const int64_t at = bytes_.below(input->buffer->bytes() / 8);
        input->as<int64_t>()[at] = bytes_.one_of(kStrange);
      }
  }

  // One that no memory has keeps its dimensions, and has to be refused for them; of what some memory
  // would have, but none here, the dimensions become small.
  void replace(Node& node, size_t index, ElementType type, Dims dims) {
    constexpr double kMost = 1 << 16;
    double all = 1;
    bool negative = false;
    for (int64_t d : dims) all *= d ? std::fabs(static_cast<double>(d)) : 1, negative |= d < 0;
    if (!negative && all > kMost && all <= 0x1p57)
      for (int64_t& d : dims) d = std::min<int64_t>(d, 3);
    node.inputs[index] = tensor(type, dims);
  }

  static constexpr int64_t kWork = 20000;  // multiplications of a run, about

  Bytes& bytes_;
  Memory memory_;
  bool constants_;
};

}  // namespace fuzz
