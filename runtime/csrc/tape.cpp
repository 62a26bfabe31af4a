// A recorded token, step by step. What a step computes is in glue.h, linear.cpp and moe.cpp; here are
// the loops around it.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <vector>

#include "scratch.h"
#include "threads.h"

namespace {

using namespace moepack;

// Dense rows and cached tokens in one chunk of work; fewer are not worth another thread.
constexpr int64_t kDenseChunk = 1 << 15, kAttendChunk = 1 << 15;  // multiplications
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
      int64_t k = r % s.size[2], j = r / s.size[2] % s.size[1], i = r / s.size[2] / s.size[1], at[4];
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
      auto place = [&](int o) {
        return floats(s, o) + r / s.size[1] * s.stride[o][0] + r % s.size[1] * s.stride[o][1];
      };
      float* out = place(0);
      const float *a = place(1), *b = place(2), *c = s.data[3] ? place(3) : nullptr;
      for (int64_t k = 0; k < cols; ++k) out[k * s.stride[0][2]] = c ? c[k * s.stride[3][2]] : 0.0f;
      if (across) {
        for (int64_t i = 0; i < n; ++i)
          kernels().add_scaled(a + i * s.stride[1][3], b[i * s.stride[2][3]], out, cols);
        continue;
      }
      for (int64_t k = 0; k < cols; ++k) {
        const float *x = a + k * s.stride[1][2], *y = b + k * s.stride[2][2];
        float sum = in_rows ? kernels().dot(x, y, n) : 0.0f;
        for (int64_t i = 0; !in_rows && i < n; ++i) sum += x[i * s.stride[1][3]] * y[i * s.stride[2][3]];
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

// False where there is no such row.
bool embed(const moepack_step& s) {
  int64_t id = *static_cast<const int64_t*>(s.data[1]), cols = s.number[3];
  if (id < 0 || id >= s.number[2]) return false;
  int32_t scheme = static_cast<int32_t>(s.number[0]);
  if (scheme < 0) {
    std::memcpy(s.data[0], floats(s, 2) + id * cols, static_cast<size_t>(cols) * 4);
    return true;
  }
  static thread_local std::vector<float> rows;
  rows.resize(static_cast<size_t>(kTileRows * cols));
  int64_t nbytes = kFormats[scheme].tile_nbytes(cols);
  const uint8_t* packed = static_cast<const uint8_t*>(s.data[2]);
  kernels().decode_tile[scheme](packed + id / kTileRows * nbytes, cols, rows.data(), cols);
  std::memcpy(s.data[0], rows.data() + id % kTileRows * cols, static_cast<size_t>(cols) * 4);
  return true;
}

// False where float16 cannot hold what comes: all is converted before anything is written.
bool append(const moepack_step& s) {
  struct Part {
    void* cache;
    int operand;
    int64_t width;
  };
  const moepack_kv& kv = *static_cast<const moepack_kv*>(s.extra);
  const Part parts[] = {{kv.keys, 1, kv.key_width}, {kv.values, 2, kv.value_width}};
  static thread_local std::vector<float> row;
  static thread_local std::vector<uint16_t> halves;
  int64_t size = kv.half ? 2 : 4;
  for (const Part& part : parts)  // each head's row lies in a page of its own, and none in a cache
    for (int64_t h = 0; h < kv.heads; ++h) {
      auto to = static_cast<const uint8_t*>(part.cache) + (h * kv.capacity + kv.end) * part.width * size;
      for (int64_t i = 0; i < part.width * size; i += 64) __builtin_prefetch(to + i, 1);
    }
  // use(part, place in its cache) for each head, whose numbers are in `row`.
  auto each_row = [&](auto use) {
    for (const Part& part : parts)
      for (int64_t h = 0; h < kv.heads; ++h) {
        const float* from = floats(s, part.operand) + h * s.stride[part.operand][0];
        row.resize(static_cast<size_t>(part.width));
        for (int64_t i = 0; i < part.width; ++i)
          row[static_cast<size_t>(i)] = from[i * s.stride[part.operand][1]];
        use(part, (h * kv.capacity + kv.end) * part.width);
      }
  };
  if (!kv.half) {
    each_row([&](const Part& part, int64_t at) {
      std::copy(row.begin(), row.end(), static_cast<float*>(part.cache) + at);
    });
    return true;
  }
  bool fits = true;
  halves.clear();
  each_row([&](const Part& part, int64_t) {
    halves.resize(halves.size() + row.size());
    fits &= kernels().to_half(row.data(), part.width, halves.data() + halves.size() - row.size());
  });
  if (!fits) return false;
  const uint16_t* from = halves.data();
  each_row([&](const Part& part, int64_t at) {
    std::copy(from, from + part.width, static_cast<uint16_t*>(part.cache) + at);
    from += part.width;
  });
  return true;
}

// Queries that share a key are consecutive heads. The window, where there is one, is number[1];
// a sink (data[3]) is one more score a head, without a value; scalar[1] bounds scores by tanh.
void attend(const moepack_step& s, int32_t threads) {
  const moepack_kv& kv = *static_cast<const moepack_kv*>(s.extra);
  int64_t heads = s.number[0], group = heads / kv.heads, window = s.number[1], end = kv.end + 1;
  int64_t begin = window > 0 && end > window ? end - window : 0, count = end - begin;
  float scale = static_cast<float>(s.scalar[0]), cap = static_cast<float>(s.scalar[1]);
  const float* sinks = floats(s, 3);
  const Kernels& k = kernels();
  auto keys = static_cast<const float*>(kv.keys), values = static_cast<const float*>(kv.values);
  auto half_keys = static_cast<const uint16_t*>(kv.keys);
  auto half_values = static_cast<const uint16_t*>(kv.values);
  int64_t size = kv.half ? 2 : 4;
  auto at = [&](const void* cache, int64_t i) { return static_cast<const uint8_t*>(cache) + i * size; };
  int64_t each = ceil_div(kAttendChunk, count * (kv.key_width + kv.value_width));
  for_chunks(threads, ceil_div(heads, each), [&](int64_t chunk) {
    static thread_local std::vector<float> scores, query;
    scores.resize(static_cast<size_t>(count + 1));
    query.resize(static_cast<size_t>(kv.key_width));
    int64_t last = std::min(heads, (chunk + 1) * each);
    for (int64_t h = chunk * each; h < last; ++h) {
      const float* q = floats(s, 1) + h * s.stride[1][0];
      for (int64_t i = 0; i < kv.key_width; ++i)
        query[static_cast<size_t>(i)] = q[i * s.stride[1][1]];
      int64_t first = h / group * kv.capacity + begin;
      int64_t key = first * kv.key_width, value = first * kv.value_width;
      if (h == chunk * each) prefetch_start(at(kv.keys, key), count * kv.key_width * size);
      prefetch_start(at(kv.values, value), count * kv.value_width * size);
      if (kv.half) k.dots_half(query.data(), half_keys + key, kv.key_width, count, scores.data());
      else k.dots(query.data(), keys + key, kv.key_width, count, scores.data());
      for (int64_t t = 0; t < count; ++t) {
        float& score = scores[static_cast<size_t>(t)];
        score *= scale;
        if (cap > 0) score = cap * std::tanh(score / cap);
      }
      if (sinks) scores[static_cast<size_t>(count)] = sinks[h * s.stride[3][0]];
      k.softmax(scores.data(), count + (sinks ? 1 : 0), scores.data());
      if (h + 1 < last && (h + 1) % group == 0)
        prefetch_start(at(kv.keys, key + kv.capacity * kv.key_width), count * kv.key_width * size);
      float* out = floats(s, 0) + h * s.stride[0][0];
      if (kv.half)
        k.weighted_sum_half(scores.data(), half_values + value, kv.value_width, count, out);
      else k.weighted_sum(scores.data(), values + value, kv.value_width, count, out);
    }
  });
}

// See moepack_latent: the query goes to the latents, and the sum of latents becomes a value.
void attend_latent(const moepack_step& s, int32_t threads) {
  const moepack_latent& by = *static_cast<const moepack_latent*>(s.extra);
  const moepack_kv& kv = *by.kv;
  int64_t latent = kv.key_width, count = kv.end + 1;
  float scale = static_cast<float>(s.scalar[0]);
  const Kernels& k = kernels();
  auto dots = [&](const float* x, const void* rows, int64_t at, bool half, int64_t width, int64_t n,
                  float* out) {
    if (half) k.dots_half(x, static_cast<const uint16_t*>(rows) + at, width, n, out);
    else k.dots(x, static_cast<const float*>(rows) + at, width, n, out);
  };
  auto sum = [&](const float* weights, const void* rows, int64_t at, bool half, int64_t width,
                 int64_t n, float* out) {
    if (half) k.weighted_sum_half(weights, static_cast<const uint16_t*>(rows) + at, width, n, out);
    else k.weighted_sum(weights, static_cast<const float*>(rows) + at, width, n, out);
  };
  for_chunks(threads, s.number[0], [&](int64_t h) {
    static thread_local std::vector<float> query, mixed, scores, turned;
    query.resize(static_cast<size_t>(by.width)), mixed.resize(static_cast<size_t>(latent));
    scores.resize(static_cast<size_t>(count)), turned.resize(static_cast<size_t>(count));
    const float* q = floats(s, 1) + h * s.stride[1][0];
    for (int64_t i = 0; i < by.width; ++i) query[static_cast<size_t>(i)] = q[i * s.stride[1][1]];
    dots(query.data() + by.plain_at, by.key_weights, h * latent * by.plain, by.half, by.plain,
         latent, mixed.data());
    dots(mixed.data(), kv.keys, 0, kv.half, latent, count, scores.data());
    dots(query.data() + by.rotary_at, kv.values, 0, kv.half, kv.value_width, count, turned.data());
    for (size_t t = 0; t < scores.size(); ++t) scores[t] = (scores[t] + turned[t]) * scale;
    k.softmax(scores.data(), count, scores.data());
    sum(scores.data(), kv.keys, 0, kv.half, latent, count, mixed.data());
    sum(mixed.data(), by.value_weights, h * latent * by.value_width, by.half, by.value_width,
        latent, floats(s, 0) + h * s.stride[0][0]);
  });
}

// False where a chosen record is not at hand. Places beyond the experts hold none.
bool experts(const moepack_step& s, int32_t mode, int32_t threads) {
  moepack_experts_layer& layer = *static_cast<moepack_experts_layer*>(s.extra);
  static thread_local std::vector<const uint8_t*> records;
  static thread_local std::vector<const moepack_layout*> layouts;
  static thread_local std::vector<float> weights;
  records.clear(), layouts.clear(), weights.clear();
  for (int64_t k = 0; k < layer.chosen; ++k) {
    int64_t expert = static_cast<const int64_t*>(s.data[2])[k * s.stride[2][0]];
    if (expert < 0 || expert >= layer.experts) continue;
    if (layer.records[expert] == nullptr) return false;
    records.push_back(layer.records[expert]);
    layouts.push_back(layer.layouts[expert]);
    weights.push_back(floats(s, 3)[k * s.stride[3][0]]);
  }
  int32_t status = moepack_experts(
      records.data(), layouts.data(), weights.data(), static_cast<int64_t>(records.size()),
      layer.hidden, layer.intermediate, &layer.activation, layer.gated, floats(s, 1), floats(s, 0),
      nullptr, mode, threads);
  if (status == MOEPACK_OK) layer.demanded += static_cast<int64_t>(records.size());
  return status == MOEPACK_OK;  // what is refused here, the caller's own call refuses with a reason
}

bool run(const moepack_step& s, int32_t mode, int32_t threads) {
  switch (s.op) {
    case MOEPACK_UNARY:
      if (s.kind == kFromInt64) return from_int64(s), true;
      elements(s, threads, [&](const moepack_step& t, const int64_t* at, int64_t n) {
        kernels().unary(t.kind, t.scalar, floats(t, 1) + at[1], t.stride[1][3],
                        floats(t, 0) + at[0], t.stride[0][3], n);
      });
      return true;
    case MOEPACK_BINARY: {
      float scalar = static_cast<float>(s.scalar[0]);
      elements(s, threads, [&](const moepack_step& t, const int64_t* at, int64_t n) {
        const float* b = t.data[2] ? floats(t, 2) + at[2] : &scalar;
        kernels().binary(t.kind, floats(t, 1) + at[1], t.stride[1][3], b,
                         t.data[2] ? t.stride[2][3] : 0, floats(t, 0) + at[0], t.stride[0][3], n);
      });
      return true;
    }
    case MOEPACK_REDUCE: return reduce(s), true;
    case MOEPACK_SOFTMAX: return softmax(s), true;
    case MOEPACK_TOPK: return topk(s), true;
    case MOEPACK_DENSE: return dense(s, threads), true;
    case MOEPACK_CONTRACT: return contract(s, threads), true;
    case MOEPACK_GATHER: return gather(s);
    case MOEPACK_PACKED:
      return moepack_linear(static_cast<int32_t>(s.number[0]),
                            static_cast<const uint8_t*>(s.data[2]), s.number[1], s.number[2],
                            s.number[3], floats(s, 1), 1, floats(s, 3), floats(s, 0), mode,
                            threads) == MOEPACK_OK;
    case MOEPACK_EMBED: return embed(s);
    case MOEPACK_APPEND: return append(s);
    case MOEPACK_ATTEND: return attend(s, threads), true;
    case MOEPACK_ATTEND_LATENT: return attend_latent(s, threads), true;
    case MOEPACK_EXPERTS: return experts(s, mode, threads);
    default: return false;
  }
}

// Steps from this one on that are done slice by slice, see moepack_tape_run.
int64_t run_length(const moepack_step& s) {
  bool sliced = s.op == MOEPACK_UNARY || s.op == MOEPACK_BINARY || s.op == MOEPACK_REDUCE ||
                s.op == MOEPACK_SOFTMAX || s.op == MOEPACK_CONTRACT;
  return sliced && s.number[3] > 1 ? s.number[3] : 1;
}

void run_slices(const moepack_step* steps, int64_t count, int32_t mode, int32_t threads) {
  int64_t slices = steps->size[0], each = ceil_div(slices, 4 * threads);
  for_chunks(threads, ceil_div(slices, each), [&](int64_t chunk) {
    for (int64_t i = chunk * each; i < std::min(slices, (chunk + 1) * each); ++i)
      for (int64_t k = 0; k < count; ++k) {
        moepack_step s = steps[k];
        s.size[0] = 1;
        for (int o = 0; o < 4; ++o)
          if (s.data[o]) s.data[o] = floats(s, o) + i * s.stride[o][0];
        run(s, mode, 1);
      }
  });
}

}  // namespace

int64_t moepack_tape_run(const moepack_step* steps, int64_t begin, int64_t end, int32_t mode,
                         int32_t threads, double* seconds) {
  using Clock = std::chrono::steady_clock;
  if (steps == nullptr || begin < 0 || begin > end || threads < 1) return -1;
  while (begin < end) {
    Clock::time_point start = seconds ? Clock::now() : Clock::time_point();
    int64_t count = run_length(steps[begin]);
    if (count > end - begin) return -1;
    if (count > 1) run_slices(steps + begin, count, mode, threads);
    else if (!run(steps[begin], mode, threads)) break;
    if (seconds) seconds[begin] += std::chrono::duration<double>(Clock::now() - start).count();
    begin += count;
  }
  return begin;
}
