#include "ranges.h"

#include <thread>

#if defined(__linux__)
#include <sched.h>
#include <unistd.h>
#endif

namespace rgexport {
namespace {

int allowed() {
#if defined(__linux__)
  cpu_set_t set;
  // Those of the main thread: that which runs the first op may be bound to one processor.
  if (sched_getaffinity(getpid(), sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  return static_cast<int>(std::thread::hardware_concurrency());
}

}  // namespace

int processors() {
  static const int found = allowed();
  return found > 0 ? found : 1;
}

}  // namespace rgexport
