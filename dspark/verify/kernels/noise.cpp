// Gumbel noise of a whole vocabulary in float32, and which tokens it may make the best of a row.
//
// Both only narrow down which tokens dspark/verify/noise.py evaluates in float64: what they give may
// be off by no more than that file allows for, and then the result is that of every token evaluated.

#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint64_t Words __attribute__((vector_size(8 * LANES)));
typedef int64_t Longs __attribute__((vector_size(8 * LANES)));

template <typename V>
INLINE V load(const void* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}

INLINE Floats all(float a) { return a - Floats{}; }

INLINE Floats choose(Ints mask, Floats a, Floats b) {
  return (Floats)(((Ints)a & mask) | ((Ints)b & ~mask));
}

// Natural logarithm of positive normal numbers, within a few units in the last place (Cephes).
INLINE Floats logarithm(Floats x) {
  Ints bits = (Ints)x;
  Ints exponent = (bits >> 23) - 126;
  Floats m = (Floats)((bits & 0x007fffff) | 0x3f000000);  // in [.5, 1)
  Ints low = m < all(0.707106781186547524f);
  exponent += low;  // minus 1 where it is low
  m = m + choose(low, m, Floats{}) - 1.0f;
  Floats e = __builtin_convertvector(exponent, Floats), z = m * m;
  Floats y = all(7.0376836292e-2f);
  y = y * m - 1.1514610310e-1f;
  y = y * m + 1.1676998740e-1f;
  y = y * m - 1.2420140846e-1f;
  y = y * m + 1.4249322787e-1f;
  y = y * m - 1.6668057665e-1f;
  y = y * m + 2.0000714765e-1f;
  y = y * m - 2.4999993993e-1f;
  y = y * m + 3.3333331174e-1f;
  y = y * m * z;
  y += e * -2.12194440e-4f;
  y -= 0.5f * z;
  return m + y + e * 0.693359375f;
}

INLINE Words mixed(Words x) {  // SplitMix64's finaliser, as `_mix_array`
  x ^= x >> 30;
  x *= 0xBF58476D1CE4E5B9ull;
  x ^= x >> 27;
  x *= 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

INLINE Floats gumbel(Words words, uint64_t state) {
  const Words bits = mixed(words ^ state) >> 11;
  const float unit = 1.0f / 9007199254740992.0f;  // 2^-53
  Floats w = __builtin_convertvector((Longs)bits, Floats) * unit;
  w = choose(w < all(unit), all(unit), w);
  const float most = 1.0f - 1.0f / 1024.0f;  // larger ones are overestimated: the safe direction
  w = choose(w > all(most), all(most), w);
  // -log1p(-w): a series where 1 - w would lose digits.
  const Floats series = w * (1.0f + w * (0.5f + w * (1 / 3.0f + w * (0.25f + w * 0.2f))));
  const Floats exact = -logarithm(1.0f - w);
  return -logarithm(choose(w < all(0.02f), series, exact));
}

INLINE Floats larger(Floats a, Floats b) { return choose(b > a, b, a); }

static float largest(Floats v) {
  float top = v[0];
  for (int k = 1; k < LANES; k++) top = v[k] > top ? v[k] : top;
  return top;
}

// A row of logits with its noise.
struct Row {
  const float *logits, *noise;
  int64_t size;
  float scale;

  int64_t find(float slack, int64_t room, int64_t* ids, float* top, float* most) const {
    *most = scale == 1.0f ? 0.0f : best();
    return scale == 1.0f ? found(slack, room, ids, top, [](auto x) { return x; })
                         : found(slack, room, ids, top, [this, most](auto x) {
                             return (x - *most) / scale;  // as sampling.py: no product, no sum
                           });
  }

  float best() const {
    Floats most = all(-__builtin_inff());
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) most = larger(most, load<Floats>(logits + i));
    float top = largest(most);
    for (; i < size; i++) top = logits[i] > top ? logits[i] : top;
    return top;
  }

  template <typename Shape>
  int64_t found(float slack, int64_t room, int64_t* ids, float* top, Shape shape) const {
    constexpr int64_t BLOCK = 16 * LANES;
    float tops[(1 << 20) / BLOCK];
    if (size > (1 << 20)) return -1;
    Ints broken = Ints{};
    *top = -__builtin_inff();
    for (int64_t start = 0; start < size; start += BLOCK) {
      const int64_t stop = start + BLOCK < size ? start + BLOCK : size;
      Floats most = all(-__builtin_inff());
      int64_t i = start;
      for (; i + LANES <= stop; i += LANES) {
        const Floats v = shape(load<Floats>(logits + i)) + load<Floats>(noise + i);
        most = larger(most, v);
        broken |= v != v;
      }
      float own = largest(most);
      for (; i < stop; i++) {
        const float v = shape(logits[i]) + noise[i];
        if (v != v) return -1;
        own = v > own ? v : own;
      }
      tops[start / BLOCK] = own;
      *top = own > *top ? own : *top;
    }
    for (int k = 0; k < LANES; k++)
      if (broken[k]) return -1;
    const float least = *top - slack;
    int64_t count = 0;
    for (int64_t start = 0; start < size; start += BLOCK) {
      if (!(tops[start / BLOCK] >= least)) continue;
      const int64_t stop = start + BLOCK < size ? start + BLOCK : size;
      for (int64_t i = start; i < stop; i++)
        if (shape(logits[i]) + noise[i] >= least) {
          if (count < room) ids[count] = i;
          count++;
        }
    }
    return count;
  }
};

extern "C" {

// out [size] = noise of tokens 0 .. size - 1 under a state; words as `_vocabulary_words`.
void dspark_noise_vector(const uint64_t* words, int64_t size, uint64_t state, float* out) {
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) {
    const Floats v = gumbel(load<Words>(words + i), state);
    memcpy(out + i, &v, sizeof v);
  }
  if (i == size) return;
  uint64_t rest[LANES] = {};
  memcpy(rest, words + i, (size - i) * sizeof *words);
  const Floats v = gumbel(load<Words>(rest), state);
  memcpy(out + i, &v, (size - i) * sizeof(float));
}

// Tokens whose row + noise comes within `slack` of the m-th largest, by rising id: how many there
// are, the first `room` of them in `ids`, the m-th largest in `floor`. -1 where a sum is no number.
int64_t dspark_noise_candidates(const float* row, const float* noise, int64_t size, int64_t m,
                                float slack, int64_t room, int64_t* ids, float* floor) {
  constexpr int64_t BLOCK = 16 * LANES;
  const float nothing = -__builtin_inff();
  float best[64];
  if (m > 64) return -1;
  for (int64_t k = 0; k < m; k++) best[k] = nothing;
  Ints broken = Ints{};
  std::vector<float> tops((size + BLOCK - 1) / BLOCK);
  for (int64_t start = 0; start < size; start += BLOCK) {
    const int64_t stop = start + BLOCK < size ? start + BLOCK : size;
    Floats most = all(nothing);
    int64_t i = start;
    for (; i + LANES <= stop; i += LANES) {
      const Floats v = load<Floats>(row + i) + load<Floats>(noise + i);
      most = choose(v > most, v, most);
      broken |= v != v;
    }
    float top = most[0];
    for (int k = 1; k < LANES; k++) top = most[k] > top ? most[k] : top;
    for (; i < stop; i++) {
      const float v = row[i] + noise[i];
      if (v != v) return -1;
      top = v > top ? v : top;
    }
    tops[start / BLOCK] = top;
    if (!(top > best[m - 1])) continue;
    for (i = start; i < stop; i++) {
      const float v = row[i] + noise[i];
      int64_t k = m - 1;
      if (!(v > best[k])) continue;
      for (; k > 0 && v > best[k - 1]; k--) best[k] = best[k - 1];
      best[k] = v;
    }
  }
  for (int k = 0; k < LANES; k++)
    if (broken[k]) return -1;
  *floor = best[m - 1];
  const float least = *floor - slack;
  int64_t count = 0;
  for (int64_t start = 0; start < size; start += BLOCK) {
    if (!(tops[start / BLOCK] >= least)) continue;
    const int64_t stop = start + BLOCK < size ? start + BLOCK : size;
    for (int64_t i = start; i < stop; i++)
      if (row[i] + noise[i] >= least) {
        if (count < room) ids[count] = i;
        count++;
      }
  }
  return count;
}

// Noise of several states; parts of a vector are threads' work.
void dspark_noise_vectors(const uint64_t* words, int64_t size, const uint64_t* states, int64_t count,
                          int64_t threads, float* const* out) {
  constexpr int64_t PART = 4096;
  const int64_t parts = (size + PART - 1) / PART;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t i = 0; i < count * parts; i++) {
    const int64_t start = i % parts * PART;
    const int64_t n = start + PART < size ? PART : size - start;
    dspark_noise_vector(words + start, n, states[i / parts], out[i / parts] + start);
  }
}

// Of each row of logits, less its largest and divided by its scale unless that is 1: the tokens
// whose sum with the noise comes within `slack` of the largest sum. How many there are is in
// `counts`, -1 where a sum is no number; the first `room` of them in `ids`, by rising id; the
// largest sum in `tops`, the largest logit in `most`.
void dspark_noise_rows(const float* logits, int64_t rows, int64_t size, const float* scale,
                       const float* const* noise, float slack, int64_t room, int64_t threads,
                       int64_t* counts, int64_t* ids, float* tops, float* most) {
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1 && rows > 1)
  for (int64_t r = 0; r < rows; r++) {
    const Row row{logits + r * size, noise[r], size, scale[r]};
    counts[r] = row.find(slack, room, ids + r * room, tops + r, most + r);
  }
}
}
