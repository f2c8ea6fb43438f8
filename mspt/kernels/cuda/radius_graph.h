// How the radius graph is found, atom by atom; for the GPU, and for the host, where the tests run it.
//
// Each molecule has a grid of cells whose edges are no shorter than the cut-off, so that an atom's neighbours lie in its
// cell and those around it. A molecule of n atoms has at most n cells, numbered from its first atom's index: no sum over
// molecules is needed to number them. A small molecule is one cell, and all its pairs are tried.
#pragma once
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define BOTH __host__ __device__ inline
#else
#define BOTH inline
#endif

// Atoms up to which a molecule is one cell: trying all pairs is cheaper than visiting 27 cells.
constexpr int64_t ONE_CELL = 64;

struct Grid {
    double low[3];   // corner, Å
    double edge;     // of a cell, Å
    int64_t dims[3]; // cells along each axis
};

// low, high [3]: the box around a molecule's atoms.
BOTH Grid make_grid(const double* low, const double* high, int64_t atoms, double cutoff) {
    Grid grid{{low[0], low[1], low[2]}, cutoff * (1 + 1e-9), {1, 1, 1}};
    if (atoms <= ONE_CELL) return grid;
    // Where atoms are sparse, cells grow until there are no more of them than atoms.
    for (;; grid.edge *= 1.25) {
        double cells = 1;
        for (int axis = 0; axis < 3; axis++) cells *= fmax(floor((high[axis] - low[axis]) / grid.edge), 1.0);
        if (!(cells > double(atoms))) break;
    }
    for (int axis = 0; axis < 3; axis++)
        grid.dims[axis] = int64_t(fmax(floor((high[axis] - low[axis]) / grid.edge), 1.0));
    return grid;
}

// Along one axis; what lies beyond the last whole cell belongs to it.
BOTH int64_t step_of(const Grid& grid, const double* position, int axis) {
    double step = floor((position[axis] - grid.low[axis]) / grid.edge);
    return int64_t(fmin(fmax(step, 0.0), double(grid.dims[axis] - 1)));
}

BOTH int64_t cell_of(const Grid& grid, const double* position) {
    int64_t x = step_of(grid, position, 0), y = step_of(grid, position, 1), z = step_of(grid, position, 2);
    return (x * grid.dims[1] + y) * grid.dims[2] + z;
}

BOTH double distance(const double* a, const double* b) {
    double x = a[0] - b[0], y = a[1] - b[1], z = a[2] - b[2];
    return sqrt(x * x + y * y + z * z);
}

// The atoms as the search sees them: positions [n, 3]; ptr [m + 1] and molecule [n]; the boxes low, high [m, 3]; order
// [n], the atoms sorted by cell, and cell_start [n + 1], where each cell begins in it.
struct Atoms {
    const double* positions;
    const int64_t *ptr, *molecule;
    const double *low, *high;
    const int64_t *order, *cell_start;
};

BOTH Grid grid_of(const Atoms& atoms, int64_t atom, double cutoff) {
    int64_t m = atoms.molecule[atom];
    return make_grid(atoms.low + 3 * m, atoms.high + 3 * m, atoms.ptr[m + 1] - atoms.ptr[m], cutoff);
}

// The number of an atom's cell among those of all molecules.
BOTH int64_t global_cell(const Atoms& atoms, int64_t atom, double cutoff) {
    return atoms.ptr[atoms.molecule[atom]] + cell_of(grid_of(atoms, atom, cutoff), atoms.positions + 3 * atom);
}

// Calls visit(source, distance) for every atom nearer than cutoff; an atom itself, with loop, has distance -1.
template <class Visit>
BOTH void for_each_near(const Atoms& atoms, int64_t atom, double cutoff, bool loop, Visit visit) {
    const Grid grid = grid_of(atoms, atom, cutoff);
    const double* here = atoms.positions + 3 * atom;
    const int64_t first = atoms.ptr[atoms.molecule[atom]];
    int64_t from[3], to[3];
    for (int axis = 0; axis < 3; axis++) {
        int64_t step = step_of(grid, here, axis);
        from[axis] = step > 0 ? step - 1 : 0;
        to[axis] = step + 1 < grid.dims[axis] ? step + 1 : step;
    }
    for (int64_t x = from[0]; x <= to[0]; x++)
        for (int64_t y = from[1]; y <= to[1]; y++) {
            // Cells next to each other along z are next to each other in order.
            int64_t row = first + (x * grid.dims[1] + y) * grid.dims[2];
            for (int64_t at = atoms.cell_start[row + from[2]]; at < atoms.cell_start[row + to[2] + 1]; at++) {
                int64_t source = atoms.order[at];
                if (source == atom) {
                    if (loop) visit(source, -1.0);
                    continue;
                }
                double r = distance(atoms.positions + 3 * source, here);
                if (r < cutoff) visit(source, r);
            }
        }
}

BOTH int64_t count_near(const Atoms& atoms, int64_t atom, double cutoff, bool loop) {
    int64_t count = 0;
    for_each_near(atoms, atom, cutoff, loop, [&](int64_t, double) { count++; });
    return count;
}

// The kept nearest by (distance, index) into sources [kept], ascending; distances [kept]: room to work in.
BOTH void fill_near(
    const Atoms& atoms, int64_t atom, double cutoff, bool loop, int64_t kept, int64_t* sources, double* distances) {
    int64_t count = 0;
    for_each_near(atoms, atom, cutoff, loop, [&](int64_t source, double r) {
        int64_t at = count < kept ? count++ : kept;
        // Move farther ones up; when the list is full, the last one falls off.
        for (; at > 0 && (r < distances[at - 1] || (r == distances[at - 1] && source < sources[at - 1])); at--)
            if (at < kept) distances[at] = distances[at - 1], sources[at] = sources[at - 1];
        if (at < kept) distances[at] = r, sources[at] = source;
    });
    for (int64_t i = 1; i < count; i++) {
        int64_t source = sources[i], at = i;
        for (; at > 0 && source < sources[at - 1]; at--) sources[at] = sources[at - 1];
        sources[at] = source;
    }
}
