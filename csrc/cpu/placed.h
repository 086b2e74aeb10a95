// A block of a symmetric matrix, written tile by tile into its places: rows (o, i), columns (p, j), any order of them.
#pragma once
#include "../places.h"
#include "kernel.h"

#include <cstring>

namespace torch_curvature::cpu {

constexpr int64_t kEdge = 16;  // edge of a tile of pairs (i, j): rows of a tile fill a cache line of float32

// `count` entries (o, i), (o, i + 1), ... of one side of a block; `inputs` in all.
struct PlacedRun {
  const Places& places;
  int64_t o, i, count, inputs;
  int64_t operator[](int64_t k) const { return places.at(o, i + k, inputs); }
  // Whether their places follow one another.
  bool straight() const { return count == 1 || (places.per_input == 1 && (places.last < 0 || i + count < inputs)); }
};

// out[rows[r], columns[c]] (+)= tile[r][c]
template <class T>
CURVATURE_INLINE void place_tile(const T (*tile)[kEdge], const PlacedRun& rows, const PlacedRun& columns, T* out,
                                 int64_t ld, bool add) {
  using A = accumulate_t<T>;
  if (columns.straight()) {
    for (int64_t r = 0; r < rows.count; ++r) {
      T* to = out + rows[r] * ld + columns[0];
      if (add)
        for (int64_t c = 0; c < columns.count; ++c) to[c] = static_cast<T>(A(to[c]) + A(tile[r][c]));
      else if (columns.count == kEdge) std::memcpy(to, tile[r], kEdge * sizeof(T));
      else std::memcpy(to, tile[r], columns.count * sizeof(T));
    }
    return;
  }
  for (int64_t r = 0; r < rows.count; ++r)
    for (int64_t c = 0; c < columns.count; ++c) {
      T& to = out[rows[r] * ld + columns[c]];
      to = add ? static_cast<T>(A(to) + A(tile[r][c])) : tile[r][c];
    }
}

// Asks for the lines that place_tile is going to write.
template <class T>
CURVATURE_INLINE void fetch_places(const PlacedRun& rows, const PlacedRun& columns, T* out, int64_t ld) {
  if (!columns.straight()) return;
  for (int64_t r = 0; r < rows.count; ++r) {
    const T* to = out + rows[r] * ld + columns[0];
    __builtin_prefetch(to, 1);
    __builtin_prefetch(to + columns.count - 1, 1);
  }
}
}  // namespace torch_curvature::cpu
