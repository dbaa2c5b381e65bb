// The largest of a row of logits, found while they are made.

#pragma once

#include <cstdint>
#include <limits>

#include "vectors.h"

#define PANEL (2 * LANES)

// What a thread saw of a row: per lane the largest and where, the lowest place among equals.
class Best {
 public:
  void see(int64_t panel, int64_t left, Floats a, Floats b) {
    Ints lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    const Ints first = lane + (int32_t)(panel * PANEL);
    if (left < PANEL) {  // the last panel is filled up
      a = choose(lane < (int32_t)left, a, all(-std::numeric_limits<float>::infinity()));
      b = choose(lane + LANES < (int32_t)left, b, all(-std::numeric_limits<float>::infinity()));
    }
    take(a, first), take(b, first + LANES);
  }

  // The place of the largest that any of `count` saw, `stride` apart; -1 if it is not finite, or
  // a NaN was seen.
  static int64_t of(const Best* seen, int64_t count, int64_t stride) {
    float top = -std::numeric_limits<float>::infinity();
    int64_t place = -1;
    for (int64_t i = 0; i < count; i++)
      for (int64_t l = 0; l < LANES; l++) {
        const Best& own = seen[i * stride];
        if (own.has_nan_[l]) return -1;
        const float value = own.value_[l];
        if (value > top || (value == top && own.place_[l] < place))
          top = value, place = own.place_[l];
      }
    return top < std::numeric_limits<float>::infinity() ? place : -1;
  }

 private:
  void take(Floats v, Ints place) {
    const Ints is_better = (v > value_) | ((v == value_) & (place < place_));
    value_ = choose(is_better, v, value_);
    place_ = (place & is_better) | (place_ & ~is_better);
    has_nan_ |= v != v;
  }

  Floats value_ = all(-std::numeric_limits<float>::infinity());
  Ints place_ = Ints{} + std::numeric_limits<int32_t>::max();
  Ints has_nan_ = Ints{};
};
