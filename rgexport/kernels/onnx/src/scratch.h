// Memory for one run of an op.
#pragma once

#include <cstdint>
#include <cstdlib>

#include "sizes.h"

namespace rgexport {

// Floats, from the start of a cache line on; null where there is no memory for so many.
class Scratch {
 public:
  static constexpr int64_t kAlignment = 64;

  explicit Scratch(Size floats) {
    const Size bytes = floats * sizeof(float) + kAlignment;
    if (bytes.fits()) memory_ = std::malloc(bytes.count());
  }
  ~Scratch() { std::free(memory_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  float* data() const {
    const auto start = reinterpret_cast<uintptr_t>(memory_);
    return reinterpret_cast<float*>((start + kAlignment - 1) / kAlignment * kAlignment);
  }

 private:
  void* memory_ = nullptr;
};

}  // namespace rgexport
