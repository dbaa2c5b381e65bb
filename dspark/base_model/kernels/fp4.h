// Products with packed FP4 weights (dspark/base_model/fp4.py), decoded in registers.
//
// A vector of 32-bit words holds CHUNK neighbouring codes of a row, lane d the codes 8 d to 8 d + 7.
// Step j of eight decodes code j of every word and multiplies inputs that were arranged alike: x
// [8 d + j] of a chunk lies at [j][d]. A scale belongs to the four words of a group. An output is the
// sum, in order of chunks, of a chunk's products times their scales, lane by lane; the lanes are
// added last. Nothing of that depends on how many rows or outputs are computed at a time.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../../adapters/fused/kernels/vectors.h"

#define CODES 8                 // in a word
#define CHUNK (CODES * LANES)   // inputs of a vector of words
#define GROUP 32                // inputs that share a scale
#define SCALES (CHUNK / GROUP)  // of a chunk

#if defined(__AVX512F__) || defined(__aarch64__)
#define TILE_ROWS 4  // with as many outputs: 16 sums of a chunk, and what is decoded, in 32 registers
#else
#define TILE_ROWS 2
#endif
#define TILE_OUTPUTS 4

// The number of the code in the low four bits of every word.
INLINE Floats decode(Ints words) {
#if defined(__AVX512F__)
  const __m512 numbers = _mm512_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f,
                                        -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f);
  return (Floats)_mm512_permutexvar_ps((__m512i)words, numbers);
#else
  const Ints sign = (words << 28) & (int32_t)0x80000000;
#if defined(__AVX2__)
  const __m256 sizes = _mm256_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f);
  return (Floats)((Ints)_mm256_permutevar8x32_ps(sizes, (__m256i)words) | sign);
#else
  // Two bits of exponent and one of mantissa, put where a float has them; 0 and 1 are 0 and 0.5.
  const Ints size = words & 7;
  const Ints normal = (size > 1) & ((size << 22) + (126 << 23));
  const Ints half = (size == 1) & 0x3f000000;
  return (Floats)(normal | half | sign);
#endif
#endif
}

// A chunk's scales, each in the lanes of its group: byte b is 2^(b - 127). With `is_any` also 0, which
// is subnormal, and 255, which is NaN.
template <bool is_any>
INLINE Floats powers(const uint8_t* scales) {
  int32_t packed = 0;
  memcpy(&packed, scales, SCALES);
#if defined(__AVX512BW__)
  // A group is a quarter of the vector: its byte goes on top of each word, then to the exponent.
  const __m512i top = _mm512_set_epi32(
      0x03808080, 0x03808080, 0x03808080, 0x03808080, 0x02808080, 0x02808080, 0x02808080, 0x02808080,
      0x01808080, 0x01808080, 0x01808080, 0x01808080, 0x00808080, 0x00808080, 0x00808080, 0x00808080);
  const __m512i bytes = _mm512_shuffle_epi8(_mm512_set1_epi32(packed), top);
  const Ints bits = (Ints)_mm512_srli_epi32(bytes, 1);
#else
  Ints shift;
  for (int i = 0; i < LANES; i++) shift[i] = i * CODES / GROUP * 8;
  const Ints bits = (((packed - Ints{}) >> shift) & 255) << 23;
#endif
  if (!is_any) return (Floats)bits;
  return (Floats)(bits | (((bits == 0) | (bits == 0x7f800000)) & 0x400000));
}

// Whether scales are all powers of two in the range of normal floats.
static bool are_normal(const uint8_t* scales, int64_t count) {
  uint8_t found = 0;
  for (int64_t i = 0; i < count; i++) found |= (uint8_t)(scales[i] + 1) < 2;
  return !found;
}

// Where an output's weights lie.
struct Weights {
  const uint8_t *codes, *scales;
};

// Add a chunk of R rows and W outputs; `ahead` is how far weights are fetched ahead. The last chunk of
// a row is followed by bytes that are not ours to read; else the next code is had by reading further
// along, which costs less than a shift.
template <int R, int W, bool is_any, bool is_last>
INLINE void add_chunk(const float* const* x, const Weights* weights, int64_t chunk, int64_t ahead,
                      Floats (*sum)[W]) {
  const uint8_t* codes[W];
  Floats part[R][W];
#pragma GCC unroll 8
  for (int w = 0; w < W; w++) {
    codes[w] = weights[w].codes + chunk * (CHUNK / 2);
    if (!is_last) __builtin_prefetch(codes[w] + ahead);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) part[r][w] = Floats{};
  }
#pragma GCC unroll 8
  for (int j = 0; j < CODES; j++) {
    Floats number[W];
#pragma GCC unroll 8
    for (int w = 0; w < W; w++) {
      Ints words;
      memcpy(&words, codes[w] + (is_last ? 0 : j / 2), sizeof words);
      number[w] = decode(words >> (is_last ? 4 * j : j % 2 * 4));
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const Floats input = load(x[r] + (chunk * CODES + j) * LANES);
#pragma GCC unroll 8
      for (int w = 0; w < W; w++) part[r][w] += number[w] * input;
    }
  }
#pragma GCC unroll 8
  for (int w = 0; w < W; w++) {
    const Floats power = powers<is_any>(weights[w].scales + chunk * SCALES);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) sum[r][w] += part[r][w] * power;
  }
}

// out[r][w] = the product of row r with output w's weights; rows are arranged and padded with zeros.
template <int R, int W, bool is_any>
static void multiply(const float* const* x, const Weights* weights, int64_t inputs, int64_t ahead,
                     float (*out)[W]) {
  Floats sum[R][W];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int w = 0; w < W; w++) sum[r][w] = Floats{};
  const int64_t before = (inputs - 1) / CHUNK;  // chunks but the last
  for (int64_t c = 0; c < before; c++) add_chunk<R, W, is_any, false>(x, weights, c, ahead, sum);

  const int64_t left = inputs - before * CHUNK;
  uint8_t codes[W][CHUNK / 2], scales[W][SCALES];
  const float* last[R];
  Weights at[W];
  for (int r = 0; r < R; r++) last[r] = x[r] + before * CHUNK;
  for (int w = 0; w < W; w++)
    at[w] = {weights[w].codes + before * (CHUNK / 2), weights[w].scales + before * SCALES};
  if (left < CHUNK)
    for (int w = 0; w < W; w++) {
      memset(codes[w], 0, sizeof codes[w]);
      memset(scales[w], 127, sizeof scales[w]);
      memcpy(codes[w], at[w].codes, left / 2);
      memcpy(scales[w], at[w].scales, left / GROUP);
      at[w] = {codes[w], scales[w]};
    }
  add_chunk<R, W, is_any, true>(last, at, 0, 0, sum);
  for (int r = 0; r < R; r++)
    for (int w = 0; w < W; w++) out[r][w] = total(sum[r][w]);
}

typedef void (*Multiply)(const float* const*, const Weights*, int64_t, int64_t,
                         float (*)[TILE_OUTPUTS]);

// For scales that are not all normal there is one row at a time: they are not to be expected.
static Multiply multiply_rows(int64_t rows, bool is_any) {
  static const Multiply by_rows[] = {
      multiply<1, TILE_OUTPUTS, false>,
      multiply<2, TILE_OUTPUTS, false>,
#if TILE_ROWS == 4
      multiply<3, TILE_OUTPUTS, false>,
      multiply<4, TILE_OUTPUTS, false>,
#endif
  };
  return is_any ? multiply<1, TILE_OUTPUTS, true> : by_rows[rows - 1];
}
