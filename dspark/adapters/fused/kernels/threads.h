// Where the threads of a forward meet.
//
// They meet eight times a layer, for a microsecond or two if each has a core to itself. Where one
// has not, because another program runs there, OpenMP's barrier spins for whole time slices while
// the thread that it waits for could run: forwards took four to thirty times as long. This one
// gives way after a moment.

#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define SPINS 2000  // a tenth of a millisecond: longer than threads of a quiet machine wait

// One of the threads, and its share of things that are counted out.
struct Worker {
  int64_t index, count;

  int64_t first(int64_t items) const { return items * index / count; }
  int64_t last(int64_t items) const { return items * (index + 1) / count; }
};

static inline void pause_briefly() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Meeting {
 public:
  // Return when all `count` threads are here.
  void wait(int64_t count) {
    const uint64_t round = round_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int64_t spins = 0; round_.load(std::memory_order_acquire) == round; spins++) {
      if (spins < SPINS)
        pause_briefly();
      else
        std::this_thread::yield();
    }
  }

 private:
  alignas(64) std::atomic<int64_t> arrived_{0};
  alignas(64) std::atomic<uint64_t> round_{0};
};
