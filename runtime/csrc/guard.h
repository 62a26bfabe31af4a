/* Reading mapped files that may be truncated meanwhile: part of the C interface, see moepack.h. */
#ifndef MOEPACK_GUARD_H
#define MOEPACK_GUARD_H
#include <stdint.h>

#include "moepack.h"

#ifdef __cplusplus
extern "C" {
#endif

/* From now on a page of this mapping that its file no longer has reads as zeros instead of ending
 * the process (SIGBUS). Returns a number for the calls below, or -1 when too many are guarded.
 * The mapping must stay until moepack_guard_remove. */
MOEPACK_API int32_t moepack_guard_add(const void* start, int64_t nbytes);
MOEPACK_API void moepack_guard_remove(int32_t number);
/* Offset of the first byte that was missing since the last call, or -1. The page stays zeros: what
 * was computed from it is wrong, and the mapping is to be given up. */
MOEPACK_API int64_t moepack_guard_missing(int32_t number);
/* Pages that were missing so far, in all guarded mappings of the process. */
MOEPACK_API int64_t moepack_guard_faults(void);

#ifdef __cplusplus
}
#endif
#endif
