// Vectors of floats and what is computed in them, element by element.
//
// The vectors are those of GCC and Clang (vector_size), so that one source serves AVX-512, AVX2,
// SSE and NEON.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#define LANES 16
#define MOST_ROWS 14  // 28 sums, 4 widened weights: the 32 registers
#elif defined(__AVX__)
#define LANES 8
#define MOST_ROWS 5
#else
#define LANES 4
#define MOST_ROWS 8
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

INLINE Floats load(const float* p) {
  Floats v;
  memcpy(&v, p, sizeof v);
  return v;
}

INLINE void store(float* p, Floats v) { memcpy(p, &v, sizeof v); }

typedef uint16_t Half;  // a bfloat16 number: the upper half of a float
typedef Half Halves __attribute__((vector_size(2 * LANES)));

INLINE Floats load(const Half* p) {
  Halves v;
  memcpy(&v, p, sizeof v);
  return (Floats)(__builtin_convertvector(v, Ints) << 16);
}

INLINE void store(Half* p, Floats v) {  // v is rounded to bfloat16
  Halves halves = __builtin_convertvector((Ints)v >> 16, Halves);
  memcpy(p, &halves, sizeof halves);
}

INLINE float widened(float v) { return v; }

INLINE float widened(Half v) {
  const uint32_t bits = (uint32_t)v << 16;
  float out;
  memcpy(&out, &bits, sizeof out);
  return out;
}

INLINE void narrow(float v, float* to) { *to = v; }

INLINE void narrow(float v, Half* to) {  // v is rounded to bfloat16
  uint32_t bits;
  memcpy(&bits, &v, sizeof bits);
  *to = (Half)(bits >> 16);
}

// Numbers from one type to another that has them as well.
template <typename In, typename Out>
static void convert(const In* x, int64_t count, Out* out) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store(out + i, load(x + i));
  for (; i < count; i++) narrow(widened(x[i]), out + i);
}

INLINE Floats all(float a) { return a - Floats{}; }

INLINE Floats choose(Ints mask, Floats a, Floats b) {
  return (Floats)(((Ints)a & mask) | ((Ints)b & ~mask));
}

INLINE Floats larger(Floats a, Floats b) { return choose(a > b, a, b); }

INLINE Floats smaller(Floats a, Floats b) { return choose(a < b, a, b); }

INLINE float total(Floats v) {
  float lane[LANES];
  store(lane, v);
  for (int n = LANES / 2; n > 0; n /= 2)
    for (int i = 0; i < n; i++) lane[i] += lane[i + n];
  return lane[0];
}

// To the nearest bfloat16, ties to even.
INLINE Floats to_bfloat16(Floats v) {
  Ints bits = (Ints)v;
  Ints rounded = (bits + 0x7fff + ((bits >> 16) & 1)) & (int32_t)0xffff0000;
  return choose(v == v, (Floats)rounded, v);
}

INLINE Floats rounded(Floats v, bool is_rounded) { return is_rounded ? to_bfloat16(v) : v; }

// e^x within two units in the last place; x is held to where neither end overflows.
INLINE Floats exponential(Floats x) {
  x = smaller(larger(x, all(-87.0f)), all(88.0f));
  const Floats magic = all(12582912.0f);
  Floats n = (x * 1.44269504088896341f + magic) - magic;
  Floats r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Floats p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
  return p * (Floats)power;
}

INLINE Floats hyperbolic_tangent(Floats x) { return 1.0f - 2.0f / (exponential(2.0f * x) + 1.0f); }

INLINE Floats activate(Floats x, int64_t kind) {
  if (kind == 0) return x / (1.0f + exponential(-x));
  Floats inner = 0.7978845608028654f * (x + 0.044715f * (x * x * x));
  return 0.5f * x * (1.0f + hyperbolic_tangent(inner));
}
