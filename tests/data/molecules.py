"""Made-up records and shard sets for tests."""

import numpy as np

from mspt.chemistry.spectra import GRIDS
from mspt.data.schema import Lines, Record
from shards.writer import ShardSetWriter


def record(key="a", atoms=3, seed=0, **changes):
    """A valid Record of so many atoms on a line 1 Å apart, a little displaced."""
    rng = np.random.default_rng(seed)
    positions = np.arange(atoms)[:, None] * [1.0, 0, 0] + rng.uniform(-0.2, 0.2, (atoms, 3))
    fields = {"numbers": rng.integers(1, 119, atoms).astype(np.uint8), "positions": positions.astype(np.float32)}
    return Record(key=key, **(fields | changes))


def spectrum(name, kind, seed=0):
    """values16, values32, lines or no_lines of a spectrum; None for missing."""
    rng = np.random.default_rng(seed)
    grid = GRIDS[name]
    if kind == "missing":
        return None
    if kind == "no_lines":
        return Lines(np.zeros(0, np.float32), np.zeros(0, np.float32))
    if kind == "lines":
        count = int(rng.integers(1, 6))
        end = grid.start + grid.step * grid.length
        return Lines(
            rng.uniform(grid.start, end, count).astype(np.float32), rng.uniform(0, 5, count).astype(np.float32)
        )
    return rng.uniform(0, 5, grid.length).astype({"values16": np.float16, "values32": np.float32}[kind])


def plain(sizes):
    """Records of these numbers of atoms, without spectra; their keys count up."""
    return [record(f"mol-{i:05d}", int(n), seed=i) for i, n in enumerate(sizes)]


def write_set(folder, records, **options):
    """A shard set in a folder -> its manifest."""
    writer = ShardSetWriter(folder, {"source": "test"}, **options)
    for one in records:
        writer.add(one)
    return writer.close()


def assert_same(one, other):
    """Records that agree in every field, types of the arrays included."""
    assert vars(one).keys() == vars(other).keys()
    for name, value in vars(one).items():
        _assert_same(value, getattr(other, name), name)


def _assert_same(one, other, name):
    assert type(one) is type(other), name
    if isinstance(one, np.ndarray):
        assert one.dtype == other.dtype, name
        np.testing.assert_array_equal(one, other, err_msg=name)
    elif isinstance(one, Lines):
        _assert_same(one.positions, other.positions, name)
        _assert_same(one.strengths, other.strengths, name)
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), name
        for key, value in one.items():
            _assert_same(value, other[key], f"{name}.{key}")
    else:
        assert one == other, name
