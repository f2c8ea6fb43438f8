"""A block gives back the records it was made of, in bytes that depend on nothing else."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load

from mspt.chemistry.spectra import GRIDS
from mspt.data import block as blocks
from tests.data.molecules import assert_same, record, spectrum

KIND = st.sampled_from(["missing", "values32", "lines", "no_lines"])


@st.composite
def records(draw, most=5):
    result = []
    for i in range(draw(st.integers(1, most))):
        atoms, seed = draw(st.integers(1, 6)), draw(st.integers(0, 1000))
        rng = np.random.default_rng(seed)
        changes = {
            "spectra": {name: s for name in GRIDS if (s := spectrum(name, draw(KIND), seed)) is not None},
            "targets": draw(st.dictionaries(st.sampled_from(["gap", "mu", "u0"]), st.floats(-1e5, 1e5))),
            "smiles": draw(st.sampled_from(["", "CCO", "[NH4+]"])),
            "charge": draw(st.integers(-128, 127)),
            "source": draw(st.sampled_from(["", "QM9", "ältere Messung"])),
            "methods": draw(st.sampled_from([{}, {"ir": "xTB", "uv_vis": "TD-DFT"}])),
        }
        if draw(st.booleans()):
            changes["forces"] = rng.normal(size=(atoms, 3)).astype(np.float32)
        if draw(st.booleans()):
            bonds = draw(st.integers(0, 3))
            changes["bonds"] = rng.integers(0, atoms, (bonds, 2)).astype(np.int16)
            changes["bond_types"] = rng.integers(0, 4, bonds).astype(np.uint8)
        result.append(record(f"{i}-{draw(st.text('aé分 /', max_size=4))}", atoms, seed, **changes))
    return result


@settings(max_examples=40, deadline=None)
@given(records())
def test_round_trip(made):
    """Every field, missing ones included, and twice the same bytes."""
    data = blocks.encode(made)
    assert data == blocks.encode(made)
    read = blocks.records(data)
    assert len(read) == len(made)
    for one, other in zip(made, read, strict=True):
        assert_same(one, other)
    assert blocks.encode(read) == data


def test_values_keep_half_precision_where_all_have_it():
    half = [record(str(i), spectra={"ir": spectrum("ir", "values16", i)}) for i in range(3)]
    for one, other in zip(half, blocks.records(blocks.encode(half)), strict=True):
        assert_same(one, other)
    mixed = [*half, record("3", spectra={"ir": spectrum("ir", "values32", 3)})]
    read = blocks.records(blocks.encode(mixed))
    assert {r.spectra["ir"].dtype for r in read} == {np.dtype(np.float32)}
    for one, other in zip(mixed, read, strict=True):
        np.testing.assert_array_equal(one.spectra["ir"], other.spectra["ir"])


def test_plain_safetensors_reads_it():
    """Names and shapes as the module's top says, so that others can read blocks without mspt."""
    made = [record("a", 2, spectra={"ir": spectrum("ir", "lines")}), record("b", 5), record("c", 1)]
    arrays = load(blocks.encode(made))
    assert arrays["ptr"].tolist() == [0, 2, 7, 8]
    assert arrays["positions"].shape == (8, 3) and arrays["positions"].dtype == np.float32
    assert arrays["numbers"].dtype == np.uint8
    assert arrays["keys"].tobytes() == b"abc" and arrays["keys_ptr"].tolist() == [0, 1, 2, 3]
    assert arrays["spectra/ir/kind"].tolist() == [2, 0, 0]
    assert "spectra/raman/kind" not in arrays and "forces" not in arrays and "bonds" not in arrays


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=8), st.data())
def test_take_is_the_loop(counts, data):
    rows = data.draw(st.lists(st.integers(0, len(counts) - 1), max_size=10))
    parts = [np.random.default_rng(i).normal(size=(count, 3)) for i, count in enumerate(counts)]
    values, taken = blocks.take(np.concatenate(parts), blocks.ptr_of(counts), np.array(rows, np.int64))
    expected = np.concatenate([np.zeros((0, 3)), *[parts[row] for row in rows]])
    np.testing.assert_array_equal(values, expected)
    assert taken.tolist() == [counts[row] for row in rows]
