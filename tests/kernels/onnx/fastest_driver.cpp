// Fastest with costs that are known: prints nothing and returns 0 if it chooses as it should.
#include "fastest.h"

#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

namespace {

constexpr int kWays = 3;
using Choice = rgexport::Fastest<kWays>;

void require(bool holds, const char* what) {
  if (holds) return;
  std::printf("%s\n", what);
  std::exit(1);
}

// Takes turns until a way is chosen, which costs cost(way, turn).
template <class Cost>
int choose(const Cost& cost) {
  Choice choice;
  for (int turn = 0; choice.chosen() < 0; ++turn) {
    require(turn < kWays * Choice::kTurns, "no way is chosen after all turns");
    const int way = choice.next();
    choice.add(way, cost(way, turn));
  }
  return choice.chosen();
}

void the_least_cost_is_found() {
  for (int best = 0; best < kWays; ++best)
    require(choose([&](int way, int) { return way == best ? 0.98f : 1.0f; }) == best,
            "another way than the fastest is chosen");
}

// Half of the turns are disturbed, those of the best way most.
void disturbed_turns_do_not_count() {
  const auto cost = [](int way, int turn) {
    return (way == 1 ? 0.95f : 1.0f) * (turn % 2 ? 1.0f : way == 1 ? 50.0f : 2.0f);
  };
  require(choose(cost) == 1, "disturbed turns decide");
}

// With as many ways as there are kinds of work: each way gets each kind equally often.
void every_way_gets_all_kinds_of_work() {
  Choice choice;
  int counts[kWays][kWays] = {};
  for (int turn = 0; turn < kWays * kWays * 4; ++turn) ++counts[choice.next()][turn % kWays];
  for (const auto& of_way : counts)
    for (const int count : of_way) require(count == 4, "a way gets one kind of work more often");
}

void work_that_tells_nothing_takes_no_turn() {
  Choice choice;
  for (int i = 0; i < 10 * kWays * Choice::kTurns; ++i)
    require(choice.run(0, [](int way) { return way; }) == 0,
            "work that tells nothing tries another way");
  require(choice.chosen() < 0, "a way is chosen by work that tells nothing");
}

void threads_may_share_it() {
  Choice choice;
  std::vector<std::thread> threads;
  std::atomic<int> runs{0};
  for (int i = 0; i < 4; ++i)
    threads.emplace_back([&] {
      while (choice.chosen() < 0) choice.run(1, [&](int) { return ++runs; });
    });
  for (auto& thread : threads) thread.join();
  require(runs >= kWays * Choice::kTurns, "chosen before all ways had their turns");
  require(choice.run(1, [](int way) { return way; }) == choice.chosen(),
          "the chosen way is not taken");
}

void ways_take_turns_once_more() {
  Choice choice;
  const auto run = [&] { return choice.run(1, [](int way) { return way; }); };
  for (const bool again : {true, false}) {
    while (choice.chosen() < 0) run();
    for (int i = 0; i < Choice::kRunsOfIt; ++i) {
      require(choice.chosen() >= 0, "the ways take turns too early");
      run();
    }
    require((choice.chosen() < 0) == again, again ? "the ways do not take turns again"
                                                  : "the ways take turns more than twice");
  }
}

}  // namespace

int main() {
  the_least_cost_is_found();
  disturbed_turns_do_not_count();
  every_way_gets_all_kinds_of_work();
  work_that_tells_nothing_takes_no_turn();
  threads_may_share_it();
  ways_take_turns_once_more();
}
