"""Which part of a set a record belongs to: a fixed function of its key or of its scaffold."""

import re

from mspt.data import keyed
from mspt.errors import UserError
from shards import identity


class Split:
    """parts: their names; the first takes what the others leave. One part without a name where there is no split.

    by: "key" or "scaffold". Records of one group are in one part, the same one in every set.
    """

    def __init__(self, shares, by="key"):
        """shares: part -> share of the groups that it takes from train; empty to split nothing."""
        self.shares, self.by = shares, by
        self.parts = ["train", *shares] if shares else [""]

    def group(self, molecule, smiles):
        """What decides on a record's part (molecule: Source.molecule of its key); None where RDKit has no scaffold."""
        return molecule if self.by == "key" else identity.scaffold(smiles)

    def part(self, group):
        """The part that a group belongs to, by its number in parts."""
        place, end = keyed.word("split", group) % 1_000_000, 0
        for number, share in enumerate(self.shares.values(), 1):
            end += share * 1_000_000
            if place < end:
                return number
        return 0


def parse(text):
    """What --split says -> part -> share: 0.1 holds out so much, val=0.05,test=0.05 names the parts.

    Raises UserError where the text is neither.
    """
    wrong = UserError(
        f"--split is {text}; give a share between 0 and 1 to hold out, such as 0.1, or names with shares that leave "
        "something to train on, such as val=0.05,test=0.05"
    )
    shares = {}
    for item in text.split(","):
        name, equals, share = item.rpartition("=")
        name = name if equals else "heldout"
        try:
            share = float(share)
        except ValueError:
            raise wrong from None
        if not re.fullmatch(r"[a-z0-9_]+", name) or name == "train" or name in shares or not 0 < share < 1:
            raise wrong
        shares[name] = share
    if not sum(shares.values()) < 1:
        raise wrong
    return shares
