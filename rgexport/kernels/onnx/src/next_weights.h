// Which weights an op reads, and which the next one will: what is fetched before it is needed.
//
// The thread that is done first with an op has some microseconds in which its share of the memory
// would rest. The ops of a graph run in one order: each learns in the first step what comes after it.
#pragma once

#include <atomic>
#include <cstdint>
#include <initializer_list>
#include <memory>

namespace rgexport {

constexpr int64_t kAhead = 8 << 10;  // bytes of weights that are fetched before the first is used

inline void fetch(const void* from, int64_t bytes) {
  constexpr int64_t kLine = 64;
  for (int64_t i = 0; i < bytes; i += kLine)
    __builtin_prefetch(static_cast<const char*>(from) + i, 0, 2);
}

// Weights that lie side by side.
struct Span {
  const void* data;
  int64_t bytes;
};

class NextWeights {
  static constexpr int kSpans = 3;
  struct Weights {
    struct {
      std::atomic<const char*> data{nullptr};
      std::atomic<int64_t> bytes{0};
    } spans[kSpans];
  };

 public:
  // What comes next, for the threads of one run.
  class Next {
   public:
    Next(const Weights& weights) : weights_(weights) {}

    // In a thread that begins with the op.
    void enter() { entered_.fetch_add(1, std::memory_order_relaxed); }

    // In a thread that is done with its part of the op: fetches the start of its part of the next,
    // until all that have begun are done. Weights that are gone meanwhile do no harm, for what cannot
    // be fetched is not.
    void fetch(int part, int parts) {
      constexpr int64_t kMost = 128 << 10, kPiece = 1 << 10;
      done_.fetch_add(1, std::memory_order_relaxed);
      const Span span = start(part, parts, kMost);
      const auto* data = static_cast<const char*>(span.data);
      for (int64_t at = 0; at < span.bytes && others_work(); at += kPiece)
        rgexport::fetch(data + at, span.bytes - at < kPiece ? span.bytes - at : kPiece);
    }

   private:
    bool others_work() const {
      return done_.load(std::memory_order_relaxed) < entered_.load(std::memory_order_relaxed);
    }

    // The first bytes of a part, `most` of them, as far as they lie in one matrix.
    Span start(int part, int parts, int64_t most) const {
      int64_t whole = 0;
      for (const auto& span : weights_.spans) whole += span.bytes.load(std::memory_order_relaxed);
      const int64_t share = whole / parts, wanted = share < most ? share : most;
      int64_t at = part * share;
      for (const auto& span : weights_.spans) {
        const int64_t bytes = span.bytes.load(std::memory_order_relaxed), left = bytes - at;
        const char* data = span.data.load(std::memory_order_relaxed);
        if (left > 0) return {data + at, left < wanted ? left : wanted};
        at -= bytes;
      }
      return {nullptr, 0};
    }

    const Weights& weights_;
    std::atomic<int> entered_{0}, done_{0};  // threads
  };

  // At the start of an op, in the thread that runs the graph: these are the weights that it reads,
  // kSpans at most.
  Next begin(std::initializer_list<Span> weights) const {
    return begin(weights.begin(), static_cast<int>(weights.size()));
  }
  Next begin(const Span* weights, int count) const {
    static thread_local std::shared_ptr<Weights> before;
    for (int i = 0; before && i < count; ++i) {
      before->spans[i].data.store(static_cast<const char*>(weights[i].data),
                                  std::memory_order_relaxed);
      before->spans[i].bytes.store(weights[i].bytes, std::memory_order_relaxed);
    }
    before = next_;
    return Next(*next_);
  }

 private:
  std::shared_ptr<Weights> next_ = std::make_shared<Weights>();
};

}  // namespace rgexport
