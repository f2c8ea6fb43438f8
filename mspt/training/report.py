"""What a run leaves for a person: summary.json, pictures, the last lines on the screen."""

import datetime
import platform

import torch

from mspt import __version__, kernels
from mspt.training import metrics


def summarise(config, train, evaluation, process):
    """The content of summary.json.

    train: steps, parameters, and records, atoms, seconds, waited over the whole run. evaluation: of
    evaluation.evaluate, or None without a held-out set.
    """
    seconds = max(train["seconds"], 1e-9)
    return {
        "heldout": evaluation.metrics if evaluation else None,
        "train": {
            "steps": train["steps"],
            "records_seen": int(train["records"]),
            "seconds": round(seconds, 2),
            "molecules_per_second": round(train["records"] / seconds, 2),
            "atoms_per_second": round(train["atoms"] / seconds, 1),
            "parameters": train["parameters"],
        },
        "data": {"wait_fraction": round(train["waited"] / seconds, 5)},
        "world_size": process.world_size,
        "zero_stage": config.engine.zero_stage,
        "precision": config.engine.precision,
        "kernels": kernels.implementation(process.device),
        "device": str(process.device),
        "versions": {"mspt": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def draw(run_dir, evaluation):
    """Save pictures of what there is to show -> their paths by name."""
    # Not above: matplotlib takes most of a second to load, and one rank alone draws.
    from mspt.data import plot
    from mspt.training import figures

    result = {"losses": figures.losses(metrics.read(run_dir))}
    if evaluation and evaluation.examples:
        result["reconstructions"] = figures.reconstructions(evaluation.examples)
    if evaluation and evaluation.ranks is not None:
        result["retrieval"] = figures.retrieval(evaluation.ranks, evaluation.similarities)
    paths = {name: run_dir / "figures" / f"{name}.png" for name in result}
    for name, figure in result.items():
        plot.save(figure, paths[name])
    return paths


def errors(reported):
    """Mean absolute errors on a line. reported: of validation.Validation."""
    return ", ".join(
        f"{name} MAE {error['mae']:.4g} {error['unit']} (baseline {error['baseline']:.4g}{left_out(error)})"
        for name, error in reported.items()
    )


def left_out(error):
    """What is to be said of labels that were not measured. error: of validation.reported."""
    return f"; {error['unknown']} left out, with elements that no label to train on has" if "unknown" in error else ""


def sum_up(summary, folder):
    """The last lines of a run: what came out, and where to look next."""
    train, heldout = summary["train"], summary["heldout"] or {}
    speed = f"{train['molecules_per_second']:.0f}/s on {summary['world_size']} processes"
    lines = [f"done: {train['steps']} steps, {train['records_seen']} molecules in {train['seconds']:.0f} s ({speed})"]
    if summary.get("errors"):
        lines.append(f"held out: {errors(summary['errors'])}")
    for name in [name for name in heldout if name.startswith("denoise_") and f"{name}_baseline" in heldout]:
        term = name.removeprefix("denoise_")
        lines.append(f"held out: {term} {heldout[name]:.3f} (predicting nothing: {heldout[name + '_baseline']:.3f})")
    if "masked_mse" in heldout:
        lines.append(
            f"held out: masked patches {heldout['masked_mse']:.2e} (predicting the mean: "
            f"{heldout['masked_mse_baseline']:.2e})"
        )
    predicted = {name: error for name, error in heldout.items() if name.startswith("spectrum_")}
    if predicted:
        parts = ", ".join(f"{name.removeprefix('spectrum_')} {error:.3f}" for name, error in predicted.items())
        lines.append(f"held out: errors of predicted spectra: {parts} (1 is predicting the mean)")
    if "recall_at_10_molecule_to_spectrum" in heldout:
        lines.append(
            f"held out: spectrum of a molecule among the first 10 of {heldout['pairs']}: "
            f"{heldout['recall_at_10_molecule_to_spectrum']:.0%} (chance {heldout['recall_at_10_chance']:.0%})"
        )
    lines += [
        f"summary:  {folder / 'summary.json'}",
        f"pictures: {folder / 'figures'}",
        *([f"model:    {folder / 'model'}"] if "errors" in summary else []),
        f"encoder:  {folder / 'encoder'}",
        f"curves:   tensorboard --logdir {folder}",
    ]
    return "\n".join(lines)
