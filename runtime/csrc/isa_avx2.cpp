// AVX2 with FMA and F16C: rows 0-7 and rows 8-15 in a register each.
#include <immintrin.h>

#include "block.h"
#include "halves_avx2.h"
#include "panel_avx2.h"
#include "quantize_avx2.h"

namespace moepack {
namespace {

struct Avx2 {
  struct Codes { __m256i a[2]; };
  struct Partial { __m256i a[2]; };  // 16-bit sums: two products in each
  struct Ints { __m256i a[2]; };
  struct Floats { __m256 a[2]; };
  static constexpr int kTokens = 2, kByteTokens = 2;
  static constexpr bool kExpands = false;
  // Schemes that halves_avx2.h multiplies with.
  template <Scheme S> static constexpr int own_cols() {
    return S == Q2G16S4 || S == Q3G32S4 || S == Q3G16S5 ? 32 : 0;
  }
  static constexpr float kLevelUnit = 1.0f / 256;  // of what it gives where codes stand for levels

  template <class R, class F> static MOEPACK_INLINE R make(F&& f) { return R{{f(0), f(1)}}; }
#define EACH(R, expression) make<R>([&](int i) MOEPACK_LAMBDA { return expression; })

  static MOEPACK_INLINE __m256i load256(const uint8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static MOEPACK_INLINE Codes load(const uint8_t* p) { return EACH(Codes, load256(p + 32 * i)); }
  static MOEPACK_INLINE void store_codes(uint8_t* p, Codes c) {
    for (int i = 0; i < 2; ++i)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32 * i), c.a[i]);
  }
  template <int SHIFT, int MASK> static MOEPACK_INLINE Codes field(Codes c) {
    __m256i mask = _mm256_set1_epi8(MASK);
    if constexpr (SHIFT == 0) return EACH(Codes, _mm256_and_si256(c.a[i], mask));
    return EACH(Codes, _mm256_and_si256(_mm256_srli_epi16(c.a[i], SHIFT), mask));
  }
  static MOEPACK_INLINE Codes merge(Codes a, Codes b) {
    return EACH(Codes, _mm256_or_si256(a.a[i], b.a[i]));
  }
  // The upper two bits of bytes of a, b and c, as six bits with those of a lowest.
  static MOEPACK_INLINE Codes tops(Codes a, Codes b, Codes c) {
    return merge(merge(field<6, 3>(a), field<4, 12>(b)), field<2, 48>(c));
  }
  static MOEPACK_INLINE Codes levels(Codes c) {
    int64_t table;
    memcpy(&table, kLevels, 8);
    return EACH(Codes, _mm256_shuffle_epi8(_mm256_set1_epi64x(table), c.a[i]));
  }

  static MOEPACK_INLINE __m256i broadcast(const int8_t* x) {
    int32_t four;
    memcpy(&four, x, 4);
    return _mm256_set1_epi32(four);
  }
  static MOEPACK_INLINE Partial zero_partial() { return Partial{}; }
  // Quads whose sums of products fit 16 bits: 8 of codes up to 15 reach 8 * 2 * 15 * 127 = 30480, two
  // of codes up to 63 reach 32004.
  template <int BITS> static constexpr int partial_quads() { return BITS == 6 ? 2 : 8; }
  static MOEPACK_INLINE Partial dot(Partial sum, Codes c, const int8_t* x) {
    __m256i four = broadcast(x);
    return EACH(Partial, _mm256_add_epi16(sum.a[i], _mm256_maddubs_epi16(c.a[i], four)));
  }
  static MOEPACK_INLINE Ints widen(Partial p) {
    return EACH(Ints, _mm256_madd_epi16(p.a[i], _mm256_set1_epi16(1)));
  }
  template <Scheme S, int N>
  static MOEPACK_INLINE void half(const uint8_t* w, const uint8_t* metadata, const uint8_t* fifths,
                                  int64_t group, const Row* rows, int64_t col, Ints* high,
                                  Ints* base) {
    Both weighed[N], low[N];
    HalfBlock<S, N>::run(w, metadata, fifths, group, rows, col, weighed, low);
    for (int n = 0; n < N; ++n)
      for (int i = 0; i < 2; ++i) high[n].a[i] = weighed[n].half[i], base[n].a[i] = low[n].half[i];
  }
  // Two products of 8-bit codes overflow 16 bits, so the lowest bit is multiplied apart.
  static MOEPACK_INLINE Ints dot_wide(Ints sum, Codes c, const int8_t* x) {
    __m256i four = broadcast(x), one = _mm256_set1_epi16(1), two = _mm256_set1_epi16(2);
    Codes high = field<1, 127>(c), low = field<0, 1>(c);
    return EACH(Ints, _mm256_add_epi32(
        _mm256_add_epi32(sum.a[i], _mm256_madd_epi16(_mm256_maddubs_epi16(high.a[i], four), two)),
        _mm256_madd_epi16(_mm256_maddubs_epi16(low.a[i], four), one)));
  }

  static MOEPACK_INLINE Ints zero_ints() { return Ints{}; }
  static MOEPACK_INLINE Ints add_ints(Ints a, Ints b) {
    return EACH(Ints, _mm256_add_epi32(a.a[i], b.a[i]));
  }
  static MOEPACK_INLINE Ints sub_ints(Ints a, Ints b) {
    return EACH(Ints, _mm256_sub_epi32(a.a[i], b.a[i]));
  }
  static MOEPACK_INLINE Ints shift_right(Ints v, int n) {
    __m128i count = _mm_cvtsi32_si128(n);
    return EACH(Ints, _mm256_srl_epi32(v.a[i], count));
  }
  static MOEPACK_INLINE Ints shift_left_4(Ints v) {
    return EACH(Ints, _mm256_slli_epi32(v.a[i], 4));
  }
  static MOEPACK_INLINE Ints mul_add_16(Ints sum, Ints a, Ints b) {
    return EACH(Ints, _mm256_add_epi32(sum.a[i], _mm256_madd_epi16(a.a[i], b.a[i])));
  }
  // The high half must be zero: mul_add_16 multiplies high halves too.
  static MOEPACK_INLINE Ints set_low16(int32_t x) {
    __m256i v = _mm256_set1_epi32(x & 0xFFFF);
    return Ints{{v, v}};
  }
  static MOEPACK_INLINE __m128i load64(const uint8_t* p) {
    return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  }
  static MOEPACK_INLINE Ints load_u8(const uint8_t* p) {
    return EACH(Ints, _mm256_cvtepu8_epi32(load64(p + 8 * i)));
  }
  static MOEPACK_INLINE Ints load_i8(const uint8_t* p) {
    return EACH(Ints, _mm256_cvtepi8_epi32(load64(p + 8 * i)));
  }
  template <int SHIFT, int MASK> static MOEPACK_INLINE Ints field_int(Ints v) {
    return EACH(Ints, _mm256_and_si256(_mm256_srli_epi32(v.a[i], SHIFT), _mm256_set1_epi32(MASK)));
  }

  static MOEPACK_INLINE Floats zero() { return Floats{}; }
  static MOEPACK_INLINE Floats set(float x) { return Floats{{_mm256_set1_ps(x), _mm256_set1_ps(x)}}; }
  static MOEPACK_INLINE Floats add(Floats a, Floats b) {
    return EACH(Floats, _mm256_add_ps(a.a[i], b.a[i]));
  }
  static MOEPACK_INLINE Floats sub(Floats a, Floats b) {
    return EACH(Floats, _mm256_sub_ps(a.a[i], b.a[i]));
  }
  static MOEPACK_INLINE Floats mul(Floats a, Floats b) {
    return EACH(Floats, _mm256_mul_ps(a.a[i], b.a[i]));
  }
  static MOEPACK_INLINE Floats fma(Floats a, Floats b, Floats c) {
    return EACH(Floats, _mm256_fmadd_ps(a.a[i], b.a[i], c.a[i]));
  }
  static MOEPACK_INLINE Floats to_floats(Ints v) {
    return EACH(Floats, _mm256_cvtepi32_ps(v.a[i]));
  }
  template <int J> static MOEPACK_INLINE Floats byte(Codes c) {
    __m256i mask = _mm256_set1_epi32(255);
    return EACH(Floats,
                _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(c.a[i], 8 * J), mask)));
  }
  static MOEPACK_INLINE Floats load_f16(const uint8_t* p) {
    return EACH(Floats, _mm256_cvtph_ps(_mm_loadu_si128(
                            reinterpret_cast<const __m128i*>(p + 16 * i))));
  }
  static MOEPACK_INLINE Floats load_f32(const uint8_t* p) {
    return EACH(Floats, _mm256_castsi256_ps(load256(p + 32 * i)));
  }
  static MOEPACK_INLINE void store(float* p, Floats v) {
    for (int i = 0; i < 2; ++i) _mm256_storeu_ps(p + 8 * i, v.a[i]);
  }

  static MOEPACK_INLINE Floats f32(Codes c) { return EACH(Floats, _mm256_castsi256_ps(c.a[i])); }
  static MOEPACK_INLINE void bf16_pair(Codes c, Floats& even, Floats& odd) {
    __m256i high = _mm256_set1_epi32(-65536);
    even = EACH(Floats, _mm256_castsi256_ps(_mm256_slli_epi32(c.a[i], 16)));
    odd = EACH(Floats, _mm256_castsi256_ps(_mm256_and_si256(c.a[i], high)));
  }
  static MOEPACK_INLINE __m256 low_halves(__m256i v) {
    v = _mm256_and_si256(v, _mm256_set1_epi32(0xFFFF));
    return _mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(v),
                                            _mm256_extracti128_si256(v, 1)));
  }
  static MOEPACK_INLINE void f16_pair(Codes c, Floats& even, Floats& odd) {
    even = EACH(Floats, low_halves(c.a[i]));
    odd = EACH(Floats, low_halves(_mm256_srli_epi32(c.a[i], 16)));
  }
#undef EACH
};

bool supported() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

}  // namespace

constexpr Kernels with_own() {
  Kernels k = make_kernels<Avx2>("avx2", supported);
  k.quantize_block = quantize_block<quantize_step_avx2>;
  fill_panels<0>(k);
  k.panel_pairs = true;
  return k;
}

extern constexpr Kernels kAvx2 = with_own();

}  // namespace moepack
