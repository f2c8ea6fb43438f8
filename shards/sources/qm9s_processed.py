"""QM9S as MolSpectra prepares it: one .pt file in which torch-geometric has put all molecules end to end.

Geometries and spectra are those of shards/sources/qm9s.py; y, where it is there, holds what QM9 has of the same
molecules.
"""

from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from mspt.errors import UserError
from shards import pickles
from shards.source import Source
from shards.sources import qm9, qm9s

HELP = "QM9S as MolSpectra prepares it: data_with_uv_ir_raman.pt"
# torch-geometric's QM9 has 19 columns in y; the first 12 are the targets of shards/sources/qm9.py in order and unit.
COLUMNS = 19
TARGETS = {name: ("y", lambda y, column=column: y.flat[column]) for column, name in enumerate(qm9.TARGETS)}


def add_arguments(parser):
    parser.add_argument("--from", dest="path", type=Path, required=True, help="the .pt file")
    pickles.add_argument(parser)


def open(options):
    return Processed(options.path, options.trust_pickle)


class Processed(Source):
    """fields: the names that are read from the file; spectra: our names of those among them."""

    def __init__(self, file, trusted):
        self.file, self.trusted = file, trusted
        if not file.is_file():
            raise UserError(f"{file}: not there; --from wants the .pt file")
        data, slices = self.collated
        self.spectra = [name for name, own in qm9s.NAMES.items() if own in data]
        self.fields = ["z", "pos", *(name for name in ("smiles", "smile") if name in data)]
        self.fields += [qm9s.NAMES[name] for name in self.spectra]
        has_targets = torch.is_tensor(data.get("y")) and data["y"].shape[-1] == COLUMNS
        if has_targets:
            self.fields.append("y")
        if not self.spectra:
            raise UserError(f"{file}: has neither uv nor ir nor raman, so it is not the file with the spectra of QM9S")
        self.inputs = [file]
        self.provenance = {
            "source": qm9s.SOURCE + (", targets of QM9 (B3LYP/6-31G(2df,p))" if has_targets else ""),
            "units": qm9.TARGET_UNITS if has_targets else {},
            "methods": {name: qm9s.METHODS[name] for name in self.spectra},
        }
        self.total = len(slices["z"]) - 1

    @cached_property
    def collated(self):
        """Field -> tensor or list of all molecules; field -> int64 [molecules + 1], where each one's part begins."""
        loaded = pickles.load(self.file, self.trusted)
        if not isinstance(loaded, tuple) or len(loaded) < 2 or not all(isinstance(part, dict) for part in loaded[:2]):
            raise UserError(f"{self.file}: no data and slices of torch-geometric, so not what MolSpectra prepares")
        data, slices = loaded[:2]
        data = {name: value for name, value in data.items() if name in slices}
        if not {"z", "pos"} <= data.keys():
            raise UserError(f"{self.file}: its molecules have no z and pos, so it is not what MolSpectra prepares")
        return data, {name: np.asarray(ends) for name, ends in slices.items()}

    def __getstate__(self):
        # A worker finds what it needs of the file in its chunks.
        return {name: value for name, value in vars(self).items() if name != "collated"}

    def chunks(self, size):
        data, slices = self.collated
        names = data.get("name", [""] * self.total)
        keys = qm9s.keys([str(name).removeprefix("gdb_") for name in names], self.file)
        for first in range(0, self.total, size):
            rows = range(first, min(first + size, self.total))
            yield [(keys[i], {name: _part(data[name], slices[name], i) for name in self.fields}) for i in rows]

    def read(self, chunk):
        for key, fields in chunk:
            smiles = fields.get("smiles", fields.get("smile", ""))
            spectra = {name: np.reshape(fields[qm9s.NAMES[name]], -1) for name in self.spectra}
            yield qm9s.record(key, fields, smiles, spectra, TARGETS)


def _part(value, ends, i):
    """What molecule i has of a field; torch-geometric keeps what is no tensor as a list with an item for each."""
    part = value[ends[i] : ends[i + 1]]
    return qm9s.array(part) if torch.is_tensor(part) else part[0]
