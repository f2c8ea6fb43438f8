"""What every 3D encoder must hold to. A test class derives from EncoderContract and says which settings."""

import copy
from itertools import pairwise

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from mspt.models import encoders

SIZES = (5, 1, 3, 7)


def molecules(sizes=SIZES, seed=0):
    """numbers, positions (float64; no two atoms of a molecule closer than 0.8 Å) and ptr of random molecules."""
    generator = torch.Generator().manual_seed(seed)
    positions = []
    for size in sizes:
        placed = torch.zeros(0, 3, dtype=torch.float64)
        while len(placed) < size:
            new = 1.6 * torch.randn(1, 3, dtype=torch.float64, generator=generator)
            if not len(placed) or torch.cdist(new, placed).min() > 0.8:
                placed = torch.cat([placed, new])
        positions.append(placed)
    numbers = torch.randint(1, 10, (sum(sizes),), generator=generator)
    ptr = torch.tensor([0, *sizes]).cumsum(0)
    return numbers, torch.cat([torch.zeros(0, 3, dtype=torch.float64), *positions]), ptr


class EncoderContract:
    """settings: of a small encoder whose energy surface is smooth. mirror: whether it takes mirror images for equal."""

    settings = None
    mirror = True

    def build(self, dtype=torch.float64):
        """The encoder with every parameter moved off its initial value, so that no bias is zero."""
        torch.manual_seed(0)
        encoder = encoders.build(self.settings)
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        return encoder.to(dtype)

    def energies(self, encoder, numbers, positions, ptr):
        """A smooth number for each molecule that every output channel takes part in: [m]."""
        scalars, vectors = encoder(numbers, positions, ptr)
        per_atom = scalars @ torch.linspace(-1, 1, scalars.shape[1], dtype=scalars.dtype)
        if vectors is not None:
            per_atom = per_atom + 0.1 * vectors.square().sum((1, 2))
        molecule = torch.repeat_interleave(torch.arange(len(ptr) - 1), ptr[1:] - ptr[:-1])
        return per_atom.new_zeros(len(ptr) - 1).index_add(0, molecule, per_atom)

    def compare(self, result, expected, tolerance=1e-10):
        for one, other in zip(result, expected, strict=True):
            if other is None:
                assert one is None
            else:
                torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)

    def test_shapes(self):
        numbers, positions, ptr = molecules()
        scalars, vectors = self.build()(numbers, positions, ptr)
        assert scalars.shape == (len(numbers), self.settings.channels)
        assert vectors is None or vectors.shape == (len(numbers), 3, self.settings.channels)

    @pytest.mark.parametrize("reflect", [False, True])
    def test_rotation_and_reflection(self, reflect):
        if reflect and not self.mirror:
            pytest.skip("tells mirror images apart")
        numbers, positions, ptr = molecules()
        torch.manual_seed(2)
        turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
        if (torch.linalg.det(turn) < 0) != reflect:
            turn = -turn
        encoder = self.build()
        scalars, vectors = encoder(numbers, positions, ptr)
        turned = None if vectors is None else turn @ vectors
        self.compare(encoder(numbers, positions @ turn.T, ptr), (scalars, turned))

    def test_translation(self):
        numbers, positions, ptr = molecules()
        encoder = self.build()
        moved = positions + torch.tensor([3.0, -20.0, 0.1], dtype=torch.float64)
        self.compare(encoder(numbers, moved, ptr), encoder(numbers, positions, ptr))

    def test_permutation(self):
        numbers, positions, ptr = molecules()
        torch.manual_seed(0)
        order = torch.cat([first + torch.randperm(last - first) for first, last in pairwise(ptr.tolist())])
        encoder = self.build()
        scalars, vectors = encoder(numbers, positions, ptr)
        expected = scalars[order], None if vectors is None else vectors[order]
        self.compare(encoder(numbers[order], positions[order], ptr), expected)

    def test_a_molecule_does_not_see_its_batch(self):
        numbers, positions, ptr = molecules()
        encoder = self.build()
        scalars, vectors = encoder(numbers, positions, ptr)
        for first, last in pairwise(ptr.tolist()):
            own = slice(first, last)
            alone = encoder(numbers[own], positions[own], torch.tensor([0, last - first]))
            self.compare(alone, (scalars[own], None if vectors is None else vectors[own]))

    def test_inputs_need_not_be_contiguous(self):
        numbers, positions, ptr = molecules()
        encoder = self.build()
        strided = positions.T.contiguous().T
        assert not strided.is_contiguous()
        self.compare(encoder(numbers, strided, ptr), encoder(numbers, positions, ptr))

    def test_gradients(self):
        """Energies against float64 finite differences, and forces against those of their own gradients."""
        numbers, positions, ptr = molecules((3, 1, 2))
        encoder = self.build()

        def function(positions):
            return self.energies(encoder, numbers, positions, ptr)

        assert gradcheck(function, (positions.requires_grad_(),), rtol=1e-4, atol=1e-6)
        assert gradgradcheck(function, (positions,), rtol=1e-4, atol=1e-5)

    def test_forces_train_every_parameter(self):
        """The gradient of a force loss to the parameters against a finite difference along a random direction."""
        numbers, positions, ptr = molecules((4, 2))
        encoder = self.build()
        torch.manual_seed(1)
        directions = [torch.randn_like(parameter) for parameter in encoder.parameters()]
        targets = torch.randn_like(positions)

        def loss(step, create_graph):
            moved = copy.deepcopy(encoder)
            with torch.no_grad():
                for parameter, direction in zip(moved.parameters(), directions, strict=True):
                    parameter += step * direction
            leaf = positions.clone().requires_grad_()
            energy = self.energies(moved, numbers, leaf, ptr).sum()
            force = torch.autograd.grad(energy, leaf, create_graph=create_graph)[0]
            return (force - targets).square().sum(), moved

        total, moved = loss(0.0, create_graph=True)
        gradients = torch.autograd.grad(total, list(moved.parameters()), allow_unused=True)
        slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True) if g is not None)
        step = 1e-6
        difference = (loss(step, False)[0] - loss(-step, False)[0]) / (2 * step)
        torch.testing.assert_close(slope, difference, rtol=1e-4, atol=1e-6)

    def test_smooth_at_the_cut_off(self):
        """Neither energy nor force jumps as a third atom comes within the cut-off of one of two others."""
        encoder = self.build()
        numbers, ptr, step = torch.tensor([6, 8, 1]), torch.tensor([0, 3]), 1e-7

        def at(distance):
            positions = torch.tensor([[0, 0, 0], [0, 1.2, 0], [distance, 0, 0]], dtype=torch.float64)
            positions.requires_grad_()
            energy = self.energies(encoder, numbers, positions, ptr).sum()
            return energy.detach(), torch.autograd.grad(energy, positions)[0]

        inside, outside = at(self.settings.cutoff - step), at(self.settings.cutoff + step)
        torch.testing.assert_close(inside[0], outside[0], rtol=0, atol=1e-8)
        torch.testing.assert_close(inside[1], outside[1], rtol=0, atol=1e-4)

    def test_no_molecules(self):
        """An empty micro-batch: empty outputs, and a gradient of zeros for every parameter."""
        encoder = self.build(torch.float32)
        for ptr in (torch.zeros(1, dtype=torch.long), torch.zeros(3, dtype=torch.long)):
            encoder.zero_grad(set_to_none=True)
            outputs = encoder(torch.zeros(0, dtype=torch.long), torch.zeros(0, 3), ptr)
            assert all(len(output) == 0 for output in outputs if output is not None)
            sum(output.sum() for output in outputs if output is not None).backward()
            assert all((parameter.grad == 0).all() for parameter in encoder.parameters())

    def test_single_and_lonely_atoms(self):
        """One atom, and two atoms out of each other's reach, give the same finite features and no force."""
        encoder = self.build()
        far = torch.tensor([[0, 0, 0], [0, 100.0, 0]], dtype=torch.float64, requires_grad=True)
        numbers = torch.tensor([6, 6])
        scalars, _ = outputs = encoder(numbers, far, torch.tensor([0, 2]))
        assert torch.isfinite(scalars).all()
        self.compare(outputs, encoder(numbers, far, torch.tensor([0, 1, 2])))
        force = torch.autograd.grad(self.energies(encoder, numbers, far, torch.tensor([0, 2])).sum(), far)[0]
        assert (force == 0).all()

    def test_atoms_in_one_place_stay_finite(self):
        encoder = self.build()
        positions = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
        energy = self.energies(encoder, torch.tensor([1, 6]), positions, torch.tensor([0, 2])).sum()
        energy.backward()
        assert torch.isfinite(energy)
        assert torch.isfinite(positions.grad).all()

    def test_single_precision(self):
        """float32 against float64: outputs and forces of molecules that fill space."""
        numbers, positions, ptr = molecules((5, 1, 7))
        results = []
        for encoder in (self.build(torch.float32), self.build(torch.float32).double()):
            leaf = positions.to(next(encoder.parameters()).dtype).requires_grad_()
            outputs = encoder(numbers, leaf, ptr)
            force = torch.autograd.grad(self.energies(encoder, numbers, leaf, ptr).sum(), leaf)[0]
            results.append([output for output in (*outputs, force) if output is not None])
        for result, expected in zip(*results, strict=True):
            assert result.dtype == torch.float32
            assert (result.double() - expected).norm() < 1e-5 * expected.norm()

    def test_low_precision_weights(self):
        """bfloat16 weights and features, float32 positions: close to the same weights in float64.

        For molecules that fill space: a norm that whitens vectors turns rounding off the plane of a flat one into
        noise as large as the vectors.
        """
        numbers, positions, ptr = molecules((5, 1, 7))
        low = self.build(torch.bfloat16)
        exact = copy.deepcopy(low).double()(numbers, positions, ptr)
        for result, expected in zip(low(numbers, positions.float(), ptr), exact, strict=True):
            if expected is not None:
                assert result.dtype == torch.bfloat16
                assert (result.double() - expected).norm() < 0.1 * expected.norm()
