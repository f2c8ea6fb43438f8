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
    static thread_local std::vector<float> rows[8];
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
}
