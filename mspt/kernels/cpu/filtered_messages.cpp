// Sums over neighbours of filtered scalars and vectors, without anything as long as all edges and as wide as a message.
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

// Edges end at atom i where ptr[i] <= e < ptr[i + 1]; pair[e] is p + 1, or -(p + 1) against the pair's direction.
struct Edges {
  const int64_t *source, *ptr;
  const int32_t* pair;
  int64_t of(int64_t e) const { return (pair[e] < 0 ? -pair[e] : pair[e]) - 1; }
  float sign(int64_t e) const { return pair[e] < 0 ? -1.0f : 1.0f; }
};

// A range of channels of one edge. The compiler trusts __restrict on parameters, and so makes vectors of the loops.
void forward_edge(const float* __restrict s, const float* __restrict v, const float* __restrict w, const float* d,
                  float* __restrict scalars, float* __restrict vectors, int64_t F) {
  float d0 = d[0], d1 = d[1], d2 = d[2];
  for (int64_t f = 0; f < F; f++) {
    scalars[f] += s[f] * w[f];
    float n = s[F + f] * w[F + f];
    vectors[f] += d0 * n, vectors[F + f] += d1 * n, vectors[2 * F + f] += d2 * n;
  }
  if (!v) return;
  for (int64_t f = 0; f < F; f++) {
    float a = s[2 * F + f] * w[2 * F + f];
    vectors[f] += v[f] * a, vectors[F + f] += v[F + f] * a, vectors[2 * F + f] += v[2 * F + f] * a;
  }
}

// Gradients of the sums -> added to those of s, w and the direction, for count channels of F.
void backward_edge(const float* __restrict g, const float* __restrict gv, const float* __restrict s, const float* __restrict w,
                   const float* d, float* __restrict gs, float* __restrict gw, float* gd, int64_t F, int64_t count) {
  float d0 = d[0], d1 = d[1], d2 = d[2], x = 0, y = 0, z = 0;
#pragma omp simd reduction(+ : x, y, z)
  for (int64_t f = 0; f < count; f++) {
    gs[f] += g[f] * w[f], gw[f] += g[f] * s[f];
    float t = d0 * gv[f] + d1 * gv[F + f] + d2 * gv[2 * F + f], n = s[F + f] * w[F + f];
    gs[F + f] += t * w[F + f], gw[F + f] += t * s[F + f];
    x += gv[f] * n, y += gv[F + f] * n, z += gv[2 * F + f] * n;
  }
  gd[0] = x, gd[1] = y, gd[2] = z;
}

// The same of v and of what multiplies it.
void backward_vectors(const float* __restrict gv, const float* __restrict s, const float* __restrict v, const float* __restrict w,
                      float* __restrict gs, float* __restrict to_v, float* __restrict gw, int64_t F, int64_t count) {
  for (int64_t f = 0; f < count; f++) {
    float a = s[2 * F + f] * w[2 * F + f];
    float u = v[f] * gv[f] + v[F + f] * gv[F + f] + v[2 * F + f] * gv[2 * F + f];
    gs[2 * F + f] += u * w[2 * F + f], gw[2 * F + f] += u * s[2 * F + f];
    to_v[f] += gv[f] * a, to_v[F + f] += gv[F + f] * a, to_v[2 * F + f] += gv[2 * F + f] * a;
  }
}

}  // namespace

extern "C" {

// sent [n, 3F], vec [n, 3, F] or nothing, filters [P, 3F] in rows that lie `stride` apart, direction [P, 3] ->
// scalars [n, F], vectors [n, 3, F].
void filtered_messages_forward(const float* sent, const float* vec, const float* filters, const float* direction,
                               const int64_t* source, const int64_t* ptr, const int32_t* pair, float* scalars, float* vectors,
                               int64_t n, int64_t F, int64_t stride, int64_t with_vec, int64_t threads) {
  Edges edges{source, ptr, pair};
#pragma omp parallel for num_threads(threads) schedule(dynamic, 16)
  for (int64_t i = 0; i < n; i++) {
    memset(scalars + i * F, 0, F * sizeof(float)), memset(vectors + i * 3 * F, 0, 3 * F * sizeof(float));
    for (int64_t e = ptr[i]; e < ptr[i + 1]; e++) {
      int64_t j = source[e], p = edges.of(e);
      float sign = edges.sign(e), d[3] = {sign * direction[3 * p], sign * direction[3 * p + 1], sign * direction[3 * p + 2]};
      forward_edge(sent + j * 3 * F, with_vec ? vec + j * 3 * F : nullptr, filters + p * stride, d, scalars + i * F,
                   vectors + i * 3 * F, F);
    }
  }
}

// Gradients of the sums -> of sent, vec, filters [P, 3F] without gaps, and direction. A thread has some of the channels
// to itself, so that nothing is added up in an order that threads decide.
void filtered_messages_backward(const float* g_scalars, const float* g_vectors, const float* sent, const float* vec,
                                const float* filters, const float* direction, const int64_t* source, const int64_t* ptr,
                                const int32_t* pair, float* g_sent, float* g_vec, float* g_filters, float* g_direction, int64_t n,
                                int64_t F, int64_t P, int64_t stride, int64_t with_vec, int64_t threads) {
  const int64_t width = 16, blocks = (F + width - 1) / width, parts = threads < blocks ? threads : blocks;
  Edges edges{source, ptr, pair};
  std::vector<float> along(parts * P * 3);
  memset(g_sent, 0, n * 3 * F * sizeof(float)), memset(g_filters, 0, P * 3 * F * sizeof(float));
  if (with_vec) memset(g_vec, 0, n * 3 * F * sizeof(float));
#pragma omp parallel for num_threads(parts) schedule(static, 1)
  for (int64_t part = 0; part < parts; part++) {
    int64_t f = part * blocks / parts * width, last = (part + 1) * blocks / parts * width;
    int64_t count = (last < F ? last : F) - f;
    float* own = along.data() + part * P * 3;
    for (int64_t i = 0; i < n; i++)
      for (int64_t e = ptr[i]; e < ptr[i + 1]; e++) {
        int64_t j = source[e], p = edges.of(e);
        float sign = edges.sign(e), d[3] = {sign * direction[3 * p], sign * direction[3 * p + 1], sign * direction[3 * p + 2]}, to_d[3];
        size_t atom = j * 3 * F + f, row = p * 3 * F + f;
        const float *s = sent + atom, *w = filters + p * stride + f, *gv = g_vectors + i * 3 * F + f;
        backward_edge(g_scalars + i * F + f, gv, s, w, d, g_sent + atom, g_filters + row, to_d, F, count);
        if (with_vec) backward_vectors(gv, s, vec + atom, w, g_sent + atom, g_vec + atom, g_filters + row, F, count);
        for (int c = 0; c < 3; c++) own[3 * p + c] += sign * to_d[c];
      }
  }
  for (int64_t k = 0; k < P * 3; k++) {
    float sum = 0;
    for (int64_t part = 0; part < parts; part++) sum += along[part * P * 3 + k];
    g_direction[k] = sum;
  }
}
}
