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

// Things that threads take one by one, each its own share in order and then what others have left:
// a thread that is slower for a moment keeps nobody waiting for more than one of them.
class Counter {
 public:
  void reset() { taken_.store(0, std::memory_order_relaxed); }
  int64_t take() { return taken_.fetch_add(1, std::memory_order_relaxed); }

 private:
  alignas(64) std::atomic<int64_t> taken_{0};
};

class Shares {
 public:
  // counters: one for each thread, at 0; null: every thread takes its own share alone.
  Shares(Worker me, int64_t items, Counter* counters)
      : me_(me), items_(items), counters_(counters), next_(me.first(items)) {}

  // The next one, or -1.
  int64_t take() {
    if (!counters_) return next_ < me_.last(items_) ? next_++ : -1;
    for (; tried_ < me_.count; tried_++) {
      const Worker owner{(me_.index + tried_) % me_.count, me_.count};
      const int64_t item = owner.first(items_) + counters_[owner.index].take();
      if (item < owner.last(items_)) return item;
    }
    return -1;
  }

 private:
  const Worker me_;
  const int64_t items_;
  Counter* const counters_;
  int64_t next_, tried_ = 0;
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
