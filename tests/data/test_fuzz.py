"""Whatever the bytes are: what was written, or an error that says that they are damaged; and in little memory."""

import functools
import json
import shutil
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mspt.data import block as blocks
from mspt.data.shardset import INDEX, MANIFEST, BadBlock, ShardSet
from mspt.errors import UserError
from tests.data.molecules import record, spectrum

# The same examples each time.
fuzz = functools.partial(
    settings, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)

PARTS = [
    record("ä1", 2, smiles="CCO", spectra={"ir": spectrum("ir", "lines"), "raman": spectrum("raman", "lines")}),
    record("分2", 3, targets={"gap": 1.0}, forces=np.ones((3, 3), np.float32), source="QM9", methods={"ir": "xTB"}),
    record("c", 1, spectra={"ir": spectrum("ir", "no_lines")}, charge=-1),
    record("d", 4, bonds=np.array([[0, 1], [2, 3]], np.int16), bond_types=np.array([1, 2], np.uint8)),
]
BLOCK = blocks.encode(PARTS)
START = 8 + int.from_bytes(BLOCK[:8], "little")
HEADER = json.loads(BLOCK[8:START])
NAMES = sorted(HEADER)
ARRAYS = {name: array for name, array in blocks.decode(BLOCK).items() if name}


def edited(data, edits):
    """Bytes after flips (position, bits), cuts (position, length) and insertions (position, bytes)."""
    data = bytearray(data)
    for position, change in edits:
        at = position % (len(data) + 1)
        if isinstance(change, bytes):
            data[at:at] = change
        elif change < 0:
            del data[at : at - change]
        elif at < len(data):
            data[at] ^= change
    return bytes(data)


FLIP, CUT, INSERTION = st.integers(1, 255), st.integers(-400, -1), st.binary(min_size=1, max_size=40)
EDITS = st.lists(st.tuples(st.integers(0, 1 << 20), FLIP | CUT | INSERTION), min_size=1, max_size=4)
# Where headers hurt: sizes that overflow, negative ones, ones that are no numbers.
NUMBERS = st.sampled_from([-1, 0, 1, 2, 3, 4, 5, 2**31, 2**40, 2**63 - 1, 2**63, 2**64, -(2**63), 10**400, 1.5, 1e308])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=4) | st.sampled_from(list(blocks.TYPES)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def attempt(call):
    """What call gives, or the error that says in one line what is wrong."""
    try:
        return call()
    except (blocks.DamagedBlock, UserError) as error:
        return error


def is_said(result):
    return isinstance(result, Exception) and "\n" not in str(result)


def read(data):
    """All that a reader does with a block: the records, or None where it is said to be damaged."""
    block = attempt(lambda: blocks.decode(data))
    if is_said(block) or is_said(attempt(lambda: blocks.check(block))):
        return None
    rows = np.arange(len(block["ptr"]) - 1)[::-1]
    for values, (_, _, ptr) in blocks.LAYOUT.items():
        if values in block and ptr in block:
            blocks.take(block[values], block[ptr], rows)
    result = attempt(lambda: blocks.records(data))
    if is_said(result):
        return None
    assert len(result) == len(rows) and all(len(one.numbers) == len(one.positions) for one in result)
    return result


def read_in_little_memory(header):
    """read of the block with this header in place of its own."""
    head = json.dumps(header).encode()
    tracemalloc.start()
    try:
        result = read(len(head).to_bytes(8, "little") + head + BLOCK[START:])
        assert tracemalloc.get_traced_memory()[1] < 1 << 21
    finally:
        tracemalloc.stop()
    return result


@fuzz(max_examples=200)
@given(st.binary(max_size=300))
def test_any_bytes(data):
    assert read(data) is None


@fuzz(max_examples=100)
@given(JSON, st.binary(max_size=60))
def test_any_header(header, content):
    head = json.dumps(header).encode()
    assert read(len(head).to_bytes(8, "little") + head + content) is None


@fuzz(max_examples=400)
@given(EDITS)
def test_edited_blocks(edits):
    """Without a checksum a flipped coordinate cannot be known; but nothing falls over, and what is cut is missed."""
    data = edited(BLOCK, edits)
    result = read(data)
    if len(data) < len(BLOCK):
        assert result is None


@fuzz(max_examples=400)
@given(st.integers(0, 8 * START - 1))
def test_a_flipped_bit_of_the_header(bit):
    """Said, or one that does not matter to the arrays: in the metadata, a target's name or a space at the end."""
    data = bytearray(BLOCK)
    data[bit // 8] ^= 1 << bit % 8
    result = read(bytes(data))
    if result is not None:
        numbers, positions = zip(*((one.numbers, one.positions) for one in result), strict=True)
        np.testing.assert_array_equal(np.concatenate(numbers), ARRAYS["numbers"])
        np.testing.assert_array_equal(np.concatenate(positions), ARRAYS["positions"])


@fuzz(max_examples=400)
@given(st.data())
def test_changed_fields_of_the_header(data):
    """Offsets, shapes, types and names, one field at a time, of sizes that no memory holds."""
    header = json.loads(json.dumps(HEADER))
    name = data.draw(st.sampled_from(NAMES))
    what = data.draw(st.sampled_from(["data_offsets", "dtype", "shape", "name", "drop", "all"]))
    if what in ("name", "drop"):
        entry = header.pop(name)
        if what == "name":
            header[data.draw(st.sampled_from([*NAMES, "", "else", "targets/x", "spectra/ir/values"]))] = entry
    elif what == "all" or name == "__metadata__":
        header[name] = data.draw(JSON)
    elif what == "dtype":
        header[name][what] = data.draw(st.sampled_from(list(blocks.TYPES)) | JSON)
    else:
        header[name][what] = data.draw(st.lists(NUMBERS, max_size=4) | JSON)
    read_in_little_memory(header)


@pytest.mark.parametrize(
    "shape", [[2**40], [2**31, "0"], [2**31, [0]], [0, 2**64], [-2, -2], [4.0], [True] * 70], ids=str
)
def test_shapes_that_no_memory_holds(shape):
    header = json.loads(json.dumps(HEADER))
    header["charge"]["shape"] = shape
    assert read_in_little_memory(header) is None


WORDS = [0, 1, 2, 3, 4, 5, 2**31, 2**62, 2**63 - 1, -1, -(2**62), -(2**63)]


@fuzz(max_examples=300)
@given(
    st.sampled_from([name for name in NAMES if name.endswith("ptr")]),
    st.lists(st.sampled_from(WORDS), min_size=5, max_size=5),
)
def test_any_ptr(name, values):
    """Also such whose differences overflow: either the one that was written, or another that can be read safely."""
    begin = START + HEADER[name]["data_offsets"][0]
    content = np.array(values, np.int64).tobytes()
    result = read(BLOCK[:begin] + content + BLOCK[begin + len(content) :])
    if result is None:
        return
    assert values[0] == 0 and values[-1] == ARRAYS[name][-1] and sorted(values) == values


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a["spectra/ir/kind"].__setitem__(1, 3), "spectra/ir/kind: 3 is unknown"),
        (lambda a: a["spectra/ir/kind"].__setitem__(1, blocks.VALUES), "spectra/ir/values: None where kind says 1 row"),
        (lambda a: a["spectra/ir/kind"].__setitem__(0, blocks.MISSING), "spectra/ir/ptr: a record that has no lines"),
        (lambda a: a["spectra/raman/kind"].fill(blocks.MISSING), "spectra/raman/ptr: kind says that 0 records"),
        (lambda a: a.pop("spectra/ir/strengths"), "spectra/ir: positions or strengths of lines are missing"),
        (lambda a: a.pop("spectra/ir/kind"), "spectra/ir/kind is missing"),
        (lambda a: a.pop("spectra/ir/ptr"), "spectra/ir/positions is there without spectra/ir/ptr"),
        (lambda a: a.pop("words"), "words is missing"),
        (lambda a: a.pop("bonds_known"), "bonds_known is missing"),
        (lambda a: a["bonds"].__setitem__(1, 4), "bonds: an atom index is outside its molecule"),
        (lambda a: a.update(charge=a["charge"][:-1]), r"charge: int8 \(3,\) where int8 \(4,\) is needed"),
        (lambda a: a.update(positions=a["positions"].astype("f8")), r"positions: float64 \(10, 3\) where float32"),
        (lambda a: a.update({"targets/gap": a["targets/gap"][1:]}), r"targets/gap: float64 \(3,\) where"),
        (lambda a: a.update({name: a[name][:1] for name in a if name.endswith("ptr")}), "it holds no records"),
        (lambda a: a["keys"].__setitem__(0, 0xFF), "keys is not UTF-8 at byte 0"),
        (lambda a: a["keys_ptr"].__setitem__(1, 1), "keys_ptr cuts a character in two"),
    ],
)  # fmt: skip
def test_what_check_says(change, message):
    arrays = {name: array.copy() for name, array in ARRAYS.items()}
    blocks.check(arrays)
    change(arrays)
    with pytest.raises(blocks.DamagedBlock, match=message):
        blocks.check(arrays)


@pytest.fixture(scope="module")
def copied(qm9, tmp_path_factory):
    return shutil.copytree(qm9, tmp_path_factory.mktemp("fuzz") / "set")


@pytest.fixture(scope="module")
def written(qm9):
    shardset = ShardSet.open(qm9)
    return [shardset.read(number) for number in range(8)]


@fuzz(max_examples=120)
@given(EDITS)
def test_edited_shards_never_give_other_bytes(copied, qm9, written, edits):
    path = copied / "shard-00001.tar"
    content = (qm9 / path.name).read_bytes()
    path.write_bytes(content)
    shardset = ShardSet.open(copied)
    path.write_bytes(edited(content, edits))
    for number in (3, 4, 5):
        result = attempt(lambda number=number: shardset.read(number))
        if is_said(result):
            assert (type(result), result.path, result.number) == (BadBlock, str(path), number)
        else:
            assert result == written[number]
    result = attempt(lambda: ShardSet.open(copied).verify())
    assert is_said(result) == (path.read_bytes() != content)
    assert result is None or str(result).startswith(str(path))


def restore(copied, qm9):
    for path in qm9.iterdir():
        shutil.copy(path, copied)


@fuzz(max_examples=120)
@given(st.sampled_from([INDEX, MANIFEST]), EDITS)
def test_edited_indices_and_manifests(copied, qm9, written, name, edits):
    restore(copied, qm9)
    (copied / name).write_bytes(edited((qm9 / name).read_bytes(), edits))
    shardset = attempt(lambda: ShardSet.open(copied))
    if is_said(shardset):
        assert str(shardset).startswith(f"{copied}/")
    else:
        assert [shardset.read(number) for number in range(8)] == written


@fuzz(max_examples=200)
@given(st.data())
def test_changed_fields_of_the_manifest(copied, qm9, data):
    restore(copied, qm9)
    manifest = json.loads((qm9 / MANIFEST).read_text())
    within = data.draw(st.sampled_from([manifest, manifest["shards"][0], manifest["shards"][2], manifest["grids"]]))
    name = data.draw(st.sampled_from(sorted(within)))
    original, within[name] = within[name], data.draw(JSON)
    (copied / MANIFEST).write_text(json.dumps(manifest))
    shardset = attempt(lambda: ShardSet.open(copied))
    if is_said(shardset):
        assert str(shardset).startswith(f"{copied}/")
    else:
        assert len(list(shardset.records(range(60)))) == 60
        # Of what is read, only verify needs the SHA-256 of a shard.
        assert original == within[name] or name in ("elements", "targets", "spectra", "units", "provenance", "sha256")
