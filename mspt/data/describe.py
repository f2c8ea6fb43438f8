"""What is in a shard set, as a dict and as text."""

import json
import math
from collections import Counter

import numpy as np

from mspt.chemistry.spectra import GRIDS, STRENGTHS
from mspt.data import block as blocks
from mspt.data import look

# What not every record has -> what to call a record that has it.
HAS = {"smiles": "with SMILES", "bonds": "with bonds", "forces": "with forces", "charge": "charged"}


class _Numbers:
    """Count, mean, standard deviation (of the population), least and greatest of numbers that come in pieces."""

    def __init__(self):
        self.count, self.mean, self.squares, self.low, self.high = 0, 0.0, 0.0, math.inf, -math.inf

    def add(self, values):
        if not len(values):
            return
        count, mean = self.count + len(values), float(values.mean())
        shift = mean - self.mean
        self.squares += float(((values - mean) ** 2).sum()) + shift**2 * self.count * len(values) / count
        self.mean += shift * len(values) / count
        self.count, self.low, self.high = count, min(self.low, float(values.min())), max(self.high, float(values.max()))

    def range(self):
        return [self.low, self.high] if self.count else None

    def summary(self):
        spread = math.sqrt(self.squares / self.count)
        return {"records": self.count, "mean": self.mean, "std": spread, "min": self.low, "max": self.high}


class _Spectrum:
    """What the records that were read say of one spectrum."""

    def __init__(self, name):
        self.name, self.kinds, self.total = name, Counter(), np.zeros(GRIDS[name].length)
        self.positions, self.strengths, self.values = _Numbers(), _Numbers(), _Numbers()

    def add(self, block, spectra):
        """A decoded block, and its spectra on the grid [m, L]."""
        prefix = f"spectra/{self.name}/"
        kind = block.get(f"{prefix}kind", np.zeros(0, np.uint8))
        self.kinds.update({"values": int((kind == blocks.VALUES).sum()), "lines": int((kind == blocks.LINES).sum())})
        for part in ("positions", "strengths", "values"):
            if prefix + part in block:
                getattr(self, part).add(block[prefix + part].astype(float).ravel())
        self.total += spectra.double().sum(0).numpy()

    def summary(self):
        grid, count = GRIDS[self.name], max(1, self.kinds.total())
        return {
            "values": self.kinds["values"],
            "lines": self.kinds["lines"],
            "range": self.values.range(),
            "line_positions": self.positions.range(),
            "line_strengths": self.strengths.range(),
            "mean_bands": [list(band) for band in look.bands(self.total / count, grid, 5)],
        }


def describe(shardset, count=look.SAMPLE):
    """What is in a set, as a dict that JSON can hold.

    "sample" and below "read" come from count blocks, evenly spread; everything else is exact, by the manifest and the
    index. Memory does not grow with the set.
    """
    manifest, numbers = shardset.manifest, look.sample(shardset, count)
    size, atoms = sum(shard["bytes"] for shard in manifest["shards"]), sum(manifest["elements"].values())
    targets = {name: _Numbers() for name in manifest["targets"]}
    spectra, has, records = {name: _Spectrum(name) for name in manifest["spectra"]}, Counter(), 0
    for number in numbers:
        block = shardset.block(number)
        molecules = look.batch(block)
        records += len(molecules.keys)
        has.update(_has(block))
        for name, values in molecules.targets.items():
            targets[name].add(values[~values.isnan()].numpy())
        for name, spectrum in spectra.items():
            spectrum.add(block, molecules.spectra[name])
    return {
        "folder": str(shardset.folder),
        "records": len(shardset),
        "atoms": atoms,
        "shards": len(manifest["shards"]),
        "blocks": len(shardset.block_records),
        "bytes": size,
        "bytes_per_record": size / len(shardset),
        "sizes": _describe_sizes(look.sizes(shardset)),
        "elements": {
            symbol: {"atoms": n, "share": n / atoms}
            for symbol, n in sorted(manifest["elements"].items(), key=lambda item: -item[1])
        },
        "sample": {"blocks": len(numbers), "records": records},
        "has": dict(has),
        "spectra": {
            name: manifest["spectra"][name]
            | {"unit": look.unit_of(shardset, name, spectrum.kinds["lines"]), "read": spectrum.summary()}
            for name, spectrum in spectra.items()
        },
        "targets": {
            name: {"unit": look.unit_of(shardset, name), "read": each.summary()}
            for name, each in targets.items()
            if each.count
        },
        "provenance": manifest["provenance"],
    }


def _has(block):
    """How many records of a block have what not every set has."""
    forces = np.isfinite(block["forces"][block["ptr"][:-1], 0]).sum() if "forces" in block else 0
    return {
        "smiles": int((np.diff(block["smiles_ptr"]) > 0).sum()),
        "bonds": int(block["bonds_known"].sum()) if "bonds_known" in block else 0,
        "forces": int(forces),
        "charge": int((block["charge"] != 0).sum()),
    }


def _describe_sizes(counts):
    there = np.flatnonzero(counts)
    weights = counts[there]
    # Of equal width, 16 at most.
    width = math.ceil((there[-1] - there[0] + 1) / 16)
    bins = [
        (start, min(start + width - 1, int(there[-1]))) for start in range(int(there[0]), int(there[-1]) + 1, width)
    ]
    median, p95 = np.quantile(there, [0.5, 0.95], weights=weights, method="inverted_cdf")
    return {
        "min": int(there[0]),
        "median": int(median),
        "mean": float(there @ weights / weights.sum()),
        "p95": int(p95),
        "max": int(there[-1]),
        "histogram": [[low, high, int(counts[low : high + 1].sum())] for low, high in bins],
    }


def info(description):
    """What describe() gives, as text for a person."""
    d, n, m = description, description["sample"]["blocks"], description["sample"]["records"]
    part = f"{n} of {d['blocks']} blocks, evenly spread: {m:,} of {d['records']:,} records"
    if n == d["blocks"]:
        part = f"all {n} blocks"
    lines = [
        d["folder"],
        *look.table(
            [
                ("records", f"{d['records']:,}"),
                ("atoms", f"{d['atoms']:,}"),
                ("shards", f"{d['shards']:,}"),
                ("blocks", f"{d['blocks']:,}"),
                ("bytes", f"{d['bytes']:,}"),
                ("bytes a record", f"{d['bytes_per_record']:,.0f}"),
            ]
        ),
        "",
        "sizes (atoms): min {min}, median {median}, mean {mean:.1f}, 95 % {p95}, max {max}".format(**d["sizes"]),
        *_histogram(d["sizes"]["histogram"]),
        "",
        "elements",
        *look.table([(symbol, f"{e['atoms']:,}", f"{e['share']:.2%}") for symbol, e in d["elements"].items()]),
        "",
        f"of the records, as read in {part}",
        *look.table([(label, f"{d['has'][name]:,}") for name, label in HAS.items()]),
    ]
    lines += ["", "spectra" if d["spectra"] else "no spectra"]
    for name, spectrum in d["spectra"].items():
        lines += _info_of_spectrum(name, spectrum, d["records"])
    lines += ["", "targets (of the records read)" if d["targets"] else "no targets"]
    if d["targets"]:
        head = ("", "records", "mean", "std", "min", "max")
        rows = [
            (f"{name} ({t['unit']})", f"{t['read']['records']:,}", *(f"{t['read'][k]:.6g}" for k in head[2:]))
            for name, t in d["targets"].items()
        ]
        lines += look.table([head, *rows])
    return "\n".join([*lines, "", "provenance", *_outline(d["provenance"])])


def _histogram(bins):
    most = max(count for *_, count in bins)
    labels = [f"{low}" if low == high else f"{low}–{high}" for low, high, _ in bins]
    width, digits = max(map(len, labels)), len(f"{most:,}")
    return [
        f"  {label:>{width}}  {count:>{digits},}  {'█' * math.ceil(40 * count / most)}".rstrip()
        for label, (*_, count) in zip(labels, bins, strict=True)
    ]


def _info_of_spectrum(name, spectrum, records):
    unit, part = look.UNITS[GRIDS[name].unit], spectrum["read"]
    lines = [
        f"  {name}: {spectrum['records']:,} records ({spectrum['records'] / records:.1%}), "
        f"{spectrum['lines_per_record']} lines a record, mean total {spectrum['mean_total']:.5g}"
    ]
    kinds = ", ".join(f"{part[kind]:,} as {kind}" for kind in ("values", "lines") if part[kind])
    lines.append(f"    read: {kinds or 'none'}")
    if part["range"]:
        lines.append("    values {:.4g} to {:.4g}".format(*part["range"]))
    if part["line_positions"]:
        low, high = part["line_positions"]
        weak, strong = part["line_strengths"]
        lines.append(f"    lines at {low:.5g} to {high:.5g} {unit}, {weak:.4g} to {strong:.4g} {STRENGTHS[name]}")
    if part["mean_bands"]:
        highest = ", ".join(f"{height:.4g} at {position:.5g}" for position, height in part["mean_bands"])
        lines.append(f"    highest bands of the mean spectrum ({spectrum['unit']} at {unit}): {highest}")
    return lines


def _outline(values, indent="  "):
    """A dict of dicts as indented lines."""
    lines = []
    for name, value in values.items():
        nested = isinstance(value, dict)
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        lines += [f"{indent}{name}", *_outline(value, indent + "  ")] if nested else [f"{indent}{name}: {text}"]
    return lines
