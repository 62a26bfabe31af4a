// Every instruction set of this machine against portable C++, through the C interface alone: for
// machines (or emulators) without Python and torch.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "moepack.h"

namespace {

constexpr int kSchemes = 11;
std::mt19937 generator(1);
int failures = 0;

// Bytes below 0x3C are finite in every float format.
std::vector<uint8_t> random_bytes(int64_t count) {
  std::vector<uint8_t> bytes(static_cast<size_t>(count));
  for (uint8_t& b : bytes) b = static_cast<uint8_t>(generator() % 0x3C);
  return bytes;
}

std::vector<float> random_floats(int64_t count) {
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(count));
  for (float& v : values) v = normal(generator);
  return values;
}

void check(bool good, const char* isa, const char* what, int scheme) {
  if (good) return;
  ++failures;
  std::printf("FAILED %s: %s, scheme %d\n", isa, what, scheme);
}

bool close(const std::vector<float>& a, const std::vector<float>& b) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    difference += (a[i] - b[i]) * static_cast<double>(a[i] - b[i]);
    norm += b[i] * static_cast<double>(b[i]);
  }
  return std::sqrt(difference) <= 3e-6 * std::sqrt(norm);
}

template <class F> auto with_isa(const char* isa, F&& compute) {
  moepack_set_isa(isa);
  return compute();
}

void linear_and_decode(const char* isa, int scheme, int64_t rows, int64_t cols) {
  int64_t nbytes = moepack_packed_nbytes(scheme, rows, cols);
  auto packed = random_bytes(nbytes);
  for (int64_t tokens : {1, 2, 5, 130}) {
    auto x = random_floats(tokens * cols), bias = random_floats(rows);
    for (int mode : {MOEPACK_FLOAT, MOEPACK_INT8}) {
      auto compute = [&] {
        std::vector<float> y(static_cast<size_t>(tokens * rows));
        int32_t status = moepack_linear(scheme, packed.data(), nbytes, rows, cols, x.data(), tokens,
                                        bias.data(), y.data(), mode, 3);
        check(status == MOEPACK_OK, isa, "status", scheme);
        return y;
      };
      check(close(with_isa(isa, compute), with_isa("portable", compute)), isa,
            mode == MOEPACK_INT8 ? "linear, int8" : "linear, float", scheme);
    }
  }
  auto decode = [&] {
    std::vector<float> out(static_cast<size_t>(rows * cols));
    moepack_decode(scheme, packed.data(), nbytes, cols, nullptr, (rows + 15) / 16, rows,
                   MOEPACK_TO_F32, out.data(), 2);
    return out;
  };
  auto a = with_isa(isa, decode), b = with_isa("portable", decode);
  check(std::memcmp(a.data(), b.data(), 4 * a.size()) == 0, isa, "decode", scheme);
}

void experts(const char* isa, int scheme, int kind, int64_t hidden, int64_t intermediate) {
  constexpr int count = 3;
  moepack_layout layout{scheme, scheme, 0, -1, 0, -1, 0};
  layout.down = 2 * moepack_packed_nbytes(scheme, intermediate, hidden);
  layout.nbytes = layout.down + moepack_packed_nbytes(scheme, hidden, intermediate);
  std::vector<std::vector<uint8_t>> data;
  std::vector<const uint8_t*> records;
  std::vector<const moepack_layout*> layouts(count, &layout);
  for (int e = 0; e < count; ++e) data.push_back(random_bytes(layout.nbytes));
  for (auto& d : data) records.push_back(d.data());
  moepack_activation activation{kind, 1.0f, std::numeric_limits<float>::infinity(), 0.0f};
  auto x = random_floats(hidden), weights = random_floats(count);
  for (float& v : x) v *= 1e-2f;
  for (int mode : {MOEPACK_FLOAT, MOEPACK_INT8}) {
    auto compute = [&] {
      std::vector<float> y(static_cast<size_t>(hidden));
      int32_t status =
          moepack_experts(records.data(), layouts.data(), weights.data(), count, hidden,
                          intermediate, &activation, 1, x.data(), y.data(), nullptr, mode, 2);
      check(status == MOEPACK_OK, isa, "status of experts", scheme);
      return y;
    };
    auto a = with_isa(isa, compute), b = with_isa("portable", compute);
    double difference = 0, norm = 0;
    for (size_t i = 0; i < a.size(); ++i) {
      difference += std::pow(a[i] - b[i], 2.0);
      norm += std::pow(b[i], 2.0);
    }
    // A last bit of gate or up may move a code of the intermediate by one.
    check(std::sqrt(difference) <= (mode == MOEPACK_INT8 ? 1e-3 : 1e-5) * std::sqrt(norm), isa,
          "experts", scheme);
  }
}

}  // namespace

int main() {
  std::printf("this machine: %s\n", moepack_isa());
  int tested = 0;
  for (const char* isa : {"avx512", "avx2", "neon", "portable"}) {
    if (moepack_set_isa(isa) != MOEPACK_OK) continue;
    ++tested;
    for (int scheme = 0; scheme < kSchemes; ++scheme) {
      linear_and_decode(isa, scheme, 64, 512);
      linear_and_decode(isa, scheme, 17, 65);
      linear_and_decode(isa, scheme, 100, 700);
      for (int kind = MOEPACK_SILU; kind <= MOEPACK_RELU2; ++kind)
        experts(isa, scheme, kind, 100, 80);
    }
    std::printf("%s: done\n", isa);
  }
  auto packed = random_bytes(100);
  float one = 1;
  check(moepack_linear(0, packed.data(), 100, 16, 64, &one, 1, nullptr, &one, 1, 1) ==
            MOEPACK_SHORT_BUFFER, "all", "a short buffer is refused", 0);
  check(moepack_linear(99, packed.data(), 100, 1, 1, &one, 1, nullptr, &one, 1, 1) ==
            MOEPACK_BAD_ARGUMENT, "all", "an unknown scheme is refused", 99);
  std::printf("%d instruction sets, %d failures\n", tested, failures);
  return failures != 0;
}
