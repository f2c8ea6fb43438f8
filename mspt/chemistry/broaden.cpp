// Bands of computed lines on a grid.
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

// y += strength half / pi / ((x - centre)^2 + half^2). The compiler trusts __restrict, and so makes vectors of the loop.
void lorentzian(float centre, float strength, float half, const float* __restrict x, float* __restrict y, int64_t count) {
  const float top = strength * half * (float)M_1_PI, square = half * half;
  for (int64_t g = 0; g < count; g++) {
    float d = x[g] - centre;
    y[g] += top / (d * d + square);
  }
}

// y += strength exp(-a d^2), d the distance of a point, `count` points from y on, first at distance d, then step, 2 step,
// … further. One point's value follows from that before by two products: their ratio itself falls by a factor.
void outwards(double d, double step, double a, double strength, float* y, int64_t count, int64_t stride) {
  double value = strength * std::exp(-a * d * d), ratio = std::exp(-a * step * (2 * d + step));
  const double factor = std::exp(-2 * a * step * step);
  for (int64_t n = 0; n < count; n++, value *= ratio, ratio *= factor) y[n * stride] += (float)value;
}

}  // namespace

extern "C" {

// positions and strengths [l] of lines, ptr [m + 1], shift [m] or null, width [m]: full widths at half maximum; x [count],
// a grid from start in equal steps -> y [m, count]. Gaussians end where they have fallen to 1e-12 of their height.
void broaden(const float* positions, const float* strengths, const int64_t* ptr, const float* shift, const float* width,
             const float* x, float* y, int64_t m, int64_t count, int64_t gaussian, int64_t threads, double start, double step) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t i = 0; i < m; i++) {
    float* own = y + i * count;
    memset(own, 0, count * sizeof(float));
    for (int64_t l = ptr[i]; l < ptr[i + 1]; l++) {
      const float centre = positions[l] + (shift ? shift[i] : 0.0f), strength = strengths[l], half = width[i] / 2;
      if (!std::isfinite(centre + strength)) {  // what is not finite must stay so
        for (int64_t g = 0; g < count; g++) own[g] = NAN;
      } else if (!gaussian) {
        lorentzian(centre, strength, half, x, own, count);
      } else {
        const double a = M_LN2 / ((double)half * half), reach = std::sqrt(27.6 / a), place = (centre - start) / step;
        // Points left of the centre, of which the grid has so many, and those that the band reaches.
        const int64_t left = place <= 0 ? 0 : place >= count ? count : (int64_t)std::ceil(place);
        const double below = centre - (start + step * (left - 1)), above = start + step * left - centre;
        const double down = below > reach ? 0 : (reach - below) / step + 1, up = above > reach ? 0 : (reach - above) / step + 1;
        outwards(below, step, a, strength, own + left - 1, std::fmin(down, left), -1);
        outwards(above, step, a, strength, own + left, std::fmin(up, count - left), 1);
      }
    }
  }
}
}
