"""A fine-tuned model as a folder: what is loaded predicts what was saved, and what does not fit is said."""

import csv
import io
import json
import re

import ase.io
import numpy as np
import pytest
import safetensors.torch
import torch

from mspt.data.batch import MoleculeBatch
from mspt.data.shardset import ShardSet
from mspt.downstream import predictor
from mspt.errors import UserError
from mspt.models import encoders
from mspt.models.encoders.torchmd_et import TINY
from mspt.models.pretraining import NetworkSettings
from mspt.objectives import ObjectivesSettings, Pretraining
from tests.end_to_end.runs import SHARDS

COORD = {"coord": {"weight": 0.1}}
OBJECTIVES = {
    "property": {"property": {"target": "u0"}} | COORD,
    "forces": {"forces": {"target": "energy"}} | COORD,
}


def saved(folder, kind):
    """Save a model with statistics that float32 does not hold -> the module."""
    torch.manual_seed(0)
    objectives = ObjectivesSettings.model_validate(OBJECTIVES[kind])
    module = Pretraining(NetworkSettings(encoder=TINY), objectives)
    statistics = module.objectives[kind].statistics
    statistics.references.copy_(-1000.123456789 * torch.arange(len(statistics.references)))
    statistics.deviation.fill_(0.3)
    names = {"property": {"u0": "eV"}, "forces": {"energy": "eV"}}
    predictor.save(module.state_dict(), module, TINY, objectives, names[kind], folder)
    return module


@torch.no_grad()
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_what_is_loaded_predicts_what_was_saved(tmp_path, kind):
    module = saved(tmp_path / "run" / "model", kind)
    for folder in (tmp_path / "run", tmp_path / "run" / "model"):
        loaded = predictor.load(folder)
        assert list(loaded.module.objectives) == [kind]  # the noise head is not needed
        for name, tensor in loaded.module.state_dict().items():
            assert torch.equal(tensor, module.state_dict()[name]), name
    records = list(ShardSet.open(SHARDS).records(range(len(ShardSet.open(SHARDS)))))
    expected = module.predict(MoleculeBatch.from_records(records))
    (name,) = loaded.units
    assert predictor.predict(tmp_path / "run", SHARDS, tmp_path / "a.csv", 700) == (len(records), {name: "eV"})
    rows = list(csv.DictReader(io.StringIO((tmp_path / "a.csv").read_text())))
    assert [row["key"] for row in rows] == [record.key for record in records]
    np.testing.assert_allclose([float(row[name]) for row in rows], expected[name], rtol=1e-9)
    predictor.predict(tmp_path / "run", SHARDS, tmp_path / "a.xyz", 700)
    frames, at = ase.io.read(tmp_path / "a.xyz", ":"), 0
    for i, (frame, record) in enumerate(zip(frames, records, strict=True)):
        assert frame.numbers.tolist() == record.numbers.tolist() and frame.info["key"] == record.key
        np.testing.assert_allclose(frame.positions, record.positions, atol=1e-6)
        if kind == "forces":
            assert frame.get_potential_energy() == pytest.approx(expected["energy"][i].item(), rel=1e-9)
            own = expected["forces"][at : at + len(frame)]
            np.testing.assert_allclose(frame.get_forces(), own, rtol=1e-3, atol=1e-5)
        at += len(frame)


def test_an_element_that_the_model_does_not_know_is_named(tmp_path):
    saved(tmp_path / "model", "property")
    model = tmp_path / "model" / "model.safetensors"
    weights = safetensors.torch.load_file(model)
    weights["objectives.property.statistics.references"][8] = torch.inf
    safetensors.torch.save_file(weights, model)
    first = next(r for r in ShardSet.open(SHARDS).records(range(100)) if 8 in r.numbers)
    with pytest.raises(UserError, match=f"{first.key} holds O, which is in none of the labelled molecules"):
        predictor.predict(tmp_path, SHARDS, tmp_path / "a.csv", 700)
    assert not (tmp_path / "a.csv").exists()


def test_a_target_of_several_words(tmp_path):
    objectives = ObjectivesSettings.model_validate({"property": {"target": "heat of formation"}})
    module = Pretraining(NetworkSettings(encoder=TINY), objectives)
    predictor.save(module.state_dict(), module, TINY, objectives, {}, tmp_path / "model")
    predictor.predict(tmp_path, SHARDS, tmp_path / "a.xyz", 700)
    predictor.predict(tmp_path, SHARDS, tmp_path / "a.csv", 700)
    expected = [float(row["heat of formation"]) for row in csv.DictReader((tmp_path / "a.csv").open())]
    found = [frame.info["heat of formation"] for frame in ase.io.read(tmp_path / "a.xyz", ":")]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_what_does_not_fit_is_said(tmp_path):
    saved(tmp_path / "model", "property")
    with pytest.raises(UserError, match="--budget-atoms is 5"):
        predictor.predict(tmp_path, SHARDS, tmp_path / "a.csv", 5)
    with pytest.raises(UserError, match=r"predictions are written as \.csv or \.xyz"):
        predictor.predict(tmp_path, SHARDS, tmp_path / "a.extxyz", 700)
    with pytest.raises(UserError, match="is a fine-tuned model's; give the folder encoder/ of its run"):
        encoders.load(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    tree = json.loads(config.read_text())
    for change, said in (
        ({"encoder": tree["encoder"] | {"channels": 32}}, "model.safetensors: does not fit config.json"),
        ({"objectives": {}}, "config.json: is not a fine-tuned model's"),
        ({"units": None}, "config.json: is not a fine-tuned model's"),
    ):
        config.write_text(json.dumps(tree | change))
        with pytest.raises(UserError, match=re.escape(said)):
            predictor.load(tmp_path)
    config.unlink()
    with pytest.raises(UserError, match="give a run folder of mspt finetune"):
        predictor.load(tmp_path)
