// gauss_newton_diagonal: out[o, i] = sum_vn sign[v, n] J[v, n, o, i]^2, J[v, n] = sum_s g[v, n, s] (x) a[n, s]
//
// Shapes: g [V, N, S, O], a [N, S, I], sign [V, N], out [O, I].
// S = 1: out = h^T a^2 with h[n, o] = sum_v sign g^2; 2 N O I + 3 N V O flops, bytes of g and a once.
// S > 1: each tile of J[v, n], or of its transpose, is squared and added as it leaves the registers; 2 V N S O I flops,
// J is never stored. What gives a tile its rows is read in place where it is contiguous along S.
// Samples go in a number of chunks that does not depend on the threads, so neither does the result.
#include "jacobian.h"

namespace torch_curvature::cpu {
namespace {
constexpr int64_t kTileSize = kCols<float> * kRows;  // room for a tile of either precision

// h[n, k] = sum_v sign[v, n] g[v, n, k]^2 for `count` outputs of samples n < N, packed with rows kRows apart.
template <class T, class A>
CURVATURE_CLONES void weighted_squares(const T* g, int64_t gv, int64_t gn, int64_t go, const T* sign, int64_t sv,
                                       int64_t sn, int64_t V, int64_t N, int64_t count, A* __restrict__ h) {
  for (int64_t n = 0; n < N; ++n) {
    const T* x = g + n * gn;
    A sum[kRows] = {};
    if (count == kRows && go == 1 && !sign) {
      for (int64_t v = 0; v < V; ++v)
        for (int64_t k = 0; k < kRows; ++k) sum[k] += static_cast<A>(x[v * gv + k]) * static_cast<A>(x[v * gv + k]);
    } else {
      for (int64_t v = 0; v < V; ++v) {
        const A w = sign ? static_cast<A>(sign[v * sv + n * sn]) : A(1);
        for (int64_t k = 0; k < count; ++k) {
          const A y = static_cast<A>(x[v * gv + k * go]);
          sum[k] += w * y * y;
        }
      }
    }
    for (int64_t k = 0; k < kRows; ++k) h[n * kRows + k] = sum[k];
  }
}

template <class A>
CURVATURE_CLONES void square(A* x, int64_t count) {
  for (int64_t k = 0; k < count; ++k) x[k] *= x[k];
}

// A tile to its place in out [rows, cols], or in its transpose [cols, rows].
template <class T, class A>
void store(const A* tile, int64_t r0, int64_t c0, int64_t rows, int64_t cols, bool transposed, T* out) {
  for (int64_t r = r0; r < std::min(r0 + kRows, rows); ++r)
    for (int64_t c = c0; c < std::min(c0 + kCols<A>, cols); ++c)
      out[transposed ? c * rows + r : r * cols + c] = static_cast<T>(tile[(r - r0) * kCols<A> + c - c0]);
}

template <class T>
void one_position(const Jacobian<T>& J, const Sign<T>& sign, T* out) {
  using A = accumulate_t<T>;
  constexpr int64_t W = kCols<A>, kSamples = 256;
  const JacobianSizes& s = J.size;
  const int64_t columns = panels<A>(s.I);
  const bool threads = double(s.N) * s.O * (s.I + s.V) > kWorthThreads;
  const auto product = tile_product<A>();
  Buffer<A> squares(columns * s.N * W);
  share_tasks(columns, threads, [&](int64_t q) {
    A* panel = squares + q * s.N * W;
    pack_panel<T, A>(J.a + q * W * J.ai, s.N, J.an, J.ai, panel_width<A>(s.I, q), panel);
    square<A>(panel, s.N * W);
  });
  share_tasks(divide_up(s.O, kRows), threads, [&](int64_t r) {
    const int64_t rows = std::min(kRows, s.O - r * kRows);
    Buffer<A> h(kSamples * kRows), tiles(columns * kTileSize);
    for (int64_t n0 = 0; n0 < s.N; n0 += kSamples) {
      const int64_t count = std::min(kSamples, s.N - n0);
      weighted_squares<T, A>(J.g_at(0, n0) + r * kRows * J.go, J.gv, J.gn, J.go,
                             sign.data ? sign.data + n0 * sign.n : nullptr, sign.v, sign.n, s.V, count, rows, h);
      for (int64_t q = 0; q < columns; ++q)
        product(h, kRows, squares + (q * s.N + n0) * W, W, {count}, tiles + q * kTileSize, rows, panel_width<A>(s.I, q),
                n0 > 0);
    }
    for (int64_t q = 0; q < columns; ++q) store<T, A>(tiles + q * kTileSize, r * kRows, q * W, s.O, s.I, false, out);
  });
}

template <class T>
void many_positions(const Jacobian<T>& J, const Sign<T>& sign, T* out) {
  using A = accumulate_t<T>;
  constexpr int64_t W = kCols<A>, kChunks = 16, kPartial = 1 << 24;
  const JacobianSizes& s = J.size;
  const bool swapped = inputs_as_rows<T>(J, s.O, s.I);
  const Columns outputs{s.O, J.go, J.gs}, inputs{s.I, J.ai, J.as};
  const Columns x = swapped ? inputs : outputs, y = swapped ? outputs : inputs;
  const int64_t bands = divide_up(x.count, kRows), columns = panels<A>(y.count), tiles = bands * columns;
  // Chunks of samples by groups of columns: partial sums stay small however large O and I are.
  const int64_t chunks = std::clamp<int64_t>(kPartial / (tiles * kTileSize), 1, std::min(s.N, kChunks));
  const int64_t groups = std::min(columns, divide_up(kChunks, chunks)), wide = divide_up(columns, groups);
  const bool threads = double(s.V) * s.N * s.S * s.O * s.I > kWorthThreads;
  Buffer<A> partial(chunks * tiles * kTileSize);
  share_tasks(chunks * groups, threads, [&](int64_t task) {
    const int64_t chunk = task / groups, q0 = task % groups * wide, q1 = std::min(columns, q0 + wide);
    if (q0 >= q1) return;
    A* sums = partial + chunk * tiles * kTileSize;
    for (int64_t q = q0; q < q1; ++q) std::fill_n(sums + q * bands * kTileSize, bands * kTileSize, A(0));
    SampleProduct<T> product(s.S, x, {std::min(y.count, q1 * W) - q0 * W, y.stride, y.step});
    Buffer<A> tile(kTileSize);
    std::fill_n(static_cast<A*>(tile), kTileSize, A(0));
    const int64_t first = q0 * W * y.stride;
    for (int64_t n = chunk * s.N / chunks; n < (chunk + 1) * s.N / chunks; ++n) {
      swapped ? product.set_x(J.a_at(n)) : product.set_y(J.a_at(n) + first);
      for (int64_t v = 0; v < s.V; ++v) {
        swapped ? product.set_y(J.g_at(v, n) + first) : product.set_x(J.g_at(v, n));
        const A w = sign(v, n);
        for (int64_t q = q0; q < q1; ++q)
          for (int64_t r = 0; r < bands; ++r) {
            product.tile(r, q - q0, tile);
            add_weighted_squares<A>(tile, w, sums + (q * bands + r) * kTileSize);
          }
      }
    }
  });
  share_tasks(tiles, threads, [&](int64_t t) {
    A* sum = partial + t * kTileSize;
    for (int64_t chunk = 1; chunk < chunks; ++chunk)
      for (int64_t k = 0; k < kRows * W; ++k) sum[k] += partial[(chunk * tiles + t) * kTileSize + k];
    store<T, A>(sum, t % bands * kRows, t / bands * W, x.count, y.count, swapped, out);
  });
}

Tensor gauss_newton_diagonal(const Tensor& g, const Tensor& a, std::optional<Tensor> sign) {
  const JacobianSizes s = check_gauss_newton_diagonal(g, a, sign);
  Tensor out = new_result("gauss_newton_diagonal", g, {s.O, s.I});
  if (s.O * s.I == 0) return out;
  if (s.V * s.N * s.S == 0) return torch::stable::zero_(out);
  dispatch_floating(g.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Jacobian<T> J(g, a, s);
    const Sign<T> signs(sign);
    T* to = static_cast<T*>(out.data_ptr());
    s.S == 1 ? one_position<T>(J, signs, to) : many_positions<T>(J, signs, to);
  });
  return out;
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torch_curvature, CPU, m) {
  m.impl("gauss_newton_diagonal", TORCH_BOX(&gauss_newton_diagonal));
}
}  // namespace torch_curvature::cpu
