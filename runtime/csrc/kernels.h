// What every instruction set provides, as one table of functions.
#pragma once
#include "format.h"
#include "moepack.h"

namespace moepack {

// One token's activations. C: inputs, padded with zeros to a multiple of 64.
struct Row {
  float* x;         // [C]
  float* sum16;     // [C / 16] sums of x
  int8_t* q;        // [C] x ~ q * step
  float* step;      // [C / 32] absmax of 32 inputs / 127
  float* sum64;     // [C / 64] sums of q * step
  int16_t* qsum16;  // [C / 16] sums of q
  // [C / 8] for each 16 of q the sums of the first two and of the last two of every four, times
  // kLevelOffset
  int16_t* qlevel;
  int32_t* level_base;  // [C / 16] sums of q times -kLevelOffset
};

// Inputs under one int8 step. 32 costs what 64 would; after a SwiGLU, whose values have long tails,
// the relative error is 0.9% instead of 1.1%.
constexpr int kStepCols = 32;

constexpr int kMaxTokens = 4;  // tokens that share one walk over a tile

// The int8 activations of many tokens. T: tokens, G: inputs of a scheme's group, at most 64.
struct Panel {
  int8_t* q;     // [C / 32][T][32]
  float* step;   // [C / 32][T]
  float* sums;   // [C / 256][T][256 / G] sums of q * step over G inputs, for schemes with minima
  // [C / 16][T] for schemes of levels: Row::level_base, or with Kernels::panel_pairs two of Row::qlevel,
  // which an instruction subtracts at once
  int32_t* offset;
  int64_t tokens, group;
};

// 16 outputs of each token: y[n * 16 + r] = sum over inputs of weight[r][c] * rows[n][c].
using TileFn = void (*)(const uint8_t* tile, int64_t blocks, const Row* rows, float* y);

// Tokens that one walk over a panel's tile takes, at most: what they need stays in the first cache.
constexpr int64_t kPanelTokens = 128;
// Bytes that are asked for before they are needed; see ask_ahead in tile.h.
constexpr int64_t kAhead = 6144;

// 16 outputs of `count` tokens from `first` on: y[n * stride + r].
using PanelFn = void (*)(const uint8_t* tile, int64_t blocks, const Panel& x, int64_t first,
                         int64_t count, float* y, int64_t stride);

struct Kernels {
  const char* name;
  bool (*supported)();
  // [scheme][0: float activations, 1: int8][1, 2 or 4 tokens]
  TileFn tile[kSchemes][2][3];
  // For many tokens at int8 activations, where an instruction set has it.
  PanelFn panel_tile[kSchemes];
  bool panel_pairs;  // see Panel::offset
  // And where it has not: a tile with a byte for each code, and walks over that. NULL where codes are
  // bytes anyway. A code block has 1024 bytes then.
  void (*expand_tile[kSchemes])(const uint8_t* tile, int64_t blocks, uint8_t* out);
  TileFn expanded[kSchemes][3];
  // Fill one block of a row from up to 64 values; what is missing is zero.
  void (*quantize_block)(const float* x, int64_t count, Row& row, int64_t block);
  void (*copy_block)(const float* x, int64_t count, Row& row, int64_t block);
  // h[16] from 16 gate (or ungated) and 16 up values.
  void (*activate)(const moepack_activation& activation, const float* gate, const float* up,
                   float* h);
  // Dense float32 values [16][stride] of a tile, bit for bit those of SPEC.md.
  void (*decode_tile[kSchemes])(const uint8_t* tile, int64_t cols, float* out, int64_t stride);
  void (*to_bf16)(const float* values, int64_t count, uint16_t* out);
  uint64_t (*read_sum)(const uint8_t* data, int64_t nbytes);
  // The innermost loops of a tape's steps (glue.h); strides in elements.
  void (*unary)(int kind, const double* scalar, const float* a, int64_t sa, float* out, int64_t so,
                int64_t n);
  void (*binary)(int kind, const float* a, int64_t sa, const float* b, int64_t sb, float* out,
                 int64_t so, int64_t n);
  float (*dot)(const float* a, const float* b, int64_t n);
  float (*sum)(const float* a, int64_t n);
  void (*softmax)(const float* a, int64_t n, float* out);
  // out[n] += scale * a[n]
  void (*add_scaled)(const float* a, float scale, float* out, int64_t n);
  // A query and cached keys, scores and cached values; see attention.h. `half`: of float16.
  void (*dots)(const float* query, const float* rows, int64_t width, int64_t count,
               const float* next, float* out);
  void (*dots_half)(const float* query, const uint16_t* rows, int64_t width, int64_t count,
                    const uint16_t* next, float* out);
  void (*weighted_sum)(const float* weights, const float* rows, int64_t width, int64_t count,
                       const float* next, float* out);
  void (*weighted_sum_half)(const float* weights, const uint16_t* rows, int64_t width,
                            int64_t count, const uint16_t* next, float* out);
  // For quantizers; see solver.h.
  void (*code_sums)(const moepack_groups& groups, const moepack_grid& grid, float* q, float* qq,
                    float* qw);
  void (*squared_steps)(const moepack_groups& groups, const moepack_grid& grid, float* lost);
  void (*level_sums)(const moepack_groups& groups, const moepack_levels& levels, const float* inverse,
                     float* qw, float* qq);
  void (*best_neighbours)(const moepack_groups& groups, const moepack_neighbours& neighbours,
                          float* scale, float* minimum);
  void (*best_moves)(const moepack_groups& groups, const moepack_levels& levels,
                     const moepack_moves& moves, float* scale, float* qw, float* qq);
  void (*feed_back)(const moepack_columns& columns);
  // To float16. False where a number is none or too large, and `out` is worth nothing then.
  bool (*to_half)(const float* a, int64_t n, uint16_t* out);
};

extern const Kernels kPortable;
#if defined(MOEPACK_X86)
extern const Kernels kAvx512Vbmi, kAvx512, kAvx2;
#elif defined(MOEPACK_NEON)
extern const Kernels kNeon;
#endif

// The table in use: the best this machine has, or what moepack_set_isa chose.
const Kernels& kernels();

inline bool uses_int8(int32_t scheme, int32_t mode) {
  return mode == MOEPACK_INT8 && !kFormats[scheme].raw();
}

// Tokens of the next walk over a tile, and the index of its kernel in Kernels::tile.
inline int walk_tokens(int64_t left) { return left >= 4 ? 4 : left >= 2 ? 2 : 1; }
inline int walk_index(int tokens) { return tokens >> 1; }

inline int64_t expanded_nbytes(int32_t scheme, int64_t blocks) {
  return kFormats[scheme].tile_nbytes(blocks * kBlockCols) +
         blocks * (kTileRows * kBlockCols - kFormats[scheme].code_nbytes());
}

}  // namespace moepack
