// dense_gram: out[(n, v), (m, w)] = sum over layers l of (a_l[n] . a_l[m] + b_l)(g_l[v, n] . g_l[w, m]), inner products
// of the gradients of dense layers with one position a sample, all layers in one pass.
//
// A helper of the CPU: layer by layer the result is read and written again for each, and turned at the end into memory
// that is fresh once more. Declared here.
//
// Shapes: g_l [V, N, O_l], a_l [N, I_l], b_l 1 where a bias goes with the weight, else 0; a_l with I_l = 0 leaves only
// b_l; out [N V, N V]. Entries are contiguous. A task is a pair of panels of kCols rows (n, v): a tile of each layer is
// multiplied in registers, weighted by the inner products of the inputs and added up in the first cache, and the sum
// written once and once mirrored: symmetric to the bit. With V > 1 the inner products of inputs are kept for V^2 layers
// at a time, which is as much memory as the result. Flops: sum over layers of (N V)^2 (O + 2) + N^2 I; bytes: those of
// out once, of packed rows N V / kCols times from the caches.
#include "dense_layers.h"
#include "jacobian_gram.h"

namespace torch_curvature::cpu {
namespace {

template <class T>
struct GramLayer : DenseLayer<T> {
  int64_t of_g, of_a;  // where its packed rows begin
};

template <class T>
class DenseGram {
 public:
  static constexpr int64_t W = kCols<T>, kBands = W / kRows, kTile = kRows * W, kStep = 4096 / sizeof(T);

  DenseGram(std::vector<GramLayer<T>> layers, int64_t V, int64_t N)
      : layers_(std::move(layers)),
        V_(V),
        N_(N),
        R_(N * V),
        P_(panels<T>(R_)),
        Q_(panels<T>(N)),
        packed_(layers_.back().of_a + Q_ * layers_.back().I * W),
        group_(V > 1 ? std::min<int64_t>(layers_.size(), V * V) : layers_.size()),
        inputs_(V > 1 ? group_ * N * Q_ * W : 0) {}

  void into(T* out) {
    double cost = 0;
    for (const GramLayer<T>& l : layers_) cost += double(R_) * R_ * (l.O + 8) + double(N_) * N_ * l.I;
    const bool threads = cost > kWorthThreads;
    const int64_t L = static_cast<int64_t>(layers_.size());
    share_tasks(P_ + Q_, threads, [&](int64_t p) { p < P_ ? pack_outputs(p) : pack_inputs(p - P_); });
    for (int64_t l = 0; l < L; l += group_) {
      const int64_t end = std::min(L, l + group_);
      if (V_ > 1)
        share_tasks((end - l) * Q_ * Q_, threads, [&](int64_t task) {
          const int64_t k = task / (Q_ * Q_), p = task / Q_ % Q_, q = task % Q_;
          if (p <= q) multiply_inputs(layers_[l + k], inputs_ + k * N_ * Q_ * W, p, q);
        });
      share_tasks(P_ * P_, threads, [&](int64_t task) {
        const int64_t p = task / P_, q = task % P_;
        if (p <= q) block(l, end, p, q, out);
      });
    }
  }

 private:
  static int64_t width(int64_t rows, int64_t p) { return std::min(W, rows - p * W); }

  // Rows (n, v) of g, and rows n of a, transposed: [depth][W].
  void pack_outputs(int64_t p) {
    const T* rows[W];
    for (const GramLayer<T>& l : layers_) {
      for (int64_t c = 0; c < width(R_, p); ++c) {
        const int64_t r = p * W + c;
        rows[c] = l.g + r % V_ * l.gv + r / V_ * l.gn;
      }
      pack_rows<T, T>(rows, 1, l.O, width(R_, p), packed_ + l.of_g + p * l.O * W);
    }
  }
  void pack_inputs(int64_t p) {
    const T* rows[W];
    for (const GramLayer<T>& l : layers_) {
      for (int64_t c = 0; c < width(N_, p); ++c) rows[c] = l.a + (p * W + c) * l.an;
      pack_rows<T, T>(rows, 1, l.I, width(N_, p), packed_ + l.of_a + p * l.I * W);
    }
  }

  // Tiles [kBands][kRows][W] of panel p by panel q of packed rows.
  void product(int64_t of, int64_t depth, int64_t rows, int64_t p, int64_t q, T* to) const {
    if (depth == 0) std::fill_n(to, W * W, T(0));
    const T *x = packed_ + of + p * depth * W, *y = packed_ + of + q * depth * W;
    for (int64_t k = 0; k < depth; k += kStep)
      for (int64_t band = 0; band * kRows < width(rows, p); ++band)
        multiply_(x + k * W + band * kRows, W, y + k * W, W, {std::min(kStep, depth - k)}, to + band * kTile,
                  std::min(kRows, width(rows, p) - band * kRows), width(rows, q), k > 0);
  }

  // a[n] . a[m] + b of two panels of samples, to [n][m] and mirrored.
  void multiply_inputs(const GramLayer<T>& l, T* to, int64_t p, int64_t q) const {
    alignas(64) T tile[W * W], turned[W * W];
    product(l.of_a, l.I, N_, p, q, tile);
    for (T& value : tile) value += l.bias;
    put_rows<T, T>(tile, W, width(N_, p), W, to + p * W * Q_ * W + q * W, Q_ * W, false);
    transpose_tile<T>(tile, W, width(N_, p), width(N_, q), turned);
    if (p < q) put_rows<T, T>(turned, W, width(N_, q), width(N_, p), to + q * W * Q_ * W + p * W, Q_ * W, false);
  }

  // weight[c] = a[n] . a[m] + b of the samples m of the rows (m, w) in panel q.
  void spread_inputs(const T* row, int64_t q, T* weight) const {
    int64_t r = q * W;
    const int64_t last = r + width(R_, q);
    while (r < last) {
      const int64_t end = std::min(last, (r / V_ + 1) * V_);
      const T value = row[r / V_];
      for (; r < end; ++r) *weight++ = value;
    }
  }

  static CURVATURE_CLONES void add_row(const T* __restrict__ x, const T* __restrict__ weight, T* __restrict__ sum) {
    for (int64_t c = 0; c < W; ++c) sum[c] += x[c] * weight[c];
  }

  // Layers begin.. to end.. of a pair of panels, added to those before them.
  void block(int64_t begin, int64_t end, int64_t p, int64_t q, T* out) const {
    const int64_t rows = width(R_, p), cols = width(R_, q);
    alignas(64) T sum[W * W] = {}, tile[W * W], weights[W * W] = {};
    for (int64_t k = begin; k < end; ++k) {
      const GramLayer<T>& l = layers_[k];
      product(l.of_g, l.O, R_, p, q, tile);
      if (V_ == 1) {
        product(l.of_a, l.I, N_, p, q, weights);
        for (T& value : weights) value += l.bias;
      }
      for (int64_t r = 0, known = -1; r < rows; ++r) {
        const int64_t n = (p * W + r) / V_;
        if (V_ > 1 && n != known) spread_inputs(inputs_ + ((k - begin) * N_ + n) * Q_ * W, q, weights);
        known = n;
        add_row(tile + r * W, weights + (V_ > 1 ? 0 : r * W), sum + r * W);
      }
    }
    T* to = out + p * W * R_ + q * W;
    if (p == q) {
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < r; ++c) sum[r * W + c] = sum[c * W + r];
      return put_rows<T, T>(sum, W, rows, cols, to, R_, begin > 0);
    }
    put_rows<T, T>(sum, W, rows, cols, to, R_, begin > 0);
    transpose_tile<T>(sum, W, rows, cols, tile);
    put_rows<T, T>(tile, W, cols, rows, out + q * W * R_ + p * W, R_, begin > 0);
  }

  const std::vector<GramLayer<T>> layers_;
  const int64_t V_, N_, R_, P_, Q_;  // rows (n, v), and panels of them and of samples
  const Buffer<T> packed_;
  const int64_t group_;  // of layers whose products of inputs are no larger than the result
  const Buffer<T> inputs_;
  const TileProduct<T> multiply_ = tile_product<T>();
};

template <class T>
void gram(const std::vector<Tensor>& g, const std::vector<Tensor>& a, const std::vector<int64_t>& bias, int64_t V,
          int64_t N, T* out) {
  std::vector<GramLayer<T>> layers;
  int64_t packed = 0;
  const int64_t P = panels<T>(N * V), Q = panels<T>(N);
  for (const DenseLayer<T>& l : dense_layers<T>("dense_gram", g, a, bias)) {
    const int64_t of_a = packed + P * l.O * kCols<T>;
    layers.push_back({l, packed, of_a});
    packed = of_a + Q * l.I * kCols<T>;
  }
  DenseGram<T>(std::move(layers), V, N).into(out);
}

Tensor dense_gram(const std::vector<Tensor>& g, const std::vector<Tensor>& a, const std::vector<int64_t>& bias) {
  const char* op = "dense_gram";
  check_dense_layers(op, g, a, bias);
  const int64_t V = g[0].size(0), N = g[0].size(1);
  Tensor out = new_result(op, g[0], {N * V, N * V});
  if (N * V == 0) return out;
  if (g[0].scalar_type() == ScalarType::Float) gram<float>(g, a, bias, V, N, static_cast<float*>(out.data_ptr()));
  else gram<double>(g, a, bias, V, N, static_cast<double*>(out.data_ptr()));
  return out;
}
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torch_curvature, m) { m.def("dense_gram(Tensor[] g, Tensor[] a, int[] bias) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(torch_curvature, CPU, m) { m.impl("dense_gram", TORCH_BOX(&dense_gram)); }
}  // namespace torch_curvature::cpu
