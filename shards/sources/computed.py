"""Spectra computed here: IR and Raman lines by GFN2-xTB, UV-Vis lines by TD-B3LYP, for QM9 or a list of SMILES.

    python -m shards.sources.computed --molecules qm9 --count 2000 --out DIR
    python -m shards.sources.computed --molecules FILE.smi --out DIR --spectra ir,raman

IR and Raman come together, by a quarter of the work of all three. One line of JSON a molecule is appended to
DIR/results.jsonl, or to DIR/rejects.jsonl with the reason. A killed run goes on where it stopped when the same command
is given again. `shards build computed` makes shards of the folder.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import time
import zlib
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np

from mspt.chemistry.spectra import SPECTRA
from mspt.data.schema import Lines, Record, RejectedRecord
from mspt.errors import UserError
from shards.build import excluded
from shards.molecules import embed, refuse_ions_and_radicals
from shards.source import Source
from shards.sources import qm9

HELP = "a folder of shards.sources.computed"

# Lines weaker than this (in the spectrum's unit) are left out of a record: forbidden ones, and numerical noise.
WEAKEST = {"uv_vis": 1e-5, "ir": 1e-3, "raman": 1e-3}
# Vibrations below this (cm^-1) are hindered rotations that the harmonic picture gets wrong, far below the grid.
LOWEST = {"uv_vis": 0.0, "ir": 30.0, "raman": 30.0}
# What a row of a computed molecule has, beside the lines of each spectrum.
FIELDS = {"key", "smiles", "numbers", "positions", "targets", "method", "seconds"}
# A bond is a distance below this multiple of the sum of covalent radii.
BOND = 1.25


def bonds(numbers, positions):
    """Pairs of bonded atoms, as a set of (i, j) with i < j, from positions [n, 3] Å."""
    from rdkit import Chem

    table = Chem.GetPeriodicTable()
    radii = np.array([table.GetRcovalent(int(z)) for z in numbers])
    distances = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    near = distances < BOND * (radii[:, None] + radii[None])
    return {(int(i), int(j)) for i, j in zip(*np.nonzero(np.triu(near, 1)), strict=True)}


def compute(molecule, spectra=SPECTRA):
    """One molecule -> its JSON row: lines of the spectra asked for, the method of each, the seconds each took.

    UV-Vis is vertical from the molecule's own geometry; IR and Raman belong to the GFN2-xTB minimum next to it, and
    a molecule whose bonds change on the way there is refused (ValueError): its vibrations would be another's.
    """
    from shards.quantum import excitations, vibrations, xtb

    row = {
        "key": molecule.key,
        "smiles": molecule.smiles,
        "numbers": molecule.numbers.tolist(),
        "positions": np.round(molecule.positions, 6).tolist(),
        "targets": molecule.targets,
        "method": {},
        "seconds": {},
    }
    vibrational = [name for name in ("ir", "raman") if name in spectra]
    if vibrational:
        start = time.process_time()
        vibration = vibrations.vibrations(molecule.numbers, molecule.positions)
        if bonds(molecule.numbers, molecule.positions) != bonds(molecule.numbers, vibration["positions"]):
            raise ValueError("bonds changed while relaxing by GFN2-xTB")
        row["seconds"]["vibrations"] = round(time.process_time() - start, 2)
    for name in vibrational:
        row[name] = _lines(vibration["wavenumbers"], vibration[name], 3)
        row["method"][name] = xtb.METHOD
    if "uv_vis" in spectra:
        start = time.process_time()
        row["uv_vis"] = _lines(*excitations.excitations(molecule.numbers, molecule.positions), 6)
        row["method"]["uv_vis"] = excitations.METHOD
        row["seconds"]["excitations"] = round(time.process_time() - start, 2)
    return row


def _lines(positions, strengths, digits):
    return [np.round(positions, 4).tolist(), np.round(strengths.astype(float), digits).tolist()]


def smiles_molecules(path):
    """Molecules of a SMILES file (one a line, an optional name after it), 3D by RDKit's ETKDG and MMFF94.

    Lines that RDKit cannot embed, ions and radicals are yielded as (key, reason) for the rejects. Raises UserError
    where the file cannot be read or two lines have one key.
    """
    for number, (key, smiles) in _smiles_lines(path).items():
        try:
            molecule = embed(smiles, zlib.crc32(key.encode()))
            refuse_ions_and_radicals(molecule)
        except ValueError as error:
            yield key, f"{path}:{number}: {error}"
            continue
        yield qm9.Molecule(
            key=key,
            numbers=np.array([atom.GetAtomicNum() for atom in molecule.GetAtoms()], dtype=np.uint8),
            positions=np.array(molecule.GetConformer().GetPositions()),
            smiles=smiles,
            targets={},
        )


def _smiles_lines(path):
    """Number of a line -> its key, which is all that follows the SMILES, and its SMILES. Raises UserError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); give --molecules qm9, or a file of SMILES in UTF-8"
        ) from error
    found, line_of = {}, {}
    for number, line in enumerate(text.splitlines(), 1):
        fields = line.strip().split(maxsplit=1)
        if not fields:
            continue
        key = fields[1] if len(fields) > 1 else f"{Path(path).stem}-{number:06d}"
        if line_of.setdefault(key, number) != number:
            raise UserError(f"{path}:{number}: the key {key!r} is that of line {line_of[key]}; give each line its own")
        found[number] = key, fields[0]
    return found


def _work(molecule, spectra=SPECTRA):
    if isinstance(molecule, tuple):  # already refused by its reader
        return {"key": molecule[0], "reason": molecule[1]}
    from pyscf import lib

    lib.num_threads(1)
    try:
        return compute(molecule, spectra)
    except (ValueError, RuntimeError, ArithmeticError, np.linalg.LinAlgError) as error:
        return {"key": molecule.key, "smiles": molecule.smiles, "reason": str(error)}


def placed_rows(path):
    """Yield (byte where it begins, row) of a JSON-lines file, if it is there.

    A torn last line is left out: a kill left it, or it is being written. Raises UserError where another is no JSON, or
    no row of run.
    """
    if not Path(path).exists():
        return
    with Path(path).open("rb") as file:
        place = 0
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n"):
                try:
                    row = _parsed(line)
                except ValueError as error:
                    raise UserError(
                        f"{path}:{number}: {error}; remove the line, and its molecule is computed again"
                    ) from error
                yield place, row
            place += len(line)


def _parsed(line):
    """The row that a line holds. Raises ValueError where that is not what run writes."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"is no JSON ({error})") from error
    if not isinstance(row, dict):
        raise ValueError("is no object of JSON")
    fields = {"key", "reason"} if "reason" in row else FIELDS | set(row.get("method", ()))
    if missing := fields - set(row):
        raise ValueError(f"lacks {', '.join(sorted(missing))}")
    return row


def _cut_torn_line(path):
    """Make a JSON-lines file end with its last whole line, so that the next row starts a new one."""
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def run(molecules, out, processes, spectra=SPECTRA, exclude=frozenset()):
    """Compute the spectra of what is not in out/results.jsonl or out/rejects.jsonl yet. exclude: keys left out."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    files = [out / f"{name}.jsonl" for name in ("results", "rejects")]
    for file in files:
        _cut_torn_line(file)
    known = {row["key"] for file in files for _, row in placed_rows(file)}
    todo = [m for m in molecules if (m[0] if isinstance(m, tuple) else m.key) not in known | exclude]
    print(f"{len(known)} molecules done, {len(todo)} to do, {processes} processes", flush=True)
    # Threads inside a molecule would fight with the processes over the cores.
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    begin = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with (
        files[0].open("a") as results,
        files[1].open("a") as rejects,
        context.Pool(processes, maxtasksperchild=100) as pool,
    ):
        for done, row in enumerate(pool.imap_unordered(partial(_work, spectra=spectra), todo), 1):
            file = rejects if "reason" in row else results
            file.write(json.dumps(row) + "\n")
            file.flush()
            if done % 10 == 0 or "reason" in row:
                seconds = time.monotonic() - begin
                left = seconds / done * (len(todo) - done)
                note = f" rejected {row['key']}: {row['reason']}" if "reason" in row else ""
                print(f"{done}/{len(todo)} {seconds:.0f} s, {left:.0f} s left{note}", flush=True)


class Computed(Source):
    """Rows of a folder of results, by their key: processes finish in no fixed order. Refused rows come last.

    A chunk is a list of (number of the file, byte where the row begins).
    """

    def __init__(self, folder):
        self.inputs = [path for name in ("results", "rejects") if (path := Path(folder) / f"{name}.jsonl").exists()]
        places, refused, seconds, first, methods = [], [], Counter(), None, {}
        for number, path in enumerate(self.inputs):
            for place, row in placed_rows(path):
                if "reason" in row:
                    refused.append((number, place))
                    continue
                places.append((row["key"], number, place))
                seconds.update(row["seconds"])
                methods |= row["method"]
                first = min(first or row, row, key=lambda row: row["key"])
        if not places:
            raise UserError(f"{folder}: no results.jsonl with results; run python -m shards.sources.computed first")
        self.places = [(number, place) for _, number, place in sorted(places)] + refused
        self.total = len(self.places)
        qm9_targets = bool(first["targets"])
        self.provenance = {
            "source": "QM9 (B3LYP/6-31G(2df,p) geometries, qm9pack)" if qm9_targets else "SMILES (RDKit conformers)",
            "methods": dict(sorted(methods.items())),
            "cpu_seconds": {part: round(total) for part, total in seconds.items()},
            "units": (qm9.TARGET_UNITS if qm9_targets else {})
            | {"ir": "km/mol", "raman": "Å^4/amu", "uv_vis": "oscillator strength"},
        }

    def chunks(self, size):
        for first in range(0, self.total, size):
            yield self.places[first : first + size]

    def read(self, chunk):
        for number, places in itertools.groupby(chunk, key=lambda place: place[0]):
            with self.inputs[number].open("rb") as file:
                for _, place in places:
                    file.seek(place)
                    row = json.loads(file.readline())
                    if "reason" in row:
                        yield RejectedRecord(row["key"], "spectra", row["reason"])
                    else:
                        yield _record(row, self.provenance["source"])


def add_arguments(parser):
    parser.add_argument("--from", dest="folder", required=True, type=Path, help="folder of results.jsonl")


def open(options):
    return Computed(options.folder)


def _record(row, source):
    """A row of results.jsonl as a Record. Lines that no grid can show are left out."""
    spectra = {}
    for name in row["method"]:
        positions, strengths = (np.array(values, np.float32) for values in row[name])
        shown = (strengths > WEAKEST[name]) & (positions > LOWEST[name])
        spectra[name] = Lines(positions[shown], strengths[shown])
    return Record(
        key=row["key"],
        numbers=np.array(row["numbers"], np.uint8),
        positions=np.array(row["positions"], np.float32),
        spectra=spectra,
        targets=row["targets"],
        smiles=row["smiles"],
        source=source,
        methods=row["method"],
    )


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--molecules", required=True, help="qm9, or a file of SMILES")
    parser.add_argument("--count", type=int, help="how many, spread over the whole set (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="which ones")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--spectra", default=",".join(SPECTRA), help="which ones, such as ir,raman (default: all)")
    parser.add_argument("--exclude", type=Path, metavar="FILE", help="keys to leave out, one a line")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args(arguments)
    spectra = options.spectra.split(",")
    if unknown := set(spectra) - set(SPECTRA):
        raise SystemExit(f"--spectra {options.spectra}: {', '.join(sorted(unknown))} is none of {', '.join(SPECTRA)}")
    try:
        exclude = excluded(options.exclude)
        source = qm9.molecules() if options.molecules == "qm9" else smiles_molecules(options.molecules)
        molecules = list(source)
        chosen = qm9.choose(molecules, options.count or len(molecules), options.seed)
        run(chosen, options.out, options.processes, spectra, exclude)
    except UserError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
