// gauss_newton_block: G[(o, i), (p, j)] = sum_vn sign[v, n] J[v, n, o, i] J[v, n, p, j], J[v, n] = sum_s g[v, n, s] (x)
// a[n, s] Shapes: g [V, N, S, O], a [N, S, I] (last axes contiguous), sign [V, N] or null, G [O I, O I] contiguous.
//
// S = 1: sum_n B[n] (x) a[n] a[n]^T with B[n] = sum_v sign g g^T: one product over n of packed pairs, see
// kronecker_sum.cuh; N O (O+1) I (I+1) / 2 flops. With few columns v the pairs of B are formed on the way to shared
// memory; with more they are formed once, in a workspace [N, O (O+1) / 2]. S > 1: J of a piece of the samples at a
// time, then the lower half of J^T J over (v, n), added up over pieces; V N (O I)^2 + 2 V N S O I flops. Every value is
// written to its mirrored places: symmetric to the bit.
//
// Why J goes through a workspace (bounded: see jacobian_pieces), by counting. A tile of 128 x 128 results takes 256
// values of J a sample (v, n) for its 16384 multiply-adds. Formed in shared memory by every tile anew a value costs S
// multiply-adds, S / 64 of the tile's own, and as many loads from shared memory, of which a multiprocessor does 32 a
// cycle beside 128 multiply-adds: S / 16 of the tile's own time. In the workspace a value is formed once by a product
// that uses each operand 64 times, and costs 8 bytes of traffic to the P = O I flops that it takes part in: that hides
// behind the arithmetic from P = 160 on (H100, float32: 20 flops a byte), sooner where the piece stays in cache. So the
// workspace is the faster form from S = 2 or 3 on for all blocks of more than some hundred parameters.
#pragma once
#include "form_jacobian.cuh"
#include "kronecker_sum.cuh"

namespace torch_curvature::cuda {

// Samples (v, n) of a piece: each piece reads and writes the block, 6 bytes a value, which is to hide behind its flops.
constexpr int64_t kLeastSamples = 1024;
constexpr int64_t kFormedColumns = 16;  // up to so many columns v, the pairs of B are formed by every tile anew

// B[n, (o, p)] = sum_v sign[v, n] g[v, n, o] g[v, n, p] for o >= p.
template <class T_>
struct SampleGramProblem {
  using T = T_;
  using A = accumulate_t<T>;
  using Key = int64_t;
  static constexpr bool kMirrored = true, kAlong = false;

  Jacobian<T> j;
  const T* sign;
  A* formed;
  int64_t batch, rows, cols, segments;
  int depth;

  __device__ Key row_key(int64_t r) const { return r; }
  __device__ Key col_key(int64_t c) const { return c; }
  __device__ auto row_value(int64_t n, Key o) const {
    return [p = j.g + n * j.g_n + o, step = j.g_v, s = sign ? sign + n : nullptr, N = j.N](int64_t, int v) -> A {
      const A g = widen(__ldg(p + v * step));
      return s ? widen(__ldg(s + v * N)) * g : g;
    };
  }
  __device__ auto col_value(int64_t n, Key o) const {
    return [p = j.g + n * j.g_n + o, step = j.g_v](int64_t, int v) -> A { return widen(__ldg(p + v * step)); };
  }
  __device__ void store(int64_t n, Key o, Key p, A sum) const {
    formed[n * (rows * (rows + 1) / 2) + o * (o + 1) / 2 + p] = sum;
  }
};

template <class T_>
struct GaussNewtonPairsProblem {
  using T = T_;
  using A = accumulate_t<T>;
  using Key = Pair;
  static constexpr bool kMirrored = false, kAlong = false;

  Jacobian<T> j;
  const T* sign;
  const A* formed;  // B, or null: formed on the way
  KroneckerScatter<T> scatter;
  int64_t batch, rows, cols, segments;
  int depth;

  __device__ Key row_key(int64_t r) const { return nth_pair(r, j.O, true); }
  __device__ Key col_key(int64_t c) const { return nth_pair(c, j.I, true); }
  __device__ auto row_value(int64_t, Key pair) const {
    return [this, pair, at = int64_t(pair.first) * (pair.first + 1) / 2 + pair.second](int64_t, int n) -> A {
      if (formed) return __ldg(formed + n * rows + at);
      const T* g = j.g + n * j.g_n;
      A sum = 0;
#pragma unroll 2
      for (int64_t v = 0; v < j.V; ++v, g += j.g_v) {
        const A product = widen(__ldg(g + pair.first)) * widen(__ldg(g + pair.second));
        sum += sign ? widen(__ldg(sign + v * j.N + n)) * product : product;
      }
      return sum;
    };
  }
  __device__ auto col_value(int64_t, Key pair) const {
    return [p = j.a + pair.first, q = j.a + pair.second, step = j.a_n](int64_t, int n) -> A {
      return widen(__ldg(p + n * step)) * widen(__ldg(q + n * step));
    };
  }
  __device__ void store(int64_t, Key op, Key ij, A sum) const { scatter.store(0, op, ij, sum); }
};

// The lower half of sum_k sign[k] J[k, r] J[k, c] over samples k = (v, n) of a piece.
template <class T_>
struct JacobianSquareProblem {
  using T = T_;
  using A = accumulate_t<T>;
  using Key = int64_t;
  static constexpr bool kMirrored = true, kAlong = false;

  const A* jacobian;      // [depth, rows]
  const T* sign;          // of the piece's first sample
  int64_t sign_v, piece;  // sign's stride of v; samples n of the piece
  T* out;
  A* wide;  // where the sum goes if not to out
  bool add;
  int64_t batch, rows, cols, segments;
  int depth;

  __device__ Key row_key(int64_t r) const { return r; }
  __device__ Key col_key(int64_t c) const { return c; }
  __device__ auto row_value(int64_t, Key r) const {
    return [p = jacobian + r, this](int64_t, int k) -> A {
      const A x = __ldg(p + k * rows);
      return sign ? widen(__ldg(sign + k / piece * sign_v + k % piece)) * x : x;
    };
  }
  __device__ auto col_value(int64_t, Key c) const {
    return [p = jacobian + c, step = rows](int64_t, int k) -> A { return __ldg(p + k * step); };
  }
  template <class Number>
  __device__ void put(Number* to, Key r, Key c, A sum) const {
    to[r * cols + c] = to[c * cols + r] = narrow<Number>(add ? widen(to[r * cols + c]) + sum : sum);
  }
  __device__ void store(int64_t, Key r, Key c, A sum) const {
    if (wide) put(wide, r, c, sum);
    else put(out, r, c, sum);
  }
};

template <class T>
struct BlockPlan {
  Jacobian<T> j;
  const T* sign;
  T* out;
  Pieces pieces;  // of the samples, where S > 1
  bool formed;    // B, where S = 1
  int64_t side() const { return j.O * j.I; }
  int64_t pairs() const { return j.N * count_pairs(j.O, j.O, true); }
};
template <class T>
BlockPlan<T> block_plan(const Jacobian<T>& j, const T* sign, T* out) {
  return {j, sign, out, jacobian_pieces<T>(j.N, j.V * j.O * j.I, ceil_div(kLeastSamples, j.V ? j.V : 1)),
          j.V > kFormedColumns};
}
template <class T>
SampleGramProblem<T> sample_gram(const BlockPlan<T>& plan, accumulate_t<T>* formed) {
  return {plan.j, plan.sign, formed, plan.j.N, plan.j.O, plan.j.O, 1, static_cast<int>(plan.j.V)};
}
template <class T>
GaussNewtonPairsProblem<T> block_pairs(const BlockPlan<T>& plan, const accumulate_t<T>* formed) {
  const Jacobian<T>& j = plan.j;
  return {j,
          plan.sign,
          formed,
          {{j.O, j.O, j.I, j.I, true, true}, plan.out},
          1,
          count_pairs(j.O, j.O, true),
          count_pairs(j.I, j.I, true),
          1,
          static_cast<int>(j.N)};
}
template <class T>
JacobianSquareProblem<T> block_square(const BlockPlan<T>& plan, int64_t samples) {
  JacobianSquareProblem<T> p{};
  p.out = plan.out, p.batch = p.segments = 1, p.rows = p.cols = plan.side();
  p.sign_v = plan.j.N, p.piece = samples, p.depth = static_cast<int>(plan.j.V * samples);
  return p;
}

// Numbers of the accumulation type that launch_gauss_newton_block wants at `workspace`.
template <class T>
int64_t gauss_newton_block_workspace(const BlockPlan<T>& plan) {
  if (plan.j.S == 1) {
    const int64_t product = tile_product_workspace(block_pairs(plan, static_cast<const accumulate_t<T>*>(nullptr)));
    if (!plan.formed) return product;
    const int64_t inner = tile_product_workspace(sample_gram(plan, static_cast<accumulate_t<T>*>(nullptr)));
    return plan.pairs() + (product > inner ? product : inner);
  }
  return plan.j.V * plan.pieces.each * plan.side() + (plan.pieces.wide ? plan.side() * plan.side() : 0) +
         tile_product_workspace(block_square(plan, plan.pieces.each));
}

template <class T>
void launch_block_pieces(const BlockPlan<T>& plan, accumulate_t<T>* workspace, cudaStream_t stream) {
  using A = accumulate_t<T>;
  const int64_t jacobians = plan.j.V * plan.pieces.each * plan.side();
  A* const wide = plan.pieces.wide ? workspace + jacobians : nullptr;
  A* const partial = workspace + jacobians + (wide ? plan.side() * plan.side() : 0);
  int64_t n = 0;
  do {  // once for no samples too: zeros
    Jacobian<T> j = plan.j;
    j.g += n * j.g_n, j.a += n * j.a_n;
    j.N = plan.pieces.total - n < plan.pieces.each ? plan.pieces.total - n : plan.pieces.each;
    auto p = block_square(plan, j.N);
    p.jacobian = workspace, p.sign = plan.sign ? plan.sign + n : nullptr, p.wide = wide, p.add = n > 0;
    launch_form_jacobian(j, workspace, stream);
    launch_tile_product(p, partial, stream);
    n += plan.pieces.each;
  } while (n < plan.pieces.total);
  if (wide) launch_narrow<T>(wide, plan.out, plan.side() * plan.side(), false, stream);
}

template <class T>
void launch_gauss_newton_block(const BlockPlan<T>& plan, accumulate_t<T>* workspace, cudaStream_t stream) {
  if (plan.side() == 0) return;
  if (plan.j.S != 1) return launch_block_pieces(plan, workspace, stream);
  accumulate_t<T>* formed = nullptr;
  if (plan.formed) {
    formed = workspace, workspace += plan.pairs();
    launch_tile_product(sample_gram(plan, formed), workspace, stream);
  }
  launch_tile_product(block_pairs(plan, static_cast<const accumulate_t<T>*>(formed)), workspace, stream);
}
}  // namespace torch_curvature::cuda
