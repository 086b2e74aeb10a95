// A block of a symmetric matrix, written tile by tile into its places: rows (o, i), columns (p, j), any order of them.
#pragma once
#include "../places.h"
#include "kernel.h"
#include "tile_product.h"

#include <cstring>

namespace torch_curvature::cpu {

constexpr int64_t kEdge = 16;  // edge of a tile of pairs (i, j): rows of a tile fill a cache line of float32

// `count` entries (o, i), (o, i + 1), ... of one side of a block; `inputs` in all.
struct PlacedRun {
  const Places& places;
  int64_t o, i, count, inputs;
  int64_t operator[](int64_t k) const { return places.at(o, i + k, inputs); }
  // Entries from the first on whose places follow one another.
  int64_t run() const {
    if (count == 1 || places.per_input != 1) return std::min<int64_t>(count, 1);
    return places.last >= 0 && i + count == inputs ? count - 1 : count;
  }
};

template <class T>
CURVATURE_INLINE void place_line(const T* from, T* to, int64_t count, bool add) {
  using A = accumulate_t<T>;
  constexpr int64_t kStep = 8;
  if (add) {
    for (int64_t c = 0; c < count; ++c) to[c] = static_cast<T>(A(to[c]) + A(from[c]));
  } else if (count == kEdge) {
    std::memcpy(to, from, kEdge * sizeof(T));
  } else {
    int64_t c = 0;
    for (; c + kStep <= count; c += kStep) std::memcpy(to + c, from + c, kStep * sizeof(T));
    for (; c < count; ++c) to[c] = from[c];
  }
}

// out[rows[r], columns[c]] (+)= tile[r][c]
template <class T, int64_t E>
CURVATURE_INLINE void place_tile(const T (*tile)[E], const PlacedRun& rows, const PlacedRun& columns, T* out,
                                 int64_t ld, bool add) {
  const int64_t run = columns.run(), down = rows.run(), left = columns[0];
  T* first = out + rows[0] * ld;
  for (int64_t r = 0; r < rows.count; ++r) {
    T* to = r < down ? first + r * ld : out + rows[r] * ld;
    place_line<T>(tile[r], to + left, run, add);
    for (int64_t c = run; c < columns.count; ++c) place_line<T>(tile[r] + c, to + columns[c], 1, add);
  }
}

// Asks for the lines that place_tile is going to write.
template <class T>
CURVATURE_INLINE void fetch_places(const PlacedRun& rows, const PlacedRun& columns, T* out, int64_t ld) {
  constexpr int64_t kLine = 64 / sizeof(T);
  const int64_t run = columns.run(), down = rows.run(), left = columns[0];
  if (run < columns.count - 1) return;
  const T* first = out + rows[0] * ld + left;
  for (int64_t r = 0; r < rows.count; ++r) {
    const T* to = r < down ? first + r * ld : out + rows[r] * ld + left;
    for (int64_t c = 0; c < run; c += kLine) __builtin_prefetch(to + c, 1);
    __builtin_prefetch(to + run - 1, 1);
  }
}

// to[j][i] = from[i][j], four by four in registers where that fills them.
template <class T>
CURVATURE_INLINE void transpose_tile(const T (*from)[kEdge], T (*to)[kEdge]) {
  if constexpr (std::is_same_v<T, float>) {
    for (int64_t i = 0; i < kEdge; i += 4)
      for (int64_t j = 0; j < kEdge; j += 4) transpose_four<kEdge>(from[i] + j, kEdge, to[j] + i);
  } else {
    for (int64_t j = 0; j < kEdge; ++j)
      for (int64_t i = 0; i < kEdge; ++i) to[j][i] = from[i][j];
  }
}
}  // namespace torch_curvature::cpu
