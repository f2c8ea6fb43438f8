// The GPU's search of radius_graph.h, run by the host: the same calls as radius_graph.cu's, over all atoms in turn.
#include "radius_graph.h"

extern "C" int mspt_cells(
    const double* positions, const int64_t* ptr, const int64_t* molecule, const double* low, const double* high,
    int64_t n, double cutoff, int64_t* cell, void*) {
    Atoms atoms{positions, ptr, molecule, low, high, nullptr, nullptr};
    for (int64_t atom = 0; atom < n; atom++) cell[atom] = global_cell(atoms, atom, cutoff);
    return 0;
}

extern "C" int mspt_count(
    const double* positions, const int64_t* ptr, const int64_t* molecule, const double* low, const double* high,
    const int64_t* order, const int64_t* cell_start, int64_t n, double cutoff, bool loop, int64_t* counts, void*) {
    Atoms atoms{positions, ptr, molecule, low, high, order, cell_start};
    for (int64_t atom = 0; atom < n; atom++) counts[atom] = count_near(atoms, atom, cutoff, loop);
    return 0;
}

extern "C" int mspt_fill(
    const double* positions, const int64_t* ptr, const int64_t* molecule, const double* low, const double* high,
    const int64_t* order, const int64_t* cell_start, int64_t n, double cutoff, bool loop, const int64_t* starts,
    int64_t* sources, double* distances, void*) {
    Atoms atoms{positions, ptr, molecule, low, high, order, cell_start};
    for (int64_t atom = 0; atom < n; atom++) {
        int64_t start = starts[atom];
        fill_near(atoms, atom, cutoff, loop, starts[atom + 1] - start, sources + start, distances + start);
    }
    return 0;
}
