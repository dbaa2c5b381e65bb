// A whole decoder forward over the flattened ragged batch, in one call.
//
// Every sum has an order of its own that depends on nothing but the row: a product adds its inputs
// one after another, whatever the number of rows; a softmax sums by position, in vectors that start
// at multiples of LANES; a node of a tree reads its ancestors in order of depth, as plain decoding
// would. Threads part outputs, rows and heads, never a sum. So a row has the same bits in any
// company, which the check at load and the tests confirm rather than bring about.
//
// Activations are float32. For a bfloat16 model they are rounded wherever the stock modules round, and
// kept as bfloat16 between the stages where products take pairs of it (pairs.h).
// Weights are packed in panels of 2 * LANES outputs, either as float32, or as bfloat16 in pairs of
// neighbouring inputs that a shift and a mask widen in registers, or that AVX512-BF16 multiplies.

#include <vector>

#include "attention.h"
#include "best.h"
#include "draft.h"
#include "grow.h"
#include "products.h"
#include "threads.h"

#ifdef _OPENMP
#include <omp.h>
#endif

struct Item {
  int64_t span, head, row, rows;
};

struct Plan {
  std::vector<int64_t> depth, path_rows;
  std::vector<const int64_t*> path;
  std::vector<int64_t> span_of;
  std::vector<Item> items;
  int64_t columns = 0;

  Plan(const Model& m, const Step& s) : depth(s.rows), path(s.rows, nullptr), span_of(s.rows) {
    size_t room = 0;
    const int64_t most = std::max<int64_t>(1, MOST_QUERIES / (m.heads / m.kv_heads));
    const bool is_few = s.spans * m.kv_heads < 2 * s.threads;  // to share out between threads
    for (int64_t i = 0; i < s.spans; i++) {
      const Span& span = s.span[i];
      columns = std::max(columns, span.length + span.rows);
      for (int64_t r = span.row; r < span.row + span.rows; r++) {
        span_of[r] = i;
        if (span.shape == BLOCK_OF_ALL)
          depth[r] = span.rows - 1;
        else
          depth[r] = s.parent[r] < 0 ? 0 : depth[s.parent[r]] + 1;
        if (span.shape == TREE) room += depth[r] + 1;
      }
      int64_t tiles = (span.rows + most - 1) / most;
      if (is_few) tiles = std::min(span.rows, 2 * tiles);
      for (int64_t h = 0; h < m.kv_heads; h++)
        for (int64_t t = 0; t < tiles; t++) {
          int64_t a = span.rows * t / tiles, b = span.rows * (t + 1) / tiles;
          items.push_back({i, h, a, b - a});
        }
    }
    path_rows.resize(room);
    int64_t* next = path_rows.data();
    for (int64_t r = 0; r < s.rows; r++) {
      const Span& span = s.span[span_of[r]];
      if (span.shape != TREE) continue;
      path[r] = next;
      int64_t at = r;
      for (int64_t i = depth[r]; i >= 0; i--, at = s.parent[at]) next[i] = at - span.row;
      next += depth[r] + 1;
    }
  }
};

static int64_t padded(int64_t n) { return (n + 63) / 64 * 64; }

static int64_t scratch_floats(const Model& m, int64_t columns) {
  return padded(KEY_BLOCKS * m.head_dim * LANES +
                MOST_QUERIES * (2 * m.head_dim + columns + 2 * LANES));
}

// A is what activations are between the stages: float, or Half where products take pairs.
template <typename A>
struct Forward {
  const Model& m;
  const Step& s;
  const Plan plan;
  A *normed, *qkv, *mixed, *inner, *y, *chosen;
  float* scratch;
  mutable Meeting meeting;
  mutable std::vector<std::atomic<int64_t>> taken;  // per layer: items of attention
  mutable std::vector<Best> best;                   // of each thread, one for each output

  Forward(const Model& model, const Step& step)
      : m(model), s(step), plan(model, step), taken(model.layers),
        best(step.best ? step.threads * step.outputs : 0) {
    const int64_t heads = m.heads * m.head_dim, all_heads = heads + 2 * m.kv_heads * m.head_dim;
    float* next = s.work;
    auto take = [&](int64_t n) {
      A* p = (A*)next;
      next += padded(n);
      return p;
    };
    normed = take(s.rows * m.hidden);
    qkv = take(s.rows * all_heads);
    mixed = take(s.rows * heads);
    inner = take(s.rows * m.inner);
    y = take(s.rows * m.hidden);
    chosen = take(s.outputs * m.hidden);
    scratch = next;
  }

  // x += y (behind a norm, if there is one); then the next norm of x.
  template <typename Out>
  void residual(const float* after, const float* before, float* keep, Out* out, Worker me,
                bool has_y) const {
    for (int64_t r = me.index; r < s.rows; r += me.count) {
      float* x = s.x + r * m.hidden;
      A* add = y + r * m.hidden;
      if (has_y && after) normalize(m, add, after, m.hidden, add);
      Floats squares = Floats{};
      for (int64_t i = 0; i < m.hidden; i += LANES) {
        Floats v = load(x + i);
        if (has_y) store(x + i, v = rounded(v + load(add + i), m.is_rounded));
        squares += v * v;
      }
      if (keep) memcpy(keep + r * m.hidden, x, m.hidden * sizeof(float));
      normalize_by(m, squares, x, before, m.hidden, out + r * m.hidden);
    }
  }

  void meet(Worker me) const { meeting.wait(me.count); }

  void product(const Matrix& w, const A* x, int64_t rows, A* out, int64_t stride, Worker me,
               bool gates = false) const {
    Product<A, A>{w, x, rows, out, stride, m, gates}.run(me);
  }

  void attend(const Layer& layer, int64_t index, Worker me) const {
    if (m.keeps_half)
      attend<Half>(layer, index, me);
    else
      attend<float>(layer, index, me);
  }

  template <typename Kept>
  void attend(const Layer& layer, int64_t index, Worker me) const {
    const int64_t dim = m.head_dim, per_row = m.heads + 2 * m.kv_heads;
    Attention<Kept, A> a{m, s, layer, index, qkv, mixed, plan.depth.data(), plan.path.data()};
    const int64_t parts = s.rows * per_row;
    for (int64_t i = me.first(parts); i < me.last(parts); i++) {
      const int64_t row = i / per_row;
      a.prepare(s.span[plan.span_of[row]], row, i % per_row, qkv + row * per_row * dim);
    }
    meet(me);
    float* work = scratch + me.index * scratch_floats(m, plan.columns);
    const int64_t count = plan.items.size();
    for (int64_t i; (i = taken[index].fetch_add(1, std::memory_order_relaxed)) < count;) {
      const Item& item = plan.items[i];
      a.run(s.span[item.span], item.head, item.row, item.rows, work);
    }
    meet(me);
  }

  void run(Worker me) const {
    for (int64_t l = 0; l < m.layers; l++) {
      const Layer& layer = m.layer[l];
      residual(l ? m.layer[l - 1].norm_output : nullptr, layer.norm_in,
               l ? s.capture[l - 1] : nullptr, normed, me, l > 0);
      meet(me);
      product(layer.qkv, normed, s.rows, qkv, layer.qkv.outputs, me);
      meet(me);
      attend(layer, l, me);
      product(layer.out, mixed, s.rows, y, m.hidden, me);
      meet(me);
      residual(layer.norm_attention, layer.norm_mlp, nullptr, normed, me, true);
      meet(me);
      product(layer.gate_up, normed, s.rows, inner, m.inner, me, true);
      meet(me);
      product(layer.down, inner, s.rows, y, m.hidden, me);
      meet(me);
    }
    residual(m.layer[m.layers - 1].norm_output, m.norm, s.capture[m.layers - 1], s.normed, me,
             true);
    if (!s.outputs) return;  // a draft may have a head that is not ours, or none here at all
    meet(me);
    for (int64_t i = me.index; i < s.outputs; i += me.count)
      convert(s.normed + s.output_rows[i] * m.hidden, m.hidden, chosen + i * m.hidden);
    meet(me);
    unembed(chosen, s.outputs, s.logits, me);
  }

  template <typename In>
  void unembed(const In* x, int64_t rows, float* logits, Worker me) const {
    Best* own_best = best.empty() ? nullptr : best.data() + me.index * rows;
    Product<In, float>{m.head, x, rows, logits, m.head.outputs, m, false, own_best}.run(me);
    if (own_best) {
      meet(me);
      for (int64_t r = me.index; r < rows; r += me.count)
        s.best[r] = Best::of(best.data() + r, me.count, rows);
    }
    if (m.logit_softcap == 0.0f) return;
    meet(me);
    const int64_t count = m.head.outputs, whole = count / LANES * LANES;
    for (int64_t r = me.index; r < rows; r += me.count) {
      float* row = logits + r * count;
      for (int64_t i = 0; i < whole; i += LANES) store(row + i, capped(load(row + i)));
      if (whole < count) {
        float part[LANES] = {};
        memcpy(part, row + whole, (count - whole) * sizeof(float));
        store(part, capped(load(part)));
        memcpy(row + whole, part, (count - whole) * sizeof(float));
      }
    }
  }

  Floats capped(Floats v) const {
    const bool rounds = m.is_rounded;
    Floats t = rounded(hyperbolic_tangent(rounded(v / m.logit_softcap, rounds)), rounds);
    return rounded(t * m.logit_softcap, rounds);
  }
};

// Run body(worker) on up to `most` threads; a runtime may give fewer.
template <typename Body>
static void in_threads(int64_t most, const Body& body) {
#ifdef _OPENMP
#pragma omp parallel num_threads((int)most)
  body(Worker{omp_get_thread_num(), omp_get_num_threads()});
#else
  (void)most;
  body(Worker{0, 1});
#endif
}

template <typename A>
static void run_forward(const Model& model, const Step& step) {
  const Forward<A> forward(model, step);
  in_threads(step.threads, [&](Worker me) {
    forward.run(me);
    forward.meet(me);  // before OpenMP's own barrier, at which nobody waits then
  });
}

extern "C" {

// Facts that the packing must know: lanes, mes that exist (1 without OpenMP).
int64_t dspark_lanes() { return LANES; }

int64_t dspark_has_threads() {
#ifdef _OPENMP
  return 1;
#else
  return 0;
#endif
}

int64_t dspark_work_floats(const Model* m, int64_t rows, int64_t outputs, int64_t columns,
                           int64_t threads) {
  const int64_t heads = m->heads * m->head_dim;
  int64_t floats = 2 * padded(rows * m->hidden) + padded(rows * heads) + padded(rows * m->inner) +
                   padded(rows * (heads + 2 * m->kv_heads * m->head_dim)) +
                   padded(outputs * m->hidden);
  return floats + threads * scratch_floats(*m, columns);
}

void dspark_forward(const Model* model, const Step* step) {
  if (HAS_PAIRS && model->is_rounded)
    run_forward<Half>(*model, *step);
  else
    run_forward<float>(*model, *step);
}

void dspark_unembed(const Model* model, const Step* step) {  // normed [outputs, hidden] -> logits
  const Forward<float> forward(*model, *step);
  in_threads(step->threads, [&](Worker me) {
    forward.unembed(step->normed, step->outputs, step->logits, me);
  });
}

// Keys and values of a draft's context.
void dspark_context(const Model* model, const Context* context, const Step* step) {
  const ContextForward forward{*model, *context, *step, {}};
  in_threads(step->threads, [&](Worker me) { forward.run(me); });
}

// Children of a draft tree's nodes; the bias is rounded to bfloat16 once if `is_rounded`.
void dspark_branches(const Branches* branches, int64_t is_rounded) {
  Model rounding{};
  rounding.is_rounded = is_rounded;
  const BranchStep step{*branches, rounding, {}};
  in_threads(branches->threads, [&](Worker me) { step.run(me); });
}

// Whole trees; as dspark_branches.
void dspark_grow(const Growing* growing, int64_t is_rounded) {
  Model rounding{};
  rounding.is_rounded = is_rounded;
  const GrowStep step{*growing, rounding};
  in_threads(growing->threads, [&](Worker me) { step.run(me); });
}

// out [rows, outputs] = x [rows, inputs] @ W + bias, rounded to bfloat16 once if `is_rounded`.
void dspark_linear(const Matrix* matrix, const float* x, int64_t rows, float* out,
                   int64_t is_rounded, int64_t threads) {
  Model model{};
  model.is_rounded = is_rounded;
  const Product<float, float> product{*matrix, x, rows, out, matrix->outputs, model, false};
  in_threads(threads, [&](Worker me) { product.run(me); });
}
}
