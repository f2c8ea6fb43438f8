// Attention whose scores are summed over layers, forward and backward, for one (molecule, head) at a time.
//
// Keys lie along the lanes. What is indexed by key is kept in panels of PANEL keys, [panel][row][PANEL], so that all
// products are of two kinds: `multiply`, whose result has keys along its lanes, and `dot`, which sums over keys. The
// scores of BLOCK queries with all keys exist at a time. Scores are in units of ln 2, so that softmax takes powers of 2.
//
// Legend: T tokens, H heads, D channels a head, E = layers * D; Tk, Tq: T rounded up to whole panels and blocks;
// Dr, Er: D and E rounded up to multiples of 4. What is added by rounding up holds zeros.
#include <algorithm>
#include <cmath>
#include <vector>

#include "simd.h"

constexpr int W = WIDEST, PANEL = 2 * W;
// Rows of a tile of `multiply` and of `dot`: 24 sums in the 32 registers of AVX-512, 12 in 16 registers elsewhere.
constexpr int ROWS = W == 16 ? 12 : 6, DOT_ROWS = ROWS / 2;
constexpr int BLOCK = 12;
constexpr float MASKED = -1e30f, LOG2_E = 1.44269504f, LN_2 = 0.693147181f;

using V = Vec<W>;

// 2^x for x <= 0: relative error 2e-7, and 0 below 2^-60, which no float of the order of 1 notices. Numbers near the
// smallest that there are would make the products that follow a hundred times slower.
INLINE V exp2(V x) {
  using I = Lanes<W>::I;
  const V magic = all<W>(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  V shifted = x + magic, r = x - (shifted - magic);
  V p = all<W>(1.3333558e-3f);
  p = fma(p, r, all<W>(9.6181291e-3f));
  p = fma(p, r, all<W>(5.5504109e-2f));
  p = fma(p, r, all<W>(2.4022651e-1f));
  p = fma(p, r, all<W>(6.9314718e-1f));
  p = fma(p, r, all<W>(1.0f));
  I bits = (I)p.v + ((I)shifted.v << 23);
  return {x.v < -60.0f ? Lanes<W>::F{} : (Lanes<W>::F)bits};
}

// c[r] = start[r] + sum over i of a[r, i] b[i] for R rows of a panel: b [depth][PANEL], depth a multiple of 4. a's
// strides are A_ROW and A_DEPTH; start's is START_ROW, 0 where all rows start alike.
template <int R, int A_ROW, int A_DEPTH, int START_ROW>
INLINE void multiply(const float* a, const float* b, int64_t depth, const float* start, float* c) {
  V sum[R][2];
#pragma GCC unroll 12
  for (int r = 0; r < R; r++)
    sum[r][0] = load<W>(start + r * START_ROW), sum[r][1] = load<W>(start + r * START_ROW + W);
  for (int64_t i = 0; i < depth; i += 4)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      V b0 = load<W>(b + (i + j) * PANEL), b1 = load<W>(b + (i + j) * PANEL + W);
#pragma GCC unroll 12
      for (int r = 0; r < R; r++) {
        V x = all<W>(a[r * A_ROW + (i + j) * A_DEPTH]);
        sum[r][0] = fma(x, b0, sum[r][0]), sum[r][1] = fma(x, b1, sum[r][1]);
      }
    }
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) store(c + r * PANEL, sum[r][0]), store(c + r * PANEL + W, sum[r][1]);
}

// c [BLOCK][PANEL] = start + ab: a [depth][BLOCK], b [depth][PANEL], start [PANEL].
INLINE void product(const float* a, const float* b, int64_t depth, const float* start, float* c) {
  for (int r = 0; r < BLOCK; r += ROWS) multiply<ROWS, 1, BLOCK, 0>(a + r, b, depth, start, c + r * PANEL);
}

// c [columns][PANEL] += ab: a [columns][BLOCK], b [BLOCK][PANEL]; columns a multiple of 4.
static void add_product(const float* a, const float* b, int64_t columns, float* c) {
  constexpr int R = W == 16 ? 8 : 4;
  int64_t e = 0;
  for (; e + R <= columns; e += R)
    multiply<R, BLOCK, 1, PANEL>(a + e * BLOCK, b, BLOCK, c + e * PANEL, c + e * PANEL);
  for (; e < columns; e += 4) multiply<4, BLOCK, 1, PANEL>(a + e * BLOCK, b, BLOCK, c + e * PANEL, c + e * PANEL);
}

template <int N> INLINE Vec<4> sum_quarters(Vec<N> a) {
  if constexpr (N == 4) {
    return a;
  } else {
    Vec<N / 2> half[2];
    memcpy(half, &a, sizeof half);
    return sum_quarters<N / 2>(half[0] + half[1]);
  }
}

// The sums of four vectors' lanes.
INLINE Vec<4> sums(V a, V b, V c, V d) {
  Lanes<W>::I low, high, low_pair, high_pair;
  for (int i = 0; i < W; i++) {
    int first = i & ~3, lane = i & 3;
    low[i] = first + lane / 2 + W * (lane & 1), high[i] = low[i] + 2;
    low_pair[i] = first + (lane & 1) + W * (lane / 2), high_pair[i] = low_pair[i] + 2;
  }
  V ab = {__builtin_shuffle(a.v, b.v, low) + __builtin_shuffle(a.v, b.v, high)};
  V cd = {__builtin_shuffle(c.v, d.v, low) + __builtin_shuffle(c.v, d.v, high)};
  return sum_quarters<W>({__builtin_shuffle(ab.v, cd.v, low_pair) + __builtin_shuffle(ab.v, cd.v, high_pair)});
}

// c [BLOCK][columns] = a bᵀ summed over all keys. a: panels [BLOCK][PANEL], b: panels [columns][PANEL].
static void dot(const float* a, const float* b, int64_t columns, int64_t panels, float* c) {
  for (int64_t e = 0; e < columns; e += 4)
    for (int row = 0; row < BLOCK; row += DOT_ROWS) {
      V sum[DOT_ROWS][4] = {};
      for (int64_t p = 0; p < panels; p++)
#pragma GCC unroll 2
        for (int half = 0; half < PANEL; half += W) {
          const float *x = a + (p * BLOCK + row) * PANEL + half, *y = b + (p * columns + e) * PANEL + half;
          V y0 = load<W>(y), y1 = load<W>(y + PANEL), y2 = load<W>(y + 2 * PANEL), y3 = load<W>(y + 3 * PANEL);
#pragma GCC unroll 12
          for (int r = 0; r < DOT_ROWS; r++) {
            V xr = load<W>(x + r * PANEL);
            sum[r][0] = fma(xr, y0, sum[r][0]), sum[r][1] = fma(xr, y1, sum[r][1]);
            sum[r][2] = fma(xr, y2, sum[r][2]), sum[r][3] = fma(xr, y3, sum[r][3]);
          }
        }
#pragma GCC unroll 12
      for (int r = 0; r < DOT_ROWS; r++)
        store(c + (row + r) * columns + e, sums(sum[r][0], sum[r][1], sum[r][2], sum[r][3]));
    }
}

INLINE float read(const float* p) { return *p; }
INLINE float read(const uint16_t* p) { return from_bf16(*p); }
INLINE void write(float* p, float x) { *p = x; }
INLINE void write(uint16_t* p, float x) { *p = to_bf16(x); }

// A tensor [m, T, H, D] with D contiguous; strides in elements.
template <class S> struct Heads {
  S* data;
  int64_t molecule, token, head;
  S* at(int64_t m, int64_t h) const { return data + m * molecule + h * head; }
};

template <class S> Heads<S> heads(void* data, const int64_t* strides) {
  return {(S*)data, strides[0], strides[1], strides[2]};
}

// Zeros at the start of a cache line.
class Buffer {
  struct alignas(64) Line { float x[16]; };
  std::vector<Line> lines;

 public:
  explicit Buffer(int64_t size) : lines((size + 15) / 16) {}
  operator float*() { return lines[0].x; }
  void clear() { std::fill(lines.begin(), lines.end(), Line{}); }
};

INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

struct Sizes {
  int64_t m, T, H, D, layers;
  int64_t E = layers * D, Dr = round_up(D, 4), Er = round_up(E, 4), Tk = round_up(T, PANEL), Tq = round_up(T, BLOCK);
  int64_t panels = Tk / PANEL;
};

// Four numbers in a row, in the storage type.
INLINE Vec<4> read4(const float* p) { return load<4>(p); }
INLINE Vec<4> read4(const uint16_t* p) {
  return {Lanes<4>::F{from_bf16(p[0]), from_bf16(p[1]), from_bf16(p[2]), from_bf16(p[3])}};
}
INLINE void write4(float* p, Vec<4> x) { store(p, x); }
INLINE void write4(uint16_t* p, Vec<4> x) {
  for (int i = 0; i < 4; i++) p[i] = to_bf16(x.v[i]);
}

INLINE void transpose(Vec<4> x[4]) {
  using I = Lanes<4>::I;
  const I low = {0, 4, 1, 5}, high = {2, 6, 3, 7}, first = {0, 1, 4, 5}, second = {2, 3, 6, 7};
  auto a = __builtin_shuffle(x[0].v, x[1].v, low), b = __builtin_shuffle(x[2].v, x[3].v, low);
  auto c = __builtin_shuffle(x[0].v, x[1].v, high), d = __builtin_shuffle(x[2].v, x[3].v, high);
  x[0].v = __builtin_shuffle(a, b, first), x[1].v = __builtin_shuffle(a, b, second);
  x[2].v = __builtin_shuffle(c, d, first), x[3].v = __builtin_shuffle(c, d, second);
}

// packed [t / N][columns][t % N] = factor * x, from column `first` on.
template <int N, class S>
void pack(Heads<S> x, int64_t m, int64_t h, const Sizes& z, int64_t columns, int64_t first, float factor,
          float* packed) {
  for (int64_t t = 0; t < z.T; t += 4) {
    const S* from = x.at(m, h) + t * x.token;
    float* to = packed + (t / N * columns + first) * N + t % N;
    int64_t d = 0;
    for (; t + 4 <= z.T && d + 4 <= z.D; d += 4) {
      Vec<4> rows[4];
      for (int i = 0; i < 4; i++) rows[i] = all<4>(factor) * read4(from + i * x.token + d);
      transpose(rows);
      for (int i = 0; i < 4; i++) store(to + (d + i) * N, rows[i]);
    }
    for (; d < z.D; d++)
      for (int i = 0; i < 4 && t + i < z.T; i++) to[d * N + i] = factor * read(from + i * x.token + d);
  }
}

// The way back: x = factor * packed.
template <int N, class S>
void unpack(const float* packed, int64_t m, int64_t h, const Sizes& z, int64_t columns, int64_t first, float factor,
            Heads<S> x) {
  for (int64_t t = 0; t < z.T; t += 4) {
    const float* from = packed + (t / N * columns + first) * N + t % N;
    S* to = x.at(m, h) + t * x.token;
    int64_t d = 0;
    for (; t + 4 <= z.T && d + 4 <= z.D; d += 4) {
      Vec<4> rows[4];
      for (int i = 0; i < 4; i++) rows[i] = all<4>(factor) * load<4>(from + (d + i) * N);
      transpose(rows);
      for (int i = 0; i < 4; i++) write4(to + i * x.token + d, rows[i]);
    }
    for (; d < z.D; d++)
      for (int i = 0; i < 4 && t + i < z.T; i++) write(to + i * x.token + d, factor * from[d * N + i]);
  }
}

// What both directions need of one (molecule, head).
template <class S> struct Unit {
  const Sizes& z;
  Buffer q, k, v, bias, scores;

  explicit Unit(const Sizes& z)
      : z(z), q(z.Tq * z.Er), k(z.Tk * z.Er), v(z.Tk * z.Dr), bias(z.Tk), scores(BLOCK * z.Tk) {
    std::fill(bias + z.T, bias + z.Tk, MASKED);
  }

  // Returns whether the molecule has a token to attend to.
  bool fill(const Heads<S>* queries, const Heads<S>* keys, Heads<S> values, const uint8_t* mask, int64_t m, int64_t h) {
    bool any = false;
    for (int64_t t = 0; t < z.T; t++) {
      bool there = !mask || mask[m * z.T + t];
      bias[t] = there ? 0.0f : MASKED;
      any |= there;
    }
    if (!any) return false;
    for (int64_t i = 0; i < z.layers; i++) {
      pack<BLOCK>(queries[i], m, h, z, z.Er, i * z.D, LOG2_E / std::sqrt((float)z.D), q);
      pack<PANEL>(keys[i], m, h, z, z.Er, i * z.D, 1.0f, k);
    }
    pack<PANEL>(values, m, h, z, z.Dr, 0, 1.0f, v);
    return true;
  }

  // Scores of the block of queries that begins at `first` with panel p of the keys.
  void score(int64_t first, int64_t p) {
    product(q + first * z.Er, k + p * z.Er * PANEL, z.Er, bias + p * PANEL, scores + p * BLOCK * PANEL);
  }
};

template <class S> void clear(Heads<S> x, int64_t m, int64_t h, const Sizes& z) {
  for (int64_t t = 0; t < z.T; t++)
    for (int64_t d = 0; d < z.D; d++) x.at(m, h)[t * x.token + d] = 0;
}

// What softmax makes of a row of scores, without its denominator: 2^(score − top), and their sum.
static float exponentials(float* row, int64_t panels, float top) {
  V total = {};
  for (int64_t p = 0; p < panels; p++) {
    float* x = row + p * BLOCK * PANEL;
    V x0 = exp2(load<W>(x) - all<W>(top)), x1 = exp2(load<W>(x + W) - all<W>(top));
    store(x, x0), store(x + W, x1);
    total = total + (x0 + x1);
  }
  return sum(total);
}

template <int N> INLINE float largest(Vec<N> a) {
  if constexpr (N == 1) {
    return a.v[0];
  } else {
    Vec<N / 2> half[2];
    memcpy(half, &a, sizeof half);
    return largest<N / 2>(max(half[0], half[1]));
  }
}

static float largest(const float* row, int64_t panels) {
  V top = all<W>(MASKED);
  for (int64_t p = 0; p < panels; p++) {
    const float* x = row + p * BLOCK * PANEL;
    top = max(top, max(load<W>(x), load<W>(x + W)));
  }
  return largest<W>(top);
}

template <class S>
void forward(const Sizes& z, int threads, const Heads<S>* queries, const Heads<S>* keys, Heads<S> values,
             const uint8_t* mask, Heads<S> out, float* norm) {
#pragma omp parallel num_threads(threads)
  {
    Unit<S> unit(z);
    Buffer result(BLOCK * z.Dr);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < z.m * z.H; i++) {
      int64_t m = i / z.H, h = i % z.H;
      float *tops = norm + 2 * i * z.T, *shares = tops + z.T;
      if (!unit.fill(queries, keys, values, mask, m, h)) {
        std::fill(tops, tops + 2 * z.T, 0.0f);
        clear(out, m, h, z);
        continue;
      }
      for (int64_t first = 0; first < z.T; first += BLOCK) {
        for (int64_t p = 0; p < z.panels; p++) unit.score(first, p);
        int64_t end = std::min(first + BLOCK, z.T);
        for (int64_t t = first; t < end; t++) tops[t] = largest(unit.scores + (t - first) * PANEL, z.panels);
        for (int64_t t = first; t < end; t++)
          shares[t] = 1 / exponentials(unit.scores + (t - first) * PANEL, z.panels, tops[t]);
        dot(unit.scores, unit.v, z.Dr, z.panels, result);
        for (int64_t t = first; t < end; t++)
          for (int64_t d = 0; d < z.D; d++)
            write(out.at(m, h) + t * out.token + d, result[(t - first) * z.Dr + d] * shares[t]);
      }
    }
  }
}

// Scores become x = 2^(score − top); returned is the sum of x y for slopes y, the gradient to the probabilities.
static float weighted_exponentials(float* row, const float* slopes, int64_t panels, float top) {
  V total = {};
  for (int64_t p = 0; p < panels; p++) {
    float* x = row + p * BLOCK * PANEL;
    const float* y = slopes + p * BLOCK * PANEL;
    V x0 = exp2(load<W>(x) - all<W>(top)), x1 = exp2(load<W>(x + W) - all<W>(top));
    store(x, x0), store(x + W, x1);
    total = fma(x0, load<W>(y), fma(x1, load<W>(y + W), total));
  }
  return sum(total);
}

// Slopes become the gradient to the scores.
static void gradient_to_scores(const float* row, float* slopes, int64_t panels, float mean) {
  for (int64_t p = 0; p < panels; p++) {
    const float* x = row + p * BLOCK * PANEL;
    float* y = slopes + p * BLOCK * PANEL;
    store(y, load<W>(x) * (load<W>(y) - all<W>(mean)));
    store(y + W, load<W>(x + W) * (load<W>(y + W) - all<W>(mean)));
  }
}

template <class S>
void backward(const Sizes& z, int threads, const Heads<S>* queries, const Heads<S>* keys, Heads<S> values,
              const uint8_t* mask, Heads<S> gradient, const float* norm, const Heads<S>* to_queries,
              const Heads<S>* to_keys, Heads<S> to_values) {
#pragma omp parallel num_threads(threads)
  {
    Unit<S> unit(z);
    Buffer g(z.Tq * z.Dr), to_q(BLOCK * z.Er), to_k(z.Tk * z.Er), to_v(z.Tk * z.Dr), slopes(BLOCK * z.Tk), zeros(PANEL);
    const float scale = 1 / std::sqrt((float)z.D);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < z.m * z.H; i++) {
      int64_t m = i / z.H, h = i % z.H;
      const float *tops = norm + 2 * i * z.T, *shares = tops + z.T;
      if (!unit.fill(queries, keys, values, mask, m, h)) {
        for (int64_t layer = 0; layer < z.layers; layer++)
          clear(to_queries[layer], m, h, z), clear(to_keys[layer], m, h, z);
        clear(to_values, m, h, z);
        continue;
      }
      // A query's probabilities are its share times 2^(score − top): the share is multiplied into its gradient here.
      pack<BLOCK>(gradient, m, h, z, z.Dr, 0, 1.0f, g);
      for (int64_t t = 0; t < z.T; t++)
        for (int64_t d = 0; d < z.D; d++) g[(t / BLOCK * z.Dr + d) * BLOCK + t % BLOCK] *= shares[t];
      to_k.clear(), to_v.clear();
      for (int64_t first = 0; first < z.T; first += BLOCK) {
        for (int64_t p = 0; p < z.panels; p++) {
          unit.score(first, p);
          product(g + first * z.Dr, unit.v + p * z.Dr * PANEL, z.Dr, zeros, slopes + p * BLOCK * PANEL);
        }
        int64_t end = std::min(first + BLOCK, z.T);
        float means[BLOCK];
        for (int64_t r = 0; first + r < end; r++)
          means[r] = weighted_exponentials(unit.scores + r * PANEL, slopes + r * PANEL, z.panels, tops[first + r]);
        for (int64_t r = 0; first + r < end; r++)
          gradient_to_scores(unit.scores + r * PANEL, slopes + r * PANEL, z.panels, means[r] * shares[first + r]);
        for (int64_t p = 0; p < z.panels; p++) {
          add_product(g + first * z.Dr, unit.scores + p * BLOCK * PANEL, z.Dr, to_v + p * z.Dr * PANEL);
          add_product(unit.q + first * z.Er, slopes + p * BLOCK * PANEL, z.Er, to_k + p * z.Er * PANEL);
        }
        dot(slopes, unit.k, z.Er, z.panels, to_q);
        for (int64_t layer = 0; layer < z.layers; layer++)
          for (int64_t t = first; t < end; t++)
            for (int64_t d = 0; d < z.D; d++)
              write(to_queries[layer].at(m, h) + t * to_queries[layer].token + d,
                    scale * to_q[(t - first) * z.Er + layer * z.D + d]);
      }
      for (int64_t layer = 0; layer < z.layers; layer++)
        unpack<PANEL>(to_k, m, h, z, z.Er, layer * z.D, LN_2, to_keys[layer]);
      unpack<PANEL>(to_v, m, h, z, z.Dr, 0, 1.0f, to_values);
    }
  }
}

// Tensors come as an array of addresses and one of strides (molecule, token, head): queries, keys, values, then of
// the forward pass its result, of the backward pass the result's gradient and the gradients to queries, keys, values.
template <class S>
void run(bool back, const Sizes& z, int threads, void* const* addresses, const int64_t* strides, const uint8_t* mask,
         float* norm) {
  std::vector<Heads<S>> all;
  for (int64_t i = 0; i < (back ? 4 * z.layers + 3 : 2 * z.layers + 2); i++)
    all.push_back(heads<S>(addresses[i], strides + 3 * i));
  const Heads<S>*q = all.data(), *k = q + z.layers, *rest = k + z.layers;
  if (!back) return forward(z, threads, q, k, rest[0], mask, rest[1], norm);
  const Heads<S>*to_q = rest + 2, *to_k = to_q + z.layers;
  backward(z, threads, q, k, rest[0], mask, rest[1], norm, to_q, to_k, to_k[z.layers]);
}

// mask: [m, T] bytes or null; norm: [m, H, 2, T], of every query its largest score and 1 / sum of 2^(score − largest).
extern "C" void carried_attention(int back, int bf16, int threads, int64_t m, int64_t T, int64_t H, int64_t D,
                                  int64_t layers, void* const* addresses, const int64_t* strides, const uint8_t* mask,
                                  float* norm) {
  Sizes z{m, T, H, D, layers};
  if (bf16) run<uint16_t>(back, z, threads, addresses, strides, mask, norm);
  else run<float>(back, z, threads, addresses, strides, mask, norm);
}
