// The message pass of the equivariant transformer over the edges of a radius graph: forward, backward, and the
// derivative of both along a direction, which is what second derivatives are made of.
//
// Unit of work: one head of one tile (graph.cpp). The head's q, k, v and vec of the tile's atoms lie packed in cache, its
// gates are read off the table once a pair. In backward a thread owns whole heads, so that neither the scatter to
// targets nor the table's gradient needs an atomic or an order that changes between runs.
//
// Kernels are templates over the number type: run on duals (simd.h) they give their own derivative along the tangents
// h_* of their inputs. By symmetry of second derivatives, the derivative of the backward pass is the gradient that
// double backward asks for.
#include <algorithm>
#include <cmath>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif
#include "simd.h"

extern "C" {
struct Inputs {
  int64_t atoms, heads, width, rows, pairs, tiles, margin;  // rows: of the table; margin: the coordinate of distance 0
  int64_t half, direct, fading, threads;            // half: features are bfloat16; fading: vector messages fade too
  int64_t atom_stride, head_stride;                 // of qkv, in numbers
  const void *qkv, *vec;                            // [n, H, 5D], [n, 3, F] or null for zeros
  const float* table;                               // [H, rows, 4D]
  const double* coordinate;                         // [P]
  const float *fade, *direction;                    // [P], [P, 3]
  const int32_t *own_ptr, *atom_ptr, *atom, *pair_ptr, *pair, *in_ptr, *in_atom, *in_pair, *out_ptr, *out_atom, *out_pair;
  // Tangents, of duals only: like qkv, vec and table, and of the geometry [P, 5] coordinate, fade, direction.
  const void *h_qkv, *h_vec;
  const float *h_table, *h_geometry;
};
struct Gradients {
  const void *scalars, *vectors;  // of the outputs [n, F], [n, 3, F]
  void *qkv, *vec;
  float *table, *geometry;  // [groups, H, rows, 4D], [threads, P, 5] (zeroed, or null)
  float* query;             // [n, F] zeroed, where a large system has several tiles; else null
  int64_t groups;
};
}

namespace {

int thread_number() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// A thread's scratch memory, aligned to cache lines and kept between calls: fresh pages cost more than the arithmetic.
float* scratch(int number, size_t size) {
  static thread_local std::vector<float> buffers[12];
  std::vector<float>& buffer = buffers[number];
  if (buffer.size() < size + 32) buffer.resize(size + 32);
  return (float*)(((uintptr_t)buffer.data() + 63) & ~(uintptr_t)63);
}

// width features of storage type at an index of an array -> floats, and back.
template <int D> void read(const void* from, size_t at, bool half, float* to) {
  if (half) for (int f = 0; f < D; f++) to[f] = from_bf16(((const uint16_t*)from)[at + f]);
  else memcpy(to, (const float*)from + at, 4 * D);
}
template <int W> INLINE void write(void* to, size_t at, bool half, Vec<W> v) {
  if (half) for (int f = 0; f < W; f++) ((uint16_t*)to)[at + f] = to_bf16(v.v[f]);
  else store((float*)to + at, v);
}

// Where a pair's distance lies in the table: the first of four rows, their weights, and those by the coordinate.
struct Knot {
  int32_t row;
  float weight[4], slope[4], curve[4];
};

void locate(const Inputs& in, std::vector<Knot>& knots) {
  knots.resize(in.pairs + 1);
#pragma omp parallel for num_threads(in.threads)
  for (int64_t p = 0; p <= in.pairs; p++) {
    Knot& k = knots[p];
    if (in.direct) {
      k = {(int32_t)p, {1, 0, 0, 0}, {0, 0, 0, 0}, {0, 0, 0, 0}};
      continue;
    }
    // Number 0 is the self-loop, at distance zero.
    double s = p ? in.coordinate[p - 1] : (double)in.margin;
    k.row = (int32_t)std::min(std::max((int64_t)std::floor(s) - 1, (int64_t)0), in.rows - 4);
    float t = (float)(s - (k.row + 1)), u = 1 - t;
    float weight[4] = {u * u * u / 6, (4 - 6 * t * t + 3 * t * t * t) / 6, (4 - 6 * u * u + 3 * u * u * u) / 6, t * t * t / 6};
    float slope[4] = {-u * u / 2, (3 * t * t - 4 * t) / 2, (4 * u - 3 * u * u) / 2, t * t / 2};
    float curve[4] = {u, 3 * t - 2, 3 * u - 2, t};
    memcpy(k.weight, weight, 16), memcpy(k.slope, slope, 16), memcpy(k.curve, curve, 16);
  }
}

template <int D, class T> struct Pass {
  static constexpr int W = sizeof(result(T{})) / 4, N = D / W, PLANES = Local<T>::planes;
  static constexpr bool DUAL = PLANES == 2;
  using M = Local<T>;
  // Rows of the packed features: q k v0 v1 v2 x y z; of the gates: key v0 v1 v2.
  static constexpr int S = 8 * D, G = 4 * D;

  const Inputs& in;
  const std::vector<Knot>& knots;
  M features, gates, fade, direction;
  // of the tile at hand
  int64_t head, own, atoms, pairs, first_own;
  const int32_t *atom, *pair;

  Pass(const Inputs& inputs, const std::vector<Knot>& k) : in(inputs), knots(k) {}

  M local(int buffer, size_t size) {
    size = (size + 15) & ~(size_t)15;
    return {scratch(buffer, PLANES * size), size};
  }
  size_t qkv_at(int64_t i) const { return i * in.atom_stride + head * in.head_stride; }
  size_t scalar_at(int64_t i) const { return ((size_t)i * in.heads + head) * D; }
  size_t vector_at(int64_t i, int c) const { return (((size_t)i * 3 + c) * in.heads + head) * D; }

  // Gather what a head and tile need. g: in the backward pass.
  void start(int64_t tile, int64_t h, const Gradients* g) {
    head = h;
    first_own = in.own_ptr[tile], own = in.own_ptr[tile + 1] - first_own;
    atom = in.atom + in.atom_ptr[tile], atoms = in.atom_ptr[tile + 1] - in.atom_ptr[tile];
    pair = in.pair + in.pair_ptr[tile], pairs = in.pair_ptr[tile + 1] - in.pair_ptr[tile];
    features = local(0, atoms * S), gates = local(1, (pairs + 1) * G);
    fade = local(2, pairs + 1), direction = local(3, 3 * (pairs + 1));
    pack(in.qkv, in.vec, features.p);
    if constexpr (DUAL) pack(in.h_qkv, in.h_vec, features.p + features.plane);
    foresee(tile + 1, g);
    geometry(fade.p, direction.p, false);
    if constexpr (DUAL) geometry(fade.p + fade.plane, direction.p + direction.plane, true);
    for (int64_t p = 0; p <= pairs; p++) interpolate(p);
  }

  // Ask for the rows of the tile that comes next: a head's parts lie far apart, and nothing else would foresee them.
  void foresee(int64_t tile, const Gradients* g) const {
    if (tile >= in.tiles) return;
    const size_t size = in.half ? 2 : 4;
    auto lines = [size](const void* base, size_t at, int64_t count) {
      for (size_t byte = 0; byte < count * size; byte += 64) __builtin_prefetch((const char*)base + at * size + byte, 0, 2);
    };
    for (int64_t k = in.atom_ptr[tile]; k < in.atom_ptr[tile + 1]; k++) {
      int64_t i = in.atom[k];
      lines(in.qkv, qkv_at(i), 5 * D);
      for (int c = 0; in.vec && c < 3; c++) lines(in.vec, vector_at(i, c), D);
      if (!g) continue;
      lines(g->scalars, scalar_at(i), D);
      for (int c = 0; c < 3; c++) lines(g->vectors, vector_at(i, c), D);
      lines(g->qkv, qkv_at(i), 5 * D);
      for (int c = 0; in.vec && c < 3; c++) lines(g->vec, vector_at(i, c), D);
    }
  }

  void pack(const void* qkv, const void* vec, float* to) const {
    for (int64_t k = 0; k < atoms; k++, to += S) {
      read<5 * D>(qkv, qkv_at(atom[k]), in.half, to);
      for (int c = 0; c < 3; c++) {
        if (vec) read<D>(vec, vector_at(atom[k], c), in.half, to + (5 + c) * D);
        else memset(to + (5 + c) * D, 0, 4 * D);
      }
    }
  }

  // Number 0 is the self-loop: it does not fade and has no direction.
  void geometry(float* fades, float* directions, bool tangent) const {
    fades[0] = tangent ? 0 : 1, directions[0] = directions[1] = directions[2] = 0;
    for (int64_t k = 0; k < pairs; k++) {
      size_t p = pair[k];
      fades[k + 1] = tangent ? in.h_geometry[5 * p + 1] : in.fade[p];
      memcpy(directions + 3 * (k + 1), tangent ? in.h_geometry + 5 * p + 2 : in.direction + 3 * p, 12);
    }
  }

  // Fade and direction of edges, one after the other: f x y z. turned: the list is read as if the edges ended here.
  M edge_geometry(const int32_t* signed_pair, int32_t edges, bool turned) {
    M to = local(11, 4 * edges);
    for (int plane = 0; plane < PLANES; plane++) {
      float* row = to.p + plane * to.plane;
      const float *fades = fade.p + plane * fade.plane, *directions = direction.p + plane * direction.plane;
      for (int32_t e = 0; e < edges; e++, row += 4) {
        int32_t p = std::abs(signed_pair[e]);
        float sign = (signed_pair[e] < 0) != turned ? -1.0f : 1.0f;
        row[0] = fades[p];
        for (int c = 0; c < 3; c++) row[1 + c] = sign * directions[3 * p + c];
      }
    }
    return to;
  }

  size_t number(int64_t k) const { return k ? (size_t)pair[k - 1] + 1 : 0; }  // of local pair k among the knots
  float moved(size_t p) const { return DUAL && p && !in.direct ? in.h_geometry[5 * (p - 1)] : 0; }

  // Weights of the table's rows for a knot, or of their slope (order 1), as numbers of type T.
  T weight(const Knot& k, int row, int order, float tangent) const {
    if constexpr (DUAL) return {all<W>(order ? k.slope[row] : k.weight[row]), all<W>(tangent * (order ? k.curve[row] : k.slope[row]))};
    else return all<W>(order ? k.slope[row] : k.weight[row]);
  }
  M table_rows(const Knot& k) const {
    size_t at = ((size_t)head * in.rows + k.row) * G;
    // The tangent's plane is wherever the tangent's table is.
    return {const_cast<float*>(in.table) + at, (size_t)(in.h_table - in.table)};
  }

  void interpolate(int64_t local_pair) const {
    const Knot& k = knots[number(local_pair)];
    const M rows = table_rows(k), to = {gates.p + local_pair * G, gates.plane};
    if (in.direct) {
      for (int f = 0; f < G; f += W) to.set(f, rows.get(f));
      return;
    }
    T w[4];
    for (int r = 0; r < 4; r++) w[r] = weight(k, r, 0, moved(number(local_pair)));
    for (int f = 0; f < G; f += W)
      to.set(f, fma(w[3], rows.get(3 * G + f), fma(w[2], rows.get(2 * G + f), fma(w[1], rows.get(G + f), w[0] * rows.get(f)))));
  }

  void forward(void* scalars, void* vectors) {
    // Copies: after a store the compiler must take members for changed, and would read them again.
    const M features = this->features, gates = this->gates;
    const bool fades = in.fading, with_vec = in.vec;
    const int32_t* ptr = in.in_ptr + first_own;
    for (int64_t i = 0; i < own; i++) {
      const int32_t edges = ptr[i + 1] - ptr[i], *source = in.in_atom + ptr[i], *signed_pair = in.in_pair + ptr[i];
      const M score = local(4, edges + W);
      const M edge = edge_geometry(signed_pair, edges, false);
      M self = {features.p + i * S, features.plane};
      T q[N];
      for (int f = 0; f < N; f++) q[f] = self.get(f * W);
      for (int e = 0; e < edges; e++) {
        M s = {features.p + (size_t)source[e] * S, features.plane}, t = {gates.p + (size_t)std::abs(signed_pair[e]) * G, gates.plane};
        T sum = q[0] * s.get(D) * t.get(0);
        for (int f = 1; f < N; f++) sum = fma(q[f] * s.get(D + f * W), t.get(f * W), sum);
        score.set_sum(e, sum);
      }
      for (int e = 0; e < edges; e += W) {
        score.set(e, silu(score.get(e)));
      }
      constexpr int B = N > 1 ? 2 : 1;  // vectors at a time: all their sums stay in registers
      for (int f0 = 0; f0 < N; f0 += B) {
        T x[B], y[3][B];
        for (int b = 0; b < B; b++) {
          x[b] = constant<T>(0);
          for (int c = 0; c < 3; c++) y[c][b] = self.get((5 + c) * D + (f0 + b) * W);
        }
        for (int e = 0; e < edges; e++) {
          M s = {features.p + (size_t)source[e] * S + 2 * D + f0 * W, features.plane};
          M t = {gates.p + (size_t)std::abs(signed_pair[e]) * G + D + f0 * W, gates.plane};
          T fading = edge.every(4 * e), a = score.every(e) * fading, d[3];
          for (int c = 0; c < 3; c++) d[c] = edge.every(4 * e + 1 + c);
          for (int b = 0; b < B; b++) {
            x[b] = fma(s.get(b * W) * t.get(b * W), a, x[b]);
            T along = s.get(D + b * W) * t.get(D + b * W), fresh = s.get(2 * D + b * W) * t.get(2 * D + b * W);
            if (fades) along = along * fading, fresh = fresh * fading;
            if (with_vec)
              for (int c = 0; c < 3; c++) y[c][b] = fma(s.get((3 + c) * D + b * W), along, y[c][b]);
            for (int c = 0; c < 3; c++) y[c][b] = fma(fresh, d[c], y[c][b]);
          }
        }
        for (int b = 0; b < B; b++) {
          write(scalars, scalar_at(atom[i]) + (f0 + b) * W, in.half, result(x[b]));
          for (int c = 0; c < 3; c++) write(vectors, vector_at(atom[i], c) + (f0 + b) * W, in.half, result(y[c][b]));
        }
      }
    }
  }

  // table: the head's gradient; geometry: this thread's, or null.
  void backward(const Gradients& g, float* table, float* geometry_gradient) {
    // Rows of what comes from the outputs: scalar x y z. Their tangents are zero.
    M upstream = local(4, atoms * G), gate_gradient = local(5, (pairs + 1) * G), query = local(6, atoms * D);
    for (int64_t k = 0; k < atoms; k++) {
      float* u = upstream.p + k * G;
      read<D>(g.scalars, scalar_at(atom[k]), in.half, u);
      for (int c = 0; c < 3; c++) read<D>(g.vectors, vector_at(atom[k], c), in.half, u + (1 + c) * D);
    }
    if constexpr (DUAL) memset(upstream.p + upstream.plane, 0, 4 * upstream.plane);
    memset(query.p, 0, 4 * PLANES * query.plane), memset(gate_gradient.p, 0, 4 * PLANES * gate_gradient.plane);
    const int32_t* ptr = in.out_ptr + first_own;
    // Of the local pairs: coordinate, fade, direction.
    M moving = local(7, geometry_gradient ? 5 * (pairs + 1) : 0);
    memset(moving.p, 0, 4 * PLANES * moving.plane);
    for (int64_t j = 0; j < own; j++) source(g, j, ptr[j], ptr[j + 1] - ptr[j], upstream, gate_gradient, query, moving, geometry_gradient);
    for (int64_t k = 0; k < atoms; k++)
      for (int f = 0; f < D; f += W) {
        Vec<W> v = result(M{query.p + k * D, query.plane}.get(f));
        if (g.query) store(g.query + scalar_at(atom[k]) + f, load<W>(g.query + scalar_at(atom[k]) + f) + v);
        else write(g.qkv, qkv_at(atom[k]) + f, in.half, v);
      }
    for (int64_t k = 0; k <= pairs; k++) {
      const Knot& knot = knots[number(k)];
      M from = {gate_gradient.p + k * G, gate_gradient.plane}, rows = table_rows(knot);
      float *to = table + (size_t)knot.row * G, tangent = moved(number(k));
      int count = in.direct ? 1 : 4;
      T w[4], d[4], slope = constant<T>(0);
      for (int r = 0; r < count; r++) w[r] = weight(knot, r, 0, tangent), d[r] = weight(knot, r, 1, tangent);
      for (int f = 0; f < G; f += W) {
        T x = from.get(f);
        for (int r = 0; r < count; r++) store(to + r * G + f, load<W>(to + r * G + f) + result(w[r] * x));
        if (geometry_gradient && k && !in.direct)
          for (int r = 0; r < 4; r++) slope = fma(d[r] * x, rows.get(r * G + f), slope);
      }
      if (geometry_gradient && k) {
        moving.add_sum(5 * k, 1, slope);
        float* out = geometry_gradient + 5 * (size_t)pair[k - 1];
        const float* own_part = moving.p + (DUAL ? moving.plane : 0) + 5 * k;
        for (int c = 0; c < 5; c++) out[c] += own_part[c];
      }
    }
  }

  // Everything that starts at own atom j: gradients of its key and values, and shares of its targets' queries.
  void source(const Gradients& g, int64_t j, int32_t first, int32_t edges, M upstream, M gate_gradient, M query, M moving, bool moves) {
    const M features = this->features, gates = this->gates;  // copies, as in forward
    const bool fades = in.fading, with_vec = in.vec;
    const int32_t *target = in.out_atom + first, *signed_pair = in.out_pair + first;
    const M weight_of = local(8, edges + W), score_gradient = local(9, edges + W), fade_gradient = local(10, edges + W);
    M self = {features.p + j * S, features.plane};
    T key[N], value[N];
    for (int f = 0; f < N; f++) key[f] = self.get(D + f * W), value[f] = self.get(2 * D + f * W);
    for (int e = 0; e < edges; e++) {
      M q = {features.p + (size_t)target[e] * S, features.plane}, t = {gates.p + (size_t)std::abs(signed_pair[e]) * G, gates.plane};
      M u = {upstream.p + (size_t)target[e] * G, upstream.plane};
      T a = key[0] * q.get(0) * t.get(0), b = value[0] * u.get(0) * t.get(D);
      for (int f = 1; f < N; f++) {
        a = fma(key[f] * q.get(f * W), t.get(f * W), a);
        b = fma(value[f] * u.get(f * W), t.get(D + f * W), b);
      }
      weight_of.set_sum(e, a), score_gradient.set_sum(e, b);
    }
    const M edge = edge_geometry(signed_pair, edges, true);
    for (int plane = 0; plane < PLANES; plane++)
      for (int e = 0; e < edges; e++) fade_gradient.p[plane * fade_gradient.plane + e] = edge.p[plane * edge.plane + 4 * e];
    for (int e = 0; e < edges; e += W) {
      T a = weight_of.get(e), b = score_gradient.get(e), c = fade_gradient.get(e), s = sigmoid(a), weight = a * s;
      fade_gradient.set(e, b * weight);
      weight_of.set(e, weight * c);
      score_gradient.set(e, b * c * silu_slope(a, s));
    }
    for (int f = 0; f < D; f += W) {
      T zero = constant<T>(0), k = self.get(D + f), v0 = self.get(2 * D + f), v1 = self.get(3 * D + f), v2 = self.get(4 * D + f);
      T x[3], gk = zero, g0 = zero, g1 = zero, g2 = zero, gx[3] = {zero, zero, zero};
      for (int c = 0; c < 3; c++) x[c] = self.get((5 + c) * D + f);
      for (int e = 0; e < edges; e++) {
        int32_t p = std::abs(signed_pair[e]);
        M t = {gates.p + (size_t)p * G + f, gates.plane}, gt = {gate_gradient.p + (size_t)p * G + f, gate_gradient.plane};
        M u = {upstream.p + (size_t)target[e] * G + f, upstream.plane}, gq = {query.p + (size_t)target[e] * D + f, query.plane};
        T q = M{features.p + (size_t)target[e] * S + f, features.plane}.get(0);
        T gs = score_gradient.every(e), a = weight_of.every(e), us = u.get(0) * a, qs = q * gs, y[3];
        for (int c = 0; c < 3; c++) y[c] = u.get((1 + c) * D);
        T t0 = t.get(0), t1 = t.get(D), t2 = t.get(2 * D), t3 = t.get(3 * D);
        gk = fma(qs, t0, gk);
        gt.set(0, fma(qs, k, gt.get(0)));
        gq.set(0, fma(gs, k * t0, gq.get(0)));
        g0 = fma(us, t1, g0);
        gt.set(D, fma(us, v0, gt.get(D)));
        T fading = edge.every(4 * e), d[3];
        for (int c = 0; c < 3; c++) d[c] = edge.every(4 * e + 1 + c);
        if (moves && p && fades) {
          T along = fma(y[2], x[2], fma(y[1], x[1], y[0] * x[0])), fresh = fma(y[2], d[2], fma(y[1], d[1], y[0] * d[0]));
          moving.add_sum(5 * p + 1, 1, fma(along, v1 * t2, fresh * (v2 * t3)));
        }
        if (fades)
          for (int c = 0; c < 3; c++) y[c] = y[c] * fading;
        if (with_vec) {
          T s = fma(y[2], x[2], fma(y[1], x[1], y[0] * x[0])), r = v1 * t2;
          g1 = fma(s, t2, g1);
          gt.set(2 * D, fma(s, v1, gt.get(2 * D)));
          for (int c = 0; c < 3; c++) gx[c] = fma(y[c], r, gx[c]);
        }
        if (p) {
          T s = fma(y[2], d[2], fma(y[1], d[1], y[0] * d[0]));
          g2 = fma(s, t3, g2);
          gt.set(3 * D, fma(s, v2, gt.get(3 * D)));
          if (moves) {
            T r = v2 * t3;
            for (int c = 0; c < 3; c++) moving.add_sum(5 * p + 2 + c, signed_pair[e] < 0 ? 1.0f : -1.0f, y[c] * r);
          }
        }
      }
      size_t at = qkv_at(atom[j]) + f;
      write(g.qkv, at + D, in.half, result(gk));
      write(g.qkv, at + 2 * D, in.half, result(g0));
      write(g.qkv, at + 3 * D, in.half, result(g1));
      write(g.qkv, at + 4 * D, in.half, result(g2));
      // vec is added to the output as it is.
      if (with_vec)
        for (int c = 0; c < 3; c++)
          write(g.vec, vector_at(atom[j], c) + f, in.half, result(gx[c] + M{upstream.p + j * G, upstream.plane}.get((1 + c) * D + f)));
    }
    if (moves)
      for (int e = 0; e < edges; e++) {
        int32_t p = std::abs(signed_pair[e]);
        moving.p[5 * p + 1] += fade_gradient.p[e];
        if constexpr (DUAL) moving.p[moving.plane + 5 * p + 1] += fade_gradient.p[fade_gradient.plane + e];
      }
  }
};

template <int D, class T> void forward(const Inputs& in, void* scalars, void* vectors) {
  std::vector<Knot> knots;
  locate(in, knots);
#pragma omp parallel num_threads(in.threads)
  {
    Pass<D, T> pass(in, knots);
#pragma omp for collapse(2) schedule(static)
    for (int64_t h = 0; h < in.heads; h++)
      for (int64_t tile = 0; tile < in.tiles; tile++) pass.start(tile, h, nullptr), pass.forward(scalars, vectors);
  }
}

template <int D, class T> void backward(const Inputs& in, const Gradients& g) {
  std::vector<Knot> knots;
  locate(in, knots);
  const size_t head_size = (size_t)in.rows * 4 * D;
#pragma omp parallel num_threads(in.threads)
  {
    Pass<D, T> pass(in, knots);
    float* geometry = g.geometry ? g.geometry + (size_t)thread_number() * in.pairs * 5 : nullptr;
#pragma omp for collapse(2) schedule(static, 1)
    for (int64_t group = 0; group < g.groups; group++)
      for (int64_t h = 0; h < in.heads; h++) {
        float* table = g.table + (group * in.heads + h) * head_size;
        memset(table, 0, 4 * head_size);
        for (int64_t tile = in.tiles * group / g.groups; tile < in.tiles * (group + 1) / g.groups; tile++)
          pass.start(tile, h, &g), pass.backward(g, table, geometry);
      }
    if (g.query) {
#pragma omp for
      for (int64_t i = 0; i < in.atoms; i++)
        for (int64_t h = 0; h < in.heads; h++)
          for (int f = 0; f < D; f += Pass<D, T>::W) {
            size_t from = (i * in.heads + h) * D + f, to = i * in.atom_stride + h * in.head_stride + f;
            write(g.qkv, to, in.half, load<Pass<D, T>::W>(g.query + from));
          }
    }
  }
}

template <int D> constexpr int lanes() { return D < WIDEST ? D : WIDEST; }

}  // namespace

extern "C" {

// Outputs, or with dual their derivative along the tangents. Returns 0, or 1 where there is no kernel of this width.
int attention_forward(const Inputs* in, int dual, void* scalars, void* vectors) {
#define CASE(D)                                                                                   \
  case D:                                                                                         \
    if (dual) forward<D, Dual<lanes<D>()>>(*in, scalars, vectors);                                \
    else forward<D, Vec<lanes<D>()>>(*in, scalars, vectors);                                      \
    return 0;
  switch (in->width) { CASE(8) CASE(16) CASE(32) CASE(64) }
#undef CASE
  return 1;
}

int attention_backward(const Inputs* in, int dual, const Gradients* g) {
#define CASE(D)                                                                                   \
  case D:                                                                                         \
    if (dual) backward<D, Dual<lanes<D>()>>(*in, *g);                                             \
    else backward<D, Vec<lanes<D>()>>(*in, *g);                                                   \
    return 0;
  switch (in->width) { CASE(8) CASE(16) CASE(32) CASE(64) }
#undef CASE
  return 1;
}
}
