// Memory that a thread needs next, asked for a few lines at a time while it multiplies what it has.
//
// Operands that have left the caches since they were written come from memory at the speed of its answers where nothing
// asks ahead of time: for a product of some hundred flops a byte a quarter of the time.
#pragma once
#include "simd.h"

#include <algorithm>
#include <array>
#include <cstdint>

namespace torch_curvature::cpu {
class Ahead {
 public:
  void clear() { count_ = at_ = lines_ = each_ = 0; }
  // `count` numbers from x on; what does not fit into the list is left to the processor.
  template <class T>
  void add(const T* x, int64_t count) {
    if (count_ == kMost || count == 0) return;
    const char* first = reinterpret_cast<const char*>(x);
    ranges_[count_++] = {first, first + count * sizeof(T)};
    lines_ += (count * sizeof(T) + kLine - 1) / kLine;
  }
  // All of it is to be asked for in so many calls of fetch.
  void spread(int64_t calls) { each_ = (lines_ + calls - 1) / std::max<int64_t>(1, calls); }

  CURVATURE_INLINE void fetch() {
    for (int64_t k = 0; k < each_ && at_ < count_; ++k) {
      Range& range = ranges_[at_];
      __builtin_prefetch(range.next, 0, 2);
      if ((range.next += kLine) >= range.end) ++at_;
    }
  }

 private:
  static constexpr int64_t kMost = 8, kLine = 64;
  struct Range {
    const char *next = nullptr, *end = nullptr;
  };
  std::array<Range, kMost> ranges_{};
  int64_t count_ = 0, at_ = 0, lines_ = 0, each_ = 0;
};
}  // namespace torch_curvature::cpu
