// AVX-512 without byte permutations across a register (Cascade Lake, Cooper Lake).
#include "avx512.h"

namespace moepack {

extern constexpr Kernels kAvx512 = make_kernels<Avx512>("avx512", has_avx512_vnni);

}  // namespace moepack
