// Which instruction set computes, and the small functions of the interface.
#include <atomic>
#include <cstring>

#include "kernels.h"
#include "threads.h"

namespace moepack {
namespace {

const Kernels* const kAll[] = {
#if defined(MOEPACK_X86)
    &kAvx512Vbmi, &kAvx512, &kAvx2,
#elif defined(MOEPACK_NEON)
    &kNeon,
#endif
    &kPortable,
};

const Kernels* best() {
  for (const Kernels* k : kAll)
    if (k->supported()) return k;
  return &kPortable;
}

const Kernels*& current() {
  static const Kernels* chosen = best();
  return chosen;
}

}  // namespace

const Kernels& kernels() { return *current(); }

}  // namespace moepack

using namespace moepack;

int32_t moepack_abi(void) { return MOEPACK_ABI; }

const char* moepack_isa(void) { return kernels().name; }

int32_t moepack_set_isa(const char* name) {
  for (const Kernels* k : kAll) {
    if (std::strcmp(k->name, name) != 0) continue;
    if (!k->supported()) return MOEPACK_UNSUPPORTED;
    current() = k;
    return MOEPACK_OK;
  }
  return MOEPACK_BAD_ARGUMENT;
}

int64_t moepack_packed_nbytes(int32_t scheme, int64_t rows, int64_t cols) {
  if (scheme < 0 || scheme >= kSchemes || rows < 1 || cols < 1) return -1;
  return ceil_div(rows, kTileRows) * kFormats[scheme].tile_nbytes(cols);
}

int32_t moepack_start_threads(int32_t threads) { return start_threads(threads < 1 ? 1 : threads); }

uint64_t moepack_read(const uint8_t* data, int64_t nbytes, int32_t threads) {
  if (data == nullptr || nbytes < 0 || threads < 1) return 0;
  constexpr int64_t each = 1 << 20;
  std::atomic<uint64_t> total{0};
  for_chunks(threads, ceil_div(nbytes, each), [&](int64_t chunk) {
    int64_t from = chunk * each, size = nbytes - from < each ? nbytes - from : each;
    total += kernels().read_sum(data + from, size);
  });
  return total;
}
