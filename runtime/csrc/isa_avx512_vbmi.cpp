// AVX-512 with VNNI and VBMI (Ice Lake and Zen 4 onwards).
#include "blocks_avx512.h"
#include "panel_avx512.h"

namespace moepack {
namespace {

struct Avx512Vbmi : Avx512 {
  // Schemes that blocks_avx512.h multiplies with.
  template <Scheme S> static constexpr int own_cols() {
    return S == Q2G16S4 || S == Q3G32S4 || S == Q3G16S5 ? 64 : 0;
  }
  static constexpr float kLevelUnit = 1.0f;

  template <Scheme S, int N>
  static MOEPACK_INLINE void block(const uint8_t* w, const uint8_t* metadata,
                                   const uint8_t* fifths, int64_t group, const Row* rows,
                                   int64_t col, Ints (*high)[N], Ints (*base)[N]) {
    Block<S, N>::run(w, metadata, fifths, group, rows, col, high, base);
  }
};

bool supported() { return has_avx512_vnni() && __builtin_cpu_supports("avx512vbmi"); }

}  // namespace

extern constexpr Kernels kAvx512Vbmi = make_avx512<Avx512Vbmi>("avx512_vbmi", supported);

}  // namespace moepack
