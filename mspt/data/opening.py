"""A set of molecules of either kind, a shard set or its Zarr twin: what reads one need not know which.

Both have len, manifest, folder, atoms and records(numbers).
"""

from pathlib import Path

from mspt.data import stream
from mspt.data.shardset import MANIFEST, ShardSet
from mspt.data.zarr_set import ZarrSet
from mspt.errors import UserError


def manifest_file(folder):
    """The file that says what a set is. Raises UserError where there is none."""
    for name in (MANIFEST, "zarr.json"):
        if (Path(folder) / name).exists():
            return Path(folder) / name
    raise UserError(f"{folder}: no set of molecules there: it has neither {MANIFEST} nor zarr.json; build one first")


def open_set(folder):
    """A ShardSet or a ZarrSet. Raises UserError that names the file and the remedy."""
    return (ShardSet if manifest_file(folder).name == MANIFEST else ZarrSet).open(folder)


def sequential(molecules, budget, targets=(), forces=False):
    """stream.sequential of either kind; a ZarrSet's batches carry all targets and forces that it has."""
    if isinstance(molecules, ZarrSet):
        return molecules.sequential(budget)
    return stream.sequential(molecules, budget, targets, forces)
