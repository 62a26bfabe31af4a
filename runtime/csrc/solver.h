// What quantizers compute of every weight, compiled for each instruction set: codes at given scales,
// their sums over groups, and error feedback. Groups lie side by side, so a vector holds the same
// weight of many groups, and sums are the same bits on every instruction set.
#pragma once
#include <string.h>

#include <type_traits>

#include "lanes.h"

namespace moepack {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorFloats = 16;
#elif defined(__AVX2__)
constexpr int kVectorFloats = 8;
#else
constexpr int kVectorFloats = 4;
#endif
constexpr int kVectors = kLanes / kVectorFloats;

typedef float Vector __attribute__((vector_size(4 * kVectorFloats)));

// 16 groups.
struct Lanes16 {
  Vector v[kVectors];
};

// Calls f(first, whole) for each 16 of `count` groups; `whole` is a constant and false where there are
// fewer.
template <class F> MOEPACK_INLINE void each_lanes(int64_t count, F f) {
  int64_t first = 0;
  for (; first + kLanes <= count; first += kLanes) f(first, std::true_type{});
  if (first < count) f(first, std::false_type{});
}

// The same at any address. Copying a register's worth through memory costs more than what is computed.
typedef float Unaligned __attribute__((vector_size(4 * kVectorFloats), aligned(4), may_alias));

// 16 floats, or the `count` below that there are, and zeros.
template <bool WHOLE> MOEPACK_INLINE Lanes16 load_lanes(const float* p, int64_t count) {
  Lanes16 out{};
  if (WHOLE)
    for (int k = 0; k < kVectors; ++k)
      out.v[k] = *reinterpret_cast<const Unaligned*>(p + k * kVectorFloats);
  else
    memcpy(&out, p, static_cast<size_t>(4 * count));
  return out;
}
template <bool WHOLE> MOEPACK_INLINE void store_lanes(float* p, const Lanes16& x, int64_t count) {
  if (WHOLE)
    for (int k = 0; k < kVectors; ++k)
      *reinterpret_cast<Unaligned*>(p + k * kVectorFloats) = x.v[k];
  else
    memcpy(p, &x, static_cast<size_t>(4 * count));
}

// A number as a vector of them.
MOEPACK_INLINE Vector all(float x) { return Vector{} + x; }

// The nearest of 0, 1, ..., top; ties go to even.
MOEPACK_INLINE Vector nearest_code(Vector x, float top) {
  x = x > 0.0f ? x : Vector{};
  x = x < top ? x : all(top);
  return (x + kRound) - kRound;
}

// The nearest of some ascending levels, of two as near the upper. A number of steps that is fixed is
// unrolled; those that are not there are out of reach.
struct Levels {
  static constexpr int kSteps = MOEPACK_MOST_LEVELS - 1;
  explicit Levels(const moepack_levels& levels) : lowest(levels.level[0]) {
    for (int i = 0; i < kSteps; ++i) {
      bool there = i + 1 < levels.count;
      middle[i] = there ? (levels.level[i] + levels.level[i + 1]) / 2 : INFINITY;
      rise[i] = there ? levels.level[i + 1] - levels.level[i] : 0.0f;
    }
  }
  float lowest, middle[kSteps], rise[kSteps];

  MOEPACK_INLINE Vector nearest(Vector x) const {
    Vector level = all(lowest);
    for (int i = 0; i < kSteps; ++i) level += x >= middle[i] ? all(rise[i]) : Vector{};
    return level;
  }
  MOEPACK_INLINE Vector code(Vector x) const {
    Vector code{};
    for (int i = 0; i < kSteps; ++i) code += x >= middle[i] ? all(1.0f) : Vector{};
    return code;
  }
};

// Calls f(k, weights, measure) for every weight of 16 groups, a vector of groups at a time.
template <bool MEASURED, bool WHOLE, class F>
MOEPACK_INLINE void each_weight(const moepack_groups& groups, int64_t first, F f) {
  int64_t left = groups.count - first;
  for (int64_t i = 0; i < groups.size; ++i) {
    int64_t at = i * groups.count + first;
    auto weight = load_lanes<WHOLE>(groups.weights + at, left);
    Lanes16 measure{};
    if (MEASURED) measure = load_lanes<WHOLE>(groups.measure + at, left);
    for (int k = 0; k < kVectors; ++k) f(k, weight.v[k], measure.v[k]);
  }
}

template <bool MEASURED, bool SQUARES>
void code_sums_of(const moepack_groups& groups, const moepack_grid& grid, float* q, float* qq,
                  float* qw) {
  each_lanes(groups.count, [&](int64_t first, auto whole) MOEPACK_LAMBDA {
    int64_t left = groups.count - first;
    auto inverse = load_lanes<whole>(grid.inverse + first, left);
    auto zero = load_lanes<whole>(grid.zero + first, left);
    Lanes16 sum{}, squares{}, products{};
    auto add = [&](int k, Vector weight, Vector measure) MOEPACK_LAMBDA {
      Vector code = nearest_code(weight * inverse.v[k] + zero.v[k], grid.top);
      Vector counted = MEASURED ? code * measure : code;
      sum.v[k] += counted;
      if (!SQUARES) return;
      squares.v[k] += counted * code;
      products.v[k] += counted * weight;
    };
    each_weight<MEASURED, whole>(groups, first, add);
    store_lanes<whole>(q + first, sum, left);
    if (!SQUARES) return;
    store_lanes<whole>(qq + first, squares, left);
    store_lanes<whole>(qw + first, products, left);
  });
}

void code_sums(const moepack_groups& groups, const moepack_grid& grid, float* q, float* qq,
               float* qw) {
  if (groups.measure)
    qq ? code_sums_of<true, true>(groups, grid, q, qq, qw)
       : code_sums_of<true, false>(groups, grid, q, qq, qw);
  else
    qq ? code_sums_of<false, true>(groups, grid, q, qq, qw)
       : code_sums_of<false, false>(groups, grid, q, qq, qw);
}

// Sums of squared steps of 16 groups.
template <bool MEASURED, bool WHOLE>
MOEPACK_INLINE Lanes16 squared_steps_lanes(const moepack_groups& groups, int64_t first,
                                           const Lanes16& inverse, const Lanes16& zero, float top) {
  Lanes16 sum{};
  each_weight<MEASURED, WHOLE>(groups, first, [&](int k, Vector weight, Vector measure) MOEPACK_LAMBDA {
    Vector wanted = weight * inverse.v[k] + zero.v[k];
    Vector residual = wanted - nearest_code(wanted, top);
    Vector squared = residual * residual;
    sum.v[k] += MEASURED ? squared * measure : squared;
  });
  return sum;
}

template <bool MEASURED>
void squared_steps_of(const moepack_groups& groups, const moepack_grid& grid, float* lost) {
  each_lanes(groups.count, [&](int64_t first, auto whole) MOEPACK_LAMBDA {
    int64_t left = groups.count - first;
    auto inverse = load_lanes<whole>(grid.inverse + first, left);
    auto zero = load_lanes<whole>(grid.zero + first, left);
    auto sum = squared_steps_lanes<MEASURED, whole>(groups, first, inverse, zero, grid.top);
    store_lanes<whole>(lost + first, sum, left);
  });
}

void squared_steps(const moepack_groups& groups, const moepack_grid& grid, float* lost) {
  groups.measure ? squared_steps_of<true>(groups, grid, lost)
                 : squared_steps_of<false>(groups, grid, lost);
}

struct LevelSums {
  Lanes16 qw{}, qq{};
};

// Sums of level times weight and of squared levels of 16 groups.
template <bool MEASURED, bool WHOLE>
MOEPACK_INLINE LevelSums level_sums_lanes(const moepack_groups& groups, int64_t first,
                                          const Levels& levels, const Lanes16& inverse) {
  LevelSums sums;
  each_weight<MEASURED, WHOLE>(groups, first, [&](int k, Vector weight, Vector measure) MOEPACK_LAMBDA {
    Vector level = levels.nearest(weight * inverse.v[k]);
    Vector counted = MEASURED ? level * measure : level;
    sums.qw.v[k] += counted * weight;
    sums.qq.v[k] += counted * level;
  });
  return sums;
}

template <bool MEASURED>
void level_sums_of(const moepack_groups& groups, const Levels& levels, const float* inverses,
                   float* qw, float* qq) {
  each_lanes(groups.count, [&](int64_t first, auto whole) MOEPACK_LAMBDA {
    int64_t left = groups.count - first;
    auto inverse = load_lanes<whole>(inverses + first, left);
    auto sums = level_sums_lanes<MEASURED, whole>(groups, first, levels, inverse);
    store_lanes<whole>(qw + first, sums.qw, left);
    store_lanes<whole>(qq + first, sums.qq, left);
  });
}

void level_sums(const moepack_groups& groups, const moepack_levels& levels, const float* inverse,
                float* qw, float* qq) {
  Levels found(levels);
  groups.measure ? level_sums_of<true>(groups, found, inverse, qw, qq)
                 : level_sums_of<false>(groups, found, inverse, qw, qq);
}

// One over a step, large and finite for 0; its sign is kept.
constexpr float kSmallestStep = 1e-30f;
MOEPACK_INLINE Vector invert(Vector step) {
  Vector size = step < 0.0f ? -step : step;
  Vector inverse = 1.0f / (size > kSmallestStep ? size : all(kSmallestStep));
  return step < 0.0f ? -inverse : inverse;
}
MOEPACK_INLINE Vector between(Vector x, float low, float high) {
  x = x > low ? x : all(low);
  return x < high ? x : all(high);
}

template <bool MEASURED>
void best_neighbours_of(const moepack_groups& groups, const moepack_neighbours& x, float* scales,
                        float* minima) {
  each_lanes(groups.count, [&](int64_t first, auto whole) MOEPACK_LAMBDA {
    int64_t left = groups.count - first;
    auto scale = load_lanes<whole>(x.scale + first, left);
    auto outer_scale = load_lanes<whole>(x.outer_scale + first, left);
    auto minimum = load_lanes<whole>(x.minimum + first, left);
    auto outer_minimum = load_lanes<whole>(x.outer_minimum + first, left);
    Lanes16 mean{};
    if (x.mean) mean = load_lanes<whole>(x.mean + first, left);
    Lanes16 least{}, best_scale = scale, best_minimum = minimum;
    for (int64_t move = 0; move < x.moves_count; ++move) {
      float up = x.moves[2 * move], along = x.moves[2 * move + 1];
      Lanes16 tried_scale, tried_minimum, step, inverse, zero;
      for (int k = 0; k < kVectors; ++k) {
        tried_scale.v[k] = between(scale.v[k] + up, 1.0f, x.code_top);
        tried_minimum.v[k] = between(minimum.v[k] + along, 0.0f, x.code_top);
        step.v[k] = tried_scale.v[k] * outer_scale.v[k];
        inverse.v[k] = invert(step.v[k]);
        zero.v[k] = (tried_minimum.v[k] * outer_minimum.v[k] + mean.v[k]) * inverse.v[k];
      }
      auto lost = squared_steps_lanes<MEASURED, whole>(groups, first, inverse, zero, x.top);
      for (int k = 0; k < kVectors; ++k) {
        lost.v[k] *= step.v[k] * step.v[k];
        auto better = move ? lost.v[k] < least.v[k] : lost.v[k] == lost.v[k];
        least.v[k] = better ? lost.v[k] : least.v[k];
        best_scale.v[k] = better ? tried_scale.v[k] : best_scale.v[k];
        best_minimum.v[k] = better ? tried_minimum.v[k] : best_minimum.v[k];
      }
    }
    store_lanes<whole>(scales + first, best_scale, left);
    store_lanes<whole>(minima + first, best_minimum, left);
  });
}

void best_neighbours(const moepack_groups& groups, const moepack_neighbours& x, float* scale,
                     float* minimum) {
  groups.measure ? best_neighbours_of<true>(groups, x, scale, minimum)
                 : best_neighbours_of<false>(groups, x, scale, minimum);
}

template <bool MEASURED>
void best_moves_of(const moepack_groups& groups, const Levels& levels, const moepack_moves& x,
                   float* scales, float* qw, float* qq) {
  each_lanes(groups.count, [&](int64_t first, auto whole) MOEPACK_LAMBDA {
    int64_t left = groups.count - first;
    auto scale = load_lanes<whole>(x.scale + first, left);
    auto outer = load_lanes<whole>(x.outer_scale + first, left);
    Lanes16 least{}, best = scale;
    LevelSums kept;
    for (int64_t move = 0; move < x.moves_count; ++move) {
      float up = x.moves[move];
      Lanes16 tried, step, inverse;
      for (int k = 0; k < kVectors; ++k) {
        tried.v[k] = between(scale.v[k] + up, x.lowest, x.highest);
        step.v[k] = tried.v[k] * outer.v[k];
        inverse.v[k] = invert(step.v[k]);
      }
      auto sums = level_sums_lanes<MEASURED, whole>(groups, first, levels, inverse);
      for (int k = 0; k < kVectors; ++k) {
        Vector lost = step.v[k] * (step.v[k] * sums.qq.v[k] - 2.0f * sums.qw.v[k]);
        auto better = move ? lost < least.v[k] : lost == lost;
        least.v[k] = better ? lost : least.v[k];
        best.v[k] = better ? tried.v[k] : best.v[k];
        kept.qw.v[k] = better ? sums.qw.v[k] : kept.qw.v[k];
        kept.qq.v[k] = better ? sums.qq.v[k] : kept.qq.v[k];
      }
    }
    store_lanes<whole>(scales + first, best, left);
    store_lanes<whole>(qw + first, kept.qw, left);
    store_lanes<whole>(qq + first, kept.qq, left);
  });
}

void best_moves(const moepack_groups& groups, const moepack_levels& levels, const moepack_moves& x,
                float* scale, float* qw, float* qq) {
  Levels found(levels);
  groups.measure ? best_moves_of<true>(groups, found, x, scale, qw, qq)
                 : best_moves_of<false>(groups, found, x, scale, qw, qq);
}

// `round` finds the codes of a column, and the values that they stand for.
template <bool WHOLE, class Round>
MOEPACK_INLINE void feed_back_lanes(const moepack_columns& x, int64_t first, Round round) {
  int64_t left = x.rows - first;
  Lanes16 weights[MOEPACK_MOST_GROUP];
  for (int64_t i = 0; i < x.size; ++i)
    weights[i] = load_lanes<WHOLE>(x.weights + i * x.rows + first, left);
  for (int64_t i = 0; i < x.size; ++i) {
    const float* upper = x.upper + i * x.stride;
    Lanes16 code, error;
    for (int k = 0; k < kVectors; ++k) {
      Vector value = round(weights[i].v[k], k, code.v[k]);
      error.v[k] = (weights[i].v[k] - value) / upper[i];
    }
    for (int64_t later = i + 1; later < x.size; ++later)
      for (int k = 0; k < kVectors; ++k) weights[later].v[k] -= error.v[k] * upper[later];
    store_lanes<WHOLE>(x.errors + i * x.rows + first, error, left);
    float codes[kLanes];
    memcpy(codes, &code, sizeof codes);
    uint8_t* out = x.codes + i * x.rows + first;
    for (int64_t j = 0; j < (WHOLE ? kLanes : left); ++j) out[j] = static_cast<uint8_t>(codes[j]);
  }
}

void feed_back(const moepack_columns& x) {
  each_lanes(x.rows, [&](int64_t first, auto whole) MOEPACK_LAMBDA {
    int64_t left = x.rows - first;
    auto inverse = load_lanes<whole>(x.inverse + first, left);
    auto step = load_lanes<whole>(x.step + first, left);
    if (x.levels) {
      Levels levels(*x.levels);
      feed_back_lanes<whole>(x, first, [&](Vector w, int k, Vector& code) MOEPACK_LAMBDA {
        Vector scaled = w * inverse.v[k];
        code = step.v[k] != 0.0f ? levels.code(scaled) : Vector{};
        return levels.nearest(scaled) * step.v[k];
      });
    } else {
      auto minimum = load_lanes<whole>(x.minimum + first, left);
      feed_back_lanes<whole>(x, first, [&](Vector w, int k, Vector& code) MOEPACK_LAMBDA {
        code = nearest_code((w + minimum.v[k]) * inverse.v[k], x.top);
        code = step.v[k] != 0.0f ? code : Vector{};
        return code * step.v[k] - minimum.v[k];
      });
    }
  });
}

}  // namespace
}  // namespace moepack
