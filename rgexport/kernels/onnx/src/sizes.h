// Sizes that a model file tells: a product of them may be more than any number can be.
#pragma once

#include <cstdint>

namespace rgexport {

// How many there are; none, once a sum or a product of them was negative or too large.
class Size {
 public:
  constexpr Size(int64_t count) : count_(count < 0 ? kNone : count) {}

  constexpr bool fits() const { return count_ != kNone; }
  // Only of one that fits.
  constexpr int64_t count() const { return count_; }
  // Never of one that does not fit.
  constexpr bool is(int64_t count) const { return fits() && count_ == count; }

  friend Size operator*(Size a, Size b) {
    int64_t product;
    const bool good = a.fits() && b.fits() && !__builtin_mul_overflow(a.count_, b.count_, &product);
    return good ? Size(product) : Size(kNone);
  }
  friend Size operator+(Size a, Size b) {
    int64_t sum;
    const bool good = a.fits() && b.fits() && !__builtin_add_overflow(a.count_, b.count_, &sum);
    return good ? Size(sum) : Size(kNone);
  }

 private:
  static constexpr int64_t kNone = -1;
  int64_t count_;
};

}  // namespace rgexport
