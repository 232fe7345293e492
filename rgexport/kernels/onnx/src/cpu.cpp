#include "cpu.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__)
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#endif

namespace rgexport {
namespace {

struct Level {
  InstructionSet set;
  const char* name;
  bool (*here)();
};

bool always() { return true; }

#if defined(__x86_64__)

struct Registers {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(uint32_t leaf, uint32_t part = 0) {
  Registers r;
  __get_cpuid_count(leaf, part, &r.eax, &r.ebx, &r.ecx,
                    &r.edx);  // zeros where there is no such leaf
  return r;
}

constexpr bool has(uint64_t word, uint64_t bits) { return (word & bits) == bits; }
constexpr uint32_t bit(int index) { return uint32_t{1} << index; }

// The registers that the operating system saves: XCR0, or none.
uint64_t saved_registers() {
  if (!has(cpuid(1).ecx, bit(27))) return 0;  // OSXSAVE
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t{high} << 32 | low;
}

bool avx2() {
  return has(saved_registers(), 0x6) &&  // XMM, YMM
         // FMA, AVX, F16C
         has(cpuid(1).ecx, bit(12) | bit(28) | bit(29)) && has(cpuid(7).ebx, bit(5));  // AVX2
}

bool avx_vnni() { return avx2() && has(cpuid(7, 1).eax, bit(4)); }

bool avx512() {
  return avx2() && has(saved_registers(), 0xe6) &&                  // masks, ZMM
         has(cpuid(7).ebx, bit(16) | bit(17) | bit(30) | bit(31));  // F, DQ, BW, VL
}

bool avx512_vnni() { return avx512() && has(cpuid(7).ecx, bit(11)); }

// Linux lets a process use the tiles after it has asked for them; so does its virtual machine.
bool tiles_allowed() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return true;
#endif
}

bool amx() {
  return avx512_vnni() && has(saved_registers(), 0x60000) &&  // tile configuration, tiles
         has(cpuid(7).edx, bit(22) | bit(24) | bit(25)) &&    // AMX-BF16, AMX-TILE, AMX-INT8
         has(cpuid(7, 1).eax, bit(5)) &&                      // AVX512_BF16
         has(cpuid(7).ecx, bit(8)) &&                         // GFNI
         tiles_allowed();
}

#elif defined(__aarch64__)

#if defined(__linux__)
bool dotprod() { return getauxval(AT_HWCAP) & (1u << 20); }               // HWCAP_ASIMDDP
bool i8mm() { return dotprod() && (getauxval(AT_HWCAP2) & (1u << 13)); }  // HWCAP2_I8MM
#elif defined(__APPLE__)
bool feature(const char* name) {
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value;
}
bool dotprod() { return feature("hw.optional.arm.FEAT_DotProd"); }
bool i8mm() { return dotprod() && feature("hw.optional.arm.FEAT_I8MM"); }
#else
bool dotprod() { return false; }
bool i8mm() { return false; }
#endif

#endif

// The best one last; each one implies those before it, but AVX-512 does not imply AVX-VNNI.
const Level kLevels[] = {
    {InstructionSet::kScalar, "scalar", always},
#if defined(__x86_64__)
    {InstructionSet::kAvx2, "avx2", avx2},
    {InstructionSet::kAvxVnni, "avxvnni", avx_vnni},
    {InstructionSet::kAvx512Vnni, "avx512", avx512_vnni},
    {InstructionSet::kAmx, "amx", amx},
#elif defined(__aarch64__)
    {InstructionSet::kNeon, "neon", dotprod},
    {InstructionSet::kI8mm, "i8mm", i8mm},
#endif
};
constexpr size_t kCount = sizeof kLevels / sizeof *kLevels;

const Level& detect() {
  const char* most = std::getenv("RGEXPORT_CPU");
  const Level* best = kLevels;
  for (const Level& level : kLevels) {
    if (level.here()) best = &level;
    if (most && !std::strcmp(most, level.name)) break;
  }
  return *best;
}

const Level& level() {
  static const Level& found = detect();
  return found;
}

}  // namespace

InstructionSet instruction_set() { return level().set; }

const char* instruction_set_name() { return level().name; }

const char* level_name(size_t index) { return index < kCount ? kLevels[index].name : nullptr; }

bool level_is_here(size_t index) { return index < kCount && kLevels[index].here(); }

#if defined(__x86_64__)
bool has_avx2() { return avx2(); }
bool has_avx512() { return avx512(); }
#else
bool has_avx2() { return false; }
bool has_avx512() { return false; }
#endif

}  // namespace rgexport
