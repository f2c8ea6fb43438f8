"""Batches from blocks, in any order and from any mixture of blocks, against the records one by one."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from mspt.chemistry.spectra import GRIDS, LINE_SHAPES, broaden
from mspt.data import block as blocks
from mspt.data import keyed
from mspt.data.batch import MoleculeBatch
from mspt.data.gather import Held
from mspt.data.schema import Lines
from tests.data.molecules import plain, record, spectrum

KINDS = ("missing", "values16", "values32", "lines", "no_lines")


def bonded(one, seed=0):
    """The same record with a list of bonds, which may be empty."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(0, 2 * len(one.numbers)))
    pairs = rng.integers(0, len(one.numbers), (count, 2)).astype(np.int16)
    return replace(one, bonds=pairs, bond_types=rng.integers(0, 5, count).astype(np.uint8))


def mixed(count, seed=0):
    """Records of every kind of spectrum; only every third has a target, and bonds are known of two in three."""
    rng = np.random.default_rng(seed)
    made = [
        record(
            f"mix-{seed}-{i}",
            int(rng.integers(1, 8)),
            seed=100 * seed + i,
            spectra={
                name: s
                for j, name in enumerate(GRIDS)
                if (s := spectrum(name, KINDS[rng.integers(5)], i + j)) is not None
            },
            targets={"gap": 0.1 + i, "u0": -1e4 - 1e-3 * i} if i % 3 == 0 else {},
        )
        for i in range(count)
    ]
    return [bonded(one, i) if i % 3 else one for i, one in enumerate(made)]


def assert_holds(batch, records):
    """The batch is these records in this order."""
    assert list(batch.keys) == [r.key for r in records]
    assert batch.records.tolist() == [keyed.word(r.key) for r in records]
    assert batch.ptr.tolist() == np.cumsum([0] + [len(r.numbers) for r in records]).tolist()
    assert batch.numbers.dtype == torch.int64 and batch.positions.dtype == torch.float32
    np.testing.assert_array_equal(batch.numbers, np.concatenate([r.numbers for r in records]))
    np.testing.assert_array_equal(batch.positions, np.concatenate([r.positions for r in records]))
    assert batch.molecule.tolist() == [i for i, r in enumerate(records) for _ in r.numbers]
    for name in GRIDS:
        own = [r.spectra.get(name) for r in records]
        assert batch.present[name].tolist() == [s is not None for s in own]
        for i, s in enumerate(own):
            if name in batch.spectra:
                expected = s if isinstance(s, np.ndarray) else np.zeros(GRIDS[name].length)
                np.testing.assert_array_equal(batch.spectra[name][i], expected)
            else:
                assert not isinstance(s, np.ndarray)
            if name in batch.lines:
                lines = batch.lines[name]
                part = slice(*lines.ptr[i : i + 2].tolist())
                expected = s if isinstance(s, Lines) else Lines(np.zeros(0), np.zeros(0))
                np.testing.assert_array_equal(lines.positions[part], expected.positions)
                np.testing.assert_array_equal(lines.strengths[part], expected.strengths)
            else:
                assert not isinstance(s, Lines)
    for name in {name for r in records for name in r.targets}:
        expected = [r.targets.get(name, np.nan) for r in records]
        np.testing.assert_array_equal(batch.targets[name], np.array(expected))
    known = [r.bonds is not None for r in records]
    if batch.bonds is None:
        assert not any(known)
    else:
        first = batch.ptr.tolist()
        listed = [(first[i] + r.bonds, r.bond_types) for i, r in enumerate(records) if known[i]]
        assert batch.bonds.known.tolist() == known
        assert batch.bonds.pairs.tolist() == [pair for pairs, _ in listed for pair in pairs.tolist()]
        assert batch.bonds.types.tolist() == [kind for _, kinds in listed for kind in kinds.tolist()]
        assert [part.dtype for part in batch.bonds] == [torch.int64, torch.int64, torch.bool]
        assert batch.bonds.pairs.shape == (len(batch.bonds.types), 2)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.data())
def test_rows_of_several_blocks_in_any_order(sizes, data):
    """Blocks with spectra, some blocks without any, taken in a shuffled order."""
    parts = [mixed(size, seed) if seed % 3 != 2 else plain([3] * size) for seed, size in enumerate(sizes)]
    chosen = [data.draw(st.permutations(range(size)))[: data.draw(st.integers(1, size))] for size in sizes]
    pieces = [(blocks.decode(blocks.encode(part)), np.array(rows)) for part, rows in zip(parts, chosen, strict=True)]
    together = [part[row] for part, rows in zip(parts, chosen, strict=True) for row in rows]
    assert_holds(MoleculeBatch.from_blocks(pieces), together)
    order = data.draw(st.permutations(range(len(together))))
    assert_holds(MoleculeBatch.from_blocks(pieces, np.array(order)), [together[i] for i in order])


def gathered(parts, chosen, **options):
    """The same rows through Held, compiled and by numpy: two batches."""
    batches = []
    for compiled in (True, False):
        held = Held(**options)
        assert held.library is not None
        if not compiled:
            held.library = None
        slots = []
        for part in parts:
            slots.append(held.put(np.frombuffer(blocks.encode(part), np.uint8)))
        which, rows = np.array([(slots[part], row) for part, row in chosen], np.int32).T.copy()
        batches.append(held.batch(which, rows, sum(len(parts[part][row].numbers) for part, row in chosen)))
    return batches


def test_targets_of_any_name():
    names = ("ΔE", 'a "b"', "c\\d", "homo")
    part = [record(f"t-{i}", seed=i, targets={name: i + 0.1 * k for k, name in enumerate(names)}) for i in range(3)]
    for batch in gathered([part], [(0, 2), (0, 0)], targets=names):
        assert {name: values.tolist() for name, values in batch.targets.items()} == {
            name: [part[2].targets[name], part[0].targets[name]] for name in names
        }


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.data())
def test_compiled_and_numpy_put_the_same_batch_together(sizes, data):
    parts = [mixed(size, seed) if seed % 3 != 2 else plain([3] * size) for seed, size in enumerate(sizes)]
    if data.draw(st.booleans()):
        parts[0] = [replace(r, forces=r.positions * 2) if i % 2 else r for i, r in enumerate(parts[0])]
    every = [(part, row) for part, size in enumerate(sizes) for row in range(size)]
    chosen = data.draw(st.permutations(every))[: data.draw(st.integers(1, len(every)))]
    together = [parts[part][row] for part, row in chosen]
    one, other = gathered(parts, chosen, targets=("gap", "u0"), forces=True)
    for batch in (one, other):
        assert_holds(batch, together)
        assert batch.targets.keys() <= {"gap", "u0"}
        expected = [np.full((len(r.numbers), 3), np.nan) if r.forces is None else r.forces for r in together]
        if batch.forces is None:
            assert np.isnan(np.concatenate(expected)).all()
        else:
            np.testing.assert_array_equal(batch.forces, np.concatenate(expected))
    assert {name: s.dtype for name, s in one.spectra.items()} == {name: s.dtype for name, s in other.spectra.items()}
    assert one.lines.keys() == other.lines.keys()
    assert (one.bonds is None) == (other.bonds is None)
    without, _ = gathered(parts, chosen)
    assert without.targets == {} and without.forces is None


def test_values_stay_half_precision_until_they_are_broadened():
    made = [record(str(i), spectra={"ir": spectrum("ir", "values16", i)}) for i in range(3)]
    batch, _ = gathered([made], [(0, 2), (0, 0)])
    assert batch.spectra["ir"].dtype == torch.float16
    assert batch.broadened(LINE_SHAPES).spectra["ir"].dtype == torch.float32


def test_a_block_whose_ptr_leaves_its_values_is_damaged():
    """Rewritten with a right header and a right checksum, so that only the rows themselves can tell."""
    for value in (-1, 100):
        arrays = load(blocks.encode(plain([2, 3])))
        arrays["ptr"][1] = value
        metadata = {"mspt": json.dumps({"provenance": [{"source": "", "methods": {}}]})}
        data = np.frombuffer(save(arrays, metadata=metadata), np.uint8)
        held = Held()
        slot = held.put(data)
        with pytest.raises(blocks.DamagedBlock):
            held.batch(np.array([slot, slot], np.int32), np.array([0, 1], np.int32), 5)


@pytest.mark.parametrize("atom", [-1, 2])
def test_a_bond_to_an_atom_of_another_molecule_is_damage(atom):
    """Whichever way the batch is put together: a list that leaves its molecule would join two."""
    parts = [bonded(one, 3) for one in plain([2, 3])]
    parts[0] = replace(parts[0], bonds=np.array([[0, atom]], np.int16), bond_types=np.ones(1, np.uint8))
    data = np.frombuffer(blocks.encode(parts), np.uint8)
    for compiled in (True, False):
        held = Held()
        held.library = held.library if compiled else None
        slot = held.put(data)
        with pytest.raises(blocks.DamagedBlock, match="bonds: an atom index is outside its molecule"):
            held.batch(np.array([slot, slot], np.int32), np.array([0, 1], np.int32), 5)


def test_broadened_holds_every_spectrum_as_values():
    records = mixed(12)
    batch = MoleculeBatch.from_records(records).broadened(LINE_SHAPES)
    assert batch.lines == {} and set(batch.spectra) == set(GRIDS)
    for name, grid in GRIDS.items():
        assert batch.spectra[name].shape == (12, grid.length)
        for i, r in enumerate(records):
            s = r.spectra.get(name)
            expected = torch.zeros(grid.length)
            if isinstance(s, np.ndarray):
                expected = torch.from_numpy(s).float()
            elif s is not None:
                one = (torch.from_numpy(s.positions), torch.from_numpy(s.strengths))
                expected = broaden(*one, torch.tensor([0, len(s.positions)]), grid, LINE_SHAPES[name])[0]
            torch.testing.assert_close(batch.spectra[name][i], expected)
    again = batch.broadened(LINE_SHAPES)
    assert all(torch.equal(again.spectra[name], batch.spectra[name]) for name in GRIDS)


def test_a_spectrum_that_is_not_used_counts_as_missing():
    whole = MoleculeBatch.from_records(mixed(12))
    batch, full = whole.broadened(LINE_SHAPES, ("ir", "raman")), whole.broadened(LINE_SHAPES)
    assert full.present["uv_vis"].any() and not batch.present["uv_vis"].any()
    assert batch.spectra["uv_vis"].shape == full.spectra["uv_vis"].shape and not batch.spectra["uv_vis"].any()
    for name in ("ir", "raman"):
        assert torch.equal(batch.present[name], full.present[name])
        assert torch.equal(batch.spectra[name], full.spectra[name])
    assert whole.present["uv_vis"].any()


@pytest.mark.parametrize("batch", [MoleculeBatch.empty(), MoleculeBatch.from_records([])])
def test_empty(batch):
    batch = batch.broadened(LINE_SHAPES)
    assert len(batch.keys) == 0 and batch.ptr.tolist() == [0]
    assert batch.positions.shape == (0, 3) and batch.molecule.shape == (0,)
    assert {name: tuple(s.shape) for name, s in batch.spectra.items()} == {n: (0, g.length) for n, g in GRIDS.items()}
    assert {name: tuple(p.shape) for name, p in batch.present.items()} == dict.fromkeys(GRIDS, (0,))


def test_no_spectra_at_all():
    batch = MoleculeBatch.from_records(plain([2, 3])).broadened(LINE_SHAPES)
    assert not any(present.any() for present in batch.present.values())
    assert all(spectrum.shape[0] == 2 and not spectrum.any() for spectrum in batch.spectra.values())


def test_to_moves_every_tensor_and_casts_only_floating_point():
    batch = MoleculeBatch.from_records(mixed(12))
    double = batch.to(torch.float64)
    assert double.positions.dtype == torch.float64 and double.numbers.dtype == torch.int64
    assert {lines.positions.dtype for lines in double.lines.values()} == {torch.float64}
    assert {lines.ptr.dtype for lines in double.lines.values()} == {torch.int64}
    assert {present.dtype for present in double.present.values()} == {torch.bool}
    assert [part.dtype for part in double.bonds] == [torch.int64, torch.int64, torch.bool]
    away = batch.to("meta")
    tensors = [away.records, away.numbers, away.positions, away.ptr, *away.spectra.values(), *away.present.values()]
    tensors += [*away.targets.values(), *away.bonds, *(part for lines in away.lines.values() for part in lines)]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert list(away.keys) == list(batch.keys)
