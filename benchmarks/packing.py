"""How level the work of a step is over ranks: micro-batches under a budget of atoms beside a fixed number of molecules.

    python benchmarks/packing.py [--json FILE] [--molecules 64] [--steps 256]

Per step, the most atoms (and edges, n · min(n, 32) of n atoms) of any rank over the mean of the ranks, the time that
all wait for the slowest. `epoch` is the sum of the most by the sum of the mean over all steps, the last ones included
in which some lanes are done; `median` is the median step's. QM9-like sizes are those of the bundled conformers,
drug-like ones those of the 4 854 molecules of RDKit's NCI file with hydrogens; they are repeated in their order until
every lane has so many steps. The order is the trainer's own; fixed numbers are taken from a random order of all
molecules, as many a step as ours has on average.
"""

import argparse
from pathlib import Path

import measure
import numpy as np

from mspt.data import packing
from mspt.data.order import EpochOrder
from mspt.data.shardset import ShardSet
from mspt.data.store import Folder
from mspt.data.stream import DataSettings, Lane, sequences

BLOCK = 256
RANKS = (8, 64, 512)
LANES = (1, 4)  # of a rank
TARGETS = {"qm9_like": 1.05, "drug_like": 1.10}


def qm9_like():
    return np.array(ShardSet.open(measure.ROOT / "shards/bundled/qm9-geometries/train").atoms)


def drug_like():
    from rdkit import Chem, RDConfig, RDLogger

    RDLogger.DisableLog("rdApp.*")
    lines = (Path(RDConfig.RDDataDir) / "NCI/first_5K.smi").read_text().splitlines()
    molecules = (Chem.MolFromSmiles(line.split()[0]) for line in lines)
    return np.array([Chem.AddHs(molecule).GetNumAtoms() for molecule in molecules if molecule is not None])


def edges(atoms):
    return atoms * np.minimum(atoms, packing.NEIGHBOURS)


def synthetic(atoms):
    """A ShardSet of molecules of these numbers of atoms [k · BLOCK] that has no files."""
    index = {"atoms": atoms, "records": np.full(len(atoms) // BLOCK, BLOCK, np.int32)}
    index["block_atoms"] = atoms.reshape(-1, BLOCK).sum(1, dtype=np.int64)
    return ShardSet(
        Folder("none"), None, {"shards": []}, index | dict.fromkeys(("shard", "offset", "size", "head", "checksum"))
    )


def under_budget(atoms, ranks, lanes, budget):
    """Work of micro-batches [rank, step] as (atoms, edges), 0 where a rank's lanes are done, and molecules a step."""
    shardset, every = synthetic(atoms), lanes * ranks
    settings = DataSettings(train="none", lanes=every, budget=budget)
    epoch = EpochOrder(sequences([shardset], budget, seed=0), [1.0], seed=0, epoch=0)
    works = []
    for number in range(every):
        lane = Lane([shardset], settings, epoch, number)
        works.append([np.add.reduceat(work, lane.starts[:-1]) for work in (lane.atoms, edges(lane.atoms))])
    steps = max(len(work[0]) for work in works)
    padded = np.array([[np.pad(work, (0, steps - len(work))) for work in pair] for pair in works])
    # Rank r serves the lanes r, r + ranks, …
    by_rank = padded.reshape(lanes, ranks, 2, steps).sum(0)
    batches = sum(len(work[0]) for work in works)
    return (by_rank[:, 0], by_rank[:, 1]), lanes * len(atoms) / batches


def fixed_count(atoms, ranks, count):
    """The same of a fixed number of molecules a rank and step."""
    shuffled = np.random.default_rng(0).permutation(atoms)
    steps = len(atoms) // (ranks * count)
    own = shuffled[: steps * ranks * count].reshape(ranks, steps, count)
    return own.sum(2), edges(own).sum(2)


def levels(works):
    """name -> max over mean, from (atoms, edges) [rank, step]."""
    result = {}
    for name, work in zip(("atoms", "edges"), works, strict=True):
        most, mean = work.max(0), work.mean(0)
        result[name] = {"epoch": float(most.sum() / mean.sum()), "median": float(np.median(most / mean))}
    return result


def compare(sizes, ranks, lanes, options):
    """What goes into the result for so many ranks with so many lanes each."""
    records = -(-options.molecules * options.steps * ranks * lanes // BLOCK) * BLOCK
    atoms = np.resize(sizes, records).astype(np.int32)
    # Molecules never bind here.
    budget = packing.Budget(molecules=records, atoms=int(options.molecules * sizes.mean() + sizes.max() / 2))
    works, molecules = under_budget(atoms, ranks, lanes, budget)
    return {
        "molecules_per_step": molecules,
        "packed": levels(works),
        "fixed_count": levels(fixed_count(atoms, ranks, round(molecules))),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--molecules", type=int, default=64, help="of a micro-batch, about")
    parser.add_argument("--steps", type=int, default=256, help="of an epoch, about")
    options = parser.parse_args()

    result = measure.machine() | {"molecules": options.molecules, "steps": options.steps, "targets": TARGETS}
    print(f"{'':34s}{'under a budget of atoms':^40s}{'fixed number of molecules':^40s}")
    columns = [f"{name} {part}" for name in ("atoms", "edges") for part in ("epoch", "median")]
    print(f"{'sizes':10s}{'ranks':>8s}{'lanes':>6s}{'target':>8s}  " + "".join(f"{c:>14s}" for c in 2 * columns))
    for name, sizes in (("qm9_like", qm9_like()), ("drug_like", drug_like())):
        result[name] = {"mean": float(sizes.mean()), "largest": int(sizes.max()), "ranks": {}}
        for ranks in RANKS:
            result[name]["ranks"][ranks] = {}
            for lanes in LANES:
                found = compare(sizes, ranks, lanes, options)
                result[name]["ranks"][ranks][f"lanes_{lanes}"] = found
                values = [v for way in ("packed", "fixed_count") for part in found[way].values() for v in part.values()]
                row = "".join(f"{value:14.3f}" for value in values)
                print(f"{name:10s}{ranks:8d}{lanes:6d}{TARGETS[name]:8.2f}  {row}", flush=True)
    if options.json:
        measure.write(options.json, result)


if __name__ == "__main__":
    main()
