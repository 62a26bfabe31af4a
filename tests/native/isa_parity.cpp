// Every instruction set of this machine against portable C++, through the C interface alone: for
// machines (or emulators) without Python and torch.
#include <cstring>
#include <limits>

#include "parity.h"

namespace {

using namespace parity;
using moepack::kSchemes;

constexpr int64_t kPast = 4;  // floats behind a result, which must stay as they are
constexpr float kUntouched = 7.0f;

std::vector<float> room(int64_t count) {
  return std::vector<float>(static_cast<size_t>(count + kPast), kUntouched);
}
bool untouched(const std::vector<float>& out, int64_t from, int64_t count) {
  auto begin = out.begin() + from;
  return std::all_of(begin, begin + count, [](float v) { return v == kUntouched; });
}

void linear(const char* isa, int scheme, int64_t rows, int64_t cols) {
  auto packed = random_packed(scheme, rows, cols);
  for (int64_t tokens : {1, 2, 3, 5, 130}) {
    auto x = random_floats(tokens * cols), bias = random_floats(rows);
    for (int mode : {MOEPACK_FLOAT, MOEPACK_INT8}) {
      auto compute = [&] {
        auto y = room(tokens * rows);
        int32_t status = moepack_linear(scheme, packed.data(), static_cast<int64_t>(packed.size()),
                                        rows, cols, x.data(), tokens, bias.data(), y.data(), mode, 3);
        check(status == MOEPACK_OK, isa, "status", scheme);
        check(untouched(y, tokens * rows, kPast), isa, "a product's end", scheme);
        return y;
      };
      check(close(with_isa(isa, compute), with_isa("portable", compute)), isa,
            mode == MOEPACK_INT8 ? "linear, int8" : "linear, float", scheme);
    }
  }
}

// The largest codes, of either sign's largest activations: sums of products must fit where they are.
void extremes(const char* isa, int scheme) {
  constexpr int64_t rows = 16, cols = 256;
  for (int code : {0x00, 0xFF}) {
    auto packed = random_packed(scheme, rows, cols, code);
    for (int64_t tokens : {1, 2, 5})
      for (float sign : {1.0f, -1.0f}) {
        std::vector<float> x(static_cast<size_t>(tokens * cols), sign);
        auto compute = [&] {
          std::vector<float> y(static_cast<size_t>(tokens * rows));
          moepack_linear(scheme, packed.data(), static_cast<int64_t>(packed.size()), rows, cols,
                         x.data(), tokens, nullptr, y.data(), MOEPACK_INT8, 1);
          return y;
        };
        check(close(with_isa(isa, compute), with_isa("portable", compute)), isa, "extremes", scheme);
      }
  }
}

void decode(const char* isa, int scheme, int64_t rows, int64_t cols) {
  auto packed = random_packed(scheme, rows, cols);
  int64_t tiles = (rows + 15) / 16, nbytes = static_cast<int64_t>(packed.size());
  std::vector<int64_t> backwards;
  for (int64_t tile = tiles; tile-- > 0;) backwards.push_back(tile);
  for (int to : {MOEPACK_TO_F32, MOEPACK_TO_BF16})
    for (bool some : {false, true}) {
      const int64_t* order = some ? backwards.data() : nullptr;
      int64_t wanted = some ? tiles * 16 : rows;
      auto compute = [&] {
        std::vector<uint8_t> out(static_cast<size_t>(wanted * cols * (to == MOEPACK_TO_F32 ? 4 : 2)));
        int32_t status = moepack_decode(scheme, packed.data(), nbytes, cols, order, tiles, wanted, to,
                                        out.data(), 2);
        check(status == MOEPACK_OK, isa, "status of decode", scheme);
        return out;
      };
      check(with_isa(isa, compute) == with_isa("portable", compute), isa, "decode", scheme);
    }
}

// The experts of a layer: records of a first and a down matrix and their biases.
struct Layer {
  int64_t hidden, intermediate;
  bool gated;
  moepack_layout layout;
  std::vector<std::vector<uint8_t>> data;
  std::vector<const uint8_t*> records;
  std::vector<const moepack_layout*> layouts;

  Layer(int first, int down, int64_t h, int64_t i, bool has_gate, int count)
      : hidden(h), intermediate(i), gated(has_gate), layout{first, down, 0, 0, 0, 0, 0} {
    int64_t parts = gated ? 2 : 1;
    auto rounded = [](int64_t rows) { return (rows + 15) / 16 * 16; };
    layout.first_bias = parts * moepack_packed_nbytes(first, i, h);
    layout.down = layout.first_bias + parts * rounded(i) * 4;
    layout.down_bias = layout.down + moepack_packed_nbytes(down, h, i);
    layout.nbytes = layout.down_bias + rounded(h) * 4;
    for (int e = 0; e < count; ++e) {
      std::vector<uint8_t> record;
      auto put = [&](const void* from, size_t nbytes) {
        auto bytes = static_cast<const uint8_t*>(from);
        record.insert(record.end(), bytes, bytes + nbytes);
      };
      auto put_bias = [&](int64_t n) {
        auto bias = random_floats(n);
        for (float& b : bias) b *= 0.1f;
        put(bias.data(), bias.size() * 4);
      };
      for (int64_t part = 0; part < parts; ++part) {
        auto matrix = random_packed(first, i, h);
        put(matrix.data(), matrix.size());
      }
      put_bias(parts * rounded(i));
      auto matrix = random_packed(down, h, i);
      put(matrix.data(), matrix.size());
      put_bias(rounded(h));
      record.shrink_to_fit();
      data.push_back(record);
    }
    for (auto& d : data) records.push_back(d.data());
    layouts.assign(data.size(), &layout);
  }
};

// A last bit of gate or up may move a code of the intermediate by one.
double tolerance(int mode) { return mode == MOEPACK_INT8 ? 1e-3 : 1e-5; }

void experts(const char* isa, int scheme, int kind, bool gated) {
  Layer layer(scheme, scheme, 100, 80, gated, 3);
  int64_t count = static_cast<int64_t>(layer.records.size());
  moepack_activation activation{kind, 1.0f, std::numeric_limits<float>::infinity(), 0.0f};
  auto x = random_floats(layer.hidden), weights = random_floats(count);
  for (float& v : x) v *= 1e-2f;
  for (int mode : {MOEPACK_FLOAT, MOEPACK_INT8}) {
    auto run = [&](float* y, float* outputs) {
      int32_t status = moepack_experts(layer.records.data(), layer.layouts.data(), weights.data(),
                                       count, layer.hidden, layer.intermediate, &activation,
                                       layer.gated, x.data(), y, outputs, mode, 2);
      check(status == MOEPACK_OK, isa, "status of experts", scheme);
    };
    auto compute = [&] {
      auto y = room(layer.hidden);
      run(y.data(), nullptr);
      check(untouched(y, layer.hidden, kPast), isa, "the experts' end", scheme);
      return y;
    };
    auto a = with_isa(isa, compute), b = with_isa("portable", compute);
    check(close(a, b, tolerance(mode)), isa, "experts", scheme);
    auto in_parts = [&] {
      std::vector<float> outputs(static_cast<size_t>(count * layer.hidden));
      auto y = room(layer.hidden);
      run(nullptr, outputs.data());
      int32_t status = moepack_sum_rows(outputs.data(), 1, count, layer.hidden, y.data(), 2);
      check(status == MOEPACK_OK, isa, "status of sum_rows", scheme);
      return y;
    };
    check(with_isa(isa, in_parts) == a, isa, "experts one by one are the same bits", scheme);
  }
}

// Tokens through three experts, of which one has none of them. Down has another scheme than gate and up.
void experts_tokens(const char* isa, int scheme, int64_t count) {
  Layer layer(scheme, (scheme + 3) % kSchemes, 90, 70, true, 3);
  moepack_activation activation{MOEPACK_SILU, 1.7f, 7.0f, 1.0f};
  int64_t rows = 2 * count + 1;
  auto x = random_floats(count * layer.hidden), weights = random_floats(count);
  for (float& v : x) v *= 1e-2f;
  std::vector<int64_t> tokens, places, starts{0, count / 3, count / 3, count};
  for (int64_t i = 0; i < count; ++i) tokens.push_back(i * 7 % count), places.push_back(rows - 2 * i - 2);
  for (int mode : {MOEPACK_FLOAT, MOEPACK_INT8}) {
    auto compute = [&] {
      auto out = room(rows * layer.hidden);
      int32_t status = moepack_experts_tokens(
          layer.records.data(), layer.layouts.data(), starts.data(), 3, layer.hidden,
          layer.intermediate, &activation, 1, x.data(), tokens.data(), places.data(), weights.data(),
          out.data(), mode, 2);
      check(status == MOEPACK_OK, isa, "status of experts_tokens", scheme);
      for (int64_t row = 0; row < rows; row += 2)
        check(untouched(out, row * layer.hidden, layer.hidden), isa, "rows not named", scheme);
      check(untouched(out, rows * layer.hidden, kPast), isa, "the rows' end", scheme);
      return out;
    };
    check(close(with_isa(isa, compute), with_isa("portable", compute), tolerance(mode)), isa,
          "experts_tokens", scheme);
  }
}

void refusals() {
  std::vector<uint8_t> packed(100);
  float one = 1;
  auto refused = [&](int scheme, int64_t rows) {
    return moepack_linear(scheme, packed.data(), 100, rows, 64, &one, 1, nullptr, &one, 1, 1);
  };
  check(refused(0, 16) == MOEPACK_SHORT_BUFFER, "all", "a short buffer is refused", 0);
  check(refused(99, 1) == MOEPACK_BAD_ARGUMENT, "all", "an unknown scheme is refused", 99);
  check(refused(-1, 1) == MOEPACK_BAD_ARGUMENT, "all", "an unknown scheme is refused", -1);
}

}  // namespace

int main() {
  std::printf("this machine: %s\n", moepack_isa());
  int tested = 0;
  for (const char* isa : {"avx512_vbmi", "avx512", "avx2", "neon", "portable"}) {
    if (moepack_set_isa(isa) != MOEPACK_OK) continue;
    ++tested;
    for (int scheme = 0; scheme < kSchemes; ++scheme) {
      for (int64_t rows : {1, 17, 64})
        for (int64_t cols : {1, 65, 170, 220, 300, 350, 430, 512, 576, 700, 760}) {
          linear(isa, scheme, rows, cols);
          decode(isa, scheme, rows, cols);
        }
      extremes(isa, scheme);
      for (int kind = MOEPACK_SILU; kind <= MOEPACK_RELU2; ++kind)
        for (bool gated : {false, true}) experts(isa, scheme, kind, gated);
      for (int64_t count : {1, 4, 9, 200}) experts_tokens(isa, scheme, count);
    }
    auto bytes = random_packed(0, 64, 600);
    auto sum = [&] { return moepack_read(bytes.data(), static_cast<int64_t>(bytes.size()), 2); };
    check(with_isa(isa, sum) == with_isa("portable", sum), isa, "read", 0);
    tape(isa);
    solver(isa);
    std::printf("%s: done\n", isa);
  }
  refusals();
  std::printf("%d instruction sets, %d failures\n", tested, failures);
  return failures != 0;
}
