// Levels of 2 to 6 bits in planes, with scales of two levels: how few rows become what
// quant_matmul.h multiplies.
//
// Two levels of up to 4 bits are unpacked into a byte, the even one low; one of 5 or 6 bits into a byte
// of its own. A plane has some bits of each of these bytes: group g of a row of them, in order, is
// ((packed >> step · g) & mask) << shift. Eight bytes are unpacked at a time, as one number.
#pragma once

#include <cstdint>
#include <cstring>

#include "next_weights.h"
#include "quant_matmul.h"
#include "unrolled.h"

namespace rgexport {
namespace {

struct Plane {
  int mask, step, groups, shift;
};
template <int kBits>
constexpr Plane kPlanes[] = {{0, 0, 0, 0}};
template <>
constexpr Plane kPlanes<2>[] = {{0x33, 2, 2, 0}};
template <>
constexpr Plane kPlanes<3>[] = {{0x33, 2, 2, 0}, {0x11, 1, 4, 2}};
template <>
constexpr Plane kPlanes<5>[] = {{0x0f, 4, 2, 0}, {0x01, 1, 8, 4}};
template <>
constexpr Plane kPlanes<6>[] = {{0x0f, 4, 2, 0}, {0x03, 2, 4, 4}};

constexpr int64_t kAheadRows = 16;  // from what is unpacked to what is fetched

constexpr uint64_t eight(uint64_t byte) { return byte * 0x0101010101010101u; }

// The bits that `plane` has of part `part` of a row that is cut into `parts`.
template <class Number>
[[gnu::always_inline]] inline Number bits_of(const Plane& plane, const uint8_t* packed,
                                             int64_t size, int64_t at, int part, int parts) {
  const int each = parts / plane.groups;  // parts that are one group
  Number bits;
  std::memcpy(&bits, packed + part % each * size + at, sizeof bits);
  const auto mask = static_cast<Number>(eight(plane.mask));
  return static_cast<Number>((bits >> (part / each * plane.step) & mask) << plane.shift);
}

// Unpacks `bytes` bytes of a row, and adds `added` to each.
template <int kBits>
void unpack_row(const uint8_t* __restrict packed, int64_t bytes, int added,
                uint8_t* __restrict row) {
  constexpr auto& planes = kPlanes<kBits>;
  constexpr int kCount = sizeof planes / sizeof *planes, kParts = planes[kCount - 1].groups;
  const int64_t size = bytes / kParts;
  const uint8_t* second = packed + bytes / planes[0].groups;
  const auto number = [&](auto none, int64_t at, auto part) {
    using Number = decltype(none);
    auto bits = bits_of<Number>(planes[0], packed, size, at, part, kParts);
    if constexpr (kCount == 2) bits |= bits_of<Number>(planes[1], second, size, at, part, kParts);
    return static_cast<Number>(bits + static_cast<Number>(eight(added)));
  };
  unrolled<kParts>([&](auto part) {
    uint8_t* to = row + part * size;
    int64_t at = 0;
    for (; at + 8 <= size; at += 8) {
      const uint64_t bits = number(uint64_t{}, at, part);
      std::memcpy(to + at, &bits, sizeof bits);
    }
    for (; at < size; ++at) to[at] = number(uint8_t{}, at, part);
  });
}

// The scales of a row, [blocks].
inline void unpack_scales(const TwoLevelMatrix& w, int64_t row, float* __restrict scales) {
  const int64_t blocks = w.unpacked.blocks(), full = blocks / kRun;
  const int8_t* __restrict codes = w.codes + row * blocks;
  const auto unit = [&](int64_t run) { return number_at(w.units, row * w.runs() + run); };
  for (int64_t run = 0; run < full; ++run, codes += kRun, scales += kRun) {
    const float of_run = unit(run);
    for (int block = 0; block < kRun; ++block) scales[block] = codes[block] * of_run;
  }
  for (int64_t block = 0; block < blocks - full * kRun; ++block)
    scales[block] = codes[block] * unit(full);
}

// Rows [first, last) as `unpacked`, which has room for them: levels, and scales as numbers.
void unpack_rows(const TwoLevelMatrix& w, int64_t first, int64_t last, uint8_t* bytes,
                 float* scales) {
  const int64_t row_bytes = w.unpacked.row_bytes(), blocks = w.unpacked.blocks();
  const int middle = 1 << (w.bits - 1);
  const int added = w.unpacked.bits == 8 ? 128 - middle : (8 - middle) * 0x11;
  for (int64_t row = first; row < last; ++row, bytes += row_bytes, scales += blocks) {
    const uint8_t* packed = w.planes + row * w.row_bytes();
    if (w.bits != 4) fetch(packed + kAheadRows * w.row_bytes(), w.row_bytes());
    switch (w.bits) {
      case 2: unpack_row<2>(packed, row_bytes, added, bytes); break;
      case 3: unpack_row<3>(packed, row_bytes, added, bytes); break;
      case 5: unpack_row<5>(packed, row_bytes, added, bytes); break;
      case 6: unpack_row<6>(packed, row_bytes, added, bytes); break;
      default: break;  // levels of 4 bits are read where they lie
    }
    unpack_scales(w, row, scales);
  }
}

}  // namespace
}  // namespace rgexport
