// What one head of one token does with the cached keys and values, compiled for each instruction set.
// T: float, or uint16_t for float16.
#pragma once
#include "glue.h"

namespace moepack {
namespace {

// Rows that are read side by side: their sums need not wait for each other, and share the query.
constexpr int kRowsTogether = 4;
// Values that are summed up in registers.
constexpr int kValuesTogether = 4 * kLanes;
// Tokens whose values are gone through for all columns before the next ones are: they stay in the
// first cache.
constexpr int64_t kTokensTogether = 32;

// While `count` numbers from `at` on are gone through, asks for the same of `next`, which is gone through
// afterwards; where that is NULL, for what lies kAhead bytes on in these rows. Behind `end` are tokens to
// come.
template <class T>
MOEPACK_INLINE void prefetch_rows(const T* rows, int64_t at, int64_t count, int64_t end, const T* next) {
  constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(T));
  int64_t ahead = next ? 0 : kAhead / static_cast<int64_t>(sizeof(T));
  const T* from = (next ? next : rows) + at + ahead;
  int64_t left = end - at - ahead;
  for (int64_t i = 0; i < (count < left ? count : left); i += line) __builtin_prefetch(from + i, 0, 2);
}

template <class V, class T, int ROWS>
MOEPACK_INLINE void dot_rows(const float* query, const T* rows, int64_t width, float* out) {
  typename V::Floats sums[ROWS];
  for (int r = 0; r < ROWS; ++r) sums[r] = V::zero();
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    typename V::Floats x = load_floats<V>(query + i);
    for (int r = 0; r < ROWS; ++r)
      sums[r] = V::fma(x, load_floats<V>(rows + r * width + i), sums[r]);
  }
  float lanes[ROWS][kLanes], room[kLanes];
  for (int r = 0; r < ROWS; ++r) {
    V::store(lanes[r], sums[r]);
    if (i == width) continue;
    const float* last = last_floats<V>(rows + r * width + i, width - i, room);
    for (int64_t j = 0; i + j < width; ++j) lanes[r][j] += query[i + j] * last[j];
  }
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int r = 0; r < ROWS; ++r)
      for (int j = 0; j < half; ++j) lanes[r][j] += lanes[r][j + half];
  for (int r = 0; r < ROWS; ++r) out[r] = lanes[r][0];
}

// out[t] = dot(query[width], rows[t][width]); next: see prefetch_rows
template <class V, class T>
void dots(const float* query, const T* rows, int64_t width, int64_t count, const T* next, float* out) {
  int64_t t = 0;
  for (; t + kRowsTogether <= count; t += kRowsTogether) {
    prefetch_rows(rows, t * width, kRowsTogether * width, count * width, next);
    dot_rows<V, T, kRowsTogether>(query, rows + t * width, width, out + t);
  }
  for (; t < count; ++t) dot_rows<V, T, 1>(query, rows + t * width, width, out + t);
}

// out[width] = sum over t of weights[t] * rows[t][width]
template <class V, class T>
void weighted_sum(const float* weights, const T* rows, int64_t width, int64_t count, const T* next,
                  float* out) {
  constexpr int vectors = kValuesTogether / kLanes;
  memset(out, 0, static_cast<size_t>(width) * 4);
  for (int64_t first = 0; first < count; first += kTokensTogether) {
    int64_t end = first + kTokensTogether < count ? first + kTokensTogether : count, i = 0;
    for (; i + kValuesTogether <= width; i += kValuesTogether) {
      typename V::Floats sums[vectors];
      for (int v = 0; v < vectors; ++v) sums[v] = load_floats<V>(out + i + v * kLanes);
      for (int64_t t = first; t < end; ++t) {
        typename V::Floats weight = V::set(weights[t]);
        if (i == 0) prefetch_rows(rows, t * width, width, count * width, next);
        for (int v = 0; v < vectors; ++v)
          sums[v] = V::fma(load_floats<V>(rows + t * width + i + v * kLanes), weight, sums[v]);
      }
      for (int v = 0; v < vectors; ++v) V::store(out + i + v * kLanes, sums[v]);
    }
    for (int64_t t = first; t < end && i < width; ++t)
      add_scaled<V>(rows + t * width + i, weights[t], out + i, width - i);
  }
}

}  // namespace
}  // namespace moepack
