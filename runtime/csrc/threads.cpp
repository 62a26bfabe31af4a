// Whose threads compute.
//
// Where torch brings GNU OpenMP into the process, its threads are borrowed: the caller hands over
// the addresses of four functions (moepack_use_openmp) and nothing is linked. A second pool beside
// torch's would be two sets of threads that spin for the same cores: measured between torch
// operations on two cores, a call then took milliseconds instead of microseconds (docs/log.md).
// Without GNU OpenMP (macOS, a process without torch) there is a small pool of our own.
#include "threads.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "moepack.h"

namespace moepack {
namespace {

struct OpenMp {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  void (*barrier)() = nullptr;
  int (*thread)() = nullptr;
  int (*threads)() = nullptr;
} openmp;

struct Job {
  void (*body)(void*, const Team&);
  void* data;
};

void openmp_barrier(void*) { openmp.barrier(); }

void openmp_body(void* job_pointer) {
  const Job& job = *static_cast<Job*>(job_pointer);
  job.body(job.data, Team{openmp.thread(), openmp.threads(), openmp_barrier, nullptr});
}

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits until done() is true: spins for some microseconds, then gives the core away each time.
template <class F> void spin_until(F&& done) {
  for (int i = 0; !done(); ++i) {
    if (i < 2000) pause();
    else std::this_thread::yield();
  }
}

class Pool {
 public:
  void run(int threads, Job job) {
    std::unique_lock<std::mutex> alone(busy_, std::try_to_lock);
    if (!alone) {  // another Python thread has the pool
      job.body(job.data, Team{0, 1, nullptr, nullptr});
      return;
    }
    while (static_cast<int>(workers_) < threads - 1) {
      int id = ++workers_;
      std::thread([this, id, seen = generation_.load()] { work(id, seen); }).detach();
    }
    {
      std::lock_guard<std::mutex> lock(sleep_);
      job_ = job, count_ = threads;
      left_.store(workers_, std::memory_order_relaxed);
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    job.body(job.data, Team{0, threads, barrier, this});
    spin_until([&] { return left_.load(std::memory_order_acquire) == 0; });
  }

 private:
  void work(int id, uint64_t seen) {
    for (;;) {
      auto started = [&] { return generation_.load(std::memory_order_acquire) != seen; };
      for (int i = 0; i < 20000 && !started(); ++i) pause();
      if (!started()) {
        std::unique_lock<std::mutex> lock(sleep_);
        wake_.wait(lock, started);
      }
      ++seen;
      if (id < count_) job_.body(job_.data, Team{id, count_, barrier, this});
      left_.fetch_sub(1, std::memory_order_release);
    }
  }

  static void barrier(void* pool_pointer) {
    Pool& pool = *static_cast<Pool*>(pool_pointer);
    uint32_t phase = pool.phase_.load(std::memory_order_acquire);
    if (pool.arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == pool.count_) {
      pool.arrived_.store(0, std::memory_order_relaxed);
      pool.phase_.fetch_add(1, std::memory_order_release);
    } else {
      spin_until([&] { return pool.phase_.load(std::memory_order_acquire) != phase; });
    }
  }

  std::mutex busy_, sleep_;
  std::condition_variable wake_;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int> left_{0}, arrived_{0};
  std::atomic<uint32_t> phase_{0};
  int workers_ = 0, count_ = 1;
  Job job_{};
};

// Never destroyed: its threads end with the process. A forked child starts with a new one, as
// threads do not survive a fork.
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

void run_team(int threads, void (*body)(void*, const Team&), void* data) {
  Job job{body, data};
  if (threads <= 1) body(data, Team{0, 1, nullptr, nullptr});
  else if (openmp.parallel) openmp.parallel(openmp_body, &job, static_cast<unsigned>(threads), 0);
  else own_pool().run(threads, job);
}

}  // namespace moepack

void moepack_use_openmp(void* parallel, void* barrier, void* thread, void* threads) {
  using namespace moepack;
  openmp.parallel = reinterpret_cast<decltype(openmp.parallel)>(parallel);
  openmp.barrier = reinterpret_cast<decltype(openmp.barrier)>(barrier);
  openmp.thread = reinterpret_cast<decltype(openmp.thread)>(thread);
  openmp.threads = reinterpret_cast<decltype(openmp.threads)>(threads);
}
