// SphereNet's messages over triplets, without anything as long as all triplets and as wide as a message.
//
// A thread takes whole atoms j: the edges k -> j lie side by side, and of what comes out only the edges j -> i are
// touched, which no other atom touches.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "simd.h"

namespace {

// What is known of a triplet is brought to eight numbers or fewer.
constexpr int B = 8;
using Eight = Vec<B>;

struct Shape {
  int64_t channels, degrees, radial, basis;
  int64_t functions() const { return degrees * degrees; }
  int64_t bessel() const { return degrees * radial; }
  int64_t products() const { return functions() * radial; }
};

// Rows of basis numbers -> rows of eight, filled up with zeros.
void widen(const float* rows, int64_t count, int64_t basis, Eight* wide) {
  for (int64_t r = 0; r < count; r++) {
    float row[B] = {};
    memcpy(row, rows + r * basis, basis * sizeof(float));
    wide[r] = load<B>(row);
  }
}

void narrow(const Eight* wide, int64_t count, int64_t basis, float* rows) {
  for (int64_t r = 0; r < count; r++) memcpy(rows + r * basis, &wide[r].v, basis * sizeof(float));
}

// [basis, count] -> [count], filled up with zeros, and back.
void widen_columns(const float* columns, int64_t count, int64_t basis, Eight* wide) {
  for (int64_t r = 0; r < count; r++) {
    float row[B] = {};
    for (int64_t i = 0; i < basis; i++) row[i] = columns[i * count + r];
    wide[r] = load<B>(row);
  }
}

void narrow_columns(const Eight* wide, int64_t count, int64_t basis, float* columns) {
  for (int64_t r = 0; r < count; r++)
    for (int64_t i = 0; i < basis; i++) columns[i * count + r] = wide[r].v[i];
}

// [C, basis] -> [8, C].
std::vector<float> turned(const float* weight, int64_t C, int64_t basis) {
  std::vector<float> result(B * C);
  for (int64_t c = 0; c < C; c++)
    for (int64_t i = 0; i < basis; i++) result[i * C + c] = weight[c * basis + i];
  return result;
}

// The weights of all four maps, or their gradients, one after the other.
struct Weights {
  std::vector<Eight> rows;
  Eight *angle_up, *torsion_up, *angle_down, *torsion_down;
  Weights(Shape s) : rows(2 * s.channels + s.bessel() + s.products(), all<B>(0)) {
    angle_up = rows.data(), torsion_up = angle_up + s.channels;
    angle_down = torsion_up + s.channels, torsion_down = angle_down + s.bessel();
  }
  Weights(Weights&&) = default;  // may be moved, since its rows stay where they are, and not copied
  void clear() { std::fill(rows.begin(), rows.end(), all<B>(0)); }
  void add(const Weights& other) {
    for (size_t r = 0; r < rows.size(); r++) rows[r] = rows[r] + other.rows[r];
  }
};

Weights read(const float* angle_up, const float* torsion_up, const float* angle_down, const float* torsion_down, Shape s) {
  Weights w(s);
  widen(angle_up, s.channels, s.basis, w.angle_up), widen(torsion_up, s.channels, s.basis, w.torsion_up);
  widen_columns(angle_down, s.bessel(), s.basis, w.angle_down), widen_columns(torsion_down, s.products(), s.basis, w.torsion_down);
  return w;
}

// What an edge k -> j maps the harmonics of its triplets by, those of order 0 and all, or the gradients of that.
struct Maps {
  std::vector<Eight> angle, torsion;
  Maps(Shape s) : angle(s.degrees), torsion(s.functions()) {}
  void clear() { std::fill(angle.begin(), angle.end(), all<B>(0)), std::fill(torsion.begin(), torsion.end(), all<B>(0)); }

  // From the edge's Bessel functions x [S, K]: harmonic f goes with those of order f mod S.
  void make(const float* x, const Weights& w, Shape s) {
    for (int64_t d = 0; d < s.degrees; d++) angle[d] = product(x + d * s.radial, w.angle_down + d * s.radial, s.radial);
    for (int64_t f = 0; f < s.functions(); f++)
      torsion[f] = product(x + f % s.degrees * s.radial, w.torsion_down + f * s.radial, s.radial);
  }

  // Seen as gradients: adds those of the weights to `to`, and sets that of x, where there is room for it.
  void unmake(const float* x, const Weights& w, Shape s, Weights& to, std::vector<Eight>& gx, float* g) const {
    for (int64_t d = 0; d < s.degrees; d++) add_outer(x + d * s.radial, angle[d], to.angle_down + d * s.radial, s.radial);
    for (int64_t f = 0; f < s.functions(); f++)
      add_outer(x + f % s.degrees * s.radial, torsion[f], to.torsion_down + f * s.radial, s.radial);
    if (!g) return;
    for (int64_t d = 0; d < s.degrees; d++)
      for (int64_t r = d * s.radial; r < (d + 1) * s.radial; r++) gx[r] = w.angle_down[r] * angle[d];
    for (int64_t f = 0; f < s.functions(); f++)
      for (int64_t k = 0; k < s.radial; k++) {
        Eight& to_x = gx[f % s.degrees * s.radial + k];
        to_x = fma(w.torsion_down[f * s.radial + k], torsion[f], to_x);
      }
    for (int64_t r = 0; r < s.bessel(); r++) g[r] = sum(gx[r]);
  }

 private:
  INLINE Eight product(const float* x, const Eight* w, int64_t radial) {
    Eight total = all<B>(0);
    for (int64_t k = 0; k < radial; k++) total = fma(all<B>(x[k]), w[k], total);
    return total;
  }
  INLINE void add_outer(const float* x, Eight g, Eight* to, int64_t radial) {
    for (int64_t k = 0; k < radial; k++) to[k] = fma(all<B>(x[k]), g, to[k]);
  }
};

// A triplet's harmonics -> its numbers a of the angle and b of the torsion.
INLINE void seen(const float* h, const Maps& maps, Shape s, float* a, float* b) {
  Eight angle = all<B>(0), sums[4] = {angle, angle, angle, angle};
  for (int64_t d = 0; d < s.degrees; d++) angle = fma(all<B>(h[d * d]), maps.angle[d], angle);
  int64_t q = 0, Q = s.functions();
  for (; q + 4 <= Q; q += 4)
    for (int p = 0; p < 4; p++) sums[p] = fma(all<B>(h[q + p]), maps.torsion[q + p], sums[p]);
  for (; q < Q; q++) sums[0] = fma(all<B>(h[q]), maps.torsion[q], sums[0]);
  store(a, angle), store(b, (sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// x[c] = sum of a[i] w[i][c]. The compiler trusts __restrict on parameters, and so makes vectors of the loops.
INLINE void spread(const float* __restrict a, const float* __restrict w, float* __restrict x, int64_t C) {
  for (int64_t c = 0; c < C; c++) {
    float sum = 0;
    for (int i = 0; i < B; i++) sum += a[i] * w[i * C + c];
    x[c] = sum;
  }
}

void hear(const float* __restrict s, const float* __restrict x, const float* __restrict y, float* __restrict heard, int64_t C) {
  for (int64_t c = 0; c < C; c++) heard[c] += s[c] * x[c] * y[c];
}

// x and y become their own gradients; what s gets is added to gs.
void unhear(const float* __restrict g, const float* __restrict s, float* __restrict x, float* __restrict y, float* __restrict gs,
            int64_t C) {
  for (int64_t c = 0; c < C; c++) {
    float gx = g[c] * x[c], gy = g[c] * y[c];
    gs[c] += gx * y[c];
    x[c] = gy * s[c], y[c] = gx * s[c];
  }
}

// From the gradient x of a map's result that of its argument a, and of its weight, which is added to `to`.
INLINE Eight gather(const float* x, const Eight* weight, Eight a, Eight* to, int64_t C) {
  Eight even = all<B>(0), odd = even;
  int64_t c = 0;
  for (; c + 2 <= C; c += 2) {
    Eight first = all<B>(x[c]), second = all<B>(x[c + 1]);
    even = fma(first, weight[c], even), odd = fma(second, weight[c + 1], odd);
    to[c] = fma(first, a, to[c]), to[c + 1] = fma(second, a, to[c + 1]);
  }
  if (c < C) even = fma(all<B>(x[c]), weight[c], even), to[c] = fma(all<B>(x[c]), a, to[c]);
  return even + odd;
}

}  // namespace

extern "C" {

// sent [e, C]; harmonics [t, S * S], those of edge k in rows begin[k] to begin[k + 1]; spherical [e, S, K]; angle_down
// [W, S * K] and torsion_down [W, S * S * K]; angle_up and torsion_up [C, W]; outgoing [t], an edge from the atom where k
// ends; edges ptr[j] to ptr[j + 1] end at atom j -> heard [e, C].
void triplet_messages_forward(const float* sent, const float* harmonics, const float* spherical, const float* angle_down,
                              const float* torsion_down, const float* angle_up, const float* torsion_up, const int64_t* begin,
                              const int64_t* outgoing, const int64_t* ptr, float* heard, int64_t n, int64_t e, int64_t C,
                              int64_t degrees, int64_t radial, int64_t basis, int64_t threads) {
  const Shape s{C, degrees, radial, basis};
  const std::vector<float> wa = turned(angle_up, C, basis), wb = turned(torsion_up, C, basis);
  const Weights weights = read(angle_up, torsion_up, angle_down, torsion_down, s);
  memset(heard, 0, e * C * sizeof(float));
#pragma omp parallel num_threads(threads)
  {
    Maps maps(s);
    std::vector<float> x(C), y(C);
    float a[B], b[B];
#pragma omp for schedule(dynamic, 16)
    for (int64_t j = 0; j < n; j++)
      for (int64_t k = ptr[j]; k < ptr[j + 1]; k++) {
        if (begin[k] < begin[k + 1]) maps.make(spherical + k * s.bessel(), weights, s);
        for (int64_t t = begin[k]; t < begin[k + 1]; t++) {
          seen(harmonics + t * s.functions(), maps, s, a, b);
          spread(a, wa.data(), x.data(), C), spread(b, wb.data(), y.data(), C);
          hear(sent + k * C, x.data(), y.data(), heard + outgoing[t] * C, C);
        }
      }
  }
}

// The gradient of heard -> of sent, of harmonics and spherical (where `moving`), and of the weights. These are added up
// atom by atom in each of as many parts as there are threads, in an order that does not change from run to run.
void triplet_messages_backward(const float* g_heard, const float* sent, const float* harmonics, const float* spherical,
                               const float* angle_down, const float* torsion_down, const float* angle_up,
                               const float* torsion_up, const int64_t* begin, const int64_t* outgoing, const int64_t* ptr,
                               float* g_sent, float* g_harmonics, float* g_spherical, float* g_angle_down,
                               float* g_torsion_down, float* g_angle_up, float* g_torsion_up, int64_t n, int64_t e, int64_t C,
                               int64_t degrees, int64_t radial, int64_t basis, int64_t moving, int64_t threads) {
  const Shape s{C, degrees, radial, basis};
  const int64_t Q = s.functions();
  const std::vector<float> wa = turned(angle_up, C, basis), wb = turned(torsion_up, C, basis);
  const Weights weights = read(angle_up, torsion_up, angle_down, torsion_down, s);
  std::vector<Weights> totals;
  for (int64_t part = 0; part < threads; part++) totals.emplace_back(s);
  memset(g_sent, 0, e * C * sizeof(float));
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int64_t part = 0; part < threads; part++) {
    Maps maps(s), to_maps(s);
    Weights of_atom(s);
    std::vector<Eight> of_bessel(s.bessel());
    std::vector<float> x(C), y(C);
    float a[B], b[B];
    for (int64_t j = part * n / threads; j < (part + 1) * n / threads; j++) {
      of_atom.clear();
      for (int64_t k = ptr[j]; k < ptr[j + 1]; k++) {
        const float* bessel = spherical + k * s.bessel();
        maps.make(bessel, weights, s);
        to_maps.clear();
        for (int64_t t = begin[k]; t < begin[k + 1]; t++) {
          const float* h = harmonics + t * Q;
          seen(h, maps, s, a, b);
          spread(a, wa.data(), x.data(), C), spread(b, wb.data(), y.data(), C);
          unhear(g_heard + outgoing[t] * C, sent + k * C, x.data(), y.data(), g_sent + k * C, C);
          Eight ga = gather(x.data(), weights.angle_up, load<B>(a), of_atom.angle_up, C);
          Eight gb = gather(y.data(), weights.torsion_up, load<B>(b), of_atom.torsion_up, C);
          for (int64_t d = 0; d < degrees; d++) to_maps.angle[d] = fma(all<B>(h[d * d]), ga, to_maps.angle[d]);
          for (int64_t q = 0; q < Q; q++) to_maps.torsion[q] = fma(all<B>(h[q]), gb, to_maps.torsion[q]);
          if (!moving) continue;
          float* to = g_harmonics + t * Q;
          for (int64_t q = 0; q < Q; q++) to[q] = sum(maps.torsion[q] * gb);
          for (int64_t d = 0; d < degrees; d++) to[d * d] += sum(maps.angle[d] * ga);
        }
        to_maps.unmake(bessel, weights, s, of_atom, of_bessel, moving ? g_spherical + k * s.bessel() : nullptr);
      }
      totals[part].add(of_atom);
    }
  }
  for (int64_t part = 1; part < threads; part++) totals[0].add(totals[part]);
  narrow(totals[0].angle_up, C, basis, g_angle_up), narrow(totals[0].torsion_up, C, basis, g_torsion_up);
  narrow_columns(totals[0].angle_down, s.bessel(), basis, g_angle_down);
  narrow_columns(totals[0].torsion_down, s.products(), basis, g_torsion_down);
}
}
