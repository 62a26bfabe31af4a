// A recorded token, step by step. What a step computes is in tape_loops.h, glue.h, linear.cpp and moe.cpp;
// here are embeddings, attention, and the order of things.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <vector>

#include "tape_loops.h"

namespace {

// Multiplications of attention that are worth another thread.
constexpr int64_t kAttendChunk = 1 << 15;

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

// Keys, or values, of one head that stay in the second cache until they are used.
constexpr int64_t kAttendAhead = 128 << 10;

// What attention reads and kernels().dots and weighted_sum, in the cache's precision.
template <class T> struct Cached {
  const T *keys, *values;
  void (*dots)(const float*, const T*, int64_t, int64_t, const T*, float*);
  void (*weighted_sum)(const float*, const T*, int64_t, int64_t, const T*, float*);
};

// Queries that share a key are consecutive heads. The window, where there is one, is number[1];
// a sink (data[3]) is one more score a head, without a value; scalar[1] bounds scores by tanh.
template <class T> void attend(const moepack_step& s, const Cached<T>& cached, int32_t threads) {
  const moepack_kv& kv = *static_cast<const moepack_kv*>(s.extra);
  int64_t heads = s.number[0], group = heads / kv.heads, window = s.number[1], end = kv.end + 1;
  int64_t begin = window > 0 && end > window ? end - window : 0, count = end - begin;
  float scale = static_cast<float>(s.scalar[0]), cap = static_cast<float>(s.scalar[1]);
  const float* sinks = floats(s, 3);
  int64_t keys_nbytes = count * kv.key_width * static_cast<int64_t>(sizeof(T));
  int64_t values_nbytes = count * kv.value_width * static_cast<int64_t>(sizeof(T));
  // Memory is asked for values while a head's keys are gone through, for the next keys while its values are.
  bool in_turns = keys_nbytes <= kAttendAhead && kv.key_width == kv.value_width;
  int64_t least = ceil_div(kAttendChunk, count * (kv.key_width + kv.value_width));
  int64_t most = std::max(least, ceil_div(heads, 2 * threads));
  for_ranges(threads, heads, most, [&](int64_t from, int64_t to) {
    static thread_local std::vector<float> scores, query;
    scores.resize(static_cast<size_t>(count + 1));
    query.resize(static_cast<size_t>(kv.key_width));
    for (int64_t h = from; h < to; ++h) {
      const float* q = floats(s, 1) + h * s.stride[1][0];
      for (int64_t i = 0; i < kv.key_width; ++i)
        query[static_cast<size_t>(i)] = q[i * s.stride[1][1]];
      int64_t first = h / group * kv.capacity + begin;
      const T *keys = cached.keys + first * kv.key_width;
      const T *values = cached.values + first * kv.value_width;
      // Keys come next: after the last head of a range too, as its thread most likely goes on there.
      bool other = h + 1 < heads && (h + 1) % group == 0;
      const T* next = keys + kv.capacity * kv.key_width;
      if (h == from) prefetch_start(keys, keys_nbytes);
      if (!in_turns) prefetch_start(values, values_nbytes);
      cached.dots(query.data(), keys, kv.key_width, count, in_turns ? values : nullptr, scores.data());
      for (int64_t t = 0; t < count; ++t) {
        float& score = scores[static_cast<size_t>(t)];
        score *= scale;
        if (cap > 0) score = cap * std::tanh(score / cap);
      }
      if (sinks) scores[static_cast<size_t>(count)] = sinks[h * s.stride[3][0]];
      kernels().softmax(scores.data(), count + (sinks ? 1 : 0), scores.data());
      if (other && !in_turns) prefetch_start(next, keys_nbytes);
      cached.weighted_sum(scores.data(), values, kv.value_width, count,
                          other && in_turns ? next : nullptr, floats(s, 0) + h * s.stride[0][0]);
    }
  });
}

void attend(const moepack_step& s, int32_t threads) {
  const moepack_kv& kv = *static_cast<const moepack_kv*>(s.extra);
  const Kernels& k = kernels();
  if (kv.half)
    attend(s, Cached<uint16_t>{static_cast<const uint16_t*>(kv.keys),
                               static_cast<const uint16_t*>(kv.values), k.dots_half,
                               k.weighted_sum_half}, threads);
  else
    attend(s, Cached<float>{static_cast<const float*>(kv.keys), static_cast<const float*>(kv.values),
                            k.dots, k.weighted_sum}, threads);
}

// See moepack_latent: the query goes to the latents, and the sum of latents becomes a value. Window, sinks
// and bound are those of attend().
void attend_latent(const moepack_step& s, int32_t threads) {
  const moepack_latent& by = *static_cast<const moepack_latent*>(s.extra);
  const moepack_kv& kv = *by.kv;
  int64_t latent = kv.key_width, window = s.number[1], end = kv.end + 1;
  int64_t begin = window > 0 && end > window ? end - window : 0, count = end - begin;
  float scale = static_cast<float>(s.scalar[0]), cap = static_cast<float>(s.scalar[1]);
  const float* sinks = floats(s, 3);
  const Kernels& k = kernels();
  auto dots = [&](const float* x, const void* rows, int64_t at, bool half, int64_t width, int64_t n,
                  float* out) {
    if (half) k.dots_half(x, static_cast<const uint16_t*>(rows) + at, width, n, nullptr, out);
    else k.dots(x, static_cast<const float*>(rows) + at, width, n, nullptr, out);
  };
  auto sum = [&](const float* weights, const void* rows, int64_t at, bool half, int64_t width,
                 int64_t n, float* out) {
    if (half) k.weighted_sum_half(weights, static_cast<const uint16_t*>(rows) + at, width, n, nullptr, out);
    else k.weighted_sum(weights, static_cast<const float*>(rows) + at, width, n, nullptr, out);
  };
  for_chunks(threads, s.number[0], [&](int64_t h) {
    static thread_local std::vector<float> query, mixed, scores, turned;
    query.resize(static_cast<size_t>(by.width)), mixed.resize(static_cast<size_t>(latent));
    scores.resize(static_cast<size_t>(count + 1)), turned.resize(static_cast<size_t>(count));
    const float* q = floats(s, 1) + h * s.stride[1][0];
    for (int64_t i = 0; i < by.width; ++i) query[static_cast<size_t>(i)] = q[i * s.stride[1][1]];
    dots(query.data() + by.plain_at, by.key_weights, h * latent * by.plain, by.half, by.plain,
         latent, mixed.data());
    dots(mixed.data(), kv.keys, begin * latent, kv.half, latent, count, scores.data());
    dots(query.data() + by.rotary_at, kv.values, begin * kv.value_width, kv.half, kv.value_width, count,
         turned.data());
    for (size_t t = 0; t < turned.size(); ++t) {
      scores[t] = (scores[t] + turned[t]) * scale;
      if (cap > 0) scores[t] = cap * std::tanh(scores[t] / cap);
    }
    if (sinks) scores[static_cast<size_t>(count)] = sinks[h * s.stride[3][0]];
    k.softmax(scores.data(), count + (sinks ? 1 : 0), scores.data());
    sum(scores.data(), kv.keys, begin * latent, kv.half, latent, count, mixed.data());
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
  int64_t slices = steps->size[0], each = ceil_div(slices, std::max<int64_t>(steps->number[1], 1));
  for_chunks(threads, ceil_div(slices, each), [&](int64_t chunk) {
    for (int64_t i = chunk * each; i < std::min(slices, (chunk + 1) * each); ++i)
      for (int64_t k = 0; k < count; ++k) {
        moepack_step s = steps[k];
        s.size[0] = 1;
        for (int o = 0; o < 4; ++o)
          if (s.data[o]) s.data[o] = floats(s, o) + (s.number[2] >> o & 1 ? chunk : i) * s.stride[o][0];
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
