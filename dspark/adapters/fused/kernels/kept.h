// Keys and values as the K/V store keeps them: in float32, or in bfloat16 where the model rounds them
// to it anyway. Reading widens them, so the sums are the same numbers in the same order.

#pragma once

#include <cstdint>
#include <utility>

#include "vectors.h"

#define HIGH_HALF ((int32_t)0xffff0000)
#define KEY_BLOCKS 2  // of LANES keys, scored together

template <int S, int... I>
INLINE void exchange(Floats& a, Floats& b, std::integer_sequence<int, I...>) {
  Floats low = __builtin_shufflevector(a, b, ((I & S) ? LANES + I - S : I)...);
  b = __builtin_shufflevector(a, b, ((I & S) ? LANES + I : I + S)...);
  a = low;
}

template <int S>
INLINE void transpose_steps(Floats* rows) {
  if constexpr (S > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
      if (!(i & S)) exchange<S>(rows[i], rows[i + S], std::make_integer_sequence<int, LANES>());
    transpose_steps<S / 2>(rows);
  }
}

// LANES keys [LANES, dim] -> [dim, LANES].
static void transpose(const float* keys, int64_t dim, float* out) {
  for (int64_t d = 0; d < dim; d += LANES) {
    Floats rows[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) rows[i] = load(keys + i * dim + d);
    transpose_steps<LANES / 2>(rows);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) store(out + (d + i) * LANES, rows[i]);
  }
}

// LANES keys [LANES, dim] -> [dim / 2, LANES] pairs of neighbouring numbers.
static void transpose(const Half* keys, int64_t dim, float* out) {
  int64_t d = 0;
  Floats rows[LANES];
  for (; d + 2 * LANES <= dim; d += 2 * LANES) {
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) memcpy(&rows[i], keys + i * dim + d, sizeof(Floats));
    transpose_steps<LANES / 2>(rows);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) store(out + (d / 2 + i) * LANES, rows[i]);
  }
  if (d == dim) return;  // else LANES of them are left
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++) {
    rows[i] = Floats{};
    memcpy(&rows[i], keys + i * dim + d, sizeof(Floats) / 2);
  }
  transpose_steps<LANES / 2>(rows);
#pragma GCC unroll 8
  for (int i = 0; i < LANES / 2; i++) store(out + (d / 2 + i) * LANES, rows[i]);
}

// out[q][b] = the products of query q with block b of B, each LANES keys as `transpose` leaves them.
// Several blocks at once keep more sums going than a product takes cycles.
template <typename Kept, int Q, int B>
static void score(const float* const* query, const float* keys, int64_t dim, float* const* out) {
  Floats sum[Q][B];
#pragma GCC unroll 8
  for (int q = 0; q < Q; q++)
#pragma GCC unroll 2
    for (int b = 0; b < B; b++) sum[q][b] = Floats{};
  auto add = [&](const Floats* key, int64_t d) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int q = 0; q < Q; q++) {
      const float x = query[q][d];
#pragma GCC unroll 2
      for (int b = 0; b < B; b++) sum[q][b] += key[b] * x;
    }
  };
  constexpr int step = sizeof(float) / sizeof(Kept);
  for (int64_t d = 0; d < dim; d += step) {
    Floats key[B];
#pragma GCC unroll 2
    for (int b = 0; b < B; b++) key[b] = load(keys + (b * dim + d) / step * LANES);
    if constexpr (step == 1) {
      add(key, d);
    } else {
      Floats part[B];
#pragma GCC unroll 2
      for (int b = 0; b < B; b++) part[b] = (Floats)((Ints)key[b] << 16);
      add(part, d);
#pragma GCC unroll 2
      for (int b = 0; b < B; b++) part[b] = (Floats)((Ints)key[b] & HIGH_HALF);
      add(part, d + 1);
    }
  }
#pragma GCC unroll 8
  for (int q = 0; q < Q; q++)
#pragma GCC unroll 2
    for (int b = 0; b < B; b++) store(out[q] + b * LANES, sum[q][b]);
}

// V vectors of floats from values. Halves come in pairs of vectors: the even ones, then the odd.
template <int V>
INLINE void widen(const float* values, Floats* out) {
#pragma GCC unroll 4
  for (int v = 0; v < V; v++) out[v] = load(values + v * LANES);
}

template <int V>
INLINE void widen(const Half* values, Floats* out) {
  if constexpr (V == 1) {
    out[0] = load(values);
  } else {
#pragma GCC unroll 4
    for (int v = 0; v < V; v += 2) {
      Ints pair;
      memcpy(&pair, values + v * LANES, sizeof pair);
      out[v] = (Floats)(pair << 16);
      out[v + 1] = (Floats)(pair & HIGH_HALF);
    }
  }
}

// out[q] += sum over columns of weight[q][column] * values[column], V vectors wide.
template <int Q, int V, typename Kept>
static void gather_values(const float* const* weight, const Kept* values, int64_t stride,
                          int64_t columns, float* const* out) {
  Floats sum[Q][V];
#pragma GCC unroll 8
  for (int q = 0; q < Q; q++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) sum[q][v] = load(out[q] + v * LANES);
  for (int64_t c = 0; c < columns; c++) {
    Floats value[V];
    widen<V>(values + c * stride, value);
#pragma GCC unroll 8
    for (int q = 0; q < Q; q++) {
      float w = weight[q][c];
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) sum[q][v] += value[v] * w;
    }
  }
#pragma GCC unroll 8
  for (int q = 0; q < Q; q++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) store(out[q] + v * LANES, sum[q][v]);
}

// As gather_values over all of a head; `in_order` makes numbers of the sums.
template <int Q, typename Kept>
static void add_values(const float* const* weight, const Kept* values, int64_t dim,
                       int64_t columns, float* const* sums) {
  int64_t d = 0;
  float* to[Q];
  auto at = [&](int64_t d) {
    for (int q = 0; q < Q; q++) to[q] = sums[q] + d;
    return values + d;
  };
  for (; d + 4 * LANES <= dim; d += 4 * LANES)
    gather_values<Q, 4>(weight, at(d), dim, columns, to);
  for (; d + 2 * LANES <= dim; d += 2 * LANES)
    gather_values<Q, 2>(weight, at(d), dim, columns, to);
  for (; d < dim; d += LANES) gather_values<Q, 1>(weight, at(d), dim, columns, to);
}

template <int... I>
INLINE void alternate(float* sums, std::integer_sequence<int, I...>) {
  Floats even = load(sums), odd = load(sums + LANES);
  store(sums, __builtin_shufflevector(even, odd, (I / 2 + (I & 1) * LANES)...));
  store(sums + LANES, __builtin_shufflevector(even, odd, ((I + LANES) / 2 + (I & 1) * LANES)...));
}

// Sums that `add_values` left in order of its vectors -> in order of the head's numbers.
template <typename Kept>
static void in_order(float* sums, int64_t dim) {
  if constexpr (sizeof(Kept) == sizeof(Half))
    for (int64_t d = 0; d + 2 * LANES <= dim; d += 2 * LANES)
      alternate(sums + d, std::make_integer_sequence<int, LANES>());
}

// Ask for LANES keys and as many values, into the second cache.
template <typename Kept>
static void fetch_block(const Kept* keys, const Kept* values, int64_t dim) {
  const int64_t bytes = LANES * dim * sizeof(Kept);
  for (int64_t i = 0; i < bytes; i += 64) {
    __builtin_prefetch((const char*)keys + i, 0, 2);
    __builtin_prefetch((const char*)values + i, 0, 2);
  }
}
