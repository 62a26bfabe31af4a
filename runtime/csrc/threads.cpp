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
using Body = void (*)(void*, int64_t, int64_t);

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

  void run(int threads, int64_t units, int64_t most, Body body, void* data) {
    std::unique_lock<std::mutex> alone(busy_, std::try_to_lock);
    if (!alone) {  // another Python thread has the workers
      body(data, 0, units);
      return;
    }
    add_workers(threads);
    body_ = body, data_ = data;
    most_.store(most, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    int64_t shares = threads < kShares ? threads : kShares;
    for (int64_t i = 0; i < shares; ++i)
      shares_[i].left.store(range(units * i / shares, units * (i + 1) / shares));
    uint64_t number = (job_.load(std::memory_order_relaxed) >> 32) + 1;
    job_.store(number << 32 | static_cast<uint64_t>(threads));
    if (asleep_.load()) {
      { std::lock_guard<std::mutex> lock(sleep_); }
      wake_.notify_all();
    }
    take(0, threads);
    auto finished = [&] { return done_.load(std::memory_order_acquire) == units; };
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

  // Units that a thread goes through from front to back, so that it reads memory in a row; who has
  // none left takes another thread's from behind.
  struct alignas(64) Share {
    std::atomic<uint64_t> left{0};  // range(first, end)
  };
  static constexpr int64_t kShares = 64;

  static uint64_t range(int64_t first, int64_t end) {
    return static_cast<uint64_t>(first) << 32 | static_cast<uint64_t>(end);
  }
  static int threads_of(uint64_t job) { return static_cast<int>(static_cast<uint32_t>(job)); }

  struct Range {
    int64_t first, end;
  };

  // Takes some units: at most half of what is left, but one. Success says that the job in body_ and data_
  // is the one that the share is of, whichever that was when the share was looked at first, and it stays
  // so until these units are counted in done_.
  Range take_from(Share& share, bool own) {
    uint64_t left = share.left.load();
    for (;;) {
      int64_t first = static_cast<uint32_t>(left >> 32), end = static_cast<uint32_t>(left);
      if (first >= end) return {0, 0};
      int64_t count = (end - first + 1) / 2, most = most_.load(std::memory_order_relaxed);
      count = count < most ? count : most;
      Range taken = own ? Range{first, first + count} : Range{end - count, end};
      uint64_t rest = own ? range(taken.end, end) : range(first, taken.first);
      if (share.left.compare_exchange_weak(left, rest)) return taken;
    }
  }

  void take(int id, int threads) {
    int64_t shares = threads < kShares ? threads : kShares;
    for (int64_t i = 0; i < shares; ++i)
      for (;;) {
        Range units = take_from(shares_[(id + i) % shares], i == 0);
        if (units.first == units.end) break;
        body_(data_, units.first, units.end);
        done_.fetch_add(units.end - units.first, std::memory_order_release);
      }
  }

  void work(int id) {
    uint64_t seen = 0, job = 0;
    for (;;) {
      auto ready = [&] { return (job = job_.load()) != seen && id < threads_of(job); };
      if (!spin(ready, kSpin)) {
        std::unique_lock<std::mutex> lock(sleep_);
        asleep_.fetch_add(1);
        wake_.wait(lock, ready);
        asleep_.fetch_sub(1);
      }
      seen = job;
      take(id, threads_of(job));
    }
  }

  std::mutex busy_, sleep_;
  std::condition_variable wake_;
  Share shares_[kShares];
  std::atomic<uint64_t> job_{0};  // its number << 32 | threads that compute
  std::atomic<int64_t> done_{0}, most_{1};  // units that are done, and that are taken at once
  std::atomic<int> asleep_{0};
  int workers_ = 0;
  Body body_ = nullptr;
  void* data_ = nullptr;
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

void run_ranges(int threads, int64_t units, int64_t most, Body body, void* data) {
  if (threads > 1 && units > most) own_pool().run(threads, units, most, body, data);
  else if (units > 0) body(data, 0, units);
}

}  // namespace moepack
