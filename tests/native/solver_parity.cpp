// What quantizers compute: the same bits on every instruction set, nothing written past the end.
#include "parity.h"

namespace parity {
namespace {

constexpr int64_t kPast = 3;
constexpr float kUntouched = 7.0f;

struct Results {
  std::vector<float> floats;
  std::vector<uint8_t> codes;
  bool operator==(const Results& other) const {
    return floats == other.floats && codes == other.codes;
  }
};

// Room for values of which the last `kPast` must stay.
std::vector<float> room(int64_t count) {
  return std::vector<float>(static_cast<size_t>(count + kPast), kUntouched);
}
void keep(Results& results, const std::vector<float>& values, const char* isa, int which) {
  bool untouched = std::all_of(values.end() - kPast, values.end(),
                               [](float v) { return v == kUntouched; });
  check(untouched, isa, "a solver's end", which);
  results.floats.insert(results.floats.end(), values.begin(), values.end());
}

std::vector<float> between(int64_t count, float low, float high) {
  std::uniform_real_distribution<float> uniform(low, high);
  std::vector<float> values(static_cast<size_t>(count));
  for (float& v : values) v = uniform(generator);
  return values;
}
std::vector<float> whole(int64_t count, int low, int high) {
  auto values = between(count, static_cast<float>(low), static_cast<float>(high));
  for (float& v : values) v = std::round(v);
  return values;
}

void groups_of(const char* isa, int64_t size, int64_t count, bool measured) {
  auto weights = random_floats(size * count), measure = between(size * count, 0.1f, 2.0f);
  auto inverse = between(count, 0.5f, 3.0f), zero = between(count, 0.0f, 3.0f);
  auto scale = whole(count, 0, 15), minimum = whole(count, 0, 15), mean = random_floats(count);
  auto outer = between(count, -0.1f, 0.2f);
  moepack_groups groups{weights.data(), measured ? measure.data() : nullptr, size, count};
  moepack_grid grid{inverse.data(), zero.data(), 3};
  moepack_levels levels{8, {-17, -10, -5, -1, 2, 6, 11, 18}};
  const int8_t pairs[] = {0, 0, 0, -1, 1, 2, -2, 1}, singles[] = {0, -1, 1};
  moepack_neighbours neighbours{scale.data(), outer.data(), minimum.data(), outer.data(),
                                mean.data(), pairs, 4, 3, 15};
  moepack_moves moves{scale.data(), outer.data(), singles, 3, -16, 15};
  auto compute = [&] {
    Results results;
    auto q = room(count), qq = room(count), qw = room(count);
    auto done = [&](int32_t status, std::initializer_list<const std::vector<float>*> values) {
      check(status == MOEPACK_OK, isa, "status of a solver", static_cast<int>(size));
      for (auto* each : values) keep(results, *each, isa, static_cast<int>(size));
    };
    done(moepack_code_sums(&groups, &grid, q.data(), qq.data(), qw.data()), {&q, &qq, &qw});
    done(moepack_code_sums(&groups, &grid, q.data(), nullptr, nullptr), {&q});
    done(moepack_squared_steps(&groups, &grid, q.data()), {&q});
    done(moepack_level_sums(&groups, &levels, inverse.data(), qw.data(), qq.data()), {&qw, &qq});
    done(moepack_best_neighbours(&groups, &neighbours, q.data(), qq.data()), {&q, &qq});
    done(moepack_best_moves(&groups, &levels, &moves, q.data(), qw.data(), qq.data()),
         {&q, &qw, &qq});
    return results;
  };
  check(with_isa(isa, compute) == with_isa("portable", compute), isa, "solver",
        static_cast<int>(size));
}

void feedback(const char* isa, int64_t size, int64_t rows, bool with_levels) {
  int64_t stride = size + 3;  // a part of a wider factor
  auto weights = random_floats(size * rows), upper = between(size * stride, -0.3f, 0.3f);
  for (int64_t i = 0; i < size; ++i) upper[static_cast<size_t>(i * stride + i)] = 1.1f;
  auto step = between(rows, 0.1f, 0.9f), minimum = random_floats(rows), inverse = step;
  for (float& v : inverse) v = 1 / v;
  step[0] = 0;
  moepack_levels levels{5, {-3, -1, 0, 1, 4}};
  auto compute = [&] {
    Results results;
    auto errors = room(size * rows);
    results.codes.assign(static_cast<size_t>(size * rows), 99);
    moepack_columns columns{weights.data(), upper.data(), size, rows, stride, inverse.data(),
                            step.data(), with_levels ? nullptr : minimum.data(), 3,
                            with_levels ? &levels : nullptr, results.codes.data(), errors.data()};
    check(moepack_feed_back(&columns) == MOEPACK_OK, isa, "status of feed_back",
          static_cast<int>(size));
    keep(results, errors, isa, static_cast<int>(size));
    return results;
  };
  check(with_isa(isa, compute) == with_isa("portable", compute), isa, "feed_back",
        static_cast<int>(size));
}

}  // namespace

void solver(const char* isa) {
  for (int64_t size : {1, 7, 16, 64, 128})
    for (int64_t count : {1, 15, 16, 17, 100})
      for (bool other : {false, true}) {
        groups_of(isa, size, count, other);
        feedback(isa, size, count, other);
      }
}

}  // namespace parity
