// What a model does between its matrices, compiled for each instruction set: element by element,
// sums, softmax. Sums run in 16 lanes that are added at the end.
#pragma once
#include "lanes.h"

namespace moepack {
namespace {

// The numbers are those of tape/lower.py.
enum Unary {
  COPY, NEG, ABS, SQUARE, SQRT, RSQRT, RECIPROCAL, EXP, LOG, SIN, COS, TANH, SIGMOID, SILU, GELU,
  GELU_TANH, RELU, SOFTPLUS, CLAMP, FILL
};
enum Binary { ADD, SUB, MUL, DIV, MAXIMUM, MINIMUM };

// `out` may be `a` itself, but they never overlap in part: so says ivdep, without which nothing
// vectorizes.
template <class F>
MOEPACK_INLINE void map(const float* a, int64_t sa, float* out, int64_t so, int64_t n, F f) {
  if (sa == 1 && so == 1) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) out[i] = f(a[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) out[i * so] = f(a[i * sa]);
  }
}

void unary(int kind, const double* scalar, const float* a, int64_t sa, float* out, int64_t so,
           int64_t n) {
  auto run = [&](auto f) MOEPACK_LAMBDA { map(a, sa, out, so, n, f); };
  float low = static_cast<float>(scalar[0]), high = static_cast<float>(scalar[1]);
  switch (kind) {
    case COPY: return run([](float x) MOEPACK_LAMBDA { return x; });
    case NEG: return run([](float x) MOEPACK_LAMBDA { return -x; });
    case ABS: return run([](float x) MOEPACK_LAMBDA { return fabsf(x); });
    case SQUARE: return run([](float x) MOEPACK_LAMBDA { return x * x; });
    case SQRT: return run([](float x) MOEPACK_LAMBDA { return sqrtf(x); });
    case RSQRT: return run([](float x) MOEPACK_LAMBDA { return 1.0f / sqrtf(x); });
    case RECIPROCAL: return run([](float x) MOEPACK_LAMBDA { return 1.0f / x; });
    case EXP: return run([](float x) { return expf(x); });
    case LOG: return run([](float x) { return logf(x); });
    case SIN: return run([](float x) { return sinf(x); });
    case COS: return run([](float x) { return cosf(x); });
    case TANH: return run([](float x) { return tanhf(x); });
    case SIGMOID: return run([](float x) MOEPACK_LAMBDA { return 1.0f / (1.0f + exp_lane(-x)); });
    case SILU: return run([](float x) MOEPACK_LAMBDA { return x / (1.0f + exp_lane(-x)); });
    case GELU: return run([](float x) { return 0.5f * x * (1.0f + erff(x * 0.707106781f)); });
    case GELU_TANH:
      return run([](float x) MOEPACK_LAMBDA {
        return 0.5f * x * (1.0f + tanh_lane(0.797884561f * (x + 0.044715f * x * x * x)));
      });
    case RELU: return run([](float x) MOEPACK_LAMBDA { return x < 0.0f ? 0.0f : x; });
    case SOFTPLUS: return run([](float x) { return x > 20.0f ? x : log1pf(expf(x)); });
    case CLAMP:
      return run([=](float x) MOEPACK_LAMBDA {
        x = x < low ? low : x;
        return x > high ? high : x;
      });
    case FILL: return run([=](float) MOEPACK_LAMBDA { return low; });
  }
}

template <class F>
MOEPACK_INLINE void map2(const float* a, int64_t sa, const float* b, int64_t sb, float* out,
                         int64_t so, int64_t n, F f) {
  if (so == 1 && sa == 1 && sb == 1) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) out[i] = f(a[i], b[i]);
  } else if (so == 1 && sa == 1 && sb == 0) {
    float same = b[0];
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) out[i] = f(a[i], same);
  } else {
    for (int64_t i = 0; i < n; ++i) out[i * so] = f(a[i * sa], b[i * sb]);
  }
}

void binary(int kind, const float* a, int64_t sa, const float* b, int64_t sb, float* out, int64_t so,
            int64_t n) {
  auto run = [&](auto f) MOEPACK_LAMBDA { map2(a, sa, b, sb, out, so, n, f); };
  switch (kind) {
    case ADD: return run([](float x, float y) MOEPACK_LAMBDA { return x + y; });
    case SUB: return run([](float x, float y) MOEPACK_LAMBDA { return x - y; });
    case MUL: return run([](float x, float y) MOEPACK_LAMBDA { return x * y; });
    case DIV: return run([](float x, float y) MOEPACK_LAMBDA { return x / y; });
    // A NaN on either side is the result, as in torch.
    case MAXIMUM: return run([](float x, float y) MOEPACK_LAMBDA { return x > y || x != x ? x : y; });
    case MINIMUM: return run([](float x, float y) MOEPACK_LAMBDA { return x < y || x != x ? x : y; });
  }
}

MOEPACK_INLINE float add_lanes(float* lanes) {
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

float sum(const float* a, int64_t n) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int j = 0; j < kLanes; ++j) lanes[j] += a[i + j];
  for (int j = 0; i < n; ++i, ++j) lanes[j] += a[i];
  return add_lanes(lanes);
}

// 16 numbers as floats.
template <class V> MOEPACK_INLINE typename V::Floats load_floats(const float* p) {
  return V::load_f32(reinterpret_cast<const uint8_t*>(p));
}
template <class V> MOEPACK_INLINE typename V::Floats load_floats(const uint16_t* p) {
  return V::load_f16(reinterpret_cast<const uint8_t*>(p));
}

// Up to 16 of them; `room` is for those that are not floats already.
template <class V> MOEPACK_INLINE const float* last_floats(const float* p, int64_t, float*) {
  return p;
}
template <class V>
MOEPACK_INLINE const float* last_floats(const uint16_t* p, int64_t n, float* room) {
  uint16_t padded[kLanes] = {};
  memcpy(padded, p, static_cast<size_t>(n) * 2);
  V::store(room, load_floats<V>(padded));
  return room;
}

template <class V> float dot(const float* a, const float* b, int64_t n) {
  typename V::Floats sums[2] = {V::zero(), V::zero()};  // an addition need not wait for the last
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes)
    for (int h = 0; h < 2; ++h)
      sums[h] = V::fma(load_floats<V>(a + i + h * kLanes), load_floats<V>(b + i + h * kLanes),
                       sums[h]);
  float lanes[kLanes];
  V::store(lanes, V::add(sums[0], sums[1]));
  for (; i < n; i += kLanes)
    for (int64_t j = 0; j < kLanes && i + j < n; ++j) lanes[j] += a[i + j] * b[i + j];
  return add_lanes(lanes);
}

// T: float, or uint16_t for float16.
template <class V, class T> void add_scaled(const T* a, float scale, float* out, int64_t n) {
  typename V::Floats s = V::set(scale);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    V::store(out + i, V::fma(load_floats<V>(a + i), s, load_floats<V>(out + i)));
  if (i == n) return;
  float room[kLanes];
  const float* last = last_floats<V>(a + i, n - i, room);
  for (int64_t j = 0; i + j < n; ++j) out[i + j] += scale * last[j];
}

// Rounds to nearest, ties to even. 65520 is the first number that would become infinity.
bool to_half(const float* a, int64_t n, uint16_t* out) {
  int32_t fits = 1;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    // Unsigned, as numbers that do not fit may wrap around.
    uint32_t bits = static_cast<uint32_t>(float_bits(a[i])), size = bits & 0x7FFFFFFF;
    fits &= size < 0x477FF000;
    uint32_t normal = (size + 0xFFF + (size >> 13 & 1) - (112u << 23)) >> 13;
    // Below 2^-14: adding 0.5 leaves the number in units of 2^-24.
    float low = bits_float(static_cast<int32_t>(size)) + 0.5f;
    uint32_t small = static_cast<uint32_t>(float_bits(low)) - 0x3F000000;
    out[i] = static_cast<uint16_t>((size < 0x38800000 ? small : normal) | (bits >> 16 & 0x8000));
  }
  return fits != 0;
}

void softmax(const float* a, int64_t n, float* out) {
  float lanes[kLanes];
  for (int j = 0; j < kLanes; ++j) lanes[j] = a[0];
  auto larger = [](float x, float most) MOEPACK_LAMBDA { return x > most || x != x ? x : most; };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int j = 0; j < kLanes; ++j) lanes[j] = larger(a[i + j], lanes[j]);
  for (int j = 0; i < n; ++i, ++j) lanes[j] = larger(a[i], lanes[j]);
  float most = lanes[0];
  for (float lane : lanes) most = larger(lane, most);
  map(a, 1, out, 1, n, [=](float x) MOEPACK_LAMBDA { return exp_lane(x - most); });
  float total = sum(out, n);
  for (int64_t k = 0; k < n; ++k) out[k] /= total;
}

}  // namespace
}  // namespace moepack
