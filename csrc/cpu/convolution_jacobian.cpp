// Jacobians of the weight of a two-dimensional convolution, straight from its input: no patch is ever unfolded.
//
// Helpers of the CPU; declared here.
//
//   J[v, n][o, (c, ky, kx)] = sum_{y, x} g[v, n, (y, x), o] input[n, c, y sy + ky dy - py, x sx + kx dx - px]
//
// Shapes: g [V, N, S, O], input [N, C, H, W]; geometry: kernel, stride, padding (top, left), dilation and output
// positions (S = rows x columns), two numbers each. convolution_jacobian gives J [V, N, O C K]; its entries as they
// come, [V, N, panels of O][K][C][kCols] with zeros in the last panel, are written by convolution_jacobian_ into memory
// that is there: for inner products, a few outputs at a time; with_bias, sum_s g[v, n, s] follows in each panel, as one
// more of its K C rows. convolution_norms gives squared norms [V, N], with_bias those of J and sum_s g[v, n, s]
// together; convolution_diagonal gives sum_vn sign[v, n] J[v, n]^2 [O, C K] entry by entry.
//
// The numbers of the input are read where they lie (convolution.h), a few places of the kernel and channels at a time,
// and multiply panels of g in registers. 2 V N S O C K flops (times padded width over width); bytes of g, input and
// result once, asked for while the sample before is multiplied.
#include "ahead.h"
#include "convolution.h"

namespace torch_curvature::cpu {
namespace {
// lanes[c] += (sum_k x[k, c])^2 for a panel x [depth][kCols].
template <class T>
CURVATURE_CLONES void add_squares_of_sums(const T* __restrict__ x, int64_t depth, T* __restrict__ lanes) {
  constexpr int64_t W = kCols<T>;
  T sums[W] = {};
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t c = 0; c < W; ++c) sums[c] += x[k * W + c];
  for (int64_t c = 0; c < W; ++c) lanes[c] += sums[c] * sums[c];
}

// sums[c] = sum_k x[k, c] for a panel x [depth][kCols], zero from `cols` on.
template <class T>
CURVATURE_CLONES void sum_panel(const T* __restrict__ x, int64_t depth, int64_t cols, T* __restrict__ sums) {
  constexpr int64_t W = kCols<T>;
  T found[W] = {};
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t c = 0; c < W; ++c) found[c] += x[k * W + c];
  for (int64_t c = 0; c < W; ++c) sums[c] = c < cols ? found[c] : T(0);
}

template <class T>
struct Problem {
  const T *g, *input;
  int64_t gv, gn, gs, go, in, ic, iy, ix, V, N;
  Geometry geometry;
  Sign<T> sign;
  T* out;

  int64_t parts() const { return geometry.y.stride * geometry.x.stride; }
  int64_t places() const { return geometry.y.kernel * geometry.x.kernel; }
  int64_t entries() const { return geometry.O * geometry.C * places(); }
  int64_t inputs() const { return places() * geometry.C; }  // rows of tiles: channels within places of the kernel
  int64_t tiles() const { return divide_up(inputs(), kRows) * panels<T>(geometry.O); }
  bool worth_threads() const {
    return double(V) * N * geometry.y.out * geometry.x.out * double(entries()) > kWorthThreads;
  }

  // Panels [panels][depth][kCols], zero between the rows of positions.
  void pack_outputs(int64_t v, int64_t n, T* to) const {
    constexpr int64_t W = kCols<T>;
    const Geometry& z = geometry;
    for (int64_t q = 0; q < panels<T>(z.O); ++q)
      pack_positions<T>(g + v * gv + n * gn + q * W * go, gs, go, z.y.out, z.x.out, z.x.extent(),
                        panel_width<T>(z.O, q), to + q * z.depth() * W);
  }

  // Where the rows of tiles begin among the parts of the input.
  std::vector<int64_t> starts() const {
    const Geometry& z = geometry;
    std::vector<int64_t> found;
    for (int64_t ky = 0; ky < z.y.kernel; ++ky)
      for (int64_t kx = 0; kx < z.x.kernel; ++kx)
        for (int64_t c = 0; c < z.C; ++c) found.push_back((z.part(ky, kx) * z.C + c) * z.plane() + z.shift(ky, kx));
    return found;
  }

  // use(first row m = place C + channel, panel of outputs, tile [row][output], rows, outputs)
  template <class Use>
  void contract(const T* planes, const int64_t* starts, const T* outputs, T* tile, Ahead& ahead, const Use& use) const {
    constexpr int64_t W = kCols<T>;
    const auto product = tile_product_in_place<T>();
    const int64_t depth = geometry.depth();
    for (int64_t q = 0; q < panels<T>(geometry.O); ++q)
      for (int64_t m = 0; m < inputs(); m += kRows) {
        const int64_t rows = std::min(kRows, inputs() - m), cols = panel_width<T>(geometry.O, q);
        product(planes, 1, starts + m, outputs + q * depth * W, W, depth, tile, rows, cols);
        use(m, q, tile, rows, cols);
        ahead.fetch();
      }
  }

  // What a task of sample n reads, to be asked for while `columns` columns are multiplied.
  void look_ahead(int64_t n, int64_t columns, Ahead& ahead) const {
    const Geometry& z = geometry;
    ahead.clear();
    if (n >= N) return;
    if (in == z.C * z.y.size * z.x.size) ahead.add(input + n * in, in);
    if (gn == z.O * z.y.out * z.x.out) ahead.add(g + n * gn, gn);
    ahead.spread(columns * tiles());
  }

  // Each of `tasks` calls run(task, each), and that each(n, v0, v1, use) for the columns v0 to v1 of its samples, where
  // use(v, packed outputs, ...) takes what contract gives. Task k begins with sample k N / tasks.
  template <class Run>
  void share(int64_t tasks, const Run& run) const {
    const Geometry& z = geometry;
    const int64_t outputs = panels<T>(z.O) * z.depth() * kCols<T>, numbers = parts() * z.C * z.plane();
    const std::vector<int64_t> rows = starts();
    share_tasks_ahead(tasks, worth_threads(), [&](const auto& each_task) {
      Buffer<T> planes(numbers), packed(outputs), tile(kRows * kCols<T>);
      std::fill_n(static_cast<T*>(planes), numbers, T(0));
      std::fill_n(static_cast<T*>(packed), outputs, T(0));
      std::fill_n(static_cast<T*>(tile), kRows * kCols<T>, T(0));
      Ahead ahead;
      each_task([&](int64_t task, int64_t following) {
        const int64_t last = divide_up((task + 1) * N, tasks) - 1;
        run(task, [&](int64_t n, int64_t v0, int64_t v1, const auto& use) {
          pack_input<T>(input + n * in, ic, iy, ix, z, planes);
          look_ahead(n < last ? n + 1 : following * N / tasks, v1 - v0, ahead);
          for (int64_t v = v0; v < v1; ++v) {
            pack_outputs(v, n, packed);
            contract(planes, rows.data(), packed, tile, ahead,
                     [&](auto... found) { use(v, static_cast<const T*>(packed), found...); });
          }
        });
      });
    });
  }

  // Tasks are samples or, where there are few, some columns of one.
  template <class Run>
  void share_columns(const Run& run) const {
    const int64_t pieces = std::clamp<int64_t>(divide_up(4 * torch::stable::get_num_threads(), N), 1, V);
    share(N * pieces, [&](int64_t task, const auto& each) {
      const int64_t piece = task % pieces;
      run(task / pieces, piece * V / pieces, (piece + 1) * V / pieces, each);
    });
  }

  void norms(bool with_bias) const {
    constexpr int64_t W = kCols<T>;
    share_columns([&](int64_t n, int64_t v0, int64_t v1, const auto& each) {
      for (int64_t v = v0; v < v1; ++v) out[v * N + n] = 0;
      alignas(64) T sums[W];
      each(n, v0, v1, [&](int64_t v, const T* packed, int64_t m, int64_t q, const T* tile, int64_t rows, int64_t cols) {
        if (m + q == 0) std::fill_n(sums, W, T(0));
        if (m == 0 && with_bias) add_squares_of_sums(packed + q * geometry.depth() * W, geometry.depth(), sums);
        add_squares<T>(tile, rows, cols, sums);
        if (m + rows == inputs() && q == panels<T>(geometry.O) - 1)
          for (const T x : sums) out[v * N + n] += x;
      });
    });
  }

  void jacobian() const {
    share_columns([&](int64_t n, int64_t v0, int64_t v1, const auto& each) {
      each(n, v0, v1, [&](int64_t v, const T*, int64_t m, int64_t q, const T* tile, int64_t rows, int64_t cols) {
        constexpr int64_t W = kCols<T>;
        T* to = out + (v * N + n) * entries();
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t place = (m + r) / geometry.C, c = (m + r) % geometry.C;
          for (int64_t o = 0; o < cols; ++o) to[((q * W + o) * geometry.C + c) * places() + place] = tile[r * W + o];
        }
      });
    });
  }

  void tiled_jacobian(bool with_bias) const {
    constexpr int64_t W = kCols<T>;
    const int64_t lines = inputs() + with_bias, wide = panels<T>(geometry.O);
    share_columns([&](int64_t n, int64_t v0, int64_t v1, const auto& each) {
      each(n, v0, v1, [&](int64_t v, const T* packed, int64_t m, int64_t q, const T* tile, int64_t rows, int64_t cols) {
        T* panel = out + ((v * N + n) * wide + q) * lines * W;
        if (with_bias && m == 0)
          sum_panel<T>(packed + q * geometry.depth() * W, geometry.depth(), cols, panel + inputs() * W);
        T* to = panel + m * W;
        if (cols == W) return void(std::copy_n(tile, rows * W, to));
        for (int64_t r = 0; r < rows; ++r)
          std::fill(std::copy_n(tile + r * W, cols, to + r * W), to + (r + 1) * W, T(0));
      });
    });
  }

  // Sums in tiles for a fixed number of pieces of the batch, added in order: they do not depend on the threads.
  void diagonal() const {
    constexpr int64_t W = kCols<T>, kTile = kRows * W, kMost = (int64_t{1} << 26) / sizeof(T);
    const int64_t pieces = std::clamp<int64_t>(kMost / (tiles() * kTile), 1, std::min<int64_t>(N, 16));
    const int64_t each_sums = tiles() * kTile, wide = panels<T>(geometry.O);
    Buffer<T> sums(pieces * each_sums);
    share(pieces, [&](int64_t piece, const auto& each) {
      T* own = sums + piece * each_sums;
      std::fill_n(own, each_sums, T(0));
      for (int64_t n = piece * N / pieces; n < (piece + 1) * N / pieces; ++n)
        each(n, 0, V, [&](int64_t v, const T*, int64_t m, int64_t q, const T* tile, int64_t, int64_t) {
          add_weighted_squares<T>(tile, sign(v, n), own + (m / kRows * wide + q) * kTile);
        });
    });
    for (int64_t place = 0; place < places(); ++place)
      for (int64_t c = 0; c < geometry.C; ++c)
        for (int64_t o = 0; o < geometry.O; ++o) {
          const int64_t m = place * geometry.C + c, at = (m / kRows * wide + o / W) * kTile + m % kRows * W + o % W;
          T value = 0;
          for (int64_t piece = 0; piece < pieces; ++piece) value += sums[piece * each_sums + at];
          out[(o * geometry.C + c) * places() + place] = value;
        }
  }
};

enum class Wanted { kNorms, kJacobian, kTiled, kDiagonal };

Geometry check_geometry(const char* op, const Tensor& g, const Tensor& input, const std::vector<int64_t>& numbers) {
  CURVATURE_CHECK(g.dim() == 4 && input.dim() == 4, op, ": 'g' must be [V, N, S, O] and 'input' [N, C, H, W], got ",
                  shape_text(g), " and ", shape_text(input), ".");
  CURVATURE_CHECK(g.size(1) == input.size(0) && g.scalar_type() == input.scalar_type(), op,
                  ": 'g' and 'input' differ in samples or dtype.");
  CURVATURE_CHECK(numbers.size() == 10, op, ": 'geometry' takes ten numbers.");
  auto axis = [&](int64_t k) {
    return Axis{numbers[k], numbers[k + 2], numbers[k + 4], numbers[k + 6], numbers[k + 8], input.size(k + 2)};
  };
  const Geometry z{input.size(1), g.size(3), axis(0), axis(1)};
  for (const Axis& a : {z.y, z.x})
    CURVATURE_CHECK(a.kernel > 0 && a.stride > 0 && a.padding >= 0 && a.dilation > 0 && a.out > 0, op,
                    ": 'geometry' holds a number that is too small.");
  CURVATURE_CHECK(z.y.out * z.x.out == g.size(2), op, ": 'geometry' has ", z.y.out * z.x.out, " positions, 'g' ",
                  g.size(2), ".");
  return z;
}

int64_t padded_outputs(const Tensor& g) {
  return g.scalar_type() == ScalarType::Double ? panels<double>(g.size(3)) * kCols<double>
                                               : panels<float>(g.size(3)) * kCols<float>;
}

// Tiles go to `room`; all else into a result of its own.
Tensor convolved(const char* op, const Tensor& g, const Tensor& input, const std::vector<int64_t>& numbers,
                 const std::optional<Tensor>& sign, Wanted wanted, bool with_bias = false,
                 const std::optional<Tensor>& room = {}) {
  const Geometry z = check_geometry(op, g, input, numbers);
  CURVATURE_CHECK(!sign || (sign->dim() == 2 && sign->size(0) == g.size(0) && sign->size(1) == g.size(1) &&
                            sign->scalar_type() == g.scalar_type()),
                  op, ": 'sign' must be [V, N], of the dtype of 'g'.");
  const int64_t V = g.size(0), N = g.size(1), inputs = z.C * z.y.kernel * z.x.kernel;
  const int64_t entries = V * N * padded_outputs(g) * (inputs + with_bias);
  CURVATURE_CHECK(
      !room || (room->scalar_type() == g.scalar_type() && room->is_contiguous() && room->numel() == entries), op,
      ": 'room' must be contiguous, of the dtype of 'g', with ", entries, " entries.");
  Tensor out = room ? *room
                    : new_result(op, g,
                                 wanted == Wanted::kNorms      ? Sizes{V, N}
                                 : wanted == Wanted::kJacobian ? Sizes{V, N, z.O * inputs}
                                                               : Sizes{z.O, inputs});
  if (V * N * z.O * inputs == 0) return torch::stable::zero_(out);
  dispatch_floating(g.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>) {
      const Problem<T> problem{static_cast<const T*>(g.data_ptr()),
                               static_cast<const T*>(input.data_ptr()),
                               g.stride(0),
                               g.stride(1),
                               g.stride(2),
                               g.stride(3),
                               input.stride(0),
                               input.stride(1),
                               input.stride(2),
                               input.stride(3),
                               V,
                               N,
                               z,
                               Sign<T>(sign),
                               static_cast<T*>(out.data_ptr())};
      wanted == Wanted::kNorms      ? problem.norms(with_bias)
      : wanted == Wanted::kJacobian ? problem.jacobian()
      : wanted == Wanted::kTiled    ? problem.tiled_jacobian(with_bias)
                                    : problem.diagonal();
    } else {
      CURVATURE_CHECK(false, op, ": float32 or float64 is needed.");
    }
  });
  return out;
}

Tensor convolution_norms(const Tensor& g, const Tensor& input, const std::vector<int64_t>& geometry, bool with_bias) {
  return convolved("convolution_norms", g, input, geometry, {}, Wanted::kNorms, with_bias);
}
Tensor convolution_jacobian(const Tensor& g, const Tensor& input, const std::vector<int64_t>& geometry) {
  return convolved("convolution_jacobian", g, input, geometry, {}, Wanted::kJacobian);
}
void convolution_jacobian_(const Tensor& room, const Tensor& g, const Tensor& input,
                           const std::vector<int64_t>& geometry, bool with_bias) {
  convolved("convolution_jacobian_", g, input, geometry, {}, Wanted::kTiled, with_bias, room);
}
Tensor convolution_diagonal(const Tensor& g, const Tensor& input, const std::vector<int64_t>& geometry,
                            std::optional<Tensor> sign) {
  return convolved("convolution_diagonal", g, input, geometry, sign, Wanted::kDiagonal);
}
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torch_curvature, m) {
  m.def("convolution_norms(Tensor g, Tensor input, int[] geometry, bool with_bias) -> Tensor");
  m.def("convolution_jacobian(Tensor g, Tensor input, int[] geometry) -> Tensor");
  m.def("convolution_jacobian_(Tensor(a!) room, Tensor g, Tensor input, int[] geometry, bool with_bias) -> ()");
  m.def("convolution_diagonal(Tensor g, Tensor input, int[] geometry, Tensor? sign) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(torch_curvature, CPU, m) {
  m.impl("convolution_norms", TORCH_BOX(&convolution_norms));
  m.impl("convolution_jacobian", TORCH_BOX(&convolution_jacobian));
  m.impl("convolution_jacobian_", TORCH_BOX(&convolution_jacobian_));
  m.impl("convolution_diagonal", TORCH_BOX(&convolution_diagonal));
}
}  // namespace torch_curvature::cpu
