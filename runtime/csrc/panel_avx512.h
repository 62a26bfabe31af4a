// Many tokens times one tile with AVX-512 VNNI: the codes of 256 inputs are unpacked to bytes once,
// which stay in the first cache while the tokens go by, eight at a time.
//
// Multiplications are the limit: of whole numbers and of floats together, Zen 4 does one a cycle for
// whole registers. Products of 32 inputs are 8 of them, the sum in float is one or one and a half, minima
// a half to two. So scales are multiplied into the codes where bytes hold that, and otherwise two groups
// of 16 inputs share one multiplication where 16 bits hold their sums.
#pragma once
#include "avx512.h"
#include "quantize_avx2.h"

namespace moepack {
namespace {

constexpr int kSuperBlocks = kSuperCols / kBlockCols, kSuperSteps = kSuperCols / kStepCols;
constexpr int kQuads = kStepCols / 4;  // registers of codes under a step

enum class Weigh {
  kFloat,   // a float scale for each block
  kFolded,  // codes are multiplied with their scales already
  kPaired,  // 16-bit scales of two groups of 16 inputs, whose sums fit 16 bits
  kWide,    // the same where the sums do not fit
};

template <Scheme S> constexpr Weigh weigh_of() {
  constexpr Format F = kFormats[S];
  if (F.scale_bits == 16) return Weigh::kFloat;
  // The largest product of a code and a scale.
  return F.scale_bits == 4 && ((1 << F.bits) - 1) * 15 < 256 ? Weigh::kFolded : Weigh::kPaired;
}

// 256 inputs of 16 rows, or fewer at a matrix's end.
struct alignas(64) Super {
  uint8_t codes[kSuperSteps][kQuads][64];
  int32_t pairs[kSuperSteps][kTileRows];  // scales of two groups, 16 bits each
  float scales[kSuperBlocks][kTileRows];
  float minima[kSuperCols / 16][kTileRows];  // of the groups under one of Panel::sums
  __m512 outer, outer_low;                   // of small scales and minima
};

// What a panel holds from a token and a super-block on. The next step's q and step lie `tokens` further,
// offset twice that.
struct Tokens {
  const int8_t* q;
  const float *step, *sums;
  const int32_t* offset;
  int64_t tokens;
};

// f(0), f(1), ... as straight code: in loops compilers keep arrays of sums in memory.
template <int N, int I = 0, class F> MOEPACK_INLINE void each(F&& f) {
  if constexpr (I < N) {
    f(std::integral_constant<int, I>());
    each<N, I + 1>(f);
  }
}

// The products of a step's 32 inputs and N tokens, times what is in integers of their scales.
template <Weigh HOW, bool LEVELS, int N>
MOEPACK_INLINE void multiply_step(const Super& s, int64_t number, const Tokens& x, __m512i* out) {
  constexpr int groups = HOW == Weigh::kPaired || HOW == Weigh::kWide ? 2 : 1;
  __m512i sum[2][N];
  each<groups>([&](auto g) MOEPACK_LAMBDA {
    each<N>([&](auto n) MOEPACK_LAMBDA {
      sum[g][n] = LEVELS ? _mm512_set1_epi32(x.offset[g * x.tokens + n]) : _mm512_setzero_si512();
    });
    each<kQuads / groups>([&](auto i) MOEPACK_LAMBDA {
      constexpr int quad = g * (kQuads / groups) + i;
      __m512i c = _mm512_load_si512(s.codes[number][quad]);
      each<N>([&](auto n) MOEPACK_LAMBDA {
        sum[g][n] = Avx512::dot(sum[g][n], c, x.q + n * kStepCols + 4 * quad);
      });
    });
  });
  __m512i scales = groups == 2 ? _mm512_load_si512(s.pairs[number]) : _mm512_setzero_si512();
  __m512i first = _mm512_srai_epi32(_mm512_slli_epi32(scales, 16), 16);
  __m512i second = _mm512_srai_epi32(scales, 16);
  each<N>([&](auto n) MOEPACK_LAMBDA {
    if constexpr (HOW == Weigh::kPaired)
      out[n] = _mm512_madd_epi16(pair_16(sum[0][n], sum[1][n]), scales);
    else if constexpr (HOW == Weigh::kWide)
      out[n] = _mm512_add_epi32(_mm512_mullo_epi32(sum[0][n], first),
                                _mm512_mullo_epi32(sum[1][n], second));
    else
      out[n] = sum[0][n];
  });
}

// y[n] (+)= the blocks of a super-block times N tokens. GROUPS: with minima, of a block.
template <Weigh HOW, bool LEVELS, int GROUPS, int N>
MOEPACK_INLINE void add_super(const Super& s, int64_t blocks, Tokens x, bool begun, float* y,
                              int64_t stride) {
  __m512 sum[N], of_block[N];
  each<N>([&](auto n) MOEPACK_LAMBDA { sum[n] = _mm512_setzero_ps(); });
  for (int64_t b = 0; b < blocks; ++b) {
    each<2>([&](auto half) MOEPACK_LAMBDA {
      __m512i whole[N];
      multiply_step<HOW, LEVELS, N>(s, 2 * b + half, x, whole);
      each<N>([&](auto n) MOEPACK_LAMBDA {
        __m512 value = _mm512_cvtepi32_ps(whole[n]), step = _mm512_set1_ps(x.step[n]);
        if constexpr (HOW != Weigh::kFloat) sum[n] = _mm512_fmadd_ps(value, step, sum[n]);
        else if constexpr (half == 0) of_block[n] = _mm512_mul_ps(value, step);
        else of_block[n] = _mm512_fmadd_ps(value, step, of_block[n]);
      });
      x.q += x.tokens * kStepCols, x.step += x.tokens;
      if constexpr (LEVELS) x.offset += 2 * x.tokens;
    });
    if constexpr (HOW == Weigh::kFloat) {
      __m512 scale = _mm512_load_ps(s.scales[b]);
      each<N>([&](auto n) MOEPACK_LAMBDA { sum[n] = _mm512_fmadd_ps(of_block[n], scale, sum[n]); });
    }
  }
  __m512 low[N];
  each<N>([&](auto n) MOEPACK_LAMBDA { low[n] = _mm512_setzero_ps(); });
  for (int64_t g = 0; g < blocks * GROUPS; ++g) {
    __m512 minima = _mm512_load_ps(s.minima[g]);
    each<N>([&](auto n) MOEPACK_LAMBDA {
      __m512 of_inputs = _mm512_set1_ps(x.sums[n * GROUPS * kSuperBlocks + g]);
      low[n] = _mm512_fmadd_ps(of_inputs, minima, low[n]);
    });
  }
  each<N>([&](auto n) MOEPACK_LAMBDA {
    if constexpr (HOW == Weigh::kFloat) sum[n] = _mm512_sub_ps(sum[n], low[n]);
    else sum[n] = _mm512_fmsub_ps(sum[n], s.outer, _mm512_mul_ps(low[n], s.outer_low));
    float* to = y + n * stride;
    _mm512_storeu_ps(to, begun ? _mm512_add_ps(_mm512_loadu_ps(to), sum[n]) : sum[n]);
  });
}

// The same for any number of tokens.
template <Weigh HOW, bool LEVELS, int GROUPS>
__attribute__((noinline)) void add_tokens(const Super& s, int64_t blocks, Tokens x, int64_t count,
                                          bool begun, float* y, int64_t stride) {
  auto add = [&](auto together) MOEPACK_LAMBDA {
    constexpr int N = decltype(together)::value;
    for (; count >= N; count -= N, y += N * stride) {
      add_super<HOW, LEVELS, GROUPS, N>(s, blocks, x, begun, y, stride);
      x.q += N * kStepCols, x.step += N, x.offset += LEVELS ? N : 0;
      x.sums += N * GROUPS * kSuperBlocks;
    }
  };
  add(std::integral_constant<int, 8>()), add(std::integral_constant<int, 4>());
  add(std::integral_constant<int, 1>());
}

// Scales of a step's groups, 32 bits each; what is in minima goes to `s`. See load_small and load_signed
// in tile.h. metadata: of the block.
template <Scheme S>
MOEPACK_INLINE void load_scales(const uint8_t* metadata, const uint8_t* head, int64_t number,
                                Super& s, __m512i* scale) {
  constexpr Format F = kFormats[S];
  constexpr int groups = kStepCols / F.group;
  for (int64_t g = 0; g < groups; ++g) {
    int64_t of_super = number * groups + g, of_block = number % 2 * groups + g;
    if constexpr (F.levels()) {
      const uint8_t* fifths = head + (2 + of_super / 8) * kTileRows;
      scale[g] = load_signed<Avx512>(metadata + number % 2 * kTileRows, g == 1, fifths,
                                     static_cast<int>(of_super % 8));
    } else {
      __m512i minimum;
      load_small<Avx512, F.scale_bits>(
          metadata + of_block * (F.small_nbytes() / (kBlockCols / F.group)), scale[g], minimum);
      _mm512_store_ps(s.minima[of_super], _mm512_cvtepi32_ps(minimum));
    }
  }
}

// How far from zero what codes of 4 inputs stand for is.
MOEPACK_INLINE __m512i level_sizes(__m512i codes) {
  int64_t table = 0;
  for (int i = 0; i < 8; ++i)
    table |= static_cast<int64_t>(kLevels[i] < kLevelOffset ? kLevelOffset - kLevels[i]
                                                            : kLevels[i] - kLevelOffset) << 8 * i;
  return _mm512_shuffle_epi8(_mm512_set1_epi64(table), codes);
}

// Unpacks a super-block and goes with w past it. head: of the tile, or of this super-block or, where it
// has none, the one before it. False: a sum of 16 levels may not fit 16 bits.
template <Scheme S>
bool unpack(const uint8_t*& w, const uint8_t*& head, bool own_head, int64_t blocks, Super& s) {
  constexpr Format F = kFormats[S];
  constexpr Weigh how = weigh_of<S>();
  constexpr int span = F.span / kBlockCols;
  s.outer_low = _mm512_setzero_ps();
  if constexpr (F.super_nbytes() > 0) {
    if (own_head) head = w, w += F.super_nbytes();
    s.outer = Avx512::load_f16(head);
    if constexpr (!F.levels()) s.outer_low = Avx512::load_f16(head + 2 * kTileRows);
  }
  if constexpr (F.scale_bits == 8)
    s.outer = Avx512::load_f32(head), s.outer_low = Avx512::load_f32(head + 4 * kTileRows);
  __m512i size = _mm512_setzero_si512();
  for (int64_t b = 0; b < blocks; ++b) {
    // Float16 scales follow the codes of a span; small ones those of a block.
    int64_t left = blocks - b < span - b % span ? blocks - b : span - b % span;
    const uint8_t* metadata = w + (how == Weigh::kFloat ? left : 1) * F.code_nbytes();
    if constexpr (how == Weigh::kFloat) {
      _mm512_store_ps(s.scales[b], Avx512::load_f16(metadata));
      _mm512_store_ps(s.minima[b], Avx512::load_f16(metadata + 2 * kTileRows));
    }
    for (int64_t number = 2 * b; number < 2 * b + 2; ++number, w += F.code_nbytes() / 2) {
      constexpr int groups = F.group < kStepCols ? 2 : 1;
      __m512i scale[groups], sizes[2] = {};
      if constexpr (how != Weigh::kFloat)
        load_scales<S>(metadata, head, number, s, scale);
      if constexpr (how == Weigh::kPaired)
        _mm512_store_si512(s.pairs[number], pair_16(scale[0], scale[1]));
      if constexpr (how == Weigh::kFolded)
        for (auto& of_group : scale) of_group = pair_16(of_group, of_group);
      each_quad<Avx512, F.bits>(w, [&](int quad, __m512i c) MOEPACK_LAMBDA {
        if constexpr (F.levels()) {
          sizes[quad / 4] = _mm512_add_epi8(sizes[quad / 4], level_sizes(c));
          c = Avx512::levels(c);
        }
        // Products of bytes stay below 256, so two of them fit a product of 16 bits.
        if constexpr (how == Weigh::kFolded) c = _mm512_mullo_epi16(c, scale[quad * groups / 8]);
        Avx512::store_codes(s.codes[number][quad], c);
      });
      for (int g = 0; F.levels() && g < 2; ++g)
        size = _mm512_max_epi32(size, _mm512_dpbusd_epi32(_mm512_setzero_si512(), sizes[g],
                                                          _mm512_set1_epi8(1)));
    }
    w += F.small_nbytes();
    if (how == Weigh::kFloat && left == 1) w += 4 * kTileRows;
  }
  if constexpr (!F.levels()) return true;
  constexpr int most = 127;  // of an int8 activation
  return _mm512_reduce_max_epi32(size) * most <= INT16_MAX;
}

template <Scheme S>
void panel_tile(const uint8_t* w, int64_t blocks, const Panel& x, int64_t first, int64_t count,
                float* y, int64_t stride) {
  constexpr Format F = kFormats[S];
  constexpr Weigh how = weigh_of<S>();
  // Groups of a block under one of x.sums.
  constexpr int per_block = F.levels() ? 0 : F.group < kBlockCols ? kBlockCols / F.group : 1;
  Super s;
  const uint8_t* head = w;
  w += F.head_nbytes();
  for (int64_t b = 0; b < blocks; b += kSuperBlocks) {
    int64_t here = blocks - b < kSuperBlocks ? blocks - b : kSuperBlocks;
    int64_t at = 2 * b * x.tokens + first, groups = kSuperBlocks * per_block;
    Tokens tokens{x.q + at * kStepCols, x.step + at,
                  x.sums + (b / kSuperBlocks * x.tokens + first) * groups, nullptr, x.tokens};
    bool own_head = here == kSuperBlocks || b == 0 || !F.joins_last();
    bool narrow = unpack<S>(w, head, own_head, here, s);
    if constexpr (F.levels()) {
      tokens.offset = x.offset + at + 2 * b * x.tokens;
      if (!narrow) {
        add_tokens<Weigh::kWide, true, 0>(s, here, tokens, count, b > 0, y, stride);
        continue;
      }
    }
    add_tokens<how, F.levels(), per_block>(s, here, tokens, count, b > 0, y, stride);
  }
}

template <int S> constexpr void fill_panels(Kernels& k) {
  if constexpr (S < kSchemes) {
    if constexpr (!kFormats[S].raw()) k.panel_tile[S] = panel_tile<static_cast<Scheme>(S)>;
    fill_panels<S + 1>(k);
  }
}

// What a machine with AVX-512 provides. V: for the walks over a tile.
template <class V> constexpr Kernels make_avx512(const char* name, bool (*supported)()) {
  Kernels k = make_kernels<V>(name, supported);
  k.quantize_block = quantize_block<quantize_step_avx2>;
  fill_panels<0>(k);
  return k;
}

}  // namespace
}  // namespace moepack
