// jacobian_gram by forming Jacobians: J [V N, O' I] for a piece O' of the outputs at a time, then one matrix product
// J K^T over (o, i), added up over pieces. Flops: 2 (V N S + V2 N2 S2) O I + 2 V N V2 N2 O I (half where symmetric):
// less than the products of positions by positions (jacobian_gram.cuh) where S is large. The launcher counts both.
//
// Why J goes through a workspace (bounded: see jacobian_pieces), by counting. The rows of a tile are different samples:
// formed on the fly, their J share no operand. A thread that forms 8 x 8 of one sample's (o, i) loads 64 bytes for 64
// multiply-adds, of which a multiprocessor does 128 a cycle: twice what its first-level cache gives, four times what
// the second gives; and every one of the V N / 128 tiles of the other side does it anew, S / 64 of its own work. Formed
// once, by a product that uses each operand 64 times, a value costs 8 bytes, and pieces of the outputs so small that
// they stay in the second-level cache keep those off the memory.
#pragma once
#include "form_jacobian.cuh"
#include "jacobian_gram.cuh"
#include "tile_product.cuh"

namespace torch_curvature::cuda {

template <class T_, bool Symmetric>
struct GramProductProblem {
  using T = T_;
  using A = accumulate_t<T>;
  using Key = int64_t;
  static constexpr bool kMirrored = Symmetric, kAlong = true;

  const A *left, *right;  // [rows, depth], [cols, depth]
  bool vector;            // 128-bit loads of both are allowed
  T* out;
  A* wide;  // where the sum goes if not to out
  bool add;
  int64_t batch, rows, cols, segments;
  int depth;

  __device__ Key row_key(int64_t r) const { return r; }
  __device__ Key col_key(int64_t c) const { return c; }
  __device__ auto row_value(int64_t, Key r) const { return values(left + r * depth); }
  __device__ auto col_value(int64_t, Key c) const { return values(right + c * depth); }
  __device__ auto values(const A* row) const {
    return [row, vector = vector](int64_t, int k, int depth, auto& r) {
      load_run(k < depth ? row + k : row, depth - k, vector, r);
    };
  }
  template <class Number>
  __device__ void put(Number* to, Key r, Key c, A sum) const {
    const Number value = narrow<Number>(add ? widen(to[r * cols + c]) + sum : sum);
    if constexpr (Symmetric)
      if (r != c) to[c * cols + r] = add ? narrow<Number>(widen(to[c * cols + r]) + sum) : value;
    to[r * cols + c] = value;
  }
  __device__ void store(int64_t, Key r, Key c, A sum) const {
    if (wide) put(wide, r, c, sum);
    else put(out, r, c, sum);
  }
};

// Multiply-adds of the two forms, tiles padded as they are.
template <class T>
bool gram_by_positions(const Jacobian<T>& left, const Jacobian<T>& right, bool symmetric) {
  if (left.S <= 1 && right.S <= 1) return true;
  constexpr int64_t kTile = GramTile<T>::kTile, kForm = FormTile<T>::kTile;
  const GramProblem<T> p = gram_problem<T>(left, right, nullptr, symmetric, false, false);
  const auto up = [](int64_t x, int64_t to) { return static_cast<double>(ceil_div(x, to) * to); };
  const double pairs = static_cast<double>(p.pairs), samples = static_cast<double>(left.N) * right.N;
  const bool several = p.per_row > 1 && p.per_col > 1;
  const double tiles = several ? static_cast<double>(p.row_tiles) * p.col_tiles * kTile * kTile
                               : samples * up(left.S, kTile) * up(right.S, kTile);
  const double positions = tiles * (pairs * left.O + (several ? 1 : pairs) * left.I) * (symmetric ? 0.5 : 1);
  const double form = static_cast<double>(left.V * left.N) * left.S +
                      (symmetric ? 0 : static_cast<double>(right.V * right.N) * right.S);
  constexpr double kSplit = sizeof(T) == 2 ? 3 : 1;  // tensor-core products of one split product
  const double jacobians =
      form * up(left.O, kForm) * up(left.I, kForm) + samples * pairs * left.O * left.I * kSplit * (symmetric ? 0.5 : 1);
  return positions <= jacobians;
}

template <class T>
struct GramPlan {
  Jacobian<T> left, right;
  bool symmetric, positions;
  Pieces pieces;  // of the outputs
  int64_t rows() const { return left.V * left.N; }
  int64_t cols() const { return right.V * right.N; }
  int64_t jacobians() const { return (rows() + (symmetric ? 0 : cols())) * left.I * pieces.each; }
};
template <class T>
GramPlan<T> gram_plan(const Jacobian<T>& left, const Jacobian<T>& right, bool symmetric) {
  GramPlan<T> plan{left, right, symmetric, gram_by_positions(left, right, symmetric), {}};
  plan.pieces = jacobian_pieces<T>(left.O, (plan.rows() + (symmetric ? 0 : plan.cols())) * left.I, 1);
  return plan;
}
// The largest piece's product, of which the workspace is a part.
template <bool Symmetric, class T>
GramProductProblem<T, Symmetric> gram_product(const GramPlan<T>& plan, int64_t outputs) {
  GramProductProblem<T, Symmetric> p{};
  p.batch = 1, p.rows = plan.rows(), p.cols = plan.cols(), p.segments = 1;
  p.depth = static_cast<int>(outputs * plan.left.I);
  return p;
}
template <class T>
int64_t gram_product_workspace(const GramPlan<T>& plan) {
  return plan.symmetric ? tile_product_workspace(gram_product<true>(plan, plan.pieces.each))
                        : tile_product_workspace(gram_product<false>(plan, plan.pieces.each));
}

// Numbers of the accumulation type that launch_jacobian_gram wants at `workspace`.
template <class T>
int64_t jacobian_gram_workspace(const GramPlan<T>& plan) {
  if (plan.positions) return 0;
  return plan.jacobians() + (plan.pieces.wide ? plan.rows() * plan.cols() : 0) + gram_product_workspace(plan);
}

template <bool Symmetric, class T>
void launch_gram_pieces(const GramPlan<T>& plan, T* out, bool add, accumulate_t<T>* workspace, cudaStream_t stream) {
  using A = accumulate_t<T>;
  A* const wide = plan.pieces.wide ? workspace + plan.jacobians() : nullptr;
  A* const partial = workspace + plan.jacobians() + (wide ? plan.rows() * plan.cols() : 0);
  for (int64_t o = 0; o < plan.pieces.total; o += plan.pieces.each) {
    const int64_t count = plan.pieces.total - o < plan.pieces.each ? plan.pieces.total - o : plan.pieces.each;
    Jacobian<T> left = plan.left, right = plan.right;
    left.g += o, left.O = count, right.g += o, right.O = count;
    auto p = gram_product<Symmetric>(plan, count);
    p.left = workspace, p.right = Symmetric ? workspace : workspace + plan.rows() * left.I * count;
    p.vector = vector_aligned(p.left, p.depth) && vector_aligned(p.right, p.depth);
    p.out = out, p.wide = wide, p.add = o > 0 || (add && !wide);
    launch_form_jacobian(left, workspace, stream);
    if (!Symmetric) launch_form_jacobian(right, workspace + plan.rows() * left.I * count, stream);
    launch_tile_product(p, partial, stream);
  }
  if (wide) launch_narrow<T>(wide, out, plan.rows() * plan.cols(), add, stream);
}

template <class T>
void launch_jacobian_gram(const GramPlan<T>& plan, T* out, bool add, accumulate_t<T>* workspace, cudaStream_t stream) {
  if (plan.rows() * plan.cols() == 0) return;
  if (plan.positions || plan.left.O * plan.left.I == 0)
    launch_gram_problem(gram_problem(plan.left, plan.right, out, plan.symmetric, add, false), stream);
  else if (plan.symmetric) launch_gram_pieces<true>(plan, out, add, workspace, stream);
  else launch_gram_pieces<false>(plan, out, add, workspace, stream);
}
}  // namespace torch_curvature::cuda
