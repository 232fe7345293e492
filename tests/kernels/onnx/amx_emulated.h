// The tile instructions that quant_matmul_amx.cpp uses, in plain C++: included before it with
// -include. What a processor would refuse ends the program.
//
// Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2: LDTILECFG, STTILECFG,
// TILELOADD, TILESTORED, TILEZERO, TILERELEASE, TDPBSSD, TDPBF16PS.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace amx_emulated {

struct Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

struct State {
  Config config;
  uint8_t tiles[8][16][64];
};

inline State& state() {
  static thread_local State all;
  return all;
}

inline void require(bool holds) {
  if (!holds) std::abort();
}

inline void load_config(const void* memory) {
  State& s = state();
  std::memset(&s, 0, sizeof s);
  std::memcpy(&s.config, memory, sizeof s.config);
  require(s.config.palette == 1 && s.config.start_row == 0);
  for (const uint8_t byte : s.config.reserved) require(byte == 0);
  for (int i = 0; i < 16; ++i) {
    require(s.config.rows[i] <= 16 && s.config.row_bytes[i] <= 64);
    require((s.config.rows[i] == 0) == (s.config.row_bytes[i] == 0));
    require(i < 8 || s.config.rows[i] == 0);
  }
}

inline void store_config(void* memory) { std::memcpy(memory, &state().config, sizeof(Config)); }

inline void release() { std::memset(&state(), 0, sizeof(State)); }

inline void require_tile(int tile) { require(state().config.palette == 1 && state().config.rows[tile]); }

inline void zero(int tile) {
  require_tile(tile);
  std::memset(state().tiles[tile], 0, sizeof state().tiles[tile]);
}

inline void load(int tile, const void* memory, int64_t stride) {
  zero(tile);
  State& s = state();
  for (int r = 0; r < s.config.rows[tile]; ++r)
    std::memcpy(s.tiles[tile][r], static_cast<const uint8_t*>(memory) + r * stride,
                s.config.row_bytes[tile]);
}

inline void store(int tile, void* memory, int64_t stride) {
  require_tile(tile);
  const State& s = state();
  for (int r = 0; r < s.config.rows[tile]; ++r)
    std::memcpy(static_cast<uint8_t*>(memory) + r * stride, s.tiles[tile][r],
                s.config.row_bytes[tile]);
}

inline void require_factors(int sums, int x, int y) {
  require_tile(sums), require_tile(x), require_tile(y);
  const Config& c = state().config;
  require(c.rows[sums] == c.rows[x] && c.row_bytes[sums] == c.row_bytes[y]);
  require(c.row_bytes[x] == 4 * c.rows[y] && c.row_bytes[sums] % 4 == 0);
}

// sums [m, n] += Σ_k x[m, k] · y[k, n], four consecutive k in a row of y: both with a sign.
inline void dot_signed(int sums, int x, int y) {
  require_factors(sums, x, y);
  State& s = state();
  const Config& c = s.config;
  for (int m = 0; m < c.rows[sums]; ++m) {
    int32_t row[16];
    std::memcpy(row, s.tiles[sums][m], 64);
    for (int k = 0; k < c.row_bytes[x]; ++k) {
      const int32_t factor = static_cast<int8_t>(s.tiles[x][m][k]);
      for (int n = 0; n < c.row_bytes[sums] / 4; ++n)
        row[n] += factor * static_cast<int8_t>(s.tiles[y][k / 4][4 * n + k % 4]);
    }
    std::memcpy(s.tiles[sums][m], row, 64);
  }
}

inline float bfloat16(const uint8_t* at) {
  uint32_t bits = 0;
  std::memcpy(reinterpret_cast<uint8_t*>(&bits) + 2, at, 2);
  float number;
  std::memcpy(&number, &bits, 4);
  return number;
}

// The same for bfloat16, two consecutive k in a row of y.
inline void dot_bfloat16(int sums, int x, int y) {
  require_factors(sums, x, y);
  State& s = state();
  const Config& c = s.config;
  for (int m = 0; m < c.rows[sums]; ++m) {
    float row[16];
    std::memcpy(row, s.tiles[sums][m], 64);
    for (int k = 0; k < c.row_bytes[x] / 2; ++k) {
      const float factor = bfloat16(s.tiles[x][m] + 2 * k);
      for (int n = 0; n < c.row_bytes[sums] / 4; ++n)
        row[n] += factor * bfloat16(s.tiles[y][k / 2] + 4 * n + k % 2 * 2);
    }
    std::memcpy(s.tiles[sums][m], row, 64);
  }
}

}  // namespace amx_emulated

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbssd
#undef _tile_dpbf16ps
#define _tile_loadconfig(memory) amx_emulated::load_config(memory)
#define _tile_storeconfig(memory) amx_emulated::store_config(memory)
#define _tile_release() amx_emulated::release()
#define _tile_zero(tile) amx_emulated::zero(tile)
#define _tile_loadd(tile, memory, stride) amx_emulated::load(tile, memory, stride)
#define _tile_stored(tile, memory, stride) amx_emulated::store(tile, memory, stride)
#define _tile_dpbssd(sums, x, y) amx_emulated::dot_signed(sums, x, y)
#define _tile_dpbf16ps(sums, x, y) amx_emulated::dot_bfloat16(sums, x, y)
