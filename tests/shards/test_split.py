"""Splits: every record in one part, the same one everywhere, and no group in two."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mspt.errors import UserError
from shards.split import Split, parse
from tests.data.molecules import plain, record
from tests.shards.made import keys, make

SHARES = st.dictionaries(st.sampled_from(["val", "test", "heldout"]), st.floats(0.05, 0.3), max_size=3)


@settings(deadline=None, max_examples=50)
@given(SHARES, st.lists(st.text(min_size=1, max_size=8)))
def test_a_group_has_one_part(shares, groups):
    split = Split(shares)
    parts = [split.part(group) for group in groups]
    assert all(0 <= part < len(split.parts) for part in parts)
    assert parts == [Split(shares).part(group) for group in groups]


@settings(deadline=None, max_examples=20)
@given(SHARES)
def test_parts_have_their_shares(shares):
    split = Split(shares)
    parts = np.bincount([split.part(f"qm9-{i:06d}") for i in range(4000)], minlength=len(split.parts)) / 4000
    assert parts[1:] == pytest.approx(list(shares.values()), abs=0.03)


@settings(deadline=None, max_examples=20)
@given(st.floats(0.01, 0.5), st.floats(0.01, 0.4))
def test_a_larger_share_holds_out_what_a_smaller_one_does(one, other):
    small, large = (Split({"heldout": share}) for share in sorted((one, other)))
    every = [f"mol-{i}" for i in range(500)]
    assert {key for key in every if small.part(key)} <= {key for key in every if large.part(key)}


RINGS = ("c1ccccc1", "C1CCCCC1", "c1ccncc1", "c1ccc2ccccc2c1")
SIDES = ("C", "O", "CC(C)", "F", "N[C@@H](C)", "")


@settings(deadline=None, max_examples=30)
@given(st.permutations(range(len(RINGS) * len(SIDES))), st.floats(0.1, 0.6))
def test_a_scaffold_is_never_split(order, share):
    split = Split({"test": share}, "scaffold")
    smiles = [side + ring for ring in RINGS for side in SIDES]
    found = {}
    for i in order:
        found.setdefault(i // len(SIDES), set()).add(split.part(split.group(str(i), smiles[i])))
    assert all(len(parts) == 1 for parts in found.values())
    assert len({split.group(str(i), one) for i, one in enumerate(smiles)}) == len(RINGS)


def test_molecules_without_a_ring_or_a_smiles():
    split = Split({"test": 0.5}, "scaffold")
    group = [split.group("a", smiles) for smiles in ("CCO", "OCC", "C[C@H](O)F", "C[C@@H](O)F", "", "C(")]
    assert group == ["CCO", "CCO", "CC(O)F", "CC(O)F", None, None]


@settings(deadline=None, max_examples=10)
@given(SHARES.filter(bool), st.sampled_from(["key", "scaffold"]), st.integers(20, 90))
def test_each_record_is_in_one_part_of_a_build(tmp_path_factory, shares, by, shard):
    """With and without SMILES; what has none goes by its key, and is counted."""
    made = [*plain([2] * 150), *(record(f"ring-{i:05d}", smiles=RINGS[i % 4] + "C" * (i % 9)) for i in range(100))]
    out = tmp_path_factory.mktemp("built") / "out"
    split = ",".join(f"{name}={share}" for name, share in shares.items())
    summary = make(made, out, shard=shard, split=split, split_by=by)
    parts = {part: keys(out / part) for part in summary.manifests}
    assert set(parts) == {"train", *shares}
    assert sorted(key for own in parts.values() for key in own) == sorted(one.key for one in made)
    assert summary.unknown == (150 if by == "scaffold" else 0)
    expected = Split(shares, by)
    for one in made:
        assert one.key in parts[expected.parts[expected.part(expected.group(one.key, one.smiles) or one.key)]]


@pytest.mark.parametrize(
    ("text", "shares"),
    [("0.1", {"heldout": 0.1}), ("val=0.05,test=0.1", {"val": 0.05, "test": 0.1}), ("a_2=.5", {"a_2": 0.5})],
)
def test_what_can_be_said(text, shares):
    assert parse(text) == shares


@pytest.mark.parametrize(
    "text",
    ["0", "1", "nan", "val", "val=", "val=x", "val=0.5,test=0.5", "train=0.1", "../x=0.1", "a=0.1,a=0.2", "", ","],
)
def test_what_cannot(text):
    with pytest.raises(UserError, match="--split is .*; give a share between 0 and 1 to hold out") as error:
        parse(text)
    assert "\n" not in str(error.value)
