"""What is known of a target before anything is learnt: references of the elements, mean and deviation.

Legend: m molecules, n atoms, N records of the training part, Z atomic numbers.
"""

import numpy as np
import torch
from torch import nn

from mspt.chemistry.elements import MAX_NUMBER, SYMBOLS
from mspt.data.packing import Budget
from mspt.data.stream import sequential
from mspt.errors import UserError

# Records are read in batches of at most so many atoms.
ATOMS = 65536


class Statistics(nn.Module):
    """references [Z]: what an atom of each element adds to the target, infinity where it is in no record that has the
    target; zeros where none were fitted. mean, deviation: of the target less its references, over the training part.

    They stay float64 whatever the module's parameters become: a total energy has more digits than float32.
    """

    def __init__(self):
        super().__init__()
        self.register_buffer("references", torch.zeros(MAX_NUMBER + 1, dtype=torch.float64))
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))
        self.register_buffer("deviation", torch.ones((), dtype=torch.float64))

    def _apply(self, fn, recurse=True):
        kept = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            setattr(self, name, buffer.to(getattr(self, name).device))
        return self

    def baseline(self, batch):
        """What the elements alone say of each molecule's target, [m] float64; infinity where they do not know."""
        per_atom = self.references[batch.numbers]
        return self.mean + per_atom.new_zeros(len(batch.keys)).index_add(0, batch.molecule, per_atom)

    def unknown(self, batch):
        """(key, symbol) of the first molecule that has an element without a reference, or None."""
        atoms = (~self.references.isfinite())[batch.numbers].nonzero()
        if not len(atoms):
            return None
        first = int(atoms[0, 0])
        return batch.keys[int(batch.molecule[first])], SYMBOLS[int(batch.numbers[first])]

    def fit(self, shardsets, target, with_references, on_bad_block="error"):
        """Take them from the records of shardsets that have the target. on_bad_block: of DataSettings.

        References are least squares over the counts of elements (of several solutions, which there are where counts
        depend on each other, the shortest). Raises UserError where no record has the target.
        """
        self.references.zero_()
        if with_references:
            normal, right = np.zeros((MAX_NUMBER + 1, MAX_NUMBER + 1)), np.zeros(MAX_NUMBER + 1)
            for counts, values in _labelled(shardsets, target, on_bad_block):
                normal += counts.T @ counts
                right += counts.T @ values
            there = np.flatnonzero(normal.diagonal())
            solution = np.linalg.lstsq(normal[np.ix_(there, there)], right[there], rcond=None)[0]
            self.references.fill_(torch.inf)
            self.references[there] = torch.from_numpy(solution)
        references = torch.where(self.references.isfinite(), self.references, 0.0).numpy()
        rest, largest = [np.zeros(0)], 0.0
        for counts, values in _labelled(shardsets, target, on_bad_block):
            rest.append(values - counts @ references)
            largest = max(largest, np.abs(values).max())
        rest = np.concatenate(rest)
        if len(rest) == 0:
            there = sorted({name for each in shardsets for name in each.manifest["targets"]})
            raise UserError(
                f"{shardsets[0].folder}: no record to train on has the target {target}; targets there: "
                f"{', '.join(there) or 'none'}"
            )
        self.mean.fill_(rest.mean())
        deviation = rest.std(ddof=1) if len(rest) > 1 else 0.0
        # Where all values are one and the same but for rounding there is nothing to divide by.
        self.deviation.fill_(deviation if deviation > 1e-10 * largest else 1.0)


def _labelled(shardsets, target, on_bad_block):
    """Yield counts of elements [k, Z] and values [k] of the records that have the target, float64."""
    for shardset in shardsets:
        budget = Budget(molecules=ATOMS, atoms=max(ATOMS, shardset.manifest["largest"]))
        for batch in sequential(shardset, budget, (target,), on_bad_block=on_bad_block):
            values = batch.targets[target].numpy() if batch.targets else np.full(len(batch.keys), np.nan)
            known = np.isfinite(values)
            if known.any():
                places = (batch.molecule * (MAX_NUMBER + 1) + batch.numbers).numpy()
                counts = np.bincount(places, minlength=len(values) * (MAX_NUMBER + 1)).astype(np.float64)
                yield counts.reshape(len(values), -1)[known], values[known]
