// outer: out[b, i, j] = u[b, i] v[b, j]
// Shapes: u [B, m], v [B, n], out [B, m, n]. Bytes moved: B (m + n + m n) elements, all but B (m + n) of them writes.
// A thread takes a run of whole rows (b, i) of the output. Fresh pages come zeroed through the caches and are written
// there; a large `out` that exists is written past them.
#include "kernel.h"
#include "streaming.h"

#include <bit>

namespace torch_curvature::cpu {
namespace {

// n products of one scalar: the row of an outer product.
template <class T>
CURVATURE_INLINE void scaled_row(T scale, const T* __restrict__ v, int64_t stride, T* __restrict__ out, int64_t n) {
  using A = accumulate_t<T>;
  const A x = scale;
  if (stride == 1) {
    for (int64_t j = 0; j < n; ++j) out[j] = static_cast<T>(x * static_cast<A>(v[j]));
  } else {
    for (int64_t j = 0; j < n; ++j) out[j] = static_cast<T>(x * static_cast<A>(v[j * stride]));
  }
}

template <class T>
struct Operand {
  const T* data;
  int64_t batch, stride;
};

// Here and below: rows [first, last) of the result, `out` where the first of them goes.
template <class T>
CURVATURE_CLONES void outer_rows(Operand<T> u, Operand<T> v, T* out, int64_t m, int64_t n, int64_t first,
                                 int64_t last) {
  int64_t b = first / m, i = first % m;
  for (int64_t row = first; row < last; ++row, out += n) {
    scaled_row(u.data[b * u.batch + i * u.stride], v.data + b * v.batch, v.stride, out, n);
    if (++i == m) i = 0, ++b;
  }
}

// bfloat16 of many numbers at once: a row of v is widened once for all that it is multiplied with. Where it and the
// other factor are finite no product is NaN, and rounding to the nearest even is a sum of integers.
constexpr int64_t kWidened = 1024;

CURVATURE_CLONES bool widen(const c10::BFloat16* v, int64_t stride, int64_t n, float* __restrict__ to) {
  uint32_t largest = 0;
  for (int64_t j = 0; j < n; ++j) {
    const uint32_t bits = v[j * stride].x;
    to[j] = std::bit_cast<float>(bits << 16);
    largest = std::max(largest, bits & 0x7fff);
  }
  return largest < 0x7f80;
}

CURVATURE_CLONES void finite_row(float x, const float* __restrict__ v, c10::BFloat16* __restrict__ out, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    const uint32_t bits = std::bit_cast<uint32_t>(x * v[j]);
    out[j].x = static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
}

void outer_widened_rows(Operand<c10::BFloat16> u, Operand<c10::BFloat16> v, c10::BFloat16* out, int64_t m, int64_t n,
                        int64_t first, int64_t last) {
  float row[kWidened];
  for (int64_t done = first; done < last;) {
    const int64_t b = done / m, end = std::min(last, (b + 1) * m);
    const bool finite = widen(v.data + b * v.batch, v.stride, n, row);
    for (; done < end; ++done, out += n) {
      const c10::BFloat16 x = u.data[b * u.batch + (done - b * m) * u.stride];
      if (finite && (x.x & 0x7fff) < 0x7f80) finite_row(static_cast<float>(x), row, out, n);
      else scaled_row(x, v.data + b * v.batch, v.stride, out, n);
    }
  }
}

// Rows of a length known to the compiler: for tiny matrices the loop around a row costs more than the row.
template <class T, int n>
CURVATURE_CLONES void outer_short_rows(Operand<T> u, Operand<T> v, T* __restrict__ out, int64_t m, int64_t first,
                                       int64_t last) {
  using A = accumulate_t<T>;
  int64_t b = first / m, i = first % m;
  for (int64_t row = first; row < last;) {
    const T *x = u.data + b * u.batch, *y = v.data + b * v.batch;
    A right[n];
    for (int j = 0; j < n; ++j) right[j] = static_cast<A>(y[j * v.stride]);
    const int64_t end = std::min(last, row + m - i);
    for (; row < end; ++row, ++i, out += n) {
      const A left = static_cast<A>(x[i * u.stride]);
      for (int j = 0; j < n; ++j) out[j] = static_cast<T>(left * right[j]);
    }
    i = 0, ++b;
  }
}

template <class T>
void outer_any_rows(Operand<T> u, Operand<T> v, T* out, int64_t m, int64_t n, int64_t first, int64_t last) {
  switch (n) {
    case 2: return outer_short_rows<T, 2>(u, v, out, m, first, last);
    case 3: return outer_short_rows<T, 3>(u, v, out, m, first, last);
    case 4: return outer_short_rows<T, 4>(u, v, out, m, first, last);
    case 5: return outer_short_rows<T, 5>(u, v, out, m, first, last);
    case 6: return outer_short_rows<T, 6>(u, v, out, m, first, last);
    case 7: return outer_short_rows<T, 7>(u, v, out, m, first, last);
    case 8: return outer_short_rows<T, 8>(u, v, out, m, first, last);
    case 16: return outer_short_rows<T, 16>(u, v, out, m, first, last);
    default:
      if constexpr (std::is_same_v<T, c10::BFloat16>)
        if (n <= kWidened) return outer_widened_rows(u, v, out, m, n, first, last);
      return outer_rows<T>(u, v, out, m, n, first, last);
  }
}

// The same through a buffer in the first cache: whole rows, as many as end on a line where that can be, or pieces of
// one.
template <class T>
void outer_streamed(Operand<T> u, Operand<T> v, T* out, int64_t m, int64_t n, int64_t first, int64_t last) {
  constexpr int64_t kStage = 8192 / sizeof(T), kLine = kLineBytes / sizeof(T);
  alignas(kLineBytes) T stage[kStage];
  const int64_t width = std::min(n, kStage), fit = kStage / width, rows = fit > kLine ? fit / kLine * kLine : fit;
  for (int64_t row = first; row < last; row += rows) {
    const int64_t end = std::min(last, row + rows);
    for (int64_t j = 0; j < n; j += width) {
      const int64_t piece = std::min(width, n - j);
      outer_any_rows<T>(u, {v.data + j * v.stride, v.batch, v.stride}, stage, m, piece, row, end);
      stream(out + (row - first) * n + j, stage, (end - row) * piece * sizeof(T));
    }
  }
  finish_stream();
}

void outer_into(const Tensor& u, const Tensor& v, const OuterSizes& s, Tensor& out, bool fresh) {
  const int64_t rows = product(s.batch) * s.m;
  if (rows == 0 || s.n == 0) return;
  const auto su = strided<1>(u, s.batch), sv = strided<1>(v, s.batch);
  dispatch_floating(u.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Operand<T> pu{su.data<T>(), su.batch, su.core[0]}, pv{sv.data<T>(), sv.batch, sv.core[0]};
    T* po = static_cast<T*>(out.data_ptr());
    const bool past = !fresh && rows * s.n * static_cast<int64_t>(sizeof(T)) >= kStreamBytes;
    parallel_over(rows, s.n, [&](int64_t first, int64_t last) {
      (past ? outer_streamed<T> : outer_any_rows<T>)(pu, pv, po + first * s.n, s.m, s.n, first, last);
    });
  });
}

Tensor outer(const Tensor& u, const Tensor& v) {
  const OuterSizes s = check_outer(u, v);
  Tensor out = new_result("outer", u, s.result);
  outer_into(u, v, s, out, true);
  return out;
}

void outer_out(const Tensor& u, const Tensor& v, Tensor out) {
  const OuterSizes s = check_outer(u, v);
  check_out("outer", out, u, s.result);
  outer_into(u, v, s, out, false);
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torch_curvature, CPU, m) {
  m.impl("outer", TORCH_BOX(&outer));
  m.impl("outer_out", TORCH_BOX(&outer_out));
}
}  // namespace torch_curvature::cpu
