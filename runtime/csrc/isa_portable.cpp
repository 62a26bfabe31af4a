// Any little-endian machine: the compiler's generic vectors, lowered to what the target has.
#include "block.h"

namespace moepack {
namespace {

typedef uint32_t Words __attribute__((vector_size(64)));
typedef int32_t SignedWords __attribute__((vector_size(64)));
typedef float FloatWords __attribute__((vector_size(64)));

struct Portable {
  using Codes = Words;  // the four inputs of a row in one word
  using Ints = SignedWords;
  using Partial = Ints;
  using Floats = FloatWords;
  static constexpr int kTokens = 1, kByteTokens = 4;
  static constexpr bool kExpands = true;
  template <Scheme> static constexpr int own_cols() { return 0; }

  template <class T> static MOEPACK_INLINE T load_as(const void* p) {
    T v;
    memcpy(&v, p, sizeof v);
    return v;
  }

  static MOEPACK_INLINE Codes load(const uint8_t* p) { return load_as<Codes>(p); }
  static MOEPACK_INLINE void store_codes(uint8_t* p, Codes c) { memcpy(p, &c, 64); }
  template <int SHIFT, int MASK> static MOEPACK_INLINE Codes field(Codes c) {
    return c >> SHIFT & MASK * 0x01010101u;
  }
  static MOEPACK_INLINE Codes merge(Codes a, Codes b) { return a | b; }
  // The upper two bits of bytes of a, b and c, as six bits with those of a lowest.
  static MOEPACK_INLINE Codes tops(Codes a, Codes b, Codes c) {
    return field<6, 3>(a) | field<4, 12>(b) | field<2, 48>(c);
  }

  // By the bits of a code: each halves the levels that are left to choose from.
  static MOEPACK_INLINE Codes levels(Codes c) {
    Words left[8];
    for (int i = 0; i < 8; ++i) left[i] = Words{} + kLevels[i] * 0x01010101u;
    for (int count = 4; count > 0; count /= 2, c >>= 1)
      for (int i = 0; i < count; ++i) {
        Words one = (c & 0x01010101u) * 255;
        left[i] = (left[2 * i] & ~one) | (left[2 * i + 1] & one);
      }
    return left[0];
  }

  static MOEPACK_INLINE Partial zero_partial() { return Ints{}; }
  static MOEPACK_INLINE Partial dot(Partial sum, Codes c, const int8_t* x) {
    for (int j = 0; j < 4; ++j) sum += (Ints)(c >> 8 * j & 255) * int32_t{x[j]};
    return sum;
  }
  template <int> static constexpr int partial_quads() { return 8; }
  static MOEPACK_INLINE Ints widen(Partial p) { return p; }
  static MOEPACK_INLINE Ints dot_wide(Ints sum, Codes c, const int8_t* x) { return dot(sum, c, x); }

  static MOEPACK_INLINE Ints zero_ints() { return Ints{}; }
  static MOEPACK_INLINE Ints sub_ints(Ints a, Ints b) { return a - b; }
  static MOEPACK_INLINE Ints shift_right(Ints v, int n) { return v >> n; }
  static MOEPACK_INLINE Ints shift_left_4(Ints v) { return v << 4; }
  static MOEPACK_INLINE Ints mul_add_16(Ints sum, Ints a, Ints b) { return sum + a * b; }
  static MOEPACK_INLINE Ints set_low16(int32_t x) { return Ints{} + x; }
  static MOEPACK_INLINE Ints set_int(int32_t x) { return Ints{} + x; }
  static MOEPACK_INLINE Ints mul_add_32(Ints sum, Ints a, Ints b) { return sum + a * b; }
  static MOEPACK_INLINE Ints load_u8(const uint8_t* p) {
    Ints v;
    for (int i = 0; i < 16; ++i) v[i] = p[i];
    return v;
  }
  static MOEPACK_INLINE Ints load_i8(const uint8_t* p) { return load_u8(p) << 24 >> 24; }
  template <int SHIFT, int MASK> static MOEPACK_INLINE Ints field_int(Ints v) {
    return v >> SHIFT & MASK;
  }

  static MOEPACK_INLINE Floats zero() { return Floats{}; }
  static MOEPACK_INLINE Floats set(float x) { return Floats{} + x; }
  static MOEPACK_INLINE Floats add(Floats a, Floats b) { return a + b; }
  static MOEPACK_INLINE Floats sub(Floats a, Floats b) { return a - b; }
  static MOEPACK_INLINE Floats mul(Floats a, Floats b) { return a * b; }
  // Two roundings: one would be a library call where the machine has no such instruction.
  static MOEPACK_INLINE Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }
  static MOEPACK_INLINE Floats to_floats(Ints v) { return __builtin_convertvector(v, Floats); }
  template <int J> static MOEPACK_INLINE Floats byte(Codes c) {
    return to_floats((Ints)(c >> 8 * J & 255));
  }
  static MOEPACK_INLINE Floats load_f16(const uint8_t* p) {
    Words v;
    for (int i = 0; i < 16; ++i) v[i] = uint32_t{p[2 * i]} | uint32_t{p[2 * i + 1]} << 8;
    return halves_to_floats(v);
  }
  static MOEPACK_INLINE Floats load_f32(const uint8_t* p) { return load_as<Floats>(p); }
  static MOEPACK_INLINE void store(float* p, Floats v) { memcpy(p, &v, 64); }

  static MOEPACK_INLINE Floats f32(Codes c) { return (Floats)c; }
  static MOEPACK_INLINE void bf16_pair(Codes c, Floats& even, Floats& odd) {
    even = (Floats)(c << 16), odd = (Floats)(c & 0xFFFF0000u);
  }
  static MOEPACK_INLINE void f16_pair(Codes c, Floats& even, Floats& odd) {
    even = halves_to_floats(c & 0xFFFF), odd = halves_to_floats(c >> 16);
  }

  // Multiplying by 2^112 moves the exponent's bias and makes denormals normal.
  static MOEPACK_INLINE Floats halves_to_floats(Words half) {
    Words magnitude = (half & 0x7FFF) << 13, sign = (half & 0x8000) << 16;
    Words value = (Words)((Floats)magnitude * 0x1p112f);
    Words special = (Words)((half & 0x7C00) == 0x7C00);  // infinity or NaN: all ones
    return (Floats)((special & (magnitude | 0x7F800000)) | (~special & value) | sign);
  }
};

bool supported() { return true; }

}  // namespace

extern constexpr Kernels kPortable = make_kernels<Portable>("portable", supported);

}  // namespace moepack
