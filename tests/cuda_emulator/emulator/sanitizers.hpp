// What the sanitizers must be told about fibers. Empty where none is compiled in.
#pragma once
#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

namespace cuda_emulator {
// An address that orders memory accesses in ThreadSanitizer's eyes, and nothing else: what a barrier promises.
inline void sanitizer_release([[maybe_unused]] void* p) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(p);
#endif
}
inline void sanitizer_acquire([[maybe_unused]] void* p) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(p);
#endif
}
}  // namespace cuda_emulator
