#include "ranges.h"

#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif

namespace rgexport {
namespace {

int allowed() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  return static_cast<int>(std::thread::hardware_concurrency());
}

}  // namespace

int processors() {
  static const int found = allowed();
  return found > 0 ? found : 1;
}

}  // namespace rgexport
