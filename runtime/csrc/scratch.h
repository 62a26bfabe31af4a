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

// Asks for the first of some bytes that a thread will go through, which no walk has asked for yet.
inline void prefetch_start(const void* bytes, int64_t nbytes = INT64_MAX) {
  auto p = static_cast<const uint8_t*>(bytes);
  for (int64_t i = 0; i < (nbytes < kAhead ? nbytes : kAhead); i += 64) __builtin_prefetch(p + i, 0, 2);
}

// Bytes that take a thread about as long as waking another one.
constexpr int64_t kFewBytes = 32 << 10;

// Pieces of some bytes each that a thread takes at once: enough in a row for prefetching to pay, and some
// times for each thread, so that one that loses its core for a moment does not hold up the others.
inline int64_t range_pieces(int64_t piece_nbytes, int64_t pieces, int threads) {
  constexpr int64_t wanted_nbytes = 96 << 10, wanted_ranges = 4;
  int64_t by_bytes = ceil_div(wanted_nbytes, piece_nbytes);
  int64_t by_count = ceil_div(pieces, wanted_ranges * threads);
  int64_t most = by_bytes < by_count ? by_bytes : by_count, least = ceil_div(kFewBytes, piece_nbytes);
  return most < least ? least : most;
}

}  // namespace moepack
