// Products of bfloat16 numbers in pairs of neighbours, one instruction each of AVX512-BF16.
//
// Where they are, a model that rounds to bfloat16 keeps its activations as such between the stages
// of a forward: half the bytes from one core to the other, and nothing to pack before a product.

#pragma once

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "vectors.h"

// DSPARK_PAIRS computes what AVX512-BF16 does with other instructions, for tests.
#if defined(__AVX512BF16__) || defined(DSPARK_PAIRS)
#define HAS_PAIRS true
#else
#define HAS_PAIRS false
#endif

// sum + the products of two neighbouring inputs, both bfloat16.
INLINE Floats add_pair(Floats sum, Ints weights, int32_t inputs) {
#ifdef __AVX512BF16__
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)weights,
                                  (__m512bh)_mm512_set1_epi32(inputs));
#else
  Ints all_inputs = inputs - Ints{}, high = all_inputs & (int32_t)0xffff0000;
  sum += (Floats)(weights & (int32_t)0xffff0000) * (Floats)high;
  return sum + (Floats)(weights << 16) * (Floats)(all_inputs << 16);
#endif
}
