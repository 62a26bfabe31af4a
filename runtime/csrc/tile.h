// The walk over one tile, once for every instruction set.
//
// V gives the vectors: Codes (16 rows x 4 inputs, one byte each), Partial (a sum of products that
// need not be widened yet), Ints and Floats (one value for each of the 16 rows).
// The same walk serves float activations and int8 ones: Dot says what a product is.
// N: tokens that share the walk, so that packed bytes are read and unpacked once.
#pragma once
#include <type_traits>

#include "kernels.h"

// Lambdas must vanish too: a call per quad would cost more than the quad.
#define MOEPACK_INLINE inline __attribute__((always_inline))
#define MOEPACK_LAMBDA __attribute__((always_inline))

namespace moepack {
namespace {

// Records are read once, front to back, and hardware prefetchers stop at page ends, so lines are asked for
// ahead: into the second cache. A line on its way into the first holds one of its few places for what is
// missing until it comes from memory, and loads wait for those; asked for that way a layer at 3 bits
// takes 1.2 to 1.5 times as long. Two threads lose up to a quarter with 4 KB in place of 6, 3 to 8 %
// with 8.
MOEPACK_INLINE void ask_ahead(const void* at) {
  __builtin_prefetch(static_cast<const uint8_t*>(at) + kAhead, 0, 2);
}

// Calls f(quad, codes) for the eight quads (4 inputs each) of 32 inputs.
template <class V, int BITS, class F> MOEPACK_INLINE void each_quad(const uint8_t* w, F&& f) {
  using Codes = typename V::Codes;
  constexpr int quads = 8;
  if constexpr (BITS == 2) {
    for (int v = 0; v < quads / 4; ++v) {
      Codes c = V::load(w + 64 * v);
      ask_ahead(w + 64 * v);
      f(4 * v, V::template field<0, 3>(c));
      f(4 * v + 1, V::template field<2, 3>(c));
      f(4 * v + 2, V::template field<4, 3>(c));
      f(4 * v + 3, V::template field<6, 3>(c));
    }
  } else if constexpr (BITS == 3) {
    Codes a = V::load(w), b = V::load(w + 64), c = V::load(w + 128);
    for (int v = 0; v < 3; ++v) ask_ahead(w + 64 * v);
    f(0, V::template field<0, 7>(a));
    f(1, V::template field<3, 7>(a));
    f(2, V::template field<0, 7>(b));
    f(3, V::template field<3, 7>(b));
    f(4, V::template field<0, 7>(c));
    f(5, V::template field<3, 7>(c));
    // The last two quads lie in the top bits: upper two in a or c, the lowest in b.
    f(6, V::merge(V::template field<5, 6>(a), V::template field<6, 1>(b)));
    f(7, V::merge(V::template field<5, 6>(c), V::template field<7, 1>(b)));
  } else if constexpr (BITS == 4) {
    for (int v = 0; v < quads / 2; ++v) {
      Codes c = V::load(w + 64 * v);
      ask_ahead(w + 64 * v);
      f(2 * v, V::template field<0, 15>(c));
      f(2 * v + 1, V::template field<4, 15>(c));
    }
  } else if constexpr (BITS == 6) {
    for (int v = 0; v < quads / 4; ++v, w += 192) {
      Codes a = V::load(w), b = V::load(w + 64), c = V::load(w + 128);
      for (int i = 0; i < 3; ++i) ask_ahead(w + 64 * i);
      f(4 * v, V::template field<0, 63>(a));
      f(4 * v + 1, V::template field<0, 63>(b));
      f(4 * v + 2, V::template field<0, 63>(c));
      f(4 * v + 3, V::tops(a, b, c));
    }
  } else {
    for (int v = 0; v < quads; ++v) {
      ask_ahead(w + 64 * v);
      f(v, V::load(w + 64 * v));
    }
  }
}

// How a scheme's codes lie in a tile: as packed, or a byte each, which many tokens' walks are faster
// over than unpacking costs once. A byte is a level already where codes stand for levels.
template <Scheme S, bool BYTES> struct Stored {
  static constexpr int bits = BYTES ? 8 : kFormats[S].bits;
  static constexpr int code_bits = kFormats[S].bits;  // that a code uses
  static constexpr bool wide = code_bits == 8;
  static constexpr bool levels = kFormats[S].levels() && !BYTES;
  static constexpr int64_t code_nbytes = int64_t{kTileRows} * kBlockCols * bits / 8;
};

// int8 activations: products and the sums of a group are integers.
template <class V> struct Int8Dot {
  using Total = typename V::Ints;

  // 32 inputs in one or two groups. HOW: see Stored.
  template <class HOW, int GROUPS, int N>
  static MOEPACK_INLINE void dot(const uint8_t* w, const Row* rows, int64_t col,
                                 Total (*out)[N]) {
    if constexpr (HOW::wide) {
      static_assert(GROUPS == 1);
      for (int n = 0; n < N; ++n) out[0][n] = V::zero_ints();
      each_quad<V, HOW::bits>(w, [&](int quad, typename V::Codes c) MOEPACK_LAMBDA {
        for (int n = 0; n < N; ++n)
          out[0][n] = V::dot_wide(out[0][n], c, rows[n].q + col + 4 * quad);
      });
    } else if constexpr (V::template partial_quads<HOW::code_bits>() < 8) {
      static_assert(GROUPS == 1);
      constexpr int run = V::template partial_quads<HOW::code_bits>();
      typename V::Partial part[N];
      for (int n = 0; n < N; ++n) out[0][n] = V::zero_ints();
      each_quad<V, HOW::bits>(w, [&](int quad, typename V::Codes c) MOEPACK_LAMBDA {
        for (int n = 0; n < N; ++n) {
          if (quad % run == 0) part[n] = V::zero_partial();
          part[n] = V::dot(part[n], c, rows[n].q + col + 4 * quad);
          if (quad % run == run - 1) out[0][n] = V::add_ints(out[0][n], V::widen(part[n]));
        }
      });
    } else {
      typename V::Partial part[GROUPS][N];
      for (int g = 0; g < GROUPS; ++g)
        for (int n = 0; n < N; ++n) part[g][n] = V::zero_partial();
      each_quad<V, HOW::bits>(w, [&](int quad, typename V::Codes c) MOEPACK_LAMBDA {
        if constexpr (HOW::levels) c = V::levels(c);
        int g = quad * GROUPS / 8;
        for (int n = 0; n < N; ++n)
          part[g][n] = V::dot(part[g][n], c, rows[n].q + col + 4 * quad);
      });
      for (int g = 0; g < GROUPS; ++g)
        for (int n = 0; n < N; ++n) out[g][n] = V::widen(part[g][n]);
    }
  }
  static MOEPACK_INLINE Total zero() { return V::zero_ints(); }
  // Totals of a group of codes below 8 fit in 16 bits, and so do scales, minima and group sums.
  static MOEPACK_INLINE Total weigh(Total sum, typename V::Ints scale, Total dot) {
    return V::mul_add_16(sum, scale, dot);
  }
  static MOEPACK_INLINE Total weigh_sum(Total sum, typename V::Ints minimum, const Row& row,
                                        int64_t col, int group) {
    int32_t total = row.qsum16[col / 16];
    if (group == 32) total += row.qsum16[col / 16 + 1];
    return V::mul_add_16(sum, minimum, V::set_low16(total));
  }
  // Those of a group of 16 levels do not fit.
  static MOEPACK_INLINE Total weigh_levels(Total sum, typename V::Ints scale, Total dot,
                                           const Row& row, int64_t col) {
    typename V::Ints offset = V::set_int(kLevelOffset * row.qsum16[col / 16]);
    return V::mul_add_32(sum, scale, V::sub_ints(dot, offset));
  }
  static MOEPACK_INLINE typename V::Floats add(typename V::Floats sum, Total t, const Row& row,
                                               int64_t col) {
    return V::fma(V::to_floats(t), V::set(row.step[col / kStepCols]), sum);
  }
  static MOEPACK_INLINE float block_sum(const Row& row, int64_t block) { return row.sum64[block]; }
};

// float32 activations: the exact mode.
template <class V> struct FloatDot {
  using Total = typename V::Floats;

  template <class HOW, int GROUPS, int N>
  static MOEPACK_INLINE void dot(const uint8_t* w, const Row* rows, int64_t col,
                                 Total (*out)[N]) {
    Total part[GROUPS][N][4];  // one chain for each input of a quad
    for (int g = 0; g < GROUPS; ++g)
      for (int n = 0; n < N; ++n)
        for (int j = 0; j < 4; ++j) part[g][n][j] = V::zero();
    each_quad<V, HOW::bits>(w, [&](int quad, typename V::Codes c) MOEPACK_LAMBDA {
      if constexpr (HOW::levels) c = V::levels(c);
      int g = quad * GROUPS / 8;
      Total value[4] = {V::template byte<0>(c), V::template byte<1>(c), V::template byte<2>(c),
                        V::template byte<3>(c)};
      for (int n = 0; n < N; ++n) {
        const float* x = rows[n].x + col + 4 * quad;
        for (int j = 0; j < 4; ++j)
          part[g][n][j] = V::fma(value[j], V::set(x[j]), part[g][n][j]);
      }
    });
    for (int g = 0; g < GROUPS; ++g)
      for (int n = 0; n < N; ++n) {
        Total* p = part[g][n];
        out[g][n] = V::add(V::add(p[0], p[1]), V::add(p[2], p[3]));
      }
  }
  static MOEPACK_INLINE Total zero() { return V::zero(); }
  static MOEPACK_INLINE Total weigh(Total sum, typename V::Ints scale, Total dot) {
    return V::fma(V::to_floats(scale), dot, sum);
  }
  static MOEPACK_INLINE Total weigh_sum(Total sum, typename V::Ints minimum, const Row& row,
                                        int64_t col, int group) {
    float total = row.sum16[col / 16];
    if (group == 32) total += row.sum16[col / 16 + 1];
    return V::fma(V::to_floats(minimum), V::set(total), sum);
  }
  static MOEPACK_INLINE Total weigh_levels(Total sum, typename V::Ints scale, Total dot,
                                           const Row& row, int64_t col) {
    Total offset = V::set(kLevelOffset * row.sum16[col / 16]);
    return V::fma(V::to_floats(scale), V::sub(dot, offset), sum);
  }
  static MOEPACK_INLINE Total add(Total sum, Total t, const Row&, int64_t) {
    return V::add(sum, t);
  }
  static MOEPACK_INLINE float block_sum(const Row& row, int64_t block) {
    const float* s = row.sum16 + 4 * block;
    return (s[0] + s[1]) + (s[2] + s[3]);
  }
};

// Schemes with a float16 scale and minimum per group of 64 or 128 inputs.
template <class V, Scheme S, bool BYTES, class D, int N>
void tile_float_scales(const uint8_t* w, int64_t blocks, const Row* rows, float* y) {
  constexpr Format F = kFormats[S];
  using Codes = Stored<S, BYTES>;
  constexpr int each = F.span / kBlockCols, half = Codes::code_nbytes / 2;
  typename V::Floats acc[N], low[N];  // sums of scale * code * x and of minimum * x
  for (int n = 0; n < N; ++n) acc[n] = low[n] = V::zero();
  for (int64_t first = 0; first < blocks; first += each) {
    int64_t end = first + each < blocks ? first + each : blocks;
    typename V::Floats sum[N];
    float xsum[N];
    for (int n = 0; n < N; ++n) sum[n] = V::zero(), xsum[n] = 0;
    for (int64_t b = first; b < end; ++b, w += Codes::code_nbytes) {
      typename D::Total left[1][N], right[1][N];  // two chains, shorter than the latency of one
      D::template dot<Codes, 1, N>(w, rows, b * 64, left);
      D::template dot<Codes, 1, N>(w + half, rows, b * 64 + 32, right);
      for (int n = 0; n < N; ++n) {
        sum[n] = D::add(sum[n], left[0][n], rows[n], b * 64);
        sum[n] = D::add(sum[n], right[0][n], rows[n], b * 64 + 32);
        xsum[n] += D::block_sum(rows[n], b);
      }
    }
    typename V::Floats scale = V::load_f16(w), minimum = V::load_f16(w + 2 * kTileRows);
    ask_ahead(w);
    w += 4 * kTileRows;
    for (int n = 0; n < N; ++n) {
      acc[n] = V::fma(sum[n], scale, acc[n]);
      low[n] = V::fma(minimum, V::set(xsum[n]), low[n]);
    }
  }
  for (int n = 0; n < N; ++n) V::store(y + 16 * n, V::sub(acc[n], low[n]));
}

// Stored scale and minimum of one group.
template <class V, int SCALE_BITS>
MOEPACK_INLINE void load_small(const uint8_t* w, typename V::Ints& scale,
                               typename V::Ints& minimum) {
  scale = V::load_u8(w);
  if constexpr (SCALE_BITS == 8) {
    minimum = V::load_i8(w + kTileRows);
  } else {
    minimum = V::template field_int<4, 15>(scale);
    scale = V::template field_int<0, 15>(scale);
  }
}

// A signed scale of five bits: four of them in the lower or upper half of a byte, the fifth, which
// counts -16, at a bit of another.
template <class V>
MOEPACK_INLINE typename V::Ints load_signed(const uint8_t* four, bool upper, const uint8_t* fifths,
                                            int bit) {
  typename V::Ints byte = V::load_u8(four), fifth = V::shift_right(V::load_u8(fifths), bit);
  typename V::Ints low = upper ? V::template field_int<4, 15>(byte)
                               : V::template field_int<0, 15>(byte);
  return V::sub_ints(low, V::shift_left_4(V::template field_int<0, 1>(fifth)));
}

// Schemes with small scales under an outer factor: per span (4 or 5 bits) or per row (8 bits).
template <class V, Scheme S, bool BYTES, class D, int N>
void tile_small_scales(const uint8_t* w, int64_t blocks, const Row* rows, float* y) {
  constexpr Format F = kFormats[S];
  using Codes = Stored<S, BYTES>;
  constexpr int groups = kStepCols / F.group;
  constexpr int64_t run = Codes::code_nbytes / 2, stored = F.small_nbytes() / 2;  // of 32 inputs
  constexpr bool by_row = F.scale_bits == 8;
  constexpr int own = std::is_same_v<D, Int8Dot<V>> && !BYTES ? V::template own_cols<S>() : 0;
  typename V::Floats acc[N], low[N];
  for (int n = 0; n < N; ++n) acc[n] = low[n] = V::zero();
  int64_t each = by_row ? blocks : kSuperCols / kBlockCols;
  int64_t starts = by_row ? blocks : F.starts_below(blocks);
  for (int64_t first = 0; first < starts; first += each) {
    typename V::Floats outer, outer_low = V::zero();
    const uint8_t* fifths = w + 2 * kTileRows;
    if constexpr (by_row) {
      outer = V::load_f32(w), outer_low = V::load_f32(w + 4 * kTileRows);
    } else {
      outer = V::load_f16(w);
      if constexpr (own > 0 && F.levels()) outer = V::mul(outer, V::set(V::kLevelUnit));
      if constexpr (!F.levels()) outer_low = V::load_f16(w + 2 * kTileRows);
    }
    ask_ahead(w);
    w += by_row ? F.head_nbytes() : F.super_nbytes();
    int64_t end = first + each < starts ? first + each : blocks;
    typename V::Floats sum[N], sum_low[N];
    for (int n = 0; n < N; ++n) sum[n] = sum_low[n] = V::zero();
    for (int64_t b = first; b < end; ++b) {
      const uint8_t* metadata = w + Codes::code_nbytes;
      ask_ahead(metadata);
      if constexpr (own == kBlockCols) {
        typename D::Total high[2][N], base[2][N];
        V::template block<S, N>(w, metadata, fifths, (b - first) * kBlockCols / F.group, rows,
                                b * kBlockCols, high, base);
        w += 2 * run, metadata += 2 * stored;
        for (int h = 0; h < 2; ++h)
          for (int n = 0; n < N; ++n) {
            int64_t col = b * kBlockCols + h * kStepCols;
            sum[n] = D::add(sum[n], high[h][n], rows[n], col);
            if constexpr (!F.levels()) sum_low[n] = D::add(sum_low[n], base[h][n], rows[n], col);
          }
      } else {
        for (int64_t half = b * 64; half < b * 64 + 64; half += kStepCols) {
          typename D::Total high[N], base[N];
          // Of the first group in the span.
          int64_t number = static_cast<int64_t>(static_cast<uint64_t>(half - first * 64) / F.group);
          if constexpr (own == kStepCols) {
            V::template half<S, N>(w, metadata, fifths, number, rows, half, high, base);
          } else {
            typename D::Total dot[groups][N];
            D::template dot<Codes, groups, N>(w, rows, half, dot);
            for (int n = 0; n < N; ++n) high[n] = base[n] = D::zero();
            for (int g = 0; g < groups; ++g) {
              int64_t col = half + g * F.group;
              typename V::Ints scale, minimum;
              if constexpr (F.levels()) {
                const uint8_t* of_eight = fifths + number / 8 * kTileRows;
                scale = load_signed<V>(metadata, g == 1, of_eight, static_cast<int>(number % 8) + g);
              } else {
                load_small<V, F.scale_bits>(metadata + g * stored / groups, scale, minimum);
              }
              for (int n = 0; n < N; ++n) {
                if constexpr (F.levels()) {
                  high[n] = D::weigh_levels(high[n], scale, dot[g][n], rows[n], col);
                } else {
                  high[n] = D::weigh(high[n], scale, dot[g][n]);
                  base[n] = D::weigh_sum(base[n], minimum, rows[n], col, F.group);
                }
              }
            }
          }
          w += run, metadata += stored;
          for (int n = 0; n < N; ++n) {
            sum[n] = D::add(sum[n], high[n], rows[n], half);
            if constexpr (!F.levels()) sum_low[n] = D::add(sum_low[n], base[n], rows[n], half);
          }
        }
      }
      w = metadata;
    }
    for (int n = 0; n < N; ++n) {
      acc[n] = V::fma(sum[n], outer, acc[n]);
      if constexpr (!F.levels()) low[n] = V::fma(sum_low[n], outer_low, low[n]);
    }
  }
  for (int n = 0; n < N; ++n) V::store(y + 16 * n, V::sub(acc[n], low[n]));
}

// 16- and 32-bit floats: a 64-byte vector holds two or one inputs of 16 rows.
template <class V, Scheme S, int N>
void tile_raw(const uint8_t* w, int64_t blocks, const Row* rows, float* y) {
  constexpr int step = S == F32 ? 4 : 8;  // inputs of four vectors
  typename V::Floats acc[N][4];
  for (int n = 0; n < N; ++n)
    for (int j = 0; j < 4; ++j) acc[n][j] = V::zero();
  for (int64_t col = 0; col < blocks * kBlockCols; col += step, w += 256) {
    for (int v = 0; v < 4; ++v) {
      typename V::Codes c = V::load(w + 64 * v);
      ask_ahead(w + 64 * v);
      for (int n = 0; n < N; ++n) {
        const float* x = rows[n].x + col;
        if constexpr (S == F32) {
          acc[n][v] = V::fma(V::f32(c), V::set(x[v]), acc[n][v]);
        } else {
          typename V::Floats even, odd;
          if constexpr (S == BF16) V::bf16_pair(c, even, odd);
          else V::f16_pair(c, even, odd);
          acc[n][2 * v & 3] = V::fma(even, V::set(x[2 * v]), acc[n][2 * v & 3]);
          acc[n][(2 * v + 1) & 3] = V::fma(odd, V::set(x[2 * v + 1]), acc[n][(2 * v + 1) & 3]);
        }
      }
    }
  }
  for (int n = 0; n < N; ++n)
    V::store(y + 16 * n, V::add(V::add(acc[n][0], acc[n][1]), V::add(acc[n][2], acc[n][3])));
}

template <class V, Scheme S, bool INT8, bool BYTES, int N>
MOEPACK_INLINE void tile(const uint8_t* w, int64_t blocks, const Row* rows, float* y) {
  using D = std::conditional_t<INT8, Int8Dot<V>, FloatDot<V>>;
  if constexpr (kFormats[S].raw()) tile_raw<V, S, N>(w, blocks, rows, y);
  else if constexpr (kFormats[S].scale_bits == 16)
    tile_float_scales<V, S, BYTES, D, N>(w, blocks, rows, y);
  else tile_small_scales<V, S, BYTES, D, N>(w, blocks, rows, y);
}

}  // namespace
}  // namespace moepack
