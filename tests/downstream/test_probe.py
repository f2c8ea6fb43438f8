"""The probe's regression against least squares, and the command on targets whose answer is known."""

import dataclasses
import json

import numpy as np
import pytest

from mspt import cli
from mspt.data.shardset import ShardSet
from mspt.data.zarr_set import ZarrSet
from mspt.downstream.probe import PENALTIES, ridge
from tests.downstream.test_embed import by_hand, encoder  # noqa: F401
from tests.end_to_end.runs import SHARDS


def linear(m, channels, noise, seed=0):
    """x [m, F] of very different scales, one column constant, and y [m] that is linear in it but for noise."""
    rng = np.random.default_rng(seed)
    x = rng.normal(5, 1, (m, channels)) * 10.0 ** rng.uniform(-3, 3, channels)
    x[:, 0] = 7
    y = (x / x.std(0).clip(1e-9)) @ np.r_[0, rng.normal(size=channels - 1)] + 100
    return x, y + noise * rng.normal(size=m)


@pytest.mark.parametrize(("m", "channels"), [(300, 12), (20, 40)])
@pytest.mark.parametrize("penalty", [1e-6, 1.0])
def test_ridge_is_least_squares_of_augmented_data(m, channels, penalty):
    """Rows √penalty · 1 with y = 0 below features of unit variance, the intercept left alone."""
    x, y = linear(m, channels, noise=0.5)
    found = ridge(x, y, [penalty])
    scaled = (x - x.mean(0)) / np.where(x.std(0) > 1e-9, x.std(0), 1)
    below = np.sqrt(penalty * m) * np.eye(channels)
    solution = np.linalg.lstsq(np.vstack([scaled, below]), np.r_[y - y.mean(), np.zeros(channels)], rcond=None)[0]
    np.testing.assert_allclose(x @ found.weights + found.intercept, scaled @ solution + y.mean(), rtol=1e-7)
    assert found.penalty == penalty


@pytest.mark.parametrize("noise", [0.01, 3.0])
def test_the_penalty_is_the_one_of_least_cross_validation(noise):
    """Against the hat matrix written out: |(1 − H) y|² / trace(1 − H)²."""
    x, y = linear(60, 30, noise)
    scaled = (x - x.mean(0)) / np.where(x.std(0) > 1e-9, x.std(0), 1)
    errors = []
    for penalty in PENALTIES:
        inside = np.linalg.inv(scaled.T @ scaled + penalty * 60 * np.eye(30))
        left = np.eye(60) - 1 / 60 - scaled @ inside @ scaled.T
        errors.append(np.square(left @ y).sum() / np.trace(left) ** 2)
    assert ridge(x, y).penalty == PENALTIES[np.argmin(errors)]


def test_little_noise_is_seen_through():
    x, y = linear(400, 12, noise=0.0)
    found = ridge(x[:300], y[:300])
    np.testing.assert_allclose(x[300:] @ found.weights + found.intercept, y[300:], rtol=1e-6)


@pytest.fixture(scope="module")
def planted(tmp_path_factory, encoder):  # noqa: F811
    """Zarr twins to fit on and to test on: `linear`, in eV, is linear in the sums of the encoder's scalars, and so is
    `energy`, to which `u0` adds energies of the atoms; `noise` has nothing to do with anything."""
    records = list(ShardSet.open(SHARDS).records(range(160)))
    vectors = np.stack([scalars.sum(0) for scalars in by_hand(encoder, records)]).astype(np.float64)
    rng = np.random.default_rng(0)
    values = vectors @ rng.normal(size=vectors.shape[1])
    made = []
    for record, value in zip(records, values, strict=True):
        atoms = sum({1: -16.5, 6: -1035.0, 7: -1488.0, 8: -2042.0, 9: -2713.0}[z] for z in record.numbers.tolist())
        targets = {"linear": float(value), "energy": float(value), "u0": float(value) + atoms}
        targets["noise"] = float(rng.normal())
        made.append(dataclasses.replace(record, targets=targets))
    # One label is missing.
    made[3].targets.pop("linear")
    folder = tmp_path_factory.mktemp("planted")
    for name, own in (("train", made[:120]), ("test", made[120:])):
        ZarrSet.write(folder / name, own, {"units": dict.fromkeys(("linear", "energy", "u0"), "eV")}, {})
    return folder


def probe(capsys, planted, *more):
    cli.main(["probe", "--train", str(planted / "train"), "--test", str(planted / "test"), *map(str, more)])
    return capsys.readouterr().out


def test_what_is_linear_is_read_off(capsys, planted, encoder):  # noqa: F811
    """In millielectronvolts; what is not there to be read comes out no better than the mean.

    The encoder itself has the random weights of seed 0.
    """
    said = json.loads(probe(capsys, planted, "--encoder", encoder, "--targets", "linear,noise", "--seed", 1, "--json"))
    linear, noise = said["targets"].values()
    assert linear["unit"] == "meV"
    assert linear["labels"] == 119 and noise["labels"] == 120 and linear["tested"] == 40
    assert linear["mae"] < 0.01 * linear["mae_mean"]
    assert linear["mae"] < 0.2 * linear["mae_untrained"]
    assert noise["mae"] > 0.8 * noise["mae_mean"]


def test_energies_of_the_atoms_change_nothing(capsys, planted, encoder):  # noqa: F811
    """Thousands of electronvolts of them: errors in millielectronvolts stay what they are, the mean's too."""
    said = json.loads(probe(capsys, planted, "--encoder", encoder, "--targets", "energy,u0", "--json"))
    without, with_atoms = said["targets"].values()
    assert with_atoms["unit"] == "meV"
    for error in ("mae", "mae_untrained", "mae_mean"):
        assert with_atoms[error] == pytest.approx(without[error], rel=1e-6)


def test_stored_embeddings_give_the_same(capsys, tmp_path, planted, encoder):  # noqa: F811
    for name in ("train", "test"):
        out = tmp_path / name
        cli.main(["embed", "--encoder", str(encoder), "--data", str(planted / name), "--out", str(out)])
    capsys.readouterr()
    more = ["--targets", "linear", "--labels", 50, "--json"]
    one = json.loads(probe(capsys, planted, "--encoder", encoder, *more))
    other = json.loads(probe(capsys, planted, "--embeddings", tmp_path / "train", tmp_path / "test", *more))
    assert one["targets"]["linear"]["labels"] == 50
    assert one["targets"] == other["targets"]
    said = refusal(capsys, planted, "--embeddings", tmp_path / "test", tmp_path / "train", *more)
    assert "is not of the molecules of" in said


def test_the_table(capsys, planted, encoder):  # noqa: F811
    head, row, *_ = probe(capsys, planted, "--encoder", encoder, "--targets", "linear").splitlines()
    assert head.split() == ["target", "unit", "labels", "tested", "MAE", "untrained", "mean"]
    assert row.split()[:4] == ["linear", "meV", "119", "40"]


def refusal(capsys, planted, *more):
    with pytest.raises(SystemExit) as ended:
        probe(capsys, planted, *more)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1, said
    return said


def test_what_is_refused(capsys, planted, encoder):  # noqa: F811
    said = refusal(capsys, planted, "--encoder", encoder, "--targets", "linear,lunar")
    assert "--targets lunar" in said and "it has energy, linear, noise, u0" in said
    same = ["--test", planted / "train"]
    assert "120 of its molecules are in --train too" in refusal(
        capsys, planted, *same, "--encoder", encoder, "--targets", "linear"
    )
    assert "give either --encoder" in refusal(capsys, planted, "--targets", "linear")
    assert "1 labels to fit" in refusal(capsys, planted, "--encoder", encoder, "--targets", "u0", "--labels", 1)
