// The three matrix products of a linear layer, y = x Wᵀ + b and, of a gradient g of y, g W and gᵀ x, on CPUs whose matrix
// unit (AMX) multiplies bfloat16.
//
// A float is the sum of three bfloat16 numbers, exactly: its leading, middle and last eight bits. Of the nine products of
// two such sums the three smallest, 2^-24 of the whole, are left out; sums are in float. So results are as near to the
// true ones as those of float arithmetic.
//
// What is multiplied lies packed in tiles of 16 lines of 16 pairs of numbers, a pair's numbers 16 apart along what is
// summed over; a tile's three parts one after the other. Of the left matrix a line is a row, of the right one a pair of
// rows. y and g may lie block by block of their columns, [blocks, M, width].
//
// Legend: M rows of x, K inputs, N = blocks * width outputs.
#include "simd.h"

#if defined(__AVX512F__) && defined(__linux__) && !defined(__clang__) && __has_include(<amxbf16intrin.h>)
#include <sys/syscall.h>
#include <unistd.h>
#include <algorithm>
#include <utility>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif
#pragma GCC target("amx-tile,amx-bf16")

namespace {

constexpr int64_t LINE = 16, CHUNK = 32, BLOCK = 32;  // pairs a tile; numbers summed over a tile; rows, columns of a block
constexpr int64_t TILE = LINE * LINE, PACKED = 2 * 3 * TILE;  // 32-bit words: of a tile; of a block's two, in three parts
constexpr int64_t DEPTH = 256, GROUP = 4;  // at most so much is summed before sums leave the unit; blocks of rows at a time
using F = Lanes<16>::F;
using I = Lanes<16>::I;

// Scratch memory aligned to cache lines and kept between calls: fresh pages would cost more than the packing.
int32_t* scratch(int number, size_t size) {
  static thread_local std::vector<int32_t> buffers[2];
  std::vector<int32_t>& buffer = buffers[number];
  if (buffer.size() < size + 32) buffer.resize(size + 32);
  return (int32_t*)(((uintptr_t)buffer.data() + 63) & ~(uintptr_t)63);
}

int64_t parts(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Calls work(from, to) for pieces of a sum over count numbers, about even and at most DEPTH.
template <class Work> void pieces(int64_t count, Work work) {
  const int64_t step = parts(parts(count, CHUNK), parts(count, DEPTH)) * CHUNK;
  for (int64_t from = 0; from < count; from += step) work(from, std::min(count, from + step));
}

// Calls work(from, to) on every thread's even share of count.
template <class Work> void share(int64_t count, Work work) {
#ifdef _OPENMP
  int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
#else
  int64_t thread = 0, threads = 1;
#endif
  work(count * thread / threads, count * (thread + 1) / threads);
}

INLINE F leading(F x) { return (F)((I)x & (int32_t)0xffff0000); }
INLINE I pair(F first, F second) { return ((I)first >> 16 & 0xffff) | (I)second; }

template <size_t... i> INLINE void interleave(I a, I b, I& low, I& high, std::index_sequence<i...>) {
  low = __builtin_shuffle(a, b, I{(int32_t)(i / 2 + i % 2 * LINE)...});
  high = __builtin_shuffle(a, b, I{(int32_t)(LINE / 2 + i / 2 + i % 2 * LINE)...});
}

// Interleaving both halves of the lines log 16 times is a transposition.
void transpose(int32_t* tile) {
  I a[LINE], b[LINE];
  memcpy(a, tile, sizeof a);
#pragma GCC unroll 4
  for (int step = 0; step < 4; step++) {
#pragma GCC unroll 8
    for (int i = 0; i < LINE / 2; i++) interleave(a[i], a[i + LINE / 2], b[2 * i], b[2 * i + 1], std::make_index_sequence<LINE>{});
#pragma GCC unroll 16
    for (int i = 0; i < LINE; i++) a[i] = b[i];
  }
  memcpy(tile, a, sizeof a);
}

// A matrix of which one index, up to count, is kept by a product, and the other, up to depth, is summed over. along: the
// latter runs along the lines of memory.
struct Source {
  const float* at;
  int64_t line, count, depth;
  bool along;

  const float* from(int64_t i, int64_t k) const { return at + (along ? i * line + k : k * line + i); }
};

// Up to 16 x 32 numbers from (i, k), zeros beyond, as the three parts of a tile of the left or the right matrix.
void pack_tile(const Source& source, int64_t i, int64_t k, bool left, int32_t* to) {
  const float* from = source.from(i, k);
  int64_t line = source.line, count = std::min(LINE, source.count - i), depth = std::min(CHUNK, source.depth - k);
  float whole[LINE * CHUNK];
  if (count < LINE || depth < CHUNK) {
    const int64_t across = source.along ? count : depth, length = source.along ? depth : count;
    memset(whole, 0, sizeof whole);
    for (int64_t l = 0; l < across; l++)
      for (int64_t f = 0; f < length; f++) whole[l * (source.along ? CHUNK : LINE) + f] = from[l * line + f];
    from = whole, line = source.along ? CHUNK : LINE;
  }
  const float* second = from + LINE * (source.along ? 1 : line);
  for (int64_t l = 0; l < LINE; l++) {
    F a = load<LINE>(from + l * line).v, b = load<LINE>(second + l * line).v;
    for (int part = 0; part < 3; part++) {
      I both = pair(leading(a), leading(b));
      memcpy(to + part * TILE + l * LINE, &both, sizeof both);
      a -= leading(a), b -= leading(b);
    }
  }
  if (left != source.along)
    for (int part = 0; part < 3; part++) transpose(to + part * TILE);
}

// Blocks of 32 of what is kept, up to count of them, and within one chunks of what is summed over, from (i, k).
void pack(const Source& source, int64_t i, int64_t count, int64_t k, int64_t depth, bool left, int32_t* to) {
  for (int64_t end = i + count; i < end; i += BLOCK)
    for (int64_t at = k; at < k + depth; at += CHUNK, to += PACKED)
      for (int64_t half = 0; half < 2; half++) pack_tile(source, i + half * LINE, at, left, to + half * PACKED / 2);
}

// One part of a block of the left and of the right matrix goes into the unit's registers 4 to 7; 0 to 3 are the sums.
INLINE void read_left(const int32_t* part) {
  _tile_loadd(4, part, 4 * LINE);
  _tile_loadd(5, part + 3 * TILE, 4 * LINE);
}
INLINE void read_right(const int32_t* part) {
  _tile_loadd(6, part, 4 * LINE);
  _tile_loadd(7, part + 3 * TILE, 4 * LINE);
}
INLINE void multiply_tiles() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// c [32, 32], its rows line apart, = c itself (add), or start in every row, or else zeros, + left right of so many chunks.
void block(int64_t chunks, const int32_t* left, const int32_t* right, float* c, int64_t line, bool add, const float* start) {
  if (add || start) {
    const int64_t stride = add ? 4 * line : 0;
    const float *lower = add ? c + LINE * line : start, *upper = add ? c : start;
    _tile_loadd(0, upper, stride);
    _tile_loadd(1, upper + LINE, stride);
    _tile_loadd(2, lower, stride);
    _tile_loadd(3, lower + LINE, stride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  // A new result's memory is far away: ask for it before it is written.
  for (int64_t i = 0; start && !add && i < BLOCK; i++) __builtin_prefetch(c + i * line, 1), __builtin_prefetch(c + i * line + LINE, 1);
  for (int64_t k = 0; k < chunks; k++, left += PACKED, right += PACKED) {
    read_left(left + 2 * TILE), read_right(right), multiply_tiles();
    read_left(left + TILE), multiply_tiles();
    read_right(right + TILE), multiply_tiles();
    read_left(left), multiply_tiles();
    read_right(right), multiply_tiles();
    read_right(right + 2 * TILE), multiply_tiles();
  }
  _tile_stored(0, c, 4 * line);
  _tile_stored(1, c + LINE, 4 * line);
  _tile_stored(2, c + LINE * line, 4 * line);
  _tile_stored(3, c + LINE * line + LINE, 4 * line);
}

// c [rows, columns] = c itself (add), or starts [columns up to whole blocks] in every row, or else zeros, + the product of
// what is packed.
void multiply(int64_t rows, int64_t columns, int64_t depth, const int32_t* left, const int32_t* right, float* c, int64_t line, bool add, const float* starts) {
  const int64_t chunks = parts(depth, CHUNK);
  pieces(depth, [&](int64_t from, int64_t to) {
    for (int64_t j = 0; j < columns; j += BLOCK)
      for (int64_t i = 0; i < rows; i += BLOCK) {
        const int32_t *a = left + (i / BLOCK * chunks + from / CHUNK) * PACKED, *b = right + (j / BLOCK * chunks + from / CHUNK) * PACKED;
        const int64_t steps = parts(to - from, CHUNK), height = std::min(BLOCK, rows - i), width = std::min(BLOCK, columns - j);
        float* out = c + i * line + j;
        const float* start = starts ? starts + j : nullptr;
        if (height == BLOCK && width == BLOCK) {
          block(steps, a, b, out, line, add || from > 0, start);
          continue;
        }
        float sums[BLOCK * BLOCK];
        for (int64_t r = 0; r < BLOCK; r++)
          for (int64_t f = 0; f < BLOCK; f++)
            sums[r * BLOCK + f] = !(add || from > 0) ? (start ? start[f] : 0) : r < height && f < width ? out[r * line + f] : 0;
        block(steps, a, b, sums, BLOCK, true, nullptr);
        for (int64_t r = 0; r < height; r++) memcpy(out + r * line, sums + r * BLOCK, 4 * width);
      }
  });
}

// Within one of these a thread's matrix unit may be used.
struct Unit {
  Unit() {
    struct {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } shapes;
    for (int tile = 0; tile < 8; tile++) shapes.bytes[tile] = 64, shapes.rows[tile] = 16;
    _tile_loadconfig(&shapes);
  }
  ~Unit() { _tile_release(); }
};

}  // namespace

extern "C" {

// Whether this process may use the matrix unit; asks the kernel for it.
int linear_ready() {
  const long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA of asm/prctl.h
  return __builtin_cpu_supports("amx-bf16") && syscall(SYS_arch_prctl, request, tile_data) == 0;
}

// x [M, K], weight [N, K], bias [N] or null -> y [blocks, M, width].
void linear_forward(const float* x, const float* weight, const float* bias, float* y, int64_t M, int64_t K, int64_t blocks, int64_t width, int64_t threads) {
  const int64_t chunks = parts(K, CHUNK), panels = parts(width, BLOCK);
  int32_t* right = scratch(0, blocks * panels * chunks * PACKED);
  std::vector<float> starts(blocks * panels * BLOCK);
  for (int64_t b = 0; bias && b < blocks; b++) memcpy(&starts[b * panels * BLOCK], bias + b * width, 4 * width);
#pragma omp parallel num_threads(threads)
  {
    Unit unit;
    int32_t* left = scratch(1, GROUP * chunks * PACKED);
#pragma omp for collapse(2)
    for (int64_t b = 0; b < blocks; b++)
      for (int64_t p = 0; p < panels; p++)
        pack({weight + b * width * K, K, width, K, true}, p * BLOCK, 1, 0, K, false, right + (b * panels + p) * chunks * PACKED);
    share(parts(M, BLOCK), [&](int64_t from, int64_t to) {
      for (int64_t m = from * BLOCK; m < std::min(M, to * BLOCK); m += GROUP * BLOCK) {
        const int64_t rows = std::min(std::min(M, to * BLOCK) - m, GROUP * BLOCK);
        pack({x, K, M, K, true}, m, rows, 0, K, true, left);
        for (int64_t b = 0; b < blocks; b++)
          multiply(rows, width, K, left, right + b * panels * chunks * PACKED, y + (b * M + m) * width, width, false, &starts[b * panels * BLOCK]);
      }
    });
  }
}

// g [blocks, M, width], weight [N, K] -> the gradient of x [M, K].
void linear_backward_input(const float* g, const float* weight, float* to_x, int64_t M, int64_t K, int64_t blocks, int64_t width, int64_t threads) {
  const int64_t chunks = parts(width, CHUNK), panels = parts(K, BLOCK);
  int32_t* right = scratch(0, blocks * panels * chunks * PACKED);
#pragma omp parallel num_threads(threads)
  {
    Unit unit;
    int32_t* left = scratch(1, GROUP * chunks * PACKED);
#pragma omp for collapse(2)
    for (int64_t b = 0; b < blocks; b++)
      for (int64_t p = 0; p < panels; p++)
        pack({weight + b * width * K, K, K, width, false}, p * BLOCK, 1, 0, width, false, right + (b * panels + p) * chunks * PACKED);
    share(parts(M, BLOCK), [&](int64_t from, int64_t to) {
      for (int64_t m = from * BLOCK; m < std::min(M, to * BLOCK); m += GROUP * BLOCK)
        for (int64_t b = 0; b < blocks; b++) {
          const int64_t rows = std::min(std::min(M, to * BLOCK) - m, GROUP * BLOCK);
          pack({g + b * M * width, width, M, width, true}, m, rows, 0, width, true, left);
          multiply(rows, K, width, left, right + b * panels * chunks * PACKED, to_x + m * K, K, b > 0, nullptr);
        }
    });
  }
}

// g [blocks, M, width], x [M, K] -> the gradients of weight [N, K] and, unless null, bias [N].
void linear_backward_weight(const float* g, const float* x, float* to_weight, float* to_bias, int64_t M, int64_t K, int64_t blocks, int64_t width, int64_t threads) {
  const int64_t units = parts(width, BLOCK), panels = parts(K, BLOCK);
#pragma omp parallel num_threads(threads)
  {
    Unit unit;
    int32_t *right = scratch(0, panels * DEPTH / CHUNK * PACKED), *left = scratch(1, DEPTH / CHUNK * PACKED);
    share(blocks * units, [&](int64_t from, int64_t to) {
      pieces(M, [&](int64_t m, int64_t end) {
        pack({x, K, K, M, false}, 0, K, m, end - m, false, right);
        for (int64_t u = from; u < to; u++) {
          const int64_t b = u / units, n = u % units * BLOCK, rows = std::min(BLOCK, width - n);
          const Source columns{g + b * M * width, width, width, M, false};
          pack(columns, n, rows, m, end - m, true, left);
          multiply(rows, K, end - m, left, right, to_weight + (b * width + n) * K, K, m > 0, nullptr);
          if (!to_bias) continue;
          float sums[BLOCK] = {};
          for (int64_t k = m; k < end; k++)
            for (int64_t i = 0; i < rows; i++) sums[i] += columns.from(n, k)[i];
          for (int64_t i = 0; i < rows; i++) to_bias[b * width + n + i] = sums[i] + (m ? to_bias[b * width + n + i] : 0);
        }
      });
    });
  }
}
}
#else
extern "C" int linear_ready() { return 0; }
#endif
