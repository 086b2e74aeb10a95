// dense_chain: columns pulled back through a chain of dense layers and elementwise functions, a few samples at a time;
// dense_chain_norms: of what arrives at the layers only the squared norms of the gradients.
//
// Helpers of the CPU for networks whose layers cost less than the calls that run them: elsewhere each step is an
// operator of torch. Declared here.
//
// Shapes: columns [V, N, F] at the end of the chain. Steps towards its beginning, on G [V, N, F]:
//   kind 0: G <- G W            operand W [F, F'], of a layer z = W a
//   kind 1: G <- G * s          operand s [N, F], the slopes of an elementwise function
//   kind 2: G <- G where x > 0  operand x [N, F], the result of a ReLU; what is kept for NaN is G, as torch does
//   kind 3: keep G; no operand
// Result: each G kept, [V, N, F], or with `roots` the square root of sum_v G^2, [1, N, F]. Of norms, [V, N]: the sum
// over the places k of |G_k[v, n]|^2 (|a_k[n]|^2 + b_k), for inputs a_k [N, I_k] and numbers b_k of the layers that end
// there (a_k with I_k = 0 leaves only b_k).
//
// Samples are taken kCols at a time, next to one another in panels [F][kCols] that stay in the first caches: the tiles
// of a product are the next panel as they stand, and slopes, squares and sums run along vectors. Weights are packed
// once, in bands as tall as registers hold, and what the next samples read is asked for meanwhile. 2 V N F F' flops a
// layer; bytes of columns, operands, inputs and results once.
#include "dense_chain.h"
#include "ahead.h"
#include "dense_layers.h"
#include "panel_product.h"
#include "work.h"

namespace torch_curvature::cpu {
namespace {
enum class Keep { kEach, kRoots, kNorms };

template <class T>
struct Step {
  int64_t kind, width;         // of what it leaves behind
  const T* operand = nullptr;  // of slopes; weights are packed
  int64_t row = 0, entry = 0;  // strides of the operand
  int64_t at = 0;              // place of the packed weight, of the slopes of a block, of the sums of a block
  int64_t each = 0;            // rows of a band of the packed weight
  T* out = nullptr;            // of what is kept
  const T* input = nullptr;    // of the layer that ends here, where norms are kept
  int64_t inputs = 0, input_row = 0;
  T bias = 0;
};

template <class T>
CURVATURE_CLONES void add_square(const T* __restrict__ x, T* __restrict__ sum, int64_t count) {
  for (int64_t i = 0; i < count; ++i) sum[i] += x[i] * x[i];
}

template <class T>
CURVATURE_CLONES void root(T* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x[i] = std::sqrt(x[i]);
}

// out[c] += weight[c] sum_f G[f, c]^2
template <class T>
CURVATURE_CLONES void add_weighted_norms(const T* __restrict__ G, int64_t width, const T* __restrict__ weight,
                                         T* __restrict__ out) {
  constexpr int64_t W = kCols<T>;
  T sum[W] = {};
  for (int64_t f = 0; f < width; ++f)
    for (int64_t c = 0; c < W; ++c) sum[c] += G[f * W + c] * G[f * W + c];
  for (int64_t c = 0; c < W; ++c) out[c] += weight[c] * sum[c];
}

template <class T>
struct Chain {
  static constexpr int64_t W = kCols<T>;
  const T* columns;
  int64_t cv, cn, cf, V, N, width;
  Keep keep;
  std::vector<Step<T>> steps{};
  T* weights = nullptr;  // packed
  T* norms = nullptr;
  int64_t packed = 0, widest = 0, slopes = 0, kept = 0;
  double work = 0;

  Chain(const Tensor& x, Keep keep)
      : columns(static_cast<const T*>(x.data_ptr())),
        cv(x.stride(0)),
        cn(x.stride(1)),
        cf(x.stride(2)),
        V(x.size(0)),
        N(x.size(1)),
        width(x.size(2)),
        keep(keep),
        widest(width) {}

  int64_t last() const { return steps.empty() ? width : steps.back().width; }

  void add(int64_t kind, const Tensor& x) {
    const int64_t before = last();
    Step<T> s{kind, x.size(1), static_cast<const T*>(x.data_ptr()), x.stride(0), x.stride(1)};
    if (kind == kDense) {
      const int64_t bands = divide_up(s.width, kTall);
      s.each = std::max<int64_t>(1, divide_up(s.width, std::max<int64_t>(1, bands)));
      s.at = packed, packed += (bands * s.each + 1) * before + kTall;  // what is packed may end a little later
      work += static_cast<double>(before) * s.width;
    } else {
      s.at = slopes, slopes += before;
    }
    widest = std::max(widest, s.width);
    steps.push_back(s);
  }

  Step<T>& add_kept() {
    Step<T> s{kKeep, last()};
    s.at = kept, kept += keep == Keep::kRoots ? s.width : 1;
    steps.push_back(s);
    return steps.back();
  }

  void pack() {
    constexpr int64_t kBands = 8;  // of one task
    TaskRange range;
    for (const Step<T>& s : steps) range.add(s.kind == kDense ? divide_up(s.width, s.each * kBands) : 0);
    share_tasks(range.count(), packed > 4 * kWorthThreads, [&](int64_t task) {
      const size_t k = range.piece(task);
      const Step<T>& s = steps[k];
      const int64_t depth = k ? steps[k - 1].width : width, first = range.within(k, task) * s.each * kBands;
      pack_bands<T, T>(s.operand + first * s.entry, depth, s.row, s.entry, std::min(s.each * kBands, s.width - first),
                       s.each, weights + s.at + first * depth);
    });
  }

  void run() {
    Buffer<T> room(packed);
    weights = room;
    pack();
    share_tasks_ahead(divide_up(N, W), work * V * N > kWorthThreads, [&](const auto& each) {
      Scratch scratch(*this);
      each([&](int64_t task, int64_t following) {
        ask(scratch.ahead, following * W);
        block(task * W, std::min(W, N - task * W), scratch);
      });
    });
  }

  // What a thread keeps from block to block.
  struct Scratch {
    Buffer<T> first, second, slope, sums;
    Ahead ahead;
    explicit Scratch(const Chain& c)
        : first(c.widest * W), second(c.widest * W), slope(c.slopes * W), sums(c.kept * W) {}
  };

  // What the block that begins with this sample reads, to be asked for while another one is multiplied.
  void ask(Ahead& ahead, int64_t n0) const {
    ahead.clear();
    const int64_t count = std::min(W, N - n0);
    if (count <= 0) return;
    int64_t calls = 0;
    for (const Step<T>& s : steps) {
      if (s.kind == kDense) calls += divide_up(s.width, s.each);
      else if (s.kind != kKeep && s.entry == 1 && s.row == s.width) ahead.add(s.operand + n0 * s.row, count * s.row);
      else if (s.kind == kKeep && s.input_row == s.inputs) ahead.add(s.input + n0 * s.inputs, count * s.inputs);
    }
    ahead.spread(calls * V);
  }

  void block(int64_t n0, int64_t count, Scratch& scratch) const {
    T *const slope = scratch.slope, *const sums = scratch.sums;
    const auto product = tall_product<T>();
    prepare(n0, count, slope, sums);
    for (int64_t v = 0; v < V; ++v) {
      T *G = scratch.first, *next = scratch.second;
      T totals[W] = {};
      int64_t depth = width;
      pack_panel<T, T>(columns + v * cv + n0 * cn, depth, cf, cn, count, G);
      for (const Step<T>& s : steps) {
        if (s.kind == kDense) {
          for (int64_t i = 0; i < s.width; i += s.each) {
            product(weights + s.at + i * depth, s.each, G, W, depth, next + i * W, std::min(s.each, s.width - i), W,
                    false);
            scratch.ahead.fetch();
          }
          std::swap(G, next);
          depth = s.width;
        } else if (s.kind == kSlope) {
          multiply<T>(G, slope + s.at * W, depth * W);
        } else if (s.kind == kPositive) {
          keep_positive<T>(G, slope + s.at * W, depth * W);
        } else if (keep == Keep::kRoots) {
          add_square<T>(G, sums + s.at * W, depth * W);
        } else if (keep == Keep::kNorms) {
          add_weighted_norms<T>(G, depth, sums + s.at * W, totals);
        } else {
          unpack<T>(G, depth, count, s.out + (v * N + n0) * depth);
        }
      }
      if (keep == Keep::kNorms) std::copy_n(totals, count, norms + v * N + n0);
    }
    if (keep != Keep::kRoots) return;
    root<T>(sums, kept * W);
    for (const Step<T>& s : steps)
      if (s.kind == kKeep) unpack<T>(sums + s.at * W, s.width, count, s.out + n0 * s.width);
  }

  // The slopes of a block of samples; the sums of squares, or what norms are to be multiplied with.
  void prepare(int64_t n0, int64_t count, T* slope, T* sums) const {
    std::fill_n(sums, kept * W, T(0));
    for (const Step<T>& s : steps) {
      if (s.kind == kSlope || s.kind == kPositive)
        pack_panel<T, T>(s.operand + n0 * s.row, s.width, s.entry, s.row, count, slope + s.at * W);
      if (s.kind == kKeep && keep == Keep::kNorms)
        for (int64_t c = 0; c < count; ++c) {
          const T* a = s.input + (n0 + c) * s.input_row;
          sums[s.at * W + c] = s.bias + cpu::product<T>(a, a, s.inputs);
        }
    }
  }
};

void check_chain(const char* op, const Tensor& columns, const std::vector<Tensor>& operands,
                 const std::vector<int64_t>& kinds) {
  CURVATURE_CHECK(columns.dim() == 3, op, ": 'columns' must be [V, N, F], got ", shape_text(columns), ".");
  const ScalarType dtype = columns.scalar_type();
  CURVATURE_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, op, ": float32 or float64 is needed.");
  int64_t width = columns.size(2);
  size_t k = 0;
  for (const int64_t kind : kinds) {
    CURVATURE_CHECK(kind >= kDense && kind <= kKeep, op, ": no step is of kind ", kind, ".");
    if (kind == kKeep) continue;
    CURVATURE_CHECK(k < operands.size(), op, ": there are fewer operands than steps that need one.");
    const Tensor& x = operands[k++];
    CURVATURE_CHECK(x.scalar_type() == dtype, op, ": operand ", k - 1, " has another dtype.");
    const bool fits =
        x.dim() == 2 && (kind == kDense ? x.size(0) == width : x.size(0) == columns.size(1) && x.size(1) == width);
    CURVATURE_CHECK(fits, op, ": operand ", k - 1, " of shape ", shape_text(x), " does not fit G of width ", width,
                    ".");
    width = x.size(1);
  }
  CURVATURE_CHECK(k == operands.size(), op, ": there are more operands than steps that need one.");
}

template <class F>
void with_type(const Tensor& columns, F&& f) {
  if (columns.scalar_type() == ScalarType::Float) f(static_cast<float*>(nullptr));
  else f(static_cast<double*>(nullptr));
}

std::vector<Tensor> dense_chain(const Tensor& columns, const std::vector<Tensor>& operands,
                                const std::vector<int64_t>& kinds, bool roots) {
  check_chain("dense_chain", columns, operands, kinds);
  std::vector<Tensor> found;
  with_type(columns, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    Chain<T> chain(columns, roots ? Keep::kRoots : Keep::kEach);
    size_t k = 0;
    for (const int64_t kind : kinds) {
      if (kind != kKeep) {
        chain.add(kind, operands[k++]);
        continue;
      }
      found.push_back(new_result("dense_chain", columns, {roots ? 1 : chain.V, chain.N, chain.last()}));
      chain.add_kept().out = static_cast<T*>(found.back().data_ptr());
    }
    if (chain.V * chain.N > 0) return chain.run();
    for (Tensor& t : found) torch::stable::zero_(t);
  });
  return found;
}

Tensor dense_chain_norms(const Tensor& columns, const std::vector<Tensor>& operands, const std::vector<int64_t>& kinds,
                         const std::vector<Tensor>& inputs, const std::vector<int64_t>& bias) {
  const char* op = "dense_chain_norms";
  check_chain(op, columns, operands, kinds);
  const size_t places = std::count(kinds.begin(), kinds.end(), int64_t(kKeep));
  CURVATURE_CHECK(inputs.size() == places && bias.size() == places, op, ": ", places,
                  " inputs and numbers are needed, ", "one of each for every place that is kept.");
  for (const Tensor& a : inputs) {
    CURVATURE_CHECK(a.scalar_type() == columns.scalar_type(), op, ": an input has another dtype.");
    CURVATURE_CHECK(a.dim() == 2 && a.size(0) == columns.size(1) && (a.size(1) < 2 || a.stride(1) == 1), op,
                    ": inputs must be [N, I] with contiguous rows, got ", shape_text(a), ".");
  }
  Tensor out = new_result(op, columns, {columns.size(0), columns.size(1)});
  with_type(columns, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    Chain<T> chain(columns, Keep::kNorms);
    chain.norms = static_cast<T*>(out.data_ptr());
    size_t k = 0, place = 0;
    for (const int64_t kind : kinds) {
      if (kind != kKeep) {
        chain.add(kind, operands[k++]);
        continue;
      }
      const Tensor& a = inputs[place];
      Step<T>& s = chain.add_kept();
      s.input = static_cast<const T*>(a.data_ptr()), s.inputs = a.size(1), s.input_row = a.stride(0);
      s.bias = static_cast<T>(bias[place++]);
    }
    if (chain.V * chain.N > 0) chain.run();
  });
  return out;
}
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torch_curvature, m) {
  m.def("dense_chain(Tensor columns, Tensor[] operands, int[] kinds, bool roots) -> Tensor[]");
  m.def("dense_chain_norms(Tensor columns, Tensor[] operands, int[] kinds, Tensor[] inputs, int[] bias) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(torch_curvature, CPU, m) {
  m.impl("dense_chain", TORCH_BOX(&dense_chain));
  m.impl("dense_chain_norms", TORCH_BOX(&dense_chain_norms));
}
}  // namespace torch_curvature::cpu
