"""What every raw format gives to a build: chunks that can be read side by side, and the records of each.

A format is a module in shards/sources with

    HELP                        one line for the command line
    add_arguments(parser)       its own options
    open(options) -> Source     raises UserError where a file is not there or not of this format
"""

from abc import ABC, abstractmethod
from pathlib import Path


class Source(ABC):
    """One raw data set. It is pickled once to every process of a build.

    provenance: what the manifest says of the set (source, units of targets, methods). inputs: the files that are read;
    with their sizes they tell whether an interrupted build is of the same data. total: how many rows, None where only
    reading tells. uncounted: where chunks have other numbers of rows than they are asked for, why --limit cannot count
    them and what to do instead.
    """

    provenance: dict
    inputs: list[Path]
    total: int | None = None
    uncounted: str = ""

    @abstractmethod
    def chunks(self, size):
        """Yield chunks of size rows (the last may be smaller), the same ones in the same order every time.

        This runs in one process, ahead of all the others, so that it only finds where rows begin; what costs time
        belongs in read. A chunk is picklable: places in a file where it can be, the rows' bytes where it cannot.
        """

    def molecule(self, key):
        """The part of a key that names the molecule: a split by key keeps its conformers together."""
        return key

    @abstractmethod
    def read(self, chunk):
        """Yield for each row of a chunk its Record, or the RejectedRecord that says why it is none (not raised)."""
