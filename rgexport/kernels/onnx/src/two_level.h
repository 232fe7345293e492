// Levels of 2 to 6 bits in planes, with scales of two levels.
//
// Two levels of up to 4 bits are unpacked into a byte, the even one low; one of 5 or 6 bits into a byte
// of its own. A row is cut into tiles. A plane has some bits of each byte of a tile: group g of the
// tile, in order, is ((packed >> step · g) & mask) << shift.
//
// One row of activations is multiplied while the weights are unpacked; for more rows, some rows of
// weights are unpacked into memory first.
#pragma once

#include <cstdint>
#include <cstring>

#include "next_weights.h"
#include "quant_few.h"

namespace rgexport {
namespace {

struct Plane {
  int mask, step, groups, shift;
};
template <int kBits>
constexpr Plane kPlanes[] = {{0xff, 0, 1, 0}};
template <>
constexpr Plane kPlanes<2>[] = {{0x33, 2, 2, 0}};
template <>
constexpr Plane kPlanes<3>[] = {{0x33, 2, 2, 0}, {0x11, 1, 4, 2}};
template <>
constexpr Plane kPlanes<5>[] = {{0x0f, 4, 2, 0}, {0x01, 1, 8, 4}};
template <>
constexpr Plane kPlanes<6>[] = {{0x0f, 4, 2, 0}, {0x03, 2, 4, 4}};

constexpr int64_t kAheadRows = 16;  // from what is unpacked to what is fetched

// Eight bytes of part `part` of a tile of `size` bytes that is cut into `parts`: bits of a plane.
inline uint64_t bits_of(const Plane& plane, const uint8_t* packed, int64_t size, int64_t at,
                        int part, int parts) {
  constexpr uint64_t kEach = 0x0101010101010101;
  const int each = parts / plane.groups;  // parts that are one group
  uint64_t bits = 0;
  std::memcpy(&bits, packed + part % each * size + at, size < 8 ? size : 8);
  return (bits >> (part / each * plane.step) & plane.mask * kEach) << plane.shift;
}

// Unpacks a tile of `bytes` bytes, and adds `added` to each; the size is a constant or a power of two.
template <int kBits, class Bytes>
[[gnu::always_inline]] inline void unpack_tile(const uint8_t* __restrict packed, Bytes bytes,
                                               uint64_t added, uint8_t* __restrict tile) {
  constexpr auto& planes = kPlanes<kBits>;
  constexpr int kCount = sizeof planes / sizeof *planes, kParts = planes[kCount - 1].groups;
  const int64_t size = bytes / kParts;
  const uint8_t* second = packed + bytes / planes[0].groups;
  unrolled<kParts>([&](auto part) {
    uint8_t* to = tile + part * size;
    for (int64_t at = 0; at < size; at += 8) {
      uint64_t bits = bits_of(planes[0], packed, size, at, part, kParts);
      if constexpr (kCount == 2) bits |= bits_of(planes[1], second, size, at, part, kParts);
      bits += added;
      std::memcpy(to + at, &bits, size < 8 ? size : 8);
    }
  });
}

template <int kBits>
void unpack_row(const TwoLevelMatrix& w, const uint8_t* packed, uint8_t* row) {
  constexpr std::integral_constant<int64_t, most_tile(kBits)> kMost;
  const int width = w.unpacked.bits == 8 ? 8 : 4;
  const uint64_t middles = (1 << (width - 1)) - (1 << (kBits - 1));
  const uint64_t added = middles * (width == 8 ? 0x0101010101010101 : 0x1111111111111111);
  const int64_t tile = w.tile(), packed_tile = w.tile_bytes();
  for (int64_t i = 0; i < w.tiles(); ++i, packed += packed_tile, row += tile)
    tile == kMost ? unpack_tile<kBits>(packed, kMost, added, row)
                  : unpack_tile<kBits>(packed, tile, added, row);
}

// The scales of a row, [blocks].
inline void unpack_scales(const TwoLevelMatrix& w, int64_t row, float* __restrict scales) {
  const int64_t blocks = w.unpacked.blocks(), full = blocks / kRun;
  const int8_t* __restrict codes = w.codes + row * blocks;
  const auto unit = [&](int64_t run) { return number_at(w.units, row * w.runs + run); };
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
  for (int64_t row = first; row < last; ++row, bytes += row_bytes, scales += blocks) {
    const uint8_t* packed = w.planes + row * w.row_bytes;
    if (w.bits != 4) fetch(packed + kAheadRows * w.row_bytes, w.row_bytes);
    switch (w.bits) {
      case 2: unpack_row<2>(w, packed, bytes); break;
      case 3: unpack_row<3>(w, packed, bytes); break;
      case 5: unpack_row<5>(w, packed, bytes); break;
      case 6: unpack_row<6>(w, packed, bytes); break;
      default: break;  // levels of 4 bits are read where they lie
    }
    unpack_scales(w, row, scales);
  }
}

// The weights of QuantFew, of kStored bits in whole tiles: unpacked in registers, from row `first` on.
template <class Simd, class Reading, int kStored, int kBlockLanes>
class PlaneLines : QuantLayout<Simd> {
  using Base = QuantLayout<Simd>;
  using Base::kCacheLine;
  using Base::kLanes;
  using Base::kVector;
  using typename Base::Float;
  using typename Base::Int;
  using typename Base::Shape;
  static constexpr int kBits = kStored <= 4 ? 4 : 8;
  static constexpr int64_t kTile = most_tile(kStored), kTileBytes = kTile * kStored / kBits;
  static constexpr auto& kOfTile = kPlanes<kStored>;
  static constexpr int kCount = sizeof kOfTile / sizeof *kOfTile;
  static constexpr int64_t kAheadBlocks = kReadAhead * kBits / kStored / (4 * kBlockLanes);

 public:
  using Matrix = TwoLevelMatrix;
  static constexpr int64_t kTileLines = kTile / kVector;

  static const QuantMatrix& layout(const Matrix& w) { return w.unpacked; }
  PlaneLines(const Matrix& w, const Shape& shape, int64_t first)
      : w_(w), blocks_(shape.blocks), runs_(w.runs), row_bytes_(w.row_bytes), first_(first),
        data_(w.planes + first * row_bytes_) {}

  template <int kRows, bool kAll>
  [[gnu::always_inline]] typename Base::template Line<kBits> line(int64_t start, int64_t offset,
                                                                  int r) const {
    const int64_t tile = start / kTileLines + offset / kTileLines, index = offset % kTileLines;
    if (index == 0)
      for (int64_t at = 0; at < kTileBytes; at += kCacheLine)
        fetch_ahead<Reading>(data_ + (tile * kRows + r) * kTileBytes + at);
    const uint8_t* packed = data_ + r * row_bytes_ + tile * kTileBytes;
    constexpr int kMask = (1 << kStored) - 1;
    Int bits = field(kOfTile[0], packed, index * kVector);
    if constexpr (kCount == 2) {
      const uint8_t* second = packed + kTile / kOfTile[0].groups;
      bits =
          Simd::template select<kOfTile[0].mask>(bits, field(kOfTile[1], second, index * kVector));
    }
    const Int low = Simd::template low_half<kMask>(bits);
    if constexpr (kBits == 4) return {{low, Simd::template high_half<kMask>(bits)}};
    if constexpr (kBits == 8) return {{low}};
  }

  template <int kRows>
  void fetch_scales(int64_t block, int r) const {
    const int64_t near = kRows * block + r * kLanes;
    if (near % kCacheLine == 0)
      fetch_into<Reading::kCache>(w_.codes + first_ * blocks_ + near + kAheadBlocks);
    if (block == 0) fetch_into<Reading::kCache>(address_of(w_.units, (first_ + r) * runs_) + 256);
  }
  Float scales(int64_t first, int64_t offset, int r) const {
    const int64_t block = first + offset, row = first_ + r, at = row * blocks_ + block;
    const float unit = number_at(w_.units, row * runs_ + first / kRun + offset / kRun);
    const Float codes =
        Simd::load_first_codes(w_.codes + at, blocks_ - block, w_.unpacked.rows * blocks_ - at);
    return Simd::mul(codes, Simd::broadcast_float(unit));
  }

  static Int starts(const Activations& a, int64_t block) {
    const Int middles = Simd::template shift_left<kStored - 1>(Simd::load(a.sums + block));
    return Simd::sub(Simd::zero(), middles);
  }

 private:
  // A plane's bits of the bytes from `at` on, and others beside them.
  static Int field(const Plane& plane, const uint8_t* packed, int64_t at) {
    const int64_t size = kTile / plane.groups, group = at / size;
    const int right = static_cast<int>(group) * plane.step - plane.shift;
    return Simd::shift_bytes(Simd::load(packed + at % size), right);
  }

  const Matrix& w_;
  const int64_t blocks_, runs_, row_bytes_, first_;
  const uint8_t* const data_;
};

}  // namespace
}  // namespace rgexport
