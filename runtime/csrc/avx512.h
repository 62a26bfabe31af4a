// AVX-512 with VNNI: one register holds 16 rows x 4 inputs.
#pragma once
#include <immintrin.h>

#include "block.h"

namespace moepack {
namespace {

struct Avx512 {
  using Codes = __m512i;
  using Partial = __m512i;
  using Ints = __m512i;
  using Floats = __m512;
  static constexpr int kTokens = 4, kByteTokens = 4;
  static constexpr bool kExpands = false;
  template <Scheme> static constexpr int own_cols() { return 0; }

  static MOEPACK_INLINE Codes load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static MOEPACK_INLINE void store_codes(uint8_t* p, Codes c) { _mm512_storeu_si512(p, c); }
  template <int SHIFT, int MASK> static MOEPACK_INLINE Codes field(Codes c) {
    if constexpr (SHIFT != 0) c = _mm512_srli_epi16(c, SHIFT);
    return _mm512_and_si512(c, _mm512_set1_epi8(MASK));
  }
  static MOEPACK_INLINE Codes merge(Codes a, Codes b) { return _mm512_or_si512(a, b); }
  // The upper two bits of bytes of a, b and c, as six bits with those of a lowest.
  static MOEPACK_INLINE Codes tops(Codes a, Codes b, Codes c) {
    __m512i two = _mm512_set1_epi8(-64);
    // 0xCA: bits of the second where the first has them, else of the third.
    b = _mm512_ternarylogic_epi32(two, b, _mm512_srli_epi16(a, 2), 0xCA);
    return field<2, 63>(_mm512_ternarylogic_epi32(two, c, _mm512_srli_epi16(b, 2), 0xCA));
  }
  static MOEPACK_INLINE Codes levels(Codes c) {
    int64_t table;
    memcpy(&table, kLevels, 8);
    return _mm512_shuffle_epi8(_mm512_set1_epi64(table), c);
  }

  static MOEPACK_INLINE __m512i broadcast(const int8_t* x) {
    int32_t four;
    memcpy(&four, x, 4);
    return _mm512_set1_epi32(four);
  }
  static MOEPACK_INLINE Partial zero_partial() { return _mm512_setzero_si512(); }
  // One instruction with the broadcast in it, which compilers do not make of the intrinsics. It takes
  // one place where two would fill the reordering buffer sooner.
  static MOEPACK_INLINE Partial dot(Partial sum, Codes c, const int8_t* x) {
    using Word __attribute__((may_alias, aligned(1))) = int32_t;
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(c), "m"(*reinterpret_cast<const Word*>(x)));
    return sum;
  }
  template <int> static constexpr int partial_quads() { return 8; }
  static MOEPACK_INLINE Ints widen(Partial p) { return p; }
  static MOEPACK_INLINE Ints dot_wide(Ints sum, Codes c, const int8_t* x) { return dot(sum, c, x); }

  static MOEPACK_INLINE Ints zero_ints() { return _mm512_setzero_si512(); }
  static MOEPACK_INLINE Ints sub_ints(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
  static MOEPACK_INLINE Ints shift_right(Ints v, int n) {
    return _mm512_srl_epi32(v, _mm_cvtsi32_si128(n));
  }
  static MOEPACK_INLINE Ints shift_left_4(Ints v) { return _mm512_slli_epi32(v, 4); }
  static MOEPACK_INLINE Ints mul_add_16(Ints sum, Ints a, Ints b) {
    return _mm512_dpwssd_epi32(sum, a, b);
  }
  // The high half must be zero: mul_add_16 multiplies high halves too.
  static MOEPACK_INLINE Ints set_low16(int32_t x) { return _mm512_set1_epi32(x & 0xFFFF); }
  static MOEPACK_INLINE Ints set_int(int32_t x) { return _mm512_set1_epi32(x); }
  static MOEPACK_INLINE Ints mul_add_32(Ints sum, Ints a, Ints b) {
    return _mm512_add_epi32(sum, _mm512_mullo_epi32(a, b));
  }
  static MOEPACK_INLINE Ints load_u8(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static MOEPACK_INLINE Ints load_i8(const uint8_t* p) {
    return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  template <int SHIFT, int MASK> static MOEPACK_INLINE Ints field_int(Ints v) {
    if constexpr (SHIFT == 4) return _mm512_srli_epi32(v, 4);
    return _mm512_and_si512(v, _mm512_set1_epi32(MASK));
  }

  static MOEPACK_INLINE Floats zero() { return _mm512_setzero_ps(); }
  static MOEPACK_INLINE Floats set(float x) { return _mm512_set1_ps(x); }
  static MOEPACK_INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static MOEPACK_INLINE Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
  static MOEPACK_INLINE Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static MOEPACK_INLINE Floats fma(Floats a, Floats b, Floats c) {
    return _mm512_fmadd_ps(a, b, c);
  }
  static MOEPACK_INLINE Floats to_floats(Ints v) { return _mm512_cvtepi32_ps(v); }
  template <int J> static MOEPACK_INLINE Floats byte(Codes c) {
    if constexpr (J != 0) c = _mm512_srli_epi32(c, 8 * J);
    if constexpr (J != 3) c = _mm512_and_si512(c, _mm512_set1_epi32(255));
    return _mm512_cvtepi32_ps(c);
  }
  static MOEPACK_INLINE Floats load_f16(const uint8_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static MOEPACK_INLINE Floats load_f32(const uint8_t* p) { return _mm512_loadu_ps(p); }
  static MOEPACK_INLINE void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }

  static MOEPACK_INLINE Floats f32(Codes c) { return _mm512_castsi512_ps(c); }
  static MOEPACK_INLINE void bf16_pair(Codes c, Floats& even, Floats& odd) {
    even = _mm512_castsi512_ps(_mm512_slli_epi32(c, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(c, _mm512_set1_epi32(-65536)));
  }
  static MOEPACK_INLINE void f16_pair(Codes c, Floats& even, Floats& odd) {
    even = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(c));
    odd = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(c, 16)));
  }
};

// The low halves of 32 bits from both, as the halves of 32 bits.
MOEPACK_INLINE __m512i pair_16(__m512i low, __m512i high) {
  return _mm512_mask_blend_epi16(0xAAAAAAAA, low, _mm512_slli_epi32(high, 16));
}

inline bool has_avx512_vnni() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma");
}

}  // namespace
}  // namespace moepack
