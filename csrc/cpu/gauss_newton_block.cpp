// gauss_newton_block: out = sum_vn sign[v, n] vec(J[v, n]) vec(J[v, n])^T, J[v, n] = sum_s g[v, n, s] (x) a[n, s]
//
// Shapes: g [V, N, S, O], a [N, S, I], sign [V, N], out [P, P], P = O I. The cheaper by counted multiply-adds of
//   pairs:           sum_n sum_st B[n, s, t] (x) a_s a_t^T with B[n, s, t] = sum_v sign g_vs g_vt^T, over pairs
//                    o <= p, i <= j (kronecker_core.h, kronecker_positions.h)     N S^2 P^2 / 4 + N V S^2 O^2
//   rank-k update:   J in chunks of rows, upper triangle of J^T J                 V N S P + V N P^2 / 2
// so that with V columns the pairs cost less up to about sqrt(1.4 V) positions. The update shares rows among the
// threads where there are many and the result is small, tiles of the result elsewhere. With S = I = 1 it is the sum of
// g g^T of any rows (n, v), packed from where they lie. Every value of the upper triangle is written to both its
// places: symmetric to the bit. Bytes moved: the operands, and out, once (tiles shared: once for every chunk of J; rows
// shared: once for every piece, as partial sums of 8 MB at most).
#include "jacobian.h"
#include "kronecker_core.h"
#include "kronecker_positions.h"

namespace torch_curvature::cpu {
namespace {

// B[k] = sum_v sign[v] g[v, o_k] g[v, p_k] for the pairs of a panel, zero beyond them.
template <class T, class A>
CURVATURE_CLONES void products_of_columns(const T* g, int64_t gv, int64_t go, const T* sign, int64_t sv, int64_t V,
                                          const Pair* pairs, int64_t count, A* __restrict__ to) {
  const bool run = count == kRows && pairs[0].o == pairs[kRows - 1].o && go == 1;
  for (int64_t c = 0; c < kRows; ++c) to[c] = A(0);
  for (int64_t v = 0; v < V; ++v, g += gv) {
    const A w = sign ? static_cast<A>(sign[v * sv]) : A(1);
    if (run) {
      const A left = w * static_cast<A>(g[pairs[0].o]);
      for (int64_t c = 0; c < kRows; ++c) to[c] += left * static_cast<A>(g[pairs[0].p + c]);
    } else {
      for (int64_t c = 0; c < count; ++c)
        to[c] += w * static_cast<A>(g[pairs[c].o * go]) * static_cast<A>(g[pairs[c].p * go]);
    }
  }
}

// B[n] is formed panel by panel, where the Kronecker sum packs it.
template <class T>
void by_pairs(const Jacobian<T>& J, const Sign<T>& sign, T* out) {
  using A = accumulate_t<T>;
  const JacobianSizes& s = J.size;
  const KroneckerProblem<T> problem{J.a, J.a, J.an, J.ai, J.an, J.ai, s.N, s.O, s.O, s.I, s.I, true, true, out};
  kronecker<T>(problem, [&](const Pair* pairs, int64_t count, A* to) {
    for (int64_t n = 0; n < s.N; ++n)
      products_of_columns<T, A>(J.g_at(0, n), J.gv, J.go, sign.data ? sign.data + n * sign.n : nullptr, sign.v, s.V,
                                pairs, count, to + n * kRows);
  });
}

// Where J is g itself, times a[n] (one position, one input): rows (n, v) first.. packed without a product, as many
// columns v of one sample at a time as there are (one sample after the other where there is but one column).
template <class T, class A>
void copy_rows(const Jacobian<T>& J, int64_t first, int64_t count, int64_t depth, A* packed) {
  constexpr int64_t W = kCols<A>;
  const JacobianSizes& s = J.size;
  for (int64_t k = 0; k < count;) {
    const int64_t n = (first + k) / s.V, v = (first + k) % s.V;
    const int64_t run = s.V == 1 ? count : std::min(count - k, s.V - v), stride = s.V == 1 ? J.gn : J.gv;
    for (int64_t p = 0; p < panels<A>(s.O); ++p)
      pack_panel<T, A>(J.g_at(v, n) + p * W * J.go, run, stride, J.go, panel_width<A>(s.O, p),
                       packed + (p * depth + k) * W);
    for (int64_t r = k; r < k + run; ++r) {
      const A scale = static_cast<A>(*J.a_at(s.V == 1 ? first + r : n));
      if (scale == A(1)) {
        if (s.V == 1) continue;
        break;
      }
      for (int64_t p = 0; p < panels<A>(s.O); ++p)
        for (int64_t c = 0; c < W; ++c) packed[(p * depth + r) * W + c] *= scale;
    }
    k += run;
  }
}

// Rows (n, v) first.. of J, of which `count`, packed as panels of columns (o, i): [panels][depth][kCols].
template <class T, class A>
void form_rows(const Jacobian<T>& J, int64_t first, int64_t count, int64_t depth, A* packed) {
  constexpr int64_t W = kCols<A>;
  const JacobianSizes& s = J.size;
  const int64_t P = s.O * s.I;
  if (s.S == 1 && s.I == 1) return copy_rows<T, A>(J, first, count, depth, packed);
  SampleProduct<T> product(s.S, {s.O, J.go, J.gs}, {s.I, J.ai, J.as});
  Buffer<A> tile(kRows * W);
  for (int64_t k = 0; k < count; ++k) {
    const int64_t n = (first + k) / s.V, v = (first + k) % s.V;
    if (k == 0 || v == 0) product.set_y(J.a_at(n));
    product.set_x(J.g_at(v, n));
    A* row = packed + k * W;
    for (int64_t c = P; c < panels<A>(P) * W; ++c) row[c / W * depth * W + c % W] = 0;
    for (int64_t q = 0; q < product.columns(); ++q)
      for (int64_t r = 0; r < product.bands(); ++r) {
        product.tile(r, q, tile);
        const int64_t width = panel_width<A>(s.I, q);
        for (int64_t h = 0; h < std::min(kRows, s.O - r * kRows); ++h) {
          const int64_t c = (r * kRows + h) * s.I + q * W, head = std::min(width, W - c % W);  // may cross two panels
          std::copy_n(tile + h * W, head, row + c / W * depth * W + c % W);
          if (head < width) std::copy_n(tile + h * W + head, width - head, row + (c / W + 1) * depth * W);
        }
      }
  }
}

// Tile (p, q) of out, to both its places.
template <class T, class A>
void store(A* tile, int64_t p, int64_t q, int64_t P, bool add, T* out) {
  constexpr int64_t W = kCols<A>;
  const int64_t rows = std::min(W, P - p * W), cols = std::min(W, P - q * W);
  T *upper = out + p * W * P + q * W, *lower = out + q * W * P + p * W;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = p == q ? r : 0; c < cols; ++c) {
      if (add) tile[r * W + c] += static_cast<A>(upper[r * P + c]);
      upper[r * P + c] = static_cast<T>(tile[r * W + c]);
    }
  for (int64_t c = 0; c < cols; ++c)
    for (int64_t r = 0; r < (p == q ? c : rows); ++r) lower[c * P + r] = static_cast<T>(tile[r * W + c]);
}

// Tile (p, q) of y^T x over `count` packed rows, panels `depth` rows apart; on the diagonal what is right of it.
template <class A>
void multiply(TileProduct<A> product, const A* x, const A* y, int64_t depth, int64_t count, int64_t p, int64_t q,
              int64_t P, bool add, A* sums) {
  constexpr int64_t W = kCols<A>, kBands = W / kRows, kStep = 512;
  for (int64_t k0 = 0; k0 < count; k0 += kStep)
    for (int64_t band = 0; band < std::min(kBands, divide_up(P - p * W, kRows)); ++band) {
      const int64_t skip = p == q && 2 * band >= kBands ? W / 2 : 0;
      product(y + (p * depth + k0) * W + band * kRows, W, x + (q * depth + k0) * W + skip, W,
              {std::min(kStep, count - k0)}, sums + band * kRows * W + skip, std::min(kRows, P - p * W - band * kRows),
              panel_width<A>(P, q) - skip, add || k0 > 0);
    }
}

// Rows [first, first + count) of J in x and, times their signs, in y (where there are signs).
template <class T, class A>
void form_signed_rows(const Jacobian<T>& J, const Sign<T>& sign, int64_t first, int64_t count, int64_t depth, A* x,
                      A* y) {
  constexpr int64_t W = kCols<A>;
  form_rows<T, A>(J, first, count, depth, x);
  if (!sign.data) return;
  for (int64_t k = 0; k < count; ++k) {
    const A w = sign((first + k) % J.size.V, (first + k) / J.size.V);
    for (int64_t p = 0; p < panels<A>(J.size.O * J.size.I); ++p)
      for (int64_t c = 0; c < W; ++c) y[(p * depth + k) * W + c] = w * x[(p * depth + k) * W + c];
  }
}

// Many rows, small result: the rows go in pieces that do not depend on the threads; each piece is packed step by step
// in cache and multiplied into tiles of its own, which are summed in order.
template <class T>
void rank_k_by_rows(const Jacobian<T>& J, const Sign<T>& sign, int64_t pieces, T* out) {
  using A = accumulate_t<T>;
  constexpr int64_t W = kCols<A>, kTile = W * W, kElements = 1 << 16;
  const int64_t P = J.size.O * J.size.I, rows = J.size.V * J.size.N, wide = panels<A>(P), tiles = wide * (wide + 1) / 2;
  const int64_t step = std::clamp<int64_t>(kElements / (wide * W), 64, 512);
  const auto product = tile_product<A>();
  Buffer<A> partial(pieces * tiles * kTile);
  share_tasks(pieces, true, [&](int64_t piece) {
    const int64_t first = piece * rows / pieces, last = (piece + 1) * rows / pieces;
    Buffer<A> x(wide * step * W), y(sign.data ? wide * step * W : 0);
    for (int64_t k = first; k < last; k += step) {
      const int64_t count = std::min(step, last - k);
      form_signed_rows<T, A>(J, sign, k, count, step, x, y);
      A* sums = partial + piece * tiles * kTile;
      for (int64_t p = 0; p < wide; ++p)
        for (int64_t q = p; q < wide; ++q, sums += kTile)
          multiply<A>(product, x, sign.data ? y : x, step, count, p, q, P, k > first, sums);
    }
  });
  share_tasks(wide, tiles * pieces * kTile > kWorthThreads, [&](int64_t p) {
    for (int64_t q = p; q < wide; ++q) {
      A* sums = partial + (p * wide - p * (p - 1) / 2 + q - p) * kTile;
      for (int64_t piece = 1; piece < pieces; ++piece)
        for (int64_t k = 0; k < kTile; ++k) sums[k] += sums[piece * tiles * kTile + k];
      store<T, A>(sums, p, q, P, false, out);
    }
  });
}

// Upper triangle of out (+)= J^T diag(sign) J for rows packed in x and, times their signs, in y; then mirrored.
template <class T, class A>
void update(const A* x, const A* y, int64_t depth, int64_t P, bool add, bool threads, T* out) {
  constexpr int64_t kNear = 4;  // tiles that share panels follow one another
  const int64_t wide = panels<A>(P);
  const auto product = tile_product<A>();
  std::vector<std::pair<int64_t, int64_t>> pairs;
  for (int64_t p0 = 0; p0 < wide; p0 += kNear)
    for (int64_t q0 = p0; q0 < wide; q0 += kNear)
      for (int64_t p = p0; p < std::min(wide, p0 + kNear); ++p)
        for (int64_t q = std::max(p, q0); q < std::min(wide, q0 + kNear); ++q) pairs.emplace_back(p, q);
  share_tasks(static_cast<int64_t>(pairs.size()), threads, [&](int64_t task) {
    const int64_t p = pairs[task].first, q = pairs[task].second;
    alignas(64) A sums[kCols<A> * kCols<A>];
    multiply<A>(product, x, y, depth, depth, p, q, P, false, sums);
    store<T, A>(sums, p, q, P, add, out);
  });
}

template <class T>
void rank_k(const Jacobian<T>& J, const Sign<T>& sign, T* out) {
  using A = accumulate_t<T>;
  constexpr int64_t W = kCols<A>, kElements = 1 << 24, kPart = 32, kPieces = 64, kPiece = 256, kPartial = 1 << 21;
  const JacobianSizes& s = J.size;
  const int64_t P = s.O * s.I, rows = s.V * s.N, wide = panels<A>(P);
  const int64_t pieces = std::min({kPieces, rows / kPiece, kPartial / (wide * (wide + 1) / 2 * W * W)});
  if (pieces > 1) return rank_k_by_rows<T>(J, sign, pieces, out);
  const int64_t depth = std::min(rows, std::max<int64_t>(256, kElements / (wide * W)));
  const bool threads = double(rows) * P * (P / 2 + s.S) > kWorthThreads;
  Buffer<A> x(wide * depth * W), y(sign.data ? wide * depth * W : 0);
  // Half types are summed in float32 over all chunks.
  const bool narrow = sizeof(T) < sizeof(A) && depth < rows;
  Buffer<A> sum(narrow ? P * P : 0);
  for (int64_t first = 0; first < rows; first += depth) {
    const int64_t count = std::min(depth, rows - first);
    share_tasks(divide_up(count, kPart), threads, [&](int64_t part) {
      const int64_t k0 = part * kPart, k1 = std::min(count, k0 + kPart);
      form_signed_rows<T, A>(J, sign, first + k0, k1 - k0, count, x + k0 * W, y + k0 * W);
    });
    const A* left = sign.data ? y : x;
    if (narrow) update<A, A>(x, left, count, P, first > 0, threads, sum);
    else update<T, A>(x, left, count, P, first > 0, threads, out);
  }
  if (narrow)
    parallel_over(P, P, [&](int64_t p0, int64_t p1) {
      for (int64_t k = p0 * P; k < p1 * P; ++k) out[k] = static_cast<T>(sum[k]);
    });
}

// Multiply-adds of one sample in whole tiles, and as many as it takes to form, to pack or to scatter.
template <class A>
bool pairs_cost_less(const JacobianSizes& s) {
  const double V = s.V, S = s.S, O = s.O, P = double(s.O) * s.I, half = kCols<A> / 2;
  const double rows = V * P * (S + 16) + V * P * P / 2;
  if (S == 1) return s.I > 1 && P * P / 4 + V * O * O <= rows;
  double columns = 0;
  for (const PairTile& t : square_tiles(s.I)) columns += half * divide_up(t.columns(), kCols<A> / 2);
  const double pairs = kRows * double(divide_up(s.O * (s.O + 1) / 2, kRows)) * columns;
  return S * S * (1.4 * pairs + 8 * V * O * O) <= rows;
}

void block_into(const Tensor& g, const Tensor& a, const std::optional<Tensor>& sign, const JacobianSizes& s,
                Tensor& out) {
  const double P = double(s.O) * s.I, VN = double(s.V) * s.N;
  if (P == 0) return;
  if (VN * s.S == 0) {
    torch::stable::zero_(out);
    return;
  }
  dispatch_floating(g.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Jacobian<T> J(g, a, s);
    const Sign<T> signs(sign);
    T* to = static_cast<T*>(out.data_ptr());
    if (!pairs_cost_less<accumulate_t<T>>(s)) rank_k<T>(J, signs, to);
    else s.S == 1 ? by_pairs<T>(J, signs, to) : kronecker_positions<T>(J, signs, to);
  });
}

Tensor gauss_newton_block(const Tensor& g, const Tensor& a, std::optional<Tensor> sign) {
  const JacobianSizes s = check_gauss_newton_block(g, a, sign);
  Tensor out = new_result("gauss_newton_block", g, {s.O * s.I, s.O * s.I});
  block_into(g, a, sign, s, out);
  return out;
}

void gauss_newton_block_out(const Tensor& g, const Tensor& a, std::optional<Tensor> sign, Tensor out) {
  const JacobianSizes s = check_gauss_newton_block(g, a, sign);
  check_out("gauss_newton_block", out, g, {s.O * s.I, s.O * s.I});
  block_into(g, a, sign, s, out);
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torch_curvature, CPU, m) {
  m.impl("gauss_newton_block", TORCH_BOX(&gauss_newton_block));
  m.impl("gauss_newton_block_out", TORCH_BOX(&gauss_newton_block_out));
}
}  // namespace torch_curvature::cpu
