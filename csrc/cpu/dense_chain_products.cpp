// Products with the Jacobian of a chain of dense layers z = a W + b and elementwise functions, a few samples at a time.
//
// Helpers of the CPU as dense_chain is; declared here. Kinds of steps as there, for dense layers plus 4 times flags.
//
// dense_chain_ahead: J v [N, K], t the tangent of what has been computed so far, steps from the beginning of the chain
//   dense: t <- t W + a V + b     operands, where their flags are set: W [I, O] (1), a [N, I] and V [I, O] (2), b [O]
//   (4)
// dense_chain_back: J^T u for u [N, K], G the derivative by what has been computed so far, steps from the end
//   dense: keep G^T a [O, I] and sum_n G [O], G <- G W
//                                 operands, where their flags are set: W [O, I] (1), a [N, I] (2); sum (4)
//
// Panels of samples as in dense_chain.h. Sums over samples are kept for a fixed number of pieces of the batch and added
// in order, so that they do not depend on the threads. 4 N O I flops a layer; bytes of the operands once.
#include "dense_chain.h"

namespace torch_curvature::cpu {
namespace {
enum Flag : int64_t { kWeight = 1, kInput = 2, kBias = 4 };

template <class T>
struct Matrix {
  const T* data = nullptr;
  int64_t rows = 0, columns = 0, row = 0, entry = 0;
  Matrix() = default;
  explicit Matrix(const Tensor& x)
      : data(static_cast<const T*>(x.data_ptr())),
        rows(x.size(0)),
        columns(x.size(1)),
        row(x.stride(0)),
        entry(x.stride(1)) {}
  void pack(T* out) const { pack_panels<T, T>(data, rows, row, columns, entry, out); }
  int64_t packed() const { return panels<T>(columns) * rows * kCols<T>; }
  // Samples n0.. side by side.
  void pack_samples(int64_t n0, int64_t count, T* out) const {
    pack_panel<T, T>(data + n0 * row, columns, entry, row, count, out);
  }
};

template <class T>
struct Layer {
  int64_t kind, flags, width;  // of what it leaves behind
  Matrix<T> weight, input, tangent;
  const T* bias = nullptr;
  int64_t bias_stride = 0, packed_weight = 0, packed_tangent = 0, sums = 0;
};

// Operands one after the other, each checked before it is read.
class Operands {
 public:
  Operands(const char* op, const std::vector<Tensor>& all, ScalarType dtype) : op_(op), all_(all), dtype_(dtype) {}
  const Tensor& next(int64_t rows, int64_t columns, int64_t dim = 2) {
    CURVATURE_CHECK(k_ < all_.size(), op_, ": there are fewer operands than the steps need.");
    const Tensor& x = all_[k_++];
    CURVATURE_CHECK(x.scalar_type() == dtype_, op_, ": operand ", k_ - 1, " has another dtype.");
    const bool fits =
        x.dim() == dim && (rows < 0 || x.size(0) == rows) && (dim == 1 || columns < 0 || x.size(1) == columns);
    CURVATURE_CHECK(fits, op_, ": operand ", k_ - 1, " of shape ", shape_text(x), " does not fit the steps before it.");
    return x;
  }
  void finish() const { CURVATURE_CHECK(k_ == all_.size(), op_, ": there are more operands than the steps need."); }

 private:
  const char* op_;
  const std::vector<Tensor>& all_;
  ScalarType dtype_;
  size_t k_ = 0;
};

template <class T>
CURVATURE_CLONES void add_bias(T* x, const T* bias, int64_t stride, int64_t width) {
  constexpr int64_t W = kCols<T>;
  for (int64_t o = 0; o < width; ++o)
    for (int64_t c = 0; c < W; ++c) x[o * W + c] += bias[o * stride];
}

template <class T>
CURVATURE_CLONES void add_rows(const T* x, T* __restrict__ sum, int64_t width) {
  constexpr int64_t W = kCols<T>;
  for (int64_t o = 0; o < width; ++o) {
    T total = 0;
    for (int64_t c = 0; c < W; ++c) total += x[o * W + c];
    sum[o] += total;
  }
}

template <class T>
void elementwise(const Layer<T>& layer, int64_t n0, int64_t count, T* slope, T* x) {
  layer.input.pack_samples(n0, count, slope);
  (layer.kind == kSlope ? multiply<T> : keep_positive<T>)(x, slope, layer.width * kCols<T>);
}

template <class T>
Tensor ahead(Operands& operands, const std::vector<int64_t>& kinds, const Tensor& like, int64_t N) {
  constexpr int64_t W = kCols<T>;
  std::vector<Layer<T>> layers;
  int64_t width = -1, widest = 0, packed = 0;
  double work = 0;
  for (const int64_t kind : kinds) {
    Layer<T> l{kind % 4, kind / 4, width};
    if (l.kind == kDense) {
      int64_t O = -1;
      if (l.flags & kWeight) l.weight = Matrix<T>(operands.next(width, -1)), O = l.weight.columns;
      if (l.flags & kInput) {
        l.input = Matrix<T>(operands.next(N, -1));
        l.tangent = Matrix<T>(operands.next(l.input.columns, O)), O = l.tangent.columns;
      }
      if (l.flags & kBias) {
        const Tensor& b = operands.next(O, 1, 1);
        l.bias = static_cast<const T*>(b.data_ptr()), l.bias_stride = b.stride(0), O = b.size(0);
      }
      CURVATURE_CHECK(O >= 0 && (width < 0 || l.flags & kWeight), "dense_chain_ahead: a dense step without operands.");
      l.packed_weight = packed, packed += l.weight.packed();
      l.packed_tangent = packed, packed += l.tangent.packed();
      work += static_cast<double>(O) * (l.weight.rows + l.tangent.rows);
      l.width = width = O;
    } else {
      CURVATURE_CHECK(width >= 0 && l.kind != kKeep, "dense_chain_ahead: no step is of kind ", kind, " here.");
      l.input = Matrix<T>(operands.next(N, width));
    }
    widest = std::max({widest, width, l.input.columns});
    layers.push_back(l);
  }
  operands.finish();
  CURVATURE_CHECK(width >= 0, "dense_chain_ahead: there is no step.");
  Tensor out = new_result("dense_chain_ahead", like, {N, width});
  Buffer<T> weights(packed);
  for (const Layer<T>& l : layers) {
    if (l.flags & kWeight) l.weight.pack(weights + l.packed_weight);
    if (l.flags & kInput) l.tangent.pack(weights + l.packed_tangent);
  }
  T* to = static_cast<T*>(out.data_ptr());
  const auto product = tile_product<T>();
  share_tasks(divide_up(N, W), work * N > kWorthThreads, [&](int64_t task) {
    const int64_t n0 = task * W, count = std::min(W, N - n0), size = panel_size<T>(widest);
    Buffer<T> first(size), second(size), inputs(size);
    T *t = first, *next = second;
    int64_t depth = 0;
    for (const Layer<T>& l : layers) {
      if (l.kind != kDense) {
        elementwise<T>(l, n0, count, inputs, t);
        continue;
      }
      if (l.flags & kWeight) next_panel<T>(product, weights + l.packed_weight, depth, l.width, t, next, false);
      else std::fill_n(next, panel_size<T>(l.width), T(0));
      if (l.flags & kInput) {
        l.input.pack_samples(n0, count, inputs);
        next_panel<T>(product, weights + l.packed_tangent, l.tangent.rows, l.width, inputs, next, true);
      }
      if (l.flags & kBias) add_bias<T>(next, l.bias, l.bias_stride, l.width);
      std::swap(t, next);
      depth = l.width;
    }
    unpack<T>(t, width, count, to + n0 * width);
  });
  return out;
}

// Tiles of a sum [O, I], and the sums of the outputs behind them.
template <class T>
int64_t sums_size(const Layer<T>& l, int64_t outputs) {
  const int64_t tiles = l.flags & kInput ? divide_up(outputs, kRows) * panels<T>(l.input.columns) : 0;
  return tiles * kRows * kCols<T> + (l.flags & kBias ? outputs : 0);
}

template <class T>
void add_products(TileProduct<T> product, const Layer<T>& l, int64_t outputs, const T* G, int64_t n0, int64_t count,
                  T* rows, T* inputs, T* sum) {
  constexpr int64_t W = kCols<T>;
  if (l.flags & kInput) {
    unpack<T>(G, outputs, count, rows);
    pack_panels<T, T>(l.input.data + n0 * l.input.row, count, l.input.row, l.input.columns, l.input.entry, inputs);
    for (int64_t o = 0; o < outputs; o += kRows)
      for (int64_t q = 0; q < panels<T>(l.input.columns); ++q, sum += kRows * W)
        product(rows + o, outputs, inputs + q * count * W, W, {count}, sum, std::min(kRows, outputs - o), W, true);
  }
  if (l.flags & kBias) add_rows<T>(G, sum, outputs);
}

template <class T>
void store_sums(const Layer<T>& l, int64_t outputs, const T* sum, std::vector<Tensor>& found, const Tensor& like) {
  constexpr int64_t W = kCols<T>;
  const int64_t I = l.input.columns;
  if (l.flags & kInput) {
    found.push_back(new_result("dense_chain_back", like, {outputs, I}));
    T* out = static_cast<T*>(found.back().data_ptr());
    for (int64_t o = 0; o < outputs; o += kRows)
      for (int64_t q = 0; q < panels<T>(I); ++q, sum += kRows * W)
        for (int64_t r = o; r < std::min(o + kRows, outputs); ++r)
          std::copy_n(sum + (r - o) * W, panel_width<T>(I, q), out + r * I + q * W);
  }
  if (l.flags & kBias) {
    found.push_back(new_result("dense_chain_back", like, {outputs}));
    std::copy_n(sum, outputs, static_cast<T*>(found.back().data_ptr()));
  }
}

template <class T>
std::vector<Tensor> back(const Tensor& u, Operands& operands, const std::vector<int64_t>& kinds) {
  constexpr int64_t W = kCols<T>, kPieces = 8, kSums = 1 << 19;
  const Matrix<T> given(u);
  const int64_t N = given.rows;
  std::vector<Layer<T>> layers;
  int64_t width = given.columns, widest = width, packed = 0, sums = 0;
  double work = 0;
  for (const int64_t kind : kinds) {
    Layer<T> l{kind % 4, kind / 4, width};
    CURVATURE_CHECK(l.kind != kKeep, "dense_chain_back: no step is of kind ", kind, ".");
    const bool ended = !layers.empty() && layers.back().kind == kDense && !(layers.back().flags & kWeight);
    CURVATURE_CHECK(!ended, "dense_chain_back: only the last dense step can be without its weight.");
    if (l.kind == kDense) {
      if (l.flags & kWeight) l.weight = Matrix<T>(operands.next(width, -1)), l.width = l.weight.columns;
      if (l.flags & kInput)
        l.input = Matrix<T>(operands.next(N, l.flags & kWeight ? l.width : -1)), l.width = l.input.columns;
      l.packed_weight = packed, packed += l.weight.packed();
      l.sums = sums, sums += sums_size(l, width);
      work += static_cast<double>(width) * (l.weight.columns + l.input.columns);
    } else {
      l.input = Matrix<T>(operands.next(N, width));
    }
    width = l.width;
    widest = std::max(widest, width);
    layers.push_back(l);
  }
  operands.finish();
  Buffer<T> weights(packed);
  for (const Layer<T>& l : layers)
    if (l.flags & kWeight) l.weight.pack(weights + l.packed_weight);
  const int64_t blocks = divide_up(N, W);
  const int64_t pieces = std::clamp<int64_t>(std::min(blocks, kSums / std::max<int64_t>(1, sums)), 1, kPieces);
  Buffer<T> partial(pieces * sums);
  const auto product = tile_product<T>();
  share_tasks(pieces, work * N > kWorthThreads, [&](int64_t piece) {
    const int64_t size = panel_size<T>(widest) + panels<T>(widest) * W * W;
    Buffer<T> first(size), second(size), rows(W * widest + kRows), inputs(size);
    T* sum = partial + piece * sums;
    std::fill_n(sum, sums, T(0));
    std::fill_n(static_cast<T*>(rows), W * widest + kRows, T(0));
    for (int64_t block = piece * blocks / pieces; block < (piece + 1) * blocks / pieces; ++block) {
      const int64_t n0 = block * W, count = std::min(W, N - n0);
      T *G = first, *next = second;
      int64_t outputs = given.columns;
      given.pack_samples(n0, count, G);
      for (const Layer<T>& l : layers) {
        if (l.kind != kDense) {
          elementwise<T>(l, n0, count, inputs, G);
          continue;
        }
        add_products<T>(product, l, outputs, G, n0, count, rows, inputs, sum + l.sums);
        if (!(l.flags & kWeight)) break;
        next_panel<T>(product, weights + l.packed_weight, outputs, l.width, G, next, false);
        std::swap(G, next);
        outputs = l.width;
      }
    }
  });
  for (int64_t piece = 1; piece < pieces; ++piece)
    for (int64_t k = 0; k < sums; ++k) partial[k] += partial[piece * sums + k];
  std::vector<Tensor> found;
  int64_t outputs = given.columns;
  for (const Layer<T>& l : layers) {
    if (l.kind == kDense) store_sums<T>(l, outputs, partial + l.sums, found, u);
    outputs = l.width;
  }
  return found;
}

template <class F>
void dispatch_full(const char* op, ScalarType dtype, F&& f) {
  CURVATURE_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, op, ": float32 or float64 is needed.");
  dtype == ScalarType::Float ? f(static_cast<float*>(nullptr)) : f(static_cast<double*>(nullptr));
}

Tensor dense_chain_ahead(const std::vector<Tensor>& all, const std::vector<int64_t>& kinds, int64_t samples) {
  CURVATURE_CHECK(!all.empty() && samples >= 0, "dense_chain_ahead: there is no operand.");
  const ScalarType dtype = all[0].scalar_type();
  Operands operands("dense_chain_ahead", all, dtype);
  std::optional<Tensor> out;
  dispatch_full("dense_chain_ahead", dtype, [&](auto* type) {
    out = ahead<std::remove_pointer_t<decltype(type)>>(operands, kinds, all[0], samples);
  });
  return *out;
}

std::vector<Tensor> dense_chain_back(const Tensor& u, const std::vector<Tensor>& all,
                                     const std::vector<int64_t>& kinds) {
  CURVATURE_CHECK(u.dim() == 2, "dense_chain_back: 'u' must be [N, K], got ", shape_text(u), ".");
  Operands operands("dense_chain_back", all, u.scalar_type());
  std::vector<Tensor> found;
  dispatch_full("dense_chain_back", u.scalar_type(),
                [&](auto* type) { found = back<std::remove_pointer_t<decltype(type)>>(u, operands, kinds); });
  return found;
}
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torch_curvature, m) {
  m.def("dense_chain_ahead(Tensor[] operands, int[] kinds, int samples) -> Tensor");
  m.def("dense_chain_back(Tensor u, Tensor[] operands, int[] kinds) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(torch_curvature, CPU, m) {
  m.impl("dense_chain_ahead", TORCH_BOX(&dense_chain_ahead));
  m.impl("dense_chain_back", TORCH_BOX(&dense_chain_back));
}
}  // namespace torch_curvature::cpu
