// One instruction set's product of tiles; tile_product.h includes this once for each.
// No include guard on purpose. Vector types must be used where the target is set: elsewhere they are split at once.

// A block of R rows by W vectors of c. Rows of a lie next to one another, or `offsets` away from x (rows in place).
template <class A, int R, int W, bool InPlace>
CURVATURE_TILE_TARGET static inline void CURVATURE_JOIN(CURVATURE_TILE_NAME,
                                                        _block)(const A* a, int64_t lda, const int64_t* offsets,
                                                                const A* b, int64_t ldb, Depth depth, A* c, bool add) {
  typedef A Vector __attribute__((vector_size(CURVATURE_TILE_BYTES), aligned(sizeof(A)), may_alias));
  constexpr int64_t L = CURVATURE_TILE_BYTES / sizeof(A);
  Vector sum[R][W];
  int64_t at[R];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    at[r] = InPlace ? offsets[r] : r;
#pragma GCC unroll 12
    for (int w = 0; w < W; ++w) sum[r][w] = Vector{};
  }
  auto step = [&](const A* x, const A* y) __attribute__((always_inline)) CURVATURE_TILE_TARGET {
    Vector right[W];
#pragma GCC unroll 12
    for (int w = 0; w < W; ++w) right[w] = *reinterpret_cast<const Vector*>(y + w * L);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 12
      for (int w = 0; w < W; ++w) sum[r][w] += x[InPlace ? at[r] : r] * right[w];
  };
  if (!InPlace && depth.index)
    for (int64_t k = 0; k < depth.count; ++k) step(a + k * lda, b + depth.index[k] * ldb);
  else
    for (int64_t k = 0; k < depth.count; ++k) step(a + k * lda, b + k * ldb);
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 12
    for (int w = 0; w < W; ++w) {
      Vector& place = *reinterpret_cast<Vector*>(c + r * kCols<A> + w * L);
      place = add ? place + sum[r][w] : sum[r][w];
    }
}

template <class A, bool InPlace>
CURVATURE_TILE_TARGET void CURVATURE_JOIN(CURVATURE_TILE_NAME, _rows)(const A* a, int64_t lda, const int64_t* places,
                                                                      const A* b, int64_t ldb, Depth depth, A* c,
                                                                      int64_t rows, int64_t cols, bool add) {
  constexpr int64_t L = CURVATURE_TILE_BYTES / sizeof(A);
  constexpr int R = CURVATURE_TILE_ROWS;
  for (int64_t q = 0; q < cols; q += 2 * L)
    for (int64_t r = 0; r < rows; r += R) {
      const A *x = InPlace ? a : a + r, *y = b + q;
      A* z = c + r * kCols<A> + q;
      const int64_t height = rows - r;
      const bool narrow = cols - q <= L;
      int64_t offsets[R];
      if (InPlace)  // nothing is read beyond the last row
        for (int64_t k = 0; k < R; ++k) offsets[k] = places[std::min(r + k, rows - 1)];
#define CURVATURE_TILE_BLOCK(height, vectors) \
  CURVATURE_JOIN(CURVATURE_TILE_NAME, _block)<A, height, vectors, InPlace>(x, lda, offsets, y, ldb, depth, z, add)
      if (height <= 2) narrow ? CURVATURE_TILE_BLOCK(2, 1) : CURVATURE_TILE_BLOCK(2, 2);
      else if (height <= R / 2) narrow ? CURVATURE_TILE_BLOCK(R / 2, 1) : CURVATURE_TILE_BLOCK(R / 2, 2);
      else narrow ? CURVATURE_TILE_BLOCK(R, 1) : CURVATURE_TILE_BLOCK(R, 2);
#undef CURVATURE_TILE_BLOCK
    }
}

template <class A>
CURVATURE_TILE_TARGET void CURVATURE_TILE_NAME(const A* a, int64_t lda, const A* b, int64_t ldb, Depth depth, A* c,
                                               int64_t rows, int64_t cols, bool add) {
  CURVATURE_JOIN(CURVATURE_TILE_NAME, _rows)<A, false>(a, lda, nullptr, b, ldb, depth, c, rows, cols, add);
}

template <class A>
CURVATURE_TILE_TARGET void CURVATURE_JOIN(CURVATURE_TILE_NAME,
                                          _in_place)(const A* a, int64_t lda, const int64_t* offsets, const A* b,
                                                     int64_t ldb, int64_t depth, A* c, int64_t rows, int64_t cols) {
  CURVATURE_JOIN(CURVATURE_TILE_NAME, _rows)<A, true>(a, lda, offsets, b, ldb, {depth}, c, rows, cols, false);
}

// Any number of rows, the same depth for all: in the fewest blocks that registers hold, none of them with rows to
// spare.
template <class A>
CURVATURE_TILE_TARGET void CURVATURE_JOIN(CURVATURE_TILE_NAME, _tall)(const A* a, int64_t lda, const A* b, int64_t ldb,
                                                                      int64_t depth, A* c, int64_t rows, int64_t cols,
                                                                      bool add) {
  constexpr int64_t L = CURVATURE_TILE_BYTES / sizeof(A);
  for (int64_t q = 0; q < cols; q += 2 * L)
    for (int64_t r = 0; r < rows; r += CURVATURE_TILE_TALL) {
      const A *x = a + r, *y = b + q;
      A* z = c + r * kCols<A> + q;
      const bool narrow = cols - q <= L;
#define CURVATURE_TILE_BLOCK(height, vectors) \
  CURVATURE_JOIN(CURVATURE_TILE_NAME, _block)<A, height, vectors, false>(x, lda, nullptr, y, ldb, {depth}, z, add)
#define CURVATURE_TILE_CASE(height) \
  case height: narrow ? CURVATURE_TILE_BLOCK(height, 1) : CURVATURE_TILE_BLOCK(height, 2); break;
      switch (std::min<int64_t>(CURVATURE_TILE_TALL, rows - r)) {
        CURVATURE_TILE_CASE(1)
        CURVATURE_TILE_CASE(2)
        CURVATURE_TILE_CASE(3)
        CURVATURE_TILE_CASE(4)
#if CURVATURE_TILE_TALL > 4
        CURVATURE_TILE_CASE(5)
        CURVATURE_TILE_CASE(6)
        CURVATURE_TILE_CASE(7)
        CURVATURE_TILE_CASE(8)
        CURVATURE_TILE_CASE(9)
        CURVATURE_TILE_CASE(10)
        CURVATURE_TILE_CASE(11)
        CURVATURE_TILE_CASE(12)
#endif
      }
#undef CURVATURE_TILE_CASE
#undef CURVATURE_TILE_BLOCK
    }
}

#undef CURVATURE_TILE_TALL
#undef CURVATURE_TILE_NAME
#undef CURVATURE_TILE_TARGET
#undef CURVATURE_TILE_BYTES
#undef CURVATURE_TILE_ROWS
