// Which kernels run, from one execution to the next.
#pragma once

#include <string>
#include <vector>

namespace fuzz {

// Those whose kernels can run here.
const std::vector<std::string>& instruction_sets();

// From now on the kernels of a set run, and read weights in one of their ways.
void choose(const std::string& set, int reading);

}  // namespace fuzz
