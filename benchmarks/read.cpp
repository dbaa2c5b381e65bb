// A plain read of memory, for benchmarks/experts.py: what a kernel that only reads would take.

#include <cstdint>
#include <cstring>

typedef int64_t Words __attribute__((vector_size(64)));

extern "C" int64_t read_buffers(const char* const* buffer, const int64_t* bytes, int64_t count,
                                int64_t threads) {
  int64_t sum = 0;
#pragma omp parallel for num_threads((int)threads) reduction(^ : sum) schedule(static)
  for (int64_t part = 0; part < threads; part++) {
    Words found[8] = {};
    for (int64_t i = 0; i < count; i++) {
      const int64_t lines = bytes[i] / 512;
      const char* from = buffer[i];
      for (int64_t at = lines * part / threads; at < lines * (part + 1) / threads; at++)
#pragma GCC unroll 8
        for (int w = 0; w < 8; w++) {
          Words words;
          memcpy(&words, from + at * 512 + w * 64, sizeof words);
          found[w] ^= words;
        }
    }
    for (int w = 0; w < 8; w++)
      for (int lane = 0; lane < 8; lane++) sum ^= found[w][lane];
  }
  return sum;
}
