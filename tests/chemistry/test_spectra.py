"""Grids and line shapes against explicit loops in float64."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mspt.chemistry import spectra
from mspt.chemistry.spectra import GRIDS, LINE_SHAPES, SPECTRA, Grid, LineShape, broaden
from mspt.data.opening import open_set, sequential
from mspt.data.packing import Budget
from tests.kernels.cpu_levels import LEVELS, threads

BUNDLED = Path(__file__).parents[2] / "shards/bundled/qm9-spectra/heldout"
LORENTZIAN = LineShape(shape="lorentzian", width=10.0)
GAUSSIAN = LineShape(shape="gaussian", width=10.0)
SMALL = Grid(unit="cm^-1", start=500.0, step=2.0, length=40)


def by_loop(positions, strengths, ptr, grid, line_shape, shift=None, width_scale=None):
    """The definition: sum over a molecule's lines of strength times profile, one point after the other."""
    result = torch.zeros(len(ptr) - 1, grid.length, dtype=torch.float64)
    for molecule in range(len(ptr) - 1):
        width = line_shape.width * (1.0 if width_scale is None else width_scale[molecule].item())
        moved = 0.0 if shift is None else shift[molecule].item()
        for line in range(ptr[molecule], ptr[molecule + 1]):
            for point in range(grid.length):
                distance = grid.start + grid.step * point - positions[line].item() - moved
                if line_shape.shape == "lorentzian":
                    profile = width / 2 / math.pi / (distance**2 + (width / 2) ** 2)
                else:
                    sigma = width / (2 * math.sqrt(2 * math.log(2)))
                    profile = math.exp(-(distance**2) / (2 * sigma**2))
                result[molecule, point] += strengths[line].item() * profile
    return result


def lines(counts, seed=0, dtype=torch.float64):
    """Random lines for molecules with so many each -> positions, strengths, ptr."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(counts)
    positions = 480 + 120 * torch.rand(total, generator=generator, dtype=torch.float64)
    strengths = 50 * torch.rand(total, generator=generator, dtype=torch.float64)
    ptr = torch.tensor([0, *counts]).cumsum(0)
    return positions.to(dtype), strengths.to(dtype), ptr


def test_grids():
    assert SPECTRA == ("uv_vis", "ir", "raman")
    for name, unit, length, first, last in (
        ("uv_vis", "eV", 701, 1.0, 15.0),
        ("ir", "cm^-1", 3501, 500.0, 4000.0),
        ("raman", "cm^-1", 3501, 500.0, 4000.0),
    ):
        points = GRIDS[name].points(dtype=torch.float64)
        assert (GRIDS[name].unit, len(points)) == (unit, length)
        assert points[0].item() == first
        assert points[-1].item() == pytest.approx(last, abs=1e-9)
        torch.testing.assert_close(points.diff(), torch.full_like(points[1:], GRIDS[name].step), rtol=0, atol=1e-9)
        assert GRIDS[name].points(dtype=torch.float32)[-1].item() == pytest.approx(last, rel=1e-6)


counts_of_lines = st.lists(st.integers(0, 5), max_size=6)


@settings(deadline=None, max_examples=25)
@given(counts_of_lines, st.sampled_from([LORENTZIAN, GAUSSIAN]), st.integers(0, 100), st.booleans())
def test_broadening_is_the_loop(counts, line_shape, seed, augmented):
    positions, strengths, ptr = lines(counts, seed)
    shift = width_scale = None
    if augmented:
        generator = torch.Generator().manual_seed(seed)
        shift = 20 * torch.rand(len(counts), generator=generator, dtype=torch.float64) - 10
        width_scale = 0.5 + torch.rand(len(counts), generator=generator, dtype=torch.float64)
    given_lines = (positions, strengths, ptr, SMALL, line_shape, shift, width_scale)
    torch.testing.assert_close(broaden(*given_lines), by_loop(*given_lines), rtol=1e-10, atol=1e-12)


@settings(deadline=None, max_examples=50)
@given(counts_of_lines, st.sampled_from([LORENTZIAN, GAUSSIAN]), st.integers(0, 100), st.booleans())
def test_float32_in_cpp_is_the_loop(counts, line_shape, seed, augmented):
    """Lines on the grid, at its ends and beyond them, some far."""
    generator = torch.Generator().manual_seed(seed)
    positions, strengths, ptr = lines(counts, seed, torch.float32)
    far = torch.randint(5, positions.shape, generator=generator)
    positions = torch.where(far == 3, 10 * (positions - 540) + 540, positions).round(decimals=1)
    positions = torch.where(far == 4, 1e25 * (positions - 540), positions)
    shift = width_scale = None
    if augmented:
        shift = 20 * torch.rand(len(counts), generator=generator) - 10
        width_scale = 0.2 + 3 * torch.rand(len(counts), generator=generator)
    found = broaden(positions, strengths, ptr, SMALL, line_shape, shift, width_scale)
    exact = by_loop(positions, strengths, ptr, SMALL, line_shape, shift, width_scale)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-5 * strengths.sum().item() + 1e-30)


@pytest.fixture(params=LEVELS)
def level(request, monkeypatch):
    """Runs the test with the C++ compiled for every instruction set that this CPU has."""
    monkeypatch.setenv("MSPT_CPU", request.param)
    spectra._library.cache_clear()
    yield
    spectra._library.cache_clear()


@pytest.mark.parametrize("name", SPECTRA)
def test_cpp_and_pytorch_agree(name, level):
    """On real molecules' lines, on the real grids, by any number of threads."""
    batch = next(iter(sequential(open_set(BUNDLED), Budget(molecules=20, atoms=8192))))
    given_lines = *batch.lines[name], GRIDS[name], LINE_SHAPES[name]
    assert spectra._library() is not None
    positions, strengths, ptr, *_ = given_lines

    def plain(dtype):
        widths = torch.full((20,), LINE_SHAPES[name].width, dtype=dtype)
        return spectra._broaden(
            positions.to(dtype), strengths.to(dtype), ptr, GRIDS[name], name == "uv_vis", None, widths
        )

    found = []
    for count in (1, 3):
        with threads(count):
            found.append(broaden(*given_lines))
    assert torch.equal(*found)
    exact = plain(torch.float64)
    assert (found[0].double() - exact).norm() < 1e-6 * exact.norm()
    torch.testing.assert_close(plain(torch.float32), found[0], rtol=1e-4, atol=1e-5 * float(exact.max()))


@pytest.mark.parametrize("line_shape", [LORENTZIAN, GAUSSIAN])
@pytest.mark.parametrize("wrong", [0, 1])
def test_what_is_not_a_number_stays_so(line_shape, wrong):
    given_lines = lines([2, 2], dtype=torch.float32)
    given_lines[wrong][1] = torch.nan
    spectrum = broaden(*given_lines, SMALL, line_shape)
    assert spectrum[0].isnan().all() and spectrum[1].isfinite().all()


@pytest.mark.parametrize("line_shape", [LORENTZIAN, GAUSSIAN])
def test_chunks_do_not_show(line_shape, monkeypatch):
    """A chunk of one molecule, of three, of all: the same."""
    positions, strengths, ptr = lines([3, 0, 7, 1, 2, 4, 0])
    whole = broaden(positions, strengths, ptr, SMALL, line_shape)
    for molecules in (1, 3):
        monkeypatch.setitem(spectra.CHUNK, "cpu", molecules * 7 * SMALL.length)
        torch.testing.assert_close(broaden(positions, strengths, ptr, SMALL, line_shape), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SPECTRA)
def test_float32_on_the_real_grids(name):
    grid, line_shape = GRIDS[name], LINE_SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    positions = grid.start + grid.step * grid.length * torch.rand(60, generator=generator, dtype=torch.float64)
    strengths, ptr = torch.rand(60, generator=generator, dtype=torch.float64), torch.tensor([0, 30, 60])
    exact = broaden(positions, strengths, ptr, grid, line_shape)
    single = broaden(positions.float(), strengths.float(), ptr, grid, line_shape)
    assert single.dtype == torch.float32
    assert single.shape == (2, grid.length)
    torch.testing.assert_close(single.double(), exact, rtol=1e-3, atol=1e-4 * exact.max().item())


def one_line(name, position, strength, **augmentation):
    grid = GRIDS[name]
    line = [torch.tensor([value], dtype=torch.float64) for value in (position, strength)]
    spectrum = broaden(*line, torch.tensor([0, 1]), grid, LINE_SHAPES[name], **augmentation)[0]
    return grid.points(dtype=torch.float64), spectrum


def width_at_half_maximum(x, y):
    above = x[y >= y.max() / 2]
    return (above[-1] - above[0]).item()


@pytest.mark.parametrize("name", ["ir", "raman"])
def test_a_lorentzian_band_has_its_strength_as_area(name):
    x, y = one_line(name, 2250.0, 80.0)
    # The tails beyond the grid hold 2/π · arctan(γ/2 / 1750) of it, γ/2 = 5 cm^-1: 0.18 %.
    assert torch.trapezoid(y, x).item() == pytest.approx(80.0 * (1 - 2 / math.pi * math.atan(5 / 1750)), rel=1e-4)
    assert x[y.argmax()].item() == 2250.0
    assert width_at_half_maximum(x, y) == pytest.approx(10.0, abs=1.01)


def test_a_gaussian_band_has_its_strength_as_height():
    x, y = one_line("uv_vis", 7.0, 0.6)
    assert y.max().item() == pytest.approx(0.6, rel=1e-9)
    assert x[y.argmax()].item() == pytest.approx(7.0)
    assert width_at_half_maximum(x, y) == pytest.approx(0.2 * math.sqrt(8 * math.log(2)), abs=0.041)
    one_sigma = (x - 7.2).abs().argmin()
    assert y[one_sigma].item() == pytest.approx(0.6 * math.exp(-0.5), rel=1e-6)


@pytest.mark.parametrize(("name", "position", "moved"), [("ir", 1000.0, 25.0), ("uv_vis", 6.0, 0.5)])
def test_shift_moves_a_band_and_width_scale_widens_it(name, position, moved):
    x, plain = one_line(name, position, 1.0)
    shift, scale = torch.tensor([moved], dtype=torch.float64), torch.tensor([2.0], dtype=torch.float64)
    _, shifted = one_line(name, position, 1.0, shift=shift)
    assert x[shifted.argmax()].item() == pytest.approx(position + moved)
    points = round(moved / GRIDS[name].step)
    torch.testing.assert_close(shifted[points:], plain[:-points], rtol=1e-6, atol=1e-12)
    _, wide = one_line(name, position, 1.0, width_scale=scale)
    assert width_at_half_maximum(x, wide) == pytest.approx(2 * width_at_half_maximum(x, plain), rel=0.1)


def test_a_molecule_is_the_same_in_any_company():
    positions, strengths, ptr = lines([4, 0, 2])
    together = broaden(positions, strengths, ptr, SMALL, LORENTZIAN)
    alone = broaden(positions[4:], strengths[4:], torch.tensor([0, 2]), SMALL, LORENTZIAN)
    torch.testing.assert_close(together[2:], alone, rtol=1e-12, atol=0)


def test_no_lines_and_no_molecules():
    nothing, ptr = torch.zeros(0), torch.zeros(4, dtype=torch.int64)
    empty = broaden(nothing, nothing, ptr, SMALL, LORENTZIAN)
    assert empty.shape == (3, SMALL.length)
    assert not empty.any()
    assert broaden(nothing, nothing, ptr[:1], SMALL, GAUSSIAN).shape == (0, SMALL.length)
    positions, strengths, ptr = lines([0, 2, 0])
    spectrum = broaden(positions, strengths, ptr, SMALL, GAUSSIAN)
    assert not spectrum[[0, 2]].any()
    assert spectrum[1].any()


def test_no_gradient_is_kept():
    positions, strengths, ptr = lines([2])
    assert not broaden(positions, strengths.requires_grad_(), ptr, SMALL, LORENTZIAN).requires_grad


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("line_shape", [LORENTZIAN, GAUSSIAN])
def test_cuda_gives_what_the_cpu_gives(line_shape):
    positions, strengths, ptr = lines([3, 0, 5])
    on_device = broaden(positions.cuda(), strengths.cuda(), ptr.cuda(), SMALL, line_shape)
    torch.testing.assert_close(on_device.cpu(), broaden(positions, strengths, ptr, SMALL, line_shape))
