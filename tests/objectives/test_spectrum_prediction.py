"""Structure → spectrum: it starts from the mean, learns from what is there alone, and adds up over any cut."""

import dataclasses

import pytest
import torch
from torch import nn

from mspt.chemistry.spectra import LINE_SHAPES
from mspt.data.batch import MoleculeBatch
from mspt.data.keyed import Keyed
from mspt.data.packing import Budget
from mspt.data.shardset import ShardSet
from mspt.data.stream import DataSettings
from mspt.errors import UserError
from mspt.models.encoders.torchmd_et import TINY
from mspt.models.pretraining import NetworkSettings, Pass
from mspt.objectives import ObjectivesSettings, Pretraining, spectrum_prediction
from tests.data.molecules import plain, write_set
from tests.end_to_end.runs import SHARDS

DATA = DataSettings(train="set", lanes=1, budget=Budget(molecules=8, atoms=100))


def build(**settings):
    """A Pretraining with this objective alone, and its objective."""
    torch.manual_seed(0)
    objectives = ObjectivesSettings.model_validate({"spectrum_prediction": {"hidden": 8, **settings}})
    module = Pretraining(NetworkSettings(encoder=TINY), objectives)
    return module, module.objectives["spectrum_prediction"]


def awake(objective):
    """The last layers, which start from zero, with random weights."""
    for head in objective.heads.values():
        nn.init.normal_(head.layers[-1].weight, std=0.1)


def records(count=11):
    """The first of the bundled ones; the second has no IR, the third no spectrum at all."""
    found = list(ShardSet.open(SHARDS).records(range(count)))
    found[1] = dataclasses.replace(found[1], spectra={n: s for n, s in found[1].spectra.items() if n != "ir"})
    found[2] = dataclasses.replace(found[2], spectra={})
    return found


def batch(made, dtype=torch.float64):
    one = MoleculeBatch.from_records(made).to(dtype)
    return one.broadened(LINE_SHAPES)


def test_untrained_it_predicts_the_mean_with_error_1(tmp_path):
    write_set(tmp_path / "set", records(), block=3)
    module, objective = build()
    objective.fit([ShardSet.open(tmp_path / "set")], DATA)
    whole, generator = batch(records(), torch.float32), Keyed(0, 0)
    sums, weights = objective(Pass(module.network, whole), whole, generator), objective.weights(whole, generator)
    assert weights.tolist() == [10, 9, 10]
    torch.testing.assert_close(sums / weights, torch.ones(3), rtol=1e-3, atol=0)
    expected = torch.log10(1 + whole.spectra["ir"][whole.present["ir"]]).mean(0)
    predicted = objective.predict(Pass(module.network, whole))["ir"]
    torch.testing.assert_close(predicted, expected.clamp(min=1e-5).expand_as(predicted), rtol=1e-3, atol=1e-6)


def test_a_spectrum_that_is_nowhere_is_named(tmp_path):
    write_set(tmp_path / "set", plain([3, 4]))
    with pytest.raises(UserError, match="no record to train on has uv_vis"):
        build()[1].fit([ShardSet.open(tmp_path / "set")], DATA)
    write_set(tmp_path / "real", records())
    with pytest.raises(UserError, match="no record to train on has raman, or data.spectra lacks it"):
        build()[1].fit([ShardSet.open(tmp_path / "real")], DATA.model_copy(update={"spectra": ("uv_vis", "ir")}))


def test_records_without_spectra_come_first(monkeypatch, tmp_path):
    """What is counted are records that have the spectrum."""
    monkeypatch.setattr(spectrum_prediction, "RECORDS", 4)
    bare = [dataclasses.replace(r, key=f"bare-{i}", spectra={}) for i, r in enumerate(records(8))]
    write_set(tmp_path / "set", [*bare, *records()], block=2)
    write_set(tmp_path / "none", bare)
    objective = build()[1]
    objective.fit([ShardSet.open(tmp_path / name) for name in ("none", "set")], DATA)
    expected = torch.log10(1 + batch(records()).spectra["ir"][[0, 3, 4, 5, 6, 7, 8, 9, 10]]).mean(0)
    torch.testing.assert_close(objective.heads["ir"].mean.double(), expected, rtol=1e-4, atol=1e-6)


def test_the_sum_is_that_of_each_molecule_by_itself():
    """Over the spectra that it has: mean square error over the points, over the variance."""
    module, objective = build(spectra=["raman", "ir"])
    assert list(module.terms) == ["spectrum_ir", "spectrum_raman"]
    awake(objective)
    objective.heads["ir"].variance.fill_(0.25)
    module = module.double()
    expected = torch.zeros(2, dtype=torch.float64)
    for record in records(5):
        alone = batch([record])
        predicted = objective.predict(Pass(module.network, alone))
        for place, (name, over) in enumerate((("ir", 0.25), ("raman", 1.0))):
            if name in record.spectra:
                error = predicted[name][0] - torch.log10(1 + alone.spectra[name][0])
                expected[place] += error.square().mean() / over
    together = batch(records(5))
    found = objective(Pass(module.network, together), together, Keyed(0, 0))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("sizes", [[1, 0, 7, 3], [4, 4, 3]])
def test_the_gradient_does_not_depend_on_the_cut(sizes):
    """Float64, uneven micro-batches, one of them empty, beside coord."""
    torch.manual_seed(0)
    chosen = {"coord": {}, "spectrum_prediction": {"hidden": 8}}
    module = Pretraining(NetworkSettings(encoder=TINY), ObjectivesSettings.model_validate(chosen)).double()
    awake(module.objectives["spectrum_prediction"])
    gradients, generator, total = [], Keyed(0, 0), batch(records())
    totals = module.weights(total, generator)
    for cut in ([11], sizes):
        module.zero_grad(set_to_none=True)
        made = iter(records())
        for size in cut:
            own = batch([next(made) for _ in range(size)])
            module.loss(own, generator, totals)[0].backward()
        gradients.append({name: p.grad.clone() for name, p in module.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-9, atol=1e-12, msg=name)
    assert all(g.abs().max() > 0 for n, g in gradients[0].items() if "spectrum_prediction" in n or "embedding" in n)


def test_in_low_precision():
    """bf16 weights as DeepSpeed makes them; spectra and errors stay float32."""
    module, objective = build()
    awake(objective)
    whole = batch(records(4), torch.float32)
    exact = objective(Pass(module.network, whole), whole, Keyed(0, 0))
    module = module.bfloat16()
    found = objective(Pass(module.network, whole), whole, Keyed(0, 0))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=0.05, atol=0)
