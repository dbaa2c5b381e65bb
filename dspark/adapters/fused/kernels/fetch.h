// Weights that are fetched while a tile of rows computes.
//
// NEAR: with few rows memory sets the pace. A tile fetches its own panel a little ahead.
// DEEP: with more, it takes about as long as arithmetic. A tile fetches its own panel in two steps,
//       far ahead into the second cache and from there into the first.
// FAR:  where a panel has several tiles, arithmetic sets the pace. The first two fetch what the
//       thread reads next into the second cache: else the first would wait for memory, and memory
//       for the others.
// NONE: the other tiles.

#pragma once

#include <cstdint>

#include "vectors.h"

enum Reach { NEAR, DEEP, FAR, NONE };

#define NEAR_ROWS 4
#define DEEP_BYTES 8192   // ahead of what is read
#define NEAR_BYTES 2048   // the second step of DEEP

struct Fetch {
  const char* next;
  int64_t half;  // bytes between the two places that are fetched for two vectors of weights

  static Reach reach(int64_t rows, int64_t tile, int64_t tiles) {
    if (tiles == 1) return rows <= NEAR_ROWS ? NEAR : DEEP;
    return tile >= 2 ? NONE : FAR;
  }

  Fetch(const char* panel, int64_t bytes, int64_t tile, int64_t tiles, Reach reach)
      : next(reach == NEAR   ? panel + 4096
             : reach == DEEP ? panel + DEEP_BYTES
                             : panel + bytes + bytes / 2 * tile),
        half(sizeof(Floats) / (tiles == 1 ? 1 : 2)) {}

  template <Reach reach>
  void ahead() {
    if constexpr (reach == NEAR) {
      __builtin_prefetch(next);
      __builtin_prefetch(next + half);
    } else if constexpr (reach == DEEP || reach == FAR) {
      __builtin_prefetch(next, 0, 2);
      __builtin_prefetch(next + half, 0, 2);
    }
    if constexpr (reach == DEEP) {
      __builtin_prefetch(next - DEEP_BYTES + NEAR_BYTES);
      __builtin_prefetch(next + half - DEEP_BYTES + NEAR_BYTES);
    }
    next += 2 * half;
  }
};
