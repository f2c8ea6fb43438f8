"""A shard set <-> its Zarr v3 twin (mspt/data/zarr_set.py), which is read in any order.

shards convert DIR OUT.zarr         for reading by key or by number
shards convert SET.zarr OUT         for training
"""

from pathlib import Path

from tqdm import tqdm

from mspt import files
from mspt.data.opening import open_set
from mspt.data.shardset import ShardSet
from mspt.data.zarr_set import ZarrSet
from mspt.errors import UserError
from shards.writer import ShardSetWriter


def to_zarr(folder, out):
    """Write the records of a shard set as a store -> the ZarrSet. Raises UserError where out is there already."""
    shardset = ShardSet.open(folder)
    return ZarrSet.write(out, _all(shardset), shardset.manifest["provenance"], shardset.manifest["units"])


def to_shards(path, out, block=256):
    """Write the records of a store as a shard set of so many records a block -> the ShardSet.

    The blocks are byte for byte those of the set that the store was made of where that had blocks of this size. Raises
    UserError where out is there already.
    """
    molecules = ZarrSet.open(path)
    if block < 1:
        raise UserError(f"--block is {block}; give 1 or more records a block")
    with files.new_folder(out) as aside:
        writer = ShardSetWriter(aside, molecules.manifest["provenance"], block)
        for record in _all(molecules):
            writer.add(record)
        writer.close()
    return ShardSet.open(out)


def _all(molecules):
    return molecules.records(tqdm(range(len(molecules)), unit="record", disable=None))


def add_arguments(parser):
    parser.add_argument("source", metavar="SRC", type=Path, help="a shard set, or a Zarr store of one")
    parser.add_argument("out", metavar="OUT", type=Path, help="where the other of the two is written")
    parser.add_argument("--block", type=int, default=256, help="records a block of a shard set (default: %(default)s)")


def main(options):
    """Convert, and say what came out."""
    if isinstance(open_set(options.source), ShardSet):
        written = to_zarr(options.source, options.out)
    else:
        written = to_shards(options.source, options.out, options.block)
    print(f"{options.out}: {len(written)} records, {written.manifest['atoms']} atoms")
