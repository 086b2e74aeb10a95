// dense_chain_hessians: second derivatives of a loss by what layers of a chain put out, pushed back from its end.
//
// A helper of the CPU as dense_chain is; declared here. Of a value y with H = d2L/dy dy, c = dL/dy and y = f(x):
//   d2L/dx dx = f'^T H f' + c . f'',   d2L/dz dx = (d2L/dz dy) f',   da/dx = (da/dy) f'
// for outputs z and inputs a of layers that have been passed (second_nodes.py does this for any graph).
//
// Shapes: slope dL/du [N, F] at the end of the chain, start d2L/du du [F, N, F] or nothing (zero). Steps towards the
// beginning:
//   kind 0: a dense layer z = W a           operand W [Z, A]
//   kind 1, 2, 5, 6, 7: an elementwise function   operands [N, F]: its slopes, without a second derivative; the result
//                                           of a ReLU, of tanh, of a sigmoid; slopes f' and f''
//   kind 3: an output z of a layer, before the step through it; no operand
//   kind 4: an input a of a layer, after the step through it; no operand
// Result, at every step of kind 3: dL/dz [N, Z]; d2L/dz dz [Z, Z, N] where it does not vanish identically, symmetric to
// the bit behind the first dense step; and, with `pairs`, columns [K, Z, N] of all steps of kind 3 and 4 before, in
// their order: d2L/dz' dz (left out where d2L/dz' dz' was), da/dz; of the latter, with no dense layer between, only the
// diagonal [N, Z]. Samples come last, since they lie side by side here and in what blocks are made from.
//
// Samples are taken kCols at a time, next to one another in panels [F][kCols]: a matrix is a panel for each row, and
// stays in the second cache. Of W^T H W half of the second product is formed and mirrored. Flops a sample and dense
// layer: 3 Z^2 A + Z A^2 without columns, 2 K Z A for columns. Bytes of the operands and results once.
#include "symmetric_panels.h"

namespace torch_curvature::cpu {
namespace {
template <class T>
struct Operand {
  const T* data = nullptr;
  int64_t row = 0, entry = 0;
};

template <class T>
struct Step {
  int64_t kind, width;  // of what it is given
  Operand<T> x, bend;
  int64_t next = 0, packed = 0;  // of dense steps: what it leaves behind, place of the packed weight
  bool curved = false;           // a second derivative is there
  std::vector<T*> out;           // of kind 3
};

template <class T>
struct Chain {
  Operand<T> slope, start;
  int64_t start_column = 0, N = 0, width = 0, widest = 0, columns = 0;
  bool pairs = false;
  std::vector<Step<T>> steps;
  const T* weights = nullptr;  // packed

  // A row of a matrix lies one line off a power of two, so that a column of it does not fall on one set of the cache.
  int64_t stride() const { return panel_size<T>(widest) + kCols<T>; }

  void block(int64_t n0, int64_t count) const {
    constexpr int64_t W = kCols<T>;
    const int64_t size = stride();
    Buffer<T> memory((2 * widest + columns + 4) * size);
    T *c = memory, *s = c + size, *bend = s + size, *spare = bend + size;
    const Matrix<T> H{spare + size, widest, size, false}, half{H.row(widest), widest, size, false};
    std::vector<Matrix<T>> found;
    T* free = half.row(widest);
    auto claim = [&](int64_t rows, bool diagonal) {
      found.push_back({free, rows, size, diagonal});
      free += rows * size;
      return found.back();
    };
    auto pack = [&](const Operand<T>& x, int64_t entries, T* to) {
      pack_panel<T, T>(x.data + n0 * x.row, entries, x.entry, x.row, count, to);
    };
    pack(slope, width, c);
    if (start.data)
      for (int64_t r = 0; r < width; ++r)
        pack({start.data + r * start_column, start.row, start.entry}, width, H.row(r));
    bool kept = false;
    for (const Step<T>& step : steps) {
      if (step.kind == kDense) {
        const bool whole = kept && pairs;
        if (step.curved) through_both(step, H, whole ? claim(step.width, false) : half);
        for (size_t k = 0; k + (whole && step.curved) < found.size(); ++k) through(step, found[k], spare);
        next_panel<T>(tile_product<T>(), weights + step.packed, step.width, step.next, c, spare, false);
        std::copy_n(spare, step.next * W, c);
      } else if (step.kind == kInput) {
        std::fill_n(claim(step.width, true).data, step.width * W, T(1));
      } else if (step.kind == kKeep) {
        store(step, c, H, found, n0, count);
      } else {
        pack(step.x, step.width, s);
        if (step.bend.data) pack(step.bend, step.width, bend);
        elementwise(step, c, s, bend, H, found);
      }
      kept = step.kind == kKeep;
    }
  }

  // H <- W^T H W, half <- H W.
  void through_both(const Step<T>& step, const Matrix<T>& H, const Matrix<T>& half) const {
    constexpr int64_t W = kCols<T>;
    const auto product = tile_product<T>();
    const T* weight = weights + step.packed;
    for (int64_t r = 0; r < step.width; ++r)
      next_panel<T>(product, weight, step.width, step.next, H.row(r), half.row(r), false);
    for (int64_t r = 0; r < step.next; ++r)
      for (int64_t i = r / kRows * kRows; i < step.next; i += kRows)
        product(weight + i / W * step.width * W + i % W, W, half.data + r * W, half.stride, {step.width},
                H.row(r) + i * W, std::min(kRows, step.next - i), W, false);
    mirror(H, step.next);
  }

  void through(const Step<T>& step, Matrix<T>& x, T* spare) const {
    constexpr int64_t W = kCols<T>;
    if (x.diagonal) {
      for (int64_t r = x.rows - 1; r >= 0; --r)  // the first row holds what the others are made of
        spread_row<T>(x.row(r), x.data + r * W, step.x.data + r * step.x.row, step.x.entry, step.next);
      x.diagonal = false;
      return;
    }
    for (int64_t r = 0; r < x.rows; ++r) {
      next_panel<T>(tile_product<T>(), weights + step.packed, step.width, step.next, x.row(r), spare, false);
      std::copy_n(spare, step.next * W, x.row(r));
    }
  }

  void elementwise(const Step<T>& step, T* c, T* s, T* bend, const Matrix<T>& H,
                   const std::vector<Matrix<T>>& found) const {
    constexpr int64_t W = kCols<T>;
    const int64_t entries = step.width * W;
    const bool bends = step.kind >= kTanh;
    slopes<T>(step.kind, s, bend, entries);
    for (int64_t r = 0; r < step.width && (step.curved || bends); ++r) {
      if (step.curved) scale_row<T>(H.row(r), s, r, step.width);
      else std::fill_n(H.row(r), entries, T(0));
      if (bends) add_product<T>(H.row(r) + r * W, c + r * W, bend + r * W);
    }
    for (const Matrix<T>& x : found)
      for (int64_t r = 0; r < (x.diagonal ? 1 : x.rows); ++r) multiply<T>(x.row(r), s, entries);
    multiply<T>(c, s, entries);
  }

  void store(const Step<T>& step, const T* c, const Matrix<T>& H, const std::vector<Matrix<T>>& found, int64_t n0,
             int64_t count) const {
    unpack<T>(c, step.width, count, step.out[0] + n0 * step.width);
    size_t k = 1;
    auto rows = [&](const Matrix<T>& x) {
      T* to = step.out[k++];
      if (x.diagonal) return unpack<T>(x.data, step.width, count, to + n0 * step.width);
      for (int64_t r = 0; r < x.rows; ++r, to += N * step.width) copy_lanes<T>(x.row(r), step.width, count, to + n0, N);
    };
    if (step.curved) rows({H.data, step.width, H.stride, false});
    for (const Matrix<T>& x : found) rows(x);
  }
};

// Takes operands one after the other, each checked before it is read; makes the results.
template <class T>
class Reader {
 public:
  Reader(const Tensor& slope, const std::vector<Tensor>& operands, std::vector<Tensor>& found)
      : slope_(slope), operands_(operands), found_(found) {}

  Chain<T> read(const std::optional<Tensor>& start, const std::vector<int64_t>& kinds, bool pairs, double& work) {
    Chain<T> chain{matrix(slope_), {}, 0, slope_.size(0), slope_.size(1), slope_.size(1), 0, pairs, {}, nullptr};
    int64_t width = chain.width, packed = 0;
    bool curved = start.has_value(), kept = false;
    std::vector<Columns> columns;  // so far
    if (start) chain.start = {static_cast<const T*>(start->data_ptr()), start->stride(1), start->stride(2)};
    if (start) chain.start_column = start->stride(0);
    for (const int64_t kind : kinds) {
      Step<T> step{kind, width, {}, {}, width, packed, curved, {}};
      CURVATURE_CHECK(kind >= kDense && kind <= kBent, kOp, ": no step is of kind ", kind, ".");
      CURVATURE_CHECK(!kept || kind == kDense, kOp, ": an output of a layer must be followed by the layer.");
      if (kind == kKeep) {
        step.out.push_back(result({chain.N, width}));
        if (curved) step.out.push_back(result({width, width, chain.N}));
        for (const Columns& x : columns)
          step.out.push_back(result(x.diagonal ? Sizes{chain.N, width} : Sizes{x.rows, width, chain.N}));
      } else if (kind == kInput) {
        const bool after = !chain.steps.empty() && chain.steps.back().kind == kDense;
        CURVATURE_CHECK(after && pairs, kOp, ": an input of a layer must follow the layer, with 'pairs'.");
        columns.push_back({width, true});
      } else if (kind == kDense) {
        const Tensor& x = operand(width, -1);
        step.x = matrix(x), step.next = x.size(1);
        packed += panels<T>(step.next) * width * kCols<T>;
        if (kept && pairs && curved) columns.push_back({width, false});
        double lines = curved ? 1.5 * width + 0.5 * step.next : 1;
        for (Columns& x : columns) lines += x.rows, x.diagonal = false;
        work += lines * width * step.next;
      } else {
        step.x = matrix(operand(chain.N, width));
        if (kind == kBent) step.bend = matrix(operand(chain.N, width));
        curved |= kind >= kTanh;
      }
      width = step.next, kept = kind == kKeep;
      chain.widest = std::max(chain.widest, width);
      chain.steps.push_back(std::move(step));
    }
    CURVATURE_CHECK(k_ == operands_.size(), kOp, ": there are more operands than the steps need.");
    for (const Columns& x : columns) chain.columns += x.rows;
    return chain;
  }

 private:
  struct Columns {
    int64_t rows;
    bool diagonal;
  };
  static constexpr const char* kOp = "dense_chain_hessians";
  static Operand<T> matrix(const Tensor& x) { return {static_cast<const T*>(x.data_ptr()), x.stride(0), x.stride(1)}; }
  T* result(const Sizes& sizes) {
    found_.push_back(new_result(kOp, slope_, sizes));
    return static_cast<T*>(found_.back().data_ptr());
  }
  const Tensor& operand(int64_t rows, int64_t columns) {
    CURVATURE_CHECK(k_ < operands_.size(), kOp, ": there are fewer operands than the steps need.");
    const Tensor& x = operands_[k_++];
    CURVATURE_CHECK(x.scalar_type() == slope_.scalar_type(), kOp, ": operand ", k_ - 1, " has another dtype.");
    const bool fits = x.dim() == 2 && x.size(0) == rows && (columns < 0 || x.size(1) == columns);
    CURVATURE_CHECK(fits, kOp, ": operand ", k_ - 1, " of shape ", shape_text(x), " does not fit the steps before it.");
    return x;
  }

  const Tensor& slope_;
  const std::vector<Tensor>& operands_;
  std::vector<Tensor>& found_;
  size_t k_ = 0;
};

template <class T>
void run(const Tensor& slope, const std::optional<Tensor>& start, const std::vector<Tensor>& operands,
         const std::vector<int64_t>& kinds, bool pairs, std::vector<Tensor>& found) {
  constexpr int64_t W = kCols<T>;
  double work = 0;
  Chain<T> chain = Reader<T>(slope, operands, found).read(start, kinds, pairs, work);
  if (chain.N == 0) return;
  int64_t packed = 0;
  for (const Step<T>& s : chain.steps) packed += s.kind == kDense ? panels<T>(s.next) * s.width * W : 0;
  Buffer<T> weights(packed);
  for (const Step<T>& s : chain.steps)
    if (s.kind == kDense) pack_panels<T, T>(s.x.data, s.width, s.x.row, s.next, s.x.entry, weights + s.packed);
  chain.weights = weights;
  share_tasks(divide_up(chain.N, W), work * chain.N > kWorthThreads,
              [&](int64_t task) { chain.block(task * W, std::min(W, chain.N - task * W)); });
}

std::vector<Tensor> dense_chain_hessians(const Tensor& slope, std::optional<Tensor> start,
                                         const std::vector<Tensor>& operands, const std::vector<int64_t>& kinds,
                                         bool pairs) {
  const char* op = "dense_chain_hessians";
  CURVATURE_CHECK(slope.dim() == 2, op, ": 'slope' must be [N, F], got ", shape_text(slope), ".");
  const int64_t N = slope.size(0), F = slope.size(1);
  const bool fits = !start || (start->dim() == 3 && start->size(0) == F && start->size(1) == N && start->size(2) == F &&
                               start->scalar_type() == slope.scalar_type());
  CURVATURE_CHECK(fits, op, ": 'start' must be [F, N, F], of the dtype of 'slope'.");
  const ScalarType dtype = slope.scalar_type();
  CURVATURE_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, op, ": float32 or float64 is needed.");
  std::vector<Tensor> found;
  if (dtype == ScalarType::Float) run<float>(slope, start, operands, kinds, pairs, found);
  else run<double>(slope, start, operands, kinds, pairs, found);
  return found;
}
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torch_curvature, m) {
  m.def("dense_chain_hessians(Tensor slope, Tensor? start, Tensor[] operands, int[] kinds, bool pairs) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(torch_curvature, CPU, m) { m.impl("dense_chain_hessians", TORCH_BOX(&dense_chain_hessians)); }
}  // namespace torch_curvature::cpu
