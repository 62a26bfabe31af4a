// Some tokens times 64 inputs of a tile with AVX-512 VBMI, int8 activations, for the schemes whose
// scales are small: each as it suits its bytes.
//
// Slots of instructions decide, of which Zen 4 has two a cycle for whole registers, and of products or
// permutations one. A permutation of bytes looks at six bits of an index and at no others, so it takes
// a field out of a byte, or what the field stands for, in place of a shift, a mask and a lookup.
#pragma once
#include "avx512.h"

namespace moepack {
namespace {

// The barrier keeps a compiler from loading again for each use, which costs 2 to 5 % in the second cache.
MOEPACK_INLINE __m512i load_once(const uint8_t* p) {
  __m512i v = Avx512::load(p);
  asm("" : "+v"(v));
  return v;
}
MOEPACK_INLINE __m512i broadcast_32(const void* p) {
  int32_t word;
  memcpy(&word, p, 4);
  return _mm512_set1_epi32(word);
}
// Bits of `a` where MASK has them, of `b` elsewhere.
template <int MASK> MOEPACK_INLINE __m512i select(__m512i a, __m512i b) {
  return _mm512_ternarylogic_epi32(_mm512_set1_epi8(MASK), a, b, 0xCA);
}

// Values at the lower six bits of an index.
struct Table {
  alignas(64) uint8_t at[64] = {};
  MOEPACK_INLINE __m512i operator()(__m512i index) const {
    return _mm512_permutexvar_epi8(index, _mm512_load_si512(at));
  }
};
// Codes of BITS, or what they stand for, at the indices in which code_of finds them.
template <int BITS, bool LEVELS, class F> constexpr Table make_table(F&& code_of) {
  Table table;
  for (int i = 0; i < 64; ++i) {
    int code = code_of(i) & ((1 << BITS) - 1);
    table.at[i] = static_cast<uint8_t>(LEVELS ? kLevels[code & 7] : code);
  }
  return table;
}

constexpr Table kSecondOfFour = make_table<2, false>([](int i) { return i >> 2; });
constexpr Table kThirdOfFour = make_table<2, false>([](int i) { return i >> 4; });

// Codes of three bits, or levels, in the places that each_quad in tile.h names.
template <bool LEVELS> struct ThreeBits {
  static constexpr Table first = make_table<3, LEVELS>([](int i) { return i; });
  static constexpr Table second = make_table<3, LEVELS>([](int i) { return i >> 3; });
  static constexpr Table last =
      make_table<3, LEVELS>([](int i) { return (i >> 2 & 3) * 2 + (i >> 4 & 1); });

  // Of a or c, and b. The lowest bits of both come to lie at bits 3 and 4.
  static MOEPACK_INLINE __m512i sixth(__m512i a, __m512i b) {
    return second(select<0x30>(_mm512_srli_epi16(a, 2), _mm512_srli_epi16(b, 3)));
  }
  static MOEPACK_INLINE __m512i seventh(__m512i c, __m512i b) {
    return last(select<0x0C>(_mm512_srli_epi16(c, 4), _mm512_srli_epi16(b, 3)));
  }
};

template <int LINES> MOEPACK_INLINE void ask_for_lines(const uint8_t* w) {
  for (int v = 0; v < LINES; ++v) ask_ahead(w + 64 * v);
}

// Bytes of 16 rows, `second` places apart, as the 16-bit halves of the rows' 32 bits.
MOEPACK_INLINE __m512i spread(__m256i bytes, int second) {
  __m512i rows = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  rows = _mm512_or_si512(rows, _mm512_slli_epi32(
      _mm512_add_epi32(rows, _mm512_set1_epi32(second)), 16));
  return _mm512_maskz_permutexvar_epi8(0x5555555555555555, rows, _mm512_castsi256_si512(bytes));
}
MOEPACK_INLINE __m256i load_256(const uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
MOEPACK_INLINE __m256i load_128(const uint8_t* p) {
  return _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

// What is weighed with scales goes to `high`, the minima times the sums of the inputs to `base`, each of
// the two steps of a block. Four chains of sums go side by side: what waits for another sum fills
// the scheduler's queues.
template <Scheme S, int N> struct Block;

// Four groups of 16 inputs, 2 bits.
template <int N> struct Block<Q2G16S4, N> {
  static MOEPACK_INLINE void run(const uint8_t* w, const uint8_t* metadata, const uint8_t*, int64_t,
                                 const Row* rows, int64_t col, __m512i (*high)[N],
                                 __m512i (*base)[N]) {
    __m512i zero = _mm512_setzero_si512(), codes[4], sum[4][N];
    for (int g = 0; g < 4; ++g) codes[g] = load_once(w + 64 * g);
    ask_for_lines<4>(w);
    auto add = [&](int g, int quad, __m512i c) MOEPACK_LAMBDA {
      const int64_t at = col + 16 * g + 4 * quad;
      for (int n = 0; n < N; ++n)
        sum[g][n] = Avx512::dot(quad == 0 ? zero : sum[g][n], c, rows[n].q + at);
    };
    for (int g = 0; g < 4; ++g) add(g, 0, Avx512::field<0, 3>(codes[g]));
    for (int g = 0; g < 4; ++g) add(g, 1, kSecondOfFour(codes[g]));
    for (int g = 0; g < 4; ++g) add(g, 2, kThirdOfFour(codes[g]));
    for (int g = 0; g < 4; ++g) add(g, 3, Avx512::field<6, 3>(codes[g]));
    for (int h = 0; h < 2; ++h) {
      __m512i small = spread(load_256(metadata + 32 * h), kTileRows);
      __m512i scales = Avx512::field<0, 15>(small), minima = _mm512_srli_epi16(small, 4);
      for (int n = 0; n < N; ++n) {
        high[h][n] = _mm512_dpwssd_epi32(zero, scales, pair_16(sum[2 * h][n], sum[2 * h + 1][n]));
        base[h][n] =
            _mm512_dpwssd_epi32(zero, minima, broadcast_32(rows[n].qsum16 + col / 16 + 2 * h));
      }
    }
  }
};

// Adds 64 inputs at 3 bits to the sums of their four groups of 16.
template <bool LEVELS, int N>
MOEPACK_INLINE void add_three_bits(const uint8_t* w, const Row* rows, int64_t col,
                                   __m512i (*sum)[N]) {
  using Codes = ThreeBits<LEVELS>;
  __m512i v[2][3];
  for (int h = 0; h < 2; ++h)
    for (int i = 0; i < 3; ++i) v[h][i] = load_once(w + 192 * h + 64 * i);
  ask_for_lines<6>(w);
  auto add = [&](int h, int quad, __m512i c) MOEPACK_LAMBDA {
    int g = 2 * h + quad / 4;
    for (int n = 0; n < N; ++n)
      sum[g][n] = Avx512::dot(sum[g][n], c, rows[n].q + col + 32 * h + 4 * quad);
  };
  for (int h = 0; h < 2; ++h) add(h, 0, Codes::first(v[h][0])), add(h, 4, Codes::first(v[h][2]));
  for (int h = 0; h < 2; ++h) add(h, 1, Codes::second(v[h][0])), add(h, 5, Codes::second(v[h][2]));
  for (int h = 0; h < 2; ++h)
    add(h, 2, Codes::first(v[h][1])), add(h, 6, Codes::sixth(v[h][0], v[h][1]));
  for (int h = 0; h < 2; ++h)
    add(h, 3, Codes::second(v[h][1])), add(h, 7, Codes::seventh(v[h][2], v[h][1]));
}

// Two groups of 32 inputs, 3 bits.
template <int N> struct Block<Q3G32S4, N> {
  static MOEPACK_INLINE void run(const uint8_t* w, const uint8_t* metadata, const uint8_t*, int64_t,
                                 const Row* rows, int64_t col, __m512i (*high)[N],
                                 __m512i (*base)[N]) {
    __m512i zero = _mm512_setzero_si512(), sum[4][N];
    for (auto& of_group : sum)
      for (auto& s : of_group) s = zero;
    add_three_bits<false, N>(w, rows, col, sum);
    for (int h = 0; h < 2; ++h) {
      __m512i small = spread(load_128(metadata + 16 * h), 0);
      __m512i scales = _mm512_and_si512(small, _mm512_set1_epi32(15));
      __m512i minima = _mm512_srli_epi16(small, 4);
      for (int n = 0; n < N; ++n) {
        high[h][n] = _mm512_dpwssd_epi32(
            zero, scales, _mm512_add_epi32(sum[2 * h][n], sum[2 * h + 1][n]));
        base[h][n] =
            _mm512_dpwssd_epi32(zero, minima, broadcast_32(rows[n].qsum16 + col / 16 + 2 * h));
      }
    }
  }
};

constexpr int32_t kBit[8] = {1, 2, 4, 8, 16, 32, 64, 128};

// Four groups of 16 inputs, 3 bits that stand for levels, under signed scales of 5 bits. A group's sum
// does not fit 16 bits.
template <int N> struct Block<Q3G16S5, N> {
  static MOEPACK_INLINE void run(const uint8_t* w, const uint8_t* metadata, const uint8_t* fifths,
                                 int64_t group, const Row* rows, int64_t col, __m512i (*high)[N],
                                 __m512i (*)[N]) {
    __m512i sum[4][N];
    for (int g = 0; g < 4; ++g)
      for (int n = 0; n < N; ++n) sum[g][n] = broadcast_32(rows[n].level_base + col / 16 + g);
    add_three_bits<true, N>(w, rows, col, sum);
    __m512i fifth = Avx512::load_u8(fifths + group / 8 * kTileRows);
    __m512i minus = _mm512_set1_epi32(-16), low = _mm512_set1_epi32(15);
    for (int h = 0; h < 2; ++h) {
      __m512i fours = Avx512::load_u8(metadata + 16 * h);
      for (int g = 0; g < 2; ++g) {
        __mmask16 negative =
            _mm512_test_epi32_mask(fifth, broadcast_32(kBit + group % 8 + 2 * h + g));
        __m512i scale = g == 0 ? _mm512_and_si512(fours, low) : _mm512_srli_epi32(fours, 4);
        scale = _mm512_mask_or_epi32(scale, negative, scale, minus);
        for (int n = 0; n < N; ++n) {
          __m512i weighed = _mm512_mullo_epi32(sum[2 * h + g][n], scale);
          high[h][n] = g == 0 ? weighed : _mm512_add_epi32(high[h][n], weighed);
        }
      }
    }
  }
};

}  // namespace
}  // namespace moepack
