"""Learning curves of a table's runs, as a matplotlib Figure without any global state."""

import json
import statistics
from itertools import groupby

from matplotlib.figure import Figure


def learning_curves(plan):
    """What a reproduce.Plan has done, a column a target: the error on the test set against the number of labels, and
    for each number of labels the error on the validation set, in the unit of the set, against the steps.

    Lines are means over seeds, bars the deviation of one run.
    """
    results = plan.results()
    colours = {row: f"C{number % 10}" for number, row in enumerate(plan.table.rows)}
    size = (3.2 * len(plan.targets) + 1.8, 2.8 * (1 + len(plan.labels)))
    figure = Figure(figsize=size, layout="constrained")
    top, *below = figure.subplots(1 + len(plan.labels), len(plan.targets), squeeze=False)
    shown, places = {}, _places(plan.labels)
    for column, target in enumerate(plan.targets):
        target_and_unit = target
        for row, by_labels in results.items():
            found = {labels: by[target] for labels, by in by_labels.items() if target in by}
            if found:
                shown[row] = _errors(top[column], found, places, colours[row])
                target_and_unit = f"{target} / {next(iter(found.values()))['unit']}"
        _abscissa(top[column], places)
        top[column].set_title(target_and_unit)
        for axes, labels in zip((line[column] for line in below), plan.labels, strict=True):
            cells = [c for c in plan.whole.cells if (c.target, c.labels, c.run.done) == (target, labels, True)]
            for row, own in groupby(cells, key=lambda cell: cell.row):
                _validation(axes, list(own), colours[row])
            axes.set_xlabel("steps, all labels" if labels is None else f"steps, {labels} labels")
    top[0].set_ylabel("test, mean absolute error")
    for line in below:
        line[0].set_ylabel("validation, mean absolute error")
    figure.legend(shown.values(), [plan.names[row] for row in shown], loc="outside right upper", frameon=False)
    return figure


def _places(labels):
    """Number of labels -> where it is drawn; None, all of them, to the right of the others."""
    most = max((number for number in labels if number), default=1)
    return {number: number or 10 * most for number in labels}


def _abscissa(axes, places):
    axes.set_xscale("log")
    axes.set_xlim(min(places.values()) / 3, max(places.values()) * 3)
    axes.set_xticks(list(places.values()), ["all" if number is None else str(number) for number in places])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("labels")


def _errors(axes, found, places, colour):
    """found: labels -> a result."""
    mean = [statistics.fmean(each["mae"]) for each in found.values()]
    spread = [statistics.stdev(each["mae"]) if len(each["mae"]) > 1 else 0.0 for each in found.values()]
    x = [places[labels] for labels in found]
    return axes.errorbar(x, mean, spread, color=colour, marker="o", markersize=4, linewidth=1.2, capsize=3)


def _validation(axes, cells, colour):
    """The mean over runs that differ in the seed, as far as all of them went."""
    curves = []
    for cell in cells:
        name = f"validation_{cell.target}"
        rows = map(json.loads, (cell.run.folder / "metrics.jsonl").read_text().splitlines())
        curves.append({row["step"]: row[name] for row in rows if name in row})
    steps = sorted(set.intersection(*map(set, curves)))
    axes.plot(steps, [statistics.fmean(curve[step] for curve in curves) for step in steps], color=colour, linewidth=1.2)
