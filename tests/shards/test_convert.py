"""A shard set and its Zarr twin, one from the other and back."""

import argparse
from dataclasses import replace

import numpy as np
import pytest

from mspt.data.shardset import ShardSet
from mspt.data.zarr_set import ZarrSet
from mspt.errors import UserError
from shards import convert
from tests.data.molecules import assert_same, record, spectrum, write_set
from tests.end_to_end.runs import SHARDS


def run(*arguments):
    parser = argparse.ArgumentParser()
    convert.add_arguments(parser)
    convert.main(parser.parse_args([str(argument) for argument in arguments]))


def content(shardset):
    return [shardset.read(number) for number in range(len(shardset.block_records))]


def test_there_and_back_gives_the_same_blocks(tmp_path, capsys):
    """Real molecules with lines; the direction comes from what the source is."""
    run(SHARDS, tmp_path / "set.zarr")
    run(tmp_path / "set.zarr", tmp_path / "back", "--block", 32)
    before, after = ShardSet.open(SHARDS), ShardSet.open(tmp_path / "back")
    after.verify()
    assert content(before) == content(after)
    assert before.manifest == after.manifest
    said = capsys.readouterr().out.splitlines()
    assert said == [f"{tmp_path / name}: 223 records, 4088 atoms" for name in ("set.zarr", "back")]


def test_spectra_of_both_precisions_and_fields_of_some_records(tmp_path):
    """Blocks that hold float16 beside blocks that hold float32 and a mix; forces, bonds and targets come and go."""
    kinds = ["values16"] * 4 + ["values32"] * 4 + ["values16", "values32", "missing", "lines"] + ["missing"] * 4
    made = [
        record(f"r{i}", 2, i, spectra={} if kind == "missing" else {"ir": spectrum("ir", kind, i)}, source=f"s{i // 3}")
        for i, kind in enumerate(kinds)
    ]
    made[5] = replace(made[5], forces=np.ones((2, 3), np.float32), targets={"gap": 1.0})
    made[9] = replace(made[9], bonds=np.array([[0, 1]], np.int16), bond_types=np.ones(1, np.uint8))
    write_set(tmp_path / "set", made, block=4)
    convert.to_zarr(tmp_path / "set", tmp_path / "set.zarr")
    back = convert.to_shards(tmp_path / "set.zarr", tmp_path / "back", block=4)
    before = ShardSet.open(tmp_path / "set")
    assert content(before) == content(back)
    for one, other in zip(
        before.records(range(16)), ZarrSet.open(tmp_path / "set.zarr").records(range(16)), strict=True
    ):
        assert_same(one, other)
    again = convert.to_shards(tmp_path / "set.zarr", tmp_path / "again", block=3)
    assert again.block_records.tolist() == [3, 3, 3, 3, 3, 1]


def test_what_cannot_be_converted(tmp_path):
    for out in ("set.zarr", "back"):
        (tmp_path / out).mkdir()
    convert.to_zarr(SHARDS, tmp_path / "other.zarr")
    cases = [
        ((SHARDS, tmp_path / "set.zarr"), "set.zarr: is there already"),
        ((tmp_path / "other.zarr", tmp_path / "back"), "back: is there already"),
        ((tmp_path / "other.zarr", tmp_path / "new", "--block", 0), "--block is 0; give 1 or more"),
        ((tmp_path / "nowhere", tmp_path / "new"), "nowhere: no set of molecules there"),
    ]
    for arguments, message in cases:
        with pytest.raises(UserError, match=message):
            run(*arguments)
    shard = tmp_path / "other.zarr/positions/c/0/0"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(UserError, match="other.zarr/positions: is damaged"):
        run(tmp_path / "other.zarr", tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "other.zarr", "set.zarr"]
