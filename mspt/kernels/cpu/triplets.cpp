// Triplets of atoms k -> j -> i along the edges of a graph, and which of them comes next around each edge j -> i.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

namespace {

struct Vector {
  double x, y, z;
};
Vector operator-(Vector a) { return {-a.x, -a.y, -a.z}; }
double dot(Vector a, Vector b) { return a.x * b.x + a.y * b.y + a.z * b.z; }
Vector cross(Vector a, Vector b) { return {a.y * b.z - a.z * b.y, a.z * b.x - a.x * b.z, a.x * b.y - a.y * b.x}; }

// The axis of the system that is closest to a right angle with a.
Vector least(Vector a) {
  double x = std::fabs(a.x), y = std::fabs(a.y), z = std::fabs(a.z);
  if (x <= y && x <= z) return {1, 0, 0};
  return y <= z ? Vector{0, 1, 0} : Vector{0, 0, 1};
}

using Around = std::vector<std::pair<double, int64_t>>;  // azimuths and triplets

// Of the triplets around one axis: which is the next one at another azimuth.
void follow(Around& around, double same, int64_t* following) {
  std::sort(around.begin(), around.end());
  const int64_t count = around.size();
  auto gap = [&](int64_t at) {
    return at + 1 < count ? around[at + 1].first - around[at].first : around[0].first + 2 * M_PI - around[at].first;
  };
  // Twice around against the sense, so that each meets the first gap that follows it.
  int64_t next = 0;
  for (int64_t step = 2 * count - 1; step >= 0; step--) {
    int64_t at = step % count;
    if (gap(at) > same) next = (at + 1) % count;
    if (step < count) following[around[at].second] = around[next].second;
  }
}

}  // namespace

extern "C" {

// source, target [e], edges ptr[j] to ptr[j + 1] end at atom j -> leaving [e], the edges that begin at atom j in places
// leaves[j] to leaves[j + 1], leaves [n + 1]; and begin [e + 1], where the triplets of an edge k -> j begin.
void triplets_count(const int64_t* source, const int64_t* target, const int64_t* ptr, int64_t* leaving, int64_t* leaves,
                    int64_t* begin, int64_t n, int64_t e) {
  std::fill(leaves, leaves + n + 1, 0);
  for (int64_t edge = 0; edge < e; edge++) leaves[source[edge] + 1]++;
  std::partial_sum(leaves, leaves + n + 1, leaves);
  std::vector<int64_t> place(leaves, leaves + n);
  for (int64_t edge = 0; edge < e; edge++) leaving[place[source[edge]]++] = edge;
  begin[0] = 0;
  for (int64_t j = 0; j < n; j++)
    for (int64_t k = ptr[j]; k < ptr[j + 1]; k++) {
      int64_t count = 0;
      for (int64_t p = leaves[j]; p < leaves[j + 1]; p++) count += target[leaving[p]] != source[k];
      begin[k + 1] = begin[k] + count;
    }
}

// direction [3, e], unit vectors from source to target -> incoming, outgoing, following [begin[e]].
void triplets_fill(const double* direction, const int64_t* source, const int64_t* target, const int64_t* ptr,
                   const int64_t* leaving, const int64_t* leaves, const int64_t* begin, int64_t* incoming, int64_t* outgoing,
                   int64_t* following, int64_t n, int64_t e, double same, int64_t threads) {
  auto along = [&](int64_t edge) { return Vector{direction[edge], direction[e + edge], direction[2 * e + edge]}; };
#pragma omp parallel num_threads(threads)
  {
    std::vector<int64_t> place;
    Around around;
#pragma omp for schedule(dynamic, 16)
    for (int64_t j = 0; j < n; j++) {
      place.assign(begin + ptr[j], begin + ptr[j + 1]);
      for (int64_t p = leaves[j]; p < leaves[j + 1]; p++) {
        const int64_t out = leaving[p];
        const Vector axis = along(out), zero = cross(axis, least(axis));
        around.clear();
        for (int64_t k = ptr[j]; k < ptr[j + 1]; k++) {
          if (source[k] == target[out]) continue;
          const int64_t t = place[k - ptr[j]]++;
          incoming[t] = k, outgoing[t] = out, following[t] = t;
          const Vector normal = cross(axis, -along(k));
          if (std::sqrt(dot(normal, normal)) > same)
            around.emplace_back(std::atan2(dot(cross(zero, normal), axis), dot(zero, normal)), t);
        }
        if (!around.empty()) follow(around, same, following);
      }
    }
  }
}
}
