// Results much larger than the caches, written past them: an ordinary store reads its line from memory first and
// drives out what is there, a non-temporal one only writes.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace torch_curvature::cpu {
constexpr int64_t kStreamBytes = int64_t{64} << 20;  // results from this size on: no cache keeps them anyway
constexpr int64_t kLineBytes = 64;

// Copies from a cached buffer to memory that nobody reads soon. Addresses need no alignment: what does not fill 16
// bytes at either end is stored in the ordinary way. Call finish_stream() when the last piece is written.
inline void stream(void* to, const void* from, int64_t bytes) {
#if defined(__SSE2__)
  char* out = static_cast<char*>(to);
  const char* in = static_cast<const char*>(from);
  constexpr int64_t kStore = sizeof(__m128i);
  const int64_t head = std::min<int64_t>(bytes, -reinterpret_cast<uintptr_t>(out) & (kStore - 1));
  std::memcpy(out, in, head);
  int64_t k = head;
  auto load = [&](int64_t at) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + at)); };
  auto store = [&](int64_t at, __m128i x) { _mm_stream_si128(reinterpret_cast<__m128i*>(out + at), x); };
  for (; k + kLineBytes <= bytes; k += kLineBytes) {  // a whole line at a time, so that it leaves in one piece
    const __m128i a = load(k), b = load(k + kStore), c = load(k + 2 * kStore), d = load(k + 3 * kStore);
    store(k, a), store(k + kStore, b), store(k + 2 * kStore, c), store(k + 3 * kStore, d);
  }
  for (; k + kStore <= bytes; k += kStore) store(k, load(k));
  std::memcpy(out + k, in + k, bytes - k);
#else
  std::memcpy(to, from, bytes);
#endif
}

// Non-temporal stores are ordered before what this thread writes next: its word that it is done among that.
inline void finish_stream() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}
}  // namespace torch_curvature::cpu
