// SphereNet's messages over triplets, without anything as long as all triplets and as wide as a message.
//
// A thread takes whole atoms j: the edges k -> j lie side by side, and of what comes out only the edges j -> i are
// touched, which no other atom touches.
#include <cstdint>
#include <cstring>
#include <vector>

#include "simd.h"

namespace {

// What is known of a triplet is brought to eight numbers or fewer.
constexpr int B = 8;
using Eight = Vec<B>;

struct Shape {
  int64_t degrees, basis;
  int64_t functions() const { return degrees * degrees; }
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

// [C, basis] -> [8, C].
std::vector<float> turned(const float* weight, int64_t C, int64_t basis) {
  std::vector<float> result(B * C);
  for (int64_t c = 0; c < C; c++)
    for (int64_t i = 0; i < basis; i++) result[i * C + c] = weight[c * basis + i];
  return result;
}

// What an edge k -> j maps the harmonics of its triplets by: those of order 0, and all.
struct Maps {
  std::vector<Eight> angle, torsion;
  Maps(Shape s) : angle(s.degrees), torsion(s.functions()) {}
  void read(const float* angle_map, const float* torsion_map, int64_t k, Shape s) {
    widen(angle_map + k * s.degrees * s.basis, s.degrees, s.basis, angle.data());
    widen(torsion_map + k * s.functions() * s.basis, s.functions(), s.basis, torsion.data());
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

// sent [e, C]; harmonics [t, S * S], those of edge k in rows begin[k] to begin[k + 1]; angle_map [e, S, basis] and
// torsion_map [e, S * S, basis]; weights [C, basis]; outgoing [t], an edge from the atom where k ends; edges ptr[j] to
// ptr[j + 1] end at atom j -> heard [e, C].
void triplet_messages_forward(const float* sent, const float* harmonics, const float* angle_map, const float* torsion_map,
                              const float* angle_weight, const float* torsion_weight, const int64_t* begin,
                              const int64_t* outgoing, const int64_t* ptr, float* heard, int64_t n, int64_t e, int64_t C,
                              int64_t degrees, int64_t basis, int64_t threads) {
  const Shape s{degrees, basis};
  const std::vector<float> wa = turned(angle_weight, C, basis), wb = turned(torsion_weight, C, basis);
  memset(heard, 0, e * C * sizeof(float));
#pragma omp parallel num_threads(threads)
  {
    Maps maps(s);
    std::vector<float> x(C), y(C);
    float a[B], b[B];
#pragma omp for schedule(dynamic, 16)
    for (int64_t j = 0; j < n; j++)
      for (int64_t k = ptr[j]; k < ptr[j + 1]; k++) {
        if (begin[k] < begin[k + 1]) maps.read(angle_map, torsion_map, k, s);
        for (int64_t t = begin[k]; t < begin[k + 1]; t++) {
          seen(harmonics + t * s.functions(), maps, s, a, b);
          spread(a, wa.data(), x.data(), C), spread(b, wb.data(), y.data(), C);
          hear(sent + k * C, x.data(), y.data(), heard + outgoing[t] * C, C);
        }
      }
  }
}

// The gradient of heard -> of sent, harmonics (where `moving`), maps and weights. Those of the weights are added up atom
// by atom in each of as many parts as there are threads, in an order that does not change from run to run.
void triplet_messages_backward(const float* g_heard, const float* sent, const float* harmonics, const float* angle_map,
                               const float* torsion_map, const float* angle_weight, const float* torsion_weight,
                               const int64_t* begin, const int64_t* outgoing, const int64_t* ptr, float* g_sent,
                               float* g_harmonics, float* g_angle_map, float* g_torsion_map, float* g_angle_weight,
                               float* g_torsion_weight, int64_t n, int64_t e, int64_t C, int64_t degrees, int64_t basis,
                               int64_t moving, int64_t threads) {
  const Shape s{degrees, basis};
  const int64_t Q = s.functions();
  const std::vector<float> wa = turned(angle_weight, C, basis), wb = turned(torsion_weight, C, basis);
  std::vector<Eight> angle_rows(C), torsion_rows(C), totals(threads * 2 * C, all<B>(0));
  widen(angle_weight, C, basis, angle_rows.data()), widen(torsion_weight, C, basis, torsion_rows.data());
  memset(g_sent, 0, e * C * sizeof(float));
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int64_t part = 0; part < threads; part++) {
    Maps maps(s), to_maps(s);
    std::vector<float> x(C), y(C);
    std::vector<Eight> of_atom(2 * C);
    float a[B], b[B];
    for (int64_t j = part * n / threads; j < (part + 1) * n / threads; j++) {
      std::fill(of_atom.begin(), of_atom.end(), all<B>(0));
      for (int64_t k = ptr[j]; k < ptr[j + 1]; k++) {
        maps.read(angle_map, torsion_map, k, s);
        std::fill(to_maps.angle.begin(), to_maps.angle.end(), all<B>(0));
        std::fill(to_maps.torsion.begin(), to_maps.torsion.end(), all<B>(0));
        for (int64_t t = begin[k]; t < begin[k + 1]; t++) {
          const float* h = harmonics + t * Q;
          seen(h, maps, s, a, b);
          spread(a, wa.data(), x.data(), C), spread(b, wb.data(), y.data(), C);
          unhear(g_heard + outgoing[t] * C, sent + k * C, x.data(), y.data(), g_sent + k * C, C);
          Eight ga = gather(x.data(), angle_rows.data(), load<B>(a), of_atom.data(), C);
          Eight gb = gather(y.data(), torsion_rows.data(), load<B>(b), of_atom.data() + C, C);
          for (int64_t d = 0; d < degrees; d++) to_maps.angle[d] = fma(all<B>(h[d * d]), ga, to_maps.angle[d]);
          for (int64_t q = 0; q < Q; q++) to_maps.torsion[q] = fma(all<B>(h[q]), gb, to_maps.torsion[q]);
          if (!moving) continue;
          float* to = g_harmonics + t * Q;
          for (int64_t q = 0; q < Q; q++) to[q] = sum(maps.torsion[q] * gb);
          for (int64_t d = 0; d < degrees; d++) to[d * d] += sum(maps.angle[d] * ga);
        }
        narrow(to_maps.angle.data(), degrees, basis, g_angle_map + k * degrees * basis);
        narrow(to_maps.torsion.data(), Q, basis, g_torsion_map + k * Q * basis);
      }
      Eight* total = totals.data() + part * 2 * C;
      for (int64_t c = 0; c < 2 * C; c++) total[c] = total[c] + of_atom[c];
    }
  }
  for (int64_t part = 1; part < threads; part++)
    for (int64_t c = 0; c < 2 * C; c++) totals[c] = totals[c] + totals[part * 2 * C + c];
  narrow(totals.data(), C, basis, g_angle_weight), narrow(totals.data() + C, C, basis, g_torsion_weight);
}
}
