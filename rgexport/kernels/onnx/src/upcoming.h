// Which weights the next op will read, so that a thread that waits can fetch the first of them.
//
// Between two products of a decode step, one thread norms and adds for some microseconds in which
// the memory would rest. The ops of a graph run in one order: each learns in the first step what
// comes after it.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

namespace rgexport {

class Upcoming {
 public:
  // At the start of an op, in the thread that runs the graph: these are the weights that it reads.
  void begin(const void* data, int64_t bytes) const {
    static thread_local std::shared_ptr<Weights> before;
    if (before) {
      before->data.store(static_cast<const char*>(data), std::memory_order_relaxed);
      before->bytes.store(bytes, std::memory_order_relaxed);
    }
    before = next_;
  }

  // In a thread that is done with its part of the op: fetches the start of its part of the next.
  // Weights that are gone meanwhile do no harm, for what cannot be fetched is not.
  void fetch(int part, int parts) const {
    constexpr int64_t kMost = 64 << 10, kLine = 64;
    const char* data = next_->data.load(std::memory_order_relaxed);
    const int64_t share = next_->bytes.load(std::memory_order_relaxed) / parts;
    const int64_t most = share < kMost ? share : kMost;
    for (int64_t i = 0; i < most; i += kLine) __builtin_prefetch(data + part * share + i, 0, 2);
  }

 private:
  struct Weights {
    std::atomic<const char*> data{nullptr};
    std::atomic<int64_t> bytes{0};
  };
  std::shared_ptr<Weights> next_ = std::make_shared<Weights>();
};

}  // namespace rgexport
