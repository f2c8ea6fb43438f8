// Vectors of floats, and numbers with a derivative beside them.
//
// Vec<W> is W floats in the compiler's own vector type, so that one source serves AVX-512, AVX2 and any other machine.
// Dual<T> carries a directional derivative along: the same kernel, run on duals, gives its own derivative.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int WIDEST = 16;
#elif defined(__AVX2__)
constexpr int WIDEST = 8;
#else
constexpr int WIDEST = 4;
#endif

#define INLINE static inline __attribute__((always_inline))

template <int W> struct Lanes {
  typedef float F __attribute__((vector_size(4 * W)));
  typedef int32_t I __attribute__((vector_size(4 * W)));
};

template <int W> struct Vec {
  using F = typename Lanes<W>::F;
  F v;
};

template <int W> INLINE Vec<W> load(const float* p) { Vec<W> r; memcpy(&r.v, p, sizeof r.v); return r; }
template <int W> INLINE void store(float* p, Vec<W> a) { memcpy(p, &a.v, sizeof a.v); }
// a - 0 is a itself, also of -0, so that no subtraction is left of it.
template <int W> INLINE Vec<W> all(float a) { return {a - typename Lanes<W>::F{}}; }
template <int W> INLINE Vec<W> operator+(Vec<W> a, Vec<W> b) { return {a.v + b.v}; }
template <int W> INLINE Vec<W> operator-(Vec<W> a, Vec<W> b) { return {a.v - b.v}; }
template <int W> INLINE Vec<W> operator*(Vec<W> a, Vec<W> b) { return {a.v * b.v}; }
template <int W> INLINE Vec<W> operator/(Vec<W> a, Vec<W> b) { return {a.v / b.v}; }
template <int W> INLINE Vec<W> fma(Vec<W> a, Vec<W> b, Vec<W> c) { return {a.v * b.v + c.v}; }
// Of a NaN in a they return the NaN: what is not finite must stay so.
template <int W> INLINE Vec<W> min(Vec<W> a, Vec<W> b) { return {b.v < a.v ? b.v : a.v}; }
template <int W> INLINE Vec<W> max(Vec<W> a, Vec<W> b) { return {b.v > a.v ? b.v : a.v}; }

// The sum of the lanes.
template <int W> INLINE float sum(Vec<W> a) {
  float s = 0;
  for (int i = 0; i < W; i++) s += a.v[i];
  return s;
}
#if defined(__AVX512F__) || defined(__AVX2__)
template <> inline float sum<4>(Vec<4> a) {
  __m128 x = _mm_add_ps((__m128)a.v, _mm_movehl_ps((__m128)a.v, (__m128)a.v));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
template <> inline float sum<8>(Vec<8> a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128((__m256)a.v), _mm256_extractf128_ps((__m256)a.v, 1));
  return sum<4>(Vec<4>{(Lanes<4>::F)x});
}
#endif
#if defined(__AVX512F__)
template <> inline float sum<16>(Vec<16> a) { return _mm512_reduce_add_ps((__m512)a.v); }
#endif

// e^x by Cody and Waite's reduction and a polynomial; relative error 1e-7, x held within [-87, 88].
template <int W> INLINE Vec<W> exp(Vec<W> x) {
  using I = typename Lanes<W>::I;
  x = min(max(x, all<W>(-87.0f)), all<W>(88.0f));
  const Vec<W> magic = all<W>(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  Vec<W> shifted = fma(x, all<W>(1.44269504089f), magic), n = shifted - magic;
  Vec<W> r = fma(n, all<W>(-0.693145751953125f), x);
  r = fma(n, all<W>(-1.42860682030941723212e-6f), r);
  Vec<W> p = all<W>(1.9875691500e-4f);
  p = fma(p, r, all<W>(1.3981999507e-3f));
  p = fma(p, r, all<W>(8.3334519073e-3f));
  p = fma(p, r, all<W>(4.1665795894e-2f));
  p = fma(p, r, all<W>(1.6666665459e-1f));
  p = fma(p, r, all<W>(5.0000001201e-1f));
  p = fma(p, r * r, r) + all<W>(1.0f);
  I exponent = ((I)shifted.v) << 23;
  return {(typename Lanes<W>::F)((I)p.v + exponent)};
}

template <int W> INLINE Vec<W> sigmoid(Vec<W> x) { return all<W>(1.0f) / (all<W>(1.0f) + exp(all<W>(0.0f) - x)); }

// A number and its derivative along one direction.
template <int W> struct Dual {
  Vec<W> a, b;
};
template <int W> INLINE Dual<W> operator+(Dual<W> x, Dual<W> y) { return {x.a + y.a, x.b + y.b}; }
template <int W> INLINE Dual<W> operator-(Dual<W> x, Dual<W> y) { return {x.a - y.a, x.b - y.b}; }
template <int W> INLINE Dual<W> operator*(Dual<W> x, Dual<W> y) { return {x.a * y.a, fma(x.a, y.b, x.b * y.a)}; }
template <int W> INLINE Dual<W> fma(Dual<W> x, Dual<W> y, Dual<W> z) {
  return {fma(x.a, y.a, z.a), fma(x.a, y.b, fma(x.b, y.a, z.b))};
}
template <int W> INLINE Dual<W> sigmoid(Dual<W> x) {
  Vec<W> s = sigmoid(x.a);
  return {s, (s - s * s) * x.b};
}

// Floats in memory seen as vectors; of duals the derivatives lie one plane behind the values.
template <class T> struct Local;
template <int W> struct Local<Vec<W>> {
  using T = Vec<W>;
  static constexpr int planes = 1;
  float* p;
  size_t plane;
  T get(size_t i) const { return load<W>(p + i); }
  void set(size_t i, T v) const { store(p + i, v); }
  T every(size_t i) const { return all<W>(p[i]); }
  void set_sum(size_t i, T v) const { p[i] = sum(v); }
  void add_sum(size_t i, float sign, T v) const { p[i] += sign * sum(v); }
};
template <int W> struct Local<Dual<W>> {
  using T = Dual<W>;
  static constexpr int planes = 2;
  float* p;
  size_t plane;
  T get(size_t i) const { return {load<W>(p + i), load<W>(p + plane + i)}; }
  void set(size_t i, T v) const { store(p + i, v.a), store(p + plane + i, v.b); }
  T every(size_t i) const { return {all<W>(p[i]), all<W>(p[plane + i])}; }
  void set_sum(size_t i, T v) const { p[i] = sum(v.a), p[plane + i] = sum(v.b); }
  void add_sum(size_t i, float sign, T v) const { p[i] += sign * sum(v.a), p[plane + i] += sign * sum(v.b); }
};
template <class T> INLINE T constant(float a);
template <> inline Vec<4> constant(float a) { return all<4>(a); }
template <> inline Vec<8> constant(float a) { return all<8>(a); }
template <> inline Vec<16> constant(float a) { return all<16>(a); }
template <> inline Dual<4> constant(float a) { return {all<4>(a), all<4>(0)}; }
template <> inline Dual<8> constant(float a) { return {all<8>(a), all<8>(0)}; }
template <> inline Dual<16> constant(float a) { return {all<16>(a), all<16>(0)}; }

template <class T> INLINE T silu(T x) { return x * sigmoid(x); }
// Its derivative, with s = sigmoid(x).
template <class T> INLINE T silu_slope(T x, T s) { return fma(x * s, constant<T>(1) - s, s); }

// What a kernel is run for: the value, or of duals the derivative.
template <int W> INLINE Vec<W> result(Vec<W> v) { return v; }
template <int W> INLINE Vec<W> result(Dual<W> v) { return v.b; }

// bfloat16 <-> float, to nearest even.
INLINE float from_bf16(uint16_t h) { uint32_t u = (uint32_t)h << 16; float f; memcpy(&f, &u, 4); return f; }
INLINE uint16_t to_bf16(float f) {
  uint32_t u; memcpy(&u, &f, 4);
  if ((u & 0x7fffffff) > 0x7f800000) return (u >> 16) | 0x40;  // NaN stays NaN
  return (u + 0x7fff + ((u >> 16) & 1)) >> 16;
}
