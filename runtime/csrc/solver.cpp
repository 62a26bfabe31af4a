// What quantizers compute of every weight: arguments checked, then the instruction set's own.
#include "kernels.h"

namespace {

using namespace moepack;

bool sound(const moepack_groups* groups) {
  return groups && groups->weights && groups->size >= 1 && groups->count >= 0;
}
bool sound(const moepack_grid* grid) {
  return grid && grid->inverse && grid->zero && grid->top >= 1 && grid->top <= 255;
}
bool sound(const moepack_levels* levels) {
  if (!levels || levels->count < 2 || levels->count > MOEPACK_MOST_LEVELS) return false;
  for (int32_t i = 1; i < levels->count; ++i)
    if (!(levels->level[i - 1] < levels->level[i])) return false;
  return true;
}

}  // namespace

int32_t moepack_code_sums(const moepack_groups* groups, const moepack_grid* grid, float* q, float* qq,
                          float* qw) {
  if (!sound(groups) || !sound(grid) || !q || !qq != !qw) return MOEPACK_BAD_ARGUMENT;
  kernels().code_sums(*groups, *grid, q, qq, qw);
  return MOEPACK_OK;
}

int32_t moepack_squared_steps(const moepack_groups* groups, const moepack_grid* grid, float* lost) {
  if (!sound(groups) || !sound(grid) || !lost) return MOEPACK_BAD_ARGUMENT;
  kernels().squared_steps(*groups, *grid, lost);
  return MOEPACK_OK;
}

int32_t moepack_level_sums(const moepack_groups* groups, const moepack_levels* levels,
                           const float* inverse, float* qw, float* qq) {
  if (!sound(groups) || !sound(levels) || !inverse || !qw || !qq) return MOEPACK_BAD_ARGUMENT;
  kernels().level_sums(*groups, *levels, inverse, qw, qq);
  return MOEPACK_OK;
}

int32_t moepack_best_neighbours(const moepack_groups* groups, const moepack_neighbours* x, float* scale,
                                float* minimum) {
  if (!sound(groups) || !x || !x->scale || !x->outer_scale || !x->minimum || !x->outer_minimum ||
      !x->moves || x->moves_count < 1 || x->top < 1 || x->top > 255 || x->code_top < 1 || !scale ||
      !minimum)
    return MOEPACK_BAD_ARGUMENT;
  kernels().best_neighbours(*groups, *x, scale, minimum);
  return MOEPACK_OK;
}

int32_t moepack_best_moves(const moepack_groups* groups, const moepack_levels* levels,
                           const moepack_moves* x, float* scale, float* qw, float* qq) {
  if (!sound(groups) || !sound(levels) || !x || !x->scale || !x->outer_scale || !x->moves ||
      x->moves_count < 1 || !(x->lowest <= x->highest) || !scale || !qw || !qq)
    return MOEPACK_BAD_ARGUMENT;
  kernels().best_moves(*groups, *levels, *x, scale, qw, qq);
  return MOEPACK_OK;
}

int32_t moepack_feed_back(const moepack_columns* x) {
  if (!x || !x->weights || !x->upper || !x->inverse || !x->step || !x->codes || !x->errors ||
      x->size < 1 || x->size > MOEPACK_MOST_GROUP || x->rows < 0 || x->stride < x->size)
    return MOEPACK_BAD_ARGUMENT;
  if (x->levels ? !sound(x->levels) : !x->minimum || x->top < 1 || x->top > 255)
    return MOEPACK_BAD_ARGUMENT;
  kernels().feed_back(*x);
  return MOEPACK_OK;
}
