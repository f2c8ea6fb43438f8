// Real spherical harmonics of a list of unit vectors, some of them at a time, and their gradient.
//
// A harmonic of degree l and order m is norm(l, m) L(l, m)(z) C(m)(x, y), or S(m) for C(m): L is Legendre's function
// without its power of sin θ, and C + i S = (x + i y)^m. The derivative of L(l, m) is -L(l, m + 1).
#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

constexpr int W = 16;  // vectors at a time
using Lanes = double[W];

struct Parts {
  int64_t degrees;
  std::vector<double> legendre, cosine, sine;

  explicit Parts(int64_t degrees)
      : degrees(degrees), legendre((degrees + 1) * (degrees + 1) * W, 0), cosine(degrees * W), sine(degrees * W) {}
  double* L(int64_t l, int64_t m) { return legendre.data() + (l * (degrees + 1) + m) * W; }  // zero where m > l
  double* C(int64_t m) { return cosine.data() + m * W; }
  double* S(int64_t m) { return sine.data() + m * W; }

  void fill(const Lanes& z, const Lanes& x, const Lanes& y) {
    double diagonal = 1;
    for (int64_t m = 0; m < degrees; m++) {
      if (m) diagonal *= 1 - 2 * m;
      for (int w = 0; w < W; w++) {
        L(m, m)[w] = diagonal;
        C(m)[w] = m ? x[w] * C(m - 1)[w] - y[w] * S(m - 1)[w] : 1;
        S(m)[w] = m ? x[w] * S(m - 1)[w] + y[w] * C(m - 1)[w] : 0;
      }
      for (int64_t l = m + 1; l < degrees; l++) {
        const double up = (2 * l - 1.0) / (l - m), down = (l + m - 1.0) / (l - m);
        const double *before = L(l - 1, m), *twice = l > m + 1 ? L(l - 2, m) : before;
        const double of_twice = l > m + 1 ? down : 0;
        double* to = L(l, m);
        for (int w = 0; w < W; w++) to[w] = up * z[w] * before[w] - of_twice * twice[w];
      }
    }
  }
};

// Calls work(parts, x, y, first, count) for every W vectors, of which the last may be fewer.
template <class F> void in_lanes(const double* seen, int64_t t, int64_t degrees, int64_t threads, F work) {
#pragma omp parallel num_threads(threads)
  {
    Parts parts(degrees);
#pragma omp for
    for (int64_t first = 0; first < t; first += W) {
      const int64_t count = std::min<int64_t>(W, t - first);
      Lanes z = {}, x = {}, y = {};
      std::copy_n(seen + first, count, z), std::copy_n(seen + t + first, count, x), std::copy_n(seen + 2 * t + first, count, y);
      parts.fill(z, x, y);
      work(parts, first, count);
    }
  }
}

}  // namespace

extern "C" {

// seen [3, t]: z, x, y; norms [degrees, degrees] by l and m -> values [t, degrees²].
void harmonics_forward(const double* seen, const double* norms, float* values, int64_t t, int64_t degrees, int64_t threads) {
  const int64_t Q = degrees * degrees;
  in_lanes(seen, t, degrees, threads, [&](Parts& parts, int64_t first, int64_t count) {
    for (int64_t l = 0; l < degrees; l++)
      for (int64_t m = 0; m <= l; m++) {
        const double norm = norms[l * degrees + m], *legendre = parts.L(l, m), *cosine = parts.C(m), *sine = parts.S(m);
        float* to = values + first * Q + l * l;
        for (int64_t w = 0; w < count; w++) to[w * Q + m] = norm * legendre[w] * cosine[w];
        for (int64_t w = 0; m && w < count; w++) to[w * Q + 2 * l + 1 - m] = norm * legendre[w] * sine[w];
      }
  });
}

// The gradient of values -> of seen.
void harmonics_backward(const float* gradient, const double* seen, const double* norms, double* result, int64_t t,
                        int64_t degrees, int64_t threads) {
  const int64_t Q = degrees * degrees;
  in_lanes(seen, t, degrees, threads, [&](Parts& parts, int64_t first, int64_t count) {
    Lanes gz = {}, gx = {}, gy = {};
    for (int64_t m = 0; m < degrees; m++) {
      const double *cosine = parts.C(m), *sine = parts.S(m);
      Lanes to_cosine = {}, to_sine = {};
      for (int64_t l = m; l < degrees; l++) {
        const double norm = norms[l * degrees + m], *legendre = parts.L(l, m), *raised = parts.L(l, m + 1);
        const float* of = gradient + first * Q + l * l;
        for (int64_t w = 0; w < count; w++) {
          const double c = norm * of[w * Q + m], s = m ? norm * of[w * Q + 2 * l + 1 - m] : 0;
          to_cosine[w] += c * legendre[w], to_sine[w] += s * legendre[w];
          gz[w] -= raised[w] * (c * cosine[w] + s * sine[w]);
        }
      }
      if (!m) continue;
      const double *less_cosine = parts.C(m - 1), *less_sine = parts.S(m - 1);
      for (int64_t w = 0; w < count; w++) {
        gx[w] += m * (to_cosine[w] * less_cosine[w] + to_sine[w] * less_sine[w]);
        gy[w] += m * (to_sine[w] * less_cosine[w] - to_cosine[w] * less_sine[w]);
      }
    }
    std::copy_n(gz, count, result + first), std::copy_n(gx, count, result + t + first);
    std::copy_n(gy, count, result + 2 * t + first);
  });
}
}
