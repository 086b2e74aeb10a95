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

// A sample's input, row by row as it lies, into its parts [y stride][x stride][C][rows][columns]: the number at (h, w)
// is that of row (h + padding) / stride and part (h + padding) % stride. What is outside of the input stays zero.
template <class T>
CURVATURE_CLONES void pack_input(const T* x, int64_t channel, int64_t row, int64_t column, Geometry z,
                                 T* __restrict__ out) {
  const int64_t width = z.x.extent();
  for (int64_t c = 0; c < z.C; ++c)
    for (int64_t h = 0; h < z.y.size; ++h) {
      const int64_t r = (h + z.y.padding) / z.y.stride, ry = (h + z.y.padding) % z.y.stride;
      if (r >= z.y.extent() || !z.y.meets(ry)) continue;
      for (int64_t rx = 0; rx < z.x.stride; ++rx) {
        if (!z.x.meets(rx)) continue;
        // columns s of the part with 0 <= w = s stride + rx - padding < size
        const int64_t s0 = z.x.padding > rx ? divide_up(z.x.padding - rx, z.x.stride) : 0;
        const int64_t w0 = s0 * z.x.stride + rx - z.x.padding;
        const int64_t count = w0 < z.x.size ? std::min(width - s0, divide_up(z.x.size - w0, z.x.stride)) : 0;
        const T* from = x + c * channel + h * row + w0 * column;
        T* to = out + ((ry * z.x.stride + rx) * z.C + c) * z.plane() + r * width + s0;
        const int64_t step = z.x.stride * column;
        if (step == 1)
          for (int64_t s = 0; s < count; ++s) to[s] = from[s];
        else if (step == 2)
          for (int64_t s = 0; s < count; ++s) to[s] = from[2 * s];
        else
          for (int64_t s = 0; s < count; ++s) to[s] = from[s * step];
      }
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
