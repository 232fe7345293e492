// Prints the number of processors that the kernels share their work among.
#include <cstdio>

#include "ranges.h"

int main() { std::printf("%d\n", rgexport::processors()); }
