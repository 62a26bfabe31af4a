// The activations of one call in the form that the walks over a matrix read, and those walks.
//
// A few tokens, or any number on an instruction set without panels, are a Row each; many tokens at int8
// activations are one Panel.
#pragma once
#include <algorithm>
#include <cstring>

#include "scratch.h"

namespace moepack {

inline int64_t row_nbytes(int64_t cols) {
  int64_t padded = ceil_div(cols, kBlockCols) * kBlockCols, r = Scratch::rounded(padded);
  return 4 * r + Scratch::rounded(padded / 4) * 4 + r + Scratch::rounded(padded / 8) +
         Scratch::rounded(padded / 16);
}

inline Row take_row(Scratch& scratch, int64_t cols) {
  int64_t padded = ceil_div(cols, kBlockCols) * kBlockCols;
  Row row;
  row.x = scratch.take<float>(padded);
  row.sum16 = scratch.take<float>(padded / 16);
  row.q = scratch.take<int8_t>(padded);
  row.step = scratch.take<float>(padded / kStepCols);
  row.sum64 = scratch.take<float>(padded / kBlockCols);
  row.qsum16 = scratch.take<int16_t>(padded / 16);
  row.qlevel = scratch.take<int16_t>(padded / 8);
  row.level_base = scratch.take<int32_t>(padded / 16);
  return row;
}

// Below this many tokens walks of a few of them are faster than what many tokens pay for once.
constexpr int64_t kManyTokens = 5;

// Reads x[cols] of some tokens.
class Inputs {
 public:
  Inputs() = default;
  // For matrices of a scheme; `floats`: whether any of them reads float activations.
  Inputs(Scratch& scratch, int32_t scheme, bool int8, bool floats, int64_t tokens, int64_t cols)
      : int8_(int8), floats_(floats) {
    if (!in_panel(scheme, int8, floats, tokens)) {
      rows_ = scratch.take<Row>(tokens);
      for (int64_t t = 0; t < tokens; ++t) rows_[t] = take_row(scratch, cols);
      return;
    }
    int64_t steps = ceil_div(cols, kBlockCols) * (kBlockCols / kStepCols);
    panel_.tokens = tokens, panel_.group = std::min(kFormats[scheme].group, kBlockCols);
    panel_.q = scratch.take<int8_t>(steps * tokens * kStepCols);
    panel_.step = scratch.take<float>(steps * tokens);
    if (kFormats[scheme].levels()) {
      panel_.offset = scratch.take<int32_t>(2 * steps * tokens);
      return;
    }
    panel_.sums = scratch.take<float>(sums(tokens, cols));
    // Blocks that the last super-block lacks are never filled.
    int64_t last = sums(tokens, 1);
    std::memset(panel_.sums + sums(tokens, cols) - last, 0, static_cast<size_t>(last) * 4);
  }
  static int64_t nbytes(int32_t scheme, bool int8, bool floats, int64_t tokens, int64_t cols) {
    if (!in_panel(scheme, int8, floats, tokens))
      return Scratch::rounded(tokens * static_cast<int64_t>(sizeof(Row))) + tokens * row_nbytes(cols);
    int64_t padded = ceil_div(cols, kBlockCols) * kBlockCols;
    int64_t groups = kFormats[scheme].levels() ? padded / 16 : ceil_div(cols, kSuperCols) * 16;
    return Scratch::rounded(tokens * padded) + Scratch::rounded(tokens * padded / kStepCols * 4) +
           Scratch::rounded(tokens * groups * 4);
  }

  // Fills one block of a token from up to 64 values; what is missing is zero.
  void fill_block(int64_t token, int64_t block, const float* x, int64_t count) const {
    if (panel_.tokens > 0) {
      fill_panel(token, block, x, count);
    } else {
      if (int8_) kernels().quantize_block(x, count, rows_[token], block);
      if (floats_) kernels().copy_block(x, count, rows_[token], block);
    }
  }
  void fill(int64_t token, const float* x, int64_t cols) const {
    for (int64_t b = 0; b * kBlockCols < cols; ++b)
      fill_block(token, b, x + b * kBlockCols, cols - b * kBlockCols);
  }

  // out[t * stride + r], r below 16: a tile times the tokens from `first`, which becomes t = 0.
  void walk(int32_t scheme, bool int8, const uint8_t* tile, int64_t blocks, int64_t first,
            int64_t count, uint8_t* buffer, float* out, int64_t stride) const {
    const Kernels& k = kernels();
    if (panel_.tokens > 0) {
      for (int64_t t = 0; t < count; t += kPanelTokens)
        k.panel_tile[scheme](tile, blocks, panel_, first + t, std::min(kPanelTokens, count - t),
                             out + t * stride, stride);
      return;
    }
    const TileFn* walk = k.tile[scheme][int8];
    if (expands(scheme, int8, count)) {
      k.expand_tile[scheme](tile, blocks, buffer);
      tile = buffer, walk = k.expanded[scheme];
    }
    alignas(64) float values[kMaxTokens * kTileRows];
    for (int64_t t = 0; t < count;) {
      int together = walk_tokens(count - t);
      walk[walk_index(together)](tile, blocks, rows_ + first + t, values);
      for (int n = 0; n < together; ++n, ++t)
        for (int r = 0; r < kTileRows; ++r) out[t * stride + r] = values[n * kTileRows + r];
    }
  }
  // Of `buffer` of a walk over so many tokens.
  int64_t buffer_nbytes(int32_t scheme, bool int8, int64_t blocks, int64_t count) const {
    bool used = panel_.tokens == 0 && expands(scheme, int8, count);
    return used ? expanded_nbytes(scheme, blocks) : 0;
  }

 private:
  static bool in_panel(int32_t scheme, bool int8, bool floats, int64_t tokens) {
    return int8 && !floats && tokens >= kManyTokens && kernels().panel_tile[scheme] != nullptr;
  }
  static bool expands(int32_t scheme, bool int8, int64_t tokens) {
    return int8 && tokens >= kManyTokens && kernels().expand_tile[scheme] != nullptr;
  }
  int64_t sums(int64_t tokens, int64_t cols) const {
    return tokens * ceil_div(cols, kSuperCols) * (kSuperCols / panel_.group);
  }

  void fill_panel(int64_t token, int64_t block, const float* x, int64_t count) const {
    alignas(64) int8_t q[kBlockCols];
    float step[2], sum64;
    int16_t qsum16[4], qlevel[8];
    int32_t level_base[4];
    Row row{nullptr, nullptr, q, step, &sum64, qsum16, qlevel, level_base};
    kernels().quantize_block(x, count, row, 0);
    bool pairs = kernels().panel_pairs;
    for (int64_t half = 0; half < 2; ++half) {
      int64_t at = (2 * block + half) * panel_.tokens + token;
      std::memcpy(panel_.q + at * kStepCols, q + half * kStepCols, kStepCols);
      panel_.step[at] = step[half];
      for (int64_t g = 0; g < 2 && panel_.offset; ++g)
        std::memcpy(panel_.offset + (2 * (2 * block + half) + g) * panel_.tokens + token,
                    pairs ? static_cast<void*>(qlevel + 4 * half + 2 * g) : level_base + 2 * half + g,
                    sizeof *panel_.offset);
    }
    if (panel_.offset) return;
    constexpr int64_t blocks = kSuperCols / kBlockCols;
    int64_t groups = kBlockCols / panel_.group, each = panel_.group / 16;
    float* sums = panel_.sums +
                  ((block / blocks * panel_.tokens + token) * blocks + block % blocks) * groups;
    for (int64_t g = 0; g < groups; ++g) {
      sums[g] = 0;
      for (int64_t i = g * each; i < (g + 1) * each; ++i)
        sums[g] += step[i / 2] * static_cast<float>(qsum16[i]);
    }
  }

  Row* rows_ = nullptr;
  Panel panel_{};
  bool int8_ = false, floats_ = false;
};

}  // namespace moepack
