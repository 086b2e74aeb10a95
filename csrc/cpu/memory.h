// Large results: whether they fit, and how their pages come.
#pragma once
#include "../error.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace torch_curvature::cpu {

// Bytes the system can still give without swapping; negative where it does not say.
inline double available_memory() {
  double kib = -1;
#if defined(__linux__)
  if (FILE* f = std::fopen("/proc/meminfo", "r")) {
    char line[256];
    while (std::fgets(line, sizeof line, f))
      if (std::sscanf(line, "MemAvailable: %lf kB", &kib) == 1) break;
    std::fclose(f);
  }
#endif
  return kib < 0 ? -1 : kib * 1024;
}

inline void check_fits(const char* op, const std::string& shape, double bytes) {
  constexpr double kGiB = 1024.0 * 1024 * 1024;
  if (bytes < kGiB) return;  // not worth a look at the system
  const double available = available_memory();
  if (available < 0 || bytes <= available) return;
  char sizes[128];
  std::snprintf(sizes, sizeof sizes, "%.1f GiB, but %.1f GiB of memory are available", bytes / kGiB, available / kGiB);
  CURVATURE_CHECK(false, op, ": the result ", shape, " takes ", sizes,
                  ". Split the problem, or ask for a form that is not dense.");
}

// Fresh pages cost more than the arithmetic that fills them: 2 MiB pages fault 512 times less often than 4 KiB ones.
inline void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = 2 << 20;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + bytes) / kHuge * kHuge;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}
}  // namespace torch_curvature::cpu
