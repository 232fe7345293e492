#include "ranges.h"

#include <thread>

namespace rgexport {

int processors() {
  static const int found = static_cast<int>(std::thread::hardware_concurrency());
  return found > 0 ? found : 1;
}

}  // namespace rgexport
