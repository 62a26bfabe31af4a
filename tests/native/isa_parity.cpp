// Every instruction set of this machine against portable C++, through the C interface alone: for
// machines (or emulators) without Python and torch.
#include <algorithm>
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

bool close(const std::vector<float>& a, const std::vector<float>& b, double tolerance = 3e-6) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    difference += (a[i] - b[i]) * static_cast<double>(a[i] - b[i]);
    norm += b[i] * static_cast<double>(b[i]);
  }
  return std::sqrt(difference) <= tolerance * std::sqrt(norm);
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

moepack_step row_step(int op, int kind, int64_t size, float* out, const float* a, const float* b) {
  moepack_step step{};
  step.op = op, step.kind = kind;
  for (int64_t& n : step.size) n = 1;
  step.size[3] = size;
  const void* data[] = {out, a, b};
  for (int operand = 0; operand < 3; ++operand) {
    step.data[operand] = const_cast<void*>(data[operand]);
    step.stride[operand][3] = 1;
  }
  return step;
}

// Runs one step on each instruction set; `out` is what it writes.
void tape_step(const char* isa, const char* what, const moepack_step& step, std::vector<float>& out,
               double tolerance) {
  auto compute = [&] {
    std::fill(out.begin(), out.end(), 7.0f);
    check(moepack_tape_run(&step, 0, 1, MOEPACK_FLOAT, 2) == 1, isa, what, step.kind);
    return out;
  };
  auto a = with_isa(isa, compute), b = with_isa("portable", compute);
  check(close(a, b, tolerance), isa, what, step.kind);
}

// What stands between a recorded token's matrices: glue.h, lanes.h and the loops of tape.cpp.
void tape(const char* isa, int64_t size) {
  constexpr int kUnary = 20, kBinary = 6, kReduce = 3;
  auto a = random_floats(size), b = random_floats(size);
  std::vector<float> out(static_cast<size_t>(size));
  for (int kind = 0; kind < kUnary; ++kind) {
    auto x = a;
    bool positive = kind == 4 || kind == 5 || kind == 8;  // sqrt, rsqrt, log
    for (float& v : x) v = positive ? std::fabs(v) + 0.1f : v;
    moepack_step step = row_step(MOEPACK_UNARY, kind, size, out.data(), x.data(), nullptr);
    step.scalar[0] = -0.5, step.scalar[1] = 0.75;
    tape_step(isa, "unary step", step, out, 1e-6);
  }
  for (int kind = 0; kind < kBinary; ++kind) {
    moepack_step step = row_step(MOEPACK_BINARY, kind, size, out.data(), a.data(), b.data());
    tape_step(isa, "binary step", step, out, 1e-7);
    step.stride[2][3] = 0;  // the same second operand for all
    tape_step(isa, "binary step, broadcast", step, out, 1e-7);
    step.data[2] = nullptr, step.scalar[0] = 1.5;
    tape_step(isa, "binary step, scalar", step, out, 1e-7);
  }
  std::vector<float> one(1);
  for (int kind = 0; kind < kReduce; ++kind)
    tape_step(isa, "reduction", row_step(MOEPACK_REDUCE, kind, size, one.data(), b.data(), nullptr),
              one, 1e-5);
  tape_step(isa, "softmax", row_step(MOEPACK_SOFTMAX, 0, size, out.data(), a.data(), nullptr), out,
            1e-6);

  constexpr int64_t rows = 5;
  auto weights = random_floats(rows * size), bias = random_floats(rows);
  std::vector<float> y(rows);
  moepack_step dense = row_step(MOEPACK_DENSE, 0, 1, y.data(), a.data(), weights.data());
  dense.data[3] = bias.data();
  dense.stride[0][0] = rows, dense.stride[1][0] = dense.stride[2][0] = size;
  dense.number[0] = 1, dense.number[1] = rows, dense.number[2] = size;
  tape_step(isa, "dense", dense, y, 1e-5);
}

// Two heads of queries a key, a window, a sink and a bound on scores.
void attention(const char* isa, int64_t width, int64_t tokens, int64_t window, bool sinks) {
  constexpr int64_t heads = 4, kv_heads = 2;
  int64_t capacity = tokens + 3;
  auto keys = random_floats(kv_heads * capacity * width);
  auto values = random_floats(kv_heads * capacity * width);
  auto query = random_floats(heads * width), key = random_floats(kv_heads * width);
  auto value = random_floats(kv_heads * width), sink = random_floats(heads);
  moepack_kv kv{keys.data(), values.data(), kv_heads, width, width, capacity, tokens - 1};
  moepack_step append{};
  append.op = MOEPACK_APPEND, append.extra = &kv;
  append.data[1] = key.data(), append.data[2] = value.data();
  for (int operand : {1, 2}) append.stride[operand][0] = width, append.stride[operand][1] = 1;
  std::vector<float> out(static_cast<size_t>(heads * width));
  moepack_step attend{};
  attend.op = MOEPACK_ATTEND, attend.extra = &kv;
  attend.data[0] = out.data(), attend.data[1] = query.data();
  attend.data[3] = sinks ? sink.data() : nullptr;
  attend.stride[0][0] = attend.stride[1][0] = width, attend.stride[1][1] = attend.stride[3][0] = 1;
  attend.number[0] = heads, attend.number[1] = window;
  attend.scalar[0] = 0.3, attend.scalar[1] = sinks ? 5.0 : 0.0;
  check(moepack_tape_run(&append, 0, 1, MOEPACK_FLOAT, 2) == 1, isa, "append", 0);
  tape_step(isa, "attention", attend, out, 1e-5);
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
    for (int64_t size : {1, 7, 16, 40, 333}) tape(isa, size);
    for (int64_t width : {24, 32, 128})
      for (bool sinks : {false, true}) attention(isa, width, 19, sinks ? 6 : 0, sinks);
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
