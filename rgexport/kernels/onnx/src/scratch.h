// Memory for one run of an op.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace rgexport {

// Floats, from the start of a cache line on; null where there is no memory.
class Scratch {
 public:
  static constexpr int64_t kAlignment = 64;

  explicit Scratch(int64_t floats) : memory_(std::malloc(floats * sizeof(float) + kAlignment)) {}
  ~Scratch() { std::free(memory_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  float* data() const {
    const auto start = reinterpret_cast<uintptr_t>(memory_);
    return reinterpret_cast<float*>((start + kAlignment - 1) / kAlignment * kAlignment);
  }

 private:
  void* memory_;
};

}  // namespace rgexport
