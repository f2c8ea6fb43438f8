// The update of scalars and vectors at the end of an ET layer, one pass over memory forward and one backward.
#include <cstdint>
#include <vector>
#include "simd.h"

namespace {

// Rows of features as floats, whatever they are stored as.
struct Rows {
  bool half;
  const float* open(const void* from, size_t at, int64_t count, int number) const {
    if (!half) return (const float*)from + at;
    float* row = scratch(count, number);
    for (int64_t f = 0; f < count; f++) row[f] = from_bf16(((const uint16_t*)from)[at + f]);
    return row;
  }
  float* target(void* to, size_t at, int64_t count, int number) const {
    return half ? scratch(count, number) : (float*)to + at;
  }
  void close(void* to, size_t at, int64_t count, const float* row) const {
    if (half) for (int64_t f = 0; f < count; f++) ((uint16_t*)to)[at + f] = to_bf16(row[f]);
  }
  static float* scratch(int64_t count, int number) {
    static thread_local std::vector<float> rows[10];
    if ((int64_t)rows[number].size() < count) rows[number].resize(count);
    return rows[number].data();
  }
};

// One atom each. The compiler trusts __restrict on parameters, and so makes vectors of the loops.
void forward_row(const float* __restrict x, const float* __restrict vec, const float* __restrict o, const float* __restrict u,
                 float* __restrict new_x, float* __restrict new_vec, int64_t F) {
  for (int64_t f = 0; f < F; f++) {
    float dot = u[f] * u[F + f] + u[3 * F + f] * u[4 * F + f] + u[6 * F + f] * u[7 * F + f];
    new_x[f] = x[f] + dot * o[F + f] + o[2 * F + f];
  }
  for (int c = 0; c < 3; c++)
    for (int64_t f = 0; f < F; f++) new_vec[c * F + f] = vec[c * F + f] + u[(3 * c + 2) * F + f] * o[f];
}

void backward_row(const float* __restrict g_x, const float* __restrict g_vec, const float* __restrict o, const float* __restrict u,
                  float* __restrict g_o, float* __restrict g_u, int64_t F) {
  for (int64_t f = 0; f < F; f++) {
    g_o[f] = g_vec[f] * u[2 * F + f] + g_vec[F + f] * u[5 * F + f] + g_vec[2 * F + f] * u[8 * F + f];
    g_o[F + f] = g_x[f] * (u[f] * u[F + f] + u[3 * F + f] * u[4 * F + f] + u[6 * F + f] * u[7 * F + f]);
    g_o[2 * F + f] = g_x[f];
  }
  for (int c = 0; c < 3; c++)
    for (int64_t f = 0; f < F; f++) {
      float g = g_x[f] * o[F + f];
      g_u[3 * c * F + f] = g * u[(3 * c + 1) * F + f];
      g_u[(3 * c + 1) * F + f] = g * u[3 * c * F + f];
      g_u[(3 * c + 2) * F + f] = g_vec[c * F + f] * o[f];
    }
}

// Of h_o and h_u that meet the gradients of backward_row: the gradients to g_x, g_vec, o and u.
void second_row(const float* __restrict h_o, const float* __restrict h_u, const float* __restrict g_x,
                const float* __restrict g_vec, const float* __restrict o, const float* __restrict u, float* __restrict gg_x,
                float* __restrict gg_vec, float* __restrict g_o, float* __restrict g_u, int64_t F) {
  for (int64_t f = 0; f < F; f++) {
    float dot = 0, cross = 0, along = 0;
    for (int c = 0; c < 3; c++) {
      int64_t u1 = 3 * c * F + f, u2 = u1 + F, u3 = u2 + F, v = c * F + f;
      dot += u[u1] * u[u2], cross += h_u[u1] * u[u2] + h_u[u2] * u[u1], along += h_u[u3] * g_vec[v];
      gg_vec[v] = h_o[f] * u[u3] + h_u[u3] * o[f];
      g_u[u1] = g_x[f] * (h_o[F + f] * u[u2] + o[F + f] * h_u[u2]);
      g_u[u2] = g_x[f] * (h_o[F + f] * u[u1] + o[F + f] * h_u[u1]);
      g_u[u3] = h_o[f] * g_vec[v];
    }
    gg_x[f] = h_o[2 * F + f] + h_o[F + f] * dot + o[F + f] * cross;
    g_o[f] = along, g_o[F + f] = g_x[f] * cross, g_o[2 * F + f] = 0;
  }
}

}  // namespace

extern "C" {

// x [n, F], vec [n, 3, F], outputs o [n, 3F], projected u [n, 3, 3F] -> x + <u1, u2> o2 + o3 and vec + u3 o1.
void update_forward(const void* x, const void* vec, const void* o, const void* u, void* new_x, void* new_vec, int64_t n, int64_t F,
                    int64_t half, int64_t threads) {
  Rows rows{half != 0};
#pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < n; i++) {
    float *to_x = rows.target(new_x, i * F, F, 4), *to_vec = rows.target(new_vec, i * 3 * F, 3 * F, 5);
    forward_row(rows.open(x, i * F, F, 2), rows.open(vec, i * 3 * F, 3 * F, 3), rows.open(o, i * 3 * F, 3 * F, 0),
                rows.open(u, i * 9 * F, 9 * F, 1), to_x, to_vec, F);
    rows.close(new_x, i * F, F, to_x);
    rows.close(new_vec, i * 3 * F, 3 * F, to_vec);
  }
}

// Gradients of the outputs -> of o and u; those of x and vec are the same as the outputs'.
void update_backward(const void* g_x, const void* g_vec, const void* o, const void* u, void* g_o, void* g_u, int64_t n, int64_t F,
                     int64_t half, int64_t threads) {
  Rows rows{half != 0};
#pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < n; i++) {
    float *to_o = rows.target(g_o, i * 3 * F, 3 * F, 4), *to_u = rows.target(g_u, i * 9 * F, 9 * F, 5);
    backward_row(rows.open(g_x, i * F, F, 2), rows.open(g_vec, i * 3 * F, 3 * F, 3), rows.open(o, i * 3 * F, 3 * F, 0),
                 rows.open(u, i * 9 * F, 9 * F, 1), to_o, to_u, F);
    rows.close(g_o, i * 3 * F, 3 * F, to_o);
    rows.close(g_u, i * 9 * F, 9 * F, to_u);
  }
}

// h_o [n, 3F] and h_u [n, 3, 3F], which meet the gradients of o and u -> gradients to g_x, g_vec, o and u.
void update_second(const void* h_o, const void* h_u, const void* g_x, const void* g_vec, const void* o, const void* u, void* gg_x,
                   void* gg_vec, void* g_o, void* g_u, int64_t n, int64_t F, int64_t half, int64_t threads) {
  Rows rows{half != 0};
#pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < n; i++) {
    size_t one = i * F, three = i * 3 * F, nine = i * 9 * F;
    float *to_x = rows.target(gg_x, one, F, 6), *to_vec = rows.target(gg_vec, three, 3 * F, 7);
    float *to_o = rows.target(g_o, three, 3 * F, 8), *to_u = rows.target(g_u, nine, 9 * F, 9);
    second_row(rows.open(h_o, three, 3 * F, 0), rows.open(h_u, nine, 9 * F, 1), rows.open(g_x, one, F, 2),
               rows.open(g_vec, three, 3 * F, 3), rows.open(o, three, 3 * F, 4), rows.open(u, nine, 9 * F, 5), to_x, to_vec,
               to_o, to_u, F);
    rows.close(gg_x, one, F, to_x);
    rows.close(gg_vec, three, 3 * F, to_vec);
    rows.close(g_o, three, 3 * F, to_o);
    rows.close(g_u, nine, 9 * F, to_u);
  }
}
}
