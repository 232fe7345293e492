// Where ggml's i-quants have the codes and scales of a row (ggml-common.h).
#pragma once

#include "numbers.h"
#include "scales.h"

namespace rgexport {
namespace {

// An entry of a codebook, and the signs of its weights: one bit each, set for minus.
struct Code {
  int entry, signs;
};

enum IQuantType {
  kIq2Xxs = 16,
  kIq2Xs = 17,
  kIq3Xxs = 18,
  kIq4Nl = 20,
  kIq3S = 21,
  kIq2S = 22,
  kIq4Xs = 23
};

// Bits [first, first + count) of a little-endian number of four bytes, and the same to be written.
inline int bits_at(const uint8_t* from, int first, int count) {
  uint32_t number;
  std::memcpy(&number, from, 4);
  return number >> first & ((1u << count) - 1);
}
inline void set_bits(uint8_t* to, int first, int count, int bits) {
  uint32_t number;
  std::memcpy(&number, to, 4);
  const uint32_t mask = ((1u << count) - 1) << first;
  number = (number & ~mask) | static_cast<uint32_t>(bits) << first;
  std::memcpy(to, &number, 4);
}
inline void set_byte_bits(uint8_t* to, int first, int count, int bits) {
  const int mask = ((1 << count) - 1) << first;
  *to = static_cast<uint8_t>((*to & ~mask) | bits << first);
}

// A block of 256 weights has eight parts of 32, a part four runs of 8. Blocks of iq4_nl have one part.
struct IQuant {
  int type;
  const bool even_signs = type == kIq2Xxs || type == kIq2Xs || type == kIq3Xxs;

  bool has_signs() const { return type != kIq4Nl && type != kIq4Xs; }
  int size() const {  // weights of an entry
    switch (type) {
      case kIq4Nl:
      case kIq4Xs: return 1;
      case kIq3Xxs:
      case kIq3S: return 4;
      case kIq2Xxs:
      case kIq2Xs:
      case kIq2S: return 8;
      default: return 0;
    }
  }
  int64_t block() const { return type == kIq4Nl ? 32 : 256; }
  int64_t block_bytes() const {
    switch (type) {
      case kIq2Xxs: return 66;
      case kIq2Xs: return 74;
      case kIq2S: return 82;
      case kIq3Xxs: return 98;
      case kIq3S: return 110;
      case kIq4Nl: return 18;
      default: return 136;
    }
  }
  int64_t row_bytes(int64_t columns) const { return columns / block() * block_bytes(); }

  // Of the weight in column `column`: what multiplies the codebook's values.
  float scale(const uint8_t* row, int64_t column) const {
    const uint8_t* at = row + column / block() * block_bytes();
    const int part = column % block() / 32, half = column % 32 / 16;
    const float d = half_to_float(at);
    const auto nibble = [&](int64_t start, int index) {
      return at[start + index / 2] >> 4 * (index % 2) & 15;
    };
    switch (type) {
      case kIq2Xxs: return d * (0.5f + bits_at(at + 6 + 8 * part, 28, 4)) * 0.25f;
      case kIq2Xs: return d * (0.5f + nibble(66, 2 * part + half)) * 0.25f;
      case kIq2S: return d * (0.5f + nibble(74, 2 * part + half)) * 0.25f;
      case kIq3Xxs: return d * (0.5f + bits_at(at + 66 + 4 * part, 28, 4)) * 0.5f;
      case kIq3S: return d * static_cast<float>(1 + 2 * nibble(106, part));
      case kIq4Nl: return d;
      default:
        return d * static_cast<float>(
                       (nibble(4, part) | (at[2 + part / 4] >> 2 * (part % 4) & 3) << 4) - 32);
    }
  }

  // Number `index` of a row.
  Code code(const uint8_t* row, int64_t index) const {
    const Places at(*this, index);
    const uint8_t* b = row + at.start;
    switch (type) {
      case kIq2Xxs:
        return {b[2 + 8 * at.part + at.run],
                with_parity(bits_at(b + 6 + 8 * at.part, 7 * at.run, 7))};
      case kIq2Xs: {
        const int bits = b[2 + 2 * at.eight] | b[3 + 2 * at.eight] << 8;
        return {bits & 511, with_parity(bits >> 9)};
      }
      case kIq2S:
        return {b[2 + at.eight] | (b[66 + at.part] >> 2 * at.run & 3) << 8, b[34 + at.eight]};
      case kIq3Xxs:
        return {b[2 + at.entry],
                with_parity(bits_at(b + 66 + 4 * at.part, 7 * at.run, 7)) >> 4 * at.second & 15};
      case kIq3S:
        return {b[2 + at.entry] | (b[66 + at.part] >> at.entry % 8 & 1) << 8,
                b[74 + at.eight] >> 4 * at.second & 15};
      default: return {b[at.byte] >> 4 * at.high & 15, 0};
    }
  }

  void set_code(uint8_t* row, int64_t index, const Code& code) const {
    const Places at(*this, index);
    uint8_t* b = row + at.start;
    const uint8_t low = static_cast<uint8_t>(code.entry);
    switch (type) {
      case kIq2Xxs:
        b[2 + 8 * at.part + at.run] = low;
        return set_bits(b + 6 + 8 * at.part, 7 * at.run, 7, code.signs & 127);
      case kIq2Xs:
        b[2 + 2 * at.eight] = low;
        b[3 + 2 * at.eight] = static_cast<uint8_t>(code.entry >> 8 | (code.signs & 127) << 1);
        return;
      case kIq2S:
        b[2 + at.eight] = low, b[34 + at.eight] = static_cast<uint8_t>(code.signs);
        return set_byte_bits(b + 66 + at.part, 2 * at.run, 2, code.entry >> 8);
      case kIq3Xxs:
        b[2 + at.entry] = low;
        return set_bits(b + 66 + 4 * at.part, 7 * at.run + 4 * at.second, at.second ? 3 : 4,
                        at.second ? code.signs & 7 : code.signs);
      case kIq3S:
        b[2 + at.entry] = low;
        set_byte_bits(b + 66 + at.part, at.entry % 8, 1, code.entry >> 8);
        return set_byte_bits(b + 74 + at.eight, 4 * at.second, 4, code.signs);
      default: return set_byte_bits(b + at.byte, 4 * at.high, 4, code.entry);
    }
  }

 private:
  // Where a code is: its block, and in that its number and those of what has its eight weights.
  struct Places {
    int64_t start, entry, eight, part, run, second, byte, high;
    Places(const IQuant& format, int64_t index) {
      const int64_t column = index * format.size(), in_block = column % format.block();
      start = column / format.block() * format.block_bytes();
      entry = in_block / format.size(), eight = in_block / 8, part = in_block / 32, run = eight % 4;
      second = in_block % 8 / 4;
      byte = (format.type == kIq4Nl ? 2 : 8) + 16 * part + in_block % 16, high = in_block % 32 / 16;
    }
  };

  // Of eight signs seven are stored: those with a minus are even in number.
  static int with_parity(int seven) {
    return seven | __builtin_parity(static_cast<unsigned>(seven)) << 7;
  }
};

}  // namespace
}  // namespace rgexport
