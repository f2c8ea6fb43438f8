"""Time and memory of planning an epoch for one rank of many, beside what mosaicml-streaming does for the same.

    python benchmarks/planning.py [--json FILE] [--ranks 4096] [--records 10000000 …] [--peer-most 100000000]

Ours: all that a rank does between an opened index and the first batch, on blocks of 256 records with one lane a rank
and with two. The numbers of atoms lie in a mapped file, as in a set; here they are zeros, on which the work does not
depend. mosaicml-streaming: its own function that lays out an epoch's samples, which the first process of each node
runs (8 ranks a node; shuffle py1e, canonical nodes and block size by default). Beyond --peer-most records its time and
memory are extrapolated in proportion to the records, and marked so. Each runs in a process of its own: the median of
three plans, and the peak of memory above what was there before.
"""

import argparse
import importlib.util
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import formats
import measure
import numpy as np

from mspt.data.packing import Budget
from mspt.data.shardset import ShardSet
from mspt.data.store import Folder
from mspt.data.stream import DataSettings, Stream

BLOCK, BATCH, RANKS_A_NODE, SHARD = 256, 256, 8, 1 << 14
PLANS = 3
LEAST = 1 << 16  # records of the plan that is made before the clock starts: fewer do not suffice for every rank


def ours(records, path, ranks, lanes):
    """A function that plans rank 0's part of an epoch."""
    records = max(records, LEAST)
    counts = np.full(-(-records // BLOCK), BLOCK, np.int32)
    counts[-1] -= BLOCK * len(counts) - records
    index = {"atoms": np.memmap(path, np.int32, "r", shape=records), "records": counts}
    index["block_atoms"] = counts.astype(np.int64)
    index |= dict.fromkeys(("shard", "offset", "size", "head", "checksum"))
    settings = DataSettings(train="none", lanes=lanes, budget=Budget(molecules=BATCH, atoms=BATCH))

    def plan():
        shardset = ShardSet(Folder("none"), None, {"largest": 1, "shards": []}, index)
        Stream([shardset], settings, seed=0, rank=0, world_size=ranks).steps(0)

    return plan


def mosaic(records, ranks):
    """A function that lays out an epoch as mosaicml-streaming does for a node."""
    records = max(records, LEAST)
    formats.import_streaming()
    from streaming.base.batching import generate_work
    from streaming.base.world import World

    nodes = -(-ranks // RANKS_A_NODE)
    shards = np.full(-(-records // SHARD), SHARD)
    shards[-1] -= SHARD * len(shards) - records
    # What a StreamingDataset of one stream passes on; no sample is repeated or left out.
    dataset = SimpleNamespace(
        num_canonical_nodes=nodes,
        initial_physical_nodes=nodes,
        batch_size=BATCH,
        epoch_size=records,
        partition_algo="relaxed",
        shuffle=True,
        shuffle_algo="py1e",
        shuffle_seed=9176,
        shuffle_block_size=max(4_000_000 // nodes, 1 << 18),
        resample_streams=lambda epoch: (shards, np.arange(records)),
    )
    world = World(num_nodes=nodes, ranks_per_node=RANKS_A_NODE, workers_per_rank=1, worker=0)
    return lambda: generate_work("random", dataset, world, 0, 0)


def seconds(build, records, *arguments):
    """Median seconds of plans in a process of their own, after a small one."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_seconds, (build, records, arguments))


def _seconds(build, records, arguments):
    build(LEAST, *arguments)()
    plan, times = build(records, *arguments), []
    for _ in range(PLANS):
        begin = time.perf_counter()
        plan()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def cost(build, *arguments):
    memory = measure.peak_memory(build, *arguments)
    return {"seconds": seconds(build, *arguments), "peak_memory_bytes": memory, "extrapolated": False}


def plan_ours(records, ranks, lanes):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "atoms"
        with path.open("wb") as file:
            file.truncate(max(records, LEAST) * np.dtype(np.int32).itemsize)  # takes no room on the disk
        return cost(ours, records, path, ranks, lanes)


def plan_mosaic(records, ranks, most):
    found = cost(mosaic, min(records, most), ranks)
    if records <= most:
        return found
    factor = records / most
    return {name: factor * found[name] for name in ("seconds", "peak_memory_bytes")} | {"extrapolated": True}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--ranks", type=int, default=4096)
    parser.add_argument("--records", type=int, nargs="+", default=[10**7, 10**8, 10**9])
    parser.add_argument("--peer-most", type=int, default=10**8, help="records that the peer is run with at most")
    options = parser.parse_args()
    with_peer = importlib.util.find_spec("streaming") is not None
    if not with_peer:
        print("mosaic: streaming is not installed, so there is nothing to compare with; see make bench")

    result = measure.machine() | {"ranks": options.ranks, "plans": {}}
    for records in options.records:
        row = {
            "mspt": plan_ours(records, options.ranks, options.ranks),
            "mspt_two_lanes": plan_ours(records, options.ranks, 2 * options.ranks),
        }
        if with_peer:
            row["mosaic"] = plan_mosaic(records, options.ranks, options.peer_most)
            for name in ("seconds", "peak_memory_bytes"):
                row[f"ratio_of_{name}"] = row["mosaic"][name] / row["mspt"][name]
        result["plans"][records] = row
        for side in [side for side in row if not side.startswith("ratio")]:
            found = row[side]
            mark = "  (extrapolated)" if found["extrapolated"] else ""
            size = found["peak_memory_bytes"] / 2**20
            print(f"{records:13d} records  {side:15s}{found['seconds']:10.3f} s{size:11.1f} MiB{mark}", flush=True)
    if options.json:
        measure.write(options.json, result)


if __name__ == "__main__":
    main()
