"""Look at a shard set: what is in it, one of its records, whether it is whole."""

import difflib
import json
import math
import re
import time
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mspt.chemistry.elements import SYMBOLS
from mspt.chemistry.spectra import BROADENED, GRIDS, LINE_SHAPES, STRENGTHS
from mspt.data import block as blocks
from mspt.data import keyed
from mspt.data.batch import MoleculeBatch
from mspt.data.schema import Lines
from mspt.data.shardset import MANIFEST, ShardSet
from mspt.errors import UserError

# Blocks that are read where the manifest and the index do not tell.
SAMPLE = 16
# Units of the grids as a person reads them.
UNITS = {"eV": "eV", "cm^-1": "cm⁻¹"}
# Codes of Record.bond_types as in SMILES; ~ for any other.
BONDS = {1: "-", 2: "=", 3: "#", 4: ":"}
STRONGEST = 10
# What not every record has -> what to call a record that has it.
HAS = {"smiles": "with SMILES", "bonds": "with bonds", "forces": "with forces", "charge": "charged"}
_ATOMS_AT_ONCE = 1 << 24


def sets(folder):
    """The shard sets that a folder means: itself, or its children (train, heldout) where it is none -> list of Paths.

    A folder that is neither is given back as it is: to open it says what is wrong.
    """
    folder = Path(folder)
    if (folder / MANIFEST).exists():
        return [folder]
    return sorted(manifest.parent for manifest in folder.glob(f"*/{MANIFEST}")) or [folder]


def open_one(folder):
    """Open a folder as one ShardSet. Raises UserError that names the sets where it holds several."""
    found = sets(folder)
    if found != [Path(folder)]:
        raise UserError(f"{folder}: is no shard set but holds {', '.join(map(str, found))}; give one of them")
    return ShardSet.open(folder)


def sample(shardset, count=SAMPLE):
    """Numbers of count blocks (all, if there are fewer), evenly spread over the set. Raises UserError below 1."""
    if count < 1:
        raise UserError(f"--blocks is {count}; give 1 or more blocks to read")
    total = len(shardset.block_records)
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int))


def read(shardset, number):
    """One block, decoded. Raises UserError where it is damaged."""
    with shardset.checking(number):
        return blocks.decode(shardset.read(number))


def batch(block):
    """A decoded block as a MoleculeBatch whose lines are broadened by the default line shapes."""
    return MoleculeBatch.from_blocks([(block, np.arange(len(block["ptr"]) - 1))]).broadened(LINE_SHAPES)


def sizes(shardset):
    """Records of every number of atoms, int64 [largest + 1]; reads the index a piece at a time."""
    counts = np.zeros(shardset.manifest["largest"] + 1, np.int64)
    for start in range(0, len(shardset), _ATOMS_AT_ONCE):
        counts += np.bincount(shardset.atoms[start : start + _ATOMS_AT_ONCE], minlength=len(counts))
    return counts


def bands(values, grid, count):
    """The highest local maxima [(position, height)] of a spectrum on its grid, none within 1 % of the grid of another.

    values: [L]. An end of the grid counts as a maximum where the values rise to it; noise, below a thousandth of the
    highest, does not.
    """
    padded = np.concatenate([[-math.inf], values, [-math.inf]])
    peaks = np.flatnonzero((values > padded[:-2]) & (values >= padded[2:]) & (values > values.max() / 1000))
    chosen = []
    for peak in peaks[np.argsort(-values[peaks], kind="stable")]:
        if all(abs(peak - other) > grid.length // 100 for other in chosen):
            chosen.append(peak)
        if len(chosen) == count:
            break
    return [(round(grid.start + grid.step * float(peak), 6), float(values[peak])) for peak in chosen]


def unit_of(shardset, name, lines=False):
    """The unit of a target or of a spectrum's values, as the build named it; or of a spectrum broadened from lines."""
    return BROADENED[name] if lines else shardset.manifest["provenance"].get("units", {}).get(name, "unit not stated")


class _Numbers:
    """Count, mean, standard deviation (of the population), least and greatest of numbers that come in pieces."""

    def __init__(self):
        self.count, self.mean, self.squares, self.low, self.high = 0, 0.0, 0.0, math.inf, -math.inf

    def add(self, values):
        if not len(values):
            return
        count, mean = self.count + len(values), float(values.mean())
        shift = mean - self.mean
        self.squares += float(((values - mean) ** 2).sum()) + shift**2 * self.count * len(values) / count
        self.mean += shift * len(values) / count
        self.count, self.low, self.high = count, min(self.low, float(values.min())), max(self.high, float(values.max()))

    def range(self):
        return [self.low, self.high] if self.count else None

    def summary(self):
        spread = math.sqrt(self.squares / self.count)
        return {"records": self.count, "mean": self.mean, "std": spread, "min": self.low, "max": self.high}


class _Spectrum:
    """What the records that were read say of one spectrum."""

    def __init__(self, name):
        self.name, self.kinds, self.total = name, Counter(), np.zeros(GRIDS[name].length)
        self.positions, self.strengths, self.values = _Numbers(), _Numbers(), _Numbers()

    def add(self, block, spectra):
        """A decoded block, and its spectra on the grid [m, L]."""
        prefix = f"spectra/{self.name}/"
        kind = block.get(f"{prefix}kind", np.zeros(0, np.uint8))
        self.kinds.update({"values": int((kind == blocks.VALUES).sum()), "lines": int((kind == blocks.LINES).sum())})
        for part in ("positions", "strengths", "values"):
            if prefix + part in block:
                getattr(self, part).add(block[prefix + part].astype(float).ravel())
        self.total += spectra.double().sum(0).numpy()

    def summary(self):
        grid, count = GRIDS[self.name], max(1, self.kinds.total())
        return {
            "values": self.kinds["values"],
            "lines": self.kinds["lines"],
            "range": self.values.range(),
            "line_positions": self.positions.range(),
            "line_strengths": self.strengths.range(),
            "mean_bands": [list(band) for band in bands(self.total / count, grid, 5)],
        }


def describe(shardset, count=SAMPLE):
    """What is in a set, as a dict that JSON can hold.

    "sample" and below "read" come from count blocks, evenly spread; everything else is exact, by the manifest and the
    index. Memory does not grow with the set.
    """
    manifest, numbers = shardset.manifest, sample(shardset, count)
    size, atoms = sum(shard["bytes"] for shard in manifest["shards"]), sum(manifest["elements"].values())
    targets = {name: _Numbers() for name in manifest["targets"]}
    spectra, has, records = {name: _Spectrum(name) for name in manifest["spectra"]}, Counter(), 0
    for number in numbers:
        block = read(shardset, number)
        molecules = batch(block)
        records += len(molecules.keys)
        has.update(_has(block))
        for name, values in molecules.targets.items():
            targets[name].add(values[~values.isnan()].numpy())
        for name, spectrum in spectra.items():
            spectrum.add(block, molecules.spectra[name])
    return {
        "folder": str(shardset.folder),
        "records": len(shardset),
        "atoms": atoms,
        "shards": len(manifest["shards"]),
        "blocks": len(shardset.block_records),
        "bytes": size,
        "bytes_per_record": size / len(shardset),
        "sizes": _describe_sizes(sizes(shardset)),
        "elements": {
            symbol: {"atoms": n, "share": n / atoms}
            for symbol, n in sorted(manifest["elements"].items(), key=lambda item: -item[1])
        },
        "sample": {"blocks": len(numbers), "records": records},
        "has": dict(has),
        "spectra": {
            name: manifest["spectra"][name]
            | {"unit": unit_of(shardset, name, spectrum.kinds["lines"]), "read": spectrum.summary()}
            for name, spectrum in spectra.items()
        },
        "targets": {
            name: {"unit": unit_of(shardset, name), "read": each.summary()}
            for name, each in targets.items()
            if each.count
        },
        "provenance": manifest["provenance"],
    }


def _has(block):
    """How many records of a block have what not every set has."""
    forces = np.isfinite(block["forces"][block["ptr"][:-1], 0]).sum() if "forces" in block else 0
    return {
        "smiles": int((np.diff(block["smiles_ptr"]) > 0).sum()),
        "bonds": int(block["bonds_known"].sum()) if "bonds_known" in block else 0,
        "forces": int(forces),
        "charge": int((block["charge"] != 0).sum()),
    }


def _describe_sizes(counts):
    there = np.flatnonzero(counts)
    weights = counts[there]
    # Of equal width, 16 at most.
    width = math.ceil((there[-1] - there[0] + 1) / 16)
    bins = [
        (start, min(start + width - 1, int(there[-1]))) for start in range(int(there[0]), int(there[-1]) + 1, width)
    ]
    median, p95 = np.quantile(there, [0.5, 0.95], weights=weights, method="inverted_cdf")
    return {
        "min": int(there[0]),
        "median": int(median),
        "mean": float(there @ weights / weights.sum()),
        "p95": int(p95),
        "max": int(there[-1]),
        "histogram": [[low, high, int(counts[low : high + 1].sum())] for low, high in bins],
    }


def table(rows, indent="  "):
    """Rows of strings as lines of text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        indent + "  ".join(f"{cell:{'>' if i else '<'}{widths[i]}}" for i, cell in enumerate(row)).rstrip()
        for row in rows
    ]


def info(description):
    """What describe() gives, as text for a person."""
    d, n, m = description, description["sample"]["blocks"], description["sample"]["records"]
    part = f"{n} of {d['blocks']} blocks, evenly spread: {m:,} of {d['records']:,} records"
    if n == d["blocks"]:
        part = f"all {n} blocks"
    lines = [
        d["folder"],
        *table(
            [
                ("records", f"{d['records']:,}"),
                ("atoms", f"{d['atoms']:,}"),
                ("shards", f"{d['shards']:,}"),
                ("blocks", f"{d['blocks']:,}"),
                ("bytes", f"{d['bytes']:,}"),
                ("bytes a record", f"{d['bytes_per_record']:,.0f}"),
            ]
        ),
        "",
        "sizes (atoms): min {min}, median {median}, mean {mean:.1f}, 95 % {p95}, max {max}".format(**d["sizes"]),
        *_histogram(d["sizes"]["histogram"]),
        "",
        "elements",
        *table([(symbol, f"{e['atoms']:,}", f"{e['share']:.2%}") for symbol, e in d["elements"].items()]),
        "",
        f"of the records, as read in {part}",
        *table([(label, f"{d['has'][name]:,}") for name, label in HAS.items()]),
    ]
    lines += ["", "spectra" if d["spectra"] else "no spectra"]
    for name, spectrum in d["spectra"].items():
        lines += _info_of_spectrum(name, spectrum, d["records"])
    lines += ["", "targets (of the records read)" if d["targets"] else "no targets"]
    if d["targets"]:
        head = ("", "records", "mean", "std", "min", "max")
        rows = [
            (f"{name} ({t['unit']})", f"{t['read']['records']:,}", *(f"{t['read'][k]:.6g}" for k in head[2:]))
            for name, t in d["targets"].items()
        ]
        lines += table([head, *rows])
    return "\n".join([*lines, "", "provenance", *_outline(d["provenance"])])


def _histogram(bins):
    most = max(count for *_, count in bins)
    labels = [f"{low}" if low == high else f"{low}–{high}" for low, high, _ in bins]
    width, digits = max(map(len, labels)), len(f"{most:,}")
    return [
        f"  {label:>{width}}  {count:>{digits},}  {'█' * math.ceil(40 * count / most)}".rstrip()
        for label, (*_, count) in zip(labels, bins, strict=True)
    ]


def _info_of_spectrum(name, spectrum, records):
    unit, part = UNITS[GRIDS[name].unit], spectrum["read"]
    lines = [
        f"  {name}: {spectrum['records']:,} records ({spectrum['records'] / records:.1%}), "
        f"{spectrum['lines_per_record']} lines a record, mean total {spectrum['mean_total']:.5g}"
    ]
    kinds = ", ".join(f"{part[kind]:,} as {kind}" for kind in ("values", "lines") if part[kind])
    lines.append(f"    read: {kinds or 'none'}")
    if part["range"]:
        lines.append("    values {:.4g} to {:.4g}".format(*part["range"]))
    if part["line_positions"]:
        low, high = part["line_positions"]
        weak, strong = part["line_strengths"]
        lines.append(f"    lines at {low:.5g} to {high:.5g} {unit}, {weak:.4g} to {strong:.4g} {STRENGTHS[name]}")
    if part["mean_bands"]:
        highest = ", ".join(f"{height:.4g} at {position:.5g}" for position, height in part["mean_bands"])
        lines.append(f"    highest bands of the mean spectrum ({spectrum['unit']} at {unit}): {highest}")
    return lines


def _outline(values, indent="  "):
    """A dict of dicts as indented lines."""
    lines = []
    for name, value in values.items():
        nested = isinstance(value, dict)
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        lines += [f"{indent}{name}", *_outline(value, indent + "  ")] if nested else [f"{indent}{name}: {text}"]
    return lines


def find(shardset, wanted):
    """A key, or digits for a record's number -> the number of the record.

    Where the set's own keys are digits, as that of its first record tells, digits are a key first. A key is looked
    for by reading the set, block by block, about a second a gigabyte. Raises UserError with the nearest keys.
    """
    first = next(shardset.records([0])).key
    if not wanted.isdecimal() or first.isdecimal():
        word = keyed.word(wanted)
        for number, block in _every_block(shardset, f"looking for {wanted}"):
            for row in np.flatnonzero(block["words"] == word):
                if blocks.texts(block, "keys", [row]) == [wanted]:
                    return int(shardset.first[number] + row)
    span = f"0 to {len(shardset) - 1}"
    if not wanted.isdecimal():
        nearest = ", ".join(_nearest(shardset, wanted)) or first
        raise UserError(
            f"{shardset.folder}: no record has the key {wanted!r}; give one such as {nearest}, or a number from {span}"
        )
    if int(wanted) >= len(shardset):
        raise UserError(f"{shardset.folder}: no record {wanted}; the numbers are {span}")
    return int(wanted)


def _every_block(shardset, what):
    """Yield the number and the arrays of every block, with a bar on a terminal."""
    with _bar(shardset.size.sum(), what) as bar:
        for number, size in enumerate(shardset.size):
            yield number, read(shardset, number)
            bar.update(size)


def _bar(total, what):
    return tqdm(total=int(total), desc=what, unit="B", unit_scale=True, leave=False, delay=1, disable=None)


def _nearest(shardset, wanted):
    """The three keys most like a string; zeros in front of a number do not count."""

    def plain(key):
        return re.sub(r"(?<!\d)0+(?=\d)", "", key)

    best = {}
    for _, block in _every_block(shardset, "looking for the nearest keys"):
        known = {plain(key): key for key in blocks.texts(block, "keys", range(len(block["ptr"]) - 1))} | best
        best = {key: known[key] for key in difflib.get_close_matches(plain(wanted), known)}
    return list(best.values())


def formula(numbers):
    """Atomic numbers -> the molecular formula in Hill's order."""
    counts = Counter(SYMBOLS[z] for z in numbers)
    first = [symbol for symbol in ("C", "H") if "C" in counts and symbol in counts]
    ordered = [*first, *sorted(counts.keys() - set(first))]
    return "".join(symbol + (str(counts[symbol]) if counts[symbol] > 1 else "") for symbol in ordered)


def xyz(record):
    """A Record in the XYZ format: the number of atoms, the key, then symbol x y z (Å) of each atom."""
    atoms = zip(record.numbers, record.positions, strict=True)
    rows = (f"{SYMBOLS[z]:<2} {x:12.6f} {y:12.6f} {w:12.6f}" for z, (x, y, w) in atoms)
    return "\n".join([str(len(record.numbers)), record.key, *rows])


def show(shardset, number):
    """One record of a set as text for a person."""
    record = next(shardset.records([number]))
    lines = [
        f"record {number} of {len(shardset)}: {record.key}",
        *(
            f"  {name:<8} {value}"
            for name, value in (
                ("formula", formula(record.numbers)),
                ("SMILES", record.smiles or "none"),
                ("charge", record.charge),
                ("source", record.source or "not stated"),
            )
        ),
        "",
        f"{len(record.numbers)} atoms (positions Å" + (", forces eV/Å)" if record.forces is not None else ")"),
        *_atoms(record),
        "",
        *_bonds(record),
        "",
        "targets" if record.targets else "no targets",
    ]
    if record.targets:
        lines += table([(f"{name} ({unit_of(shardset, name)})", f"{v:.6g}") for name, v in record.targets.items()])
    for name in GRIDS:
        lines += ["", *_show_spectrum(shardset, record, name)]
    return "\n".join(lines)


def _atoms(record):
    columns = record.positions if record.forces is None else np.hstack([record.positions, record.forces])
    head = ("", "", *"xyz", *(() if record.forces is None else ("fx", "fy", "fz")))
    rows = [
        (str(i), SYMBOLS[z], *(f"{value:.4f}" for value in row))
        for i, (z, row) in enumerate(zip(record.numbers, columns, strict=True))
    ]
    return table([head, *rows])


def _bonds(record):
    if record.bonds is None:
        return ["no bonds in this record"]
    names = [f"{SYMBOLS[z]}{i}" for i, z in enumerate(record.numbers)]
    pairs = zip(record.bonds, record.bond_types, strict=True)
    written = [f"{names[i]}{BONDS.get(int(kind), '~')}{names[j]}" for (i, j), kind in pairs]
    rows = ["  ".join(written[start : start + 10]) for start in range(0, len(written), 10)]
    return [f"{len(written)} bonds (- single, = double, # triple, : aromatic, ~ other)", *(f"  {row}" for row in rows)]


def _show_spectrum(shardset, record, name):
    spectrum, grid = record.spectra.get(name), GRIDS[name]
    if spectrum is None:
        return [f"{name}: not in this record"]
    method = record.methods.get(name, "method not stated")
    if isinstance(spectrum, Lines):
        strongest = np.argsort(-spectrum.strengths, kind="stable")[:STRONGEST]
        peaks = [(spectrum.positions[i], spectrum.strengths[i]) for i in strongest]
        kind, unit = f"{len(spectrum.positions)} lines", STRENGTHS[name]
        what = "the strongest"
    else:
        peaks = bands(spectrum.astype(float), grid, STRONGEST)
        kind, unit = f"{len(spectrum)} values ({spectrum.dtype})", unit_of(shardset, name)
        what = f"{spectrum.min():.4g} to {spectrum.max():.4g}; the highest bands"
    lines = [f"{name}: {kind}, {method}" + (f"; {what}" if peaks else "")]
    return lines + (table([(UNITS[grid.unit], unit), *((f"{x:.4f}", f"{y:.4g}") for x, y in peaks)]) if peaks else [])


def verify(folder):
    """Read every byte of a set and compare -> one line of what was checked. Raises UserError at the first difference.

    Shows a bar on a terminal.
    """
    start, shardset = time.monotonic(), ShardSet.open(folder)
    size = sum(shard["bytes"] for shard in shardset.manifest["shards"])
    # The shards for their own checksums, the blocks for theirs.
    with _bar(size + shardset.size.sum(), "verifying") as bar:
        shardset.verify(bar.update)
    return (
        f"{folder}: whole: {len(shardset.manifest['shards'])} shards, {len(shardset.block_records)} blocks, "
        f"{len(shardset)} records, {size:,} bytes, {time.monotonic() - start:.1f} s"
    )
