"""Look at a shard set: its blocks and spectra, one of its records, whether it is whole."""

import difflib
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
_ATOMS_AT_ONCE = 1 << 24


def sets(folder):
    """The shard sets that a folder means: itself, or its children (train, heldout) where it is none -> list of Paths.

    A folder that is neither, or a URL, is given back as it is: to open it says what is wrong.
    """
    if "://" in str(folder):
        return [folder]
    folder = Path(folder)
    if (folder / MANIFEST).exists():
        return [folder]
    return sorted(manifest.parent for manifest in folder.glob(f"*/{MANIFEST}")) or [folder]


def open_one(folder):
    """Open a folder as one ShardSet. Raises UserError that names the sets where it holds several."""
    found = sets(folder)
    if found not in ([folder], [Path(folder)]):
        raise UserError(f"{folder}: is no shard set but holds {', '.join(map(str, found))}; give one of them")
    return ShardSet.open(folder)


def sample(shardset, count=SAMPLE):
    """Numbers of count blocks (all, if there are fewer), evenly spread over the set. Raises UserError below 1."""
    if count < 1:
        raise UserError(f"--blocks is {count}; give 1 or more blocks to read")
    total = len(shardset.block_records)
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int))


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


def table(rows, indent="  "):
    """Rows of strings as lines of text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        indent + "  ".join(f"{cell:{'>' if i else '<'}{widths[i]}}" for i, cell in enumerate(row)).rstrip()
        for row in rows
    ]


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
            yield number, shardset.block(number)
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
