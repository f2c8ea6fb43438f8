"""Values of spectra are compared with the sums of their rows wherever they are taken."""

import fsspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from mspt.chemistry.spectra import GRIDS
from mspt.data import block as blocks
from mspt.data.gather import RECYCLED, Held
from mspt.data.packing import Budget
from mspt.data.shardset import BadBlock, ShardSet
from mspt.data.store import StoreSettings
from mspt.data.stream import DataSettings, Stream, sequential
from mspt.data.sums import row_keys, row_sums
from tests.data.molecules import plain, record, spectrum, write_set


def valued(count, kind="values16"):
    return [
        record(f"v-{i:02d}", 3, seed=i, spectra={name: spectrum(name, kind, i) for name in GRIDS}) for i in range(count)
    ]


@pytest.fixture
def folder(tmp_path):
    write_set(tmp_path / "set", valued(24), block=6, blocks_per_shard=2)
    return tmp_path / "set"


def flip(folder, number, row, name="ir"):
    """Change a bit of a row of values of a block of 6; -> the key of its record."""
    shardset = ShardSet.open(folder)
    block = blocks.decode(shardset.read(number))
    path = folder / shardset.files[shardset.shard[number]]
    content = bytearray(path.read_bytes())
    at = content.index(block[f"spectra/{name}/values"][row].tobytes(), int(shardset.offset[number]))
    content[at + 11] ^= 16
    path.write_bytes(content)
    return f"v-{6 * number + row:02d}"


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 3), st.integers(1, 700), st.sampled_from([np.float16, np.float32]), st.integers(0, 99))
def test_a_sum_is_what_is_written_of_it(m, length, kind, seed):
    values = np.random.default_rng(seed).normal(size=(m, length)).astype(kind)
    keys = [int(key) for key in row_keys(values[0].nbytes).view("<u4")]
    for row, found in zip(values, row_sums(values), strict=True):
        data = row.tobytes().ljust(4 * len(keys), b"\0")
        words = [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)]
        mixed = [(word + key) % 2**32 for word, key in zip(words, keys, strict=True)]
        expected = sum(a * b for a, b in zip(mixed[::2], mixed[1::2], strict=True)) % 2**64
        assert int(found) % 2**64 == expected


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_changed_row_has_another_sum(data):
    """Flipped bits, zeros for a stretch of it, two words that changed places."""
    row = np.random.default_rng(data.draw(st.integers(0, 99))).integers(1, 256, 1402).astype(np.uint8)
    changed, how = row.copy(), data.draw(st.sampled_from(["bits", "zeros", "places"]))
    at = data.draw(st.integers(0, 1400 // 4 - 1)) * 4
    if how == "bits":
        changed[data.draw(st.lists(st.integers(0, 1401), min_size=1, max_size=9))] ^= data.draw(st.integers(1, 255))
    elif how == "zeros":
        changed[at : at + data.draw(st.integers(1, 600))] = 0
    else:
        other = data.draw(st.integers(0, 1400 // 4 - 1)) * 4
        changed[at : at + 4], changed[other : other + 4] = row[other : other + 4], row[at : at + 4]
    same = np.array_equal(row, changed)
    assert (row_sums(row[None]) == row_sums(changed[None])).all() == same


@pytest.mark.parametrize("kind", ["values16", "values32"])
@pytest.mark.parametrize("compiled", [True, False])
def test_a_row_is_checked_as_it_is_taken(kind, compiled):
    """By both ways to put a batch together; other rows of the block are good still."""
    data = np.frombuffer(bytearray(blocks.encode(valued(5, kind))), np.uint8)
    head = blocks.head(data)
    held = Held()
    assert held.library is not None
    held.library = held.library if compiled else None
    slot = held.put(data, head)
    every = (np.full(5, slot, np.int32), np.array([4, 2, 0, 1, 3], np.int32), 15)
    whole = held.batch(*every)
    blocks.decode(data)["spectra/raman/values"][2].view(np.uint8)[77] ^= 1
    with pytest.raises(blocks.DamagedRows, match="checksum of spectra/raman/values") as error:
        held.batch(*every)
    assert error.value.rows.tolist() == [1]
    rest = held.batch(every[0][:4], np.array([4, 0, 1, 3], np.int32), 12)
    for name in GRIDS:
        assert rest.spectra[name].equal(whole.spectra[name][[0, 2, 3, 4]])


@pytest.mark.parametrize("kind", ["values16", "values32"])
def test_values_come_last_and_are_aligned(kind):
    """In a file that safetensors reads; without values it is the one that safetensors writes."""
    data = blocks.encode(valued(3, kind))
    arrays, head = load(data), blocks.head(data)
    assert head % blocks.ALIGNMENT == 0
    assert len(data) - head == sum(arrays[f"spectra/{name}/values"].nbytes for name in GRIDS)
    for name in GRIDS:
        np.testing.assert_array_equal(arrays[f"spectra/{name}/sums"], row_sums(arrays[f"spectra/{name}/values"]))
    data = blocks.encode(
        [record("lines", spectra={"ir": spectrum("ir", "lines")}, targets={"mu": 1.0}), *plain([3, 4])]
    )
    assert blocks.head(data) == len(data)
    assert save(load(data), metadata=blocks.decode(data)[""]) == data


def settings_of(folder, **changes):
    return DataSettings(train=str(folder), lanes=2, window=2, budget={"molecules": 4, "atoms": 99}, **changes)


def keys_of(stream):
    return [[tuple(batch.keys) for batch in step] for step in stream.batches(0, 0, stream.steps(0))]


def test_a_damaged_spectrum_is_named(folder):
    flip(folder, 2, 3)
    shardset = ShardSet.open(folder)
    said = r"shard-00001\.tar: block 2 is damaged \(checksum of spectra/ir/values"
    stream = Stream([shardset], settings_of(folder), 0)
    with pytest.raises(BadBlock, match=said):
        keys_of(stream)
    with pytest.raises(BadBlock, match=said):
        list(sequential(shardset, Budget(molecules=4, atoms=99)))
    with pytest.raises(BadBlock, match=said):
        list(shardset.records([12]))
    with pytest.raises(BadBlock, match=said):
        shardset.block(2)


def test_a_damaged_spectrum_costs_its_record(folder, caplog):
    """The same one on any number of ranks; all else comes as it would have come."""
    whole = keys_of(Stream([ShardSet.open(folder)], settings_of(folder), 0))
    lost = {flip(folder, 2, 3), flip(folder, 2, 0, "uv_vis"), flip(folder, 2, 0, "raman"), flip(folder, 0, 5)}
    assert len(lost) == 3
    options, shardset = settings_of(folder, on_bad_block="skip"), ShardSet.open(folder)
    stream = Stream([shardset], options, 0)
    expected = [[tuple(key for key in keys if key not in lost) for keys in step] for step in whole]
    assert keys_of(stream) == expected
    assert sum(batch.missing for step in stream.batches(0, 0, stream.steps(0)) for batch in step) == 3
    assert "block 2 is damaged (checksum of spectra/ir/values, 1 row" in caplog.text
    in_order = [
        key for batch in sequential(shardset, options.budget, on_bad_block=options.on_bad_block) for key in batch.keys
    ]
    assert set(in_order) == {key for step in whole for keys in step for key in keys} - lost
    assert in_order == sorted(in_order)
    ranks = [keys_of(Stream([shardset], options, 0, rank, 2)) for rank in range(2)]
    assert [[*one, *other] for one, other in zip(*ranks, strict=True)] == expected


def test_a_damaged_spectrum_is_not_kept_in_a_cache(folder, tmp_path):
    """Nor trusted there: the next read asks the store again."""
    good = (folder / "shard-00000.tar").read_bytes()
    flip(folder, 1, 2)
    far = fsspec.filesystem("memory")
    far.put(str(folder), "/sums", recursive=True)
    shardset = ShardSet.open("memory://sums", StoreSettings(cache=str(tmp_path / "cache")))
    with pytest.raises(BadBlock, match="block 1 is damaged"):
        shardset.block(1)
    far.pipe("/sums/shard-00000.tar", good)
    shardset.block(1)
    far.rm("/sums/shard-00000.tar")
    shardset.block(1)
    kept = shardset.cache.path(shardset._entry(1))
    kept.write_bytes(kept.read_bytes()[:-1] + b"?")
    far.pipe("/sums/shard-00000.tar", good)
    shardset.block(1)


def test_memory_of_spectra_is_used_again_but_never_while_it_is_held():
    first = RECYCLED.empty((3, 5), torch.float32)
    place, part = first.data_ptr(), first[1]
    del first
    second = RECYCLED.empty((3, 5), torch.float32)
    assert second.data_ptr() != place
    del part
    assert RECYCLED.empty((2, 7), torch.float16).data_ptr() == place
