// Work that streams through memory: each thread has one contiguous part of it, which keeps the
// processor's prefetchers going. Who is done early takes the parts that nobody has begun, as when there
// are fewer threads than parts, and then from the ends of the others' parts.
#pragma once

#include <atomic>
#include <cstdint>

namespace rgexport {

// The processors that this process may use, asked once.
int processors();

class Ranges {
 public:
  static constexpr int kMost = 64;

  // The items [0, count), `grain` at a time, for at most `parts` threads.
  Ranges(int64_t count, int64_t grain, int parts) : grain_(grain) {
    const int64_t grains = (count + grain - 1) / grain;
    parts_ = static_cast<int>(grains < parts ? grains : parts);
    if (parts_ > kMost) parts_ = kMost;
    for (int64_t i = 0; i < parts_; ++i)
      left_[i].value.store(pack(grains * i / parts_, grains * (i + 1) / parts_));
    count_ = count;
  }

  int parts() const { return parts_; }

  // The first item that is left of a part.
  int64_t first(int part) const {
    return static_cast<int64_t>(left_[part].value.load(std::memory_order_relaxed) >> 32) * grain_;
  }

  // Whether there is work for one more thread.
  bool any() const {
    for (int part = 0; part < parts_; ++part) {
      const uint64_t left = left_[part].value.load(std::memory_order_relaxed);
      if (left >> 32 < (left & 0xffffffff)) return true;
    }
    return false;
  }

  // Runs body(first, last) over part `own`, then over what is left of the others.
  template <class Body>
  void run(int own, const Body& body) {
    int64_t grain;
    for (int i = 0; i < parts_; ++i) {
      const int part = (own + i) % parts_;
      if (left_[part].begun.exchange(true, std::memory_order_relaxed)) continue;
      while ((grain = take(part, true)) >= 0) each(grain, body);
    }
    for (int i = 0; i < parts_; ++i)
      while ((grain = take((own + i) % parts_, false)) >= 0) each(grain, body);
  }

 private:
  struct alignas(64) Left {
    std::atomic<uint64_t> value;
    std::atomic<bool> begun{false};
  };

  static uint64_t pack(uint64_t first, uint64_t last) { return first << 32 | last; }

  // A grain from the front of a part, or from its end; -1 where none is left.
  int64_t take(int part, bool front) {
    uint64_t left = left_[part].value.load(std::memory_order_relaxed);
    for (;;) {
      const uint64_t first = left >> 32, last = left & 0xffffffff;
      if (first >= last) return -1;
      const uint64_t rest = front ? pack(first + 1, last) : pack(first, last - 1);
      if (left_[part].value.compare_exchange_weak(left, rest, std::memory_order_relaxed))
        return static_cast<int64_t>(front ? first : last - 1);
    }
  }

  template <class Body>
  void each(int64_t grain, const Body& body) const {
    const int64_t first = grain * grain_, last = first + grain_;
    body(first, last < count_ ? last : count_);
  }

  int64_t count_, grain_;
  int parts_;
  Left left_[kMost];
};

}  // namespace rgexport
