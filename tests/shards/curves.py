"""Real spectra for the files that tests write: those of the bundled molecules, on any grid."""

from pathlib import Path

import torch

import shards
from mspt.chemistry.spectra import GRIDS, LINE_SHAPES, broaden
from mspt.data.shardset import ShardSet

BUNDLED = Path(shards.__file__).parent / "bundled" / "qm9-spectra" / "heldout"


def molecules(count):
    """The first records of the bundled set, with lines of all three spectra."""
    return list(ShardSet.open(BUNDLED).records(range(count)))


def curve(record, name, grid, height):
    """A spectrum of a record as float64 values on a grid, scaled so that its maximum on the usual grid is height."""

    def on(grid):
        positions, strengths = (torch.tensor(a).double() for a in vars(record.spectra[name]).values())
        return broaden(positions, strengths, torch.tensor([0, len(positions)]), grid, LINE_SHAPES[name])[0].numpy()

    return on(grid) * height / on(GRIDS[name]).max()
