// 32 values to int8 with AVX2, which machines with AVX-512 have too.
#pragma once
#include <immintrin.h>

#include "block.h"

namespace moepack {
namespace {

__m256 absolute(__m256 v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }

// See block.h; the loops there take five times as long.
float quantize_step_avx2(const float* v, int8_t* q, int16_t* sums) {
  __m256 x[4], most = _mm256_setzero_ps(), poison = _mm256_setzero_ps();
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm256_loadu_ps(v + 8 * i);
    most = _mm256_max_ps(absolute(x[i]), most);
    poison = _mm256_add_ps(poison, _mm256_mul_ps(x[i], _mm256_setzero_ps()));
  }
  if (_mm256_movemask_ps(_mm256_cmp_ps(poison, _mm256_setzero_ps(), _CMP_NEQ_UQ))) {
    memset(q, 0, kStepCols);
    memset(sums, 0, 4 * sizeof *sums);
    return __builtin_nanf("");
  }
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(most), _mm256_extractf128_ps(most, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  float largest = _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
  __m256 inverse = _mm256_set1_ps(largest > 1e-36f ? 127.0f / largest : 0.0f);
  __m256i c[4];
  for (int i = 0; i < 4; ++i) c[i] = _mm256_cvtps_epi32(_mm256_mul_ps(x[i], inverse));
  for (int g = 0; g < 2; ++g) {
    __m256i sum = _mm256_add_epi32(c[2 * g], c[2 * g + 1]);
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
    s = _mm_hadd_epi32(s, s);
    sums[2 * g] = static_cast<int16_t>(_mm_cvtsi128_si32(s));
    sums[2 * g + 1] = static_cast<int16_t>(_mm_extract_epi32(s, 1));
  }
  // Packing works in halves of a register: four values of each quarter lie together.
  __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(c[0], c[1]), _mm256_packs_epi32(c[2], c[3]));
  bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(q), bytes);
  return largest / 127.0f;
}

}  // namespace
}  // namespace moepack
