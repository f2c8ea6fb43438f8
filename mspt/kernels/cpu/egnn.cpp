// EGNN's layer between its matrix products: what an edge sees of its two atoms, and the gated sum over an atom's edges.
//
// Each is written once, for values and gradients and for numbers T: floats, or floats with a derivative, which then are
// all that is written. So it gives the gradients of the gradients too: along directions h of the inputs, <h, gradients>
// has as gradients the derivatives of the values and of the gradients.
//
// Edges of atom i are ptr[i] to ptr[i + 1]. F channels, in vectors of W, of which the last may be part of one.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "simd.h"

namespace {

constexpr int W = WIDEST;
using V = Vec<W>;

// Up to W numbers; beyond count there are zeros, and nothing is written.
INLINE V part(const float* p, int64_t count) {
  if (count >= W) return load<W>(p);
  float row[W] = {};
  memcpy(row, p, count * sizeof(float));
  return load<W>(row);
}
INLINE void put(float* p, V v, int64_t count) {
  if (count >= W) store(p, v);
  else memcpy(p, &v.v, count * sizeof(float));
}
INLINE void add(float* p, V v, int64_t count) { put(p, part(p, count) + v, count); }

// An input, and of numbers with a derivative the direction h beside it.
template <class T> struct In;
template <> struct In<V> {
  const float *p, *h;
  V get(size_t at, int64_t count) const { return part(p + at, count); }
  V every(size_t at) const { return all<W>(p[at]); }
};
template <> struct In<Dual<W>> {
  const float *p, *h;
  Dual<W> get(size_t at, int64_t count) const { return {part(p + at, count), part(h + at, count)}; }
  Dual<W> every(size_t at) const { return {all<W>(p[at]), all<W>(h[at])}; }
};

INLINE V plain(V x, V) { return x; }
INLINE Dual<W> plain(V x, Dual<W>) { return {x, all<W>(0)}; }
INLINE V everywhere(V x) { return all<W>(sum(x)); }
INLINE Dual<W> everywhere(Dual<W> x) { return {everywhere(x.a), everywhere(x.b)}; }

// Calls work(from, to) for every thread's even share of count.
template <class Work> void share(int64_t count, int64_t threads, Work work) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int64_t thread = 0; thread < threads; thread++) work(thread, count * thread / threads, count * (thread + 1) / threads);
}

// silu of what an edge j -> i sees: target [n, F] of i + source [n, F] of j + squared [e] * along [F].
template <class T> struct Joint {
  In<T> target, source, along, squared;
  const int64_t *from, *ptr;
  int64_t n, F;

  inline __attribute__((always_inline)) T sight(int64_t i, int64_t e, int64_t f) const {
    return fma(squared.every(e), along.get(f, F - f), target.get(i * F + f, F - f) + source.get(from[e] * F + f, F - f));
  }

  void forward(float* out, int64_t threads) const {
    share(n, threads, [&](int64_t, int64_t first, int64_t last) {
      for (int64_t i = first; i < last; i++)
        for (int64_t e = ptr[i]; e < ptr[i + 1]; e++)
          for (int64_t f = 0; f < F; f += W) {
            T x = sight(i, e, f);
            put(out + e * F + f, result(silu(x)), F - f);
          }
    });
  }

  // Gradients, and values where out is given. A thread has some of the channels to itself, so that nothing is added up in
  // an order that threads decide.
  void backward(const float* g, float* out, float* to_target, float* to_source, float* to_along, float* to_squared,
                int64_t threads) const {
    const int64_t blocks = (F + W - 1) / W, parts = std::max<int64_t>(1, std::min(threads, blocks)), edges = ptr[n];
    std::vector<float> of_parts(parts * edges), of_atom(F);
    memset(to_target, 0, n * F * sizeof(float)), memset(to_source, 0, n * F * sizeof(float));
    memset(to_along, 0, F * sizeof(float));
    share(blocks, parts, [&](int64_t thread, int64_t first, int64_t last) {
      const int64_t begin = first * W, end = std::min(last * W, F);
      float* own = of_parts.data() + thread * edges;
      for (int64_t i = 0; i < n; i++) {
        std::fill(of_atom.begin() + begin, of_atom.begin() + end, 0);
        for (int64_t e = ptr[i]; e < ptr[i + 1]; e++) {
          V to_distance = all<W>(0);
          for (int64_t f = begin; f < end; f += W) {
            T x = sight(i, e, f), s = sigmoid(x), gx = plain(part(g + e * F + f, F - f), x) * silu_slope(x, s);
            if (out) put(out + e * F + f, result(x * s), F - f);
            add(to_target + i * F + f, result(gx), F - f), add(to_source + from[e] * F + f, result(gx), F - f);
            add(of_atom.data() + f, result(gx * squared.every(e)), F - f);
            to_distance = to_distance + result(gx * along.get(f, F - f));
          }
          own[e] = sum(to_distance);
        }
        for (int64_t f = begin; f < end; f++) to_along[f] += of_atom[f];
      }
    });
    for (int64_t e = 0; e < edges; e++) {
      to_squared[e] = 0;
      for (int64_t thread = 0; thread < parts; thread++) to_squared[e] += of_parts[thread * edges + e];
    }
  }
};

// Over the edges of an atom, the sum of y * sigmoid(y . weight + bias) * fade [e], y = silu(x) of x [e, F].
template <class T> struct Gated {
  In<T> x, weight, bias, fade;
  const int64_t* ptr;
  int64_t n, F;

  void forward(float* out, int64_t threads) const {
    memset(out, 0, n * F * sizeof(float));
    share(n, threads, [&](int64_t, int64_t first, int64_t last) {
      std::vector<T> y((F + W - 1) / W);
      for (int64_t i = first; i < last; i++)
        for (int64_t e = ptr[i]; e < ptr[i + 1]; e++) {
          T score = constant<T>(0);
          for (int64_t f = 0; f < F; f += W) {
            T z = x.get(e * F + f, F - f);
            y[f / W] = silu(z);
            score = fma(y[f / W], weight.get(f, F - f), score);
          }
          T gate = sigmoid(everywhere(score) + bias.every(0)) * fade.every(e);
          for (int64_t f = 0; f < F; f += W) add(out + i * F + f, result(y[f / W] * gate), F - f);
        }
    });
  }

  // Gradients, and values where out is given.
  void backward(const float* g, float* out, float* to_x, float* to_weight, float* to_bias, float* to_fade, int64_t threads) const {
    std::vector<float> totals(threads * (F + 1));
    if (out) memset(out, 0, n * F * sizeof(float));
    share(n, threads, [&](int64_t thread, int64_t first, int64_t last) {
      std::vector<T> y((F + W - 1) / W), slopes(y.size());
      std::vector<float> of_atom(F + 1);
      float* total = totals.data() + thread * (F + 1);
      for (int64_t i = first; i < last; i++) {
        std::fill(of_atom.begin(), of_atom.end(), 0);
        for (int64_t e = ptr[i]; e < ptr[i + 1]; e++) {
          T score = constant<T>(0), met = score;
          for (int64_t f = 0; f < F; f += W) {
            T z = x.get(e * F + f, F - f), s = sigmoid(z);
            y[f / W] = z * s, slopes[f / W] = silu_slope(z, s);
            score = fma(y[f / W], weight.get(f, F - f), score);
            met = fma(y[f / W], plain(part(g + i * F + f, F - f), z), met);
          }
          T gate = sigmoid(everywhere(score) + bias.every(0)), faded = gate * fade.every(e);
          met = everywhere(met);
          T to_score = met * faded * (constant<T>(1) - gate);
          to_fade[e] = result(met * gate).v[0], of_atom[F] += result(to_score).v[0];
          for (int64_t f = 0; f < F; f += W) {
            T gy = fma(to_score, weight.get(f, F - f), plain(part(g + i * F + f, F - f), faded) * faded);
            if (out) add(out + i * F + f, result(y[f / W] * faded), F - f);
            put(to_x + e * F + f, result(gy * slopes[f / W]), F - f);
            add(of_atom.data() + f, result(to_score * y[f / W]), F - f);
          }
        }
        for (int64_t f = 0; f <= F; f++) total[f] += of_atom[f];
      }
    });
    for (int64_t thread = 1; thread < threads; thread++)
      for (int64_t f = 0; f <= F; f++) totals[f] += totals[thread * (F + 1) + f];
    memcpy(to_weight, totals.data(), F * sizeof(float));
    *to_bias = totals[F];
  }
};

}  // namespace

extern "C" {

void edge_features_forward(const float* target, const float* source, const float* along, const float* squared,
                           const int64_t* from, const int64_t* ptr, float* out, int64_t n, int64_t F, int64_t threads) {
  Joint<V>{{target}, {source}, {along}, {squared}, from, ptr, n, F}.forward(out, threads);
}

void edge_features_backward(const float* g, const float* target, const float* source, const float* along,
                            const float* squared, const int64_t* from, const int64_t* ptr, float* to_target,
                            float* to_source, float* to_along, float* to_squared, int64_t n, int64_t F, int64_t threads) {
  Joint<V>{{target}, {source}, {along}, {squared}, from, ptr, n, F}.backward(g, nullptr, to_target, to_source, to_along,
                                                                             to_squared, threads);
}

void edge_features_second(const float* h_target, const float* h_source, const float* h_along, const float* h_squared,
                          const float* g, const float* target, const float* source, const float* along,
                          const float* squared, const int64_t* from, const int64_t* ptr, float* to_g, float* to_target,
                          float* to_source, float* to_along, float* to_squared, int64_t n, int64_t F, int64_t threads) {
  Joint<Dual<W>> joint{{target, h_target}, {source, h_source}, {along, h_along}, {squared, h_squared}, from, ptr, n, F};
  joint.backward(g, to_g, to_target, to_source, to_along, to_squared, threads);
}

void gated_sums_forward(const float* x, const float* weight, const float* bias, const float* fade, const int64_t* ptr,
                        float* out, int64_t n, int64_t F, int64_t threads) {
  Gated<V>{{x}, {weight}, {bias}, {fade}, ptr, n, F}.forward(out, threads);
}

void gated_sums_backward(const float* g, const float* x, const float* weight, const float* bias, const float* fade,
                         const int64_t* ptr, float* to_x, float* to_weight, float* to_bias, float* to_fade, int64_t n,
                         int64_t F, int64_t threads) {
  Gated<V>{{x}, {weight}, {bias}, {fade}, ptr, n, F}.backward(g, nullptr, to_x, to_weight, to_bias, to_fade, threads);
}

void gated_sums_second(const float* h_x, const float* h_weight, const float* h_bias, const float* h_fade, const float* g,
                       const float* x, const float* weight, const float* bias, const float* fade, const int64_t* ptr,
                       float* to_g, float* to_x, float* to_weight, float* to_bias, float* to_fade, int64_t n, int64_t F,
                       int64_t threads) {
  Gated<Dual<W>> gated{{x, h_x}, {weight, h_weight}, {bias, h_bias}, {fade, h_fade}, ptr, n, F};
  gated.backward(g, to_g, to_x, to_weight, to_bias, to_fade, threads);
}
}
