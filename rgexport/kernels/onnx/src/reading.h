// How weights that stream by are read: what is fetched by hand, and how many rows side by side.
//
// A line on its way to L1 holds one of the few places that L1 has for such, so on most processors
// more of them are on their way to L2; but some read slowly out of L2. A load that misses L1 takes
// one of those places too, unless the line has been brought there before. And some processors' own
// prefetchers do better, where the arithmetic is quick enough to let them look ahead.
#pragma once

#include <cstdint>

namespace rgexport {
namespace {

// Bytes from what is read to what is fetched, found by measurement.
constexpr int64_t kReadAhead = 8192;

enum class Cache { kNone, kL1, kL2, kOnce };

template <Cache kCache>
inline void fetch_into(const void* p) {
  if constexpr (kCache == Cache::kL1) __builtin_prefetch(p);
  if constexpr (kCache == Cache::kL2) __builtin_prefetch(p, 0, 2);
  if constexpr (kCache == Cache::kOnce) __builtin_prefetch(p, 0, 0);
  asm volatile("");  // It stays where it is: GCC would fetch many lines at once.
}

template <int kRowsAtOnce, Cache kFetchedInto, int64_t kNearBytes = 0>
struct Reading {
  static constexpr int kRows = kRowsAtOnce;  // of more, there are too many places to read from
  static constexpr Cache kCache = kFetchedInto;
  static constexpr int64_t kNear = kNearBytes;  // ahead of their use, lines come from L2 into L1
};

template <class Reading>
inline void fetch_ahead(const uint8_t* here) {
  if constexpr (Reading::kNear > 0) fetch_into<Cache::kL1>(here + Reading::kNear);
  fetch_into<Reading::kCache>(here + kReadAhead);
}

}  // namespace
}  // namespace rgexport
