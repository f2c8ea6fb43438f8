"""Molecules a second that one core reads as shuffled training batches, from our shards and from what others offer.

    python benchmarks/loader.py [--json FILE] [--molecules 256] [--rounds 5] [--keep FOLDER]

With spectra (the bundled computed ones, broadened, as float16 on the grids: 15.4 kB a molecule) and without (QM9's
conformers). The sides are those of benchmarks/formats.py, each in a process of its own on the same core with one
thread, in turns: medians, and medians of the ratios in a round; over 1 we are faster. Epochs follow one another, with
what each takes to start; all files are in the page cache. Before the clock starts, all sides are seen to give the same
molecules. WebDataset is the faster of npz and pickle. PyG has everything in memory. The limit reads the bytes of our
shards and copies them once. A peer that is not installed has no ratio.

All run in the environment that a process has by default; --keep-freed-memory gives all of them the setting of glibc
that our trainer makes for itself.
"""

import argparse
import itertools
import multiprocessing
import os
import signal
import statistics
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import formats
import measure
import numpy as np
import torch

RATIOS = {"ratio_to_pyg": "pyg", "ratio_to_mosaic": "mosaic", "ratio_to_litdata": "litdata"}
PACKAGES = ("numpy", "xxhash", "webdataset", "torch-geometric", "mosaicml-streaming", "litdata")


SETS = {"with_spectra": (formats.with_spectra, 32_768), "without_spectra": (formats.without_spectra, 20_000)}


def tally(batches):
    """Number of molecules, and name -> the sum of its values, each molecule's weighted by 1 + its record."""
    molecules, sums = 0, {}
    for batch in batches:
        weights = 1.0 + batch["record"].double().flatten()
        molecules += len(weights)
        per_atom = torch.repeat_interleave(weights, batch["ptr"].diff())
        for name in sorted(batch.keys() - {"ptr"}):
            values = batch[name].double()
            rows = per_atom if name in formats.PER_ATOM else weights
            sums[name] = sums.get(name, 0.0) + float(rows @ values.reshape(len(rows), -1).sum(1))
    return molecules, sums


def serve(side, folder, molecules, seconds, keep_freed_memory, pipe):
    """A side's process: sends the tally of an epoch, then, whenever asked, the seconds a molecule of a turn.

    A turn is a stretch of batches that goes on where the last one ended, from epoch to epoch.
    """
    torch.set_num_threads(1)
    if keep_freed_memory:
        from mspt.training.engine import keep_freed_memory

        keep_freed_memory()
    reader = formats.SIDES[side](folder, molecules)
    pipe.send(None if side == "limit" else tally(map(reader.plain, reader.batches(0))))
    batches = itertools.chain.from_iterable(map(reader.batches, itertools.count(1)))
    while pipe.recv():
        read, begin = 0, time.perf_counter()
        while (spent := time.perf_counter() - begin) < seconds:
            read += reader.count(next(batches))
        pipe.send(spent / read)


def compare(folder, records, sides, options):
    """side -> seconds a molecule in each round; the bytes a molecule of our shards."""
    for side in sides:
        if side != "limit":
            formats.SIDES[side].write(records, folder / side)
    shards = sum(path.stat().st_size for path in (folder / "mspt").glob("*.tar"))
    processes, pipes, tallies = {}, {}, {}
    for side in sides:
        pipes[side], other = multiprocessing.Pipe()
        own = folder / ("mspt" if side == "limit" else side)
        arguments = (side, own, options.molecules, options.seconds, options.keep_freed_memory, other)
        context = multiprocessing.get_context("spawn")
        processes[side] = context.Process(target=serve, args=arguments, daemon=True)
        processes[side].start()
        other.close()
        tallies[side] = pipes[side].recv()
    for side, found in tallies.items():
        if found is not None and not _agree(found, tallies["mspt"], len(records)):
            raise SystemExit(f"{side} gives other molecules: {found} where ours are {tallies['mspt']}")
    times = {side: [] for side in sides}
    for _ in range(options.rounds):
        for side in sides:
            times[side].append(_turn(processes[side], pipes[side]))
    for side, pipe in pipes.items():
        pipe.send(False)
        processes[side].join()
    return times, shards / len(records)


def _turn(process, pipe):
    """Seconds a molecule. All other processes are halted: some have threads that read ahead whenever they can."""
    others = [child for child in multiprocessing.active_children() if child is not process]
    try:
        for child in others:
            os.kill(child.pid, signal.SIGSTOP)
        pipe.send(True)
        return pipe.recv()
    finally:
        for child in others:
            os.kill(child.pid, signal.SIGCONT)


def _agree(found, expected, molecules):
    """Whether a tally is that of so many molecules, each with what belongs to it."""
    same = found[0] == molecules and found[1].keys() == expected[1].keys()
    return same and all(np.isclose(found[1][name], expected[1][name], rtol=1e-10) for name in expected[1])


def summary(times):
    """What goes into the result of one set."""
    rates = {side: 1 / statistics.median(seconds) for side, seconds in times.items()}
    webdataset = max((side for side in times if side.startswith("webdataset")), key=rates.get)
    result = {"ratio_to_webdataset": measure.ratio(times, webdataset, "mspt")}
    result |= {name: measure.ratio(times, side, "mspt") if side in times else None for name, side in RATIOS.items()}
    return result | {
        "fraction_of_limit": measure.ratio(times, "limit", "mspt"),
        "molecules_per_second": rates,
    }


def versions():
    """Package -> version, None where it is not installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--molecules", type=int, default=256, help="of a batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of a side's turn")
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)), help="which all run on")
    parser.add_argument("--keep-freed-memory", action="store_true", help="as the trainer does, for all")
    parser.add_argument("--keep", type=Path, help="write the sets to this new folder and leave them there")
    options = parser.parse_args()
    os.sched_setaffinity(0, {options.core})  # the processes to come inherit it
    torch.set_num_threads(1)

    missing = formats.missing()
    for side, module in missing.items():
        print(f"{side}: {module} is not installed, so it has no ratio; see make bench")
    sides = [side for side in formats.SIDES if side not in missing]
    result = measure.machine() | {
        "keep_freed_memory": options.keep_freed_memory,
        "batch_molecules": options.molecules,
        "rounds": options.rounds,
    }
    result["versions"] |= versions()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        print(f"the sets are written to {folder}")
        for name, (build, count) in SETS.items():
            times, size = compare(folder / name, build(count), sides, options)
            result[name] = {"molecules": count, "bytes_per_molecule": size} | summary(times)
            show(name, result[name])
    if options.json:
        measure.write(options.json, result)


def show(name, result):
    print(f"{name}: {result['molecules']} molecules of {result['bytes_per_molecule']:.0f} bytes in our shards")
    for side, rate in result["molecules_per_second"].items():
        print(f"    {side:20s} {rate:12.0f} molecules/s")
    for key, value in result.items():
        if key.startswith(("ratio", "fraction")):
            print(f"    {key:20s} {'none' if value is None else format(value, '12.2f')}")


if __name__ == "__main__":
    main()
