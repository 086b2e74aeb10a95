// kronecker_sum: G[(o, i), (p, j)] = sum_n b[n, o, p] a[n, i] a2[n, j]
// Shapes: b [B, N, O, O2], a [B, N, I], a2 [B, N, I2] of any strides, G [B, O I, O2 I2] contiguous.
//
// One matrix product over n of the pairs (o, p) of b by the pairs (i, j) of a and a2. Where a2 is a, only pairs i >= j
// are multiplied; where b is symmetric, only o >= p: a quarter of the flops; every value is written to its mirrored
// places, so that the result is symmetric to the bit. Both operands are formed on the way to shared memory. Flops: 2 N
// (pairs of b) (pairs of a). Bytes moved: G written once; b and a are read from cache again by every tile.
// Of the places of a product half lie along the rows of G, as the threads of a warp do; the other half a row apart, a
// 32-byte sector each, which the second-level cache collects: P^2 / 2 sectors (G is P x P), which at 64 bytes a cycle
// and multiprocessor take about as long as writing G to memory does. Mirroring in a second pass would move half as much
// again as G itself.
#pragma once
#include "tile_product.cuh"

namespace torch_curvature::cuda {

// Which pairs (o, p) and (i, j) are multiplied.
struct KroneckerPairs {
  int64_t O, O2, I, I2;
  bool b_symmetric, a_same;

  // Calls put(o, i, p, j) for the place of a product and for those where it stands mirrored.
  template <class Put>
  __device__ void for_each_place(Pair op, Pair ij, Put put) const {
    const int o = op.first, p = op.second, i = ij.first, j = ij.second;
    put(o, i, p, j);
    if (a_same && i != j) put(o, j, p, i);
    if (b_symmetric && o != p) {
      put(p, i, o, j);
      if (a_same && i != j) put(p, j, o, i);
    }
  }
};

// Where products go in G [B, O I, O2 I2].
template <class T>
struct KroneckerScatter : KroneckerPairs {
  T* out;

  __device__ void store(int64_t k, Pair op, Pair ij, accumulate_t<T> sum) const {
    const T value = narrow<T>(sum);
    for_each_place(op, ij,
                   [&](int o, int i, int p, int j) { out[((k * O + o) * I + i) * (O2 * I2) + p * I2 + j] = value; });
  }
};

template <class T_, class Scatter = KroneckerScatter<T_>>
struct KroneckerProblem {
  using T = T_;
  using A = accumulate_t<T>;
  using Key = Pair;
  static constexpr bool kMirrored = false, kAlong = false;

  const T *b, *a, *a2;
  Scatter scatter;
  int64_t b_batch, b_n, b_o, b_p;  // strides, in elements
  int64_t a_batch, a_n, a_i;
  int64_t a2_batch, a2_n, a2_j;
  int64_t batch, rows, cols, segments;
  int depth;

  __device__ Key row_key(int64_t r) const { return nth_pair(r, scatter.O2, scatter.b_symmetric); }
  __device__ Key col_key(int64_t c) const { return nth_pair(c, scatter.I2, scatter.a_same); }
  __device__ auto row_value(int64_t k, Key pair) const {
    const T* p = b + k * b_batch + pair.first * b_o + pair.second * b_p;
    return [p, step = b_n](int64_t, int n) -> A { return widen(__ldg(p + n * step)); };
  }
  __device__ auto col_value(int64_t k, Key pair) const {
    const T *p = a + k * a_batch + pair.first * a_i, *q = a2 + k * a2_batch + pair.second * a2_j;
    return [p, q, step = a_n, step2 = a2_n](int64_t, int n) -> A {
      return widen(__ldg(p + n * step)) * widen(__ldg(q + n * step2));
    };
  }
  __device__ void store(int64_t k, Key op, Key ij, A sum) const { scatter.store(k, op, ij, sum); }
};

// Fills in what follows from the sizes. a_same: a2 is a. Of a symmetric b the upper triangle is read (keys are o >= p).
// N = 0 gives zeros.
template <class T, class Scatter>
KroneckerProblem<T, Scatter> kronecker_problem(KroneckerProblem<T, Scatter> p, int64_t N) {
  const auto& s = p.scatter;
  if (s.b_symmetric) {
    const int64_t o = p.b_o;
    p.b_o = p.b_p, p.b_p = o;
  }
  p.rows = count_pairs(s.O, s.O2, s.b_symmetric), p.cols = count_pairs(s.I, s.I2, s.a_same);
  p.segments = 1, p.depth = static_cast<int>(N);
  return p;
}
template <class T>
void launch_kronecker_sum(const KroneckerProblem<T>& p, accumulate_t<T>* partial, cudaStream_t stream) {
  launch_tile_product(p, partial, stream);
}
}  // namespace torch_curvature::cuda
