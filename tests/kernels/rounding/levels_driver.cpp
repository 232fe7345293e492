// Calls every function of the library that chooses levels, and prints the bits of the results.
//
//   levels_driver LIBRARY
//
// The same numbers go in on every system and every processor, so the same bits must come out.
#include <cstdint>
#include <cstring>
#include <vector>

#include "load_library.h"

namespace {

constexpr int64_t kRows = 70, kColumns = 150, kGroup = 16,
                  kGroups = (kColumns + kGroup - 1) / kGroup;
constexpr int64_t kBlocks = 3, kBlock = 32;
constexpr float kTop = 15, kMiddle = 8;

template <class T>
void print(const char* name, const std::vector<T>& values) {
  std::printf("%s ", name);
  const auto* bytes = reinterpret_cast<const unsigned char*>(values.data());
  for (size_t i = 0; i < values.size() * sizeof(T); ++i) std::printf("%02x", bytes[i]);
  std::printf("\n");
}

// Numbers between -1 and 1, of 24 bits.
std::vector<float> random_numbers(int64_t count, uint32_t seed) {
  std::vector<float> numbers(count);
  for (float& x : numbers) {
    seed = seed * 1664525 + 1013904223;
    x = static_cast<float>(static_cast<int32_t>(seed) >> 8) * 0x1p-23f;
  }
  return numbers;
}

// Xᵀ X of random numbers.
std::vector<double> positive_matrix() {
  constexpr int64_t kSamples = 2 * kColumns;
  const std::vector<float> x = random_numbers(kSamples * kColumns, 7);
  std::vector<double> h(kColumns * kColumns);
  for (int64_t s = 0; s < kSamples; ++s)
    for (int64_t i = 0; i < kColumns; ++i)
      for (int64_t j = 0; j < kColumns; ++j)
        h[i * kColumns + j] += double{x[s * kColumns + i]} * double{x[s * kColumns + j]};
  return h;
}

using Search = void(const float*, const float*, int64_t, int64_t, int64_t, int, int, int, float*,
                    float*, uint8_t*);
using Factor = int(double*, int64_t, float*, float*);
using Feedback = void(const float*, int64_t, int64_t, int64_t, float, const float*, const float*,
                      const float*, const float*, const float*, uint8_t*, double*);
using Loss = void(const float*, int64_t, int64_t, int64_t, float, const float*, const float*,
                  const float*, const float*, const float*, const uint8_t*, double*);
using Refine = void(const float*, int64_t, int64_t, int64_t, float, float*, float*, const float*,
                    const float*, int, const float*, int, uint8_t*);

using ChooseCodes = void(int, const float*, int, const float*, int64_t, int64_t, int64_t, int64_t,
                         const float*, const float*, const float*, uint8_t*);

void search_scales(const LoadedLibrary& library) {
  const std::vector<float> weights = random_numbers(kRows * kBlocks * kBlock, 1);
  std::vector<float> scales(kRows * kBlocks, 1 / kMiddle), zeros(scales.size(), kMiddle);
  std::vector<uint8_t> levels(weights.size());
  library.get<Search>("rgexport_search")(weights.data(), nullptr, kRows, kBlocks, kBlock, 4, 1, 1,
                                         scales.data(), zeros.data(), levels.data());
  print("scales", scales);
  print("searched", levels);
}

void choose_levels(const LoadedLibrary& library) {
  const std::vector<float> weights = random_numbers(kRows * kColumns, 2);
  std::vector<float> scale(kRows * kGroups, 1 / kMiddle), offset(scale.size(), -1);
  const std::vector<float> zeros(scale.size(), kMiddle);
  std::vector<double> h = positive_matrix(), losses(kRows);
  const std::vector<float> single(h.begin(), h.end());
  std::vector<float> m(h.size()), d(kColumns);
  std::vector<uint8_t> levels(weights.size());
  if (library.get<Factor>("rgexport_factor")(h.data(), kColumns, m.data(), d.data()))
    fail("the matrix is not positive");
  library.get<Feedback>("rgexport_feedback")(weights.data(), kRows, kColumns, kGroup, kTop,
                                             scale.data(), offset.data(), nullptr, m.data(),
                                             d.data(), levels.data(), losses.data());
  print("m", m);
  print("fed_back", levels);
  print("losses", losses);
  library.get<Refine>("rgexport_refine")(weights.data(), kRows, kColumns, kGroup, kTop,
                                         scale.data(), offset.data(), nullptr, zeros.data(), 1,
                                         single.data(), 2, levels.data());
  library.get<Loss>("rgexport_loss")(weights.data(), kRows, kColumns, kGroup, kTop, scale.data(),
                                     offset.data(), nullptr, m.data(), d.data(), levels.data(),
                                     losses.data());
  print("refined", levels);
  print("refined_scale", scale);
  print("refined_losses", losses);
}

void choose_codes(const LoadedLibrary& library) {
  constexpr int kIq3Xxs = 18, kEntries = 256, kBlockBytes = 98;
  constexpr int64_t kWide = 256, kFirst = 64, kCount = 128;
  const std::vector<float> weights = random_numbers(kRows * kWide, 3),
                           book = random_numbers(4 * kEntries, 4);
  const std::vector<float> m(kCount * kCount), d(kCount, 1);
  std::vector<float> h(kCount * kCount);
  for (int64_t i = 0; i < kCount; ++i) h[i * kCount + i] = 1;
  std::vector<uint8_t> packed(kRows * kBlockBytes, 0x35);
  library.get<ChooseCodes>("rgexport_codebook")(kIq3Xxs, book.data(), kEntries, weights.data(),
                                                kRows, kWide, kFirst, kCount, m.data(), d.data(),
                                                h.data(), packed.data());
  print("codes", packed);
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 2) fail("usage: levels_driver LIBRARY");
  const LoadedLibrary library(arguments[1]);
  search_scales(library);
  choose_levels(library);
  choose_codes(library);
  return 0;
}
