// One packed matrix: times a few tokens, or decoded to dense rows.
#include <algorithm>
#include <cstring>

#include "inputs.h"
#include "threads.h"

namespace {

using namespace moepack;

bool known(int32_t scheme) { return scheme >= 0 && scheme < kSchemes; }
bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 4 == 0; }

}  // namespace

int32_t moepack_linear(int32_t scheme, const uint8_t* packed, int64_t nbytes, int64_t rows,
                       int64_t cols, const float* x, int64_t tokens, const float* bias, float* y,
                       int32_t mode, int32_t threads) {
  if (!known(scheme) || rows < 1 || cols < 1 || tokens < 1 || threads < 1 || !aligned(x) ||
      !aligned(y) || !aligned(bias) || !packed || !x || !y)
    return MOEPACK_BAD_ARGUMENT;
  if (nbytes < moepack_packed_nbytes(scheme, rows, cols)) return MOEPACK_SHORT_BUFFER;

  static thread_local Scratch scratch;
  bool int8 = uses_int8(scheme, mode);
  scratch.reset(Inputs::nbytes(scheme, int8, !int8, tokens, cols));
  Inputs inputs(scratch, scheme, int8, !int8, tokens, cols);
  constexpr int64_t together = 8;
  for_chunks(threads, ceil_div(tokens, together), [&](int64_t chunk) {
    for (int64_t t = chunk * together; t < std::min(tokens, (chunk + 1) * together); ++t)
      inputs.fill(t, x + t * cols, cols);
  });
  int64_t tiles = ceil_div(rows, kTileRows), blocks = ceil_div(cols, kBlockCols);
  int64_t tile_nbytes = kFormats[scheme].tile_nbytes(cols);
  for_ranges(threads, tiles, range_pieces(tile_nbytes, tiles, threads), [&](int64_t begin, int64_t end) {
    static thread_local Scratch own;
    int64_t most = std::min(tokens, kPanelTokens);
    own.reset(Scratch::rounded(most * kTileRows * 4) +
              inputs.buffer_nbytes(scheme, int8, blocks, most));
    float* out = own.take<float>(most * kTileRows);
    uint8_t* buffer = own.take<uint8_t>(0);
    // Tokens outermost: what a range reads of them stays in the second cache.
    for (int64_t t = 0; t < tokens; t += kPanelTokens)
      for (int64_t tile = begin; tile < end; ++tile) {
        int64_t here = std::min(kPanelTokens, tokens - t);
        inputs.walk(scheme, int8, packed + tile * tile_nbytes, blocks, t, here, buffer, out,
                    kTileRows);
        int64_t first = tile * kTileRows, count = std::min<int64_t>(rows - first, kTileRows);
        for (int64_t i = 0; i < here; ++i)
          for (int64_t r = 0; r < count; ++r)
            y[(t + i) * rows + first + r] = out[i * kTileRows + r] + (bias ? bias[first + r] : 0.0f);
      }
  });
  return MOEPACK_OK;
}

int32_t moepack_decode(int32_t scheme, const uint8_t* packed, int64_t nbytes, int64_t cols,
                       const int64_t* tiles, int64_t count, int64_t rows_out, int32_t to, void* out,
                       int32_t threads) {
  if (!known(scheme) || cols < 1 || count < 0 || threads < 1 || !aligned(out) || !packed || !out ||
      (to != MOEPACK_TO_F32 && to != MOEPACK_TO_BF16) || rows_out > count * kTileRows)
    return MOEPACK_BAD_ARGUMENT;
  int64_t tile_nbytes = kFormats[scheme].tile_nbytes(cols);
  for (int64_t i = 0; i < count; ++i) {
    int64_t tile = tiles ? tiles[i] : i;
    if (tile < 0 || (tile + 1) * tile_nbytes > nbytes) return MOEPACK_SHORT_BUFFER;
  }
  auto decode = kernels().decode_tile[scheme];
  for_ranges(threads, count, range_pieces(tile_nbytes, count, threads), [&](int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    scratch.reset(kTileRows * cols * 4);
    float* values = scratch.take<float>(kTileRows * cols);
    for (int64_t i = begin; i < end; ++i) {
      const uint8_t* w = packed + (tiles ? tiles[i] : i) * tile_nbytes;
      int64_t first = i * kTileRows, left = rows_out - first;
      int64_t rows = left < kTileRows ? left : kTileRows;
      if (rows <= 0) break;
      bool direct = to == MOEPACK_TO_F32 && rows == kTileRows;
      decode(w, cols, direct ? static_cast<float*>(out) + first * cols : values, cols);
      if (to == MOEPACK_TO_BF16)
        kernels().to_bf16(values, rows * cols, static_cast<uint16_t*>(out) + first * cols);
      else if (!direct)
        std::memcpy(static_cast<float*>(out) + first * cols, values, 4 * rows * cols);
    }
  });
  return MOEPACK_OK;
}
