/* The C interface of moepack's native kernels.
 *
 * Packed bytes follow formats/SPEC.md and may start at any address. Float buffers are float32 at
 * multiples of 4 bytes. Every function returns MOEPACK_OK or the reason why it did nothing. */
#ifndef MOEPACK_H
#define MOEPACK_H
#include <stdint.h>

#define MOEPACK_ABI 1
#define MOEPACK_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

enum { MOEPACK_OK = 0, MOEPACK_BAD_ARGUMENT = 1, MOEPACK_SHORT_BUFFER = 2, MOEPACK_UNSUPPORTED = 3 };
enum { MOEPACK_FLOAT = 0, MOEPACK_INT8 = 1 };        /* activations; raw schemes always use float */
enum { MOEPACK_TO_F32 = 0, MOEPACK_TO_BF16 = 1 };
enum { MOEPACK_SILU, MOEPACK_GELU, MOEPACK_GELU_TANH, MOEPACK_RELU, MOEPACK_RELU2 };

/* h = f(min(gate, limit)) * (clamp(up, -limit, limit) + up_offset), or f(gate) without a gate.
 * MOEPACK_SILU is z * sigmoid(alpha * z). */
typedef struct {
  int32_t kind;
  float alpha, limit, up_offset;
} moepack_activation;

/* Where one expert's sub-tensors are in its record; biases are -1 where there are none. */
typedef struct {
  int32_t first_scheme, down_scheme; /* first: gate_up, or up without a gate */
  int64_t first, first_bias, down, down_bias;
  int64_t nbytes;
} moepack_layout;

MOEPACK_API int32_t moepack_abi(void);
MOEPACK_API const char* moepack_isa(void);
/* "portable", "avx2", "avx512" or "neon"; not to be called while another call runs. */
MOEPACK_API int32_t moepack_set_isa(const char* name);
MOEPACK_API int64_t moepack_packed_nbytes(int32_t scheme, int64_t rows, int64_t cols);

/* y[T, rows] = x[T, cols] W^T + bias; bias may be NULL. */
MOEPACK_API int32_t moepack_linear(int32_t scheme, const uint8_t* packed, int64_t nbytes,
                                   int64_t rows, int64_t cols, const float* x, int64_t tokens,
                                   const float* bias, float* y, int32_t mode, int32_t threads);

/* Dense values of some tiles: out[count * 16, cols] as float32 or bfloat16.
 * tiles: their indices, or NULL for 0, 1, ...; nbytes: of the packed matrix. */
MOEPACK_API int32_t moepack_decode(int32_t scheme, const uint8_t* packed, int64_t nbytes,
                                   int64_t cols, const int64_t* tiles, int64_t count,
                                   int64_t rows_out, int32_t to, void* out, int32_t threads);

/* One token through its experts: y[H] = sum over e of weights[e] * expert_e(x), summed in the order
 * given, whatever the number of threads. With `outputs` [count, H] the weighted outputs are left
 * there and y is not touched; moepack_sum_rows then gives the same bits. */
MOEPACK_API int32_t moepack_experts(const uint8_t* const* records,
                                    const moepack_layout* const* layouts, const float* weights,
                                    int64_t count, int64_t hidden, int64_t intermediate,
                                    const moepack_activation* activation, int32_t gated,
                                    const float* x, float* y, float* outputs, int32_t mode,
                                    int32_t threads);
MOEPACK_API int32_t moepack_sum_rows(const float* rows, int64_t count, int64_t width, float* y);

/* Read every byte once and return their sum as 64-bit words: the speed of memory, to compare with. */
MOEPACK_API uint64_t moepack_read(const uint8_t* data, int64_t nbytes, int32_t threads);

#ifdef __cplusplus
}
#endif
#endif
