// Of several ways to one result, that which takes the least time here.
//
// Which it is depends on the processor, on its memory, and on the virtual machine around them. So
// the ways take turns at first, while they do their work: nothing is computed only to be timed. They
// do so once more later: at first, pages of memory may still be moving.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>

namespace rgexport {

template <int kWays>
class Fastest {
 public:
  static constexpr int kTurns = 24;          // of each way, then one is chosen
  static constexpr int kRunsOfIt = 1 << 14;  // then the ways take turns again

  Fastest() { begin(); }

  // What body(way) gives. `amount` is how much work it does, or 0 if its time tells nothing.
  template <class Body>
  auto run(int64_t amount, const Body& body) {
    const int found = chosen();
    if (amount > 0 && found < 0) {
      const Turn turn(*this, amount);
      return body(turn.way);
    }
    if (amount > 0 && left_.fetch_sub(1, std::memory_order_relaxed) == 1) begin();
    return body(found >= 0 ? found : 0);
  }

  // The way that was found, or -1.
  int chosen() const { return chosen_.load(std::memory_order_relaxed); }

  // Whose turn it is. The order shifts from round to round: a layer may have as many matrices as
  // there are ways, and one of them would always get the same matrix.
  int next() {
    const unsigned turn = turns_.fetch_add(1, std::memory_order_relaxed);
    return static_cast<int>((turn + turn / kWays) % kWays);
  }

  // What a turn of `way` cost.
  void add(int way, float cost) {
    const int index = taken_[way].fetch_add(1, std::memory_order_relaxed);
    if (index < kTurns) costs_[way][index].store(cost, std::memory_order_relaxed);
    for (const auto& taken : taken_)
      if (taken.load(std::memory_order_relaxed) < kTurns) return;
    choose();
  }

 private:
  static constexpr float kNever = 1e30f;

  // From its beginning to its end, it is the turn of `way`.
  struct Turn {
    using Clock = std::chrono::steady_clock;
    Fastest& all;
    const float amount;
    const int way = all.next();
    const Clock::time_point began = Clock::now();

    Turn(Fastest& all, int64_t amount) : all(all), amount(static_cast<float>(amount)) {}
    ~Turn() {
      const std::chrono::duration<float> took = Clock::now() - began;
      all.add(way, took.count() / amount);
    }
  };

  void begin() {
    for (auto& of_way : costs_)
      for (auto& cost : of_way) cost.store(kNever, std::memory_order_relaxed);
    for (auto& taken : taken_) taken.store(0, std::memory_order_relaxed);
    chosen_.store(-1, std::memory_order_relaxed);
  }

  void choose() {
    int best = 0;
    for (int way = 1; way < kWays; ++way)
      if (typical(way) < typical(best)) best = way;
    chosen_.store(best, std::memory_order_relaxed);
  }

  // The first quartile: other programs make a turn slower, never faster.
  float typical(int way) const {
    float costs[kTurns];
    for (int i = 0; i < kTurns; ++i) costs[i] = costs_[way][i].load(std::memory_order_relaxed);
    std::nth_element(costs, costs + kTurns / 4, costs + kTurns);
    return costs[kTurns / 4];
  }

  std::atomic<float> costs_[kWays][kTurns];
  std::atomic<int> taken_[kWays] = {};
  std::atomic<unsigned> turns_{0};
  std::atomic<int> chosen_{-1};
  std::atomic<int64_t> left_{kRunsOfIt};  // of the chosen way, before the next turns
};

// Which runs of an op show how fast it reads its weights.
class TimedRuns {
 public:
  // The bytes of weights that a run reads, or 0 if its time tells nothing: the first run may wait for
  // a disk, few weights may lie in a cache, and several rows have more to compute.
  int64_t amount(int64_t bytes, int64_t rows) const {
    constexpr int64_t kLeast = 1 << 20;
    if (ran_.load(std::memory_order_relaxed)) return rows == 1 && bytes >= kLeast ? bytes : 0;
    ran_.store(true, std::memory_order_relaxed);
    return 0;
  }

 private:
  mutable std::atomic<bool> ran_{false};
};

}  // namespace rgexport
