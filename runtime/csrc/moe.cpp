// One token through the experts of one MoE layer.
//
// Letters: H hidden size, I intermediate size, E experts of this token.
#include <cstring>

#include "scratch.h"
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

// 64 values of an expert's intermediate, as inputs of down. The block is a multiple of an int8 step,
// so the thread that computed it also quantizes it: one wait less.
void intermediate_block(const Layer& layer, int64_t expert, int64_t block, const Row& x, Row& h) {
  const moepack_layout& at = *layer.layouts[expert];
  const uint8_t* bias = layer.bias(expert, at.first_bias);
  bool int8 = uses_int8(at.first_scheme, layer.mode);
  TileFn walk = kernels().tile[at.first_scheme][int8][0];
  int64_t nbytes = kFormats[at.first_scheme].tile_nbytes(layer.hidden);
  int64_t blocks = ceil_div(layer.hidden, kBlockCols), parts = layer.gated ? 2 : 1;
  int64_t count = layer.intermediate - block * kBlockCols;
  if (count > kBlockCols) count = kBlockCols;
  alignas(64) float values[kBlockCols], projected[2][kTileRows];
  for (int64_t i = 0; i * kTileRows < count; ++i) {
    int64_t tile = (block * (kBlockCols / kTileRows) + i) * parts;  // gate, up, gate, up, ...
    for (int64_t p = 0; p < parts; ++p) {
      walk(layer.records[expert] + at.first + (tile + p) * nbytes, blocks, &x, projected[p]);
      add_bias(projected[p], bias, tile + p);
    }
    kernels().activate(layer.activation, projected[0], layer.gated ? projected[1] : nullptr,
                       values + i * kTileRows);
  }
  if (uses_int8(at.down_scheme, layer.mode)) kernels().quantize_block(values, count, h, block);
  else kernels().copy_block(values, count, h, block);
}

void down_tile(const Layer& layer, int64_t expert, int64_t tile, const Row& h, float* out) {
  const moepack_layout& at = *layer.layouts[expert];
  TileFn walk = kernels().tile[at.down_scheme][uses_int8(at.down_scheme, layer.mode)][0];
  int64_t nbytes = kFormats[at.down_scheme].tile_nbytes(layer.intermediate);
  walk(layer.records[expert] + at.down + tile * nbytes, ceil_div(layer.intermediate, kBlockCols),
       &h, out);
  add_bias(out, layer.bias(expert, at.down_bias), tile);
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
  scratch.reset(row_nbytes(hidden) + count * row_nbytes(intermediate) +
                Scratch::rounded(count * static_cast<int64_t>(sizeof(Row))));
  Row* h = scratch.take<Row>(count);  // [E] of [I]
  Row input = take_row(scratch, hidden);
  fill_row(x, hidden, int8, floats, input);
  for (int64_t e = 0; e < count; ++e) h[e] = take_row(scratch, intermediate);

  int64_t blocks = ceil_div(intermediate, kBlockCols), units = count * blocks, nbytes = 0;
  for (int64_t e = 0; e < count; ++e) nbytes += layouts[e]->down - layouts[e]->first;
  int64_t each = count == 0 ? 1 : chunk_pieces(ceil_div(nbytes, units), units, threads);
  for_chunks(threads, ceil_div(units, each), [&](int64_t chunk) {
    int64_t end = (chunk + 1) * each < units ? (chunk + 1) * each : units;
    for (int64_t u = chunk * each; u < end; ++u)
      intermediate_block(layer, u / blocks, u % blocks, input, h[u / blocks]);
  });
  // Every output is summed by one thread in the order of the experts: the same bits for any number
  // of threads. Experts are outermost, so that a chunk reads each one's bytes front to back.
  int64_t tiles = ceil_div(hidden, kTileRows), tile_nbytes = 0;
  for (int64_t e = 0; e < count; ++e)
    tile_nbytes += kFormats[layouts[e]->down_scheme].tile_nbytes(intermediate);
  each = count == 0 ? tiles : chunk_pieces(tile_nbytes, tiles, threads);
  for_chunks(threads, ceil_div(tiles, each), [&](int64_t chunk) {
    int64_t begin = chunk * each, end = begin + each < tiles ? begin + each : tiles;
    int64_t last = end * kTileRows < hidden ? end * kTileRows : hidden;
    if (!outputs)
      for (int64_t r = begin * kTileRows; r < last; ++r) y[r] = 0.0f;
    for (int64_t e = 0; e < count; ++e)
      for (int64_t t = begin; t < end; ++t) {
        alignas(64) float out[kTileRows];
        down_tile(layer, e, t, h[e], out);
        int64_t rows = hidden - t * kTileRows < kTileRows ? hidden - t * kTileRows : kTileRows;
        float* to = (outputs ? outputs + e * hidden : y) + t * kTileRows;
        for (int64_t r = 0; r < rows; ++r) {
          float weighted = weights[e] * out[r];
          to[r] = outputs ? weighted : to[r] + weighted;
        }
      }
  });
  return MOEPACK_OK;
}

int32_t moepack_sum_rows(const float* rows, int64_t count, int64_t width, float* y) {
  if (!rows || !y || count < 0 || width < 0) return MOEPACK_BAD_ARGUMENT;
  for (int64_t i = 0; i < width; ++i) y[i] = 0.0f;
  for (int64_t k = 0; k < count; ++k)
    for (int64_t i = 0; i < width; ++i) y[i] += rows[k * width + i];
  return MOEPACK_OK;
}
