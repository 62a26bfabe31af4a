// Work cut into chunks that any thread may take. See threads.cpp for whose threads they are.
#pragma once
#include <cstdint>
#include <type_traits>

namespace moepack {

// Starts what for_chunks would start at its first call with so many threads, and says how many there
// are: fewer where the system refuses. Every call of for_chunks would try again to start the rest, so
// a caller that is told of fewer should ask for no more.
int start_threads(int threads);

void run_chunks(int threads, int64_t chunks, void (*body)(void*, int64_t), void* data);

// Calls body(chunk) once for each chunk, on up to `threads` threads, this one among them; all are
// done when it returns. Which thread takes which chunk differs from call to call, so a chunk's
// result must not depend on it.
template <class F> void for_chunks(int threads, int64_t chunks, F&& body) {
  using Body = std::remove_reference_t<F>;
  run_chunks(
      threads, chunks, [](void* data, int64_t chunk) { (*static_cast<Body*>(data))(chunk); },
      &body);
}

}  // namespace moepack
