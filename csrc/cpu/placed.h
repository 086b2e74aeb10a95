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

// At most kWhole numbers.
template <class T>
CURVATURE_INLINE void place_line(const T* from, T* to, int64_t count, bool add) {
  using A = accumulate_t<T>;
  static_assert(kWhole < 48);
  if (add) {
    for (int64_t c = 0; c < count; ++c) to[c] = static_cast<T>(A(to[c]) + A(from[c]));
    return;
  }
  int64_t c = 0;  // no loop: the compiler would make a call of it
  if (count >= 32) std::memcpy(to, from, 16 * sizeof(T)), std::memcpy(to + 16, from + 16, 16 * sizeof(T)), c = 32;
  if (c + 16 <= count) std::memcpy(to + c, from + c, 16 * sizeof(T)), c += 16;
  if (c + 8 <= count) std::memcpy(to + c, from + c, 8 * sizeof(T)), c += 8;
  if (c + 4 <= count) std::memcpy(to + c, from + c, 4 * sizeof(T)), c += 4;
  if (c + 2 <= count) std::memcpy(to + c, from + c, 2 * sizeof(T)), c += 2;
  if (c < count) to[c] = from[c];
}

// out[rows[r], columns[c]] (+)= tile[r, c], rows of the tile `width` apart.
template <class T>
CURVATURE_INLINE void place_tile(const T* tile, int64_t width, const PlacedRun& rows, const PlacedRun& columns, T* out,
                                 int64_t ld, bool add) {
  const int64_t run = columns.run(), down = rows.run(), left = columns[0];
  T* first = out + rows[0] * ld;
  for (int64_t r = 0; r < rows.count; ++r, tile += width) {
    T* to = r < down ? first + r * ld : out + rows[r] * ld;
    place_line<T>(tile, to + left, run, add);
    for (int64_t c = run; c < columns.count; ++c) place_line<T>(tile + c, to + columns[c], 1, add);
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
// for one of kParts parts of its lines.
class Waiting {
 public:
  static constexpr int64_t kParts = 4;

  template <class Fetch>
  void begin(int64_t count, const Fetch& fetch) {
    count_ = count, next_ = 0;
    for (int64_t part = 0; count > 0 && part < kParts; ++part) fetch(0, part);
  }
  // As many as are due when `done` of `of` multiplications are.
  template <class Place, class Fetch>
  void proceed(int64_t done, int64_t of, const Place& place, const Fetch& fetch) {
    for (const int64_t until = count_ * kParts * done / of; next_ < until; ++next_) {
      const int64_t k = next_ / kParts, part = next_ % kParts;
      if (part == 0) place(k);
      if (k + 1 < count_) fetch(k + 1, part);
    }
  }

 private:
  int64_t count_ = 0, next_ = 0;
};
}  // namespace torch_curvature::cpu
