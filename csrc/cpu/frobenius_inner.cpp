// frobenius_inner: out[b] = sum_ij x[b, i, j] y[b, i, j]
// Shapes: x, y [B, m, n], out [B]. Bytes moved: 2 B m n elements read. A matrix is cut into pieces of about kPiece
// elements whatever the number of threads, and the pieces are added in order: the result does not depend on who
// computed what.
#include "kernel.h"

namespace torch_curvature::cpu {
namespace {
constexpr int64_t kPiece = 65536;  // elements summed by one thread in one go
constexpr int64_t kLanes = 64;  // independent partial sums: hides the latency of additions, and shortens their chains
constexpr int64_t kTile = 32;   // edge of the tiles in which a transposed operand is read

template <class T>
struct Matrix {
  const T* data;
  int64_t row, col;
};

template <class T>
CURVATURE_INLINE accumulate_t<T> dot(const T* __restrict__ x, const T* __restrict__ y, int64_t n) {
  using A = accumulate_t<T>;
  A lanes[kLanes] = {};
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes)
    for (int64_t k = 0; k < kLanes; ++k) lanes[k] += static_cast<A>(x[j + k]) * static_cast<A>(y[j + k]);
  A tail = 0;
  for (; j < n; ++j) tail += static_cast<A>(x[j]) * static_cast<A>(y[j]);
  for (int64_t width = kLanes / 2; width > 0; width /= 2)
    for (int64_t k = 0; k < width; ++k) lanes[k] += lanes[k + width];
  return lanes[0] + tail;
}

// Rows [first, last) of two row-major matrices.
template <class T>
CURVATURE_CLONES accumulate_t<T> rows_by_rows(Matrix<T> x, Matrix<T> y, int64_t first, int64_t last, int64_t n) {
  if (x.row == n && y.row == n) return dot<T>(x.data + first * n, y.data + first * n, (last - first) * n);
  accumulate_t<T> sum = 0;
  for (int64_t i = first; i < last; ++i) sum += dot<T>(x.data + i * x.row, y.data + i * y.row, n);
  return sum;
}

// x row-major, y with any strides: y is read tile by tile, along its own fast axis, into a buffer that is row-major.
template <class T>
CURVATURE_CLONES accumulate_t<T> rows_by_any(Matrix<T> x, Matrix<T> y, int64_t first, int64_t last, int64_t n) {
  using A = accumulate_t<T>;
  A lanes[kTile] = {};
  A buffer[kTile][kTile];
  for (int64_t i0 = first; i0 < last; i0 += kTile)
    for (int64_t j0 = 0; j0 < n; j0 += kTile) {
      const int64_t height = std::min(kTile, last - i0), width = std::min(kTile, n - j0);
      const T* from = y.data + i0 * y.row + j0 * y.col;
      if (y.row == 1) {
        for (int64_t j = 0; j < width; ++j)
          for (int64_t i = 0; i < height; ++i) buffer[i][j] = static_cast<A>(from[i + j * y.col]);
      } else {
        for (int64_t i = 0; i < height; ++i)
          for (int64_t j = 0; j < width; ++j) buffer[i][j] = static_cast<A>(from[i * y.row + j * y.col]);
      }
      for (int64_t i = 0; i < height; ++i) {
        const T* row = x.data + (i0 + i) * x.row + j0 * x.col;
        if (x.col == 1) {
          for (int64_t j = 0; j < width; ++j) lanes[j] += static_cast<A>(row[j]) * buffer[i][j];
        } else {
          for (int64_t j = 0; j < width; ++j) lanes[j] += static_cast<A>(row[j * x.col]) * buffer[i][j];
        }
      }
    }
  A sum = 0;
  for (A lane : lanes) sum += lane;
  return sum;
}

template <class T>
void frobenius(const Strided<2>& sx, const Strided<2>& sy, int64_t B, int64_t m, int64_t n, T* out) {
  using A = accumulate_t<T>;
  // The sum does not care which axis is called the row: let the rows be contiguous in x, or else in y.
  const bool swap_axes = sx.core[1] != 1 && (sx.core[0] == 1 || sy.core[0] == 1);
  const int r = swap_axes ? 1 : 0, c = 1 - r;
  if (swap_axes) std::swap(m, n);
  const bool swap_operands = sx.core[c] != 1 && sy.core[c] == 1;
  const Strided<2>&p = swap_operands ? sy : sx, &q = swap_operands ? sx : sy;
  const bool plain = p.core[c] == 1 && q.core[c] == 1;

  const int64_t height = std::max<int64_t>(1, std::min(m, kPiece / std::max<int64_t>(1, n))),
                pieces = (m + height - 1) / height;
  std::vector<A> partial(B * pieces);
  parallel_over(B * pieces, height * n, [&](int64_t from, int64_t to) {
    for (int64_t k = from; k < to; ++k) {
      const int64_t b = k / pieces, first = k % pieces * height, last = std::min(m, first + height);
      const Matrix<T> x{p.data<T>() + b * p.batch, p.core[r], p.core[c]},
          y{q.data<T>() + b * q.batch, q.core[r], q.core[c]};
      partial[k] = plain ? rows_by_rows<T>(x, y, first, last, n) : rows_by_any<T>(x, y, first, last, n);
    }
  });
  for (int64_t b = 0; b < B; ++b) {
    A sum = 0;
    for (int64_t k = 0; k < pieces; ++k) sum += partial[b * pieces + k];
    out[b] = static_cast<T>(sum);
  }
}

Tensor frobenius_inner(const Tensor& a, const Tensor& b) {
  const FrobeniusSizes s = check_frobenius_inner(a, b);
  Tensor out = new_result("frobenius_inner", a, s.batch);
  const int64_t B = product(s.batch);
  if (B == 0) return out;
  const auto sa = strided<2>(a, s.batch), sb = strided<2>(b, s.batch);
  dispatch_floating(a.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    frobenius<T>(sa, sb, B, s.m, s.n, static_cast<T*>(out.data_ptr()));
  });
  return out;
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torch_curvature, CPU, m) { m.impl("frobenius_inner", TORCH_BOX(&frobenius_inner)); }
}  // namespace torch_curvature::cpu
