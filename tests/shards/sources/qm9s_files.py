"""Files of QM9S's layouts, from molecules and spectra that lie in the repository."""

from pathlib import Path

import numpy as np
import torch

from mspt.chemistry.spectra import GRIDS, LINE_SHAPES, broaden
from mspt.data.shardset import ShardSet
from shards import build

BUNDLED = Path(build.__file__).parent / "bundled/qm9-spectra/train"
NAMES = {"uv_vis": "uv", "ir": "ir", "raman": "raman"}


def molecules(count):
    """The first Records of the bundled set; their spectra as values [length] in float64."""
    shardset = ShardSet.open(BUNDLED)
    return [(record, _values(record)) for record in shardset.records(range(count))]


def _values(record):
    values = {}
    for name, lines in record.spectra.items():
        positions, strengths = (torch.tensor(part).double() for part in (lines.positions, lines.strengths))
        ptr = torch.tensor([0, len(positions)])
        values[name] = broaden(positions, strengths, ptr, GRIDS[name], LINE_SHAPES[name])[0].numpy()
    return values


def number(record):
    """The number of a molecule in QM9."""
    return int(record.key.removeprefix("qm9-"))


def fields(record):
    """What qm9s.pt holds of a molecule: the fields that are read, and two of those that are not."""
    n = len(record.numbers)
    return {
        "edge_index": torch.combinations(torch.arange(n)).T,
        "pos": torch.tensor(record.positions),
        "number": number(record),
        "smile": record.smiles,
        "z": torch.tensor(record.numbers).long(),
        "dipole": torch.tensor([[0.6, 0.0, -0.8]]) * record.targets["mu"],
        "polar": torch.eye(3)[None] * record.targets["alpha"],
        "energy": torch.tensor([[record.targets["u0"]]]),
        "dedipole": torch.zeros(n, 3, 3),
    }


def table(path, name, rows):
    """Write a table of spectra; rows: (index, values or text)."""
    grid = GRIDS[name]
    points = np.round(grid.start + grid.step * np.arange(grid.length), 2)
    lines = [",".join(["", *map(repr, points.tolist())])]
    for index, values in rows:
        lines.append(f"{index},{values if isinstance(values, str) else ','.join(map(repr, values.tolist()))}")
    path.write_text("\n".join(lines) + "\n")
