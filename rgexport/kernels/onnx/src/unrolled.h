// Loops that exist at compile time only, so that arrays of vectors stay in registers.
#pragma once

#include <utility>

namespace rgexport {

template <class Body, int... kIndex>
[[gnu::always_inline]] inline void unrolled(const Body& body,
                                            std::integer_sequence<int, kIndex...>) {
  (body(std::integral_constant<int, kIndex>()), ...);
}

// body(0) … body(kCount - 1); each index is a constant.
template <int kCount, class Body>
[[gnu::always_inline]] inline void unrolled(const Body& body) {
  unrolled(body, std::make_integer_sequence<int, kCount>());
}

}  // namespace rgexport
