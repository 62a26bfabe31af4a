// A handler for SIGBUS in guarded mappings; everywhere else the signal does what it did before.
//
// The handler may run on any thread, in the middle of anything: it uses lock-free atomics and two
// system calls, nothing else.
#include "guard.h"

#include <csignal>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <mutex>

namespace {

constexpr int kRanges = 4096;  // layer files of all models in the process
constexpr int64_t kNothing = -1;

struct Range {
  std::atomic<uintptr_t> start{0}, end{0};  // both 0: free
  std::atomic<int64_t> missing{kNothing};
};

Range ranges[kRanges];
std::atomic<int64_t> faults{0};
std::atomic<int> used{0};  // ranges from here on were never taken
std::mutex changing;
struct sigaction previous;
uintptr_t page_nbytes;

// Maps zeros over the page at `address` if it is guarded.
bool mend(uintptr_t address) {
  int count = used.load(std::memory_order_acquire);
  for (int i = 0; i < count; ++i) {
    uintptr_t start = ranges[i].start.load(std::memory_order_acquire);
    if (start == 0 || address < start || address >= ranges[i].end.load()) continue;
    void* page = reinterpret_cast<void*>(address & ~(page_nbytes - 1));
    constexpr int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;
    if (mmap(page, page_nbytes, PROT_READ | PROT_WRITE, flags, -1, 0) == MAP_FAILED) return false;
    faults.fetch_add(1);
    int64_t nothing = kNothing;
    ranges[i].missing.compare_exchange_strong(nothing, static_cast<int64_t>(address - start));
    return true;
  }
  return false;
}

void on_bus_error(int signal, siginfo_t* info, void* context) {
  if (info->si_code == BUS_ADRERR && mend(reinterpret_cast<uintptr_t>(info->si_addr))) return;
  if (previous.sa_flags & SA_SIGINFO) {
    previous.sa_sigaction(signal, info, context);
  } else if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
    previous.sa_handler(signal);
  } else {
    // The faulting instruction runs again, without a handler.
    struct sigaction plain = {};
    plain.sa_handler = SIG_DFL;
    sigaction(SIGBUS, &plain, nullptr);
  }
}

// Somebody else may have set a handler since: it becomes the previous one.
void install() {
  page_nbytes = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  struct sigaction now;
  sigaction(SIGBUS, nullptr, &now);
  if ((now.sa_flags & SA_SIGINFO) && now.sa_sigaction == on_bus_error) return;
  previous = now;
  struct sigaction ours = {};
  ours.sa_sigaction = on_bus_error;
  ours.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART;
  sigemptyset(&ours.sa_mask);
  sigaction(SIGBUS, &ours, nullptr);
}

}  // namespace

int32_t moepack_guard_add(const void* start, int64_t nbytes) {
  if (start == nullptr || nbytes < 1) return -1;
  std::lock_guard<std::mutex> lock(changing);
  install();
  for (int i = 0; i < kRanges; ++i) {
    if (ranges[i].start.load() != 0) continue;
    auto address = reinterpret_cast<uintptr_t>(start);
    ranges[i].missing.store(kNothing);
    ranges[i].end.store(address + static_cast<uintptr_t>(nbytes));
    ranges[i].start.store(address, std::memory_order_release);
    if (i >= used.load()) used.store(i + 1, std::memory_order_release);
    return i;
  }
  return -1;
}

void moepack_guard_remove(int32_t number) {
  if (number < 0 || number >= kRanges) return;
  std::lock_guard<std::mutex> lock(changing);
  ranges[number].start.store(0, std::memory_order_release);
}

int64_t moepack_guard_faults(void) { return faults.load(); }

int64_t moepack_guard_missing(int32_t number) {
  if (number < 0 || number >= kRanges) return kNothing;
  return ranges[number].missing.exchange(kNothing);
}
