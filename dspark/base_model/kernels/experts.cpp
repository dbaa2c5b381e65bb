// DeepSeek-V4's routed experts over the rows of a batch, straight from the bytes of a checkpoint.
//
// Two calls a group of experts: gate and up products with the SwiGLU between them, then the down
// product, added to the rows in order of the experts. Between the calls the caller may round. Threads
// part outputs, never a sum, and every output of a row is one sum (fp4.h), so a row has the same bits
// in any company and with any number of threads.

#include <algorithm>
#include <cstdint>

#include "fp4.h"

#ifdef _OPENMP
#include <omp.h>
#endif

extern "C" {

struct Matrix {  // packed FP4 [outputs, inputs / 2] and e8m0 [outputs, inputs / 32]
  const uint8_t *codes, *scales;
};

struct Expert {
  Matrix gate, up, down;
  int64_t first, pairs;  // its rows among the pairs of row and expert
};

struct Group {
  int64_t experts, hidden, inner, threads, is_rounded;
  const Expert* expert;
  const int64_t* row;   // [pairs]
  const float* weight;  // [pairs], of the routing
  const float* x;       // [rows, hidden], or [pairs, inner] for the down product; arranged
  float* out;           // [pairs, inner], or [rows, hidden], added to
  float limit;          // of gate and up; 0: none
};
}

// One of the threads, and its share of a matrix's outputs, in vectors.
struct Worker {
  int64_t index, count;

  int64_t first(int64_t outputs) const { return outputs / LANES * index / count * LANES; }
  int64_t last(int64_t outputs) const { return outputs / LANES * (index + 1) / count * LANES; }
};

static int64_t arranged(int64_t inputs) { return (inputs + CHUNK - 1) / CHUNK * CHUNK; }

static Weights weights_of(const Matrix& matrix, int64_t output, int64_t inputs) {
  return {matrix.codes + output * (inputs / 2), matrix.scales + output * (inputs / GROUP)};
}

// NaN stays.
INLINE Floats clamped(Floats v, float low, float high) {
  v = choose(v > all(high), all(high), v);
  return choose(v < all(low), all(low), v);
}

// silu(gate) * up * weight; the gate is clamped from above alone.
static Floats swiglu(const Group& g, Floats gate, Floats up, float weight) {
  gate = rounded(gate, g.is_rounded), up = rounded(up, g.is_rounded);
  if (g.limit > 0) {
    gate = clamped(gate, -__builtin_inff(), g.limit);
    up = clamped(up, -g.limit, g.limit);
  }
  const Floats inner = activate(gate, 0) * up;
  return rounded(inner * weight, g.is_rounded);
}

static bool are_normal(const Matrix& matrix, int64_t output, int64_t inputs) {
  return are_normal(matrix.scales + output * (inputs / GROUP), LANES * (inputs / GROUP));
}

static void run_gate_up(const Group& g, const Expert& e, Worker me) {
  const int64_t bytes = g.hidden / 2, stride = arranged(g.hidden), end = e.first + e.pairs;
  for (int64_t block = me.first(g.inner); block < me.last(g.inner); block += LANES) {
    const bool is_any = !are_normal(e.gate, block, g.hidden) || !are_normal(e.up, block, g.hidden);
    const int64_t most = is_any ? 1 : TILE_ROWS;
    for (int64_t pair = e.first; pair < end; pair += most) {
      const int64_t rows = std::min(most, end - pair);
      const Multiply multiply_tile = multiply_rows(rows, is_any);
      const float* x[TILE_ROWS];
      for (int64_t r = 0; r < rows; r++) x[r] = g.x + g.row[pair + r] * stride;
      float gate[TILE_ROWS][LANES], up[TILE_ROWS][LANES];
      for (int64_t i = 0; i < LANES; i += 2) {
        const Weights weights[TILE_OUTPUTS] = {
            weights_of(e.gate, block + i, g.hidden), weights_of(e.gate, block + i + 1, g.hidden),
            weights_of(e.up, block + i, g.hidden), weights_of(e.up, block + i + 1, g.hidden)};
        float sums[TILE_ROWS][TILE_OUTPUTS];
        multiply_tile(x, weights, g.hidden, 2 * bytes, sums);
        for (int64_t r = 0; r < rows; r++) {
          gate[r][i] = sums[r][0], gate[r][i + 1] = sums[r][1];
          up[r][i] = sums[r][2], up[r][i + 1] = sums[r][3];
        }
      }
      for (int64_t r = 0; r < rows; r++)
        store(g.out + (pair + r) * g.inner + block,
              swiglu(g, load(gate[r]), load(up[r]), g.weight[pair + r]));
    }
  }
}

static void run_down(const Group& g, const Expert& e, Worker me) {
  const int64_t bytes = g.inner / 2, stride = arranged(g.inner), end = e.first + e.pairs;
  for (int64_t block = me.first(g.hidden); block < me.last(g.hidden); block += LANES) {
    const bool is_any = !are_normal(e.down, block, g.inner);
    const int64_t most = is_any ? 1 : TILE_ROWS;
    for (int64_t pair = e.first; pair < end; pair += most) {
      const int64_t rows = std::min(most, end - pair);
      const Multiply multiply_tile = multiply_rows(rows, is_any);
      const float* x[TILE_ROWS];
      for (int64_t r = 0; r < rows; r++) x[r] = g.x + (pair + r) * stride;
      float result[TILE_ROWS][LANES];
      for (int64_t i = 0; i < LANES; i += TILE_OUTPUTS) {
        Weights weights[TILE_OUTPUTS];
        for (int64_t w = 0; w < TILE_OUTPUTS; w++)
          weights[w] = weights_of(e.down, block + i + w, g.inner);
        float sums[TILE_ROWS][TILE_OUTPUTS];
        multiply_tile(x, weights, g.inner, TILE_OUTPUTS * bytes, sums);
        for (int64_t r = 0; r < rows; r++) memcpy(result[r] + i, sums[r], sizeof sums[r]);
      }
      for (int64_t r = 0; r < rows; r++) {
        float* out = g.out + g.row[pair + r] * g.hidden + block;
        store(out, load(out) + rounded(load(result[r]), g.is_rounded));
      }
    }
  }
}

// Run body(expert, worker) for every expert in order, on the threads that there are.
template <typename Body>
static void for_experts(const Group& g, const Body& body) {
#ifdef _OPENMP
#pragma omp parallel num_threads((int)g.threads)
  for (int64_t i = 0; i < g.experts; i++)
    body(g.expert[i], Worker{omp_get_thread_num(), omp_get_num_threads()});
#else
  for (int64_t i = 0; i < g.experts; i++) body(g.expert[i], Worker{0, 1});
#endif
}

extern "C" {

int64_t dspark_lanes() { return LANES; }

void dspark_gate_up(const Group* group) {
  for_experts(*group, [&](const Expert& e, Worker me) { run_gate_up(*group, e, me); });
}

void dspark_down(const Group* group) {
  for_experts(*group, [&](const Expert& e, Worker me) { run_down(*group, e, me); });
}
}
