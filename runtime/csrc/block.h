// What is plain C++ but must be compiled for each instruction set: quantizing activations, the
// activation functions, dense decoding. Loops run over 16 lanes, so that compilers vectorize them
// without being allowed to reorder sums; results are the same bits on every instruction set.
#pragma once
#include <math.h>
#include <string.h>

#include "attention.h"
#include "solver.h"
#include "tile.h"

namespace moepack {
namespace {

void copy_block(const float* x, int64_t count, Row& row, int64_t block) {
  float* out = row.x + block * kBlockCols;
  for (int i = 0; i < kBlockCols; ++i) out[i] = i < count ? x[i] : 0.0f;
  for (int g = 0; g < 4; ++g) {
    float sum = 0;
    for (int i = 0; i < kLanes; ++i) sum += out[16 * g + i];
    row.sum16[block * 4 + g] = sum;
  }
}

// 32 values to int8. For each 16 of them the sums of the first two and of the last two of every four
// go to `sums`. Returns the step.
inline float quantize_step(const float* v, int8_t* q, int16_t* sums) {
  float lane_max[kLanes] = {}, lane_poison[kLanes] = {};
  for (int g = 0; g < 2; ++g)
    for (int i = 0; i < kLanes; ++i) {
      float a = fabsf(v[16 * g + i]);
      lane_max[i] = a > lane_max[i] ? a : lane_max[i];
      lane_poison[i] += v[16 * g + i] * 0.0f;
    }
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) {
      lane_max[i] = lane_max[i + width] > lane_max[i] ? lane_max[i + width] : lane_max[i];
      lane_poison[i] += lane_poison[i + width];
    }
  float most = lane_max[0], poison = lane_poison[0];
  // A NaN or infinity makes the step NaN, and every output with it, as it would in a dot product.
  if (poison != 0.0f) {
    memset(q, 0, kStepCols);
    memset(sums, 0, 4 * sizeof *sums);
    return poison;
  }
  // 127 / absmax would overflow for denormals; they count as zero.
  float inverse = most > 1e-36f ? 127.0f / most : 0.0f;
  for (int g = 0; g < 2; ++g) {
    int32_t sum[2] = {};
    for (int i = 0; i < kLanes; ++i) {
      int32_t code = float_bits(v[16 * g + i] * inverse + kRound) - kRoundBits;
      q[16 * g + i] = static_cast<int8_t>(code);
      sum[i / 2 % 2] += code;
    }
    for (int i = 0; i < 2; ++i) sums[2 * g + i] = static_cast<int16_t>(sum[i]);
  }
  return most / 127.0f;
}

// STEP: quantize_step, or an instruction set's own that gives the same bits.
template <float (*STEP)(const float*, int8_t*, int16_t*)>
void quantize_block(const float* x, int64_t count, Row& row, int64_t block) {
  float padded[kBlockCols];
  if (count < kBlockCols) {
    for (int i = 0; i < kBlockCols; ++i) padded[i] = i < count ? x[i] : 0.0f;
    x = padded;
  }
  float sum = 0;
  for (int64_t half = 0; half < 2; ++half) {
    int64_t at = 2 * block + half;
    int16_t sums[4];
    row.step[at] = STEP(x + half * kStepCols, row.q + at * kStepCols, sums);
    for (int64_t g = 0; g < 2; ++g) {
      row.qsum16[2 * at + g] = static_cast<int16_t>(sums[2 * g] + sums[2 * g + 1]);
      row.level_base[2 * at + g] = -kLevelOffset * row.qsum16[2 * at + g];
    }
    for (int64_t i = 0; i < 4; ++i)
      row.qlevel[4 * at + i] = static_cast<int16_t>(kLevelOffset * sums[i]);
    sum += row.step[at] * static_cast<float>(row.qsum16[2 * at] + row.qsum16[2 * at + 1]);
  }
  row.sum64[block] = sum;
}

void activate(const moepack_activation& how, const float* gate, const float* up, float* h) {
  float z[kLanes], f[kLanes];
  for (int i = 0; i < kLanes; ++i) z[i] = gate[i] > how.limit ? how.limit : gate[i];
  switch (how.kind) {
    case MOEPACK_SILU:
      for (int i = 0; i < kLanes; ++i) f[i] = z[i] / (1.0f + exp_lane(-how.alpha * z[i]));
      break;
    case MOEPACK_GELU:
      for (int i = 0; i < kLanes; ++i) f[i] = 0.5f * z[i] * (1.0f + erff(z[i] * 0.707106781f));
      break;
    case MOEPACK_GELU_TANH:
      for (int i = 0; i < kLanes; ++i) {
        float inner = 0.797884561f * (z[i] + 0.044715f * z[i] * z[i] * z[i]);
        f[i] = 0.5f * z[i] * (1.0f + tanh_lane(inner));
      }
      break;
    default:  // relu and its square
      for (int i = 0; i < kLanes; ++i) {
        f[i] = z[i] < 0.0f ? 0.0f : z[i];
        if (how.kind == MOEPACK_RELU2) f[i] *= f[i];
      }
  }
  if (up == nullptr) {
    memcpy(h, f, sizeof f);
    return;
  }
  for (int i = 0; i < kLanes; ++i) {
    float u = up[i] > how.limit ? how.limit : up[i];
    u = u < -how.limit ? -how.limit : u;
    h[i] = f[i] * (u + how.up_offset);
  }
}

// One block's codes in the order of its rows.
template <class V, int BITS> void unpack_block(const uint8_t* w, uint8_t codes[16][64]) {
  alignas(64) uint8_t quads[16][64];
  for (int half = 0; half < 2; ++half)
    each_quad<V, BITS>(w + half * 64 * BITS, [&](int quad, typename V::Codes c) MOEPACK_LAMBDA {
      V::store_codes(quads[half * 8 + quad], c);
    });
  for (int r = 0; r < kTileRows; ++r)
    for (int q = 0; q < 16; ++q) memcpy(codes[r] + 4 * q, quads[q] + 4 * r, 4);
}

// A tile with a byte for each code; everything else stays as it is.
template <class V, Scheme S> void expand_tile(const uint8_t* w, int64_t blocks, uint8_t* out) {
  constexpr Format F = kFormats[S];
  auto copy = [&](int64_t nbytes) MOEPACK_LAMBDA {
    memcpy(out, w, static_cast<size_t>(nbytes));
    out += nbytes, w += nbytes;
  };
  copy(F.head_nbytes());
  constexpr int each = F.span / kBlockCols;
  int64_t starts = F.starts_below(blocks);
  for (int64_t first = 0; first < starts; first += each) {
    int64_t count = first + each < starts ? each : blocks - first;
    copy(F.super_nbytes());
    for (int64_t b = 0; b < count; ++b) {
      for (int half = 0; half < 2; ++half, out += 512, w += F.code_nbytes() / 2)
        each_quad<V, F.bits>(w, [&](int quad, typename V::Codes c) MOEPACK_LAMBDA {
          V::store_codes(out + 64 * quad, F.levels() ? V::levels(c) : c);
        });
      copy(F.small_nbytes());
    }
    if (F.scale_bits == 16) copy(4 * kTileRows);
  }
}

template <class V> void load_halves(const uint8_t* w, float* out) { V::store(out, V::load_f16(w)); }

template <class V, Scheme S> void decode_tile(const uint8_t* w, int64_t cols, float* out,
                                              int64_t stride) {
  constexpr Format F = kFormats[S];
  constexpr int groups = F.group >= kBlockCols ? 1 : kBlockCols / F.group;
  constexpr int width = kBlockCols / groups;  // inputs of a block under one scale
  float outer[2][16] = {}, scale[groups][16], low[groups][16];
  const uint8_t* fifths = w;
  if constexpr (F.scale_bits == 8) {
    memcpy(outer, w, sizeof outer);
    w += sizeof outer;
  }
  int64_t blocks = ceil_div(cols, kBlockCols), each = F.span / kBlockCols;
  int64_t starts = F.starts_below(blocks), first = 0, count = 0;  // of a span
  for (int64_t b = 0; b < blocks; ++b) {
    const uint8_t* codes_at = w;
    if (b % each == 0 && b < starts) first = b, count = b + each < starts ? each : blocks - b;
    int64_t place = b - first;
    if constexpr (F.scale_bits == 16) {
      const uint8_t* metadata = w + (count - place) * F.code_nbytes();
      load_halves<V>(metadata, scale[0]), load_halves<V>(metadata + 32, low[0]);
      w += F.code_nbytes();
      if (place + 1 == count) w += 64;
    } else {
      if (F.super_nbytes() > 0 && place == 0) {
        load_halves<V>(w, outer[0]);
        if (!F.levels()) load_halves<V>(w + 32, outer[1]);
        fifths = w + 32;
        codes_at = w += F.super_nbytes();
      }
      const uint8_t* metadata = w + F.code_nbytes();
      for (int g = 0; g < groups; ++g)
        for (int r = 0; r < kTileRows; ++r) {
          if constexpr (F.levels()) {
            int64_t number = place * groups + g;  // in the span
            int four = metadata[g / 2 * kTileRows + r] >> g % 2 * 4 & 15;
            int fifth = fifths[number / 8 * kTileRows + r] >> number % 8 & 1;
            scale[g][r] = static_cast<float>(four - 16 * fifth) * outer[0][r];
          } else {
            const uint8_t* m = metadata + g * (F.small_nbytes() / groups) + r;
            float s = F.scale_bits == 8 ? m[0] : m[0] & 15;
            float l = F.scale_bits == 8 ? static_cast<int8_t>(m[kTileRows]) : m[0] >> 4;
            scale[g][r] = s * outer[0][r], low[g][r] = l * outer[1][r];
          }
        }
      w = metadata + F.small_nbytes();
    }
    uint8_t codes[16][64];
    unpack_block<V, F.bits>(codes_at, codes);
    int64_t left = cols - b * kBlockCols;
    for (int r = 0; r < kTileRows; ++r) {
      float buffer[kBlockCols], *to = left < kBlockCols ? buffer : out + r * stride + b * kBlockCols;
      for (int g = 0; g < groups; ++g)
        for (int i = g * width; i < (g + 1) * width; ++i) {
          if constexpr (F.levels()) to[i] = (kLevels[codes[r][i]] - kLevelOffset) * scale[g][r];
          // Two roundings: the file is compiled without contraction.
          else to[i] = codes[r][i] * scale[g][r] - low[g][r];
        }
      if (left < kBlockCols) memcpy(out + r * stride + b * kBlockCols, buffer, 4 * left);
    }
  }
}

template <class V, Scheme S> void decode_raw_tile(const uint8_t* w, int64_t cols, float* out,
                                                  int64_t stride) {
  constexpr int per_vector = S == F32 ? 1 : 2;
  for (int64_t col = 0; col < cols; col += per_vector, w += 64) {
    typename V::Codes c = V::load(w);
    float values[2][16];
    if constexpr (S == F32) {
      V::store(values[0], V::f32(c));
    } else {
      typename V::Floats even, odd;
      if constexpr (S == BF16) V::bf16_pair(c, even, odd);
      else V::f16_pair(c, even, odd);
      V::store(values[0], even), V::store(values[1], odd);
    }
    for (int j = 0; j < per_vector && col + j < cols; ++j)
      for (int r = 0; r < kTileRows; ++r) out[r * stride + col + j] = values[j][r];
  }
}

void to_bf16(const float* values, int64_t count, uint16_t* out) {
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    memcpy(&bits, values + i, 4);
    out[i] = static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
  }
}

// Reading only, prefetched as the kernels do; many sums so that additions never wait for each other.
uint64_t read_sum(const uint8_t* data, int64_t nbytes) {
  uint64_t sums[64] = {}, total = 0;
  int64_t i = 0;
  for (; i + 512 <= nbytes; i += 512) {
    uint64_t words[64];
    for (int k = 0; k < 8; ++k) ask_ahead(data + i + 64 * k);
    memcpy(words, data + i, 512);
    for (int k = 0; k < 64; ++k) sums[k] += words[k];
  }
  for (; i < nbytes; ++i) total += uint64_t{data[i]} << (8 * (i % 8));
  for (uint64_t sum : sums) total += sum;
  return total;
}

// Instruction sets with few registers walk the tile, which is in the cache by then, once more for
// each of the tokens beyond V::kTokens.
template <class V, Scheme S, bool INT8, bool BYTES, int N>
void walk(const uint8_t* w, int64_t blocks, const Row* rows, float* y) {
  constexpr int most = BYTES ? V::kByteTokens : V::kTokens, each = N < most ? N : most;
  for (int n = 0; n < N; n += each) tile<V, S, INT8, BYTES, each>(w, blocks, rows + n, y + 16 * n);
}

template <class V, Scheme S, bool INT8, bool BYTES = false> constexpr void fill(TileFn (&out)[3]) {
  out[0] = walk<V, S, INT8, BYTES, 1>, out[1] = walk<V, S, INT8, BYTES, 2>;
  out[2] = walk<V, S, INT8, BYTES, 4>;
}

template <class V, int S> constexpr void fill_schemes(Kernels& k) {
  if constexpr (S < kSchemes) {
    constexpr Scheme scheme = static_cast<Scheme>(S);
    fill<V, scheme, false>(k.tile[S][0]);
    if constexpr (kFormats[S].raw()) {
      k.decode_tile[S] = decode_raw_tile<V, scheme>;
    } else {
      fill<V, scheme, true>(k.tile[S][1]);
      if constexpr (kFormats[S].bits < 8 && V::kExpands) {
        k.expand_tile[S] = expand_tile<V, scheme>;
        fill<V, scheme, true, true>(k.expanded[S]);
      }
      k.decode_tile[S] = decode_tile<V, scheme>;
    }
    fill_schemes<V, S + 1>(k);
  }
}

template <class V> constexpr Kernels make_kernels(const char* name, bool (*supported)()) {
  Kernels k{};
  k.name = name, k.supported = supported;
  fill_schemes<V, 0>(k);
  k.quantize_block = quantize_block<quantize_step>, k.copy_block = copy_block, k.activate = activate;
  k.to_bf16 = to_bf16, k.read_sum = read_sum;
  k.unary = unary, k.binary = binary, k.sum = sum, k.softmax = softmax;
  k.dot = dot<V>, k.add_scaled = add_scaled<V, float>;
  k.dots = dots<V, float>, k.dots_half = dots<V, uint16_t>;
  k.weighted_sum = weighted_sum<V, float>, k.weighted_sum_half = weighted_sum<V, uint16_t>;
  k.to_half = to_half;
  k.code_sums = code_sums, k.squared_steps = squared_steps, k.level_sums = level_sums;
  k.best_neighbours = best_neighbours, k.best_moves = best_moves, k.feed_back = feed_back;
  return k;
}

}  // namespace
}  // namespace moepack
