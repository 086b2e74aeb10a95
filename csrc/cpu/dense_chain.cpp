// dense_chain: columns pulled back through a chain of dense layers and elementwise functions, a few samples at a time.
//
// A helper of the CPU for networks whose layers cost less than the calls that run them: elsewhere each step is an
// operator of torch. Declared here.
//
// Shapes: columns [V, N, F] at the end of the chain. Steps towards its beginning, on G [V, N, F]:
//   kind 0: G <- G W            operand W [F, F'], of a layer z = W a
//   kind 1: G <- G * s          operand s [N, F], the slopes of an elementwise function
//   kind 2: G <- G where x > 0  operand x [N, F], the result of a ReLU; what is kept for NaN is G, as torch does
//   kind 3: keep G; no operand
// Result: each G kept, [V, N, F], or with `roots` the square root of sum_v G^2, [1, N, F].
//
// Samples are taken kCols at a time, next to one another in panels [F][kCols] that stay in the first cache: the tiles
// of a product are the next panel as they stand, and slopes, squares and sums run along vectors. 2 V N F F' flops a
// layer; bytes of columns, operands and results once.
#include "dense_chain.h"

namespace torch_curvature::cpu {
namespace {
template <class T>
struct Step {
  int64_t kind, width;         // of what it leaves behind
  const T* operand = nullptr;  // of slopes; weights are packed
  int64_t row = 0, entry = 0;  // strides of the operand
  int64_t at = 0;              // place of the packed weight, of the slopes of a block, of the sums of a block
  T* out = nullptr;            // of what is kept
};

template <class T>
CURVATURE_CLONES void add_square(const T* __restrict__ x, T* __restrict__ sum, int64_t count) {
  for (int64_t i = 0; i < count; ++i) sum[i] += x[i] * x[i];
}

template <class T>
CURVATURE_CLONES void root(T* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x[i] = std::sqrt(x[i]);
}

template <class T>
struct Chain {
  const T* columns;
  int64_t cv, cn, cf, V, N, width;
  std::vector<Step<T>> steps;
  const T* weights;  // packed
  int64_t widest, slopes, kept;
  bool roots;

  void block(int64_t n0, int64_t count) const {
    constexpr int64_t W = kCols<T>;
    Buffer<T> first(panel_size<T>(widest)), second(panel_size<T>(widest));
    Buffer<T> slope(slopes * W), sums(roots ? kept * W : 0);
    const auto product = tile_product<T>();
    for (const Step<T>& s : steps)
      if (s.kind == kSlope || s.kind == kPositive)
        pack_panel<T, T>(s.operand + n0 * s.row, s.width, s.entry, s.row, count, slope + s.at * W);
    if (roots) std::fill_n(static_cast<T*>(sums), kept * W, T(0));
    for (int64_t v = 0; v < V; ++v) {
      T *G = first, *next = second;
      int64_t depth = width;
      pack_panel<T, T>(columns + v * cv + n0 * cn, depth, cf, cn, count, G);
      for (const Step<T>& s : steps) {
        if (s.kind == kDense) {
          next_panel<T>(product, weights + s.at, depth, s.width, G, next, false);
          std::swap(G, next);
          depth = s.width;
        } else if (s.kind == kSlope) {
          multiply<T>(G, slope + s.at * W, depth * W);
        } else if (s.kind == kPositive) {
          keep_positive<T>(G, slope + s.at * W, depth * W);
        } else if (roots) {
          add_square<T>(G, sums + s.at * W, depth * W);
        } else {
          unpack<T>(G, depth, count, s.out + (v * N + n0) * depth);
        }
      }
    }
    if (!roots) return;
    root<T>(sums, kept * W);
    for (const Step<T>& s : steps)
      if (s.kind == kKeep) unpack<T>(sums + s.at * W, s.width, count, s.out + n0 * s.width);
  }
};

template <class T>
void run(const Tensor& columns, const std::vector<Tensor>& operands, const std::vector<int64_t>& kinds, bool roots,
         std::vector<Tensor>& found) {
  constexpr int64_t W = kCols<T>;
  Chain<T> chain{static_cast<const T*>(columns.data_ptr()),
                 columns.stride(0),
                 columns.stride(1),
                 columns.stride(2),
                 columns.size(0),
                 columns.size(1),
                 columns.size(2),
                 {},
                 nullptr,
                 columns.size(2),
                 0,
                 0,
                 roots};
  int64_t width = chain.width, packed = 0, k = 0;
  double work = 0;
  for (const int64_t kind : kinds) {
    Step<T> s{kind, width};
    if (kind == kKeep) {
      found.push_back(new_result("dense_chain", columns, {roots ? 1 : chain.V, chain.N, width}));
      s.out = static_cast<T*>(found.back().data_ptr());
      s.at = chain.kept, chain.kept += width;
    } else {
      const Tensor& x = operands[k++];
      s.operand = static_cast<const T*>(x.data_ptr());
      s.row = x.stride(0), s.entry = x.stride(1), s.width = x.size(1);
      if (kind == kDense) {
        s.at = packed, packed += panels<T>(s.width) * width * W;
        work += static_cast<double>(width) * s.width;
      } else {
        s.at = chain.slopes, chain.slopes += width;
      }
    }
    width = s.width;
    chain.widest = std::max(chain.widest, width);
    chain.steps.push_back(s);
  }
  if (chain.V * chain.N == 0) {
    for (Tensor& t : found) torch::stable::zero_(t);
    return;
  }
  Buffer<T> weights(packed);
  int64_t depth = chain.width;
  for (const Step<T>& s : chain.steps) {
    if (s.kind == kDense) pack_panels<T, T>(s.operand, depth, s.row, s.width, s.entry, weights + s.at);
    depth = s.width;
  }
  chain.weights = weights;
  share_tasks(divide_up(chain.N, W), work * chain.V * chain.N > kWorthThreads,
              [&](int64_t task) { chain.block(task * W, std::min(W, chain.N - task * W)); });
}

std::vector<Tensor> dense_chain(const Tensor& columns, const std::vector<Tensor>& operands,
                                const std::vector<int64_t>& kinds, bool roots) {
  const char* op = "dense_chain";
  CURVATURE_CHECK(columns.dim() == 3, op, ": 'columns' must be [V, N, F], got ", shape_text(columns), ".");
  int64_t width = columns.size(2);
  size_t k = 0;
  for (const int64_t kind : kinds) {
    CURVATURE_CHECK(kind >= kDense && kind <= kKeep, op, ": no step is of kind ", kind, ".");
    if (kind == kKeep) continue;
    CURVATURE_CHECK(k < operands.size(), op, ": there are fewer operands than steps that need one.");
    const Tensor& x = operands[k++];
    CURVATURE_CHECK(x.scalar_type() == columns.scalar_type(), op, ": operand ", k - 1, " has another dtype.");
    const bool fits =
        x.dim() == 2 && (kind == kDense ? x.size(0) == width : x.size(0) == columns.size(1) && x.size(1) == width);
    CURVATURE_CHECK(fits, op, ": operand ", k - 1, " of shape ", shape_text(x), " does not fit G of width ", width,
                    ".");
    width = x.size(1);
  }
  CURVATURE_CHECK(k == operands.size(), op, ": there are more operands than steps that need one.");
  std::vector<Tensor> found;
  dispatch_floating(columns.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>) run<T>(columns, operands, kinds, roots, found);
    else CURVATURE_CHECK(false, "dense_chain: float32 or float64 is needed.");
  });
  return found;
}
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torch_curvature, m) {
  m.def("dense_chain(Tensor columns, Tensor[] operands, int[] kinds, bool roots) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(torch_curvature, CPU, m) { m.impl("dense_chain", TORCH_BOX(&dense_chain)); }
}  // namespace torch_curvature::cpu
