// Linear layers whose weights are int8 or int4: integer products, block by block.
//
// A row of inputs is cut into blocks of BLOCK, each rounded to int8 by its own largest magnitude
// (as llama.cpp does for its quantised types). Products within a block are summed in integers, in
// which every order gives the same sum; blocks are added in their order. So an output's bits depend
// on its row alone, and are the same on every kind of vector unit.
//
// int8: weight = scale[output] * (byte - 128).
// int4: weight = scale[block, output] * nibble + least[block, output].

#pragma once

#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "fetch.h"
#include "step.h"
#include "vectors.h"

#define BLOCK 32
#if LANES == 16
#define QUANTISED_ROWS 6  // 12 integer and 12 float sums, 4 halves of weights, one input
#else
#define QUANTISED_ROWS 2
#endif

typedef int8_t Bytes __attribute__((vector_size(LANES)));

// sum + four products in each lane: bytes of `weights` (unsigned) with those of `inputs` (signed).
#if defined(__AVX512VNNI__) && LANES == 16 && !defined(DSPARK_NO_VNNI)
INLINE Ints add_four(Ints sum, Ints weights, int32_t inputs) {
  return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights, _mm512_set1_epi32(inputs));
}
#elif defined(__AVX2__) && LANES == 8
INLINE Ints add_four(Ints sum, Ints weights, int32_t inputs) {
  // In 16 bits: 255 * 127 and the sum of two such products in 32.
  const __m256i x = _mm256_set1_epi32(inputs), w = (__m256i)weights;
  const __m256i even = _mm256_and_si256(w, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(w, 8);
  const __m256i x_even = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8);
  const __m256i x_odd = _mm256_srai_epi16(x, 8);
  return sum + (Ints)_mm256_madd_epi16(even, x_even) + (Ints)_mm256_madd_epi16(odd, x_odd);
}
#else
INLINE Ints add_four(Ints sum, Ints weights, int32_t inputs) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++)
    sum += ((weights >> (8 * i)) & 255) * (int32_t)(int8_t)(inputs >> (8 * i));
  return sum;
}
#endif

template <int S, typename V, int... I>
INLINE V rotated(V v, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(v, v, ((I + S) % LANES)...);
}

// All lanes combined, in every lane; `combine` must not mind the order.
template <int S, typename V, typename Combine>
INLINE V across(V v, Combine combine) {
  if constexpr (S > 0) {
    v = combine(v, rotated<S>(v, std::make_integer_sequence<int, LANES>()));
    return across<S / 2>(v, combine);
  }
  return v;
}

// Rows of inputs as int8.
struct Rounded {
  int64_t inputs, blocks;
  std::vector<int8_t> bytes;   // [rows, inputs]
  std::vector<float> scale;    // [rows, blocks]
  std::vector<int32_t> total;  // [rows, blocks]: of the bytes

  template <typename In>
  void fill(const In* x, int64_t rows, int64_t count) {
    inputs = count, blocks = count / BLOCK;
    bytes.resize(rows * inputs), scale.resize(rows * blocks), total.resize(rows * blocks);
    for (int64_t b = 0; b < rows * blocks; b++) round_block(x + b * BLOCK, b);
  }

  template <typename In>
  void round_block(const In* x, int64_t block) {
    Floats largest = Floats{}, nothing = Floats{};
    for (int i = 0; i < BLOCK; i += LANES) {
      Floats v = load(x + i);
      largest = larger(largest, larger(v, -v));
      nothing += v - v;  // not a number where v is none, which `larger` would pass over
    }
    nothing = across<LANES / 2>(nothing, [](Floats a, Floats b) { return a + b; });
    largest = across<LANES / 2>(largest, [](Floats a, Floats b) { return larger(a, b); });
    const float most = largest[0];
    const float step = most / 127.0f + nothing[0], inverse = most > 0 ? 127.0f / most : 0.0f;
    const Floats magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    Ints sum = Ints{};
    for (int i = 0; i < BLOCK; i += LANES) {
      Ints whole = (Ints)(load(x + i) * inverse + magic) - (Ints)magic;
      sum += whole;
      Bytes narrow = __builtin_convertvector(whole, Bytes);
      memcpy(bytes.data() + block * BLOCK + i, &narrow, sizeof narrow);
    }
    scale[block] = step;
    total[block] = across<LANES / 2>(sum, [](Ints a, Ints b) { return a + b; })[0];
  }
};

INLINE int32_t four(const int8_t* x) {
  int32_t word;
  memcpy(&word, x, sizeof word);
  return word;
}

template <int R, Reach reach>
static void tile_int8(const Rounded& x, int64_t row, const void* data, Fetch fetch,
                      Floats (*out)[2]) {
  Floats sum[R][2];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) sum[r][0] = sum[r][1] = Floats{};
  const Ints* w = (const Ints*)data;
  const int8_t* bytes = x.bytes.data() + row * x.inputs;
  const float* scale = x.scale.data() + row * x.blocks;
  const int32_t* total = x.total.data() + row * x.blocks;
  for (int64_t b = 0; b < x.blocks; b++, bytes += BLOCK) {
    Ints part[R][2];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) part[r][0] = part[r][1] = Ints{} - 128 * total[r * x.blocks + b];
#pragma GCC unroll 8
    for (int k = 0; k < BLOCK; k += 4, w += 2) {
      fetch.ahead<reach>();
      Ints w0 = w[0], w1 = w[1];
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        int32_t a = four(bytes + r * x.inputs + k);
        part[r][0] = add_four(part[r][0], w0, a);
        part[r][1] = add_four(part[r][1], w1, a);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const float step = scale[r * x.blocks + b];
      sum[r][0] += __builtin_convertvector(part[r][0], Floats) * step;
      sum[r][1] += __builtin_convertvector(part[r][1], Floats) * step;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) out[r][0] = sum[r][0], out[r][1] = sum[r][1];
}

template <int R, Reach reach>
static void tile_int4(const Rounded& x, int64_t row, const void* data, Fetch fetch,
                      Floats (*out)[2]) {
  Floats sum[R][2];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) sum[r][0] = sum[r][1] = Floats{};
  const Ints* w = (const Ints*)data;
  const int8_t* bytes = x.bytes.data() + row * x.inputs;
  const float* scale = x.scale.data() + row * x.blocks;
  const int32_t* total = x.total.data() + row * x.blocks;
  for (int64_t b = 0; b < x.blocks; b++, bytes += BLOCK) {
    Ints part[R][2];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) part[r][0] = part[r][1] = Ints{};
#pragma GCC unroll 8
    for (int k = 0; k < BLOCK; k += 8, w += 2) {
      fetch.ahead<reach>();
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        const Ints low = w[half] & 0x0f0f0f0f, high = (w[half] >> 4) & 0x0f0f0f0f;
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
          part[r][half] = add_four(part[r][half], low, four(bytes + r * x.inputs + k));
          part[r][half] = add_four(part[r][half], high, four(bytes + r * x.inputs + k + 4));
        }
      }
    }
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
      const Floats step = (Floats)(w[half] << 16);
      const Floats least = (Floats)(w[half] & (int32_t)0xffff0000);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const int64_t at = r * x.blocks + b;
        const Floats here = __builtin_convertvector(part[r][half], Floats) * step;
        sum[r][half] += (here + least * (float)total[at]) * scale[at];
      }
    }
    w += 2;
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) out[r][0] = sum[r][0], out[r][1] = sum[r][1];
}

typedef void (*QuantisedTile)(const Rounded&, int64_t, const void*, Fetch, Floats (*)[2]);

template <Reach reach, int... R>
static QuantisedTile pick_quantised(bool is_int4, int rows, std::integer_sequence<int, R...>) {
  static const QuantisedTile four_bits[] = {tile_int4<R + 1, reach>...};
  static const QuantisedTile eight_bits[] = {tile_int8<R + 1, reach>...};
  return is_int4 ? four_bits[rows - 1] : eight_bits[rows - 1];
}

static QuantisedTile pick_quantised(bool is_int4, int rows, Reach reach) {
  const auto all_rows = std::make_integer_sequence<int, QUANTISED_ROWS>();
  if (reach == NEAR) return pick_quantised<NEAR>(is_int4, rows, all_rows);
  if (reach == DEEP) return pick_quantised<DEEP>(is_int4, rows, all_rows);
  if (reach == FAR) return pick_quantised<FAR>(is_int4, rows, all_rows);
  return pick_quantised<NONE>(is_int4, rows, all_rows);
}

// Bytes of a panel of 2 * LANES outputs.
INLINE int64_t panel_bytes(const Matrix& matrix) {
  const int64_t weights = matrix.inputs * 2 * LANES;
  switch (matrix.kind) {
    case FLOAT32: return weights * 4;
    case BFLOAT16: return weights * 2;
    case INT8: return weights;
    default: return weights / 2 + weights / BLOCK * 4;
  }
}
