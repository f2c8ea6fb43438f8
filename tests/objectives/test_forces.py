"""Forces are the slope of the energy that the same model predicts, and the loss on them has the gradient it should."""

import numpy as np
import pytest
import torch

from mspt.data.batch import MoleculeBatch
from mspt.data.keyed import Keyed
from mspt.models.encoders.torchmd_et import TINY
from mspt.models.pretraining import NetworkSettings
from mspt.objectives import ObjectivesSettings, Pretraining
from mspt.objectives.forces import KCAL_MOL, ForcesSettings
from tests.data.molecules import record

KEYED = Keyed(0, 0)


def module(**settings):
    torch.manual_seed(0)
    encoder = TINY.model_copy(update={"norm": "none", "gates": "direct"})
    made = Pretraining(NetworkSettings(encoder=encoder), ObjectivesSettings(forces=ForcesSettings(**settings))).double()
    made.objectives["forces"].statistics.mean.fill_(-4200.0)
    made.objectives["forces"].statistics.deviation.fill_(0.3)
    return made


def batch():
    rng, numbers = np.random.default_rng(0), np.array([6, 1, 8, 1], np.uint8)
    some = [
        record("a", 4, 0, numbers=numbers, targets={"energy": -4200.1}, forces=rng.normal(0, 1, (4, 3)).astype("f4")),
        record("b", 3, 1, numbers=numbers[:3], targets={"energy": -4199.6}),
        record("c", 2, 2, numbers=numbers[:2], forces=rng.normal(0, 1, (2, 3)).astype("f4")),
    ]
    return MoleculeBatch.from_records(some).to(torch.float64)


@torch.no_grad()
def test_forces_beside_a_property():
    """A property is predicted of the clean pass, which the forces' must not take its features from."""
    torch.manual_seed(0)
    settings = ObjectivesSettings(property={"target": "energy"}, forces=ForcesSettings())
    both = Pretraining(NetworkSettings(encoder=TINY), settings).double()
    alone = Pretraining(NetworkSettings(encoder=TINY), ObjectivesSettings(forces=ForcesSettings())).double()
    alone.load_state_dict({name: both.state_dict()[name] for name in alone.state_dict()})
    expected = alone("predict", batch())["forces"]
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(both("predict", batch())["forces"], expected)


@torch.no_grad()
def test_forces_are_the_slope_of_the_energy():
    made, given, step = module(), batch(), 1e-4
    predicted = made("predict", given)
    assert not predicted["energy"].requires_grad and predicted["forces"].shape == (9, 3)
    for atom, axis in ((0, 0), (3, 2), (5, 1), (8, 0)):
        ends = []
        for sign in (1, -1):
            given.positions[atom, axis] += sign * step
            ends.append(made("predict", given)["energy"].sum())
            given.positions[atom, axis] -= sign * step
        slope = ((ends[0] - ends[1]) / (2 * step)).item()
        assert -slope == pytest.approx(predicted["forces"][atom, axis].item(), rel=1e-5, abs=1e-7)


def test_terms_by_hand():
    """Errors in kcal/mol; what has no label counts nowhere."""
    made, given = module(energy_weight=0.3, force_weight=0.6, weight=2.0), batch()
    assert made.terms == {"energy": pytest.approx(0.6), "forces": pytest.approx(1.2)}
    totals = made.weights(given, KEYED)
    assert totals.tolist() == [2, 6]
    loss, sums = made("loss", given, KEYED, totals)
    predicted = made("predict", given)
    energies = KCAL_MOL * (predicted["energy"][:2] - torch.tensor([-4200.1, -4199.6], dtype=torch.float64))
    labelled = [0, 1, 2, 3, 7, 8]
    forces = KCAL_MOL * (predicted["forces"] - given.forces)[labelled]
    expected = [energies.square().sum().item(), forces.square().mean(1).sum().item()]
    assert sums.tolist() == pytest.approx(expected, rel=1e-10)
    assert loss.item() == pytest.approx(0.6 * expected[0] / 2 + 1.2 * expected[1] / 6, rel=1e-10)


def test_gradient_of_the_loss_along_a_direction():
    made, given = module(), batch()
    totals = made.weights(given, KEYED)
    parameters = list(made.parameters())
    direction = [torch.randn_like(parameter) for parameter in parameters]
    loss, _ = made("loss", given, KEYED, totals)
    slope = sum((g * d).sum() for g, d in zip(torch.autograd.grad(loss, parameters), direction, strict=True))
    ends, step = [], 1e-6
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, d in zip(parameters, direction, strict=True):
                parameter += sign * step * d
        ends.append(made("loss", given, KEYED, totals)[0].item())
        with torch.no_grad():
            for parameter, d in zip(parameters, direction, strict=True):
                parameter -= sign * step * d
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope.item(), rel=1e-5)


def test_nothing_to_learn_from():
    made, empty = module(), MoleculeBatch.empty().to(torch.float64)
    assert made.weights(empty, KEYED).tolist() == [0, 0]
    loss, _ = made("loss", empty, KEYED, torch.tensor([2.0, 6.0]))
    loss.backward()
    assert loss == 0
    unlabelled = MoleculeBatch.from_records([record("a", 3)]).to(torch.float64)
    loss, _ = made("loss", unlabelled, KEYED, torch.tensor([2.0, 6.0]))
    assert loss == 0
