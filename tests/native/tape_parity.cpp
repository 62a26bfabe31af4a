// A recorded token's steps: what stands between the matrices (glue.h, lanes.h), and the loops of
// tape.cpp around everything.
#include "parity.h"

namespace parity {
namespace {

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

// Runs steps, and sees that those which are done take time.
int64_t play(const moepack_step* steps, int64_t begin, int64_t end, int32_t mode, int32_t threads) {
  std::vector<double> seconds(static_cast<size_t>(end), 0.0);
  int64_t done = moepack_tape_run(steps, begin, end, mode, threads, seconds.data());
  for (int64_t i = 0; i < end; ++i)
    check((seconds[static_cast<size_t>(i)] > 0) == (begin <= i && i < done), "any", "its time", 0);
  return done;
}

// Runs one step on each instruction set; `out` is what it writes.
void tape_step(const char* isa, const char* what, const moepack_step& step, std::vector<float>& out,
               double tolerance) {
  auto compute = [&] {
    std::fill(out.begin(), out.end(), 7.0f);
    check(play(&step, 0, 1, MOEPACK_FLOAT, 2) == 1, isa, what, step.kind);
    return out;
  };
  auto a = with_isa(isa, compute), b = with_isa("portable", compute);
  check(close(a, b, tolerance), isa, what, step.kind);
}

void rows(const char* isa, int64_t size) {
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

  constexpr int64_t count = 5;
  auto weights = random_floats(count * size), bias = random_floats(count);
  std::vector<float> y(count);
  moepack_step dense = row_step(MOEPACK_DENSE, 0, 1, y.data(), a.data(), weights.data());
  dense.data[3] = bias.data();
  dense.stride[0][0] = count, dense.stride[1][0] = dense.stride[2][0] = size;
  dense.number[0] = 1, dense.number[1] = count, dense.number[2] = size;
  tape_step(isa, "dense", dense, y, 1e-5);
}

// Two heads of queries a key, a window, a sink and a bound on scores.
void attention(const char* isa, int64_t width, int64_t tokens, int64_t window, bool sinks, bool half) {
  constexpr int64_t heads = 4, kv_heads = 2;
  int64_t capacity = tokens;
  // Bytes below 0x3C are finite halves.
  auto cache = [&] {
    std::vector<uint8_t> bytes(static_cast<size_t>(kv_heads * capacity * width * (half ? 2 : 4)));
    for (uint8_t& b : bytes) b = static_cast<uint8_t>(generator() % 0x3C);
    auto numbers = random_floats(kv_heads * capacity * width);
    if (!half) std::memcpy(bytes.data(), numbers.data(), bytes.size());
    return bytes;
  };
  auto keys = cache(), values = cache();
  auto query = random_floats(heads * width), key = random_floats(kv_heads * width);
  auto value = random_floats(kv_heads * width), sink = random_floats(heads);
  moepack_kv kv{keys.data(), values.data(), kv_heads, width,
                width,       capacity,      tokens - 1, half};
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
  auto appended = [&] {
    check(play(&append, 0, 1, MOEPACK_FLOAT, 2) == 1, isa, "append", half);
    return keys;
  };
  check(with_isa(isa, appended) == with_isa("portable", appended), isa, "what is appended", half);
  tape_step(isa, "attention", attend, out, 1e-5);
  for (float large : {65520.0f, -INFINITY, std::nanf("")}) {
    auto keys_before = keys, values_before = values;
    value.back() = large;
    int64_t done = play(&append, 0, 1, MOEPACK_FLOAT, 2);
    check(done == (half ? 0 : 1), isa, "what float16 cannot hold is the caller's", half);
    check(!half || (keys == keys_before && values == values_before), isa, "nothing is written", half);
  }
}

// Of a positive finite half.
float half_value(int bits) {
  int exponent = bits >> 10, fraction = bits & 0x3FF;
  return exponent == 0 ? std::ldexp(float(fraction), -24)
                       : std::ldexp(float(1024 + fraction), exponent - 25);
}

// Latents against attention over the keys and values that they stand for.
void latent_attention(const char* isa, int64_t tokens, bool half) {
  constexpr int64_t heads = 3, rank = 40, plain = 24, rotary = 8, width = plain + rotary, value = 20;
  auto numbers = [&](int64_t count) {
    std::vector<uint8_t> bytes(static_cast<size_t>(count * (half ? 2 : 4)));
    for (uint8_t& b : bytes) b = static_cast<uint8_t>(generator() % 0x3C);
    auto floats = random_floats(count);
    if (!half) std::memcpy(bytes.data(), floats.data(), bytes.size());
    return bytes;
  };
  auto latents = numbers(tokens * rank), turned = numbers(tokens * rotary);
  auto key_weights = numbers(heads * rank * plain), value_weights = numbers(heads * rank * value);
  auto query = random_floats(heads * width);
  moepack_kv kv{latents.data(), turned.data(), 1, rank, rotary, tokens, tokens - 1, half};
  // The rotary part first, which is as well.
  moepack_latent by{&kv,    key_weights.data(), value_weights.data(), width, rotary,
                    plain, 0,                  value,                half};
  std::vector<float> out(static_cast<size_t>(heads * value));
  moepack_step step{};
  step.op = MOEPACK_ATTEND_LATENT, step.extra = &by;
  step.data[0] = out.data(), step.data[1] = query.data();
  step.stride[0][0] = value, step.stride[1][0] = width, step.stride[1][1] = 1;
  step.number[0] = heads, step.scalar[0] = 0.1;
  tape_step(isa, "attention over latents", step, out, 1e-5);

  auto floats = [&](const std::vector<uint8_t>& bytes) {
    size_t each = half ? 2 : 4;
    std::vector<float> all(bytes.size() / each);
    for (size_t i = 0; i < all.size(); ++i) {
      uint16_t h;
      std::memcpy(half ? static_cast<void*>(&h) : &all[i], bytes.data() + i * each, each);
      if (half) all[i] = half_value(h);
    }
    return all;
  };
  auto l = floats(latents), r = floats(turned), a = floats(key_weights), c = floats(value_weights);
  std::vector<float> wanted;
  for (int64_t h = 0; h < heads; ++h) {
    std::vector<double> weights;
    double all = 0;
    for (int64_t t = 0; t < tokens; ++t) {
      double score = 0;
      for (int64_t i = 0; i < rotary; ++i) score += query[h * width + i] * r[t * rotary + i];
      for (int64_t i = 0; i < plain; ++i)
        for (int64_t j = 0; j < rank; ++j)
          score += double{query[h * width + rotary + i]} * a[(h * rank + j) * plain + i] *
                   l[t * rank + j];
      weights.push_back(std::exp(0.1 * score)), all += weights.back();
    }
    for (int64_t v = 0; v < value; ++v) {
      double sum = 0;
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t j = 0; j < rank; ++j)
          sum += weights[t] / all * c[(h * rank + j) * value + v] * l[t * rank + j];
      wanted.push_back(static_cast<float>(sum));
    }
  }
  auto got = with_isa(isa, [&] { return play(&step, 0, 1, MOEPACK_FLOAT, 2), out; });
  check(close(got, wanted, 1e-4), isa, "attention over latents, by definition", half);
}

// Against the definition: the nearest of all halves, the even one of two as near.
void halves(const char* isa) {
  std::vector<float> all(0x7C00);
  for (int bits = 0; bits < 0x7C00; ++bits) all[static_cast<size_t>(bits)] = half_value(bits);
  std::vector<float> from;
  std::vector<uint16_t> wanted;
  for (size_t i = 0; i + 1 < all.size(); ++i) {
    float middle = (all[i] + all[i + 1]) / 2;
    auto below = static_cast<uint16_t>(i), above = static_cast<uint16_t>(i + 1);
    from.insert(from.end(), {all[i], std::nextafter(middle, 0.0f), middle, std::nextafter(middle, 1e9f)});
    wanted.insert(wanted.end(), {below, below, i % 2 ? above : below, above});
  }
  from.push_back(65519.9f), wanted.push_back(0x7BFF);
  size_t positive = from.size();
  for (size_t i = 0; i < positive; ++i)
    from.push_back(-from[i]), wanted.push_back(wanted[i] | 0x8000);
  int64_t width = static_cast<int64_t>(from.size());
  std::vector<uint16_t> keys(from.size()), values(1);
  moepack_kv kv{keys.data(), values.data(), 1, width, 1, 1, 0, 1};
  moepack_step append{};
  append.op = MOEPACK_APPEND, append.extra = &kv;
  append.data[1] = append.data[2] = from.data(), append.stride[1][1] = append.stride[2][1] = 1;
  moepack_set_isa(isa);
  check(play(&append, 0, 1, MOEPACK_FLOAT, 1) == 1, isa, "append of halves", 0);
  check(keys == wanted, isa, "halves are the nearest", 0);
}

// Three loops outside the last one, operands that lie apart or stay where they are.
void loops(const char* isa) {
  constexpr int64_t sizes[] = {2, 3, 2, 7};
  auto a = random_floats(3 * 14), b = random_floats(2 * 3 * 2);
  std::vector<float> out(2 * 3 * 2 * 7 * 2);
  moepack_step step = row_step(MOEPACK_BINARY, 2, 7, out.data(), a.data(), b.data());
  std::copy(sizes, sizes + 4, step.size);
  const int64_t strides[3][4] = {{84, 28, 14, 2}, {0, 14, 7, 1}, {6, 2, 1, 0}};
  for (int operand = 0; operand < 3; ++operand)
    std::copy(strides[operand], strides[operand] + 4, step.stride[operand]);
  tape_step(isa, "loops", step, out, 1e-7);
  // Columns of a: the last loop is not a row.
  std::vector<float> totals(14);
  moepack_step reduce = row_step(MOEPACK_REDUCE, 0, 3, totals.data(), a.data(), nullptr);
  reduce.size[2] = 14, reduce.stride[0][2] = reduce.stride[1][2] = 1, reduce.stride[1][3] = 14;
  tape_step(isa, "reduction of columns", reduce, totals, 1e-6);
  std::vector<float> shares(3 * 14);
  moepack_step soft = row_step(MOEPACK_SOFTMAX, 0, 3, shares.data(), a.data(), nullptr);
  soft.size[2] = 14;
  for (int operand : {0, 1}) soft.stride[operand][2] = 1, soft.stride[operand][3] = 14;
  tape_step(isa, "softmax of columns", soft, shares, 1e-6);
}

void topk(const char* isa) {
  std::vector<float> a = {1, 5, -2, 5, 0, std::nanf(""), 3};
  std::vector<float> values(3);
  std::vector<int64_t> indices(3);
  moepack_step step = row_step(MOEPACK_TOPK, 0, 7, values.data(), a.data(), nullptr);
  step.data[3] = indices.data(), step.stride[3][3] = 1, step.number[0] = 3;
  moepack_set_isa(isa);
  check(play(&step, 0, 1, MOEPACK_FLOAT, 1) == 1, isa, "topk", 0);
  check(indices == std::vector<int64_t>{5, 1, 3}, isa, "the largest, the first of equal ones", 0);
  check(std::isnan(values[0]) && values[1] == 5 && values[2] == 5, isa, "their values", 0);
}

// The last row of a matrix as an embedding, and all of it times one token.
void matrices(const char* isa, int32_t scheme) {
  constexpr int64_t count = 19, cols = 70;
  auto packed = random_packed(scheme, count, cols);
  auto x = random_floats(cols), bias = random_floats(count);
  int64_t id = count - 1;
  std::vector<float> row(cols), y(count);
  moepack_step embed{}, product{};
  embed.op = MOEPACK_EMBED, product.op = MOEPACK_PACKED;
  embed.data[0] = row.data(), embed.data[1] = &id, embed.data[2] = packed.data();
  product.data[0] = y.data(), product.data[1] = x.data(), product.data[2] = packed.data();
  product.data[3] = bias.data();
  const int64_t numbers[] = {scheme, static_cast<int64_t>(packed.size()), count, cols};
  for (moepack_step* step : {&embed, &product}) std::copy(numbers, numbers + 4, step->number);
  tape_step(isa, "embedding", embed, row, 0);
  tape_step(isa, "packed", product, y, 3e-6);
  auto plain = random_floats(count * cols);
  embed.number[0] = -1, embed.data[2] = plain.data();
  tape_step(isa, "embedding of floats", embed, row, 0);
  check(std::equal(row.begin(), row.end(), plain.end() - cols), isa, "its last row", 0);
  product.number[1] -= 1;
  check(play(&product, 0, 1, MOEPACK_FLOAT, 1) == 0, isa, "a short matrix", scheme);
}

// A layer's experts, one place of three beyond them; the tape stops at a record that is not at hand.
void experts(const char* isa, int32_t scheme) {
  constexpr int64_t hidden = 40, intermediate = 24, count = 3;
  moepack_layout layout{scheme, scheme, 0, -1, 0, -1, 0};
  std::vector<std::vector<uint8_t>> data;
  for (int e = 0; e < count; ++e) {
    std::vector<uint8_t> record = random_packed(scheme, 2 * 32, hidden);
    layout.down = static_cast<int64_t>(record.size());
    auto down = random_packed(scheme, hidden, intermediate);
    record.insert(record.end(), down.begin(), down.end());
    record.shrink_to_fit();
    layout.nbytes = static_cast<int64_t>(record.size());
    data.push_back(record);
  }
  std::vector<const uint8_t*> records;
  for (auto& d : data) records.push_back(d.data());
  std::vector<const moepack_layout*> layouts(count, &layout);
  moepack_experts_layer layer{records.data(), layouts.data(), count,
                              3,              hidden,         intermediate,
                              {MOEPACK_SILU, 1.0f, INFINITY, 0.0f}, 1, 0};
  std::vector<int64_t> chosen = {2, count, 0};
  auto x = random_floats(hidden), weights = random_floats(3);
  for (float& v : x) v *= 1e-2f;
  std::vector<float> y(hidden);
  moepack_step steps[2] = {};
  steps[0].op = MOEPACK_EXPERTS, steps[0].extra = &layer;
  steps[0].data[0] = y.data(), steps[0].data[1] = x.data();
  steps[0].data[2] = chosen.data(), steps[0].data[3] = weights.data();
  steps[0].stride[2][0] = steps[0].stride[3][0] = 1;
  steps[1].op = MOEPACK_PYTHON;
  tape_step(isa, "experts of a layer", steps[0], y, 1e-5);
  check(layer.demanded == 4, isa, "experts that were computed with", scheme);
  check(play(steps, 0, 2, MOEPACK_INT8, 2) == 1, isa, "a step of the caller's", scheme);
  records[0] = nullptr;
  check(play(steps, 0, 2, MOEPACK_INT8, 2) == 0, isa, "a missing record", scheme);
  check(play(steps, 2, 1, MOEPACK_INT8, 2) == -1, isa, "steps out of order", scheme);
}

}  // namespace

void tape(const char* isa) {
  for (int64_t size : {1, 7, 16, 40, 333}) rows(isa, size);
  for (int64_t width : {5, 24, 32, 128})
    for (int64_t tokens : {1, 19})
      for (bool sinks : {false, true})
        for (bool half : {false, true}) attention(isa, width, tokens, sinks ? 6 : 0, sinks, half);
  for (int64_t tokens : {1, 37})
    for (bool half : {false, true}) latent_attention(isa, tokens, half);
  halves(isa);
  loops(isa);
  topk(isa);
  for (int32_t scheme = 0; scheme < moepack::kSchemes; ++scheme) {
    matrices(isa, scheme);
    experts(isa, scheme);
  }
}

}  // namespace parity
