"""The SpecFormer: its patches, its attention by explicit recursion, and molecules that lack spectra."""

import copy
import math

import pytest
import torch

from mspt.chemistry.spectra import GRIDS, SPECTRA
from mspt.models.specformer import SpecFormer, SpecFormerSettings, TokenBatchNorm

SMALL = {"layers": 3, "channels": 8, "heads": 2, "feed_forward": 12}
COARSE = {name: {"length": grid.length // 4, "stride": grid.length // 8} for name, grid in GRIDS.items()}


def build(norm="layer", width=6, patches=COARSE):
    torch.manual_seed(0)
    return SpecFormer(SpecFormerSettings(**SMALL, norm=norm, patches=patches), width).double()


def spectra(m=4):
    """Random spectra of m molecules; the first has all three, the last has none."""
    torch.manual_seed(1)
    values = {name: 10 * torch.rand(m, grid.length, dtype=torch.float64) for name, grid in GRIDS.items()}
    present = {name: torch.arange(m) + index < m - 1 for index, name in enumerate(SPECTRA)}
    for name in SPECTRA:
        present[name][0] = True
    return values, present


def test_published_patch_counts():
    counts = SpecFormer(SpecFormerSettings(), 4).patch_counts
    assert counts == {"uv_vis": 69, "ir": 139, "raman": 139}
    assert sum(counts.values()) == 347


def test_patches_are_windows_of_the_transformed_spectrum():
    values, _ = spectra(2)
    patches = SpecFormer(SpecFormerSettings(), 4).patches(values)
    for name, length, stride in (("uv_vis", 20, 10), ("ir", 50, 25), ("raman", 50, 25)):
        for k in (0, 1, 17, patches[name].shape[1] - 1):
            expected = torch.log10(1 + values[name][:, k * stride : k * stride + length])
            torch.testing.assert_close(patches[name][:, k], expected)
        assert patches[name].shape[2] == length


def test_hidden_points_are_those_of_masked_patches():
    model = SpecFormer(SpecFormerSettings(), 4)
    torch.manual_seed(0)
    masked = torch.rand(2, 69) < 0.1
    hidden = model.hidden_points("uv_vis", masked)
    for row, flags in zip(masked, hidden, strict=True):
        points = {10 * k + p for k in row.nonzero()[:, 0].tolist() for p in range(20)}
        assert flags.tolist() == [[10 * k + p in points for p in range(20)] for k in range(69)]


def by_recursion(model, patches, present):
    """One molecule after the other, only its own tokens, with explicit scores S_l = Q_l K_lᵀ/√D + S_{l−1}."""
    heads, readouts, all_tokens = model.settings.heads, [], []
    positions = dict(zip(SPECTRA, model.positions.split(list(model.patch_counts.values())), strict=True))
    for i in range(len(present["ir"])):
        names = [name for name in SPECTRA if present[name][i]]
        if not names:
            readouts.append(torch.zeros(model.readout.out_features, dtype=torch.float64))
            all_tokens.append({})
            continue
        x = torch.cat([model.embed[name](patches[name][i]) + positions[name] for name in names])
        score = 0.0
        for layer in model.layers:
            q, k, v = (part.unflatten(1, (heads, -1)).transpose(0, 1) for part in layer.qkv(x).unbind(1))
            score = q @ k.mT / math.sqrt(q.shape[-1]) + score
            attended = (score.softmax(-1) @ v).transpose(0, 1).flatten(1)
            x = torch.nn.functional.layer_norm(
                x + layer.out(attended), x.shape[1:], layer.attention_norm.weight, layer.attention_norm.bias
            )
            up = layer.up(x)
            gelu = up * 0.5 * (1 + torch.erf(up / math.sqrt(2)))
            x = torch.nn.functional.layer_norm(
                x + layer.down(gelu), x.shape[1:], layer.feed_norm.weight, layer.feed_norm.bias
            )
        tokens = dict(zip(names, x.split([model.patch_counts[name] for name in names]), strict=True))
        all_tokens.append(tokens)
        channels = x.shape[1]
        flat = [tokens.get(name, torch.zeros(model.patch_counts[name], channels).double()) for name in SPECTRA]
        readouts.append(model.readout_norm(model.readout(torch.cat(flat).flatten())))
    return all_tokens, torch.stack(readouts)


def test_forward_is_the_explicit_recursion():
    model, (values, present) = build(), spectra()
    patches = model.patches(values)
    tokens, readout = model(patches, present)
    expected_tokens, expected_readout = by_recursion(model, patches, present)
    torch.testing.assert_close(readout, expected_readout, rtol=1e-10, atol=1e-10)
    for i, own in enumerate(expected_tokens):
        for name in SPECTRA:
            expected = own.get(name, torch.zeros_like(tokens[name][i]))
            torch.testing.assert_close(tokens[name][i], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_what_an_absent_spectrum_holds_changes_nothing(norm):
    """Not outputs, not gradients, and nothing flows back to it, even where it holds NaN."""
    values, present = spectra()
    results = []
    for filler in (0.0, 7.0, math.nan):
        model = build(norm)
        patches = {
            name: torch.where(present[name][:, None, None], patch, filler).requires_grad_()
            for name, patch in model.patches(values).items()
        }
        tokens, readout = model(patches, present)
        (readout.square().sum() + sum(token.square().sum() for token in tokens.values())).backward()
        for name in SPECTRA:
            assert (patches[name].grad[~present[name]] == 0).all()
            assert (tokens[name][~present[name]] == 0).all()
        results.append([readout, *tokens.values(), *[p.grad for p in model.parameters() if p.grad is not None]])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)


def test_a_molecule_does_not_see_its_batch():
    model, (values, present) = build(), spectra()
    patches = model.patches(values)
    _, readout = model(patches, present)
    for i in range(len(readout)):
        own = slice(i, i + 1)
        alone = model({n: p[own] for n, p in patches.items()}, {n: p[own] for n, p in present.items()})
        torch.testing.assert_close(alone[1][0], readout[i], rtol=1e-10, atol=1e-10)


def test_spectra_see_each_other():
    """Tokens of one spectrum depend on the others: one transformer over all of them."""
    model, (values, present) = build(), spectra()
    before = model(model.patches(values), present)[0]["uv_vis"][0]
    values["raman"][0] += 1
    after = model(model.patches(values), present)[0]["uv_vis"][0]
    assert (before - after).abs().max() > 1e-6


def test_no_spectra_at_all():
    """Readouts of exact zeros; every parameter that the outputs pass through has a gradient of zeros."""
    model, (values, present) = build(), spectra()
    nothing = {name: torch.zeros_like(flags) for name, flags in present.items()}
    _, readout = model(model.patches(values), nothing)
    assert (readout == 0).all()
    readout.sum().backward()
    assert all((p.grad == 0).all() for name, p in model.named_parameters() if not name.startswith("predict"))


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_no_molecules(norm):
    model, (values, present) = build(norm), spectra()
    empty = model.patches({name: value[:0] for name, value in values.items()})
    tokens, readout = model(empty, {name: flags[:0] for name, flags in present.items()})
    assert readout.shape == (0, 6)
    outputs = [readout, *model.reconstruct(tokens).values()]
    sum(output.sum() for output in outputs).backward()
    assert all((parameter.grad == 0).all() for parameter in model.parameters())


def test_reconstruction_is_one_linear_map_a_spectrum():
    model, (values, present) = build(), spectra()
    patches = model.patches(values)
    tokens, _ = model(patches, present)
    for name, predicted in model.reconstruct(tokens).items():
        expected = tokens[name] @ model.predict[name].weight.T + model.predict[name].bias
        torch.testing.assert_close(predicted, expected)
        assert predicted.shape == patches[name].shape


def test_batch_norm_counts_the_tokens_that_are_there():
    torch.manual_seed(0)
    norm, x = TokenBatchNorm(5).double(), torch.randn(3, 4, 5, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 1, 1]], dtype=torch.bool)
    rows = x[mask]
    expected = (rows - rows.mean(0)) / (rows.var(0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(norm(x, mask)[mask], expected)
    assert (norm(x, mask)[~mask] == 0).all()


def test_low_precision_weights():
    model, (values, present) = build().to(torch.bfloat16), spectra()
    patches = {name: patch.float() for name, patch in model.patches(values).items()}
    tokens, readout = model(patches, present)
    exact_tokens, exact = copy.deepcopy(model).double()(model.patches(values), present)
    assert readout.dtype == torch.bfloat16
    assert (readout.double() - exact).norm() < 0.05 * exact.norm()
    for name in SPECTRA:
        assert (tokens[name].double() - exact_tokens[name]).norm() < 0.05 * exact_tokens[name].norm()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"heads": 3}, "channels \\(8\\) must be even and a multiple of heads \\(3\\)"),
        ({"patches": {"ir": {"length": 50, "stride": 25}}}, "patches lacks uv_vis"),
        ({"patches": COARSE | {"uv_vis": {"length": 702, "stride": 1}}}, "patches.uv_vis.length is longer than"),
    ],
)
def test_settings_that_do_not_fit(change, expected):
    with pytest.raises(ValueError, match=expected):
        SpecFormerSettings(**(SMALL | change))


def test_attention_is_that_of_the_forward_pass():
    """Of every layer: the weights times the values of its tokens are what the layer attends to."""
    model, (values, present) = build(), spectra()
    patches, seen = model.patches(values), []
    for layer in model.layers:
        layer.out.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        layer.qkv.register_forward_hook(lambda _, inputs, output: seen.append(output))
    model(patches, present)
    expected = list(zip(seen[::2], seen[1::2], strict=True))
    for weights, (qkv, attended) in zip(model.attention(patches, present), expected, strict=True):
        heads = qkv[:, :, 2].unflatten(2, (model.settings.heads, -1))
        result = torch.einsum("mhts,mshd->mthd", weights, heads).flatten(2)
        torch.testing.assert_close(result, attended, rtol=1e-9, atol=1e-12)


def test_centres_are_the_middles_of_the_patches():
    centres = SpecFormer(SpecFormerSettings(), 4).centres("ir")
    assert centres[[0, 1, -1]].tolist() == [524.5, 549.5, 500 + 138 * 25 + 24.5]
