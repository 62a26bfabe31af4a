// Functions of one float, written so that loops over 16 lanes vectorize.
#pragma once
#include <math.h>
#include <string.h>

#include "tile.h"

namespace moepack {
namespace {

constexpr int kLanes = 16;

// Adding 1.5 * 2^23 leaves the nearest integer in the low bits; ties go to even.
constexpr float kRound = 12582912.0f;
constexpr int32_t kRoundBits = 0x4B400000;

MOEPACK_INLINE int32_t float_bits(float x) {
  int32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

MOEPACK_INLINE float bits_float(int32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// exp within 2 units in the last place (Cody & Waite reduction, minimax polynomial on +-ln(2)/2).
MOEPACK_INLINE float exp_lane(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  float rounded = x * 1.44269504f + kRound;
  int32_t n = float_bits(rounded) - kRoundBits;
  float k = rounded - kRound;
  float r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // Unsigned, as NaN leaves garbage in n; p is NaN then and stays so.
  return p * bits_float(static_cast<int32_t>((static_cast<uint32_t>(n) + 127u) << 23));
}

MOEPACK_INLINE float tanh_lane(float x) { return 1.0f - 2.0f / (exp_lane(2.0f * x) + 1.0f); }

}  // namespace
}  // namespace moepack
