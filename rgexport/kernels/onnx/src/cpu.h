// What this processor can do, asked once.
#pragma once

#include <cstddef>

namespace rgexport {

// From the least to the most; the levels of another architecture are never met.
enum class InstructionSet { kScalar, kAvx2, kAvxVnni, kAvx512Vnni, kAmx, kNeon, kI8mm };

// The best one here, or the best one up to that which the environment variable RGEXPORT_CPU names.
InstructionSet instruction_set();

const char* instruction_set_name();

// The name of level `index` of this architecture, or null after the last one. These are the words
// for RGEXPORT_CPU; library.py refuses any other.
const char* level_name(size_t index);

// Whether this processor and its operating system have level `index`.
bool level_is_here(size_t index);

// Whether they have AVX2 with FMA; AVX-512 with F, DQ, BW and VL, which VNNI need not come with.
bool has_avx2();
bool has_avx512();

}  // namespace rgexport
