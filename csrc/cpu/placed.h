// A block of a symmetric matrix, written tile by tile into its places: rows (o, i), columns (p, j), any order of them.
#pragma once
#include "../places.h"
#include "kernel.h"
#include "tile_product.h"

#include <cstring>
#include <vector>

namespace torch_curvature::cpu {

constexpr int64_t kWhole = 40;  // inputs that stay one range: all their pairs i <= j make one tile
constexpr int64_t kRange = 33;  // the longest range of more of them

// Where ranges of inputs begin, and the end.
inline std::vector<int64_t> input_ranges(int64_t I) {
  const int64_t count = I <= kWhole ? 1 : divide_up(I, kRange);
  std::vector<int64_t> bounds;
  for (int64_t k = 0; k <= count; ++k) bounds.push_back(I * k / count);
  return bounds;
}

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

// At most kWhole numbers: no loop, of which the compiler would make a call, and the last ones may be written twice.
template <class T>
CURVATURE_INLINE void place_line(const T* from, T* to, int64_t count, bool add) {
  using A = accumulate_t<T>;
  static_assert(kWhole < 48);
  if (add) {
    for (int64_t c = 0; c < count; ++c) to[c] = static_cast<T>(A(to[c]) + A(from[c]));
  } else if (count >= 16) {
    copy_some<T, 16>(from, to);
    if (count >= 32) copy_some<T, 16>(from + 16, to + 16);
    if (count % 16) copy_some<T, 16>(from + count - 16, to + count - 16);
  } else if (count >= 8) {
    copy_some<T, 8>(from, to), copy_some<T, 8>(from + count - 8, to + count - 8);
  } else if (count >= 4) {
    copy_some<T, 4>(from, to), copy_some<T, 4>(from + count - 4, to + count - 4);
  } else {
    for (int64_t c = 0; c < count; ++c) to[c] = from[c];
  }
}

// out[rows[r], columns[c]] (+)= tile[r, c], rows of the tile `width` apart.
template <class T>
CURVATURE_INLINE void place_tile(const T* tile, int64_t width, const PlacedRun& rows, const PlacedRun& columns, T* out,
                                 int64_t ld, bool add) {
  const int64_t run = columns.run(), rest = columns.count - run, down = rows.run(), left = columns[0];
  const int64_t apart = rest > 0 ? columns[run] : 0;
  T* first = out + rows[0] * ld;
  for (int64_t r = 0; r < rows.count; ++r, tile += width) {
    T* to = r < down ? first + r * ld : out + rows[r] * ld;
    place_line<T>(tile, to + left, run, add);
    if (rest > 0) place_line<T>(tile + run, to + apart, 1, add);
    for (int64_t c = run + 1; c < columns.count; ++c) place_line<T>(tile + c, to + columns[c], 1, add);
  }
}

// Asks for the lines that place_tile is going to write, of one part of the rows.
template <class T>
CURVATURE_INLINE void fetch_places(const PlacedRun& rows, const PlacedRun& columns, T* out, int64_t ld,
                                   int64_t part = 0, int64_t parts = 1) {
  constexpr int64_t kLine = 64 / sizeof(T);
  const int64_t run = columns.run(), down = rows.run(), left = columns[0];
  if (run < columns.count - 1) return;
  const T* first = out + rows[0] * ld + left;
  __asm__ volatile("");  // a function that does nothing but this would count as one without effect, and be left out
  for (int64_t r = rows.count * part / parts; r < rows.count * (part + 1) / parts; ++r) {
    const T* to = r < down ? first + r * ld : out + rows[r] * ld + left;
    for (int64_t c = 0; c < run; c += kLine) __builtin_prefetch(to + c, 1, 2);
    __builtin_prefetch(to + run - 1, 1, 2);
  }
}

// to[c kWhole + r] = from[r width + c], four by four in registers where they are float32. What lies beyond, up to a
// multiple of four rows and columns, is read and written too.
template <class T>
CURVATURE_INLINE void turn_tile(const T* from, int64_t width, int64_t rows, int64_t columns, T* to) {
  if constexpr (std::is_same_v<T, float>) {
    for (int64_t r = 0; r < rows; r += 4)
      for (int64_t c = 0; c < columns; c += 4) transpose_four(from + r * width + c, width, to + c * kWhole + r, kWhole);
  } else {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; ++c) to[c * kWhole + r] = from[r * width + c];
  }
}
constexpr int64_t kBeyond = 4 * kWhole;  // elements that turn_tile may read behind a tile

// A tile [edge, edge] from its upper triangle, row after row.
template <class T>
CURVATURE_INLINE void unfold_triangle(const T* line, int64_t edge, T* tile) {
  for (int64_t i = 0; i < edge; line += edge - i++) {
    place_line<T>(line, tile + i * kWhole + i, edge - i, false);
    if constexpr (!std::is_same_v<T, float>)
      for (int64_t j = i + 1; j < edge; ++j) tile[j * kWhole + i] = line[j - i];
  }
  if constexpr (std::is_same_v<T, float>)
    for (int64_t i = 0; i < edge; i += 4) {
      const int64_t corner = std::min(edge, i + 4);
      for (int64_t r = i + 1; r < corner; ++r)
        for (int64_t c = i; c < r; ++c) tile[r * kWhole + c] = tile[c * kWhole + r];
      for (int64_t j = i + 4; j < edge; j += 4)
        transpose_four(tile + i * kWhole + j, kWhole, tile + j * kWhole + i, kWhole);
    }
}

// Places that wait while something is multiplied: a few at a time are written, and meanwhile the lines of the next ones
// asked for, so that the memory works while the registers do. place(k) writes the k-th of `count`, fetch(k, part) asks
// for one of kParts parts of its lines, and arrange(k) turns what place(k) is going to write: not just before, since
// what was stored in small pieces cannot be read in large ones until all stores before it are done.
class Waiting {
 public:
  static constexpr int64_t kParts = 4;

  template <class Fetch, class Arrange>
  void begin(int64_t count, const Fetch& fetch, const Arrange& arrange) {
    count_ = count, next_ = 0;
    for (int64_t part = 0; count > 0 && part < kParts; ++part) fetch(0, part);
    if (count > 0) arrange(0);
  }
  // As many as are due when `done` of `of` multiplications are.
  template <class Place, class Fetch, class Arrange>
  void proceed(int64_t done, int64_t of, const Place& place, const Fetch& fetch, const Arrange& arrange) {
    for (const int64_t until = count_ * kParts * done / of; next_ < until; ++next_) {
      const int64_t k = next_ / kParts, part = next_ % kParts;
      if (part == 0) place(k);
      if (k + 1 < count_) fetch(k + 1, part);
      if (k + 1 < count_ && part == kParts - 2) arrange(k + 1);
    }
  }

 private:
  int64_t count_ = 0, next_ = 0;
};
}  // namespace torch_curvature::cpu
