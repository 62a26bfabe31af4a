// Tokens through the experts of one MoE layer: one token through all of its experts, or many tokens,
// each through its own.
//
// Letters: H hidden size, I intermediate size, E experts of this token.
#include <algorithm>
#include <cstring>
#include <vector>

#include "inputs.h"
#include "threads.h"

namespace {

using namespace moepack;

struct Layer {
  const uint8_t* const* records;
  const moepack_layout* const* layouts;
  int64_t hidden, intermediate;
  const moepack_activation& activation;
  bool gated;
  int32_t mode;

  // Biases are float32 at any address.
  const uint8_t* bias(int64_t expert, int64_t offset) const {
    return offset < 0 ? nullptr : records[expert] + offset;
  }
};

void add_bias(float* values, const uint8_t* bias, int64_t tile) {
  if (bias == nullptr) return;
  float b[kTileRows];
  std::memcpy(b, bias + tile * sizeof b, sizeof b);
  for (int r = 0; r < kTileRows; ++r) values[r] += b[r];
}

// What one chunk of work needs besides its inputs.
struct Room {
  float* values;     // [tokens, 64]: the intermediate
  float *gate, *up;  // [tokens, 16]
  uint8_t* buffer;   // see Inputs
  static int64_t nbytes(int64_t tokens, int64_t buffer) {
    return Scratch::rounded(tokens * kBlockCols * 4) +
           2 * Scratch::rounded(tokens * kTileRows * 4) + buffer;
  }
};

Room take_room(int64_t tokens, int64_t buffer) {
  static thread_local Scratch scratch;
  scratch.reset(Room::nbytes(tokens, buffer));
  Room room;
  room.values = scratch.take<float>(tokens * kBlockCols);
  room.gate = scratch.take<float>(tokens * kTileRows);
  room.up = scratch.take<float>(tokens * kTileRows);
  room.buffer = scratch.take<uint8_t>(buffer);
  return room;
}

// 64 values of an expert's intermediate for some tokens, as inputs of down. The block is a multiple
// of an int8 step, so the thread that computed it also quantizes it: one wait less.
void intermediate_block(const Layer& layer, int64_t expert, int64_t block, const Inputs& x,
                        const Inputs& h, int64_t tokens) {
  const moepack_layout& at = *layer.layouts[expert];
  const uint8_t* bias = layer.bias(expert, at.first_bias);
  bool int8 = uses_int8(at.first_scheme, layer.mode);
  int64_t blocks = ceil_div(layer.hidden, kBlockCols);
  Room room = take_room(tokens, x.buffer_nbytes(at.first_scheme, int8, blocks, tokens));
  int64_t nbytes = kFormats[at.first_scheme].tile_nbytes(layer.hidden);
  int64_t count = std::min<int64_t>(layer.intermediate - block * kBlockCols, kBlockCols);
  for (int64_t i = 0; i * kTileRows < count; ++i) {
    // gate, up, gate, up, ...
    int64_t tile = (block * (kBlockCols / kTileRows) + i) * (layer.gated ? 2 : 1);
    for (int64_t part = 0; part < (layer.gated ? 2 : 1); ++part)
      x.walk(at.first_scheme, int8, layer.records[expert] + at.first + (tile + part) * nbytes, blocks,
             0, tokens, room.buffer, part == 0 ? room.gate : room.up, kTileRows);
    for (int64_t t = 0; t < tokens; ++t) {
      float *gate = room.gate + t * kTileRows, *up = room.up + t * kTileRows;
      add_bias(gate, bias, tile);
      if (layer.gated) add_bias(up, bias, tile + 1);
      kernels().activate(layer.activation, gate, layer.gated ? up : nullptr,
                         room.values + t * kBlockCols + i * kTileRows);
    }
  }
  for (int64_t t = 0; t < tokens; ++t) h.fill_block(t, block, room.values + t * kBlockCols, count);
}

// 16 outputs of an expert for some tokens, [tokens, 16].
float* down_tile(const Layer& layer, int64_t expert, int64_t tile, const Inputs& h, int64_t tokens) {
  const moepack_layout& at = *layer.layouts[expert];
  bool int8 = uses_int8(at.down_scheme, layer.mode);
  int64_t blocks = ceil_div(layer.intermediate, kBlockCols);
  Room room = take_room(tokens, h.buffer_nbytes(at.down_scheme, int8, blocks, tokens));
  int64_t nbytes = kFormats[at.down_scheme].tile_nbytes(layer.intermediate);
  h.walk(at.down_scheme, int8, layer.records[expert] + at.down + tile * nbytes, blocks, 0, tokens,
         room.buffer, room.up, kTileRows);
  for (int64_t t = 0; t < tokens; ++t)
    add_bias(room.up + t * kTileRows, layer.bias(expert, at.down_bias), tile);
  return room.up;
}

int32_t check(const Layer& layer, int64_t experts) {
  for (int64_t e = 0; e < experts; ++e) {
    const moepack_layout& at = *layer.layouts[e];
    if (layer.records[e] == nullptr || at.first_scheme < 0 || at.first_scheme >= kSchemes ||
        at.down_scheme < 0 || at.down_scheme >= kSchemes || at.first < 0 || at.down <= at.first)
      return MOEPACK_BAD_ARGUMENT;
    int64_t parts = layer.gated ? 2 : 1;
    int64_t vector = ceil_div(layer.intermediate, kTileRows) * kTileRows * 4 * parts;
    int64_t first = parts * moepack_packed_nbytes(at.first_scheme, layer.intermediate, layer.hidden);
    int64_t down = moepack_packed_nbytes(at.down_scheme, layer.hidden, layer.intermediate);
    int64_t down_vector = ceil_div(layer.hidden, kTileRows) * kTileRows * 4;
    if (at.first + first > at.nbytes || at.down + down > at.nbytes ||
        (at.first_bias >= 0 && at.first_bias + vector > at.nbytes) ||
        (at.down_bias >= 0 && at.down_bias + down_vector > at.nbytes))
      return MOEPACK_SHORT_BUFFER;
  }
  return MOEPACK_OK;
}

// Which tokens go through which expert: those of expert e are at starts[e], ..., starts[e + 1] - 1.
struct Rows {
  const int64_t *starts, *tokens, *places;
  const float *weights, *x;
  float* outputs;

  int64_t of(int64_t expert) const { return starts[expert + 1] - starts[expert]; }
};

// What experts may take for inputs that go through their layer together: each time, threads wait for
// one another three times.
constexpr int64_t kTogetherNbytes = 16 << 20;

int64_t token_inputs_nbytes(const Layer& layer, int64_t expert, int64_t tokens) {
  const moepack_layout& at = *layer.layouts[expert];
  bool int8 = uses_int8(at.first_scheme, layer.mode), down = uses_int8(at.down_scheme, layer.mode);
  return Inputs::nbytes(at.first_scheme, int8, !int8, tokens, layer.hidden) +
         Inputs::nbytes(at.down_scheme, down, !down, tokens, layer.intermediate);
}

// The tokens of experts begin, ..., end - 1. `nbytes`: of all their inputs.
void tokens_through(const Layer& layer, const Rows& rows, int64_t begin, int64_t end, int64_t nbytes,
                    int32_t threads) {
  static thread_local Scratch scratch;
  static thread_local std::vector<Inputs> into, between;  // what the experts, and what their downs read
  scratch.reset(nbytes);
  into.clear(), between.clear();
  for (int64_t e = begin; e < end; ++e) {
    const moepack_layout& at = *layer.layouts[e];
    bool int8 = uses_int8(at.first_scheme, layer.mode), down = uses_int8(at.down_scheme, layer.mode);
    into.emplace_back(scratch, at.first_scheme, int8, !int8, rows.of(e), layer.hidden);
    between.emplace_back(scratch, at.down_scheme, down, !down, rows.of(e), layer.intermediate);
  }
  // From begin on. A thread_local is another one on the other threads.
  const Inputs *xs = into.data(), *hs = between.data();
  constexpr int64_t together = 8, ranges = 16;  // ranges: of a thread
  int64_t first = rows.starts[begin], last = rows.starts[end];
  for_chunks(threads, ceil_div(last - first, together), [&](int64_t chunk) {
    int64_t from = first + chunk * together, to = std::min(last, from + together);
    int64_t e = std::upper_bound(rows.starts + begin, rows.starts + end, from) - rows.starts - 1;
    for (int64_t i = from; i < to; ++i) {
      while (i >= rows.starts[e + 1]) ++e;
      xs[e - begin].fill(i - rows.starts[e], rows.x + rows.tokens[i] * layer.hidden, layer.hidden);
    }
  });
  // Threads begin at different experts, and each goes through an expert's inputs while its second cache
  // has them.
  int64_t blocks = ceil_div(layer.intermediate, kBlockCols), units = (end - begin) * blocks;
  for_ranges(threads, units, ceil_div(units, ranges * threads), [&](int64_t u, int64_t to) {
    for (; u < to; ++u) {
      int64_t i = u / blocks, tokens = rows.of(begin + i);
      if (tokens > 0) intermediate_block(layer, begin + i, u % blocks, xs[i], hs[i], tokens);
    }
  });
  int64_t tiles = ceil_div(layer.hidden, kTileRows);
  units = (end - begin) * tiles;
  for_ranges(threads, units, ceil_div(units, ranges * threads), [&](int64_t u, int64_t to) {
    for (; u < to; ++u) {
      int64_t e = begin + u / tiles, t = u % tiles;
      if (rows.of(e) == 0) continue;
      const float* out = down_tile(layer, e, t, hs[e - begin], rows.of(e));
      int64_t width = std::min<int64_t>(layer.hidden - t * kTileRows, kTileRows);
      for (int64_t i = rows.starts[e]; i < rows.starts[e + 1]; ++i, out += kTileRows) {
        float* to_row = rows.outputs + rows.places[i] * layer.hidden + t * kTileRows;
        for (int64_t r = 0; r < width; ++r) to_row[r] = rows.weights[i] * out[r];
      }
    }
  });
}

}  // namespace

int32_t moepack_experts(const uint8_t* const* records, const moepack_layout* const* layouts,
                        const float* weights, int64_t count, int64_t hidden, int64_t intermediate,
                        const moepack_activation* activation, int32_t gated, const float* x,
                        float* y, float* outputs, int32_t mode, int32_t threads) {
  if (!records || !layouts || !weights || !activation || !x || (!y && !outputs) || count < 0 ||
      hidden < 1 || intermediate < 1 || threads < 1 || activation->kind < MOEPACK_SILU ||
      activation->kind > MOEPACK_RELU2)
    return MOEPACK_BAD_ARGUMENT;
  Layer layer{records, layouts, hidden, intermediate, *activation, gated != 0, mode};
  if (int32_t refusal = check(layer, count)) return refusal;

  bool int8 = false, floats = false;
  for (int64_t e = 0; e < count; ++e)
    (uses_int8(layouts[e]->first_scheme, mode) ? int8 : floats) = true;
  static thread_local Scratch scratch;
  static thread_local std::vector<Inputs> h;  // [E] of [I]
  int64_t nbytes = Inputs::nbytes(0, int8, floats, 1, hidden);
  auto down_int8 = [&](int64_t e) { return uses_int8(layouts[e]->down_scheme, mode); };
  for (int64_t e = 0; e < count; ++e)
    nbytes += Inputs::nbytes(layouts[e]->down_scheme, down_int8(e), !down_int8(e), 1, intermediate);
  scratch.reset(nbytes + Scratch::rounded(count * hidden * 4));
  float* scratch_outputs = scratch.take<float>(outputs ? 0 : count * hidden);
  Inputs input(scratch, 0, int8, floats, 1, hidden);
  input.fill(0, x, hidden);
  h.clear();
  for (int64_t e = 0; e < count; ++e)
    h.emplace_back(scratch, layouts[e]->down_scheme, down_int8(e), !down_int8(e), 1, intermediate);

  const Inputs* hs = h.data();  // a thread_local is another one on the other threads
  int64_t blocks = ceil_div(intermediate, kBlockCols), units = count * blocks;
  nbytes = 0;
  for (int64_t e = 0; e < count; ++e) nbytes += layouts[e]->down - layouts[e]->first;
  int64_t most = count == 0 ? 1 : range_pieces(ceil_div(nbytes, units), units, threads);
  for_ranges(threads, units, most, [&](int64_t begin, int64_t end) {
    for (int64_t u = begin; u < end; ++u) {
      int64_t e = u / blocks;
      if (u + 1 < units && (u + 1) / blocks != e) prefetch_start(records[e + 1] + layouts[e + 1]->first);
      intermediate_block(layer, e, u % blocks, input, hs[e], 1);
    }
  });
  // A range is one expert's bytes in a row; what experts give is summed afterwards in their order, the
  // same bits for any number of threads.
  float* to = outputs ? outputs : scratch_outputs;
  int64_t tiles = ceil_div(hidden, kTileRows), tile_nbytes = 0;
  units = count * tiles;
  for (int64_t e = 0; e < count; ++e)
    tile_nbytes += kFormats[layouts[e]->down_scheme].tile_nbytes(intermediate);
  most = count == 0 ? 1 : range_pieces(tile_nbytes / count, units, threads);
  for_ranges(threads, units, most, [&](int64_t begin, int64_t end) {
    for (int64_t u = begin; u < end; ++u) {
      int64_t e = u / tiles, t = u % tiles;
      if (t + 1 == tiles && e + 1 < count) prefetch_start(records[e + 1] + layouts[e + 1]->down);
      const float* out = down_tile(layer, e, t, hs[e], 1);
      int64_t rows = std::min<int64_t>(hidden - t * kTileRows, kTileRows);
      for (int64_t r = 0; r < rows; ++r) to[e * hidden + t * kTileRows + r] = weights[e] * out[r];
    }
  });
  return outputs ? MOEPACK_OK : moepack_sum_rows(to, 1, count, hidden, y, 1);
}

int32_t moepack_sum_rows(const float* rows, int64_t tokens, int64_t count, int64_t width, float* y,
                         int32_t threads) {
  if (!rows || !y || tokens < 0 || count < 0 || width < 0 || threads < 1)
    return MOEPACK_BAD_ARGUMENT;
  for_chunks(threads, tokens, [&](int64_t t) {
    float* out = y + t * width;
    for (int64_t i = 0; i < width; ++i) out[i] = 0.0f;
    for (int64_t k = 0; k < count; ++k)
      kernels().add_scaled(rows + (t * count + k) * width, 1.0f, out, width);
  });
  return MOEPACK_OK;
}

int32_t moepack_experts_tokens(const uint8_t* const* records, const moepack_layout* const* layouts,
                               const int64_t* starts, int64_t count, int64_t hidden,
                               int64_t intermediate, const moepack_activation* activation,
                               int32_t gated, const float* x, const int64_t* tokens,
                               const int64_t* places, const float* weights, float* outputs,
                               int32_t mode, int32_t threads) {
  if (!records || !layouts || !starts || !activation || !x || !tokens || !places || !weights ||
      !outputs || count < 0 || hidden < 1 || intermediate < 1 || threads < 1 || starts[0] != 0 ||
      activation->kind < MOEPACK_SILU || activation->kind > MOEPACK_RELU2)
    return MOEPACK_BAD_ARGUMENT;
  for (int64_t e = 0; e < count; ++e)
    if (starts[e] > starts[e + 1]) return MOEPACK_BAD_ARGUMENT;
  Layer layer{records, layouts, hidden, intermediate, *activation, gated != 0, mode};
  if (int32_t refusal = check(layer, count)) return refusal;
  Rows rows{starts, tokens, places, weights, x, outputs};
  for (int64_t begin = 0; begin < count;) {
    int64_t end = begin, nbytes = 0;
    do nbytes += token_inputs_nbytes(layer, end, rows.of(end)), ++end;
    while (end < count &&
           nbytes + token_inputs_nbytes(layer, end, rows.of(end)) <= kTogetherNbytes);
    tokens_through(layer, rows, begin, end, nbytes, threads);
    begin = end;
  }
  return MOEPACK_OK;
}
