// Whitened vector norm, one atom at a time: y = C^(-1/2) x w with x = vec centred over channels, C = x xᵀ / F +
// diag(regular). All arithmetic is in double: where atoms lie in a plane C^(-1/2) is large along its normal, and single
// precision would lose digits in C as in the product.
//
// Legend: n atoms, F channels, Fr: F rounded up to whole vectors; what is added by rounding up holds zeros.
#include <cmath>
#include <vector>

#include "simd.h"

constexpr int W = WIDEST / 2;
typedef double Wide __attribute__((vector_size(8 * W)));
typedef double Matrix[3][3];

// What the backward pass needs of an atom: eigenvalues of C, its eigenvectors in columns, means of vec over channels.
struct Saved {
  double values[3];
  Matrix vectors;
  double means[3];
};

INLINE double read(const float* p) { return *p; }
INLINE double read(const uint16_t* p) { return from_bf16(*p); }
INLINE void write(float* p, double x) { *p = (float)x; }
INLINE void write(uint16_t* p, double x) { *p = to_bf16((float)x); }

INLINE Wide wide(const double* p) { Wide a; memcpy(&a, p, sizeof a); return a; }
INLINE double sum(Wide a) {
  double s = 0;
  for (int i = 0; i < W; i++) s += a[i];
  return s;
}

static double sum(const double* x, int64_t Fr) {
  Wide s = {};
  for (int64_t f = 0; f < Fr; f += W) s += wide(x + f);
  return sum(s);
}

// a bᵀ of a, b [3][Fr].
static void outer(const double* a, const double* b, int64_t Fr, Matrix product) {
  Wide s[3][3] = {};
  for (int64_t f = 0; f < Fr; f += W)
#pragma GCC unroll 3
    for (int i = 0; i < 3; i++)
#pragma GCC unroll 3
      for (int j = 0; j < 3; j++) s[i][j] += wide(a + i * Fr + f) * wide(b + j * Fr + f);
  for (int i = 0; i < 3; i++)
    for (int j = 0; j < 3; j++) product[i][j] = sum(s[i][j]);
}

// Eigenvalues, on a's diagonal, and eigenvectors of symmetric a by Jacobi's rotations; a few sweeps reach rounding.
static void diagonalise(Matrix a, Matrix vectors) {
  for (int i = 0; i < 3; i++)
    for (int j = 0; j < 3; j++) vectors[i][j] = i == j;
  for (int sweep = 0; sweep < 12; sweep++) {
    double off = std::fabs(a[0][1]) + std::fabs(a[0][2]) + std::fabs(a[1][2]);
    if (off <= 1e-17 * (std::fabs(a[0][0]) + std::fabs(a[1][1]) + std::fabs(a[2][2]))) break;
    for (int p = 0; p < 2; p++)
      for (int q = p + 1; q < 3; q++) {
        if (a[p][q] == 0) continue;
        // tan, cos and sin of the angle that makes a[p][q] zero.
        int r = 3 - p - q;
        double twice = 2 * a[p][q], difference = a[q][q] - a[p][p];
        double root = std::sqrt(difference * difference + twice * twice);
        double tan = twice / (difference + std::copysign(root, difference));
        double cos = 1 / std::sqrt(1 + tan * tan), sin = tan * cos;
        a[p][p] -= tan * a[p][q], a[q][q] += tan * a[p][q];
        a[p][q] = a[q][p] = 0;
        double pr = a[p][r], qr = a[q][r];
        a[p][r] = a[r][p] = cos * pr - sin * qr, a[q][r] = a[r][q] = sin * pr + cos * qr;
        for (int i = 0; i < 3; i++) {
          double vp = vectors[i][p], vq = vectors[i][q];
          vectors[i][p] = cos * vp - sin * vq, vectors[i][q] = sin * vp + cos * vq;
        }
      }
  }
}

// vectors middle vectorsᵀ
static void turn_back(const Matrix vectors, const Matrix middle, Matrix result) {
  for (int i = 0; i < 3; i++)
    for (int j = 0; j < 3; j++) {
      result[i][j] = 0;
      for (int k = 0; k < 3; k++)
        for (int l = 0; l < 3; l++) result[i][j] += vectors[i][k] * middle[k][l] * vectors[j][l];
    }
}

// vectorsᵀ (a + aᵀ) vectors
static void turn_both(const Matrix vectors, const Matrix a, Matrix result) {
  for (int k = 0; k < 3; k++)
    for (int l = 0; l < 3; l++) {
      result[k][l] = 0;
      for (int i = 0; i < 3; i++)
        for (int j = 0; j < 3; j++) result[k][l] += vectors[i][k] * (a[i][j] + a[j][i]) * vectors[j][l];
    }
}

// In C's eigenbasis the derivative of C^(-1/2) is a product, number by number, with the Loewner matrix, of divided
// differences of λ^(-1/2); of roots a, b of eigenvalues they are this. The second derivative is made of second ones.
INLINE double loewner(double a, double b) { return -1 / (a * b * (a + b)); }
INLINE double loewner(double a, double b, double c) { return (a + b + c) / (a * b * c * (a + b) * (b + c) * (c + a)); }

// C^(-1/2)
static void inverse_root(const Saved& saved, Matrix result) {
  Matrix middle = {};
  for (int k = 0; k < 3; k++) middle[k][k] = 1 / std::sqrt(saved.values[k]);
  turn_back(saved.vectors, middle, result);
}

// Sums over channels, one of each thread, added in the threads' order.
template <class S> void add_parts(const std::vector<double>& parts, int threads, int64_t F, S* result) {
  for (int64_t f = 0; f < F; f++) {
    double total = 0;
    for (int thread = 0; thread < threads; thread++) total += parts[thread * F + f];
    write(result + f, total);
  }
}

template <class S>
void forward(int threads, int64_t n, int64_t F, const S* vec, const S* weight, const double* regular, S* result,
             Saved* saved) {
  const int64_t Fr = (F + W - 1) / W * W;
  const double least = std::fmin(regular[0], std::fmin(regular[1], regular[2]));
#pragma omp parallel num_threads(threads)
  {
    std::vector<double> buffer(3 * Fr);
#pragma omp for schedule(static)
    for (int64_t atom = 0; atom < n; atom++) {
      double* x = buffer.data();
      for (int i = 0; i < 3; i++) {
        const S* row = vec + (3 * atom + i) * F;
        for (int64_t f = 0; f < F; f++) x[i * Fr + f] = read(row + f);
        double mean = saved[atom].means[i] = sum(x + i * Fr, Fr) / F;
        for (int64_t f = 0; f < F; f++) x[i * Fr + f] -= mean;
      }
      Matrix covariance, root;
      outer(x, x, Fr, covariance);
      for (int i = 0; i < 3; i++)
        for (int j = 0; j < 3; j++) covariance[i][j] = covariance[i][j] / F + (i == j ? regular[i] : 0);
      diagonalise(covariance, saved[atom].vectors);
      for (int i = 0; i < 3; i++) {
        double value = covariance[i][i];
        saved[atom].values[i] = value < least ? least : value;  // below it by rounding only
      }
      inverse_root(saved[atom], root);
      for (int i = 0; i < 3; i++) {
        S* row = result + (3 * atom + i) * F;
        for (int64_t f = 0; f < F; f++)
          write(row + f, (root[i][0] * x[f] + root[i][1] * x[Fr + f] + root[i][2] * x[2 * Fr + f]) * read(weight + f));
      }
    }
  }
}

template <class S>
void backward(int threads, int64_t n, int64_t F, const S* gradient, const S* vec, const S* weight, const Saved* saved,
              S* to_vec, S* to_weight) {
  const int64_t Fr = (F + W - 1) / W * W;
  // Every thread sums to_weight over its own atoms; the sums are added in their order.
  std::vector<double> parts(threads * F);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int thread = 0; thread < threads; thread++) {
    double* part = &parts[thread * F];
    std::vector<double> buffer(7 * Fr);
    double *x = buffer.data(), *g = x + 3 * Fr, *w = x + 6 * Fr;
    for (int64_t f = 0; f < F; f++) w[f] = read(weight + f);
    for (int64_t atom = n * thread / threads; atom < n * (thread + 1) / threads; atom++) {
      Matrix root, product, slope;
      inverse_root(saved[atom], root);
      for (int i = 0; i < 3; i++) {
        const S *row = vec + (3 * atom + i) * F, *gradient_row = gradient + (3 * atom + i) * F;
        for (int64_t f = 0; f < F; f++) x[i * Fr + f] = read(row + f) - saved[atom].means[i];
        for (int64_t f = 0; f < F; f++) g[i * Fr + f] = read(gradient_row + f);
      }
      for (int64_t f = 0; f < F; f++) {
        double total = 0;
        for (int i = 0; i < 3; i++)
          total += g[i * Fr + f] * (root[i][0] * x[f] + root[i][1] * x[Fr + f] + root[i][2] * x[2 * Fr + f]);
        part[f] += total;
        for (int i = 0; i < 3; i++) g[i * Fr + f] *= w[f];
      }
      outer(g, x, Fr, product);
      Matrix turned;
      turn_both(saved[atom].vectors, product, turned);
      for (int k = 0; k < 3; k++)
        for (int l = 0; l < 3; l++)
          turned[k][l] *= loewner(std::sqrt(saved[atom].values[k]), std::sqrt(saved[atom].values[l])) / F;
      turn_back(saved[atom].vectors, turned, slope);
      double g_mean[3], mean[3];
      for (int i = 0; i < 3; i++) g_mean[i] = sum(g + i * Fr, Fr) / F;
      for (int i = 0; i < 3; i++) {
        mean[i] = root[i][0] * g_mean[0] + root[i][1] * g_mean[1] + root[i][2] * g_mean[2];
        S* row = to_vec + (3 * atom + i) * F;
        for (int64_t f = 0; f < F; f++)
          write(row + f, root[i][0] * g[f] + root[i][1] * g[Fr + f] + root[i][2] * g[2 * Fr + f] - mean[i] +
                             slope[i][0] * x[f] + slope[i][1] * x[Fr + f] + slope[i][2] * x[2 * Fr + f]);
      }
    }
  }
  add_parts(parts, threads, F, to_weight);
}

// The derivative of backward's results as vec and weight move along h_vec and h_weight, which is the gradient of
// <h_vec, to_vec> + <h_weight, to_weight> with regard to vec and weight; with regard to `gradient` it is the derivative
// of forward's result. What moves is marked d.
template <class S>
void second(int threads, int64_t n, int64_t F, const S* h_vec, const S* h_weight, const S* gradient, const S* vec,
            const S* weight, const Saved* saved, S* to_gradient, S* to_vec, S* to_weight) {
  const int64_t Fr = (F + W - 1) / W * W;
  std::vector<double> parts(threads * F);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int thread = 0; thread < threads; thread++) {
    double* part = &parts[thread * F];
    std::vector<double> buffer(17 * Fr);
    double *x = buffer.data(), *dx = x + 3 * Fr, *g = x + 6 * Fr, *p = x + 9 * Fr, *dp = x + 12 * Fr;
    double *w = x + 15 * Fr, *dw = x + 16 * Fr;
    for (int64_t f = 0; f < F; f++) w[f] = read(weight + f), dw[f] = read(h_weight + f);
    for (int64_t atom = n * thread / threads; atom < n * (thread + 1) / threads; atom++) {
      const Saved& own = saved[atom];
      double mean_p[3], mean_dp[3];
      for (int i = 0; i < 3; i++) {
        const int64_t row = (3 * atom + i) * F;
        for (int64_t f = 0; f < F; f++) {
          x[i * Fr + f] = read(vec + row + f) - own.means[i], dx[i * Fr + f] = read(h_vec + row + f);
          g[i * Fr + f] = read(gradient + row + f);
          p[i * Fr + f] = g[i * Fr + f] * w[f], dp[i * Fr + f] = g[i * Fr + f] * dw[f];
        }
        const double mean = sum(dx + i * Fr, Fr) / F;
        for (int64_t f = 0; f < F; f++) dx[i * Fr + f] -= mean;
        mean_p[i] = sum(p + i * Fr, Fr) / F, mean_dp[i] = sum(dp + i * Fr, Fr) / F;
      }
      Matrix product, dproduct, more, dC, e, de, dc, root, droot, slope, dslope;
      outer(dx, x, Fr, dC), outer(p, x, Fr, product), outer(dp, x, Fr, dproduct), outer(p, dx, Fr, more);
      for (int i = 0; i < 3; i++)
        for (int j = 0; j < 3; j++) dproduct[i][j] += more[i][j];
      turn_both(own.vectors, dC, dc), turn_both(own.vectors, product, e), turn_both(own.vectors, dproduct, de);
      double roots[3];
      for (int k = 0; k < 3; k++) roots[k] = std::sqrt(own.values[k]);
      Matrix middle, dmiddle, dmiddle_root;
      for (int k = 0; k < 3; k++)
        for (int l = 0; l < 3; l++) {
          const double first = loewner(roots[k], roots[l]);
          dmiddle_root[k][l] = first * dc[k][l] / F, middle[k][l] = first * e[k][l] / F;
          dmiddle[k][l] = first * de[k][l] / F;
          for (int m = 0; m < 3; m++)
            dmiddle[k][l] += loewner(roots[k], roots[m], roots[l]) * (e[k][m] * dc[m][l] + dc[k][m] * e[m][l]) / F / F;
        }
      inverse_root(own, root), turn_back(own.vectors, dmiddle_root, droot);
      turn_back(own.vectors, middle, slope), turn_back(own.vectors, dmiddle, dslope);
      for (int i = 0; i < 3; i++) {
        const int64_t row = (3 * atom + i) * F;
        double mean = 0;
        for (int j = 0; j < 3; j++) mean += droot[i][j] * mean_p[j] + root[i][j] * mean_dp[j];
        for (int64_t f = 0; f < F; f++) {
          double y = 0, dy = 0, to = -mean;
          for (int j = 0; j < 3; j++) {
            const int64_t at = j * Fr + f;
            y += root[i][j] * x[at], dy += droot[i][j] * x[at] + root[i][j] * dx[at];
            to += droot[i][j] * p[at] + root[i][j] * dp[at] + dslope[i][j] * x[at] + slope[i][j] * dx[at];
          }
          write(to_gradient + row + f, dy * w[f] + y * dw[f]), write(to_vec + row + f, to);
          part[f] += g[i * Fr + f] * dy;
        }
      }
    }
  }
  add_parts(parts, threads, F, to_weight);
}

// vec, gradient, result, to_vec, h_vec, to_gradient [n, 3, F]; weight, to_weight, h_weight [F]; regular [3]; saved [n, 15].
extern "C" void whiten(const void* vec, const void* weight, const double* regular, void* result, Saved* saved, int64_t n,
                       int64_t F, int64_t bf16, int64_t threads) {
  if (bf16)
    forward(threads, n, F, (const uint16_t*)vec, (const uint16_t*)weight, regular, (uint16_t*)result, saved);
  else
    forward(threads, n, F, (const float*)vec, (const float*)weight, regular, (float*)result, saved);
}

extern "C" void whiten_backward(const void* gradient, const void* vec, const void* weight, const Saved* saved,
                                void* to_vec, void* to_weight, int64_t n, int64_t F, int64_t bf16, int64_t threads) {
  if (bf16)
    backward(threads, n, F, (const uint16_t*)gradient, (const uint16_t*)vec, (const uint16_t*)weight, saved,
             (uint16_t*)to_vec, (uint16_t*)to_weight);
  else
    backward(threads, n, F, (const float*)gradient, (const float*)vec, (const float*)weight, saved, (float*)to_vec,
             (float*)to_weight);
}

extern "C" void whiten_second(const void* h_vec, const void* h_weight, const void* gradient, const void* vec,
                              const void* weight, const Saved* saved, void* to_gradient, void* to_vec, void* to_weight,
                              int64_t n, int64_t F, int64_t bf16, int64_t threads) {
  if (bf16)
    second(threads, n, F, (const uint16_t*)h_vec, (const uint16_t*)h_weight, (const uint16_t*)gradient,
           (const uint16_t*)vec, (const uint16_t*)weight, saved, (uint16_t*)to_gradient, (uint16_t*)to_vec,
           (uint16_t*)to_weight);
  else
    second(threads, n, F, (const float*)h_vec, (const float*)h_weight, (const float*)gradient, (const float*)vec,
           (const float*)weight, saved, (float*)to_gradient, (float*)to_vec, (float*)to_weight);
}
