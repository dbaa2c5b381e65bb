// What a draft that predicts blocks computes besides the block itself (Forward): keys and values of
// the context out of the target's hidden states, and the children of a tree's nodes.

#pragma once

#include <algorithm>
#include <cmath>

#include "attention.h"
#include "products.h"
#include "threads.h"

extern "C" {

struct Context {
  Matrix combine;             // captured hidden states -> c
  const float* norm;          // [hidden]: of c
  const Matrix* keys_values;  // of every layer: c -> its keys, then its values
  const float* features;      // [rows, combine.inputs]
  float* c;                   // [rows, hidden]
  float* made;                // [layers, rows, 2 * kv_heads * head_dim]
};

struct Branches {
  int64_t rows, columns, most, threads;
  Matrix bias;                // latent -> what it adds to the base; no outputs: nothing is added
  const float* latent;        // [rows, bias.inputs]
  const float* base;          // [.., columns]
  const int64_t* base_row;    // [rows]
  const float* temperature;   // [rows]: what the logits are divided by
  const float* const* noise;  // [rows]: by token, added behind that; or null
  const int64_t* ids;         // [columns]: token of a column, or null where they are the same
  float* logits;              // [rows, columns]
  int64_t* column;            // [rows, most]: the best, best first
  float* value;               // [rows, most]: of these
  float* log_sum;             // [rows]: log of the sum of e^value, 0 where there is noise
};
}

// Keys and values of new positions, written where Step says; x and what follows it is not used.
struct ContextForward {
  const Model& m;
  const Context& context;
  const Step& s;
  mutable Meeting meeting;

  void run(Worker me) const {
    const int64_t width = 2 * m.kv_heads * m.head_dim;
    Product<float, float>{context.combine, context.features, s.rows, context.c, m.hidden, m, false}
        .run(me);
    meeting.wait(me.count);
    for (int64_t r = me.index; r < s.rows; r += me.count)
      normalize(m, context.c + r * m.hidden, context.norm, m.hidden, context.c + r * m.hidden);
    meeting.wait(me.count);
    for (int64_t l = 0; l < m.layers; l++)
      Product<float, float>{
          context.keys_values[l], context.c, s.rows, context.made + l * s.rows * width, width, m, false}
          .run(me);
    meeting.wait(me.count);
    for (int64_t i = me.index; i < s.spans; i += me.count)
      for (int64_t l = 0; l < m.layers; l++) keep(l, s.span[i]);
    meeting.wait(me.count);  // before OpenMP's own barrier, at which nobody waits then
  }

  void keep(int64_t l, const Span& span) const {
    if (m.keeps_half)
      keep<Half>(l, span);
    else
      keep<float>(l, span);
  }

  template <typename Kept>
  void keep(int64_t l, const Span& span) const {
    const Attention<Kept, float> a{m, s, m.layer[l], l, nullptr, nullptr, nullptr, nullptr};
    const int64_t count = 2 * m.kv_heads;
    for (int64_t r = span.row; r < span.row + span.rows; r++)
      for (int64_t i = 0; i < count; i++)
        a.prepare_one(span, r, m.heads + i,
                      context.made + ((l * s.rows + r) * count + i) * m.head_dim);
  }
};

// The best columns of a few rows.
struct BranchStep {
  const Branches& b;
  const Model& rounding;
  mutable Meeting meeting;

  void run(Worker me) const {
    if (b.bias.outputs) {
      Product<float, float>{b.bias, b.latent, b.rows, b.logits, b.columns, rounding, false}.run(me);
      meeting.wait(me.count);
    }
    for (int64_t r = me.index; r < b.rows; r += me.count) row(r);
    meeting.wait(me.count);
  }

  void row(int64_t r) const {
    const float top = shape(r);
    if (b.noise[r]) perturb(r);
    find(r, top);
  }

  // A float at `i` of a row, and a vector; the last one of a row may be short.
  static Floats part(const float* row, int64_t i, int64_t count, float otherwise) {
    if (i + LANES <= count) return load(row + i);
    float some[LANES];
    for (int64_t k = 0; k < LANES; k++) some[k] = i + k < count ? row[i + k] : otherwise;
    return load(some);
  }

  static void put(float* row, int64_t i, int64_t count, Floats v) {
    if (i + LANES <= count) return store(row + i, v);
    float some[LANES];
    store(some, v);
    memcpy(row + i, some, (count - i) * sizeof(float));
  }

  // Bias and base, relative to the largest and divided by the temperature. Returns the largest, not
  // a number where there is one that is none.
  float shape(int64_t r) const {
    float* row = b.logits + r * b.columns;
    const float* base = b.base + b.base_row[r] * b.columns;
    Floats most = all(-__builtin_inff()), nothing = Floats{};
    for (int64_t i = 0; i < b.columns; i += LANES) {
      Floats v = part(base, i, b.columns, -__builtin_inff());
      if (b.bias.outputs) v += part(row, i, b.columns, 0.0f);
      put(row, i, b.columns, v);
      most = larger(most, v);
      nothing += choose(v == v, Floats{}, v);
    }
    float top = most[0];
    for (int k = 1; k < LANES; k++) top = std::max(top, most[k]);
    const float factor = 1.0f / b.temperature[r];
    for (int64_t i = 0; i < b.columns; i += LANES)
      put(row, i, b.columns, (part(row, i, b.columns, 0.0f) - top) * factor);
    return top + total(nothing);
  }

  void perturb(int64_t r) const {
    float* row = b.logits + r * b.columns;
    const float* noise = b.noise[r];
    if (b.ids)
      for (int64_t i = 0; i < b.columns; i++) row[i] += noise[b.ids[i]];
    else
      for (int64_t i = 0; i < b.columns; i++) row[i] += noise[i];
  }

  // The best, by falling value, then rising column. What is no number is never found.
  void find(int64_t r, float top) const {
    const float* row = b.logits + r * b.columns;
    int64_t* column = b.column + r * b.most;
    float* value = b.value + r * b.most;
    for (int64_t k = 0; k < b.most; k++) column[k] = -1, value[k] = -__builtin_inff();
    b.log_sum[r] = top;
    if (!(top - top == 0.0f)) return;
    Floats sum = Floats{};
    constexpr int64_t step = 8 * LANES;
    for (int64_t start = 0; start < b.columns; start += step) {
      const int64_t stop = std::min(start + step, b.columns);
      Floats most = all(-__builtin_inff());
      for (int64_t i = start; i < stop; i += LANES) {
        const Floats v = part(row, i, b.columns, -__builtin_inff());
        most = larger(most, v);
        if (!b.noise[r]) sum += choose(v > all(-80.0f), exponential(v), Floats{});
      }
      most = across<LANES / 2>(most, [](Floats a, Floats c) { return larger(a, c); });
      if (!(most[0] > value[b.most - 1])) continue;
      for (int64_t i = start; i < stop; i++) insert(row[i], i, column, value);
    }
    b.log_sum[r] = b.noise[r] ? 0.0f : std::log(total(sum));
  }

  void insert(float v, int64_t i, int64_t* column, float* value) const {
    int64_t k = b.most - 1;
    if (!(v > value[k])) return;
    for (; k > 0 && v > value[k - 1]; k--) value[k] = value[k - 1], column[k] = column[k - 1];
    value[k] = v, column[k] = i;
  }
};
