// Norms, rotary embedding and attention over the K/V store, row by row and head by head.
//
// Scores are made LANES columns at a time (kept.h); a softmax sums by position, in vectors that start
// at multiples of LANES; values are added in order of position. A node of a tree reads its ancestors
// in order of depth, so its sums are those of plain decoding.

#pragma once

#include <algorithm>
#include <cmath>
#include <utility>

#include "kept.h"
#include "step.h"
#include "vectors.h"

#define MOST_QUERIES 32  // rows times heads of a group that share what is read of keys and values

template <typename In, typename Out>
static void normalize_by(const Model& m, Floats squares, const In* x, const float* weight,
                         int64_t n, Out* out) {
  float factor = 1.0f / std::sqrt(total(squares) / (float)n + m.eps);
  for (int64_t i = 0; i < n; i += LANES) {
    Floats unit = load(x + i) * factor;
    if (m.rounds_unit_norm) unit = rounded(unit, m.is_rounded);
    store(out + i, rounded(unit * load(weight + i), m.is_rounded));
  }
}

template <typename In, typename Out>
static void normalize(const Model& m, const In* x, const float* weight, int64_t n, Out* out) {
  Floats squares = Floats{};
  for (int64_t i = 0; i < n; i += LANES) {
    Floats v = load(x + i);
    squares += v * v;
  }
  normalize_by(m, squares, x, weight, n, out);
}

static float round_one(float v, bool is_rounded) {
  if (!is_rounded || v != v) return v;
  uint32_t bits;
  memcpy(&bits, &v, 4);
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
  memcpy(&v, &bits, 4);
  return v;
}

template <typename A>
static void rotate(const Model& m, A* x, const float* table) {
  const int64_t half = m.head_dim / 2;
  const float *cosine = table, *sine = table + half;
  int64_t i = 0;
  if (!m.is_rounded) {
    for (; i < half; i++) {
      const float a = widened(x[i]), b = widened(x[i + half]);
      narrow(a * cosine[i] - b * sine[i], x + i);
      narrow(b * cosine[i] + a * sine[i], x + i + half);
    }
    return;
  }
  for (; i + LANES <= half; i += LANES) {
    const Floats a = load(x + i), b = load(x + i + half), c = load(cosine + i), s = load(sine + i);
    store(x + i, to_bfloat16(to_bfloat16(a * c) - to_bfloat16(b * s)));
    store(x + i + half, to_bfloat16(to_bfloat16(b * c) + to_bfloat16(a * s)));
  }
  for (; i < half; i++) {
    const float a = widened(x[i]), b = widened(x[i + half]), c = cosine[i], s = sine[i];
    narrow(round_one(round_one(a * c, true) - round_one(b * s, true), true), x + i);
    narrow(round_one(round_one(b * c, true) + round_one(a * s, true), true), x + i + half);
  }
}

// Kept is what a key or value is kept as, A what the activations are: float, or Half in a model that
// rounds to bfloat16.
template <typename Kept, typename A>
struct Attention {
  const Model& model;
  const Step& step;
  const Layer& layer;
  int64_t index;         // of the layer
  const A* qkv;          // [rows, (heads + 2 kv_heads) * head_dim]
  A* out;                // [rows, heads * head_dim]
  const int64_t* depth;  // [rows]: rows of the span that a row sees besides itself
  const int64_t* const* path;  // rows of the span on a tree row's path, itself included

  int64_t width() const { return (model.heads + 2 * model.kv_heads) * model.head_dim; }

  const Piece& piece_of(const Span& span, int64_t column) const {
    const Piece* p = step.piece + span.piece;
    while (column >= p->start + p->columns) p++;
    return *p;
  }

  Kept* key(const Piece& p, int64_t head, int64_t column) const {
    int64_t row = (index * model.kv_heads + head) * p.tokens + column - p.start;
    return (Kept*)p.keys + row * model.head_dim;
  }

  Kept* value(const Piece& p, int64_t head, int64_t column) const {
    int64_t row = (index * model.kv_heads + head) * p.tokens + column - p.start;
    return (Kept*)p.values + row * model.head_dim;
  }

  template <int B>
  void score_blocks(const float* const* query, int64_t queries, const float* keys, float* scores,
                    int64_t stride) const {
    for (int64_t q = 0; q < queries;) {
      float* to[6];
      for (int i = 0; i < 6; i++) to[i] = scores + (q + i) * stride;
      const int64_t left = queries - q, dim = model.head_dim;
      if (left >= 6) score<Kept, 6, B>(query + q, keys, dim, to), q += 6;
      else if (left >= 3) score<Kept, 3, B>(query + q, keys, dim, to), q += 3;
      else if (left >= 2) score<Kept, 2, B>(query + q, keys, dim, to), q += 2;
      else score<Kept, 1, B>(query + q, keys, dim, to), q += 1;
    }
  }

  // Scores -> weights in place; weights outside [low, high) become 0. Returns their sum.
  float weigh(float* scores, int64_t first, int64_t end, int64_t low, int64_t high) const {
    const float infinity = __builtin_inff();
    Ints lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    Floats most = all(-infinity);
    for (int64_t c = first; c < end; c += LANES) {
      Ints column = lane + (int32_t)c;
      Ints seen = (column >= (int32_t)low) & (column < (int32_t)high);
      Floats s = load(scores + c - first);
      if (layer.softcap != 0.0f)
        s = layer.softcap * hyperbolic_tangent(s / layer.softcap);
      s = choose(seen, s, all(-infinity));
      store(scores + c - first, s);
      most = larger(s, most);
    }
    float top = most[0];
    for (int i = 1; i < LANES; i++) top = most[i] > top ? most[i] : top;
    Floats sum = Floats{};
    for (int64_t c = first; c < end; c += LANES) {
      Floats s = load(scores + c - first);
      Floats w = choose(s == all(-infinity), Floats{}, exponential(s - top));
      store(scores + c - first, w);
      sum += w;
    }
    return total(sum);
  }

  void run(const Span& span, int64_t head, int64_t row, int64_t rows, float* work) const {
    const int64_t group = model.heads / model.kv_heads, dim = model.head_dim;
    const int64_t queries = rows * group;
    const int64_t own = span.row + row;  // first row of the batch
    int64_t end = span.length + (span.shape == CHAIN ? row + rows : span.rows);
    int64_t first = 0;
    if (layer.window > 0) {
      first = end;
      for (int64_t r = 0; r < rows; r++)
        first = std::min(first, span.length + depth[own + r] - layer.window + 1);
      if (span.shape == TREE) first = std::min(first, span.length);
      first = std::max<int64_t>(0, first) / LANES * LANES;
    }
    const int64_t stride = (end - first + LANES - 1) / LANES * LANES;
    float* keys = work;
    float* sums = keys + KEY_BLOCKS * dim * LANES;
    float* scaled = sums + MOST_QUERIES * dim;
    float* scores = scaled + MOST_QUERIES * dim;
    const float* query[MOST_QUERIES];
    for (int64_t q = 0; q < queries; q++, scaled += dim) {
      const A* x = qkv + (own + q / group) * width() + (head * group + q % group) * dim;
      for (int64_t d = 0; d < dim; d += LANES) store(scaled + d, load(x + d) * layer.scale);
      query[q] = scaled;
    }

    for (int64_t c = first; c < end;) {
      const int64_t start = c;
      for (int64_t b = 0; b < KEY_BLOCKS && c < end; b++, c += LANES) {
        const Piece& p = piece_of(span, c);
        const Kept* block = key(p, head, c);
        fetch_block(block + LANES * dim, value(p, head, c), dim);
        transpose(block, dim, keys + b * dim * LANES / (sizeof(float) / sizeof(Kept)));
      }
      if (c - start == KEY_BLOCKS * LANES)
        score_blocks<KEY_BLOCKS>(query, queries, keys, scores + start - first, stride);
      else
        score_blocks<1>(query, queries, keys, scores + start - first, stride);
    }
    float total_weight[MOST_QUERIES];
    for (int64_t q = 0; q < queries; q++) {
      const int64_t r = own + q / group;
      float* s = scores + q * stride;
      if (span.shape == TREE)  // the path's columns side by side, as plain decoding has them
        for (int64_t i = 0; i <= depth[r]; i++)
          s[span.length + i - first] = s[span.length + path[r][i] - first];
      const int64_t high = span.length + depth[r] + 1;
      const int64_t low = layer.window > 0 ? high - layer.window : 0;
      total_weight[q] = weigh(s, first, end, low, high);
    }
    memset(sums, 0, queries * dim * sizeof(float));
    const int64_t shared = span.shape == TREE ? span.length : end;
    for (int64_t c = first; c < shared;) {
      const Piece& p = piece_of(span, c);
      const int64_t stop = std::min(shared, p.start + p.columns);
      add_shared(scores + c - first, stride, queries, value(p, head, c), stop - c, sums);
      c = stop;
    }
    for (int64_t q = 0; q < queries && span.shape == TREE; q += group) {
      const int64_t r = own + q / group;
      for (int64_t i = 0; i <= depth[r]; i++) {
        const int64_t column = span.length + path[r][i];
        add_shared(scores + q * stride + span.length + i - first, stride, group,
                   value(piece_of(span, column), head, column), 1, sums + q * dim);
      }
    }
    for (int64_t q = 0; q < queries; q++) {
      float* sum = sums + q * dim;
      const int64_t r = own + q / group;
      A* to = out + r * model.heads * dim + (head * group + q % group) * dim;
      in_order<Kept>(sum, dim);
      for (int64_t d = 0; d < dim; d += LANES)
        store(to + d, rounded(load(sum + d) / total_weight[q], model.is_rounded));
    }
  }

  void add_shared(const float* weights, int64_t stride, int64_t queries, const Kept* values,
                  int64_t columns, float* sums) const {
    for (int64_t q = 0; q < queries;) {
      const float* weight[6];
      float* to[6];
      for (int i = 0; i < 6; i++)
        weight[i] = weights + (q + i) * stride, to[i] = sums + (q + i) * model.head_dim;
      int64_t left = queries - q;
      if (left >= 6) add_values<6>(weight, values, model.head_dim, columns, to), q += 6;
      else if (left >= 3) add_values<3>(weight, values, model.head_dim, columns, to), q += 3;
      else if (left >= 2) add_values<2>(weight, values, model.head_dim, columns, to), q += 2;
      else add_values<1>(weight, values, model.head_dim, columns, to), q += 1;
    }
  }

  // Norm and rotate one head's query, or norm, rotate and keep one head's key, or its value.
  void prepare(const Span& span, int64_t row, int64_t item, A* heads) const {
    prepare_one(span, row, item, heads + item * model.head_dim);
  }

  void prepare_one(const Span& span, int64_t row, int64_t item, A* x) const {
    const int64_t dim = model.head_dim;
    const bool is_query = item < model.heads;
    const bool is_key = !is_query && item < model.heads + model.kv_heads;
    if (is_query || is_key) {
      const float* weight = is_query ? layer.norm_query : layer.norm_key;
      if (weight) normalize(model, x, weight, dim, x);
      rotate(model, x, step.rope[layer.rope] + step.positions[row] * dim);
    }
    if (is_query) return;
    const int64_t column = span.length + row - span.row;
    const Piece& p = piece_of(span, column);
    const int64_t head = item - model.heads - (is_key ? 0 : model.kv_heads);
    convert(x, dim, is_key ? key(p, head, column) : value(p, head, column));
  }
};
