// What a fuzzer's input says, byte by byte; zeros after its end.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fuzz {

class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : at_(data), end_(data + size) {}

  uint8_t next() { return at_ < end_ ? *at_++ : 0; }
  // A number of 0 … count - 1, of one byte or, for large counts, two.
  int64_t below(int64_t count) {
    const int64_t low = next();
    return (count > 256 ? low + 256 * next() : low) % count;
  }
  bool one_in(int64_t count) { return next() % count == count - 1; }
  template <class T, size_t kCount>
  const T& one_of(const T (&all)[kCount]) {
    return all[next() % kCount];
  }

 private:
  const uint8_t *at_, *end_;
};

}  // namespace fuzz
