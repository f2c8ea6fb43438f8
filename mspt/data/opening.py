"""A set of molecules of either kind, a shard set or its Zarr twin: what reads one need not know which.

Both have len, manifest, folder, atoms and records(numbers).
"""

from pathlib import Path

from tqdm import tqdm

from mspt.data import stream
from mspt.data.packing import Budget
from mspt.data.shardset import MANIFEST, ShardSet
from mspt.data.zarr_set import ZarrSet
from mspt.errors import UserError


def open_set(folder):
    """A ShardSet, which may be behind a URL, or a ZarrSet. Raises UserError that names the file and the remedy."""
    if "://" in str(folder) or (Path(folder) / MANIFEST).exists():
        return ShardSet.open(folder)
    if (Path(folder) / "zarr.json").exists():
        return ZarrSet.open(folder)
    raise UserError(f"{folder}: no set of molecules there: it has neither {MANIFEST} nor zarr.json; build one first")


def sequential(molecules, budget, targets=(), forces=False, on_bad_block="error"):
    """stream.sequential of either kind; a ZarrSet's batches carry all targets and forces that it has, and what is
    damaged in it is an error.
    """
    if isinstance(molecules, ZarrSet):
        return molecules.sequential(budget)
    return stream.sequential(molecules, budget, targets, forces, on_bad_block)


def broadened(molecules, settings, device):
    """Yield all of a set's MoleculeBatches in order, on the device, with the spectra that DataSettings name and shape.

    Shows a bar on a terminal.
    """
    budget = Budget(molecules=256, atoms=max(8192, molecules.manifest["largest"]))
    with tqdm(total=len(molecules), unit="molecule", disable=None) as bar:
        for batch in sequential(molecules, budget, on_bad_block=settings.on_bad_block):
            yield batch.to(device).broadened(settings.line_shapes, settings.spectra)
            bar.update(len(batch.keys))
