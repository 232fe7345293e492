// QuantLinear, QuantLinear2 and QuantLinear3 in double, with activations rounded to digits of int8;
// and TwoLevelLinear as the QuantLinear of its unpacked levels.
#include "oracles.h"

namespace fuzz {
namespace {

struct Format {
  int64_t columns, bits, block, digits, blocks;
};

struct Matrix {
  int64_t rows;
  const Array &data, &scales, &zero_points, &bias;
};

int matrices_of(const Question& q) {
  return q.op == "QuantLinear" ? 1 : q.op == "QuantLinear2" ? 2 : 3;
}

Format format_of(const Question& q) {
  Format f = {q.integer("K", 0), q.integer("bits", 4), q.integer("block_size", 32),
              q.integer("digits", 1), 0};
  const bool known = f.columns > 0 && f.block > 0 && f.columns < 1 << 30;
  f.blocks = known ? (f.columns + f.block - 1) / f.block : 0;
  return f;
}

Matrix matrix_of(const Question& q, int i) {
  constexpr const char* kRows[] = {"N", "N2", "N3"};
  const int of = matrices_of(q);
  return {q.integer(kRows[i], 0), q.input(1 + i), q.input(1 + of + i), q.input(1 + 2 * of + i),
          q.input(1 + 3 * of + i)};
}

// For each block of each row, flat or not.
bool is_per_row(const Array& array, ElementType type, int64_t rows, int64_t count) {
  return array.is(type, {rows, count}) || array.is(type, {rows * count});
}

bool fits(const Format& f, const Matrix& m) {
  if (m.rows < 1 || m.rows > 1 << 20) return false;
  const int64_t packed = (f.blocks * f.bits + 7) / 8;
  return m.data.is(stand_in::kUint8, {m.rows, f.blocks, f.block * f.bits / 8}) &&
         (is_per_row(m.scales, stand_in::kFloat, m.rows, f.blocks) ||
          is_per_row(m.scales, stand_in::kFloat16, m.rows, f.blocks)) &&
         (!m.zero_points.given || is_per_row(m.zero_points, stand_in::kUint8, m.rows, packed)) &&
         (!m.bias.given || m.bias.is(stand_in::kFloat, {m.rows}));
}

constexpr int kDigit = 254;  // of the next digit's scale

// A row of activations: codes, and a scale for each block. Two digits are one code, in the scale of
// the second; where that lies next to a half, another order of rounding may find its neighbour.
struct Rounded {
  std::vector<int> codes;
  std::vector<bool> uncertain;
  std::vector<float> scales, first_scales;
  bool finite = true;

  Rounded(const Format& f, const float* x)
      : codes(f.blocks * f.block), uncertain(codes.size()), scales(f.blocks),
        first_scales(f.blocks) {
    for (int64_t b = 0; b < f.blocks; ++b) {
      const int64_t first = b * f.block, last = std::min(first + f.block, f.columns);
      float most = 0;
      for (int64_t k = first; k < last; ++k) {
        finite &= std::isfinite(x[k]);
        most = std::fmax(most, std::fabs(x[k]));
      }
      first_scales[b] = most / 127.0f;
      scales[b] = f.digits == 2 ? first_scales[b] / kDigit : first_scales[b];
      const float inverse = most >= 0x1p-118f ? 127.0f / most : 0.0f;
      for (int64_t k = first; finite && k < last; ++k) {
        const float code = std::nearbyint(x[k] * inverse);
        codes[k] = static_cast<int>(code);
        if (f.digits == 2) add_digit(k, std::fma(-code, first_scales[b], x[k]) * inverse * kDigit);
      }
    }
  }

  void add_digit(int64_t k, float second) {
    const float code = std::nearbyint(second);
    codes[k] = kDigit * codes[k] + static_cast<int>(code);
    uncertain[k] = std::fabs(second - code) > 0.48f;
  }
};

int level_at(const Format& f, const Array& packed, int64_t row, int64_t index, int64_t row_bytes) {
  const uint8_t* bytes = packed.bytes.data() + row * row_bytes;
  return f.bits == 8 ? bytes[index] : bytes[index / 2] >> (index % 2 * 4) & 15;
}

// Output `n` for one row of activations; true if the kernel's number is right.
bool is_right(const Format& f, const Matrix& m, int64_t n, const Rounded& x, bool in_bfloat16,
              float found, double& expected, double& room) {
  expected = m.bias.given ? m.bias.floats[n] : 0.0;
  room = std::fabs(expected) * 1e-6 + 1e-44;
  bool loose = false, finite = true;
  const int middle = 1 << (f.bits - 1);
  for (int64_t b = 0; b < f.blocks; ++b) {
    const float scale = m.scales.floats[n * f.blocks + b];
    const double unit = static_cast<double>(scale) * x.scales[b];
    finite &= std::isfinite(scale);
    int zero = middle;
    if (m.zero_points.given) zero = level_at(f, m.zero_points, n, b, (f.blocks * f.bits + 7) / 8);
    int64_t dot = 0, exact = 0, parts = 0, uncertain = 0;
    for (int64_t k = b * f.block; k < (b + 1) * f.block; ++k) {
      const int level = level_at(f, m.data, n, k, f.blocks * f.block * f.bits / 8);
      dot += (level - zero) * x.codes[k];
      exact += std::abs((level - zero) * x.codes[k]);
      parts += (level + zero + 2 * middle) * std::abs(x.codes[k]);
      if (x.uncertain[k]) uncertain += std::abs(level - zero);
    }
    expected += unit * static_cast<double>(dot);
    // The sum of the sizes of all that is added, times what one rounding may lose.
    room += std::fabs(unit) * (in_bfloat16 ? 0x1p-7 * exact : 2e-6 * parts) + 0x1p-120;
    room += std::fabs(unit) * static_cast<double>(uncertain);
    // AMX's products of bfloat16 know no denormal numbers.
    if (in_bfloat16)
      room += f.block * (std::fabs(scale) * 255 + x.first_scales[b] * 127.0) * 0x1p-125;
    const double most = std::fabs(scale) * 512.0;
    loose |= most > kLarge || x.first_scales[b] * 65536.0 > kLarge ||
             most * x.first_scales[b] * 65536.0 > kLarge;
  }
  if (!x.finite) return std::isnan(found);
  if (!finite) return !std::isfinite(found);
  return is_near(found, expected, room, loose);
}

}  // namespace

bool is_sound_linear(const Question& q) {
  const Format f = format_of(q);
  const Array& x = q.input(0);
  const bool power = f.block >= 16 && f.block <= 256 && !(f.block & (f.block - 1));
  const bool digits = f.digits == 1 || (f.digits == 2 && f.bits == 8);
  if (f.columns < 1 || (f.bits != 4 && f.bits != 8) || !digits || !power || !x.given ||
      x.type != stand_in::kFloat || x.dims.empty() || x.dims.back() != f.columns)
    return false;
  for (int i = 0; i < matrices_of(q); ++i)
    if (!fits(f, matrix_of(q, i))) return false;
  return true;
}

std::string judge_linear(const Question& q, const std::vector<Array>& outputs) {
  const Format f = format_of(q);
  const Array& x = q.input(0);
  const int64_t count = x.size() / f.columns;
  constexpr int64_t kMostSeveral = 8;  // rows whose sums are exact, also on AMX
  const bool in_bfloat16 = q.in_bfloat16 && f.block < 64 && count > kMostSeveral;
  for (int i = 0; i < matrices_of(q); ++i) {
    const Matrix m = matrix_of(q, i);
    Dims dims = x.dims;
    dims.back() = m.rows;
    if (outputs[i].dims != dims) return "y has another shape";
  }
  for (int64_t row = 0; row < count; ++row) {
    const Rounded rounded(f, x.floats.data() + row * f.columns);
    for (int i = 0; i < matrices_of(q); ++i) {
      const Matrix m = matrix_of(q, i);
      for (int64_t n = 0; n < m.rows; ++n) {
        double expected, room;
        const float found = outputs[i].floats[row * m.rows + n];
        if (!is_right(f, m, n, rounded, in_bfloat16, found, expected, room))
          return wrong_at("y", row * m.rows + n, found, expected, room);
      }
    }
  }
  return "";
}

namespace {

// The bytes that a tile is unpacked to.
int64_t tile_of(int bits, int64_t columns, int64_t block) {
  if (bits == 4) return block / 2;
  const int64_t bytes = bits <= 4 ? columns / 2 : columns;
  const int64_t most[] = {128, 256, 0, 512, 256};
  int64_t tile = 1;
  while (tile < most[bits - 2] && bytes % (2 * tile) == 0) tile *= 2;
  return tile;
}

// Level `k` of a row in tiles of `units` unpacked bytes, see rgexport/quantize/schemes/two_level.py.
int two_level_at(const uint8_t* row, int bits, int64_t units, int64_t k) {
  const int64_t byte = bits <= 4 ? k / 2 : k, unit = byte % units;
  row += byte / units * units * bits / (bits <= 4 ? 4 : 8);
  const int half = bits <= 4 ? k % 2 * 4 : 0;
  const auto field = [&](int64_t start, int groups, int step, int mask) {
    const int64_t share = units / groups;
    return row[start + unit % share] >> (unit / share * step + half) & mask;
  };
  switch (bits) {
    case 2: return field(0, 2, 2, 3);
    case 3: return field(0, 2, 2, 3) | field(units / 2, 4, 1, 1) << 2;
    case 4: return field(0, 1, 0, 15);
    case 5: return field(0, 2, 4, 15) | field(units / 2, 8, 1, 1) << 4;
    default: return field(0, 2, 4, 15) | field(units / 2, 4, 2, 3) << 4;
  }
}

// The same question of QuantLinear; one without inputs if the parts do not fit.
Question unpacked(const Question& q) {
  const int bits = q.op.back() - '0', width = bits <= 4 ? 4 : 8;
  Question same = q;
  same.op = "QuantLinear";
  same.integers["bits"] = width;
  same.integers.erase("digits");
  same.inputs = {};
  const Format f = format_of(same);
  const Array &planes = q.input(1), &codes = q.input(2), &units = q.input(3);
  const int64_t rows = q.integer("N", 0), columns = f.blocks * f.block, runs = (f.blocks + 15) / 16;
  const int64_t tile = columns < 1 ? 1 : tile_of(bits, columns, f.block);
  if (f.block < 16 || f.block > 256 || columns > 1 << 20 || rows < 1 || rows > 1 << 20 ||
      !planes.is(stand_in::kUint8, {rows, columns * width / 8 / tile, tile * bits / width}) ||
      !is_per_row(codes, static_cast<ElementType>(3), rows, f.blocks) ||
      !units.is(stand_in::kFloat16, {rows, runs}))
    return same;
  Array data, scales;
  data.given = scales.given = true;
  data.type = stand_in::kUint8;
  data.dims = {rows, f.blocks, f.block * width / 8};
  data.bytes.assign(rows * columns * width / 8, 0);
  scales.dims = {rows, f.blocks};
  for (int64_t n = 0; n < rows; ++n) {
    for (int64_t b = 0; b < f.blocks; ++b) {
      const auto code = static_cast<int8_t>(codes.bytes[n * f.blocks + b]);
      scales.floats.push_back(code * units.floats[n * runs + b / 16]);
    }
    for (int64_t k = 0; k < columns; ++k) {
      const int level = two_level_at(planes.bytes.data() + n * columns * bits / 8, bits, tile, k);
      const int raised = level + (1 << (width - 1)) - (1 << (bits - 1));
      const int64_t at = n * columns + k;
      if (width == 8)
        data.bytes[at] = raised;
      else
        data.bytes[at / 2] |= raised << (at % 2 * 4);
    }
  }
  same.inputs = {q.input(0), data, scales, Array(), q.input(4)};
  return same;
}

}  // namespace

bool is_sound_two_level(const Question& q) { return is_sound_linear(unpacked(q)); }

std::string judge_two_level(const Question& q, const std::vector<Array>& outputs) {
  return judge_linear(unpacked(q), outputs);
}

}  // namespace fuzz
