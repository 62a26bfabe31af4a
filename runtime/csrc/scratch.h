// Working memory of one call, kept by the calling thread for its next one.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>

#include "kernels.h"

namespace moepack {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(memory_); }

  // Forgets what was taken and makes room for `nbytes`; take() rounds each piece up to 64.
  void reset(int64_t nbytes) {
    used_ = 0;
    if (nbytes <= size_) return;
    std::free(memory_);
    size_ = ceil_div(nbytes, 4096) * 4096;
    memory_ = static_cast<uint8_t*>(std::aligned_alloc(64, static_cast<size_t>(size_)));
    if (memory_ == nullptr) {
      size_ = 0;
      throw std::bad_alloc();
    }
  }
  template <class T> T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(memory_ + used_);
    used_ += rounded(count * static_cast<int64_t>(sizeof(T)));
    return piece;
  }
  static int64_t rounded(int64_t nbytes) { return ceil_div(nbytes, 64) * 64; }

 private:
  uint8_t* memory_ = nullptr;
  int64_t size_ = 0, used_ = 0;
};

inline int64_t row_nbytes(int64_t cols) {
  int64_t padded = ceil_div(cols, kBlockCols) * kBlockCols, r = Scratch::rounded(padded);
  return 4 * r + Scratch::rounded(padded / 4) * 2 + r + Scratch::rounded(padded / 8) +
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
  return row;
}

// Fills a row from x[cols] in the forms that are needed.
inline void fill_row(const float* x, int64_t cols, bool int8, bool floats, Row& row) {
  for (int64_t b = 0; b * kBlockCols < cols; ++b) {
    if (int8) kernels().quantize_block(x + b * kBlockCols, cols - b * kBlockCols, row, b);
    if (floats) kernels().copy_block(x + b * kBlockCols, cols - b * kBlockCols, row, b);
  }
}

// Below this many tokens a tile is not worth expanding.
constexpr int64_t kExpandTokens = 5;

// The walks of some tokens over tiles of one matrix.
struct Walks {
  int32_t scheme;
  bool int8;
  int64_t blocks, tokens;

  bool expands() const {
    return int8 && tokens >= kExpandTokens && kernels().expand_tile[scheme] != nullptr;
  }
  int64_t buffer_nbytes() const { return expands() ? expanded_nbytes(scheme, blocks) : 0; }

  // out: [tokens, stride], 16 values each; buffer of buffer_nbytes().
  void run(const uint8_t* tile, const Row* rows, uint8_t* buffer, float* out, int64_t stride) const {
    const TileFn* walk = kernels().tile[scheme][int8];
    if (expands()) {
      kernels().expand_tile[scheme](tile, blocks, buffer);
      tile = buffer, walk = kernels().expanded[scheme];
    }
    alignas(64) float values[kMaxTokens * kTileRows];
    for (int64_t t = 0; t < tokens;) {
      int together = walk_tokens(tokens - t);
      walk[walk_index(together)](tile, blocks, rows + t, values);
      for (int n = 0; n < together; ++n, ++t)
        for (int r = 0; r < kTileRows; ++r) out[t * stride + r] = values[n * kTileRows + r];
    }
  }
};

// A chunk this small takes a thread about as long as waking another one.
constexpr int64_t kSmallChunk = 32 << 10;

// Pieces of some bytes each that make a chunk: enough in a row for prefetching to pay, and some chunks
// for each thread, so that one that loses its core for a moment does not hold up the others.
inline int64_t chunk_pieces(int64_t piece_nbytes, int64_t pieces, int threads) {
  constexpr int64_t wanted_nbytes = 384 << 10, wanted_chunks = 4;
  int64_t by_bytes = ceil_div(wanted_nbytes, piece_nbytes);
  int64_t by_count = ceil_div(pieces, wanted_chunks * threads);
  int64_t each = by_bytes < by_count ? by_bytes : by_count;
  int64_t least = ceil_div(kSmallChunk, piece_nbytes);
  return each < least ? least : each;
}

}  // namespace moepack
