// Rows of blocks -> the arrays of a batch. What lies in a block: mspt/data/block.py. How this is called: gather.py.
//
// A block is described by a row of a table: per column (one of the wanted arrays) its address, the number of its rows
// and the size of one, 0 where the block does not have it. Record i of a batch is row rows[i] of the block slots[i].
// Nothing is trusted: a row outside its block, or a ptr that falls or leaves its values, ends with BROKEN.

#include <cstdint>
#include <cstring>
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t BROKEN = -1;

struct Column {
    int64_t address, rows, size;
    template <class T>
    const T *at() const { return reinterpret_cast<const T *>(address); }
};

// A safetensors header, read for the places of some arrays. Anything unexpected sets failed; Python then says what.
struct Header {
    const char *at, *end;
    bool failed = false;

    char peek() {
        while (at < end && (*at == ' ' || *at == '\n' || *at == '\t' || *at == '\r')) ++at;
        if (at == end) failed = true;
        return failed ? 0 : *at;
    }
    bool take(char c) {
        if (peek() != c) return false;
        ++at;
        return true;
    }
    void need(char c) {
        if (!take(c)) failed = true;
    }
    // A string as it is written, escapes and all: so are the names that are looked for.
    const char *text(int64_t &length) {
        need('"');
        const char *start = at;
        while (!failed && at < end && *at != '"') at += *at == '\\' ? 2 : 1;
        if (at >= end) failed = true;
        if (failed) return start;
        length = at++ - start;
        return start;
    }
    int64_t number() {
        peek();
        int64_t value = 0;
        const char *start = at;
        while (at < end && *at >= '0' && *at <= '9' && at - start < 18) value = 10 * value + (*at++ - '0');
        if (at == start) failed = true;
        return value;
    }
    void skip_texts() {  // {"…": "…", …}
        need('{');
        int64_t length;
        while (!failed && !take('}')) {
            text(length);
            need(':');
            text(length);
            take(',');
        }
    }
};

bool same(const char *text, int64_t length, const char *name) {
    return static_cast<int64_t>(std::strlen(name)) == length && std::memcmp(text, name, length) == 0;
}

// Types in the order of block.TYPES.
const struct { const char *name; int64_t bytes; } TYPES[] = {
    {"U8", 1}, {"I8", 1}, {"I16", 2}, {"I32", 4}, {"I64", 8}, {"F16", 2}, {"F32", 4}, {"F64", 8}};
constexpr int64_t TYPE_COUNT = sizeof TYPES / sizeof *TYPES;

int64_t type_of(const char *type, int64_t length) {
    int64_t index = 0;
    while (index < TYPE_COUNT && !same(type, length, TYPES[index].name)) ++index;
    return index;
}

// The range of a ragged row, or false where it is none.
inline bool range(const Column &ptr, const Column &values, int64_t row, int64_t &begin, int64_t &end) {
    if (row < 0 || row + 1 >= ptr.rows) return false;
    begin = ptr.at<int64_t>()[row];
    end = ptr.at<int64_t>()[row + 1];
    return 0 <= begin && begin <= end && end <= values.rows;
}

inline const Column &column(const int64_t *table, int64_t columns, int64_t slot, int64_t index) {
    return reinterpret_cast<const Column *>(table)[slot * columns + index];
}

constexpr int64_t STEP = 512;  // bytes that are copied and summed at a time

// Copies a step of a row and gives its part of the sum of sums.row_sums. next: what will be copied after this row, step by
// step too: rows are too short for the processor to see by itself what comes.
inline uint64_t copy_step(const uint8_t *from, const uint8_t *keys, const uint8_t *next, uint8_t *to) {
#ifdef __AVX2__
    const auto load = [](const uint8_t *at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(at)); };
    __m256i sums[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    for (int64_t i = 0; i < STEP; i += 64) {
        __builtin_prefetch(next + i);
        for (int64_t half = 0; half < 2; ++half) {
            const __m256i words = load(from + i + 32 * half), mixed = _mm256_add_epi32(words, load(keys + i + 32 * half));
            _mm256_storeu_si256(reinterpret_cast<__m256i *>(to + i + 32 * half), words);
            sums[half] = _mm256_add_epi64(sums[half], _mm256_mul_epu32(mixed, _mm256_srli_epi64(mixed, 32)));
        }
    }
    uint64_t parts[4];
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(parts), _mm256_add_epi64(sums[0], sums[1]));
    return parts[0] + parts[1] + parts[2] + parts[3];
#else
    uint64_t sum = 0;
    for (int64_t i = 0; i < STEP; i += 8) {
        if (i % 64 == 0) __builtin_prefetch(next + i);
        uint32_t word[2], key[2];
        std::memcpy(word, from + i, 8);
        std::memcpy(key, keys + i, 8);
        std::memcpy(to + i, word, 8);
        sum += static_cast<uint64_t>(word[0] + key[0]) * (word[1] + key[1]);
    }
    return sum;
#endif
}

// Copies a row of so many bytes and gives its sum.
uint64_t copy_row(const uint8_t *from, int64_t size, const uint8_t *keys, const uint8_t *next, uint8_t *to) {
    uint64_t sum = 0;
    int64_t at = 0;
    for (; at + STEP <= size; at += STEP) sum += copy_step(from + at, keys + at, next + at, to + at);
    uint8_t last[STEP] = {};
    std::memcpy(last, from + at, size - at);
    sum += copy_step(last, keys + at, next + at, last);
    std::memcpy(to + at, last, size - at);
    return sum;
}

}  // namespace

extern "C" {

// Find arrays in a block of size bytes, of which the first head lie at data and the others at rest. names: count names end to end. rules [count, 5]: the types that an
// array may have, as bits in the order of TYPES; the values in a row of it; the array that has as many rows, or -1; the
// array that it is there together with, -2 where it is always there, or -1; the length of its name.
// out [count, 3]: Columns. 0, or BROKEN where the header cannot be read or an array is not as its rule says.
int64_t find_columns(const uint8_t *data, int64_t head, const uint8_t *rest, int64_t size, const char *names,
                     int64_t count, const int64_t *rules, int64_t *out) {
    Column *columns = reinterpret_cast<Column *>(out);
    std::memset(out, 0, sizeof(Column) * count);
    if (head < 8 || head > size) return BROKEN;
    uint64_t length;
    std::memcpy(&length, data, 8);
    if (length > static_cast<uint64_t>(head - 8)) return BROKEN;
    const int64_t start = 8 + static_cast<int64_t>(length), room = size - start;
    Header header{reinterpret_cast<const char *>(data) + 8, reinterpret_cast<const char *>(data) + start};
    header.need('{');
    while (!header.failed && !header.take('}')) {
        int64_t length = 0, own = 0, type_length = 0, kind = TYPE_COUNT, rows = 0, row = 1, begin = 0, stop = 0;
        const char *name = header.text(length);
        header.need(':');
        if (same(name, length, "__metadata__")) {
            header.skip_texts();
            header.take(',');
            continue;
        }
        header.need('{');
        while (!header.failed && !header.take('}')) {
            const char *field = header.text(own);
            header.need(':');
            if (header.failed) break;
            if (same(field, own, "dtype")) {
                const char *type = header.text(type_length);
                if (!header.failed) kind = type_of(type, type_length);
            } else if (same(field, own, "shape")) {
                header.need('[');
                for (int64_t d = 0; !header.failed && !header.take(']'); ++d) {
                    const int64_t extent = header.number();
                    if (d == 0) rows = extent;
                    else if (__builtin_mul_overflow(row, extent, &row)) header.failed = true;
                    header.take(',');
                }
            } else if (same(field, own, "data_offsets")) {
                header.need('[');
                begin = header.number();
                header.need(',');
                stop = header.number();
                header.need(']');
            } else {
                header.failed = true;
            }
            header.take(',');
        }
        int64_t bytes, total;
        if (header.failed || kind == TYPE_COUNT || __builtin_mul_overflow(row, TYPES[kind].bytes, &bytes) ||
            __builtin_mul_overflow(rows, bytes, &total) || begin > stop || stop > room || total != stop - begin)
            return BROKEN;
        const char *wanted = names;
        for (int64_t i = 0; i < count; wanted += rules[5 * i++ + 4])
            if (rules[5 * i + 4] == length && std::memcmp(name, wanted, length) == 0) {
                if (!(rules[5 * i] >> kind & 1) || rules[5 * i + 1] != row) return BROKEN;
                const bool late = start + begin >= head;
                if (!late && start + stop > head) return BROKEN;
                columns[i] = Column{reinterpret_cast<int64_t>(late ? rest - head : data) + start + begin, rows, bytes};
            }
        header.take(',');
    }
    for (int64_t i = 0; i < count; ++i) {
        const int64_t like = rules[5 * i + 2], with = rules[5 * i + 3];
        const bool there = columns[i].address != 0;
        if (there && like >= 0 && columns[i].rows != columns[like].rows) return BROKEN;
        if (with != -1 && there != (with == -2 || columns[with].address != 0)) return BROKEN;
    }
    return header.failed ? BROKEN : 0;
}

// What every block has: of the records their ptr [m + 1], numbers [n] widened, positions [n, 3], words [m], keys_ptr
// [m + 1] and keys. at [6]: the columns ptr, numbers, positions, keys_ptr, keys, words. n: how many atoms there should
// be; room: how many bytes keys holds. Keys beyond that are left out. The bytes of all keys, or BROKEN.
int64_t conformers(const int64_t *table, int64_t columns, const int64_t *at, const int32_t *slots, const int32_t *rows,
                   int64_t m, int64_t n, int64_t *ptr, int64_t *numbers, float *positions, int64_t *words,
                   int64_t *keys_ptr, uint8_t *keys, int64_t room) {
    int64_t atoms = ptr[0] = 0, total = keys_ptr[0] = 0;
    for (int64_t i = 0; i < m; ++i) {
        const Column *own = reinterpret_cast<const Column *>(table) + slots[i] * columns;
        const Column &from = own[at[1]], &texts = own[at[4]], &word = own[at[5]];
        int64_t begin, end, first, last;
        if (!range(own[at[0]], from, rows[i], begin, end) || atoms + end - begin > n || rows[i] >= word.rows ||
            !range(own[at[3]], texts, rows[i], first, last))
            return BROKEN;
        const uint8_t *number = from.at<uint8_t>() + begin;
        for (int64_t k = 0; k < end - begin; ++k) numbers[atoms + k] = number[k];
        std::memcpy(positions + 3 * atoms, own[at[2]].at<float>() + 3 * begin, (end - begin) * 3 * sizeof(float));
        ptr[i + 1] = atoms += end - begin;
        words[i] = word.at<int64_t>()[rows[i]];
        const int64_t length = last - first;
        if (total + length <= room) std::memcpy(keys + total, texts.at<uint8_t>() + first, length);
        keys_ptr[i + 1] = total += length;
    }
    return atoms == n ? total : BROKEN;
}

// The offsets of ragged rows laid end to end. table [slots, columns]: Columns. ptr, values: indices of columns; a
// block without ptr gives empty rows. out [m + 1]. The total, or BROKEN.
int64_t ragged_offsets(const int64_t *table, int64_t columns, int64_t ptr, int64_t values, const int32_t *slots,
                       const int32_t *rows, int64_t m, int64_t *out) {
    int64_t total = out[0] = 0;
    for (int64_t i = 0; i < m; ++i) {
        const Column &offsets = column(table, columns, slots[i], ptr);
        if (offsets.address) {
            int64_t begin, end;
            if (!range(offsets, column(table, columns, slots[i], values), rows[i], begin, end)) return BROKEN;
            total += end - begin;
        }
        out[i + 1] = total;
    }
    return total;
}

// Ragged rows of so many bytes a value end to end into out; after ragged_offsets has found them right.
void ragged_values(const int64_t *table, int64_t columns, int64_t ptr, int64_t values, const int32_t *slots,
                   const int32_t *rows, int64_t m, int64_t size, uint8_t *out) {
    for (int64_t i = 0; i < m; ++i) {
        const Column &offsets = column(table, columns, slots[i], ptr);
        if (!offsets.address) continue;
        const int64_t begin = offsets.at<int64_t>()[rows[i]], end = offsets.at<int64_t>()[rows[i] + 1];
        std::memcpy(out, column(table, columns, slots[i], values).at<uint8_t>() + begin * size, (end - begin) * size);
        out += (end - begin) * size;
    }
}

// One value of 8 bytes a record; missing where a block does not have the column. 0, or BROKEN.
int64_t words(const int64_t *table, int64_t columns, int64_t index, const int32_t *slots, const int32_t *rows,
              int64_t m, int64_t missing, int64_t *out) {
    for (int64_t i = 0; i < m; ++i) {
        const Column &from = column(table, columns, slots[i], index);
        if (from.address && (rows[i] < 0 || rows[i] >= from.rows)) return BROKEN;
        out[i] = from.address ? from.at<int64_t>()[rows[i]] : missing;
    }
    return 0;
}

// Bonds of all records end to end: pairs [b, 2] of atoms of the batch, types [b] and known [m]; after ragged_offsets has
// found their rows right. at [4]: the columns bonds_ptr, bonds, bond_types, bonds_known. atoms [m + 1]: ptr of the batch.
// A block without them gives none. 0, or BROKEN where an atom is not one of its molecule's.
int64_t bonds(const int64_t *table, int64_t columns, const int64_t *at, const int32_t *slots, const int32_t *rows,
              int64_t m, const int64_t *atoms, int64_t *pairs, int64_t *types, uint8_t *known) {
    for (int64_t i = 0; i < m; ++i) {
        const Column *own = reinterpret_cast<const Column *>(table) + slots[i] * columns;
        known[i] = 0;
        if (!own[at[0]].address) continue;
        known[i] = own[at[3]].at<uint8_t>()[rows[i]] != 0;
        const int64_t begin = own[at[0]].at<int64_t>()[rows[i]], end = own[at[0]].at<int64_t>()[rows[i] + 1];
        const int64_t first = atoms[i], count = atoms[i + 1] - first;
        const int16_t *pair = own[at[1]].at<int16_t>() + 2 * begin;
        for (int64_t k = 0; k < 2 * (end - begin); ++k) {
            if (pair[k] < 0 || pair[k] >= count) return BROKEN;
            *pairs++ = first + pair[k];
        }
        const uint8_t *type = own[at[2]].at<uint8_t>() + begin;
        for (int64_t k = 0; k < end - begin; ++k) *types++ = type[k];
    }
    return 0;
}

// Whether each record's spectrum is there and, of those that are values, which row of the block's values it is; -1 for
// the others. lines: the column that a block with lines has. found [2]: the bytes of a row of values, 0 where no record
// has any, -1 where they differ; how many are lines. 0, or BROKEN.
int64_t spectrum_rows(const int64_t *table, int64_t columns, int64_t kind, int64_t values, int64_t lines,
                      const int32_t *slots, const int32_t *rows, int64_t m, uint8_t *present, int64_t *own,
                      int64_t *found) {
    int64_t size = 0, lined = 0;
    int64_t counted = -1, at = 0, before = 0;  // records of the block `counted` before row `at`: `before`
    for (int64_t i = 0; i < m; ++i) {
        const Column &from = column(table, columns, slots[i], kind);
        present[i] = 0;
        own[i] = -1;
        if (!from.address) continue;
        if (rows[i] < 0 || rows[i] >= from.rows) return BROKEN;
        const uint8_t own_kind = from.at<uint8_t>()[rows[i]];
        if (own_kind > 2 || (own_kind == 2 && !column(table, columns, slots[i], lines).address)) return BROKEN;
        present[i] = own_kind != 0;
        lined += own_kind == 2;
        if (own_kind != 1) continue;
        const Column &stored = column(table, columns, slots[i], values);
        if (stored.rows == from.rows) {  // every record has values
            own[i] = rows[i];
        } else {
            if (slots[i] != counted || rows[i] < at) counted = slots[i], at = before = 0;
            for (; at < rows[i]; ++at) before += from.at<uint8_t>()[at] == 1;
            own[i] = before;
        }
        if (!stored.address || own[i] >= stored.rows) return BROKEN;
        size = size == 0 || size == stored.size ? stored.size : -1;
    }
    found[0] = size;
    found[1] = lined;
    return 0;
}

// Spectra of so many bytes into out [m, size]; zeros where own is -1. keys: sums.row_keys(size). wrong [m]: whether a row does
// not have the sum that its block says. How many are.
int64_t spectrum_values(const int64_t *table, int64_t columns, int64_t values, int64_t sums, const int32_t *slots,
                        int64_t m, const int64_t *own, int64_t size, const uint8_t *keys, uint8_t *out,
                        uint8_t *wrong) {
    const auto row = [&](int64_t i) { return column(table, columns, slots[i], values).at<uint8_t>() + own[i] * size; };
    int64_t count = 0;
    for (int64_t i = 0; i < m; ++i, out += size) {
        wrong[i] = 0;
        if (own[i] < 0) {
            std::memset(out, 0, size);
            continue;
        }
        const uint64_t sum = copy_row(row(i), size, keys, i + 1 < m && own[i + 1] >= 0 ? row(i + 1) : out, out);
        wrong[i] = sum != column(table, columns, slots[i], sums).at<uint64_t>()[own[i]];
        count += wrong[i];
    }
    return count;
}

// Orders each window of an even number of records as order.permutation does: by the mix (SplitMix64) of the window's
// state with each place in it. states [windows], starts [windows + 1], order [starts[windows]]: for each place of a
// window in order, the place that comes there. room: four times the largest window, and two.
void shuffle(const int64_t *states, const int64_t *starts, int64_t windows, int64_t *order, int64_t *room) {
    for (int64_t w = 0; w < windows; ++w) {
        const int64_t begin = starts[w], n = starts[w + 1] - begin;
        if (n == 0) continue;
        int bits = 0;
        while (bits < 20 && (int64_t{1} << bits) < n) ++bits;
        // Words are even over their range, so that a bucket of their first bits holds one or two; the rest is insertion.
        uint64_t *words = reinterpret_cast<uint64_t *>(room), *sorted = words + n;
        int64_t *counts = room + 2 * n, *places = order + begin;
        std::memset(counts, 0, sizeof(int64_t) * ((int64_t{1} << bits) + 1));
        for (int64_t i = 0; i < n; ++i) {
            uint64_t x = (static_cast<uint64_t>(states[w]) ^ static_cast<uint64_t>(i)) + 0x9E3779B97F4A7C15u;
            x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
            x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
            words[i] = (x ^ (x >> 31)) ^ (uint64_t{1} << 63);  // signed words in the order of unsigned ones
            ++counts[(bits ? words[i] >> (64 - bits) : 0) + 1];
        }
        for (int64_t b = 0; b < (int64_t{1} << bits); ++b) counts[b + 1] += counts[b];
        for (int64_t i = 0; i < n; ++i) {
            const int64_t at = counts[bits ? words[i] >> (64 - bits) : 0]++;
            sorted[at] = words[i];
            places[at] = begin + i;
        }
        for (int64_t i = 1; i < n; ++i) {  // all that is out of order is within a bucket
            const uint64_t word = sorted[i];
            const int64_t place = places[i];
            int64_t at = i;
            for (; at > 0 && sorted[at - 1] > word; --at) sorted[at] = sorted[at - 1], places[at] = places[at - 1];
            sorted[at] = word;
            places[at] = place;
        }
    }
}

// Cuts a sequence of molecules into micro-batches as packing.cut does. limits: of molecules, atoms and edges. starts
// has room for count + 1. How many starts there are.
int64_t cut(const int32_t *atoms, int64_t count, int64_t neighbours, int64_t most, int64_t most_atoms,
            int64_t most_edges, int64_t *starts) {
    int64_t cuts = 0, molecules = 0, sum = 0, edges = 0;
    starts[cuts++] = 0;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t n = atoms[i], own = n * (n < neighbours ? n : neighbours);
        if (molecules && (molecules == most || sum + n > most_atoms || edges + own > most_edges)) {
            starts[cuts++] = i;
            molecules = sum = edges = 0;
        }
        ++molecules;
        sum += n;
        edges += own;
    }
    if (count) starts[cuts++] = count;
    return cuts;
}

}  // extern "C"
