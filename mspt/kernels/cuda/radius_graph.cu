// The radius graph on a GPU: one thread an atom. Arrays as in radius_graph.h; each function returns a cudaError_t.
#include "radius_graph.h"
#include <cuda_runtime.h>

constexpr int THREADS = 128;

__device__ int64_t this_thread() { return blockIdx.x * int64_t(blockDim.x) + threadIdx.x; }

__global__ void __launch_bounds__(THREADS) cells_kernel(Atoms atoms, int64_t n, double cutoff, int64_t* cell) {
    int64_t atom = this_thread();
    if (atom < n) cell[atom] = global_cell(atoms, atom, cutoff);
}

__global__ void __launch_bounds__(THREADS) count_kernel(Atoms atoms, int64_t n, double cutoff, bool loop, int64_t* counts) {
    int64_t atom = this_thread();
    if (atom < n) counts[atom] = count_near(atoms, atom, cutoff, loop);
}

__global__ void __launch_bounds__(THREADS) fill_kernel(
    Atoms atoms, int64_t n, double cutoff, bool loop, const int64_t* starts, int64_t* sources, double* distances) {
    int64_t atom = this_thread();
    if (atom >= n) return;
    int64_t start = starts[atom];
    fill_near(atoms, atom, cutoff, loop, starts[atom + 1] - start, sources + start, distances + start);
}

static unsigned blocks(int64_t n) { return unsigned((n + THREADS - 1) / THREADS); }

extern "C" int mspt_cells(
    const double* positions, const int64_t* ptr, const int64_t* molecule, const double* low, const double* high,
    int64_t n, double cutoff, int64_t* cell, cudaStream_t stream) {
    Atoms atoms{positions, ptr, molecule, low, high, nullptr, nullptr};
    cells_kernel<<<blocks(n), THREADS, 0, stream>>>(atoms, n, cutoff, cell);
    return cudaGetLastError();
}

extern "C" int mspt_count(
    const double* positions, const int64_t* ptr, const int64_t* molecule, const double* low, const double* high,
    const int64_t* order, const int64_t* cell_start, int64_t n, double cutoff, bool loop, int64_t* counts,
    cudaStream_t stream) {
    Atoms atoms{positions, ptr, molecule, low, high, order, cell_start};
    count_kernel<<<blocks(n), THREADS, 0, stream>>>(atoms, n, cutoff, loop, counts);
    return cudaGetLastError();
}

extern "C" int mspt_fill(
    const double* positions, const int64_t* ptr, const int64_t* molecule, const double* low, const double* high,
    const int64_t* order, const int64_t* cell_start, int64_t n, double cutoff, bool loop, const int64_t* starts,
    int64_t* sources, double* distances, cudaStream_t stream) {
    Atoms atoms{positions, ptr, molecule, low, high, order, cell_start};
    fill_kernel<<<blocks(n), THREADS, 0, stream>>>(atoms, n, cutoff, loop, starts, sources, distances);
    return cudaGetLastError();
}
