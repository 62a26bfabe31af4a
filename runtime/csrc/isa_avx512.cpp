// AVX-512 without byte permutations across a register (Cascade Lake, Cooper Lake).
#include "panel_avx512.h"

namespace moepack {

extern constexpr Kernels kAvx512 = make_avx512<Avx512>("avx512", has_avx512_vnni);

}  // namespace moepack
