/* The C interface of moepack's native kernels.
 *
 * Packed bytes follow formats/SPEC.md and may start at any address. Float buffers are float32 at
 * multiples of 4 bytes. Every function returns MOEPACK_OK or the reason why it did nothing. */
#ifndef MOEPACK_H
#define MOEPACK_H
#include <stdint.h>

#define MOEPACK_ABI 12
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
/* "portable", "avx2", "avx512", "avx512_vbmi" or "neon"; not to be called while another call runs. */
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
/* Many tokens through some experts: outputs[places[i]] = weights[i] * expert_e(x[tokens[i]]), rows of H,
 * for i from starts[e] on and below starts[e + 1]; starts[0] is 0. Rows of x and of outputs that are not
 * named are not touched. */
MOEPACK_API int32_t moepack_experts_tokens(const uint8_t* const* records,
                                           const moepack_layout* const* layouts,
                                           const int64_t* starts, int64_t count, int64_t hidden,
                                           int64_t intermediate,
                                           const moepack_activation* activation, int32_t gated,
                                           const float* x, const int64_t* tokens,
                                           const int64_t* places, const float* weights,
                                           float* outputs, int32_t mode, int32_t threads);
/* y[t] = sum over k of rows[t * count + k], in that order. */
MOEPACK_API int32_t moepack_sum_rows(const float* rows, int64_t tokens, int64_t count,
                                     int64_t width, float* y, int32_t threads);

/* A tape: the steps of one token through a model, recorded once and run for every token after. What
 * a step reads and writes are fixed addresses. Strides are in elements; a loop that an operand does
 * not take part in has stride 0. */
enum {
  MOEPACK_PYTHON,    /* the caller does this step */
  MOEPACK_UNARY,     /* out = f(a): size[4] loops; kind: see glue.h; number[3]: see moepack_tape_run */
  MOEPACK_BINARY,    /* out = f(a, b); b is scalar[0] where data[2] is NULL */
  MOEPACK_REDUCE,    /* over the last loop, out's stride of it unused; kind 0 sum, 1 mean, 2 max */
  MOEPACK_SOFTMAX,   /* along the last loop */
  MOEPACK_TOPK,      /* along the last loop: out values, data[3] indices int64, number[0] of them */
  MOEPACK_DENSE,     /* out[M,N] = a[M,K] b[N,K]^T + c[N]; number M, N, K; stride[.][0] of rows */
  MOEPACK_PACKED,    /* out = packed linear of a; number scheme, nbytes, rows, cols; c the bias */
  MOEPACK_EMBED,     /* out = row *a (int64) of a matrix b; number scheme, nbytes, rows, cols */
  MOEPACK_APPEND,    /* key a and value b to the cache `extra`, at its end; see moepack_tape_run */
  MOEPACK_ATTEND,    /* out[heads, width] from queries a[heads, width]; number heads, scalar scale */
  MOEPACK_EXPERTS,   /* out[H] = experts of a[H], indices b int64 [K], weights c[K]; extra: see below */
  MOEPACK_ATTEND_LATENT, /* the same over latents; extra: moepack_latent */
  MOEPACK_CONTRACT,  /* out = c + a times b summed over the last loop; without c where it is NULL */
  MOEPACK_GATHER,    /* out = a at the indices b (int64) along the last loop; number: how many a has */
  MOEPACK_STEPS
};

typedef struct {
  int32_t op, kind;
  int64_t size[4];
  int64_t stride[4][4]; /* of out, a, b, c */
  void* data[4];        /* out, a, b, c */
  double scalar[2];
  int64_t number[4];
  void* extra;
} moepack_step;

/* Keys and values of one layer: [heads, capacity, width], float32 or, with `half`, float16. The token
 * being computed goes to `end`. */
typedef struct {
  void *keys, *values;
  int64_t heads, key_width, value_width, capacity, end;
  int32_t half;
} moepack_kv;

/* Attention whose cache holds one latent (as `keys` of one head) and one rotary key (as `values`) a
 * token. A key of `width` has at plain_at key_weights[head] ^T latent and at rotary_at the rotary
 * key; a value is value_weights[head] ^T latent. Weights are [heads, latent, plain] and [heads,
 * latent, value_width], float32 or, with `half`, float16. */
typedef struct {
  const moepack_kv* kv;
  const void *key_weights, *value_weights;
  int64_t width, plain_at, plain, rotary_at, value_width;
  int32_t half;
} moepack_latent;

/* The experts of one layer. A record that is NULL is not at hand: its step is the caller's. */
typedef struct {
  const uint8_t* const* records;
  const moepack_layout* const* layouts;
  int64_t experts, chosen, hidden, intermediate;
  moepack_activation activation;
  int32_t gated;
  int64_t demanded; /* counts experts that were computed with here */
} moepack_experts_layer;

/* Runs steps[begin], ... and returns the index of the first that it did not do: `end`, a
 * MOEPACK_PYTHON step, a MOEPACK_EXPERTS step that lacks a record, or a MOEPACK_APPEND step with
 * numbers that float16 cannot hold, of which nothing is written; -1 for bad arguments. Where number[3]
 * of a UNARY, BINARY, REDUCE, SOFTMAX or CONTRACT step is above 1, so many steps from it on are done
 * for one turn of their first loops after another, which are of one size and divided into number[1]
 * parts; where bit o of such a step's number[2] is set, operand o has a place for each part. Where `seconds` is not NULL,
 * seconds[i] grows by what steps[i], or the run that begins with it, took. */
MOEPACK_API int64_t moepack_tape_run(const moepack_step* steps, int64_t begin, int64_t end,
                                     int32_t mode, int32_t threads, double* seconds);

/* What quantizers compute of every weight, on the calling thread. Groups of weights lie side by side:
 * [size, count], each a column. With a measure, shaped alike, sums count a weight as often as it says. */
typedef struct {
  const float *weights, *measure;
  int64_t size, count;
} moepack_groups;

/* A group's codes are the nearest of 0, 1, ..., top to weight * inverse + zero. [count] each. */
typedef struct {
  const float *inverse, *zero;
  float top;
} moepack_grid;

/* Ascending levels that codes stand for. */
enum { MOEPACK_MOST_LEVELS = 8, MOEPACK_MOST_GROUP = 128 };
typedef struct {
  int32_t count;
  float level[MOEPACK_MOST_LEVELS];
} moepack_levels;

/* Sums of each group's codes, of their squares, and of code times weight, [count] each; qq and qw may
 * be NULL together. */
MOEPACK_API int32_t moepack_code_sums(const moepack_groups* groups, const moepack_grid* grid, float* q,
                                      float* qq, float* qw);
/* Sums of the squared differences between the codes and what they are the nearest to. */
MOEPACK_API int32_t moepack_squared_steps(const moepack_groups* groups, const moepack_grid* grid,
                                          float* lost);
/* Sums of level times weight and of squared levels; levels are the nearest to weight * inverse. */
MOEPACK_API int32_t moepack_level_sums(const moepack_groups* groups, const moepack_levels* levels,
                                       const float* inverse, float* qw, float* qq);

/* Of each group's scale and minimum, stored as codes under outer factors, the best among the present
 * ones and some near them: the least sum of squared differences between weights and what the nearest of
 * 0, 1, ..., top stand for. [count] each. Of equals the first is taken. */
typedef struct {
  const float *scale, *outer_scale, *minimum, *outer_minimum; /* integers, and what they count */
  const float* mean;   /* of each group, if it has been taken from the weights; or NULL */
  const int8_t* moves; /* [moves_count, 2]: of the scale's code, of the minimum's */
  int64_t moves_count;
  float top, code_top; /* a scale's code is 1 to code_top, a minimum's 0 to code_top */
} moepack_neighbours;
MOEPACK_API int32_t moepack_best_neighbours(const moepack_groups* groups,
                                            const moepack_neighbours* neighbours, float* scale,
                                            float* minimum);

/* Likewise without minima: of each group's stored scale the best move, and the sums of level times
 * weight and of squared levels that it gives. */
typedef struct {
  const float *scale, *outer_scale;
  const int8_t* moves;
  int64_t moves_count;
  float lowest, highest;
} moepack_moves;
MOEPACK_API int32_t moepack_best_moves(const moepack_groups* groups, const moepack_levels* levels,
                                       const moepack_moves* moves, float* scale, float* qw, float* qq);

/* One group's columns, rounded one after the other: each one's error, over upper[i][i], is fed to the
 * later ones. Values are code * step - minimum, or with levels level * step; codes of a step of 0 are 0. */
typedef struct {
  const float* weights; /* [size, rows] */
  const float* upper;   /* [size, size], rows `stride` apart; below the diagonal nothing is read */
  int64_t size, rows, stride;
  const float *inverse, *step, *minimum; /* [rows] */
  float top;
  const moepack_levels* levels; /* or NULL */
  uint8_t* codes;               /* [size, rows] */
  float* errors;                /* [size, rows] */
} moepack_columns;
MOEPACK_API int32_t moepack_feed_back(const moepack_columns* columns);

/* Start `threads` threads, the caller's among them, and return how many there are: fewer where the
 * system refuses. Other functions start what they lack and do with what they get. */
MOEPACK_API int32_t moepack_start_threads(int32_t threads);

/* Read every byte once and return their sum as 64-bit words: the speed of memory, to compare with. */
MOEPACK_API uint64_t moepack_read(const uint8_t* data, int64_t nbytes, int32_t threads);

#ifdef __cplusplus
}
#endif
#endif
