// Steps of a tape that are loops over elements: element by element, sums, products, choices.
#pragma once
#include <algorithm>
#include <vector>

#include "scratch.h"
#include "threads.h"

namespace {

using namespace moepack;

// Work of one chunk; less is not worth another thread.
constexpr int64_t kDenseChunk = 1 << 15;  // multiplications
constexpr int64_t kElementsChunk = 1 << 15;

constexpr int32_t kFromInt64 = 20;  // follows the kinds of glue.h

float* floats(const moepack_step& s, int operand) { return static_cast<float*>(s.data[operand]); }

// Calls f(offsets of out, a, b, c) for each place of the three outer loops.
template <class F> void outer(const moepack_step& s, F f) {
  for (int64_t i = 0; i < s.size[0]; ++i)
    for (int64_t j = 0; j < s.size[1]; ++j)
      for (int64_t k = 0; k < s.size[2]; ++k) {
        int64_t at[4];
        for (int o = 0; o < 4; ++o)
          at[o] = i * s.stride[o][0] + j * s.stride[o][1] + k * s.stride[o][2];
        f(at);
      }
}

// Calls f(step, offsets, count) for each place of three loops and `count` elements along the last one of
// that step, by several threads where there are many elements.
template <class F> void elements(moepack_step s, int32_t threads, F f) {
  // A call each for a handful of elements would take longer than these.
  if (s.size[3] < 16 && s.size[2] > s.size[3]) {
    std::swap(s.size[2], s.size[3]);
    for (auto& stride : s.stride) std::swap(stride[2], stride[3]);
  }
  int64_t rows = s.size[0] * s.size[1] * s.size[2], n = s.size[3];
  int64_t parts = rows == 1 ? ceil_div(n, kElementsChunk) : 1, width = ceil_div(n, parts);
  int64_t each = rows == 1 ? 1 : ceil_div(kElementsChunk, n);
  for_chunks(threads, rows == 1 ? parts : ceil_div(rows, each), [&](int64_t chunk) {
    int64_t begin = rows == 1 ? chunk * width : 0, end = std::min(n, begin + width);
    for (int64_t r = rows == 1 ? 0 : chunk * each; r < std::min(rows, (chunk + 1) * each); ++r) {
      int64_t k = r, j = 0, i = 0, at[4];
      if (k >= s.size[2]) j = r / s.size[2], k = r % s.size[2];  // divisions are slow
      if (j >= s.size[1]) i = j / s.size[1], j = j % s.size[1];
      for (int o = 0; o < 4; ++o)
        at[o] = i * s.stride[o][0] + j * s.stride[o][1] + k * s.stride[o][2] + begin * s.stride[o][3];
      f(s, at, end - begin);
    }
  });
}

// Values along the last loop in a row, in `buffer` where they are not so already.
const float* in_a_row(const moepack_step& s, const float* a, std::vector<float>& buffer) {
  if (s.stride[1][3] == 1) return a;
  buffer.resize(static_cast<size_t>(s.size[3]));
  for (int64_t i = 0; i < s.size[3]; ++i) buffer[static_cast<size_t>(i)] = a[i * s.stride[1][3]];
  return buffer.data();
}

// Positions are the integers that come in.
void from_int64(const moepack_step& s) {
  auto from = static_cast<const int64_t*>(s.data[1]);
  outer(s, [&](const int64_t* at) {
    for (int64_t i = 0; i < s.size[3]; ++i)
      floats(s, 0)[at[0] + i * s.stride[0][3]] = static_cast<float>(from[at[1] + i * s.stride[1][3]]);
  });
}

void reduce(const moepack_step& s) {
  static thread_local std::vector<float> buffer;
  outer(s, [&](const int64_t* at) {
    const float* a = in_a_row(s, floats(s, 1) + at[1], buffer);
    float& out = floats(s, 0)[at[0]];
    if (s.kind == 2) {
      out = a[0];
      for (int64_t i = 1; i < s.size[3]; ++i) out = a[i] > out || a[i] != a[i] ? a[i] : out;
    } else {
      out = kernels().sum(a, s.size[3]);
      if (s.kind == 1) out /= static_cast<float>(s.size[3]);
    }
  });
}

void softmax(const moepack_step& s) {
  static thread_local std::vector<float> buffer, result;
  result.resize(static_cast<size_t>(s.size[3]));
  outer(s, [&](const int64_t* at) {
    kernels().softmax(in_a_row(s, floats(s, 1) + at[1], buffer), s.size[3], result.data());
    for (int64_t i = 0; i < s.size[3]; ++i)
      floats(s, 0)[at[0] + i * s.stride[0][3]] = result[static_cast<size_t>(i)];
  });
}

// The largest first; of equal values the one that comes first. NaN counts as largest.
void topk(const moepack_step& s) {
  static thread_local std::vector<float> buffer;
  static thread_local std::vector<int64_t> order;
  int64_t n = s.size[3], k = s.number[0];
  outer(s, [&](const int64_t* at) {
    const float* a = in_a_row(s, floats(s, 1) + at[1], buffer);
    order.resize(static_cast<size_t>(n));
    for (int64_t i = 0; i < n; ++i) order[static_cast<size_t>(i)] = i;
    std::partial_sort(order.begin(), order.begin() + k, order.end(), [&](int64_t x, int64_t y) {
      bool x_nan = a[x] != a[x], y_nan = a[y] != a[y];
      if (x_nan || y_nan) return x_nan != y_nan ? x_nan : x < y;
      return a[x] != a[y] ? a[x] > a[y] : x < y;
    });
    for (int64_t i = 0; i < k; ++i) {
      floats(s, 0)[at[0] + i * s.stride[0][3]] = a[order[static_cast<size_t>(i)]];
      static_cast<int64_t*>(s.data[3])[at[3] + i * s.stride[3][3]] = order[static_cast<size_t>(i)];
    }
  });
}

// The third loop is innermost where it is what lies in a row.
void contract(const moepack_step& s, int32_t threads) {
  int64_t rows = s.size[0] * s.size[1], cols = s.size[2], n = s.size[3];
  bool across = s.stride[0][2] == 1 && s.stride[1][2] == 1 && s.stride[2][2] == 0;
  bool in_rows = s.stride[1][3] == 1 && s.stride[2][3] == 1 && n >= 16;
  int64_t each = ceil_div(kDenseChunk, cols * n);
  for_chunks(threads, ceil_div(rows, each), [&](int64_t chunk) {
    for (int64_t r = chunk * each; r < std::min(rows, (chunk + 1) * each); ++r) {
      int64_t i = s.size[0] == 1 ? 0 : r / s.size[1], j = r - i * s.size[1];  // a division is slow
      auto place = [&](int o) { return floats(s, o) + i * s.stride[o][0] + j * s.stride[o][1]; };
      float* out = place(0);
      const float *a = place(1), *b = place(2), *c = s.data[3] ? place(3) : nullptr;
      for (int64_t k = 0; k < cols; ++k) out[k * s.stride[0][2]] = c ? c[k * s.stride[3][2]] : 0.0f;
      if (across) {
        for (int64_t l = 0; l < n; ++l)
          kernels().add_scaled(a + l * s.stride[1][3], b[l * s.stride[2][3]], out, cols);
        continue;
      }
      for (int64_t k = 0; k < cols; ++k) {
        const float *x = a + k * s.stride[1][2], *y = b + k * s.stride[2][2];
        float sum = in_rows ? kernels().dot(x, y, n) : 0.0f;
        for (int64_t l = 0; !in_rows && l < n; ++l) sum += x[l * s.stride[1][3]] * y[l * s.stride[2][3]];
        out[k * s.stride[0][2]] += sum;
      }
    }
  });
}

// False where an index is none.
bool gather(const moepack_step& s) {
  bool inside = true;
  outer(s, [&](const int64_t* at) {
    const int64_t* index = static_cast<const int64_t*>(s.data[2]) + at[2];
    for (int64_t i = 0; i < s.size[3]; ++i) {
      int64_t from = index[i * s.stride[2][3]];
      inside &= from >= 0 && from < s.number[0];
      if (inside)
        floats(s, 0)[at[0] + i * s.stride[0][3]] = floats(s, 1)[at[1] + from * s.stride[1][3]];
    }
  });
  return inside;
}

void dense(const moepack_step& s, int32_t threads) {
  int64_t m = s.number[0], n = s.number[1], k = s.number[2];
  const float *a = floats(s, 1), *b = floats(s, 2), *c = floats(s, 3);
  int64_t each = ceil_div(kDenseChunk, m * k);
  for_chunks(threads, ceil_div(n, each), [&](int64_t chunk) {
    int64_t end = std::min(n, (chunk + 1) * each);
    for (int64_t r = chunk * each; r < end; ++r)
      for (int64_t t = 0; t < m; ++t)
        floats(s, 0)[t * s.stride[0][0] + r] =
            kernels().dot(a + t * s.stride[1][0], b + r * s.stride[2][0], k) + (c ? c[r] : 0.0f);
  });
}

}  // namespace
