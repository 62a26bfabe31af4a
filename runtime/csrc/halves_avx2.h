// One or two tokens times 32 inputs of a tile with AVX2, int8 activations, for the schemes whose scales
// are small: each as it suits its bytes. What they share: a group's products stay 16-bit sums, two in
// a row's 32 bits, until the instruction that multiplies them with the group's scale adds the two.
// The scale stands in both halves of the 32 bits for that.
//
// Ports decide: of the instructions here Zen 3 does four a cycle, of shifts and shuffles two. So fields
// of codes stay where they are where sums can be shifted instead, and scales are prepared for all 16
// rows at once, as bytes.
#pragma once
#include <immintrin.h>
#include <string.h>

#include "tile.h"

namespace moepack {
namespace {

// Bytes or sums of rows 0-7 and 8-15.
struct Both { __m256i half[2]; };
// Sums of products of one or two tokens.
template <int N> struct Sums { Both of[N]; };

#define BOTH(expression)                                    \
  [&]() MOEPACK_LAMBDA {                                    \
    Both out;                                               \
    for (int i = 0; i < 2; ++i) out.half[i] = (expression); \
    return out;                                             \
  }()

MOEPACK_INLINE Both load_both(const uint8_t* p) {
  return BOTH(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32 * i)));
}
// 16 bytes, once in each half of a register.
MOEPACK_INLINE __m256i load_twice(const uint8_t* p) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
MOEPACK_INLINE __m256i broadcast_32(const void* p) {
  int32_t word;
  memcpy(&word, p, 4);
  return _mm256_set1_epi32(word);
}
template <int MASK> MOEPACK_INLINE __m256i bits(__m256i v) {
  return _mm256_and_si256(v, _mm256_set1_epi8(MASK));
}
template <int SHIFT, int MASK> MOEPACK_INLINE __m256i bits(__m256i v) {
  return bits<MASK>(_mm256_srli_epi16(v, SHIFT));
}
template <int MASK> MOEPACK_INLINE Both bits(Both v) { return BOTH(bits<MASK>(v.half[i])); }
template <int SHIFT, int MASK> MOEPACK_INLINE Both bits(Both v) {
  return BOTH((bits<SHIFT, MASK>(v.half[i])));
}
MOEPACK_INLINE Both either(Both a, Both b) { return BOTH(_mm256_or_si256(a.half[i], b.half[i])); }
// Bytes of a table at the lower four bits of each byte of `index`, whose highest bit is clear.
MOEPACK_INLINE Both look_up(__m256i table, Both index) {
  return BOTH(_mm256_shuffle_epi8(table, index.half[i]));
}

// Codes times inputs col, ..., col + 3 of each token.
template <int N> MOEPACK_INLINE Sums<N> times(Both codes, const Row* rows, int64_t col) {
  Sums<N> out;
  for (int n = 0; n < N; ++n) {
    __m256i four = broadcast_32(rows[n].q + col);
    out.of[n] = BOTH(_mm256_maddubs_epi16(codes.half[i], four));
  }
  return out;
}
template <int N> MOEPACK_INLINE Sums<N> operator+(Sums<N> a, Sums<N> b) {
  for (int n = 0; n < N; ++n)
    a.of[n] = BOTH(_mm256_add_epi16(a.of[n].half[i], b.of[n].half[i]));
  return a;
}
template <int N> MOEPACK_INLINE Sums<N>& operator+=(Sums<N>& a, Sums<N> b) { return a = a + b; }
template <int SHIFT, int N> MOEPACK_INLINE Sums<N> shifted(Sums<N> a) {
  for (int n = 0; n < N; ++n) a.of[n] = BOTH(_mm256_srai_epi16(a.of[n].half[i], SHIFT));
  return a;
}
MOEPACK_INLINE Both madd(Both a, Both b) { return BOTH(_mm256_madd_epi16(a.half[i], b.half[i])); }
MOEPACK_INLINE Both madd(Both a, __m256i b) { return BOTH(_mm256_madd_epi16(a.half[i], b)); }
MOEPACK_INLINE Both add_32(Both a, Both b) { return BOTH(_mm256_add_epi32(a.half[i], b.half[i])); }

// The bytes of 16 rows as the lower bytes of both halves of their 32 bits.
MOEPACK_INLINE Both spread(__m256i bytes) {
  __m256i rows = _mm256_setr_epi8(0, -1, 0, -1, 1, -1, 1, -1, 2, -1, 2, -1, 3, -1, 3, -1,  //
                                  4, -1, 4, -1, 5, -1, 5, -1, 6, -1, 6, -1, 7, -1, 7, -1);
  return BOTH(_mm256_shuffle_epi8(
      bytes, _mm256_add_epi8(rows, _mm256_set1_epi16(static_cast<int16_t>(8 * i)))));
}

// What is weighed with scales goes to `high`, the minima times the sums of the inputs to `base`.
template <Scheme S, int N> struct HalfBlock;

// Two groups of 16 inputs, 2 bits. Two fields of four stay where they are and count fourfold.
template <int N> struct HalfBlock<Q2G16S4, N> {
  static MOEPACK_INLINE void run(const uint8_t* w, const uint8_t* metadata, const uint8_t*, int64_t,
                                 const Row* rows, int64_t col, Both* high, Both* base) {
    __m256i small[2] = {load_twice(metadata), load_twice(metadata + 16)};
    for (int g = 0; g < 2; ++g, col += 16) {
      Both codes = load_both(w + 64 * g);
      Both upper = BOTH(_mm256_srli_epi16(codes.half[i], 4));
      Sums<N> fourfold = times<N>(bits<12>(codes), rows, col + 4);
      fourfold += times<N>(bits<12>(upper), rows, col + 12);
      Sums<N> sums = times<N>(bits<3>(codes), rows, col);
      sums += times<N>(bits<3>(upper), rows, col + 8);
      sums += shifted<2>(fourfold);
      Both scales = spread(bits<15>(small[g]));
      for (int n = 0; n < N; ++n) {
        Both weighed = madd(sums.of[n], scales);
        high[n] = g == 0 ? weighed : add_32(high[n], weighed);
      }
      ask_ahead(w + 64 * g);
    }
    // The minima of the two groups stand side by side, as the sums of the inputs do.
    Both first = spread(bits<4, 15>(small[0])), second = spread(bits<4, 15>(small[1]));
    Both minima = BOTH(_mm256_blend_epi16(first.half[i], second.half[i], 0xAA));
    for (int n = 0; n < N; ++n)
      base[n] = madd(minima, broadcast_32(rows[n].qsum16 + col / 16 - 2));
  }
};

// One group of 32 inputs, 3 bits. Fields at bit 3 count eightfold, two quads of them at a time, so
// that sums stay within 16 bits: 2 * 2 * 56 * 127 = 28448.
template <int N> struct HalfBlock<Q3G32S4, N> {
  static MOEPACK_INLINE void run(const uint8_t* w, const uint8_t* metadata, const uint8_t*, int64_t,
                                 const Row* rows, int64_t col, Both* high, Both* base) {
    Both a = load_both(w), b = load_both(w + 64), c = load_both(w + 128);
    Sums<N> sums = times<N>(bits<7>(a), rows, col);
    Sums<N> eightfold = times<N>(bits<56>(a), rows, col + 4);
    sums += times<N>(bits<7>(b), rows, col + 8);
    eightfold += times<N>(bits<56>(b), rows, col + 12);
    sums += shifted<3>(eightfold);
    eightfold = times<N>(either(bits<2, 48>(a), bits<3, 8>(b)), rows, col + 24);
    sums += times<N>(either(bits<5, 6>(c), bits<7, 1>(b)), rows, col + 28);
    sums += times<N>(bits<7>(c), rows, col + 16);
    eightfold += times<N>(bits<56>(c), rows, col + 20);
    sums += shifted<3>(eightfold);
    __m256i small = load_twice(metadata);
    Both scales = spread(bits<15>(small)), minima = spread(bits<4, 15>(small));
    for (int n = 0; n < N; ++n) {
      high[n] = madd(sums.of[n], scales);
      base[n] = madd(minima, broadcast_32(rows[n].qsum16 + col / 16));
    }
    for (int v = 0; v < 3; ++v) ask_ahead(w + 64 * v);
  }
};

// Levels by four bits of which not all belong to the code: quads 6 and 7 have their upper bits at bits
// 2 and 3 of an index, and both their lowest ones at bits 0 and 1.
struct LevelTables {
  alignas(16) uint8_t plain[16] = {}, sixth[16] = {}, seventh[16] = {};
  constexpr LevelTables() {
    for (int i = 0; i < 16; ++i) {
      plain[i] = kLevels[i & 7];
      sixth[i] = kLevels[(i >> 2) * 2 + (i & 1)];
      seventh[i] = kLevels[(i >> 2) * 2 + (i >> 1 & 1)];
    }
  }
};
constexpr LevelTables kTables;

// Two groups of 16 inputs, 3 bits that stand for levels, under signed scales of 5 bits.
template <int N> struct HalfBlock<Q3G16S5, N> {
  static MOEPACK_INLINE void run(const uint8_t* w, const uint8_t* metadata, const uint8_t* fifths,
                                 int64_t group, const Row* rows, int64_t col, Both* high, Both*) {
    __m256i levels = load_twice(kTables.plain);
    __m256i scales = signed_bytes(metadata, fifths + (group & ~7) * 2, group & 7);
    Both a = load_both(w);
    Sums<N> sums = times<N>(look_up(levels, bits<7>(a)), rows, col);
    sums += times<N>(look_up(levels, bits<3, 7>(a)), rows, col + 4);
    Both upper = bits<4, 12>(a), b = load_both(w + 64);
    sums += times<N>(look_up(levels, bits<7>(b)), rows, col + 8);
    sums += times<N>(look_up(levels, bits<3, 7>(b)), rows, col + 12);
    weigh(sums, scales, 0, rows, col, high);
    Both lowest = bits<6, 3>(b), c = load_both(w + 128);
    sums = times<N>(look_up(load_twice(kTables.sixth), either(upper, lowest)), rows, col + 24);
    sums += times<N>(look_up(levels, bits<7>(c)), rows, col + 16);
    sums += times<N>(look_up(levels, bits<3, 7>(c)), rows, col + 20);
    upper = bits<4, 12>(c);
    sums += times<N>(look_up(load_twice(kTables.seventh), either(upper, lowest)), rows, col + 28);
    weigh(sums, scales, 1, rows, col, high);
    for (int v = 0; v < 3; ++v) ask_ahead(w + 64 * v);
  }

 private:
  static MOEPACK_INLINE void weigh(Sums<N> sums, __m256i scales, int g, const Row* rows, int64_t col,
                                   Both* high) {
    Both scale = spread_signed(scales, g);
    for (int n = 0; n < N; ++n) {
      __m256i offset = broadcast_32(rows[n].qlevel + col / 8 + 2 * g);
      Both weighed = madd(BOTH(_mm256_sub_epi16(sums.of[n].half[i], offset)), scale);
      high[n] = g == 0 ? weighed : add_32(high[n], weighed);
    }
  }

  // Scales of two groups and 16 rows as signed bytes. Half h of the register has rows 4 h and 8 + 4 h,
  // and three after each, of the first group and then of the second.
  static MOEPACK_INLINE __m256i signed_bytes(const uint8_t* fours, const uint8_t* fifths,
                                             int64_t bit) {
    __m256i rows = _mm256_setr_epi8(0, 1, 2, 3, 8, 9, 10, 11, 0, 1, 2, 3, 8, 9, 10, 11,  //
                                    4, 5, 6, 7, 12, 13, 14, 15, 4, 5, 6, 7, 12, 13, 14, 15);
    __m256i four = _mm256_shuffle_epi8(load_twice(fours), rows);
    four = bits<15>(_mm256_srlv_epi64(four, _mm256_setr_epi64x(0, 4, 0, 4)));
    __m256i place = _mm256_set_epi64x(0x0202020202020202, 0x0101010101010101,  //
                                      0x0202020202020202, 0x0101010101010101);
    place = _mm256_sll_epi16(place, _mm_cvtsi64_si128(bit));
    __m256i fifth = _mm256_and_si256(_mm256_shuffle_epi8(load_twice(fifths), rows), place);
    return _mm256_or_si256(four, bits<-16>(_mm256_cmpeq_epi8(fifth, place)));
  }
  // Of the rows of group 0 or 1: 256 times a scale in each 16 bits, see Avx2::kLevelUnit.
  static MOEPACK_INLINE Both spread_signed(__m256i bytes, int g) {
    __m256i rows = _mm256_setr_epi8(-1, 0, -1, 0, -1, 1, -1, 1, -1, 2, -1, 2, -1, 3, -1, 3,  //
                                    -1, 0, -1, 0, -1, 1, -1, 1, -1, 2, -1, 2, -1, 3, -1, 3);
    return BOTH(_mm256_shuffle_epi8(
        bytes, _mm256_add_epi8(rows, _mm256_set1_epi16(static_cast<int16_t>((8 * g + 4 * i) << 8)))));
  }
};

#undef BOTH

}  // namespace
}  // namespace moepack
