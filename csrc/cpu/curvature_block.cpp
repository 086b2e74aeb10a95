// curvature_block: a block between the parameters of two layers, added to or written into its places of a symmetric
// matrix.
//
//   value[(o, i), (p, j)] = sum_n (m[n, o, p] a[n, i] + g[n, o] d[n, i, p]) a2[n, j]
//   out[row(o, i), column(p, j)] (+)= value,   out[column(p, j), row(o, i)] (+)= value
//
// Shapes: m [N, O, O2], a [N, I], a2 [N, I2], g [N, O], d [N, D, O2] (zero for inputs i >= D) or only
// its diagonal [N, O2], out [P, P]. Second derivatives of a loss by the weights of z = W a, given those by the z: m by
// both, d = da / dz2, g by z alone.
//
// How: two_layers.h. Without a2 it is the block of one layer with itself: only the pairs o <= p and i <= j are
// multiplied (kronecker_core.h). curvature_blocks, a helper of the CPU, adds several together (work.h).
#include "kronecker_core.h"
#include "two_layers.h"

namespace torch_curvature::cpu {
namespace {

// A layer with itself that has one input, a bias: sums over the samples, m[n, o, p] weight[n] for p >= o.
template <class T, class A>
CURVATURE_CLONES void sum_samples(const T* m, int64_t mn, int64_t mp, const A* __restrict__ weight, int64_t N,
                                  int64_t count, A* __restrict__ sum) {
  std::fill_n(sum, count, A(0));
  if (mn == 1) {  // sums side by side: the compiler may not split one
    constexpr int64_t kSums = 64 / sizeof(A);
    for (int64_t p = 0; p < count; ++p, m += mp) {
      A parts[kSums] = {};
      int64_t n = 0;
      for (; n + kSums <= N; n += kSums)
        for (int64_t k = 0; k < kSums; ++k) parts[k] += weight[n + k] * static_cast<A>(m[n + k]);
      for (int64_t k = 0; n + k < N; ++k) parts[k] += weight[n + k] * static_cast<A>(m[n + k]);
      for (int64_t k = 0; k < kSums; ++k) sum[p] += parts[k];
    }
    return;
  }
  for (int64_t n = 0; n < N; ++n, m += mn) {
    if (mp == 1)
      for (int64_t p = 0; p < count; ++p) sum[p] += weight[n] * static_cast<A>(m[p]);
    else
      for (int64_t p = 0; p < count; ++p) sum[p] += weight[n] * static_cast<A>(m[p * mp]);
  }
}

// Of one output o after the other.
template <class T>
class OneInputWork final : public Work {
  using A = accumulate_t<T>;

 public:
  explicit OneInputWork(const TwoLayers<T>& s) : s_(s), weight_(s.size.N) {
    for (int64_t n = 0; n < s.size.N; ++n) {
      const A a = static_cast<A>(s.a[n * s.an]);
      weight_[n] = a * a;
    }
  }
  double bytes() const { return 0; }
  double cost() const override { return double(s_.size.N) * s_.size.O * s_.size.O; }
  int64_t tasks() const override { return s_.size.O; }
  std::unique_ptr<Worker> worker() override { return std::make_unique<Sums>(s_, weight_); }

 private:
  struct Sums final : Worker {
    Sums(const TwoLayers<T>& s, const A* weight) : s(s), weight(weight), sum(s.size.O) {}
    void run(int64_t o) override {
      const BlockSizes& z = s.size;
      sum_samples<T, A>(s.m + o * (s.mo + s.mp), s.mn, s.mp, weight, z.N, z.O - o, sum);
      for (int64_t p = o; p < z.O; ++p) {
        const int64_t row = z.rows.at(o, 0, 1), column = z.rows.at(p, 0, 1);
        T &to = s.out[row * s.ld + column], &twin = s.out[column * s.ld + row];
        to = twin = static_cast<T>(s.add ? A(to) + sum[p - o] : sum[p - o]);
      }
    }
    const TwoLayers<T>& s;
    const A* weight;
    Buffer<A> sum;
  };
  const TwoLayers<T> s_;
  Buffer<A> weight_;  // a^2
};

// No samples: zeros, or nothing to add.
void write_zeros(const BlockSizes& z, bool symmetric, Tensor& out) {
  const int64_t ld = out.stride(0);
  dispatch_floating(out.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* to = static_cast<T*>(out.data_ptr());
    for (int64_t o = 0; o < z.O; ++o)
      for (int64_t i = 0; i < z.I; ++i)
        for (int64_t p = 0; p < z.O2; ++p)
          for (int64_t j = 0; j < z.I2; ++j) {
            const int64_t row = z.rows.at(o, i, z.I), column = (symmetric ? z.rows : z.columns).at(p, j, z.I2);
            to[row * ld + column] = to[column * ld + row] = T(0);
          }
  });
}

// m[n, o, p], as kronecker_core.h takes it.
template <class T>
struct CopiedPairs {
  using A = accumulate_t<T>;
  const T* m;
  int64_t mn, mo, mp, N;
  void operator()(const Pair* pairs, int64_t count, A* to) const {
    copy_pairs<T, A>(m, mn, mo, mp, pairs, count, N, to);
  }
};

// Blocks, collected to be added together; no more at once than what they pack may take.
class Collected {
  static constexpr double kPacked = 1 << 27;  // bytes

 public:
  template <class W>
  void add(std::unique_ptr<W> work) {
    bytes_ += work->bytes();
    all_.push_back(std::move(work));
    if (bytes_ > kPacked) finish();
  }
  void finish() {
    std::vector<Work*> all;
    for (auto& work : all_) all.push_back(work.get());
    do_together(all);
    all_.clear(), bytes_ = 0;
  }

 private:
  std::vector<std::unique_ptr<Work>> all_;
  double bytes_ = 0;
};

void collect_block(const Tensor& m, const Tensor& a, const std::optional<Tensor>& a2, const std::optional<Tensor>& g,
                   const std::optional<Tensor>& d, const Sizes& rows, const Sizes& columns, bool add, Tensor& out,
                   Collected& collected) {
  const BlockSizes z = check_curvature_block(m, a, a2, g, d, rows, columns, out);
  if (z.O * z.I * z.O2 * z.I2 == 0) return;
  if (z.N == 0) {
    if (!add) write_zeros(z, !a2, out);
    return;
  }
  const auto sm = strided<3>(m, {}), sd = strided<3>(d && z.D && !z.diagonal ? *d : m, {});
  const auto diagonal = strided<2>(d && z.diagonal ? *d : a, {});
  const auto sa = strided<2>(a, {}), sa2 = strided<2>(a2 ? *a2 : a, {}), sg = strided<2>(g ? *g : a, {});
  dispatch_floating(m.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T *values = sm.template data<T>(), *own = sa.template data<T>();
    T* to = static_cast<T*>(out.data_ptr());
    if (!a2 && z.I > 1) {
      const KroneckerProblem<T> problem{own,  own, sa.core[0], sa.core[1], sa.core[0],    sa.core[1],
                                        z.N,  z.O, z.O2,       z.I,        z.I2,          true,
                                        true, to,  z.rows,     z.rows,     out.stride(0), add};
      const CopiedPairs<T> pairs{values, sm.core[0], sm.core[1], sm.core[2], z.N};
      return collected.add(std::make_unique<KroneckerWork<T, CopiedPairs<T>>>(problem, pairs));
    }
    const bool moves = g && z.D;
    const TwoLayers<T> s{values,
                         own,
                         sa2.template data<T>(),
                         moves ? sg.template data<T>() : nullptr,
                         !moves       ? nullptr
                         : z.diagonal ? diagonal.template data<T>()
                                      : sd.template data<T>(),
                         sm.core[0],
                         sm.core[1],
                         sm.core[2],
                         sa.core[0],
                         sa.core[1],
                         sa2.core[0],
                         sa2.core[1],
                         sg.core[0],
                         sg.core[1],
                         z.diagonal ? diagonal.core[0] : sd.core[0],
                         z.diagonal ? 0 : sd.core[1],
                         z.diagonal ? diagonal.core[1] : sd.core[2],
                         z,
                         to,
                         out.stride(0),
                         add};
    if (a2) collected.add(std::make_unique<TwoLayersWork<T>>(s));
    else collected.add(std::make_unique<OneInputWork<T>>(s));
  });
}

void curvature_block(const Tensor& m, const Tensor& a, std::optional<Tensor> a2, std::optional<Tensor> g,
                     std::optional<Tensor> d, std::vector<int64_t> rows, std::vector<int64_t> columns, bool add,
                     Tensor out) {
  Collected one;
  collect_block(m, a, a2, g, d, rows, columns, add, out, one);
  one.finish();
}

// The k-th block of each list; places: rows and columns, eight numbers a block, without meaning where a2 is left out.
void curvature_blocks(std::vector<Tensor> m, std::vector<Tensor> a, std::vector<std::optional<Tensor>> a2,
                      std::vector<std::optional<Tensor>> g, std::vector<std::optional<Tensor>> d,
                      std::vector<int64_t> places, std::vector<int64_t> add, std::vector<Tensor> out) {
  const size_t count = m.size();
  CURVATURE_CHECK(a.size() == count && a2.size() == count && g.size() == count && d.size() == count &&
                      places.size() == 8 * count && add.size() == count && out.size() == count,
                  "curvature_blocks: lists of different length.");
  Collected all;
  for (size_t k = 0; k < count; ++k) {
    const auto at = places.begin() + 8 * k;
    collect_block(m[k], a[k], a2[k], g[k], d[k], Sizes(at, at + 4), a2[k] ? Sizes(at + 4, at + 8) : Sizes(),
                  add[k] != 0, out[k], all);
  }
  all.finish();
}
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torch_curvature, m) {
  m.def(
      "curvature_blocks(Tensor[] m, Tensor[] a, Tensor?[] a2, Tensor?[] g, Tensor?[] d, int[] places, int[] add, "
      "Tensor(a!)[] out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(torch_curvature, CPU, m) {
  m.impl("curvature_block", TORCH_BOX(&curvature_block));
  m.impl("curvature_blocks", TORCH_BOX(&curvature_blocks));
}
}  // namespace torch_curvature::cpu
