// curvature_block: the block between the parameters of two layers, or of a layer with itself, in a symmetric matrix.
//   two layers: value[(o, i), (p, j)] = sum_n (m[n, o, p] a[n, i] + g[n, o] d[n, i, p]) a2[n, j]
//   one layer:  value[(o, i), (p, j)] = sum_n m[n, o, p] a[n, i] a[n, j], m[n] symmetric
// Shapes: m [N, O, O2], a [N, I], a2 [N, I2], g [N, O], d [N, D, O2] (inputs i >= D have no second term; g and d both
// or neither), any strides; out [P, P] with its last axis contiguous. Each value is written, or added, to
// out[row(o, i), column(p, j)] and out[column(p, j), row(o, i)]: see LayerPlaces.
//
// Two layers: for every p one matrix product over n of the (o, i) by j, the former formed on the way to shared memory;
// 2 N O I O2 I2 flops. One layer: packed pairs, see kronecker_sum.cuh. Bytes moved: the values, twice (read too where
// they are added); the operands are read from cache again by every tile.
#pragma once
#include "kronecker_sum.cuh"

namespace torch_curvature::cuda {

// Where entry (o, i) of a layer's weight stands among all parameters: those of its last input, number `last_input`,
// lie together from `last` on (a bias), unless last is negative.
struct LayerPlaces {
  int64_t start, per_output, per_input, last, last_input;
  __device__ __forceinline__ int64_t at(int64_t o, int64_t i) const {
    return last >= 0 && i == last_input ? last + o : start + o * per_output + i * per_input;
  }
};

template <class T>
struct SymmetricMatrix {
  T* data;
  int64_t step;  // from row to row
  bool add;

  __device__ __forceinline__ void put(int64_t r, int64_t c, accumulate_t<T> value) const {
    T& to = data[r * step + c];
    to = narrow<T>(add ? widen(to) + value : value);
  }
};

// One layer: a product of pairs in its mirrored places.
template <class T>
struct OwnBlockScatter : KroneckerPairs {
  SymmetricMatrix<T> out;
  LayerPlaces places;

  __device__ void store(int64_t, Pair op, Pair ij, accumulate_t<T> sum) const {
    for_each_place(op, ij, [&](int o, int i, int p, int j) { out.put(places.at(o, i), places.at(p, j), sum); });
  }
};
template <class T>
using OwnBlockProblem = KroneckerProblem<T, OwnBlockScatter<T>>;

// Two layers: batch entries are p, rows (o, i), columns j.
template <class T_>
struct CrossBlockProblem {
  using T = T_;
  using A = accumulate_t<T>;
  using Key = Pair;
  static constexpr bool kMirrored = false, kAlong = false;

  const T *m, *a, *a2, *g, *d;                                           // g, d: or null
  int64_t m_n, m_o, m_p, a_n, a_i, a2_n, a2_j, g_n, g_o, d_n, d_i, d_p;  // strides, in elements
  int64_t O, I, D;
  SymmetricMatrix<T> out;
  LayerPlaces row_places, column_places;
  int64_t batch, rows, cols, segments;
  int depth;

  __device__ Key row_key(int64_t r) const { return nth_pair(r, I, false); }
  __device__ Key col_key(int64_t c) const { return {static_cast<int>(c), 0}; }
  __device__ auto row_value(int64_t p, Key oi) const {
    const bool second = g && oi.second < D;
    const T *u = m + oi.first * m_o + p * m_p, *v = a + oi.second * a_i;
    const T *s = second ? g + oi.first * g_o : nullptr, *t = second ? d + oi.second * d_i + p * d_p : nullptr;
    return [=, u_n = m_n, v_n = a_n, s_n = g_n, t_n = d_n](int64_t, int n) -> A {
      const A first = widen(__ldg(u + n * u_n)) * widen(__ldg(v + n * v_n));
      return s ? first + widen(__ldg(s + n * s_n)) * widen(__ldg(t + n * t_n)) : first;
    };
  }
  __device__ auto col_value(int64_t, Key j) const {
    return [p = a2 + j.first * a2_j, step = a2_n](int64_t, int n) -> A { return widen(__ldg(p + n * step)); };
  }
  __device__ void store(int64_t p, Key oi, Key j, A sum) const {
    const int64_t r = row_places.at(oi.first, oi.second), c = column_places.at(p, j.first);
    out.put(r, c, sum), out.put(c, r, sum);
  }
};

// Fills in what follows from the sizes.
template <class T>
CrossBlockProblem<T> cross_block(CrossBlockProblem<T> p, int64_t N, int64_t O2, int64_t I2) {
  p.batch = O2, p.rows = p.O * p.I, p.cols = I2, p.segments = 1, p.depth = static_cast<int>(N);
  return p;
}
}  // namespace torch_curvature::cuda
