// Many tokens times one tile with AVX2: codes of 8 rows and 32 inputs are unpacked into registers and
// stay there while the tokens go by.
//
// A load can broadcast four inputs of a token, so for 256 multiplications the instructions are 8
// broadcasts, 8 products, 6 or 7 sums of 16 bits, one or two products with the groups' scales, and 6
// for the sum in float. Walks over one or two tokens (tile.h) load the codes for each of them as well.
#pragma once
#include <immintrin.h>
#include <string.h>

#include "tile.h"

namespace moepack {
namespace {

constexpr int kRows = 8;  // of a tile, in one register

__m256i load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

template <int SHIFT, int MASK> __m256i field(__m256i v) {
  if constexpr (SHIFT != 0) v = _mm256_srli_epi16(v, SHIFT);
  return _mm256_and_si256(v, _mm256_set1_epi8(MASK));
}

// Codes of 32 inputs and 8 rows, 4 inputs in each register; w: of these rows. See each_quad in tile.h.
template <int BITS> void unpack(const uint8_t* w, __m256i* c) {
  if constexpr (BITS == 2) {
    for (int v = 0; v < 2; ++v, c += 4) {
      __m256i four = load(w + 64 * v);
      c[0] = field<0, 3>(four), c[1] = field<2, 3>(four);
      c[2] = field<4, 3>(four), c[3] = field<6, 3>(four);
    }
  } else if constexpr (BITS == 3) {
    __m256i a = load(w), b = load(w + 64), d = load(w + 128);
    c[0] = field<0, 7>(a), c[1] = field<3, 7>(a), c[2] = field<0, 7>(b), c[3] = field<3, 7>(b);
    c[4] = field<0, 7>(d), c[5] = field<3, 7>(d);
    c[6] = _mm256_or_si256(field<5, 6>(a), field<6, 1>(b));
    c[7] = _mm256_or_si256(field<5, 6>(d), field<7, 1>(b));
  } else if constexpr (BITS == 6) {
    for (int v = 0; v < 2; ++v, w += 192, c += 4) {
      __m256i a = load(w), b = load(w + 64), d = load(w + 128);
      c[0] = field<0, 63>(a), c[1] = field<0, 63>(b), c[2] = field<0, 63>(d);
      c[3] = _mm256_or_si256(_mm256_or_si256(field<6, 3>(a), field<4, 12>(b)), field<2, 48>(d));
    }
  } else {
    for (int v = 0; v < 4; ++v) {
      __m256i two = load(w + 64 * v);
      c[2 * v] = field<0, 15>(two), c[2 * v + 1] = field<4, 15>(two);
    }
  }
}

__m256i four(const int8_t* x) {
  int32_t inputs;
  memcpy(&inputs, x, 4);
  return _mm256_set1_epi32(inputs);
}
__m256i product(__m256i codes, const int8_t* x) { return _mm256_maddubs_epi16(codes, four(x)); }

// Keeps a compiler from summing in another order, for which it would need more registers than there
// are and load codes and scales again for each token.
MOEPACK_INLINE void in_order(__m256i& a, __m256i& b) { asm("" : "+x"(a), "+x"(b)); }

// Adds step * products to 8 rows' sums of one token.
MOEPACK_INLINE void add_to(float* at, bool begun, __m256 value, __m256 step) {
  _mm256_storeu_ps(at, begun ? _mm256_fmadd_ps(value, step, _mm256_loadu_ps(at))
                             : _mm256_mul_ps(value, step));
}

// sums[t] += step[t] * scale x codes x q[t], 32 inputs of 8 rows in one group. With WHOLE scales they
// stand in both halves of a row's 32 bits; otherwise they are floats. Eight products of codes up to 15
// reach 8 * 2 * 15 * 127 = 30480, within 16 bits; with PAIRS they are of codes up to 63, of which two
// do.
template <bool WHOLE, bool PAIRS, bool BEGUN>
void add_32(const __m256i* c, __m256i whole, __m256 scale, const int8_t* q, const float* step,
            int64_t count, float* sums) {
  // Copies: sums might lie where c does, for all that a compiler knows, which would load c each time.
  __m256i c0 = c[0], c1 = c[1], c2 = c[2], c3 = c[3], c4 = c[4], c5 = c[5], c6 = c[6], c7 = c[7];
  for (int64_t t = 0; t < count; ++t, q += kStepCols, sums += kTileRows) {
    __m256i a = product(c0, q), b = product(c4, q + 16);
    a = _mm256_add_epi16(a, product(c1, q + 4)), b = _mm256_add_epi16(b, product(c5, q + 20));
    if constexpr (PAIRS) {
      __m256i d = _mm256_add_epi16(product(c2, q + 8), product(c3, q + 12));
      __m256i e = _mm256_add_epi16(product(c6, q + 24), product(c7, q + 28));
      a = _mm256_add_epi32(_mm256_madd_epi16(a, whole), _mm256_madd_epi16(d, whole));
      b = _mm256_add_epi32(_mm256_madd_epi16(b, whole), _mm256_madd_epi16(e, whole));
      a = _mm256_add_epi32(a, b);
    } else {
      a = _mm256_add_epi16(a, product(c2, q + 8)), b = _mm256_add_epi16(b, product(c6, q + 24));
      a = _mm256_add_epi16(a, product(c3, q + 12)), b = _mm256_add_epi16(b, product(c7, q + 28));
      a = _mm256_madd_epi16(_mm256_add_epi16(a, b), whole);
    }
    __m256 value = _mm256_cvtepi32_ps(a);
    if constexpr (!WHOLE) value = _mm256_mul_ps(value, scale);
    add_to(sums, BEGUN, value, _mm256_set1_ps(step[t]));
  }
}

// The same for 16 inputs of 16 rows, half of the inputs under a step: c[4 * half of the rows + quad].
// Levels reach 4 * 2 * 31 * 127 = 31496. What they are above what they stand for is taken off again
// while sums are whole: offset[t] holds it for the two sums of a row's 32 bits.
template <bool LEVELS, bool BEGUN>
void add_16(const __m256i* c, const __m256i* whole, const int8_t* q, const int32_t* offset,
            const float* step, int64_t count, float* sums) {
  __m256i c0 = c[0], c1 = c[1], c2 = c[2], c3 = c[3], c4 = c[4], c5 = c[5], c6 = c[6], c7 = c[7];
  __m256i s0 = whole[0], s1 = whole[1];
  for (int64_t t = 0; t < count; ++t, q += kStepCols, sums += kTileRows) {
    __m256i x = four(q), a = _mm256_maddubs_epi16(c0, x), b = _mm256_maddubs_epi16(c4, x);
    in_order(a, b), x = four(q + 4);
    a = _mm256_add_epi16(a, _mm256_maddubs_epi16(c1, x));
    b = _mm256_add_epi16(b, _mm256_maddubs_epi16(c5, x));
    in_order(a, b), x = four(q + 8);
    a = _mm256_add_epi16(a, _mm256_maddubs_epi16(c2, x));
    b = _mm256_add_epi16(b, _mm256_maddubs_epi16(c6, x));
    in_order(a, b), x = four(q + 12);
    a = _mm256_add_epi16(a, _mm256_maddubs_epi16(c3, x));
    b = _mm256_add_epi16(b, _mm256_maddubs_epi16(c7, x));
    if constexpr (LEVELS) {
      x = _mm256_set1_epi32(offset[t]);
      a = _mm256_sub_epi16(a, x), b = _mm256_sub_epi16(b, x);
    }
    __m256 each = _mm256_set1_ps(step[t]);
    add_to(sums, BEGUN, _mm256_cvtepi32_ps(_mm256_madd_epi16(a, s0)), each);
    add_to(sums + kRows, BEGUN, _mm256_cvtepi32_ps(_mm256_madd_epi16(b, s1)), each);
  }
}

// y[t] += outer * sums[t] - minima x x[t], for GROUPS groups and N tokens, which share the loads.
template <int GROUPS, int N>
MOEPACK_INLINE void finish(const float* sums, const __m256* outer, const float (*minima)[kTileRows],
                           const float* x, float* y, int64_t stride, bool begun) {
  __m256 low[N][2];
  for (int n = 0; n < N; ++n) low[n][0] = low[n][1] = _mm256_setzero_ps();
  for (int g = 0; g < GROUPS; ++g)
    for (int n = 0; n < N; ++n) {
      __m256 each = _mm256_set1_ps(x[n * GROUPS + g]);
      for (int i = 0; i < 2; ++i)
        low[n][i] = _mm256_fmadd_ps(each, _mm256_load_ps(minima[g] + kRows * i), low[n][i]);
    }
  for (int n = 0; n < N; ++n)
    for (int i = 0; i < 2; ++i) {
      const float* of_rows = sums + n * kTileRows + kRows * i;
      __m256 sum = _mm256_fmsub_ps(_mm256_loadu_ps(of_rows), outer[i], low[n][i]);
      float* to = y + n * stride + kRows * i;
      _mm256_storeu_ps(to, begun ? _mm256_add_ps(_mm256_loadu_ps(to), sum) : sum);
    }
}
template <int GROUPS>
void finish_all(const float* sums, const __m256* outer, const float (*minima)[kTileRows],
                const float* x, int64_t count, float* y, int64_t stride, bool begun) {
  constexpr int together = 4;
  int64_t t = 0;
  for (; t + together <= count; t += together)
    finish<GROUPS, together>(sums + t * kTileRows, outer, minima, x + t * GROUPS, y + t * stride,
                             stride, begun);
  for (; t < count; ++t)
    finish<GROUPS, 1>(sums + t * kTileRows, outer, minima, x + t * GROUPS, y + t * stride, stride,
                      begun);
}

__m256 halves(const uint8_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
__m256 floats(const uint8_t* p) { return _mm256_castsi256_ps(load(p)); }
__m256i words(const uint8_t* p, bool is_signed) {
  __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return is_signed ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes);
}

// Scales and minima of one group of 8 rows, which are whole numbers under an outer factor.
template <int SCALE_BITS>
__m256i whole_scales(const uint8_t* m, __m256 outer_low, float* minima) {
  __m256i scale = words(m, false), low;
  if constexpr (SCALE_BITS == 4) {
    low = _mm256_srli_epi32(scale, 4), scale = _mm256_and_si256(scale, _mm256_set1_epi32(15));
  } else {
    low = words(m + kTileRows, true);
  }
  _mm256_store_ps(minima, _mm256_mul_ps(_mm256_cvtepi32_ps(low), outer_low));
  return _mm256_or_si256(scale, _mm256_slli_epi32(scale, 16));
}

__m256i levels_of(__m256i codes) {
  int64_t table;
  memcpy(&table, kLevels, 8);
  return _mm256_shuffle_epi8(_mm256_set1_epi64x(table), codes);
}

// The same for signed scales of five bits, which have no minima; see load_signed in tile.h.
__m256i signed_scales(const uint8_t* four, bool upper, const uint8_t* fifths, int64_t bit) {
  __m256i low = words(four, false), fifth = words(fifths, false);
  low = _mm256_and_si256(_mm256_srli_epi32(low, upper ? 4 : 0), _mm256_set1_epi32(15));
  fifth = _mm256_srl_epi32(fifth, _mm_cvtsi64_si128(bit));
  fifth = _mm256_slli_epi32(_mm256_and_si256(fifth, _mm256_set1_epi32(1)), 4);
  __m256i scale = _mm256_sub_epi32(low, fifth);
  return _mm256_blend_epi16(scale, _mm256_slli_epi32(scale, 16), 0xAA);
}

template <Scheme S>
void panel_tile(const uint8_t* w, int64_t blocks, const Panel& x, int64_t first, int64_t count,
                float* y, int64_t stride) {
  constexpr Format F = kFormats[S];
  constexpr bool whole = F.scale_bits != 16;
  constexpr int each = F.span / kBlockCols, supers = kSuperCols / kBlockCols;
  constexpr int group = F.group < kBlockCols ? F.group : kBlockCols;  // under one of x.sums
  constexpr int per_block = kBlockCols / group;
  constexpr int64_t stored = F.small_nbytes() / per_block;
  alignas(64) float sums[kPanelTokens * kTileRows], minima[kSuperCols / 16][kTileRows];
  const uint8_t* head = w;
  w += F.head_nbytes();
  for (int64_t super = 0; super * supers < blocks; ++super) {
    int64_t here = blocks - super * supers < supers ? blocks - super * supers : supers;
    if (!F.levels() && here < supers) memset(minima, 0, sizeof minima);
    // What is left over is under the scales before it.
    bool own = here == supers || super == 0 || !F.joins_last();
    if (F.super_nbytes() > 0 && own) head = w, w += F.super_nbytes();
    __m256 outer[2], outer_low[2];
    for (int i = 0; i < 2; ++i) {
      outer[i] = outer_low[i] = _mm256_set1_ps(1.0f);
      if constexpr (F.scale_bits == 4)
        outer[i] = halves(head + 16 * i), outer_low[i] = halves(head + 2 * kTileRows + 16 * i);
      if constexpr (F.levels()) outer[i] = halves(head + 16 * i);
      if constexpr (F.scale_bits == 8)
        outer[i] = floats(head + 32 * i), outer_low[i] = floats(head + 4 * kTileRows + 32 * i);
    }
    for (int64_t b = 0; b < here; ++b) {
      // Float16 scales follow the codes of a span; small ones those of a block.
      int64_t left = here - b < each - b % each ? here - b : each - b % each;
      const uint8_t* metadata = w + (whole ? 1 : left) * F.code_nbytes();
      for (int half = 0; half < 2; ++half) {
        int64_t at = ((super * supers + b) * 2 + half) * x.tokens + first;
        const int8_t* q = x.q + at * kStepCols;
        const float* step = x.step + at;
        const uint8_t* codes_at = w + half * (F.code_nbytes() / 2);
        bool begun = b > 0 || half > 0;
        __m256i c[8];
        if constexpr (group == 16) {
          __m256i all[2][8];
          for (int i = 0; i < 2; ++i) unpack<F.bits>(codes_at + 32 * i, all[i]);
          for (int g = 0; g < 2; ++g) {
            int64_t number = b * per_block + 2 * half + g;  // of the group in the span
            __m256i scale[2];
            for (int i = 0; i < 2; ++i) {
              int64_t row = kRows * i;
              if constexpr (F.levels())
                scale[i] = signed_scales(metadata + half * kTileRows + row, g == 1,
                                         head + (2 + number / 8) * kTileRows + row, number % 8);
              else
                scale[i] = whole_scales<F.scale_bits>(metadata + (2 * half + g) * stored + row,
                                                      outer_low[i], minima[number] + row);
              for (int quad = 0; quad < 4; ++quad) {
                __m256i codes = all[i][4 * g + quad];
                c[4 * i + quad] = F.levels() ? levels_of(codes) : codes;
              }
            }
            const int32_t* offset = F.levels() ? x.offset + 2 * at + g * x.tokens - first : nullptr;
            (begun || g > 0 ? add_16<F.levels(), true> : add_16<F.levels(), false>)(
                c, scale, q + 16 * g, offset, step, count, sums);
          }
        } else {
          for (int i = 0; i < 2; ++i) {
            __m256i scale = _mm256_set1_epi16(1);
            __m256 factor = outer[i];
            if constexpr (whole) {
              int number = half * kStepCols / group;
              scale = whole_scales<F.scale_bits>(metadata + number * stored + kRows * i, outer_low[i],
                                                 minima[b * per_block + number] + kRows * i);
            } else {
              factor = halves(metadata + 16 * i);
              _mm256_store_ps(minima[b] + kRows * i, halves(metadata + 2 * kTileRows + 16 * i));
            }
            unpack<F.bits>(codes_at + 32 * i, c);
            constexpr bool pairs = F.bits == 6;
            (begun ? add_32<whole, pairs, true> : add_32<whole, pairs, false>)(
                c, scale, factor, q, step, count, sums + kRows * i);
          }
        }
      }
      w += F.code_nbytes();
      w += F.small_nbytes();
      if (!whole && left == 1) w += 4 * kTileRows;
    }
    constexpr int groups = F.levels() ? 0 : kSuperCols / group;
    finish_all<groups>(sums, outer, minima, x.sums + (super * x.tokens + first) * groups, count, y,
                       stride, super > 0);
  }
}

template <int S> constexpr void fill_panels(Kernels& k) {
  if constexpr (S < kSchemes) {
    if constexpr (!kFormats[S].raw() && kFormats[S].bits < 8)
      k.panel_tile[S] = panel_tile<static_cast<Scheme>(S)>;
    fill_panels<S + 1>(k);
  }
}

}  // namespace
}  // namespace moepack
