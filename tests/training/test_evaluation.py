"""Held-out metrics where molecules lack what the objectives are about: left out, not zero."""

import dataclasses

import pytest
import torch

from mspt.data.packing import Budget
from mspt.data.shardset import ShardSet
from mspt.data.stream import DataSettings
from mspt.models.encoders.torchmd_et import TINY
from mspt.models.pretraining import NetworkSettings
from mspt.models.specformer import SpecFormerSettings
from mspt.objectives import ObjectivesSettings, Pretraining
from mspt.training import report
from mspt.training.evaluation import evaluate
from tests.data.molecules import write_set
from tests.end_to_end.runs import SHARDS

DATA = DataSettings(train="set", lanes=1, budget=Budget(molecules=8, atoms=200))
OBJECTIVES = {"coord": {}, "masked_patches": {}, "contrast": {}, "spectrum_prediction": {"hidden": 8}}


@pytest.fixture(scope="module")
def module():
    torch.manual_seed(0)
    network = NetworkSettings(
        encoder=TINY, specformer=SpecFormerSettings(layers=1, channels=16, heads=2, feed_forward=16)
    )
    return Pretraining(network, ObjectivesSettings.model_validate(OBJECTIVES))


def measured(module, folder, heldout):
    """Metrics of a set of these records, trained on the first bundled ones."""
    train = list(ShardSet.open(SHARDS).records(range(12)))
    for name, records in (("train", train), ("heldout", heldout)):
        write_set(folder / name, records)
    train, heldout = (ShardSet.open(folder / name) for name in ("train", "heldout"))
    return evaluate(module, module, heldout, [train], DATA, 0, torch.device("cpu"), lambda: None)


def records(*without):
    """Bundled molecules, without some of their spectra."""
    found = list(ShardSet.open(SHARDS).records(range(12, 20)))
    return [dataclasses.replace(r, spectra={n: s for n, s in r.spectra.items() if n not in without}) for r in found]


def test_without_any_spectrum_denoising_alone_is_measured(module, tmp_path):
    found = measured(module, tmp_path, records("uv_vis", "ir", "raman"))
    assert found.metrics.keys() == {"molecules", "pairs", "denoise_coord", "denoise_coord_baseline"}
    assert found.metrics["pairs"] == 0 and found.ranks is None and found.similarities is None


def test_a_spectrum_that_no_molecule_has_is_left_out(module, tmp_path):
    """What is there is measured as before."""
    whole = measured(module, tmp_path / "whole", records()).metrics
    found = measured(module, tmp_path / "less", records("uv_vis")).metrics
    assert not [name for name in found if "uv_vis" in name]
    assert {"spectrum_uv_vis", "masked_mse_uv_vis"} <= set(whole)
    assert found["spectrum_ir"] == pytest.approx(whole["spectrum_ir"], rel=1e-5)
    for which in ("masked_mse", "masked_mse_baseline"):
        assert found[which] == pytest.approx(found[f"{which}_ir"] + found[f"{which}_raman"])
        assert found[which] > 0


def test_the_pool_of_a_match_are_the_molecules_with_spectra(module, tmp_path):
    heldout = [*records(), *(dataclasses.replace(r, key=f"bare-{r.key}") for r in records("uv_vis", "ir", "raman"))]
    metrics = measured(module, tmp_path, heldout).metrics
    assert (metrics["molecules"], metrics["pairs"]) == (16, 8)
    train = {"steps": 1, "records_seen": 1, "seconds": 1.0, "molecules_per_second": 1.0}
    said = report.sum_up({"train": train, "heldout": metrics, "world_size": 1}, tmp_path)
    assert "among the first 10 of 8: 100% (chance 100%)" in said
