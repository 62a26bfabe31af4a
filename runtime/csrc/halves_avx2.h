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

// Sums of products of one or two tokens and 8 rows.
template <int N> struct Sums { __m256i of[N]; };

MOEPACK_INLINE __m256i load_half(const uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
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
MOEPACK_INLINE __m256i either(__m256i a, __m256i b) { return _mm256_or_si256(a, b); }

// Codes times inputs col, ..., col + 3 of each token.
template <int N> MOEPACK_INLINE Sums<N> times(__m256i codes, const Row* rows, int64_t col) {
  Sums<N> out;
  for (int n = 0; n < N; ++n)
    out.of[n] = _mm256_maddubs_epi16(codes, broadcast_32(rows[n].q + col));
  return out;
}
template <int N> MOEPACK_INLINE Sums<N> operator+(Sums<N> a, Sums<N> b) {
  for (int n = 0; n < N; ++n) a.of[n] = _mm256_add_epi16(a.of[n], b.of[n]);
  return a;
}
template <int SHIFT, int N> MOEPACK_INLINE Sums<N> shifted(Sums<N> a) {
  for (int n = 0; n < N; ++n) a.of[n] = _mm256_srai_epi16(a.of[n], SHIFT);
  return a;
}

// Bytes of 8 rows, as the lower bytes of both halves of their 32 bits; rows 0-7 or 8-15.
MOEPACK_INLINE __m256i spread(__m256i bytes, int half) {
  __m256i rows = _mm256_setr_epi8(0, -1, 0, -1, 1, -1, 1, -1, 2, -1, 2, -1, 3, -1, 3, -1,  //
                                  4, -1, 4, -1, 5, -1, 5, -1, 6, -1, 6, -1, 7, -1, 7, -1);
  return _mm256_shuffle_epi8(bytes, half == 0 ? rows : _mm256_add_epi8(rows, _mm256_set1_epi16(8)));
}

// What is weighed goes to `high`, the minima times the sums of the inputs to `base`: out[n].a[half].
template <Scheme S, int N> struct HalfBlock;

// Two groups of 16 inputs, 2 bits. Two fields of four stay where they are and count fourfold.
template <int N> struct HalfBlock<Q2G16S4, N> {
  template <class Ints>
  static MOEPACK_INLINE void run(const uint8_t* w, const uint8_t* metadata, const uint8_t*, int64_t,
                                 const Row* rows, int64_t col, Ints* high, Ints* base) {
    __m256i small[2] = {load_twice(metadata), load_twice(metadata + 16)};
    for (int half = 0; half < 2; ++half) {
      for (int g = 0; g < 2; ++g) {
        const uint8_t* at = w + 64 * g + 32 * half;
        int64_t first = col + 16 * g;
        __m256i c = load_half(at), upper = _mm256_srli_epi16(c, 4);
        Sums<N> fourfold = times<N>(bits<12>(c), rows, first + 4) +
                           times<N>(bits<12>(upper), rows, first + 12);
        Sums<N> sums = times<N>(bits<3>(c), rows, first) + times<N>(bits<3>(upper), rows, first + 8) +
                       shifted<2>(fourfold);
        __m256i scale = spread(bits<15>(small[g]), half);
        for (int n = 0; n < N; ++n) {
          __m256i weighed = _mm256_madd_epi16(sums.of[n], scale);
          high[n].a[half] = g == 0 ? weighed : _mm256_add_epi32(high[n].a[half], weighed);
        }
      }
      // The minima of the two groups stand side by side, as the sums of the inputs do.
      __m256i minima = _mm256_blend_epi16(spread(bits<4, 15>(small[0]), half),
                                          spread(bits<4, 15>(small[1]), half), 0xAA);
      for (int n = 0; n < N; ++n)
        base[n].a[half] = _mm256_madd_epi16(minima, broadcast_32(rows[n].qsum16 + col / 16));
    }
    for (int v = 0; v < 2; ++v) _mm_prefetch(w + 64 * v + kPrefetch, _MM_HINT_T0);
  }
};

// One group of 32 inputs, 3 bits. Fields at bit 3 count eightfold, two quads of them at a time, so
// that sums stay within 16 bits: 2 * 2 * 56 * 127 = 28448.
template <int N> struct HalfBlock<Q3G32S4, N> {
  template <class Ints>
  static MOEPACK_INLINE void run(const uint8_t* w, const uint8_t* metadata, const uint8_t*, int64_t,
                                 const Row* rows, int64_t col, Ints* high, Ints* base) {
    __m256i small = load_twice(metadata), scales = bits<15>(small), minima = bits<4, 15>(small);
    for (int half = 0; half < 2; ++half) {
      __m256i a = load_half(w + 32 * half), b = load_half(w + 64 + 32 * half);
      __m256i c = load_half(w + 128 + 32 * half);
      Sums<N> eightfold = times<N>(bits<56>(a), rows, col + 4) + times<N>(bits<56>(b), rows, col + 12);
      __m256i sixth = either(bits<2, 48>(a), bits<3, 8>(b));
      Sums<N> more = times<N>(bits<56>(c), rows, col + 20) + times<N>(sixth, rows, col + 24);
      __m256i seventh = either(bits<5, 6>(c), bits<7, 1>(b));
      Sums<N> sums = times<N>(bits<7>(a), rows, col) + times<N>(bits<7>(b), rows, col + 8) +
                     (times<N>(bits<7>(c), rows, col + 16) + times<N>(seventh, rows, col + 28)) +
                     (shifted<3>(eightfold) + shifted<3>(more));
      __m256i scale = spread(scales, half), minimum = spread(minima, half);
      for (int n = 0; n < N; ++n) {
        high[n].a[half] = _mm256_madd_epi16(sums.of[n], scale);
        base[n].a[half] = _mm256_madd_epi16(minimum, broadcast_32(rows[n].qsum16 + col / 16));
      }
    }
    for (int v = 0; v < 3; ++v) _mm_prefetch(w + 64 * v + kPrefetch, _MM_HINT_T0);
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
  template <class Ints>
  static MOEPACK_INLINE void run(const uint8_t* w, const uint8_t* metadata, const uint8_t* fifths,
                                 int64_t group, const Row* rows, int64_t col, Ints* high, Ints*) {
    __m256i levels = load_twice(kTables.plain), levels_6 = load_twice(kTables.sixth);
    __m256i levels_7 = load_twice(kTables.seventh);
    auto level = [](__m256i table, __m256i index) MOEPACK_LAMBDA {
      return _mm256_shuffle_epi8(table, index);
    };
    __m256i scales = signed_bytes(metadata, fifths + group / 8 * kTileRows, group % 8);
    for (int half = 0; half < 2; ++half) {
      __m256i a = load_half(w + 32 * half), b = load_half(w + 64 + 32 * half);
      __m256i c = load_half(w + 128 + 32 * half), lowest = bits<6, 3>(b);
      Sums<N> first = times<N>(level(levels, bits<7>(a)), rows, col) +
                      times<N>(level(levels, bits<3, 7>(a)), rows, col + 4) +
                      (times<N>(level(levels, bits<7>(b)), rows, col + 8) +
                       times<N>(level(levels, bits<3, 7>(b)), rows, col + 12));
      Sums<N> second = times<N>(level(levels, bits<7>(c)), rows, col + 16) +
                       times<N>(level(levels, bits<3, 7>(c)), rows, col + 20) +
                       (times<N>(level(levels_6, either(bits<4, 12>(a), lowest)), rows, col + 24) +
                        times<N>(level(levels_7, either(bits<4, 12>(c), lowest)), rows, col + 28));
      __m256i scale[2] = {spread_signed(scales, half), spread_signed(scales, half + 2)};
      for (int n = 0; n < N; ++n) {
        const int16_t* offset = rows[n].qlevel + col / 8;
        __m256i x = _mm256_sub_epi16(first.of[n], broadcast_32(offset));
        __m256i y = _mm256_sub_epi16(second.of[n], broadcast_32(offset + 2));
        high[n].a[half] = _mm256_add_epi32(_mm256_madd_epi16(x, scale[0]),
                                           _mm256_madd_epi16(y, scale[1]));
      }
    }
    for (int v = 0; v < 3; ++v) _mm_prefetch(w + 64 * v + kPrefetch, _MM_HINT_T0);
  }

 private:
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
    return either(four, bits<-16>(_mm256_cmpeq_epi8(fifth, place)));
  }
  // Part 0 to 3: rows 0-7 and 8-15 of the first group, then of the second. 256 times a scale stands in
  // each 16 bits, see Avx2::scale_unit.
  static MOEPACK_INLINE __m256i spread_signed(__m256i bytes, int part) {
    __m256i rows = _mm256_setr_epi8(-1, 0, -1, 0, -1, 1, -1, 1, -1, 2, -1, 2, -1, 3, -1, 3,  //
                                    -1, 0, -1, 0, -1, 1, -1, 1, -1, 2, -1, 2, -1, 3, -1, 3);
    __m256i of_part = _mm256_set1_epi16(static_cast<int16_t>(4 * part << 8));
    return _mm256_shuffle_epi8(bytes, _mm256_add_epi8(rows, of_part));
  }
};

}  // namespace
}  // namespace moepack
