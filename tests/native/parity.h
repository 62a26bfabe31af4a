// What the parity tests share: random operands of exactly the size that is asked for, so that the
// address sanitizer sees a read past their end, and comparisons that are counted.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "format.h"
#include "moepack.h"

namespace parity {

inline std::mt19937 generator(1);
inline int failures = 0;

enum class Part { floats, small, codes };  // small: scales and minima that are not floats

// Calls f(part, bytes) for what a packed matrix is made of, front to back.
template <class F> void each_part(int32_t scheme, int64_t rows, int64_t cols, F&& f) {
  using namespace moepack;
  const Format& format = kFormats[scheme];
  int64_t blocks = ceil_div(cols, kBlockCols), each = format.span / kBlockCols;
  int64_t starts = format.starts_below(blocks);
  for (int64_t tile = 0; tile < ceil_div(rows, kTileRows); ++tile) {
    if (format.raw()) {
      f(Part::floats, format.tile_nbytes(cols));
      continue;
    }
    f(Part::floats, format.head_nbytes());
    for (int64_t b = 0; b < starts; b += each) {
      // The second half of a super-block's head holds float16 minima, or fifth bits of scales.
      f(Part::floats, format.super_nbytes() / 2);
      f(format.levels() ? Part::small : Part::floats, format.super_nbytes() / 2);
      for (int64_t i = b; i < (b + each < starts ? b + each : blocks); ++i) {
        f(Part::codes, format.code_nbytes());
        f(Part::small, format.small_nbytes());
      }
      if (format.scale_bits == 16) f(Part::floats, 4 * kTileRows);
    }
  }
}

// A packed matrix whose codes and small scales take every value, or whose codes are all `code`;
// bytes below 0x3C are finite in every float format.
inline std::vector<uint8_t> random_packed(int32_t scheme, int64_t rows, int64_t cols,
                                          int code = -1) {
  std::vector<uint8_t> bytes(static_cast<size_t>(moepack_packed_nbytes(scheme, rows, cols)));
  uint8_t* at = bytes.data();
  each_part(scheme, rows, cols, [&](Part part, int64_t count) {
    bool fixed = part == Part::codes && code >= 0;
    for (int64_t i = 0; i < count; ++i)
      *at++ = static_cast<uint8_t>(fixed ? code : generator() % (part == Part::floats ? 0x3C : 256));
  });
  return bytes;
}

inline std::vector<float> random_floats(int64_t count) {
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(count));
  for (float& v : values) v = normal(generator);
  return values;
}

inline void check(bool good, const char* isa, const char* what, int which) {
  if (good) return;
  ++failures;
  std::printf("FAILED %s: %s, %d\n", isa, what, which);
}

// Sums in another order; of a single output, whose terms may cancel, they differ by more than 3e-6.
inline bool close(const std::vector<float>& a, const std::vector<float>& b,
                  double tolerance = 1e-5) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    difference += (a[i] - b[i]) * static_cast<double>(a[i] - b[i]);
    norm += b[i] * static_cast<double>(b[i]);
  }
  return std::sqrt(difference) <= tolerance * std::sqrt(norm);
}

template <class F> auto with_isa(const char* isa, F&& compute) {
  moepack_set_isa(isa);
  return compute();
}

// A recorded token's steps on this instruction set and on portable C++ (tape_parity.cpp).
void tape(const char* isa);

// What quantizers compute, likewise (solver_parity.cpp).
void solver(const char* isa);

}  // namespace parity
