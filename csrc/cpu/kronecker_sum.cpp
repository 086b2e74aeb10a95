// kronecker_sum: G[(o, i), (p, j)] = sum_n b[n, o, p] a[n, i] a2[n, j]
//
// One matrix product C = B^T A over n, of the pairs (o, p) of b by the pairs (i, j) of a x a2. Where a2 is a, only the
// pairs i <= j are multiplied; where b is symmetric, only o <= p: a quarter of the flops, and every value is written to
// its mirrored places, so that the result is symmetric to the bit. Shapes: b [N, O, O2], a [N, I], a2 [N, I2], G [O I,
// O2 I2]. Flops: 2 N (pairs of b) (pairs of a). A task is a chunk of pairs of b by a tile of pairs of a. It forms both
// operands itself, in buffers that stay in cache, multiplies them, and scatters the product: bytes to memory are those
// of G, written once.
#include "kernel.h"
#include "matrix_product.h"

#include <cstring>

namespace torch_curvature::cpu {
namespace {
constexpr int64_t kPairs = 256;  // pairs (o, p) of one task
constexpr int64_t kEdge = 32;    // edge of a tile of pairs (i, j)
constexpr int64_t kDepth = 512;  // samples multiplied in one go

struct Pair {
  int64_t o, p;
};
struct Tile {
  int64_t i0, i1, j0, j1;
  bool triangle;  // pairs i <= j only
  bool mirrored;  // (j, i) gets the value of (i, j)
  int64_t columns() const { return triangle ? (i1 - i0) * (i1 - i0 + 1) / 2 : (i1 - i0) * (j1 - j0); }
};

struct Problem {
  Strided<3> b;
  Strided<2> a, a2;
  int64_t N, O, O2, I, I2;
  std::vector<Pair> pairs;
  std::vector<Tile> tiles;
  bool symmetric;
};

std::vector<Pair> pairs_of(int64_t O, int64_t O2, bool symmetric) {
  std::vector<Pair> pairs;
  for (int64_t o = 0; o < O; ++o)
    for (int64_t p = symmetric ? o : 0; p < O2; ++p) pairs.push_back({o, p});
  return pairs;
}

std::vector<Tile> tiles_of(int64_t I, int64_t I2, bool same) {
  auto edge = [](int64_t n) { return (n + (n + kEdge - 1) / kEdge - 1) / ((n + kEdge - 1) / kEdge); };
  std::vector<Tile> tiles;
  const int64_t ei = edge(I), ej = edge(I2);
  for (int64_t i = 0; i < I; i += ei)
    for (int64_t j = same ? i : 0; j < I2; j += ej)
      tiles.push_back({i, std::min(I, i + ei), j, std::min(I2, j + ej), same && i == j, same});
  return tiles;
}

// Ap[n, (i, j)] = a[n, i] a2[n, j] for the pairs of the tile.
template <class T, class A>
CURVATURE_CLONES void pack_columns(const T* a, int64_t an, int64_t ai, const T* a2, int64_t a2n, int64_t a2j, Tile t,
                                   int64_t n0, int64_t n1, A* __restrict__ packed) {
  A left[kEdge], right[kEdge];
  for (int64_t n = n0; n < n1; ++n) {
    for (int64_t i = t.i0; i < t.i1; ++i) left[i - t.i0] = static_cast<A>(a[n * an + i * ai]);
    for (int64_t j = t.j0; j < t.j1; ++j) right[j - t.j0] = static_cast<A>(a2[n * a2n + j * a2j]);
    for (int64_t i = 0; i < t.i1 - t.i0; ++i)
      for (int64_t j = t.triangle ? i : 0; j < t.j1 - t.j0; ++j) *packed++ = left[i] * right[j];
  }
}

// Bp[n, q] = b[n, o_q, p_q] for a run of pairs.
template <class T, class A>
void pack_pairs(const T* b, const std::array<int64_t, 3>& stride, const Pair* pairs, int64_t count, int64_t n0,
                int64_t n1, A* __restrict__ packed) {
  for (int64_t n = n0; n < n1; ++n)
    for (int64_t q = 0; q < count; ++q)
      *packed++ = static_cast<A>(b[n * stride[0] + pairs[q].o * stride[1] + pairs[q].p * stride[2]]);
}

// Writes the products of one pair (o, p) with a tile to all the places that hold them.
template <class T, class A>
void scatter(const A* c, const Tile& t, Pair q, const Problem& s, T* G) {
  const int64_t height = t.i1 - t.i0, width = t.j1 - t.j0, ld = s.O2 * s.I2;
  T tile[kEdge][kEdge], flipped[kEdge][kEdge];  // [i][j] and [j][i]
  for (int64_t i = 0; i < height; ++i)
    for (int64_t j = t.triangle ? i : 0; j < width; ++j) {
      tile[i][j] = flipped[j][i] = static_cast<T>(*c++);
      if (t.triangle) tile[j][i] = flipped[i][j] = tile[i][j];
    }
  auto write = [&](const T(*from)[kEdge], int64_t row, int64_t rows, int64_t col, int64_t cols) {
    for (int64_t r = 0; r < rows; ++r) std::memcpy(G + (row + r) * ld + col, from[r], cols * sizeof(T));
  };
  const bool off_diagonal = t.mirrored && !t.triangle, twin = s.symmetric && q.o != q.p;
  write(tile, q.o * s.I + t.i0, height, q.p * s.I2 + t.j0, width);
  if (off_diagonal) write(flipped, q.o * s.I + t.j0, width, q.p * s.I2 + t.i0, height);
  if (twin) write(flipped, q.p * s.I + t.j0, width, q.o * s.I2 + t.i0, height);
  if (twin && off_diagonal) write(tile, q.p * s.I + t.i0, height, q.o * s.I2 + t.j0, width);
}

template <class T>
void one_sum(const Problem& s, const T* b, const T* a, const T* a2, T* G) {
  using A = accumulate_t<T>;
  const int64_t all = static_cast<int64_t>(s.pairs.size()), tiles = static_cast<int64_t>(s.tiles.size());
  const int64_t widest = std::min(all, kPairs), chunks = (all + kPairs - 1) / kPairs, depth = std::min(s.N, kDepth);
  int64_t columns = 0;
  for (const Tile& t : s.tiles) columns = std::max(columns, t.columns());
  torch::stable::parallel_for(0, chunks * tiles, 1, [&](int64_t first, int64_t last) {
    std::vector<A> bp(depth * widest), ap(depth * columns), c(widest * columns), more(s.N > depth ? c.size() : 0);
    for (int64_t task = first; task < last; ++task) {
      const Tile& t = s.tiles[task % tiles];
      const Pair* pairs = s.pairs.data() + task / tiles * kPairs;
      const int64_t count = std::min(kPairs, all - task / tiles * kPairs), width = t.columns();
      for (int64_t n0 = 0; n0 < s.N; n0 += depth) {
        const int64_t n1 = std::min(s.N, n0 + depth);
        pack_pairs<T, A>(b, s.b.core, pairs, count, n0, n1, bp.data());
        pack_columns<T, A>(a, s.a.core[0], s.a.core[1], a2, s.a2.core[0], s.a2.core[1], t, n0, n1, ap.data());
        A* into = n0 ? more.data() : c.data();
        matrix_product<A>(bp.data(), ap.data(), into, count, n1 - n0, width);
        if (n0)
          for (int64_t k = 0; k < count * width; ++k) c[k] += more[k];
      }
      for (int64_t q = 0; q < count; ++q) scatter<T, A>(c.data() + q * width, t, pairs[q], s, G);
    }
  });
}

void kronecker_into(const Tensor& b, const Tensor& a, const std::optional<Tensor>& a2, bool symmetric,
                    const KroneckerSizes& s, Tensor& out) {
  const int64_t B = product(s.batch), each = s.O * s.I * s.O2 * s.I2;
  if (B * each == 0) return;
  if (s.N == 0) {
    torch::stable::zero_(out);
    return;
  }
  Problem problem{strided<3>(b, s.batch),
                  strided<2>(a, s.batch),
                  strided<2>(a2 ? *a2 : a, s.batch),
                  s.N,
                  s.O,
                  s.O2,
                  s.I,
                  s.I2,
                  pairs_of(s.O, s.O2, symmetric),
                  tiles_of(s.I, s.I2, !a2),
                  symmetric};
  dispatch_floating(b.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t k = 0; k < B; ++k)
      one_sum<T>(problem, problem.b.template data<T>() + k * problem.b.batch,
                 problem.a.template data<T>() + k * problem.a.batch,
                 problem.a2.template data<T>() + k * problem.a2.batch, static_cast<T*>(out.data_ptr()) + k * each);
  });
}

Tensor kronecker_sum(const Tensor& b, const Tensor& a, std::optional<Tensor> a2, bool symmetric) {
  const KroneckerSizes s = check_kronecker_sum(b, a, a2, symmetric);
  Tensor out = new_result("kronecker_sum", b, s.result);
  kronecker_into(b, a, a2, symmetric, s, out);
  return out;
}

void kronecker_sum_out(const Tensor& b, const Tensor& a, std::optional<Tensor> a2, bool symmetric, Tensor out) {
  const KroneckerSizes s = check_kronecker_sum(b, a, a2, symmetric);
  check_out("kronecker_sum", out, b, s.result);
  kronecker_into(b, a, a2, symmetric, s, out);
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torch_curvature, CPU, m) {
  m.impl("kronecker_sum", TORCH_BOX(&kronecker_sum));
  m.impl("kronecker_sum_out", TORCH_BOX(&kronecker_sum_out));
}
}  // namespace torch_curvature::cpu
