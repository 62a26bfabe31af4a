// Sizes of format v1 (formats/SPEC.md): a matrix is tiles of 16 rows, a tile is blocks of 64 inputs.
#pragma once
#include <cstdint>

namespace moepack {

constexpr int kTileRows = 16;
constexpr int kBlockCols = 64;
constexpr int kSuperCols = 256;  // inputs under one float16 super-scale, but at a row's end

// The numbers are part of the C interface; they follow moepack_formats.schemes.SCHEMES.
enum Scheme : int32_t {
  Q2G64, Q3G64, Q4G64, Q4G128, Q6G64, Q8G64, Q2G16S8, Q2G16S4, Q3G32S4, Q3G16S5, F16, BF16, F32,
  kSchemes
};

struct Format {
  int bits;        // of one code
  int group;       // inputs under one scale, 0: raw
  int scale_bits;  // 16: float16; 8: under float32 per row; 4, 5: under float16 per span
  int span;        // inputs per self-contained run of bytes; see starts_below

  constexpr bool raw() const { return group == 0; }
  // Signed scales and no minima: a code stands for one of the levels below.
  constexpr bool levels() const { return scale_bits == 5; }
  constexpr int64_t head_nbytes() const { return scale_bits == 8 ? 2 * 4 * kTileRows : 0; }
  constexpr int64_t code_nbytes() const { return int64_t{kTileRows} * kBlockCols * bits / 8; }

  // Of the super-scales at the start of a span.
  constexpr int64_t super_nbytes() const {
    return scale_bits == 4 || scale_bits == 5 ? 4 * kTileRows : 0;
  }
  // Of the small scales and minima that follow a block's codes.
  constexpr int64_t small_nbytes() const {
    if (raw() || scale_bits == 16) return 0;
    int per_group = scale_bits == 8 ? 2 * kTileRows : scale_bits == 4 ? kTileRows : kTileRows / 2;
    return kBlockCols / group * per_group;
  }

  // Whether blocks that are left over after full spans belong to the last of these. They have no span,
  // and no super-scales, of their own then.
  constexpr bool joins_last() const { return scale_bits == 4; }
  // Spans start at every `span / kBlockCols`th block below this one, and the last has all that follow.
  // Always inline: see ceil_div.
  __attribute__((always_inline)) constexpr int64_t starts_below(int64_t blocks) const {
    int64_t each = span / kBlockCols;
    if (!joins_last()) return blocks;
    return blocks < each ? each : blocks - blocks % each;
  }
  constexpr int64_t span_nbytes(int64_t blocks) const {
    int64_t halves = scale_bits == 16 ? 4 * kTileRows : 0;  // float16 scales and minima
    return super_nbytes() + blocks * (code_nbytes() + small_nbytes()) + halves;
  }
  constexpr int64_t tile_nbytes(int64_t cols) const {
    int64_t blocks = (cols + kBlockCols - 1) / kBlockCols, each = span / kBlockCols;
    int64_t full = (starts_below(blocks) - 1) / each;  // but the last
    return head_nbytes() + full * span_nbytes(each) + span_nbytes(blocks - full * each);
  }
};

constexpr Format kFormats[kSchemes] = {
    {2, 64, 16, 64}, {3, 64, 16, 64}, {4, 64, 16, 64}, {4, 128, 16, 128}, {6, 64, 16, 64},
    {8, 64, 16, 64}, {2, 16, 8, 64},  {2, 16, 4, 256}, {3, 32, 4, 256},   {3, 16, 5, 256},
    {16, 0, 0, 64},  {16, 0, 0, 64},  {32, 0, 0, 64},
};

// A code c of q3g16s5 stands for kLevels[c] - kLevelOffset.
constexpr uint8_t kLevels[8] = {0, 6, 11, 15, 18, 22, 26, 31};
constexpr int kLevelOffset = 18;

// Always inline: a copy compiled for a newer instruction set must not be what others call.
__attribute__((always_inline)) constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace moepack
