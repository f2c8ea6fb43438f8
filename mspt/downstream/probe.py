"""Linear probes: what a ridge regression reads off frozen embeddings.

Legend: N molecules, m of them with a label, F channels.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from mspt.data import block as blocks
from mspt.data.look import table
from mspt.data.opening import open_set, sequential
from mspt.data.packing import Budget
from mspt.data.zarr_arrays import open_arrays
from mspt.downstream import embed, targets
from mspt.errors import UserError
from mspt.models import encoders

# Penalties that are tried, over the number of labels; of features that have unit variance.
PENALTIES = 10.0 ** np.arange(-10, 3, 0.5)
BUDGET = 8192  # atoms that are read or embedded together


class Ridge(NamedTuple):
    """y = x · weights + intercept, weights [F]. penalty: the one chosen, over the number of labels."""

    weights: np.ndarray
    intercept: float
    penalty: float


def ridge(x, y, penalties=PENALTIES):
    """Ridge regression in closed form, of x [m, F] on y [m], in float64 -> Ridge.

    Features are brought to zero mean and unit variance; the intercept is not penalised. Of the penalties the one with
    the least generalised cross-validation error is taken (Golub, Heath & Wahba, 1979).
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    m, centre, spread = len(x), x.mean(0), x.std(0)
    spread = np.where(spread > 1e-12 * np.abs(centre).max(initial=1e-300), spread, 1.0)
    left, singular, right = np.linalg.svd((x - centre) / spread, full_matrices=False)
    along = left.T @ (y - y.mean())
    beyond = np.square(y - y.mean() - left @ along).sum()  # what no penalty explains
    best, chosen = np.inf, penalties[-1]
    for penalty in penalties:
        left_out = penalty * m / (singular**2 + penalty * m)
        # Degrees of freedom of the residual, without the difference of numbers that are nearly equal.
        free = m - 1 - len(singular) + left_out.sum()
        error = m * (beyond + np.square(left_out * along).sum()) / free**2 if free > 0 else np.inf
        if error < best:
            best, chosen = error, penalty
    weights = right.T @ (singular / (singular**2 + chosen * m) * along) / spread
    return Ridge(weights, y.mean() - centre @ weights, float(chosen))


class Side(NamedTuple):
    """One of two sets, of N molecules with n atoms: numbers [n], ptr [N + 1], values: target -> [N], NaN where missing.
    molecules: as open_set gives it."""

    molecules: object
    keys: list
    numbers: np.ndarray
    ptr: np.ndarray
    values: dict


def probe(train, test, names, encoder=None, stores=None, pool="sum", labels=None, seed=0):
    """Fit each target on train, measure it on test -> a dict as JSON holds it.

    train, test: folders of shard sets or of their Zarr twins. names: of targets. encoder: folder of an exported one;
    or stores: the embeddings of train and of test as embed wrote them, with the pool of theirs. labels: how many of
    train at most, drawn by seed; None for all. Raises UserError where the sets have molecules in common or lack a
    target, where stores are of other sets, and where training has fewer than two labels.
    """
    sides = [_read(folder, names) for folder in (train, test)]
    shared = set(sides[0].keys) & set(sides[1].keys)
    if shared:
        raise UserError(f"--test {test}: {len(shared)} of its molecules are in --train too, such as {min(shared)}")
    if stores:
        embedded, pool, config = _stored(stores, sides)
    else:
        network = encoders.load(encoder)
        embedded, config = [_embed(network, side, pool) for side in sides], network.settings
    # What the architecture alone gives: the same encoder before training.
    untrained = [_embed(_untrained(config, seed), side, pool) for side in sides] if config else None
    result = {
        "train": str(train),
        "test": str(test),
        "embeddings": list(map(str, stores)) if stores else str(encoder),
        "pool": pool,
        "seed": seed,
        "targets": {},
    }
    units = targets.units_of(sides[0].molecules)
    for name in names:
        chosen, tested = _chosen(sides, name, labels, seed)
        fitted, true, baseline = _values(sides, name, chosen, tested, targets.reporting(name, units))

        def error(features, fitted=fitted, true=true, chosen=chosen, tested=tested):
            model = ridge(features[0][chosen], fitted)
            return float(np.abs(features[1][tested] @ model.weights + model.intercept - true).mean()), model.penalty

        mae, penalty = error(embedded)
        result["targets"][name] = {
            "unit": targets.reporting(name, units).unit,
            "labels": len(chosen),
            "tested": len(tested),
            "mae": mae,
            "mae_untrained": error(untrained)[0] if untrained else None,
            "mae_mean": baseline,
            "penalty": penalty,
        }
    return result


def report(result):
    """The dict of probe as text for a person."""
    head = ("target", "unit", "labels", "tested", "MAE", "untrained", "mean")
    rows = [
        (
            name,
            row["unit"],
            str(row["labels"]),
            str(row["tested"]),
            *(f"{row[mae]:.4g}" if row[mae] is not None else "-" for mae in ("mae", "mae_untrained", "mae_mean")),
        )
        for name, row in result["targets"].items()
    ]
    return "\n".join(
        [
            *table([head, *rows], indent=""),
            "untrained: the same encoder before training; mean: predicting the mean of the labels, of total energies "
            "the sum of the atoms'",
        ]
    )


def _read(folder, names):
    molecules = open_set(folder)
    missing = [name for name in names if name not in molecules.manifest["targets"]]
    if missing:
        known = ", ".join(molecules.manifest["targets"]) or "none"
        raise UserError(f"--targets {missing[0]}: {folder} has no such target; it has {known}")
    keys, numbers, counts, values = [], [], [], {name: [] for name in names}
    for batch in sequential(molecules, Budget(molecules=BUDGET, atoms=_budget(molecules)), names):
        keys += batch.keys
        numbers.append(batch.numbers.numpy())
        counts.append(batch.ptr.diff().numpy())
        for name in names:
            # No block of the batch may have it.
            own = batch.targets.get(name)
            values[name].append(np.full(len(batch.keys), np.nan) if own is None else own.numpy())
    values = {name: np.concatenate(parts) for name, parts in values.items()}
    return Side(molecules, keys, np.concatenate(numbers), blocks.ptr_of(np.concatenate(counts)), values)


def _budget(molecules):
    return max(BUDGET, molecules.manifest["largest"])


def _embed(network, side, pool):
    parts = embed.vectors(network, side.molecules, pool, _budget(side.molecules))
    return np.concatenate([pooled.cpu().numpy() for _, pooled, _ in parts])


def _untrained(settings, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return encoders.build(settings)


def _stored(stores, sides):
    """The embeddings of both sides, how they were pooled, and the encoder's settings where they can still be read."""
    embedded, made = [], []
    for store, side in zip(stores, sides, strict=True):
        attributes, arrays = open_arrays(store, embed.KIND)
        text, ends = arrays["keys"][:], arrays["keys_ptr"][:].tolist()
        if [text[a:b].tobytes().decode() for a, b in zip(ends, ends[1:], strict=False)] != side.keys:
            raise UserError(
                f"--embeddings {store}: is not of the molecules of {side.molecules.folder}, in their order; it is of "
                f"{attributes['data']['path']}"
            )
        embedded.append(arrays["embeddings"][:])
        made.append((attributes["encoder"], attributes["pool"]))
    (encoder, pool), other = made
    if (encoder["sha256"], pool) != (other[0]["sha256"], other[1]):
        raise UserError(f"--embeddings {stores[1]}: is by another encoder or pool than {stores[0]}; embed both alike")
    config = Path(encoder["path"]) / "config.json"
    return embedded, pool, encoders.parse(json.loads(config.read_text())) if config.exists() else None


def _chosen(sides, name, labels, seed):
    """Numbers of the molecules to fit and to test on: those that have the target."""
    chosen, tested = (np.flatnonzero(np.isfinite(side.values[name])) for side in sides)
    if labels is not None and labels < len(chosen):
        chosen = np.sort(np.random.default_rng(seed).choice(chosen, labels, replace=False))
    if len(chosen) < 2 or not len(tested):
        raise UserError(
            f"--targets {name}: {len(chosen)} labels to fit and {len(tested)} to test; two and one are needed"
        )
    return chosen, tested


def _values(sides, name, chosen, tested, reporting):
    """What is to be fitted [m] and the truth of the test set, in units of reports; and the mean's error.

    Of total energies what the atoms alone give is subtracted, as fitted to the labels.
    """
    fitted, true = (
        side.values[name][own] * reporting.factor for side, own in zip(sides, (chosen, tested), strict=True)
    )
    if reporting.additive:
        atoms = [_atoms(side, own) for side, own in zip(sides, (chosen, tested), strict=True)]
        references = targets.fit_references(*atoms[0], fitted)
        fitted, true = fitted - targets.of_atoms(references, *atoms[0]), true - targets.of_atoms(references, *atoms[1])
    return fitted, true, float(np.abs(true - fitted.mean()).mean())


def _atoms(side, own):
    """The numbers of the atoms and the ptr of some of a side's molecules."""
    numbers, counts = blocks.take(side.numbers, side.ptr, own)
    return numbers, blocks.ptr_of(counts)
