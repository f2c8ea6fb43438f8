"""The denoising objectives: symmetries of loss and targets, what noise is added, and what predicting nothing gives."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mspt.data.batch import MoleculeBatch
from mspt.data.keyed import Keyed
from mspt.errors import UserError
from mspt.models.encoders.torchmd_et import TINY
from mspt.models.pretraining import NetworkSettings, Pass
from mspt.objectives import DENOISING, ObjectivesSettings, Pretraining, energy
from mspt.objectives.distance import pairs
from mspt.objectives.noise import NoiseLevels
from tests.objectives.made import batch_of, bonded_records


def build(name, **settings):
    torch.manual_seed(0)
    network = NetworkSettings(encoder=TINY)
    return Pretraining(network, ObjectivesSettings.model_validate({name: settings})).double()


def molecules(indices=(0, 1, 2, 3)):
    return batch_of([bonded_records()[index] for index in indices])


class Given(Keyed):
    """Noise on positions is what it is told to be, and one number for every pair of atoms and torsion."""

    def __init__(self, noise, other=0.3):
        super().__init__(0, 0)
        self.noise, self.other = noise, other

    def normal(self, purpose, records, counters, width, dtype=torch.float32):
        return self.noise if width == 3 else torch.full((len(records), width), self.other, dtype=dtype)


def noise_of(batch, seed=0):
    return torch.randn(batch.positions.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def turn(seed=0):
    matrix = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]
    return matrix * torch.linalg.det(matrix)


def loss(module, batch, generator):
    return module("loss", batch, generator, module.weights(batch, generator))[1]


@pytest.mark.parametrize("name", DENOISING)
def test_loss_under_rotation_reflection_and_translation(name):
    module, batch = build(name), molecules()
    noise = noise_of(batch)
    expected = loss(module, batch, Given(noise))
    for sign in (1, -1):
        matrix = sign * turn()
        moved = replace(batch, positions=batch.positions @ matrix.T + torch.tensor([3.0, -7, 0.5], dtype=torch.float64))
        # In a mirror a torsion turns the other way.
        found = loss(module, moved, Given(noise @ matrix.T, 0.3 if name != "frad" else 0.3 * sign))
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", DENOISING)
def test_loss_under_permutation(name):
    module, batch = build(name), molecules()
    generator = torch.Generator().manual_seed(1)
    order = torch.cat(
        [
            int(a) + torch.randperm(int(b - a), generator=generator)
            for a, b in zip(batch.ptr, batch.ptr[1:], strict=False)
        ]
    )
    place = order.argsort()
    permuted = replace(
        batch,
        numbers=batch.numbers[order],
        positions=batch.positions[order],
        bonds=batch.bonds._replace(pairs=place[batch.bonds.pairs]),
    )
    noise = noise_of(batch)
    found = loss(module, permuted, Given(noise[order]))
    torch.testing.assert_close(found, loss(module, batch, Given(noise)), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", DENOISING)
def test_a_record_has_the_same_noise_in_any_company(name):
    module, generator = build(name), Keyed(3, 5)
    together = loss(module, molecules((0, 1, 2)), generator)
    apart = sum(loss(module, molecules((index,)), generator) for index in (2, 0, 1))
    torch.testing.assert_close(apart, together, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", DENOISING)
def test_predicting_nothing(name):
    """The trivial sums are those of a network whose heads give zero; and evaluation gives the same sums as training."""
    module, batch, generator = build(name), molecules(), Keyed(0, 0)
    expected = loss(module, batch, generator)
    with torch.no_grad():
        found, extras = module("evaluate", batch, generator)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        for parameter in module.objectives.parameters():
            parameter.zero_()
        found, extras = module("evaluate", batch, generator)
    trivial = torch.stack([extras["trivial"][term] for term in module.terms])
    torch.testing.assert_close(trivial, found, rtol=1e-10, atol=1e-10)
    assert (trivial > 0).all()


@pytest.mark.parametrize("name", DENOISING)
def test_no_molecules(name):
    """An empty micro-batch: zero, and a gradient of zeros for every parameter."""
    module, batch = build(name), MoleculeBatch.empty().to(torch.float64)
    generator = Keyed(0, 0)
    total, sums = module("loss", batch, generator, torch.ones(len(module.terms)))
    total.backward()
    assert (sums == 0).all()
    assert all((parameter.grad == 0).all() for parameter in module.parameters())


def test_only_one_denoises():
    with pytest.raises(UserError, match="coord and frad are two ways of denoising"):
        Pretraining(NetworkSettings(encoder=TINY), ObjectivesSettings.model_validate({"frad": {}, "coord": {}}))


def force(noisy, clean, ptr):
    count = len(ptr) - 1
    batch = MoleculeBatch([""] * count, torch.arange(count), torch.ones(len(noisy)).long(), clean, ptr)
    return energy.force(noisy, clean, batch)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(0, 10**6), st.sampled_from([0.01, 0.3, 10.0]))
def test_force_of_the_gram_matrix(sizes, seed, sigma):
    """It is the slope of −½ ‖x̃x̃ᵀ − xxᵀ‖² over the sum of norms, without net force or torque; of the clean structure
    it sees the shape alone, and it turns with the noisy one.
    """
    generator = torch.Generator().manual_seed(seed)
    ptr = torch.tensor([0, *sizes]).cumsum(0)
    clean = 2 * torch.randn(sum(sizes), 3, generator=generator, dtype=torch.float64)
    noisy = clean + sigma * torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    found = force(noisy, clean, ptr)
    matrix, shift = -turn(seed), torch.tensor([5.0, -1, 2], dtype=torch.float64)
    tolerance = {"rtol": 1e-7, "atol": 1e-7 * max(1.0, sigma)}
    torch.testing.assert_close(force(noisy, clean @ matrix.T + shift, ptr), found, **tolerance)
    torch.testing.assert_close(force(noisy @ matrix.T + shift, clean, ptr), found @ matrix.T, **tolerance)
    for first, last in zip(ptr, ptr[1:], strict=False):
        x, own = noisy[first:last].clone().requires_grad_(), clean[first:last] - clean[first:last].mean(0)
        centred = x - x.mean(0)
        misfit = (centred @ centred.T - own @ own.T).square().sum() / 2
        (slope,) = torch.autograd.grad(misfit, x)
        norms = (centred.T @ centred).norm() + (own.T @ centred).norm()
        expected = torch.zeros_like(slope) if last - first == 1 else -slope / norms.detach()
        torch.testing.assert_close(found[first:last], expected, **tolerance)
        torch.testing.assert_close(found[first:last].sum(0), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-6)
        torque = torch.linalg.cross(centred.detach(), found[first:last]).sum(0)
        torch.testing.assert_close(torque, torch.zeros_like(torque), rtol=0, atol=1e-5 * max(1.0, sigma**2))


def test_one_langevin_step_is_gaussian_noise():
    batch = molecules()
    noise = noise_of(batch)
    for steps in (1, 3):
        objective = build("emgp", steps=steps).objectives["emgp"]
        noisy, level, target = objective.noisy(batch, Given(noise))
        sigma = 10.0 * 0.001 ** (level.double() / 49)
        plain = batch.positions + sigma[batch.molecule, None] * noise
        assert torch.allclose(noisy, plain, atol=1e-12) == (steps == 1)
        expected = energy.force(noisy, batch.positions, batch) / sigma[batch.molecule, None]
        torch.testing.assert_close(target, expected, rtol=1e-9, atol=1e-9)


def test_noise_levels():
    levels, count = NoiseLevels(), 20_000
    batch = MoleculeBatch([""] * count, torch.arange(count), torch.zeros(0).long(), torch.zeros(0, 3).double(), None)
    level, sigma = levels.draw("x", batch, Keyed(0, 0))
    frequency = level.bincount(minlength=50) / count
    assert len(frequency) == 50 and 0.014 < frequency.min() and frequency.max() < 0.026
    torch.testing.assert_close(sigma, 10.0 * 0.001 ** (level.double() / 49), rtol=1e-12, atol=0)


@given(st.lists(st.integers(0, 6), max_size=5))
def test_pairs_are_all_of_a_molecule_once(sizes):
    ptr = torch.tensor([0, *sizes]).cumsum(0)
    expected = [pair for a, b in zip(ptr, ptr[1:], strict=False) for pair in combinations(range(int(a), int(b)), 2)]
    assert pairs(ptr).T.tolist() == [list(pair) for pair in expected]


def test_a_pair_has_one_noise_and_each_direction_its_own():
    batch = molecules()
    objective, pair = build("se3_ddm").objectives["se3_ddm"], pairs(batch.ptr)
    forth, back = (objective.drawn(direction, batch, pair, Keyed(0, 0)) for direction in ("forth", "back"))
    assert len(set(forth[0].tolist())) == pair.shape[1]
    assert not set(forth[0].tolist()) & set(back[0].tolist())
    assert not torch.equal(forth[1], back[1])


def test_others_see_the_clean_structure_where_there_are_two():
    batch = molecules()
    for name in DENOISING:
        model = build(name).corrupted(batch, Keyed(0, 0))
        assert isinstance(model, Pass)
        assert torch.equal(model.positions, batch.positions) == (name in ("se3_ddm", "emgp"))
