// Whole draft trees, level by level, for heads whose bias follows from the last token alone: what
// dspark/draft/grow.py (RankedGrowth) and dspark/draft/calibration.py (SurvivalMap) do in Python.
//
// Levels of all requests are one step: their rows go through one product with the head's second
// matrix. Thread 0 keeps the trees; products and rows are parted among all.

#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "draft.h"

extern "C" {

struct Rating {  // a survival map: by rank up to the width, and by depth
  const double *bias, *share, *lift, *confidence;
  const double *depth, *temperature;
};

struct Grown {
  int64_t block, budget, depth, width, most, beams, anchor, room;
  double min_survival;
  float temperature;
  const float* const* noise;  // [depth]: by token, or null where there is none
  const Rating* rating;       // or null
  // Out: nodes in the order they were added, `count` of them; -1 where a logit was no number.
  int64_t count;
  int64_t *token, *parent, *level;  // [room]
  double* survival;                 // [room]
};

struct Growing {
  int64_t requests, columns, depths, threads, rank;
  Grown* const* grown;
  Matrix bias;                 // latent -> what it adds to the base; no outputs: nothing is added
  const void* first;           // [tokens, rank] in float32, or bfloat16 if `is_half`
  int64_t is_half;
  const float* base;           // [requests, depths, columns]
  const int64_t* ids;          // [columns], or null
  const float* sure;           // [requests, depths]: confidence but for the token's part, or null
  const float* sure_of_token;  // [rank], or null
  int64_t rows;                // most of a level
  float *latent, *logits;      // [rows, rank], [rows, columns]
};
}

struct GrowStep {
  const Growing& g;
  const Model& rounding;
  mutable Meeting meeting;

  struct Row {
    Grown* tree;
    int64_t node;
  };

  static constexpr double LIMIT = 30.0, LEAST = 1e-6;

  mutable std::vector<Row> which;  // rows of this level
  mutable std::vector<int64_t> base_row, column, starts;
  mutable std::vector<float> temperature, value, log_sum;
  mutable std::vector<const float*> noise;
  mutable Branches b{};

  void run(Worker me) const {
    int64_t most = 1;
    for (int64_t i = 0; i < g.requests; i++) most = std::max(most, g.grown[i]->most);
    for (int64_t level = 0;; level++) {
      if (me.index == 0) begin(level, most);
      meeting.wait(me.count);
      if (!b.rows) return;
      const BranchStep step{b, rounding, {}};
      if (b.bias.outputs) {
        Product<float, float>{b.bias, b.latent, b.rows, b.logits, b.columns, rounding, false}
            .run(me);
        meeting.wait(me.count);
      }
      for (int64_t r = me.index; r < b.rows; r += me.count) step.row(r);
      meeting.wait(me.count);
      if (me.index == 0) end(most);
    }
  }

  float number(int64_t token, int64_t k) const {
    const int64_t at = token * g.rank + k;
    if (!g.is_half) return ((const float*)g.first)[at];
    uint32_t bits = (uint32_t)((const uint16_t*)g.first)[at] << 16;
    float v;
    memcpy(&v, &bits, sizeof v);
    return v;
  }

  static int64_t last_token(const Row& row) {
    return row.node < 0 ? row.tree->anchor : row.tree->token[row.node];
  }

  // The rows of a level, and what they start from.
  void begin(int64_t level, int64_t most) const {
    which.clear();
    starts.resize(g.requests);
    for (int64_t i = 0; i < g.requests; i++) expand(*g.grown[i], level, starts[i]);
    const int64_t rows = which.size();
    base_row.resize(rows), temperature.resize(rows), noise.resize(rows);
    column.resize(rows * most), value.resize(rows * most), log_sum.resize(rows);
    for (int64_t r = 0; r < rows; r++) {
      const Grown& t = *which[r].tree;
      base_row[r] = t.block * g.depths + level;
      temperature[r] = t.temperature;
      noise[r] = t.noise ? t.noise[level] : nullptr;
      const int64_t token = last_token(which[r]);
      for (int64_t k = 0; k < g.rank; k++) g.latent[r * g.rank + k] = number(token, k);
    }
    b = Branches{rows,           g.columns,    most,         g.threads,     g.bias,
                 g.latent,       g.base,       base_row.data(), temperature.data(),
                 noise.data(),   g.ids,        g.logits,     column.data(), value.data(),
                 log_sum.data()};
  }

  // The best nodes of the newest level that are still among the best of all (EAGLE-2).
  void expand(Grown& t, int64_t level, int64_t& start) const {
    if (t.count < 0 || level >= std::min(t.depth, g.depths) || t.budget == 0) return;
    if (level == 0) {
      start = 0;
      which.push_back({&t, -1});
      return;
    }
    std::vector<int64_t> order(t.count);
    for (int64_t i = 0; i < t.count; i++) order[i] = i;
    const int64_t best = std::min(t.budget, t.count);
    std::partial_sort(order.begin(), order.begin() + best, order.end(), [&](int64_t i, int64_t j) {
      return t.survival[i] != t.survival[j] ? t.survival[i] > t.survival[j] : i < j;
    });
    std::vector<int64_t> chosen;
    for (int64_t i = 0; i < best && (int64_t)chosen.size() < t.beams; i++)
      if (order[i] >= start && t.survival[order[i]] >= t.min_survival) chosen.push_back(order[i]);
    std::sort(chosen.begin(), chosen.end());
    for (int64_t node : chosen) which.push_back({&t, node});
    start = t.count;
  }

  void end(int64_t most) const {
    std::vector<double> share(most), rate(most);
    for (int64_t r = 0; r < b.rows; r++) {
      Grown& t = *which[r].tree;
      if (t.count < 0) continue;
      if (!std::isfinite(log_sum[r])) {
        t.count = -1;
        continue;
      }
      const float* v = value.data() + r * most;
      const int64_t seen = std::min(t.most, g.columns), width = std::min(t.width, g.columns);
      double sum = 0.0;
      for (int64_t k = 0; noise[r] && k < seen; k++) sum += std::exp((double)v[k] - v[0]);
      for (int64_t k = 0; k < width; k++)
        share[k] = noise[r] ? std::exp((double)v[k] - v[0]) / sum
                            : std::exp((double)v[k] - log_sum[r]);
      rates(t, which[r], base_row[r], width, share.data(), rate.data());
      const int64_t node = which[r].node, *found = column.data() + r * most;
      const double above = node < 0 ? 1.0 : t.survival[node];
      for (int64_t k = 0; k < width && t.count < t.room; k++) {
        if (!(share[k] > 0.0)) continue;
        const int64_t i = t.count++;
        t.token[i] = g.ids ? g.ids[found[k]] : found[k];
        t.parent[i] = node, t.level[i] = node < 0 ? 1 : t.level[node] + 1;
        t.survival[i] = std::min(above, above * rate[k]);
      }
    }
  }

  // rho of siblings out of their shares; see dspark/draft/calibration.py.
  void rates(const Grown& t, const Row& row, int64_t place, int64_t width, const double* share,
             double* rate) const {
    if (!t.rating) {
      std::copy(share, share + width, rate);
      return;
    }
    const Rating& m = *t.rating;
    const int64_t level = row.node < 0 ? 0 : t.level[row.node];
    double sure = 0.0;
    if (g.sure) {
      sure = g.sure[place];
      const int64_t token = last_token(row);
      for (int64_t k = 0; g.sure_of_token && k < g.rank; k++)
        sure += g.sure_of_token[k] * number(token, k);
      sure = sure == sure ? std::min(std::max(sure, -LIMIT), LIMIT) : 0.0;
    }
    double left = 1.0, untaken = 1.0, before = 1.0;
    for (int64_t k = 0; k < width; k++) {
      left -= share[k];
      const double odds = std::log(std::max(share[k], LEAST)) - std::log(std::max(left, LEAST));
      double logit = m.bias[k] + m.share[k] * odds + m.lift[k] / (1.0 + std::exp(-odds));
      logit += m.confidence[k] * sure;
      logit = (logit + m.depth[level]) / m.temperature[level];
      logit = std::min(std::max(logit, -LIMIT), LIMIT);
      const double hazard = 1.0 / (1.0 + std::exp(-logit));
      before = rate[k] = std::min(before, hazard * untaken);
      untaken *= 1.0 - hazard;
    }
  }
};
