// Neighbours within a cut-off, the pairs they form, and the tiles that the message pass works through.
//
// A tile is a molecule or, of a large one, a box of its atoms ("own") with the atoms that they share an edge with. What
// a kernel needs of a tile (features, gates of its pairs) fits into a core's cache, whatever the system's size.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

namespace {

constexpr int64_t WHOLE = 192;  // molecules of at most so many atoms are one tile, and are searched pair by pair
constexpr size_t BOX = 128;     // own atoms of a tile of a larger one

struct Graph {
  std::vector<int64_t> source, target, ptr, first, second;
  std::vector<int32_t> pair;
  // Of tiles: own atoms (prefix sums), local atoms (own ones first), local pairs, and for each own atom the edges that
  // end there and those that start there, as (local number of the other atom, signed local pair).
  std::vector<int32_t> own_ptr, atom_ptr, atoms, pair_ptr, pairs, in_ptr, in_atom, in_pair, out_ptr, out_atom, out_pair;
};

using Near = std::pair<double, int64_t>;  // distance, atom

double distance(const double* x, int64_t i, int64_t j) {
  double a = x[3 * j] - x[3 * i], b = x[3 * j + 1] - x[3 * i + 1], c = x[3 * j + 2] - x[3 * i + 2];
  return std::sqrt(a * a + b * b + c * c);
}

// Atoms of a large system sorted into cubes as wide as the cut-off.
struct Cells {
  int64_t size[3];
  double low[3], width;
  std::vector<int64_t> start, order;

  Cells(const double* x, int64_t begin, int64_t end, double cutoff) : width(cutoff) {
    for (int c = 0; c < 3; c++) {
      double high = low[c] = x[3 * begin + c];
      for (int64_t i = begin; i < end; i++) low[c] = std::min(low[c], x[3 * i + c]), high = std::max(high, x[3 * i + c]);
      // Where atoms are scattered, wider cells keep their number near that of the atoms.
      size[c] = 1 + (int64_t)std::min((high - low[c]) / width, 1024.0 * 1024.0);
    }
    while (size[0] * size[1] * size[2] > 4 * (end - begin) + 64) {
      width *= 2;
      for (int c = 0; c < 3; c++) size[c] = 1 + size[c] / 2;
    }
    std::vector<std::pair<int64_t, int64_t>> keyed;
    for (int64_t i = begin; i < end; i++) keyed.push_back({number(x + 3 * i), i});
    std::sort(keyed.begin(), keyed.end());
    start.assign(size[0] * size[1] * size[2] + 1, 0);
    for (auto& k : keyed) start[k.first + 1]++, order.push_back(k.second);
    for (size_t c = 1; c < start.size(); c++) start[c] += start[c - 1];
  }
  int64_t along(const double* p, int c) const {
    return std::min(std::max((int64_t)((p[c] - low[c]) / width), (int64_t)0), size[c] - 1);
  }
  int64_t number(const double* p) const { return (along(p, 0) * size[1] + along(p, 1)) * size[2] + along(p, 2); }
};

void search(const double* x, int64_t begin, int64_t end, int64_t i, const Cells* cells, double cutoff, bool loop,
            std::vector<Near>& near) {
  near.clear();
  auto consider = [&](int64_t j) {
    if (i == j) {
      if (loop) near.push_back({-1.0, i});  // an atom is nearer to itself than any other can be
      return;
    }
    double r = distance(x, i, j);
    if (r < cutoff) near.push_back({r, j});
  };
  if (!cells) {
    for (int64_t j = begin; j < end; j++) consider(j);
    return;
  }
  int64_t at[3];
  for (int c = 0; c < 3; c++) at[c] = cells->along(x + 3 * i, c);
  for (int64_t a = std::max(at[0] - 1, (int64_t)0); a <= std::min(at[0] + 1, cells->size[0] - 1); a++)
    for (int64_t b = std::max(at[1] - 1, (int64_t)0); b <= std::min(at[1] + 1, cells->size[1] - 1); b++) {
      int64_t row = (a * cells->size[1] + b) * cells->size[2];
      int64_t from = row + std::max(at[2] - 1, (int64_t)0), to = row + std::min(at[2] + 1, cells->size[2] - 1) + 1;
      for (int64_t k = cells->start[from]; k < cells->start[to]; k++) consider(cells->order[k]);
    }
}

// Atoms of a large system in the order of a curve that fills space, so that boxes of consecutive ones are compact.
std::vector<int64_t> along_a_curve(const double* x, int64_t begin, int64_t end, const Cells& cells) {
  std::vector<std::pair<uint64_t, int64_t>> keyed;
  for (int64_t i = begin; i < end; i++) {
    uint64_t key = 0;
    for (int bit = 20; bit >= 0; bit--)
      for (int c = 0; c < 3; c++) {
        // Half cells: a box of 128 atoms is smaller than a cell and its neighbours.
        auto half = (uint64_t)((x[3 * i + c] - cells.low[c]) * 2 / cells.width);
        key = key << 1 | (half >> bit & 1);
      }
    keyed.push_back({key, i});
  }
  std::sort(keyed.begin(), keyed.end());
  std::vector<int64_t> order;
  for (auto& k : keyed) order.push_back(k.second);
  return order;
}

struct Edge {
  int64_t other;
  int32_t pair;  // signed, as seen from an edge that ends at this atom
};

void add_tile(Graph& g, const double* x, const int64_t* own, size_t count, const std::vector<std::vector<Edge>>& in,
              const std::vector<std::vector<Edge>>& out, std::vector<int32_t>& atom_at, std::vector<int32_t>& pair_at) {
  size_t atoms = g.atoms.size(), pairs = g.pairs.size();
  auto local_atom = [&](int64_t i) {
    if (atom_at[i] < 0) atom_at[i] = g.atoms.size() - atoms, g.atoms.push_back(i);
    return atom_at[i];
  };
  auto local_pair = [&](int32_t signed_pair) {
    if (!signed_pair) return 0;
    int32_t number = pair_at[std::abs(signed_pair) - 1] + 1;
    return signed_pair > 0 ? number : -number;
  };
  for (size_t k = 0; k < count; k++) local_atom(own[k]);
  // Pairs by distance: one after the other they need the same rows of the table of gates.
  std::vector<Near> met;
  for (auto* lists : {&in, &out})
    for (size_t k = 0; k < count; k++)
      for (auto& e : (*lists)[own[k]])
        if (e.pair && pair_at[std::abs(e.pair) - 1] < 0) {
          pair_at[std::abs(e.pair) - 1] = 0;
          met.push_back({distance(x, own[k], e.other), std::abs(e.pair) - 1});
        }
  std::sort(met.begin(), met.end());
  for (auto& p : met) pair_at[p.second] = g.pairs.size() - pairs, g.pairs.push_back(p.second);
  auto edges = [&](const std::vector<std::vector<Edge>>& lists, std::vector<int32_t>& ptr, std::vector<int32_t>& atom,
                   std::vector<int32_t>& pair) {
    for (size_t k = 0; k < count; k++) {
      for (auto& e : lists[own[k]]) atom.push_back(local_atom(e.other)), pair.push_back(local_pair(e.pair));
      ptr.push_back(atom.size());
    }
  };
  edges(in, g.in_ptr, g.in_atom, g.in_pair);
  edges(out, g.out_ptr, g.out_atom, g.out_pair);
  for (size_t k = atoms; k < g.atoms.size(); k++) atom_at[g.atoms[k]] = -1;
  for (size_t k = pairs; k < g.pairs.size(); k++) pair_at[g.pairs[k]] = -1;
  g.own_ptr.push_back(g.own_ptr.back() + count);
  g.atom_ptr.push_back(g.atoms.size());
  g.pair_ptr.push_back(g.pairs.size());
}

Graph* build(const double* x, const int64_t* molecules, int64_t m, double cutoff, int64_t most, bool loop) {
  Graph& g = *new Graph;
  int64_t n = molecules[m];
  g.ptr.push_back(0);
  for (auto* ptr : {&g.own_ptr, &g.atom_ptr, &g.pair_ptr, &g.in_ptr, &g.out_ptr}) ptr->push_back(0);
  std::vector<std::vector<Edge>> in(n), out(n);
  std::vector<std::vector<int64_t>> boxes(m);  // of large systems: their atoms in an order that keeps neighbours close
  std::vector<Near> near;
  for (int64_t k = 0; k < m; k++) {
    int64_t begin = molecules[k], end = molecules[k + 1];
    bool large = end - begin > WHOLE;
    std::vector<Cells> cells;
    if (large) cells.emplace_back(x, begin, end, cutoff), boxes[k] = along_a_curve(x, begin, end, cells[0]);
    for (int64_t i = begin; i < end; i++) {
      search(x, begin, end, i, large ? &cells[0] : nullptr, cutoff, loop, near);
      if ((int64_t)near.size() > most) {
        std::nth_element(near.begin(), near.begin() + most, near.end());
        near.resize(most);
      }
      for (auto& e : near) in[i].push_back({e.second, 0});
      std::sort(in[i].begin(), in[i].end(), [](const Edge& a, const Edge& b) { return a.other < b.other; });
      g.ptr.push_back(g.ptr.back() + in[i].size());
    }
  }
  // Sources ascend within in[i], and so do targets within out[j].
  for (int64_t i = 0; i < n; i++)
    for (auto& e : in[i]) out[e.other].push_back({i, 0});
  // Pair numbers, in the order of (first, second): a pair is met from its first atom, by whichever edge there is.
  std::vector<size_t> in_at(n, 0), out_at(n, 0);
  for (int64_t i = 0; i < n; i++) {
    // Atoms below i have been through: what is left of both lists starts at i itself.
    auto &a = in[i], &b = out[i];
    size_t p = in_at[i], q = out_at[i];
    if (p < a.size() && a[p].other == i) p++;
    if (q < b.size() && b[q].other == i) q++;
    while (p < a.size() || q < b.size()) {
      int64_t j = std::min(p < a.size() ? a[p].other : INT64_MAX, q < b.size() ? b[q].other : INT64_MAX);
      int32_t number = g.first.size() + 1;
      g.first.push_back(i), g.second.push_back(j);
      if (p < a.size() && a[p].other == j) a[p++].pair = number, out[j][out_at[j]++].pair = -number;
      if (q < b.size() && b[q].other == j) b[q++].pair = number, in[j][in_at[j]++].pair = -number;
    }
  }
  // An out list is read like an in list: as if the edge ended here. So its sign is that of the opposite edge, and the
  // kernel that goes through sources turns it.
  for (int64_t i = 0; i < n; i++)
    for (auto& e : in[i]) g.source.push_back(e.other), g.target.push_back(i), g.pair.push_back(e.pair);
  std::vector<int32_t> atom_at(n, -1), pair_at(g.first.size(), -1);
  for (int64_t k = 0; k < m; k++) {
    std::vector<int64_t> whole;
    for (int64_t i = molecules[k]; boxes[k].empty() && i < molecules[k + 1]; i++) whole.push_back(i);
    const auto& own = boxes[k].empty() ? whole : boxes[k];
    size_t step = boxes[k].empty() ? std::max(own.size(), (size_t)1) : BOX;
    for (size_t at = 0; at < own.size(); at += step)
      add_tile(g, x, own.data() + at, std::min(step, own.size() - at), in, out, atom_at, pair_at);
  }
  return &g;
}

}  // namespace

extern "C" {

// positions [n, 3], molecules [m + 1]: where each begins. -> a handle to be released with graph_free.
void* graph_build(const double* positions, const int64_t* molecules, int64_t m, double cutoff, int64_t most, int loop) {
  return build(positions, molecules, m, cutoff, most, loop);
}

// Sizes of the arrays in the order of graph_copy, [17].
void graph_sizes(void* handle, int64_t* sizes) {
  Graph& g = *(Graph*)handle;
  int k = 0;
  for (auto* v : {&g.source, &g.target, &g.ptr, &g.first, &g.second}) sizes[k++] = v->size();
  for (auto* v : {&g.pair, &g.own_ptr, &g.atom_ptr, &g.atoms, &g.pair_ptr, &g.pairs, &g.in_ptr, &g.in_atom, &g.in_pair,
                  &g.out_ptr, &g.out_atom, &g.out_pair})
    sizes[k++] = v->size();
}

void graph_copy(void* handle, void** to) {
  Graph& g = *(Graph*)handle;
  int k = 0;
  for (auto* v : {&g.source, &g.target, &g.ptr, &g.first, &g.second}) memcpy(to[k++], v->data(), 8 * v->size());
  for (auto* v : {&g.pair, &g.own_ptr, &g.atom_ptr, &g.atoms, &g.pair_ptr, &g.pairs, &g.in_ptr, &g.in_atom, &g.in_pair,
                  &g.out_ptr, &g.out_atom, &g.out_pair})
    memcpy(to[k++], v->data(), 4 * v->size());
}

void graph_free(void* handle) { delete (Graph*)handle; }
}
