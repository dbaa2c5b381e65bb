// Weights that are fetched while a tile of rows computes.
//
// NEAR: with few rows memory sets the pace. A tile fetches its own panel a little ahead.
// FAR:  with more, arithmetic does. What the thread reads next is fetched into the second cache
//       meanwhile, by the first two tiles of a panel if there are several: else the first would
//       wait for memory, and memory for the others.
// NONE: the other tiles.

#pragma once

#include <cstdint>

#include "vectors.h"

enum Reach { NEAR, FAR, NONE };

#define NEAR_ROWS 4

struct Fetch {
  const char* next;
  int64_t half;  // bytes between the two places that are fetched for two vectors of weights

  static Reach reach(int64_t rows, int64_t tile, int64_t tiles) {
    return tile >= 2 ? NONE : tiles == 1 && rows <= NEAR_ROWS ? NEAR : FAR;
  }

  Fetch(const char* panel, int64_t bytes, int64_t tile, int64_t tiles, Reach reach)
      : next(reach == NEAR ? panel + 4096 : panel + bytes + bytes / 2 * tile),
        half(sizeof(Floats) / (tiles == 1 ? 1 : 2)) {}

  template <Reach reach>
  void ahead() {
    if constexpr (reach == NEAR) {
      __builtin_prefetch(next);
      __builtin_prefetch(next + half);
    } else if constexpr (reach == FAR) {
      __builtin_prefetch(next, 0, 2);
      __builtin_prefetch(next + half, 0, 2);
    }
    next += 2 * half;
  }
};
