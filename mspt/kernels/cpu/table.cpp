// The table of radial gates: silu of a linear layer's rows, then the coefficients of the spline through them.
//
// The spline's system is tridiagonal, (1, 4, 1) / 6 with mirrored ends, and symmetric: one sweep down and one up solve
// it, for many channels at a time, and the same two sweeps are its transpose.
#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>
#include "simd.h"

namespace {

constexpr int W = WIDEST;

struct Sweep {
  std::vector<float> scale, carry;  // of the elimination, [rows]
  explicit Sweep(int64_t rows) : scale(rows), carry(rows) {
    const double side = 1.0 / 6;
    double before = 0;
    for (int64_t r = 0; r < rows; r++) {
      double middle = r == 0 || r == rows - 1 ? 5.0 / 6 : 4.0 / 6;
      double s = 1 / (middle - side * before);
      scale[r] = s, carry[r] = before = side * s;
    }
  }
};

// Calls work(head, from, width) for strips of channels within heads, in parallel.
template <class F> void strips(int64_t heads, int64_t width, int64_t threads, F work) {
  const int64_t step = 2 * W, per_head = (width + step - 1) / step;
#pragma omp parallel for num_threads(threads)
  for (int64_t k = 0; k < heads * per_head; k++) {
    int64_t from = k % per_head * step;
    work(k / per_head, from, std::min(step, width - from));
  }
}

}  // namespace

extern "C" {

// pre [H, rows, width] -> table [H, rows, width]; spline: coefficients instead of values. width: a multiple of 4.
void table_forward(const float* pre, float* table, int64_t heads, int64_t rows, int64_t width, int64_t spline, int64_t threads) {
  Sweep sweep(rows);
  strips(heads, width, threads, [&](int64_t h, int64_t from, int64_t count) {
    const float* x_of = pre + h * rows * width + from;
    float* to = table + h * rows * width + from;
    auto run = [&](auto lanes, int64_t f) {
      constexpr int L = decltype(lanes)::value;
      Vec<L> d = all<L>(0);
      for (int64_t r = 0; r < rows; r++) {
        Vec<L> value = silu(load<L>(x_of + r * width + f));
        // d becomes (value - d / 6) * scale, with carry = scale / 6.
        d = spline ? value * all<L>(sweep.scale[r]) - d * all<L>(sweep.scale[r] * (1.0f / 6)) : value;
        store(to + r * width + f, d);
      }
      if (!spline) return;
      for (int64_t r = rows - 2; r >= 0; r--) {
        d = load<L>(to + r * width + f) - d * all<L>(sweep.carry[r]);
        store(to + r * width + f, d);
      }
    };
    int64_t f = 0;
    for (; f + W <= count; f += W) run(std::integral_constant<int, W>{}, f);
    for (; f < count; f += 4) run(std::integral_constant<int, 4>{}, f);
  });
}

// Gradient of the table -> of pre.
void table_backward(const float* gradient, const float* pre, float* result, int64_t heads, int64_t rows, int64_t width, int64_t spline, int64_t threads) {
  Sweep sweep(rows);
  strips(heads, width, threads, [&](int64_t h, int64_t from, int64_t count) {
    const int64_t at = h * rows * width + from;
    const float *g = gradient + at, *x_of = pre + at;
    float* to = result + at;
    auto run = [&](auto lanes, int64_t f) {
      constexpr int L = decltype(lanes)::value;
      Vec<L> d = all<L>(0);
      if (spline)
        for (int64_t r = 0; r < rows; r++) {
          d = load<L>(g + r * width + f) * all<L>(sweep.scale[r]) - d * all<L>(sweep.scale[r] * (1.0f / 6));
          store(to + r * width + f, d);
        }
      for (int64_t r = rows - 1; r >= 0; r--) {
        float* out = to + r * width + f;
        if (!spline) d = load<L>(g + r * width + f);
        else if (r < rows - 1) d = load<L>(out) - d * all<L>(sweep.carry[r]);
        Vec<L> x = load<L>(x_of + r * width + f), s = sigmoid(x);
        Vec<L> product = d * silu_slope(x, s);
        // Away from distances that occur the sweeps fade, down to denormals that would slow the next product tenfold.
        Vec<L> small = all<L>(1e-25f);
        store(out, Vec<L>{product.v < small.v && product.v > -small.v ? Vec<L>{}.v : product.v});
      }
    };
    int64_t f = 0;
    for (; f + W <= count; f += W) run(std::integral_constant<int, W>{}, f);
    for (; f < count; f += 4) run(std::integral_constant<int, 4>{}, f);
  });
}
}
