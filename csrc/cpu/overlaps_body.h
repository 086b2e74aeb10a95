// One instruction set's sums over pairs of positions; overlaps.h includes this once for each.
// No include guard on purpose. Vector types must be used where the target is set: elsewhere they are split at once.

// sum[r, c] += x_r * y_c along `depth`, lane by lane; of a block with itself only c >= r.
template <class A, int R, bool Itself>
CURVATURE_OVERLAPS_TARGET static inline __attribute__((always_inline)) void CURVATURE_JOIN(
    CURVATURE_OVERLAPS_NAME, _block)(const A* const* x, const A* const* y, int64_t depth, auto& sum) {
  typedef A Vector __attribute__((vector_size(CURVATURE_OVERLAPS_BYTES), aligned(sizeof(A)), may_alias));
  constexpr int64_t L = CURVATURE_OVERLAPS_BYTES / sizeof(A);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < R; ++c) sum[r][c] = Vector{};
  for (int64_t k = 0; k < depth; k += L) {
    Vector right[R];
#pragma GCC unroll 4
    for (int c = 0; c < R; ++c) right[c] = *reinterpret_cast<const Vector*>(y[c] + k);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vector left = Itself ? right[r] : *reinterpret_cast<const Vector*>(x[r] + k);
#pragma GCC unroll 4
      for (int c = Itself ? r : 0; c < R; ++c) sum[r][c] += left * right[c];
    }
  }
}

// The sums of the lanes of L vectors, as one vector: halves are added pair by pair.
template <class A>
CURVATURE_OVERLAPS_TARGET static inline __attribute__((always_inline)) void CURVATURE_JOIN(CURVATURE_OVERLAPS_NAME,
                                                                                           _totals)(auto* x) {
  constexpr int L = CURVATURE_OVERLAPS_BYTES / sizeof(A);
  typedef std::conditional_t<sizeof(A) == 8, int64_t, int32_t> Integer;
  typedef Integer Index __attribute__((vector_size(CURVATURE_OVERLAPS_BYTES)));
  static constexpr Halves<Integer, L> halves{};
  int step = 0;
#pragma GCC unroll 4
  for (int half = L / 2; half > 0; half /= 2, ++step) {
    const Index low = *reinterpret_cast<const Index*>(halves.low[step]),
                high = *reinterpret_cast<const Index*>(halves.high[step]);
#pragma GCC unroll 16
    for (int k = 0; k < half; ++k)
      x[k] = __builtin_shuffle(x[2 * k], x[2 * k + 1], low) + __builtin_shuffle(x[2 * k], x[2 * k + 1], high);
  }
}

// Positions s.. by t..: total[v] += sum over the block's pairs, both orders of each, lane by lane.
template <class A, bool Itself>
CURVATURE_OVERLAPS_TARGET static inline __attribute__((always_inline)) void CURVATURE_JOIN(
    CURVATURE_OVERLAPS_NAME, _pairs)(const Rows<A>& a, const Rows<A>& g, int64_t s, int64_t t, int64_t S, int64_t V,
                                     A one, auto* total) {
  typedef A Vector __attribute__((vector_size(CURVATURE_OVERLAPS_BYTES), aligned(sizeof(A)), may_alias));
  constexpr int L = CURVATURE_OVERLAPS_BYTES / sizeof(A), R = CURVATURE_OVERLAPS_ROWS;
  constexpr int padded = (R * R + L - 1) / L * L;
  const A *x[R], *y[R];
  const bool whole = t + R <= S;
  auto rows = [&](const Rows<A>& of, int64_t v) __attribute__((always_inline)) {
    const A *left = of.data + v * of.column + s * of.row, *right = of.data + v * of.column + t * of.row;
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {  // beyond the last, the last again: its weight is zero
      x[r] = left + (whole ? r : std::min<int64_t>(r, S - 1 - s)) * of.row;
      y[r] = right + (whole ? r : std::min<int64_t>(r, S - 1 - t)) * of.row;
    }
  };
  Vector sum[R][R], flat[padded];
  rows(a, 0);
  CURVATURE_JOIN(CURVATURE_OVERLAPS_NAME, _block)<A, R, Itself>(x, y, a.depth, sum);
#pragma GCC unroll 16
  for (int k = 0; k < padded; ++k) {
    const int r = k / R % R, c = k % R;
    flat[k] = k >= R * R || (Itself && c < r) ? Vector{} : c > r || !Itself ? sum[r][c] + sum[r][c] : sum[r][c];
  }
  alignas(64) A weight[padded], ones[padded];
#pragma GCC unroll 16
  for (int k = 0; k < padded; ++k) ones[k] = !Itself || k % R > k / R ? one + one : one;
#pragma GCC unroll 4
  for (int k = 0; k < padded; k += L) {
    CURVATURE_JOIN(CURVATURE_OVERLAPS_NAME, _totals)<A>(flat + k);
    *reinterpret_cast<Vector*>(weight + k) = flat[k] + *reinterpret_cast<const Vector*>(ones + k);
  }
  if (!whole)
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < R; ++c)
        if (s + r >= S || t + c >= S) weight[r * R + c] = 0;
  for (int64_t v = 0; v < V; ++v) {
    rows(g, v);
    CURVATURE_JOIN(CURVATURE_OVERLAPS_NAME, _block)<A, R, Itself>(x, y, g.depth, sum);
    Vector add[R];  // a chain for each row: one of all pairs would take longer than the products
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      add[r] = weight[r * R + r] * sum[r][r];
#pragma GCC unroll 4
      for (int c = Itself ? r + 1 : 0; c < R; ++c)
        if (c != r) add[r] += weight[r * R + c] * sum[r][c];
    }
#pragma GCC unroll 4
    for (int r = 1; r < R; ++r) add[0] += add[r];
    total[v] += add[0];
  }
}

template <class A>
CURVATURE_OVERLAPS_TARGET void CURVATURE_OVERLAPS_NAME(Rows<A> a, Rows<A> g, int64_t S, int64_t V, A one, Ahead& ahead,
                                                       A* lanes, A* out) {
  typedef A Vector __attribute__((vector_size(CURVATURE_OVERLAPS_BYTES), aligned(sizeof(A)), may_alias));
  constexpr int L = CURVATURE_OVERLAPS_BYTES / sizeof(A), R = CURVATURE_OVERLAPS_ROWS;
  Vector* total = reinterpret_cast<Vector*>(lanes);
  for (int64_t v = 0; v < V; ++v) total[v] = Vector{};
  for (int64_t s = 0; s < S; s += R) {
    CURVATURE_JOIN(CURVATURE_OVERLAPS_NAME, _pairs)<A, true>(a, g, s, s, S, V, one, total);
    ahead.fetch();
    for (int64_t t = s + R; t < S; t += R) {
      CURVATURE_JOIN(CURVATURE_OVERLAPS_NAME, _pairs)<A, false>(a, g, s, t, S, V, one, total);
      ahead.fetch();
    }
  }
  for (int64_t v = 0; v < V; ++v) {
    A sum = 0;
    for (int k = 0; k < L; ++k) sum += total[v][k];
    out[v] = sum;
  }
}

// sums[r, c] += x_r . x_c for r <= c, in steps of depth that keep R rows in the first cache.
template <class A>
CURVATURE_OVERLAPS_TARGET void CURVATURE_JOIN(CURVATURE_OVERLAPS_NAME, _inner)(const A* x, int64_t row, int64_t count,
                                                                               int64_t depth, A* sums) {
  typedef A Vector __attribute__((vector_size(CURVATURE_OVERLAPS_BYTES), aligned(sizeof(A)), may_alias));
  constexpr int L = CURVATURE_OVERLAPS_BYTES / sizeof(A), R = CURVATURE_OVERLAPS_ROWS;
  constexpr int padded = (R * R + L - 1) / L * L;
  constexpr int64_t kStep = 4096 / sizeof(A);
  for (int64_t k = 0; k < depth; k += kStep)
    for (int64_t s = 0; s < count; s += R)
      for (int64_t t = s; t < count; t += R) {
        const A *left[R], *right[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {  // beyond the last, the last again: not used
          left[r] = x + std::min(s + r, count - 1) * row + k;
          right[r] = x + std::min(t + r, count - 1) * row + k;
        }
        Vector sum[R][R], flat[padded];
        CURVATURE_JOIN(CURVATURE_OVERLAPS_NAME, _block)<A, R, false>(left, right, std::min(kStep, depth - k), sum);
#pragma GCC unroll 16
        for (int p = 0; p < padded; ++p) flat[p] = p < R * R ? sum[p / R % R][p % R] : Vector{};
        A total[padded];
#pragma GCC unroll 4
        for (int p = 0; p < padded; p += L) {
          CURVATURE_JOIN(CURVATURE_OVERLAPS_NAME, _totals)<A>(flat + p);
          *reinterpret_cast<Vector*>(total + p) = flat[p];
        }
        for (int64_t r = 0; r < std::min<int64_t>(R, count - s); ++r)
          for (int64_t c = 0; c < std::min<int64_t>(R, count - t); ++c)
            sums[(s + r) * count + t + c] += total[r * R + c];
      }
}

#undef CURVATURE_OVERLAPS_NAME
#undef CURVATURE_OVERLAPS_TARGET
#undef CURVATURE_OVERLAPS_BYTES
#undef CURVATURE_OVERLAPS_ROWS
