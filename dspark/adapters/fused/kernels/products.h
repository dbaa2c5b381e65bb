// Linear layers: each output is one sum over the inputs in their order, for any number of rows.

#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "best.h"
#include "fetch.h"
#include "pairs.h"
#include "quantised.h"
#include "step.h"
#include "threads.h"
#include "vectors.h"

template <int R, Reach reach>
static void tile_half(const float* x, int64_t stride, const void* data, int64_t inputs,
                      Fetch fetch, Floats (*out)[2]) {
  Floats sum[R][2];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) sum[r][0] = sum[r][1] = Floats{};
  const Ints* w = (const Ints*)data;
  for (int64_t k = 0; k < inputs; k += 2, w += 2) {
    fetch.ahead<reach>();
    Floats even0 = (Floats)(w[0] << 16), even1 = (Floats)(w[1] << 16);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      float a = x[r * stride + k];
      sum[r][0] += even0 * a;
      sum[r][1] += even1 * a;
    }
    Floats odd0 = (Floats)(w[0] & (int32_t)0xffff0000), odd1 = (Floats)(w[1] & (int32_t)0xffff0000);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      float a = x[r * stride + k + 1];
      sum[r][0] += odd0 * a;
      sum[r][1] += odd1 * a;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) out[r][0] = sum[r][0], out[r][1] = sum[r][1];
}

template <int R, Reach reach>
static void tile_full(const float* x, int64_t stride, const void* data, int64_t inputs,
                      Fetch fetch, Floats (*out)[2]) {
  Floats sum[R][2];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) sum[r][0] = sum[r][1] = Floats{};
  const Floats* w = (const Floats*)data;
  for (int64_t k = 0; k < inputs; k++, w += 2) {
    fetch.ahead<reach>();
    Floats w0 = w[0], w1 = w[1];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      float a = x[r * stride + k];
      sum[r][0] += w0 * a;
      sum[r][1] += w1 * a;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) out[r][0] = sum[r][0], out[r][1] = sum[r][1];
}

typedef void (*Tile)(const float*, int64_t, const void*, int64_t, Fetch, Floats (*)[2]);

#if HAS_PAIRS
// As tile_half; x points to pairs of bfloat16, which its stride counts.
template <int R, Reach reach>
static void tile_pairs(const float* x, int64_t stride, const void* data, int64_t inputs,
                       Fetch fetch, Floats (*out)[2]) {
  Floats sum[R][2];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) sum[r][0] = sum[r][1] = Floats{};
  const Ints* w = (const Ints*)data;
  for (int64_t k = 0; k < inputs / 2; k++, w += 2) {
    fetch.ahead<reach>();
    Ints w0 = w[0], w1 = w[1];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      int32_t pair;
      memcpy(&pair, x + r * stride + k, sizeof pair);
      sum[r][0] = add_pair(sum[r][0], w0, pair);
      sum[r][1] = add_pair(sum[r][1], w1, pair);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) out[r][0] = sum[r][0], out[r][1] = sum[r][1];
}
#else
#define tile_pairs tile_half
#endif

template <Reach reach, int... R>
static Tile pick_tile(bool is_half, bool has_pairs, int rows, std::integer_sequence<int, R...>) {
  static const Tile half[] = {tile_half<R + 1, reach>...}, full[] = {tile_full<R + 1, reach>...};
  static const Tile pairs[] = {tile_pairs<R + 1, reach>...};
  return has_pairs ? pairs[rows - 1] : is_half ? half[rows - 1] : full[rows - 1];
}

static Tile pick_tile(bool is_half, bool has_pairs, int rows, Reach reach) {
  const auto all_rows = std::make_integer_sequence<int, MOST_ROWS>();
  const auto few_rows = std::make_integer_sequence<int, NEAR_ROWS>();
  if (reach == NEAR) return pick_tile<NEAR>(is_half, has_pairs, rows, few_rows);
  if (reach == DEEP) return pick_tile<DEEP>(is_half, has_pairs, rows, all_rows);
  if (reach == FAR) return pick_tile<FAR>(is_half, has_pairs, rows, all_rows);
  return pick_tile<NONE>(is_half, has_pairs, rows, all_rows);
}

// One thread's panels of out = x @ W. With `gates` an output is activation(gate) * up. Inputs and
// outputs are floats, or Half in a model that rounds to bfloat16.
template <typename In, typename Out>
struct Product {
  const Matrix& matrix;
  const In* x;
  int64_t rows;
  Out* out;
  int64_t out_stride;
  const Model& model;
  bool gates;
  Best* best = nullptr;  // this thread's, one for each row; of a head without soft-cap

  void keep(int64_t panel, int64_t row, const Floats* sum) const {
    Floats a = sum[0], b = sum[1];
    if (matrix.scale) {
      a *= load(matrix.scale + panel * PANEL);
      b *= load(matrix.scale + panel * PANEL + LANES);
    }
    if (matrix.bias) {
      a += load(matrix.bias + panel * PANEL);
      b += load(matrix.bias + panel * PANEL + LANES);
    }
    a = rounded(a, model.is_rounded), b = rounded(b, model.is_rounded);
    Out* to = out + row * out_stride;
    if (gates) {
      Floats gate = rounded(activate(a, model.activation), model.is_rounded);
      store(to + panel * LANES, rounded(gate * b, model.is_rounded));
      return;
    }
    int64_t left = matrix.outputs - panel * PANEL;
    if (best) best[row].see(panel, left, a, b);
    if (left >= PANEL) {
      store(to + panel * PANEL, a);
      store(to + panel * PANEL + LANES, b);
    } else {
      Out part[PANEL];
      store(part, a), store(part + LANES, b);
      memcpy(to + panel * PANEL, part, left * sizeof(Out));
    }
  }

  void run(Worker me) const {
    if (matrix.kind >= INT8)
      run_quantised(me);
    else
      run_floats(me);
  }

  void run_quantised(Worker me) const {
    const int64_t first = me.first(matrix.panels), last = me.last(matrix.panels);
    const int64_t bytes = panel_bytes(matrix);
    static thread_local Rounded inputs;
    inputs.fill(x, rows, matrix.inputs);
    const int64_t tiles = (rows + QUANTISED_ROWS - 1) / QUANTISED_ROWS;
    for (int64_t panel = first; panel < last; panel++) {
      const char* data = (const char*)matrix.data + panel * bytes;
      for (int64_t t = 0; t < tiles; t++) {  // of like size: 16 rows are 6, 5 and 5
        const int64_t a = rows * t / tiles, b = rows * (t + 1) / tiles;
        const Reach reach = Fetch::reach(b - a, t, tiles);
        QuantisedTile tile = pick_quantised(matrix.kind == INT4, (int)(b - a), reach);
        Floats sums[QUANTISED_ROWS][2];
        tile(inputs, a, data, Fetch(data, bytes, t, tiles, reach), sums);
        for (int64_t r = a; r < b; r++) keep(panel, r, sums[r - a]);
      }
    }
  }

  // Inputs in the type that a tile reads.
  template <typename Type>
  static const Type* as(const In* given, int64_t count) {
    if constexpr (sizeof(Type) == sizeof(In)) {
      return given;
    } else {
      static thread_local std::vector<Type> made;
      made.resize(count);
      convert(given, count, made.data());
      return made.data();
    }
  }

  void run_floats(Worker me) const {
    int64_t first = me.first(matrix.panels), last = me.last(matrix.panels);
    int64_t block = std::max<int64_t>(1, 98304 / (matrix.inputs * MOST_ROWS)) * MOST_ROWS;
    const int64_t bytes = panel_bytes(matrix);
    const bool is_half = matrix.kind == BFLOAT16;
    const bool has_pairs = HAS_PAIRS && is_half && model.is_rounded;
    const int64_t stride = has_pairs ? matrix.inputs / 2 : matrix.inputs;
    for (int64_t start = 0; start < rows; start += block) {
      int64_t count = std::min(block, rows - start);
      int64_t tiles = (count + MOST_ROWS - 1) / MOST_ROWS;
      const In* given = x + start * matrix.inputs;
      const int64_t numbers = count * matrix.inputs;
      const float* input =
          has_pairs ? (const float*)as<Half>(given, numbers) : as<float>(given, numbers);
      for (int64_t panel = first; panel < last; panel++) {
        const char* data = (const char*)matrix.data + panel * bytes;
        for (int64_t t = 0; t < tiles; t++) {  // of like size: 16 rows are 8 and 8
          const int64_t a = start + count * t / tiles, b = start + count * (t + 1) / tiles;
          const Reach reach = Fetch::reach(b - a, t, tiles);
          Tile tile = pick_tile(is_half, has_pairs, (int)(b - a), reach);
          Floats sums[MOST_ROWS][2];
          tile(input + (a - start) * stride, stride, data, matrix.inputs,
               Fetch(data, bytes, t, tiles, reach), sums);
          for (int64_t r = a; r < b; r++) keep(panel, r, sums[r - a]);
        }
      }
    }
  }
};
