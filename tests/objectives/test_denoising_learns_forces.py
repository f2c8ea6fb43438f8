"""Denoising learns the gradient of a potential where the answer is known: four atoms held together by springs.

At kT = 1 the molecule has displacements δ of covariance C = H⁻¹ from its equilibrium; with noise σ they have C + σ²,
and the force of the smoothed distribution is −(C + σ²)⁻¹ δ. The equilibrium is a regular tetrahedron, for which the
force of the Gram matrix that 3D-EMGP fits is along δ as well.
"""

from itertools import combinations

import pytest
import torch
from torch.nn.functional import cosine_similarity

from mspt.data.batch import MoleculeBatch
from mspt.data.keyed import Keyed
from mspt.models.encoders.torchmd_et import TorchMDETSettings
from mspt.models.pretraining import NetworkSettings, Pass
from mspt.objectives import ObjectivesSettings, Pretraining
from mspt.objectives.distance import pairs
from mspt.objectives.noise import NoiseLevels

SIGMA = 0.05
EQUILIBRIUM = 0.8 * torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=torch.float64)
SPRINGS = [40.0, 2500.0, 100.0, 1600.0, 60.0, 900.0]  # kT / Å², of the six pairs
LEVELS = NoiseLevels(first=SIGMA, last=SIGMA)
ENCODER = TorchMDETSettings(layers=2, channels=32, heads=2, radial_functions=16, cutoff=6.0, norm="none")


def covariance():
    """C [12, 12]: the inverse of the springs' Hessian, zero for motions of the whole."""
    hessian = torch.zeros(12, 12, dtype=torch.float64)
    for stiffness, (i, j) in zip(SPRINGS, combinations(range(4), 2), strict=True):
        stretch = torch.zeros(4, 3, dtype=torch.float64)
        stretch[i] = (EQUILIBRIUM[i] - EQUILIBRIUM[j]) / (EQUILIBRIUM[i] - EQUILIBRIUM[j]).norm()
        stretch[j] = -stretch[i]
        hessian += stiffness * torch.outer(stretch.flatten(), stretch.flatten())
    return torch.linalg.pinv(hessian)


def samples(count, step):
    """A batch of count molecules drawn at kT = 1."""
    generator = torch.Generator().manual_seed(step)
    values, modes = torch.linalg.eigh(covariance())
    drawn = torch.randn(count, 12, generator=generator, dtype=torch.float64) * values.clamp(min=0).sqrt()
    positions = (EQUILIBRIUM.flatten() + drawn @ modes.T).view(-1, 3).float()
    numbers = torch.tensor([6, 7, 8, 9]).repeat(count)
    ptr = torch.arange(0, 4 * count + 1, 4)
    return MoleculeBatch(["one"] * count, torch.arange(count), numbers, positions, ptr)


def force(noisy, springs=True):
    """−(C + σ²)⁻¹ δ [n, 3] of noisy positions, of which motions of the whole are left out; without springs, −δ."""
    values, modes = torch.linalg.eigh(covariance())
    delta = (noisy.double().view(-1, 12) - EQUILIBRIUM.flatten()) @ modes
    stiffness = 1 / (values + SIGMA**2) if springs else torch.ones_like(values)
    return (torch.where(values > 1e-9, -stiffness * delta, 0.0) @ modes.T).view(-1, 3)


def trained(name, steps, **settings):
    """A Pretraining with one objective after so many steps of 48 molecules."""
    torch.manual_seed(0)
    objectives = ObjectivesSettings.model_validate({name: settings})
    module = Pretraining(NetworkSettings(encoder=ENCODER), objectives)
    adam = torch.optim.Adam(module.parameters(), lr=0.003)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, 0.004, total_steps=steps)
    for step in range(steps):
        batch, generator = samples(48, step), Keyed(0, step)
        loss, _ = module("loss", batch, generator, module.weights(batch, generator))
        adam.zero_grad()
        loss.backward()
        adam.step()
        schedule.step()
    return module


def similarity(one, other):
    return cosine_similarity(one.double().flatten(), other.double().flatten(), dim=0).item()


def predicted_by_coord(module, batch, generator):
    """Noisy positions, and the force that the head's noise stands for."""
    model = module.corrupted(batch, generator)
    with torch.no_grad():
        return model.positions, -module.objectives["coord"].head(*model.structure)


def predicted_by_emgp(module, batch, generator):
    objective = module.objectives["emgp"]
    noisy = objective.noisy(batch, generator)[0]
    view = Pass(module.network, batch).view(noisy, differentiable=True)
    return noisy, view.energies_and_forces(objective.energy)[1].detach()


@pytest.mark.parametrize(
    ("name", "settings", "steps", "predicted"),
    [
        ("coord", {"sigma": SIGMA}, 300, predicted_by_coord),
        ("emgp", {"levels": LEVELS.model_dump()}, 200, predicted_by_emgp),
    ],
)
def test_forces_of_springs(name, settings, steps, predicted):
    module = trained(name, steps, **settings)
    batch = samples(256, steps)
    noisy, found = predicted(module, batch, Keyed(0, steps))
    expected = force(noisy)
    assert similarity(found, expected) > 0.95
    # Neither what was added nor the way back to the equilibrium is the answer.
    assert similarity(batch.positions - noisy, expected) < 0.9
    assert similarity(force(noisy, springs=False), expected) < 0.9


def test_scores_of_distances():
    """SE(3)-DDM: of a distance d in the first view, to which atoms moved by τ and noise σ are added, the score is
    −(d̃ − d) / (2 τ² + σ²).
    """
    tau = 0.05
    levels = NoiseLevels(first=0.1, last=0.1)
    module = trained("se3_ddm", 400, sigma=tau, levels=levels.model_dump())
    batch, generator = samples(256, 400), Keyed(0, 400)
    objective, model, pair = module.objectives["se3_ddm"], Pass(module.network, batch), pairs(batch.ptr)
    epsilon, sigma = objective.drawn("forth", batch, pair, generator)

    def distances(x):
        return (x[pair[0]] - x[pair[1]]).norm(dim=-1)

    noisy = distances(objective.moved(model, batch, generator)) + sigma * epsilon
    with torch.no_grad():
        scalars = model.structure[0]
        found = objective.forth(scalars[pair[0]] + scalars[pair[1]], noisy)
    expected = -(noisy - distances(batch.positions)) / (2 * tau**2 + 0.1**2)
    assert similarity(found, expected) > 0.95
    assert similarity(noisy.mean() - noisy, expected) < 0.9
