// 64-bit Arm with the dot product instructions (Armv8.2): four rows in each register.
#include <arm_neon.h>
#include <sys/auxv.h>

#include "block.h"

#ifndef HWCAP_ASIMDDP
#define HWCAP_ASIMDDP (1 << 20)
#endif

namespace moepack {
namespace {

struct Neon {
  struct Codes { uint8x16_t a[4]; };
  struct Ints { int32x4_t a[4]; };
  struct Floats { float32x4_t a[4]; };
  using Partial = Ints;
  static constexpr int kTokens = 2, kByteTokens = 4;
  static constexpr bool kExpands = true;
  template <Scheme> static constexpr int own_cols() { return 0; }

  template <class R, class F> static MOEPACK_INLINE R make(F&& f) {
    return R{{f(0), f(1), f(2), f(3)}};
  }
#define EACH(R, expression) make<R>([&](int i) MOEPACK_LAMBDA { return expression; })

  static MOEPACK_INLINE Codes load(const uint8_t* p) { return EACH(Codes, vld1q_u8(p + 16 * i)); }
  static MOEPACK_INLINE void store_codes(uint8_t* p, Codes c) {
    for (int i = 0; i < 4; ++i) vst1q_u8(p + 16 * i, c.a[i]);
  }
  template <int SHIFT, int MASK> static MOEPACK_INLINE Codes field(Codes c) {
    uint8x16_t mask = vdupq_n_u8(MASK);
    if constexpr (SHIFT == 0) return EACH(Codes, vandq_u8(c.a[i], mask));
    else return EACH(Codes, vandq_u8(vshrq_n_u8(c.a[i], SHIFT), mask));
  }
  static MOEPACK_INLINE Codes merge(Codes a, Codes b) {
    return EACH(Codes, vorrq_u8(a.a[i], b.a[i]));
  }
  // The upper two bits of bytes of a, b and c, as six bits with those of a lowest.
  static MOEPACK_INLINE Codes tops(Codes a, Codes b, Codes c) {
    // Shifted in behind the two upper bits of the other.
    b = EACH(Codes, vsriq_n_u8(b.a[i], a.a[i], 2));
    return EACH(Codes, vshrq_n_u8(vsriq_n_u8(c.a[i], b.a[i], 2), 2));
  }
  static MOEPACK_INLINE Codes levels(Codes c) {
    uint8x8_t table = vld1_u8(kLevels);
    return EACH(Codes, vqtbl1q_u8(vcombine_u8(table, table), c.a[i]));
  }

  static MOEPACK_INLINE int8x16_t broadcast(const int8_t* x) {
    int32_t four;
    memcpy(&four, x, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
  }
  static MOEPACK_INLINE Partial zero_partial() { return zero_ints(); }
  static MOEPACK_INLINE Partial dot(Partial sum, Codes c, const int8_t* x) {
    int8x16_t four = broadcast(x);
    return EACH(Ints, vdotq_s32(sum.a[i], vreinterpretq_s8_u8(c.a[i]), four));
  }
  template <int> static constexpr int partial_quads() { return 8; }
  static MOEPACK_INLINE Ints widen(Partial p) { return p; }
  // The instruction takes signed codes, so the lowest of 8 bits is multiplied apart.
  static MOEPACK_INLINE Ints dot_wide(Ints sum, Codes c, const int8_t* x) {
    Ints high = dot(zero_ints(), field<1, 127>(c), x);
    Ints low = dot(sum, field<0, 1>(c), x);
    return EACH(Ints, vaddq_s32(low.a[i], vshlq_n_s32(high.a[i], 1)));
  }

  static MOEPACK_INLINE Ints zero_ints() { return set_low16(0); }
  static MOEPACK_INLINE Ints sub_ints(Ints a, Ints b) {
    return EACH(Ints, vsubq_s32(a.a[i], b.a[i]));
  }
  static MOEPACK_INLINE Ints shift_right(Ints v, int n) {
    int32x4_t left = vdupq_n_s32(-n);
    return EACH(Ints, vshlq_s32(v.a[i], left));
  }
  static MOEPACK_INLINE Ints shift_left_4(Ints v) { return EACH(Ints, vshlq_n_s32(v.a[i], 4)); }
  static MOEPACK_INLINE Ints mul_add_16(Ints sum, Ints a, Ints b) {
    return EACH(Ints, vmlaq_s32(sum.a[i], a.a[i], b.a[i]));
  }
  static MOEPACK_INLINE Ints set_low16(int32_t x) {
    int32x4_t v = vdupq_n_s32(x);
    return Ints{{v, v, v, v}};
  }
  static MOEPACK_INLINE Ints set_int(int32_t x) { return set_low16(x); }
  static MOEPACK_INLINE Ints mul_add_32(Ints sum, Ints a, Ints b) { return mul_add_16(sum, a, b); }
  static MOEPACK_INLINE Ints load_u8(const uint8_t* p) {
    uint8x16_t v = vld1q_u8(p);
    uint16x8_t low = vmovl_u8(vget_low_u8(v)), high = vmovl_u8(vget_high_u8(v));
    return Ints{{vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(low))),
                 vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(low))),
                 vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(high))),
                 vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(high)))}};
  }
  static MOEPACK_INLINE Ints load_i8(const uint8_t* p) {
    Ints v = load_u8(p);
    return EACH(Ints, vshrq_n_s32(vshlq_n_s32(v.a[i], 24), 24));
  }
  template <int SHIFT, int MASK> static MOEPACK_INLINE Ints field_int(Ints v) {
    int32x4_t mask = vdupq_n_s32(MASK);
    if constexpr (SHIFT == 0) return EACH(Ints, vandq_s32(v.a[i], mask));
    else return EACH(Ints, vandq_s32(vshrq_n_s32(v.a[i], SHIFT), mask));
  }

  static MOEPACK_INLINE Floats zero() { return set(0.0f); }
  static MOEPACK_INLINE Floats set(float x) {
    float32x4_t v = vdupq_n_f32(x);
    return Floats{{v, v, v, v}};
  }
  static MOEPACK_INLINE Floats add(Floats a, Floats b) {
    return EACH(Floats, vaddq_f32(a.a[i], b.a[i]));
  }
  static MOEPACK_INLINE Floats sub(Floats a, Floats b) {
    return EACH(Floats, vsubq_f32(a.a[i], b.a[i]));
  }
  static MOEPACK_INLINE Floats mul(Floats a, Floats b) {
    return EACH(Floats, vmulq_f32(a.a[i], b.a[i]));
  }
  static MOEPACK_INLINE Floats fma(Floats a, Floats b, Floats c) {
    return EACH(Floats, vfmaq_f32(c.a[i], a.a[i], b.a[i]));
  }
  static MOEPACK_INLINE Floats to_floats(Ints v) { return EACH(Floats, vcvtq_f32_s32(v.a[i])); }
  template <int J> static MOEPACK_INLINE Floats byte(Codes c) {
    uint32x4_t mask = vdupq_n_u32(255);
    if constexpr (J == 0)
      return EACH(Floats, vcvtq_f32_u32(vandq_u32(vreinterpretq_u32_u8(c.a[i]), mask)));
    else
      return EACH(Floats, vcvtq_f32_u32(vandq_u32(
                              vshrq_n_u32(vreinterpretq_u32_u8(c.a[i]), 8 * J), mask)));
  }
  static MOEPACK_INLINE float32x4_t four_halves(const uint8_t* p) {
    return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p)));
  }
  static MOEPACK_INLINE Floats load_f16(const uint8_t* p) {
    return EACH(Floats, four_halves(p + 8 * i));
  }
  static MOEPACK_INLINE Floats load_f32(const uint8_t* p) {
    return EACH(Floats, vreinterpretq_f32_u8(vld1q_u8(p + 16 * i)));
  }
  static MOEPACK_INLINE void store(float* p, Floats v) {
    for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, v.a[i]);
  }

  static MOEPACK_INLINE Floats f32(Codes c) {
    return EACH(Floats, vreinterpretq_f32_u8(c.a[i]));
  }
  static MOEPACK_INLINE void bf16_pair(Codes c, Floats& even, Floats& odd) {
    uint32x4_t high = vdupq_n_u32(0xFFFF0000u);
    even = EACH(Floats, vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_u8(c.a[i]), 16)));
    odd = EACH(Floats, vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_u8(c.a[i]), high)));
  }
  static MOEPACK_INLINE float32x4_t low_halves(uint32x4_t v) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vmovn_u32(v)));
  }
  static MOEPACK_INLINE void f16_pair(Codes c, Floats& even, Floats& odd) {
    even = EACH(Floats, low_halves(vreinterpretq_u32_u8(c.a[i])));
    odd = EACH(Floats, low_halves(vshrq_n_u32(vreinterpretq_u32_u8(c.a[i]), 16)));
  }
#undef EACH
};

bool supported() { return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0; }

}  // namespace

extern constexpr Kernels kNeon = make_kernels<Neon>("neon", supported);

}  // namespace moepack
