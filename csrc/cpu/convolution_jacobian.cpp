// Jacobians of the weight of a two-dimensional convolution, straight from its input: no patch is ever unfolded.
//
// Helpers of the CPU; declared here.
//
//   J[v, n][o, (c, ky, kx)] = sum_{y, x} g[v, n, (y, x), o] input[n, c, y sy + ky dy - py, x sx + kx dx - px]
//
// Shapes: g [V, N, S, O], input [N, C, H, W]; geometry: kernel, stride, padding (top, left), dilation and output
// positions (S = rows x columns), two numbers each. convolution_jacobian gives J [V, N, O C K], convolution_norms their
// squared norms [V, N].
//
// A sample's input is padded once, and parted by the residues of its rows and columns modulo the stride: for every
// place of the kernel, consecutive positions then see consecutive numbers, and a run over all positions in rows of the
// padded width meets g with zeros in the gaps. So the numbers are read where they lie, a few channels at a time, and
// multiply panels of g in registers. 2 V N S O C K flops (times padded width over width); bytes of g, input and result
// once.
#include "jacobian.h"

namespace torch_curvature::cpu {
namespace {
struct Axis {
  int64_t kernel, stride, padding, dilation, out, size;
  int64_t residue(int64_t k) const { return k * dilation % stride; }
  int64_t shift(int64_t k) const { return k * dilation / stride; }
  bool meets(int64_t r) const {  // whether a place of the kernel has this residue
    for (int64_t k = 0; k < kernel; ++k)
      if (residue(k) == r) return true;
    return false;
  }
  int64_t extent() const { return out + shift(kernel - 1); }  // of a part of the padded input
};

struct Geometry {
  int64_t C, O;
  Axis y, x;
  int64_t plane() const { return y.extent() * x.extent(); }
  int64_t depth() const { return (y.out - 1) * x.extent() + x.out; }
  int64_t part(int64_t ky, int64_t kx) const { return y.residue(ky) * x.stride + x.residue(kx); }
  int64_t shift(int64_t ky, int64_t kx) const { return y.shift(ky) * x.extent() + x.shift(kx); }
};

// A sample's input, row by row as it lies, into its parts [y stride][x stride][C][rows][columns]: the number at (h, w)
// is that of row (h + padding) / stride and part (h + padding) % stride. What is outside of the input stays zero.
template <class T>
CURVATURE_CLONES void pack_input(const T* x, int64_t channel, int64_t row, int64_t column, Geometry z,
                                 T* __restrict__ out) {
  const int64_t width = z.x.extent();
  for (int64_t c = 0; c < z.C; ++c)
    for (int64_t h = 0; h < z.y.size; ++h) {
      const int64_t r = (h + z.y.padding) / z.y.stride, ry = (h + z.y.padding) % z.y.stride;
      if (r >= z.y.extent() || !z.y.meets(ry)) continue;
      for (int64_t rx = 0; rx < z.x.stride; ++rx) {
        if (!z.x.meets(rx)) continue;
        // columns s of the part with 0 <= w = s stride + rx - padding < size
        const int64_t s0 = z.x.padding > rx ? divide_up(z.x.padding - rx, z.x.stride) : 0;
        const int64_t w0 = s0 * z.x.stride + rx - z.x.padding;
        const int64_t count = w0 < z.x.size ? std::min(width - s0, divide_up(z.x.size - w0, z.x.stride)) : 0;
        const T* from = x + c * channel + h * row + w0 * column;
        T* to = out + ((ry * z.x.stride + rx) * z.C + c) * z.plane() + r * width + s0;
        const int64_t step = z.x.stride * column;
        if (step == 1)
          for (int64_t s = 0; s < count; ++s) to[s] = from[s];
        else if (step == 2)
          for (int64_t s = 0; s < count; ++s) to[s] = from[2 * s];
        else
          for (int64_t s = 0; s < count; ++s) to[s] = from[s * step];
      }
    }
}

// Positions [rows, columns] of `count` outputs side by side, out[(y width + x) kCols + o]; what lies between stays.
// Those that are contiguous along positions are transposed four by four, in runs that the processor reads ahead.
template <class T>
CURVATURE_CLONES void pack_positions(const T* g, int64_t position, int64_t output, int64_t rows, int64_t columns,
                                     int64_t width, int64_t count, T* __restrict__ out) {
  constexpr int64_t W = kCols<T>, kRun = 128;
  if (position != 1 || !std::is_same_v<T, float>) {
    for (int64_t y = 0; y < rows; ++y)
      for (int64_t x = 0; x < columns; ++x)
        for (int64_t o = 0; o < count; ++o) out[(y * width + x) * W + o] = g[(y * columns + x) * position + o * output];
    return;
  }
  const int64_t several = std::max<int64_t>(1, kRun / columns);
  for (int64_t y0 = 0; y0 < rows; y0 += several)
    for (int64_t o = 0; o < count; o += 4)
      for (int64_t y = y0; y < std::min(rows, y0 + several); ++y) {
        const T* from = g + y * columns + o * output;
        T* to = out + y * width * W + o;
        int64_t x = 0;
        if constexpr (std::is_same_v<T, float>)
          for (; o + 4 <= count && x + 4 <= columns; x += 4) transpose_four(from + x, output, to + x * W);
        for (; x < columns; ++x)
          for (int64_t k = 0; k < std::min<int64_t>(4, count - o); ++k) to[x * W + k] = from[x + k * output];
      }
}

// sums[c] += sum_r tile[r][c]^2, the sums in registers.
template <class T>
CURVATURE_CLONES void add_squares(const T* tile, int64_t rows, int64_t cols, T* sums) {
  constexpr int64_t W = kCols<T>, kPart = 8;
  int64_t c = 0;
  for (; c + kPart <= cols; c += kPart) {
    T part[kPart];
    for (int64_t k = 0; k < kPart; ++k) part[k] = sums[c + k];
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t k = 0; k < kPart; ++k) part[k] += tile[r * W + c + k] * tile[r * W + c + k];
    for (int64_t k = 0; k < kPart; ++k) sums[c + k] = part[k];
  }
  for (; c < cols; ++c)
    for (int64_t r = 0; r < rows; ++r) sums[c] += tile[r * W + c] * tile[r * W + c];
}

template <class T>
struct Problem {
  const T *g, *input;
  int64_t gv, gn, gs, go, in, ic, iy, ix, V, N;
  Geometry geometry;
  T* out;
  bool norms;

  int64_t parts() const { return geometry.y.stride * geometry.x.stride; }

  // Panels [panels][depth][kCols], zero between the rows of positions.
  void pack_outputs(int64_t v, int64_t n, T* to) const {
    constexpr int64_t W = kCols<T>;
    const Geometry& z = geometry;
    for (int64_t q = 0; q < panels<T>(z.O); ++q)
      pack_positions<T>(g + v * gv + n * gn + q * W * go, gs, go, z.y.out, z.x.out, z.x.extent(),
                        panel_width<T>(z.O, q), to + q * z.depth() * W);
  }

  void contract(const T* planes, const T* outputs, T* result) const {
    constexpr int64_t W = kCols<T>;
    const Geometry& z = geometry;
    const auto product = tile_product_in_place<T>();
    const int64_t places = z.y.kernel * z.x.kernel, plane = z.plane();
    alignas(64) T tile[kRows * W], sums[W] = {};
    for (int64_t place = 0; place < places; ++place) {
      const int64_t ky = place / z.x.kernel, kx = place % z.x.kernel;
      const T* from = planes + z.part(ky, kx) * z.C * plane + z.shift(ky, kx);
      for (int64_t c = 0; c < z.C; c += kRows)
        for (int64_t q = 0; q < panels<T>(z.O); ++q) {
          const int64_t rows = std::min(kRows, z.C - c), cols = panel_width<T>(z.O, q);
          product(from + c * plane, 1, plane, outputs + q * z.depth() * W, W, z.depth(), tile, rows, cols);
          if (norms) {
            add_squares<T>(tile, rows, cols, sums);
            continue;
          }
          for (int64_t o = 0; o < cols; ++o)
            for (int64_t r = 0; r < rows; ++r) result[((q * W + o) * z.C + c + r) * places + place] = tile[r * W + o];
        }
    }
    if (!norms) return;
    *result = 0;
    for (int64_t c = 0; c < W; ++c) *result += sums[c];
  }

  void run() const {
    const Geometry& z = geometry;
    const int64_t each = norms ? 1 : z.O * z.C * z.y.kernel * z.x.kernel, outputs = panels<T>(z.O) * z.depth();
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t pieces = std::clamp<int64_t>(divide_up(4 * threads, N), 1, V);  // of the columns of one sample
    const double work = double(V) * N * z.y.out * z.x.out * z.O * z.C * z.y.kernel * z.x.kernel;
    std::atomic<int64_t> next{0};
    share_tasks(threads, work > kWorthThreads, [&](int64_t) {
      Buffer<T> planes(parts() * z.C * z.plane()), packed(outputs * kCols<T>);
      std::fill_n(static_cast<T*>(planes), parts() * z.C * z.plane(), T(0));
      std::fill_n(static_cast<T*>(packed), outputs * kCols<T>, T(0));
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < N * pieces;) {
        const int64_t n = task / pieces, piece = task % pieces;
        pack_input<T>(input + n * in, ic, iy, ix, z, planes);
        for (int64_t v = piece * V / pieces; v < (piece + 1) * V / pieces; ++v) {
          pack_outputs(v, n, packed);
          contract(planes, packed, out + (v * N + n) * each);
        }
      }
    });
  }
};

Tensor convolved(const char* op, const Tensor& g, const Tensor& input, const std::vector<int64_t>& numbers,
                 bool norms) {
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
  const int64_t V = g.size(0), N = g.size(1);
  Tensor out = norms ? new_result(op, g, {V, N}) : new_result(op, g, {V, N, z.O * z.C * z.y.kernel * z.x.kernel});
  dispatch_floating(g.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>)
      Problem<T>{static_cast<const T*>(g.data_ptr()),
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
                 static_cast<T*>(out.data_ptr()),
                 norms}
          .run();
    else CURVATURE_CHECK(false, op, ": float32 or float64 is needed.");
  });
  return out;
}

Tensor convolution_norms(const Tensor& g, const Tensor& input, const std::vector<int64_t>& geometry) {
  return convolved("convolution_norms", g, input, geometry, true);
}
Tensor convolution_jacobian(const Tensor& g, const Tensor& input, const std::vector<int64_t>& geometry) {
  return convolved("convolution_jacobian", g, input, geometry, false);
}
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torch_curvature, m) {
  m.def("convolution_norms(Tensor g, Tensor input, int[] geometry) -> Tensor");
  m.def("convolution_jacobian(Tensor g, Tensor input, int[] geometry) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(torch_curvature, CPU, m) {
  m.impl("convolution_norms", TORCH_BOX(&convolution_norms));
  m.impl("convolution_jacobian", TORCH_BOX(&convolution_jacobian));
}
}  // namespace torch_curvature::cpu
