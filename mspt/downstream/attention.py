"""Where a SpecFormer looks: attention within a molecule's spectra and between them (MolSpectra, ICLR 2025).

Legend: T tokens of all spectra end to end, N of one spectrum, H heads, L points of a spectrum's grid.
"""

from typing import NamedTuple

import torch

from mspt.chemistry.spectra import SPECTRA
from mspt.data.batch import MoleculeBatch
from mspt.data.look import table
from mspt.data.plot import TITLES
from mspt.errors import UserError
from mspt.models.pretraining import Pass


class Maps(NamedTuple):
    """Of one molecule. weights: of each layer [T, T], the mean over heads; a row is the token that attends.

    blocks: spectrum -> its slice of the tokens, of those that the molecule has. centres: spectrum -> where its patches'
    middles lie on the grid [N]. values: spectrum -> [L].
    """

    key: str
    weights: list
    blocks: dict
    centres: dict
    values: dict


@torch.no_grad()
def maps(network, record, settings, device):
    """A Record -> Maps. settings: DataSettings.

    Raises UserError where the network is without SpecFormer or the record without spectra that settings name.
    """
    specformer = network.specformer
    if specformer is None:
        raise UserError(
            "the run was without a SpecFormer (model.specformer is null); give one that learnt from spectra"
        )
    batch = MoleculeBatch.from_records([record]).to(device).broadened(settings.line_shapes, settings.spectra)
    if not any(batch.present.values()):
        raise UserError(f"{record.key}: has no spectrum that the run attends to; give a record that has")
    weights = specformer.attention(Pass(network, batch).patches, batch.present)
    blocks, start = {}, 0
    for name, count in specformer.patch_counts.items():
        if batch.present[name]:
            blocks[name] = slice(start, start + count)
        start += count
    return Maps(
        record.key,
        [layer[0].mean(0).cpu() for layer in weights],
        blocks,
        {name: specformer.centres(name) for name in blocks},
        {name: batch.spectra[name][0].cpu() for name in SPECTRA if name in blocks},
    )


def shares(maps):
    """How much of its attention a spectrum's token gives to each spectrum, on average.

    -> [layer][attending spectrum][spectrum attended to]
    """
    return [
        {
            row: {column: float(layer[own, other].sum(1).mean()) for column, other in maps.blocks.items()}
            for row, own in maps.blocks.items()
        }
        for layer in maps.weights
    ]


def report(maps):
    """What shares gives, as text for a person."""
    rows = [("layer", "attends", *(f"to {TITLES[name]}" for name in maps.blocks))]
    for number, layer in enumerate(shares(maps), 1):
        for name, to in layer.items():
            rows.append((str(number), TITLES[name], *(f"{share:.1%}" for share in to.values())))
    return "\n".join(table(rows, indent=""))
