// Work cut into chunks that any thread may take. See threads.cpp for whose threads they are.
#pragma once
#include <cstdint>
#include <type_traits>

namespace moepack {

// Starts what for_chunks would start at its first call with so many threads, and says how many there
// are: fewer where the system refuses. Every call of for_chunks would try again to start the rest, so
// a caller that is told of fewer should ask for no more.
int start_threads(int threads);

void run_ranges(int threads, int64_t units, int64_t most, void (*body)(void*, int64_t, int64_t),
                void* data);

// Calls body(first, end) for ranges of up to `most` units that make up all of them, on up to `threads`
// threads, this one among them; all are done when it returns. Up to `most` units in all are done by this
// thread. Ranges become shorter towards the end of what a thread has, so that none waits long for
// another's last. Which they are and who takes them differs from call to call, so a unit's result must
// not depend on it.
template <class F> void for_ranges(int threads, int64_t units, int64_t most, F&& body) {
  using Body = std::remove_reference_t<F>;
  run_ranges(
      threads, units, most,
      [](void* data, int64_t first, int64_t end) { (*static_cast<Body*>(data))(first, end); }, &body);
}

// Calls body(chunk) once for each chunk.
template <class F> void for_chunks(int threads, int64_t chunks, F&& body) {
  for_ranges(threads, chunks, 1, [&](int64_t first, int64_t end) {
    for (int64_t chunk = first; chunk < end; ++chunk) body(chunk);
  });
}

}  // namespace moepack
