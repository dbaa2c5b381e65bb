// The model and one forward, as dspark/adapters/fused/structures.py lays them out.

#pragma once

#include <cstdint>

extern "C" {

enum Kind { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2, INT4 = 3 };

struct Matrix {
  const void* data;
  const float* bias;   // [outputs], or null
  const float* scale;  // [outputs] of int8, else null
  int64_t inputs, outputs, panels;
  int64_t kind;
};

struct Layer {
  Matrix qkv, out, gate_up, down;  // gate_up: LANES gates, then LANES ups, in every panel
  const float *norm_in, *norm_attention, *norm_mlp, *norm_output;  // 2nd and 4th may be null
  const float *norm_query, *norm_key;                              // [head_dim], or null
  int64_t window;                                                  // 0: none
  int64_t rope;                                                    // which table
  float scale, softcap;                                            // softcap 0: none
};

struct Model {
  int64_t layers, hidden, inner, heads, kv_heads, head_dim;
  int64_t activation;        // 0: SiLU, 1: GELU by tanh
  int64_t is_rounded;        // bfloat16 model
  int64_t keeps_half;        // K/V are kept in bfloat16
  int64_t rounds_unit_norm;  // bfloat16: the unit vector is rounded before its weight
  float eps, logit_softcap;
  const Layer* layer;
  const float* norm;
  Matrix head;
};

struct Piece {  // one segment of the K/V store: [layers, kv_heads, tokens, head_dim]
  int64_t start, columns, tokens;
  void *keys, *values;
};

// What a row sees of its span's rows: its ancestors; in a chain, those before it; in a block, all.
enum Shape { TREE = 0, CHAIN = 1, BLOCK_OF_ALL = 2 };

struct Span {
  int64_t row, rows, length, piece, pieces;
  int64_t shape;
};

struct Step {
  int64_t rows, spans, outputs, threads;
  const Span* span;
  const Piece* piece;
  const int64_t *positions, *parent;  // parent within the batch
  const int64_t* output_rows;
  const float* const* rope;  // tables [positions, 2, head_dim / 2]: cosines, sines
  float* x;                  // [rows, hidden], in: embeddings
  float* const* capture;     // one per layer: [rows, hidden] or null
  float* normed;             // [rows, hidden]
  float* logits;             // [outputs, vocabulary]
  float* work;               // dspark_work_floats()
  int64_t* best;             // [outputs] largest logit of each, -1 where none is finite; or null
};
}
