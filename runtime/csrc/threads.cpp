// Whose threads compute: a small pool of our own, without OpenMP.
//
// Both were measured, two threads on two cores, 2.625-bit experts of OLMoE's shape, torch operations
// between the calls. Borrowing torch's own OpenMP threads: 473 us a layer alone on the machine, 5 to
// 15 ms in the mean with another busy process, because every thread must reach the end of a region
// even if it has not run at all. This pool: 470 us alone, 1 ms beside the busy process. What makes
// the difference is that nobody waits for a worker, only for chunks that were taken: a worker that
// does not get a core in time takes none. Workers spin for kSpin and then sleep, so torch's threads
// find the cores free.
#include "threads.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace moepack {
namespace {

using std::chrono::microseconds;

// Longer than what torch does between two packed matrices of a layer, shorter than a token.
constexpr microseconds kSpin{100};

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins until done() or until `limit` has passed; says whether it is done.
template <class F> bool spin(F&& done, microseconds limit) {
  auto end = std::chrono::steady_clock::now() + limit;
  do {
    for (int i = 0; i < 64; ++i) {
      if (done()) return true;
      pause();
    }
  } while (std::chrono::steady_clock::now() < end);
  return done();
}

class Pool {
 public:
  // Starts workers until `threads` compute, the caller among them; says how many there are then.
  int start(int threads) {
    std::lock_guard<std::mutex> alone(busy_);
    add_workers(threads);
    return workers_ + 1 < threads ? workers_ + 1 : threads;
  }

  void run(int threads, int64_t chunks, void (*body)(void*, int64_t), void* data) {
    std::unique_lock<std::mutex> alone(busy_, std::try_to_lock);
    if (!alone) {  // another Python thread has the workers
      for (int64_t c = 0; c < chunks; ++c) body(data, c);
      return;
    }
    add_workers(threads);
    body_ = body, data_ = data, chunks_ = chunks;
    threads_.store(threads, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    uint64_t generation = (ticket_.load(std::memory_order_relaxed) >> 32) + 1;
    ticket_.store(generation << 32 | static_cast<uint64_t>(chunks));
    if (asleep_.load()) {
      { std::lock_guard<std::mutex> lock(sleep_); }
      wake_.notify_all();
    }
    take();
    auto finished = [&] { return done_.load(std::memory_order_acquire) == chunks; };
    while (!spin(finished, microseconds(50))) std::this_thread::yield();
  }

 private:
  // Where the system gives no more, those that there are do all of it: see start_threads.
  void add_workers(int threads) {
    while (workers_ < threads - 1) {
      int id = workers_ + 1;
      try {
        std::thread([this, id] { work(id); }).detach();
      } catch (const std::system_error&) {
        return;
      }
      workers_ = id;
    }
  }

  bool available(int id) const {
    return static_cast<uint32_t>(ticket_.load()) != 0 &&
           id < threads_.load(std::memory_order_relaxed);
  }

  // A chunk is taken by counting the ticket down. Success says that the job in body_ and data_ is
  // the current one, and it stays so until this chunk is counted in done_.
  void take() {
    uint64_t ticket = ticket_.load();
    while (static_cast<uint32_t>(ticket) != 0) {
      if (!ticket_.compare_exchange_weak(ticket, ticket - 1)) continue;
      body_(data_, chunks_ - static_cast<int64_t>(static_cast<uint32_t>(ticket)));
      done_.fetch_add(1, std::memory_order_release);
      ticket = ticket_.load();
    }
  }

  void work(int id) {
    for (;;) {
      auto ready = [&] { return available(id); };
      if (!spin(ready, kSpin)) {
        std::unique_lock<std::mutex> lock(sleep_);
        asleep_.fetch_add(1);
        wake_.wait(lock, ready);
        asleep_.fetch_sub(1);
      }
      take();
    }
  }

  std::mutex busy_, sleep_;
  std::condition_variable wake_;
  std::atomic<uint64_t> ticket_{0};  // generation << 32 | chunks that nobody has taken
  std::atomic<int64_t> done_{0};
  std::atomic<int> threads_{0}, asleep_{0};
  int workers_ = 0;
  void (*body_)(void*, int64_t) = nullptr;
  void* data_ = nullptr;
  int64_t chunks_ = 0;
};

// Never destroyed: its threads end with the process. Threads do not survive a fork, so a child
// begins with a new pool.
Pool* pool = nullptr;

Pool& own_pool() {
  static std::once_flag once;
  std::call_once(once, [] {
    pool = new Pool;
    pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
  });
  return *pool;
}

}  // namespace

int start_threads(int threads) { return own_pool().start(threads); }

void run_chunks(int threads, int64_t chunks, void (*body)(void*, int64_t), void* data) {
  if (threads <= 1 || chunks <= 1) {
    for (int64_t c = 0; c < chunks; ++c) body(data, c);
  } else {
    own_pool().run(threads, chunks, body, data);
  }
}

}  // namespace moepack
