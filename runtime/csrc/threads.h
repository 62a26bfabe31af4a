// A team of threads that runs one function. See threads.cpp for whose threads they are.
#pragma once
#include <cstdint>
#include <type_traits>

namespace moepack {

struct Team {
  int id, count;
  void (*wait)(void*);
  void* shared;
  void barrier() const {
    if (count > 1) wait(shared);
  }
  // This thread's share of n items: contiguous, so that each thread reads memory front to back.
  int64_t begin(int64_t n) const { return n * id / count; }
  int64_t end(int64_t n) const { return n * (id + 1) / count; }
};

void run_team(int threads, void (*body)(void*, const Team&), void* data);

template <class F> void parallel(int threads, F&& body) {
  using Body = std::remove_reference_t<F>;
  run_team(
      threads, [](void* data, const Team& team) { (*static_cast<Body*>(data))(team); }, &body);
}

}  // namespace moepack
