// frobenius_inner: out[b] = sum_ij x[b, i, j] y[b, i, j]
// Shapes: x, y [B, m, n], out [B]. Bytes moved: 2 B m n elements read. A matrix is cut into pieces of about kPiece
// elements whatever the number of threads, and the pieces are added in order: the result does not depend on who
// computed what.
#include "kernel.h"
#include "tile_product.h"

namespace torch_curvature::cpu {
namespace {
constexpr int64_t kPiece = 65536;  // elements summed by one thread in one go
constexpr int64_t kLanes = 64;    // independent partial sums: hides the latency of additions, and shortens their chains
constexpr int64_t kAhead = 4096;  // bytes between what is summed and what is asked for from memory
constexpr int64_t kBlock = 128;   // edge of the blocks that a transposed operand is cut into
constexpr int64_t kTile = 8;      // edge of what is transposed at a time
constexpr int64_t kBuffer = 32;   // edge of the tiles in which other strides are read

template <class T>
struct Matrix {
  const T* data;
  int64_t batch, row, col;
  const T* at(int64_t b, int64_t i, int64_t j) const { return data + b * batch + i * row + j * col; }
};

template <class T>
CURVATURE_INLINE accumulate_t<T> dot(const T* __restrict__ x, const T* __restrict__ y, int64_t n) {
  using A = accumulate_t<T>;
  A lanes[kLanes] = {};
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    for (int64_t k = 0; k < kLanes; k += 64 / sizeof(T)) {
      __builtin_prefetch(reinterpret_cast<const char*>(x + j + k) + kAhead);
      __builtin_prefetch(reinterpret_cast<const char*>(y + j + k) + kAhead);
    }
    for (int64_t k = 0; k < kLanes; ++k) lanes[k] += static_cast<A>(x[j + k]) * static_cast<A>(y[j + k]);
  }
  A tail = 0;
  for (; j < n; ++j) tail += static_cast<A>(x[j]) * static_cast<A>(y[j]);
  for (int64_t width = kLanes / 2; width > 0; width /= 2)
    for (int64_t k = 0; k < width; ++k) lanes[k] += lanes[k + width];
  return lanes[0] + tail;
}

// Blocks of h rows of n, both row-major.
template <class T>
CURVATURE_CLONES accumulate_t<T> rows_by_rows(const T* x, int64_t xs, const T* y, int64_t ys, int64_t h, int64_t n) {
  if (xs == n && ys == n) return dot<T>(x, y, h * n);
  accumulate_t<T> sum = 0;
  for (int64_t i = 0; i < h; ++i) sum += dot<T>(x + i * xs, y + i * ys, n);
  return sum;
}

// Lines of the block after this one, asked for in the order in which they lie, a few for each tile of this one: a
// transposed operand runs against the order that the hardware foresees.
struct Ahead {
  const char* row;
  int64_t stride, bytes, at = 0;
  CURVATURE_INLINE void step() {
    __builtin_prefetch(row + at, 0, 2);
    if ((at += 64) >= bytes) at = 0, row += stride;
  }
};

// sum += sum_ij x[i, j] y[j, i] over 4 x 4: y is transposed in registers.
template <class A>
struct Four {
  typedef A Vector __attribute__((vector_size(4 * sizeof(A)), aligned(sizeof(A)), may_alias));
};
template <class A>
CURVATURE_INLINE void add_four(const A* x, int64_t xs, const A* y, int64_t ys, typename Four<A>::Vector* sum) {
  using V = typename Four<A>::Vector;
  auto load = [](const A* p, V& into) __attribute__((always_inline)) { into = *reinterpret_cast<const V*>(p); };
  V a, b, c, d, x0, x1, x2, x3;  // by reference: a function that returned them would depend on the instruction set
  load(y, a), load(y + ys, b), load(y + 2 * ys, c), load(y + 3 * ys, d);
  load(x, x0), load(x + xs, x1), load(x + 2 * xs, x2), load(x + 3 * xs, x3);
  const V ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab2 = __builtin_shufflevector(a, b, 2, 6, 3, 7),
          cd = __builtin_shufflevector(c, d, 0, 4, 1, 5), cd2 = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  sum[0] += x0 * __builtin_shufflevector(ab, cd, 0, 1, 4, 5);
  sum[1] += x1 * __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
  sum[2] += x2 * __builtin_shufflevector(ab2, cd2, 0, 1, 4, 5);
  sum[3] += x3 * __builtin_shufflevector(ab2, cd2, 2, 3, 6, 7);
}

// A block, x[i xs + j] against y[i + j ys]: the rows of one are contiguous, and the columns of the other.
template <class T>
CURVATURE_CLONES accumulate_t<T> rows_by_columns(const T* x, int64_t xs, const T* y, int64_t ys, int64_t h, int64_t w,
                                                 Ahead next_x, Ahead next_y) {
  using A = accumulate_t<T>;
  typename Four<A>::Vector sum[4] = {};
  A rest = 0;
  for (int64_t i = 0; i < h; i += kTile)
    for (int64_t j = 0; j < w; j += kTile) {
      const T *p = x + i * xs + j, *q = y + i + j * ys;
      for (size_t line = 0; line < kTile * kTile * sizeof(T) / 64; ++line) next_x.step(), next_y.step();
      if (h - i < kTile || w - j < kTile) {
        for (int64_t r = 0; r < std::min(kTile, h - i); ++r)
          for (int64_t c = 0; c < std::min(kTile, w - j); ++c)
            rest += static_cast<A>(p[r * xs + c]) * static_cast<A>(q[r + c * ys]);
        continue;
      }
      if constexpr (std::is_same_v<T, A>) {
        for (int64_t r = 0; r < kTile; r += 4)
          for (int64_t c = 0; c < kTile; c += 4) add_four<A>(p + r * xs + c, xs, q + r + c * ys, ys, sum);
      } else {
        A left[kTile * kTile], right[kTile * kTile];
        for (int64_t r = 0; r < kTile; ++r)
          for (int64_t c = 0; c < kTile; ++c) left[r * kTile + c] = static_cast<A>(p[r * xs + c]);
        for (int64_t c = 0; c < kTile; ++c)
          for (int64_t r = 0; r < kTile; ++r) right[c * kTile + r] = static_cast<A>(q[r + c * ys]);
        for (int64_t r = 0; r < kTile; r += 4)
          for (int64_t c = 0; c < kTile; c += 4)
            add_four<A>(left + r * kTile + c, kTile, right + r + c * kTile, kTile, sum);
      }
    }
  for (int k = 1; k < 4; ++k) sum[0] += sum[k];
  return ((sum[0][0] + sum[0][1]) + (sum[0][2] + sum[0][3])) + rest;
}

// Any strides: y is read tile by tile, along its own fast axis, into a buffer that is row-major.
template <class T>
CURVATURE_CLONES accumulate_t<T> any_by_any(Matrix<T> x, Matrix<T> y, int64_t h, int64_t n) {
  using A = accumulate_t<T>;
  A lanes[kBuffer] = {};
  A buffer[kBuffer][kBuffer];
  for (int64_t i0 = 0; i0 < h; i0 += kBuffer)
    for (int64_t j0 = 0; j0 < n; j0 += kBuffer) {
      const int64_t height = std::min(kBuffer, h - i0), width = std::min(kBuffer, n - j0);
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
  const Matrix<T> x{p.data<T>(), p.batch, p.core[r], p.core[c]}, y{q.data<T>(), q.batch, q.core[r], q.core[c]};
  const bool plain = x.col == 1 && y.col == 1, across = !plain && x.col == 1 && y.row == 1;

  // A piece is a block of a matrix: of whole rows, or a square where the operands lie across each other.
  const int64_t width = across ? std::min(n, kBlock) : n,
                height = std::min(m, across ? kBlock : std::max<int64_t>(1, kPiece / std::max<int64_t>(1, n))),
                columns = n ? divide_up(n, width) : 0, pieces = m ? divide_up(m, height) * columns : 0;
  std::vector<A> partial(B * pieces);
  parallel_over(B * pieces, height * width, [&](int64_t from, int64_t to) {
    for (int64_t k = from; k < to; ++k) {
      const int64_t b = k / pieces, i = k % pieces / columns * height, j = k % columns * width;
      const int64_t h = std::min(height, m - i), w = std::min(width, n - j);
      const T *px = x.at(b, i, j), *py = y.at(b, i, j);
      if (plain) {
        partial[k] = rows_by_rows<T>(px, x.row, py, y.row, h, w);
      } else if (across) {
        const int64_t next = std::min(k + 1, to - 1), nb = next / pieces, ni = next % pieces / columns * height,
                      nj = next % columns * width, size = sizeof(T);
        const Ahead next_x{reinterpret_cast<const char*>(x.at(nb, ni, nj)), x.row * size, width * size},
            next_y{reinterpret_cast<const char*>(y.at(nb, ni, nj)), y.col * size, height * size};
        partial[k] = rows_by_columns<T>(px, x.row, py, y.col, h, w, next_x, next_y);
      } else {
        partial[k] = any_by_any<T>({px, 0, x.row, x.col}, {py, 0, y.row, y.col}, h, w);
      }
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
