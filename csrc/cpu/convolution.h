// Images as a convolution sees them, without being unfolded: their parts, and panels of derivatives beside them.
//
// The input of a sample is padded once, and parted by the residues of its rows and columns modulo the stride: for every
// place of the kernel, consecutive positions then see consecutive numbers. Derivatives are packed for runs over all
// positions in rows of the padded width, with zeros in the gaps (which make NaN of what is infinite there).
#pragma once
#include "jacobian.h"

namespace torch_curvature::cpu {
struct Axis {
  int64_t kernel, stride, padding, dilation, out, size;
  int64_t residue(int64_t k) const { return k * dilation % stride; }
  int64_t shift(int64_t k) const { return k * dilation / stride; }
  bool meets(int64_t r) const {  // whether a place of the kernel has this residue
    for (int64_t k = 0; k < kernel; ++k)
      if (residue(k) == r) return true;
    return false;
  }
  // Numbers s of the part of residue r with 0 <= s stride + r - padding < size: the first, and how many.
  int64_t first(int64_t r) const { return padding > r ? divide_up(padding - r, stride) : 0; }
  int64_t count(int64_t r) const {
    const int64_t at = first(r) * stride + r - padding;
    return at < size ? std::max<int64_t>(0, std::min(extent() - first(r), divide_up(size - at, stride))) : 0;
  }
  int64_t extent() const { return out + shift(kernel - 1); }  // of a part of the padded input
};

struct Geometry {
  int64_t C, O;
  Axis y, x;
  int64_t plane() const { return y.extent() * x.extent(); }
  int64_t depth() const { return (y.out - 1) * x.extent() + x.out; }
  int64_t part(int64_t ky, int64_t kx) const { return y.residue(ky) * x.stride + x.residue(kx); }
  int64_t shift(int64_t ky, int64_t kx) const { return y.shift(ky) * x.extent() + x.shift(kx); }
};

// The even ones of `count` numbers to `even`, the others to `odd`.
template <class T>
CURVATURE_INLINE void part_row(const T* from, int64_t count, T* even, T* odd) {
  typedef T Eight __attribute__((vector_size(8 * sizeof(T)), aligned(sizeof(T)), may_alias));
  int64_t k = 0;
  for (; 2 * k + 16 <= count; k += 8) {
    const Eight a = *reinterpret_cast<const Eight*>(from + 2 * k),
                b = *reinterpret_cast<const Eight*>(from + 2 * k + 8);
    *reinterpret_cast<Eight*>(even + k) = __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
    *reinterpret_cast<Eight*>(odd + k) = __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
  }
  for (; 2 * k < count; ++k) {
    even[k] = from[2 * k];
    if (2 * k + 1 < count) odd[k] = from[2 * k + 1];
  }
}

// One part of a sample's input, that of residues ry and rx, into [C][rows][columns]: the number at (h, w) goes to row
// (h + padding) / stride. What is outside of the input stays zero.
template <class T>
CURVATURE_CLONES void pack_part(const T* x, int64_t channel, int64_t row, int64_t column, Geometry z, int64_t ry,
                                int64_t rx, T* __restrict__ out) {
  const int64_t width = z.x.extent(), plane = z.plane(), step = z.x.stride * column, line = z.y.stride * row;
  const int64_t y0 = z.y.first(ry), rows = z.y.count(ry), x0 = z.x.first(rx), count = z.x.count(rx);
  const T* from = x + (y0 * z.y.stride + ry - z.y.padding) * row + (x0 * z.x.stride + rx - z.x.padding) * column;
  T* to = out + y0 * width + x0;
  if (channel == 1 && z.C >= 4) {  // channels last
    for (int64_t r = 0; r < rows; ++r) transpose_all<T, T>(from + r * line, step, count, z.C, to + r * width, plane);
    return;
  }
  for (int64_t c = 0; c < z.C; ++c)
    for (int64_t r = 0; r < rows; ++r) {
      const T* of = from + c * channel + r * line;
      T* at = to + c * plane + r * width;
      if (step == 1)
        for (int64_t s = 0; s < count; ++s) at[s] = of[s];
      else if (step == 2)
        for (int64_t s = 0; s < count; ++s) at[s] = of[2 * s];
      else
        for (int64_t s = 0; s < count; ++s) at[s] = of[s * step];
    }
}

// Both parts of residues 0 and 1 of contiguous rows, every second number of which belongs to one of them: read once.
template <class T>
CURVATURE_CLONES void pack_halves(const T* x, int64_t channel, int64_t row, Geometry z, int64_t ry,
                                  T* __restrict__ even, T* __restrict__ odd) {
  const int64_t width = z.x.extent(), plane = z.plane();
  const int64_t y0 = z.y.first(ry), rows = z.y.count(ry), odd_first = z.x.padding % 2;
  T *to = (odd_first ? odd : even) + y0 * width + z.x.first(odd_first),
    *other = (odd_first ? even : odd) + y0 * width + z.x.first(1 - odd_first);
  const T* from = x + (y0 * z.y.stride + ry - z.y.padding) * row;
  for (int64_t c = 0; c < z.C; ++c)
    for (int64_t r = 0; r < rows; ++r)
      part_row<T>(from + c * channel + r * z.y.stride * row, z.x.size, to + c * plane + r * width,
                  other + c * plane + r * width);
}

// A sample's input into its parts [y stride][x stride][C][rows][columns].
template <class T>
void pack_input(const T* x, int64_t channel, int64_t row, int64_t column, const Geometry& z, T* out) {
  const bool halves =
      z.x.stride == 2 && column == 1 && z.x.meets(0) && z.x.meets(1) && z.x.count(0) + z.x.count(1) == z.x.size;
  const int64_t part = z.C * z.plane();
  for (int64_t ry = 0; ry < z.y.stride; ++ry) {
    if (!z.y.meets(ry)) continue;
    T* to = out + ry * z.x.stride * part;
    if (halves) {
      pack_halves<T>(x, channel, row, z, ry, to, to + part);
      continue;
    }
    for (int64_t rx = 0; rx < z.x.stride; ++rx)
      if (z.x.meets(rx)) pack_part<T>(x, channel, row, column, z, ry, rx, to + rx * part);
  }
}

// Positions [rows, columns] of `count` outputs side by side, out[(y width + x) kCols + o]; what lies between stays.
// Those that are contiguous along positions are transposed four by four, in runs that the processor reads ahead.
template <class T>
CURVATURE_CLONES void pack_positions(const T* g, int64_t position, int64_t output, int64_t rows, int64_t columns,
                                     int64_t width, int64_t count, T* __restrict__ out) {
  constexpr int64_t W = kCols<T>, kRun = 128;
  if (position != 1 || !std::is_same_v<T, float>) {
    for (int64_t y = 0; y < rows; ++y)
      for (int64_t x = 0; x < columns; ++x)
        for (int64_t o = 0; o < count; ++o) out[(y * width + x) * W + o] = g[(y * columns + x) * position + o * output];
    return;
  }
  const int64_t several = std::max<int64_t>(1, kRun / columns);
  for (int64_t y0 = 0; y0 < rows; y0 += several)
    for (int64_t o = 0; o < count; o += 4)
      for (int64_t y = y0; y < std::min(rows, y0 + several); ++y) {
        const T* from = g + y * columns + o * output;
        T* to = out + y * width * W + o;
        int64_t x = 0;
        if constexpr (std::is_same_v<T, float>)
          for (; o + 4 <= count && x + 4 <= columns; x += 4) transpose_four(from + x, output, to + x * W, W);
        for (; x < columns; ++x)
          for (int64_t k = 0; k < std::min<int64_t>(4, count - o); ++k) to[x * W + k] = from[x + k * output];
      }
}
}  // namespace torch_curvature::cpu
