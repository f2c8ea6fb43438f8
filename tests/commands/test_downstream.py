"""mspt retrieve, predict-spectrum and attention on a small run of the real command, against its own evaluation."""

import csv
import dataclasses
import json
import shutil

import matplotlib.image
import numpy as np
import pytest

from mspt import cli
from mspt.chemistry.spectra import GRIDS, LINE_SHAPES
from mspt.data.batch import MoleculeBatch
from mspt.data.shardset import ShardSet
from mspt.data.zarr_arrays import open_arrays
from mspt.downstream.spectra import KIND
from mspt.training import loading
from tests.data.molecules import plain, write_set
from tests.end_to_end.runs import SHARDS
from tests.end_to_end.runs import run as pretrain

COUNT = 60


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of two steps with contrast and predicted spectra, whose weights have a moving average."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    write_set(folder.parent / "set", ShardSet.open(SHARDS).records(range(COUNT)))
    sets = [f"data.{name}={folder.parent / 'set'}" for name in ("train", "heldout")]
    pretrain(folder, 1, 2, "engine.ema_decay=0.5", "objectives.spectrum_prediction={hidden: 8}", *sets)
    return folder


@pytest.fixture(scope="module")
def data(trained):
    """The set that it trained on and was evaluated on."""
    return trained.parent / "set"


def mspt(capsys, *arguments):
    cli.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1, said
    return said


def test_retrieval_is_what_the_run_measured(capsys, trained, data):
    heldout = json.loads((trained / "summary.json").read_text())["heldout"]
    head, *rows = mspt(capsys, "retrieve", trained, "--data", data).splitlines()
    assert head.split() == ["spectra", "queries", "pairs", "recall@1", "recall@5", "recall@10", "median", "rank"]
    for row, direction in zip(rows, ("molecule_to_spectrum", "spectrum_to_molecule"), strict=False):
        expected = [f"{heldout[f'recall_at_{k}_{direction}']:.1%}" for k in (1, 5, 10)]
        median = f"{heldout[f'median_rank_{direction}']:.0f}"
        assert row.split()[-5:] == ["60", *expected, median]
    assert len(rows) == 3 and rows[2].split()[1:] == ["chance", "60", "1.7%", "8.3%", "16.7%", "30"]


def test_answers_to_every_query(capsys, trained, data, tmp_path):
    """One direction, two subsets of spectra; the right one is in its place where it is among the first."""
    options = ["--queries", "molecule", "--spectra", "ir", "raman,ir", "--top", 4, "--out", tmp_path / "answers.csv"]
    said = mspt(capsys, "retrieve", trained, "--data", data, *options)
    assert "spectrum → molecule" not in said and "ir,raman" in said
    rows = list(csv.DictReader((tmp_path / "answers.csv").open()))
    assert len(rows) == 2 * COUNT * 4
    assert {row["spectra"] for row in rows} == {"ir", "ir,raman"}
    for row in rows:
        right = row["query"] == row["answer"]
        assert right == (row["match_rank"] == row["place"]) or row["match_rank"] <= "4"
    assert len({row["cosine"] for row in rows}) > 100


def measured(folder, number, name, factor):
    """A record's spectrum as a file of a user: a heading, every second point, heights of its own, falling abscissae."""
    one = next(ShardSet.open(SHARDS).records([number]))
    values = MoleculeBatch.from_records([one]).broadened(LINE_SHAPES).spectra[name][0].numpy()
    x = GRIDS[name].points().numpy()
    rows = np.c_[x, factor * values][::2][::-1]
    path = folder / f"{name}.csv"
    np.savetxt(path, rows, delimiter="; ", header="wavenumber; absorbance", comments="")
    return path


def test_the_scale_of_a_measured_spectrum_does_not_matter(capsys, trained, data, tmp_path):
    answers = []
    for factor in (1e-3, 50.0):
        path = measured(tmp_path, 7, "ir", factor)
        answers.append(mspt(capsys, "retrieve", trained, "--data", data, "--query", "ir", path, "--top", 5))
    assert answers[0] == answers[1]
    assert answers[0].split("\n")[0].split() == ["place", "key", "cosine", "formula", "SMILES"]
    assert len(answers[0].splitlines()) == 6
    ask = ("retrieve", trained, "--data", data, "--query", "ir", path, "--top", 5)
    mspt(capsys, *ask, "--out", tmp_path / "found.csv")
    rows = list(csv.DictReader((tmp_path / "found.csv").open()))
    assert [row["key"] for row in rows] == [line.split()[1] for line in answers[0].splitlines()[1:]]
    assert "leave them out beside --query" in refusal(capsys, *ask, "--spectra", "ir")
    assert "--query ir: ir is given twice" in refusal(capsys, *ask, "--query", "ir", path)
    assert "--calibrated is about" in refusal(capsys, "retrieve", trained, "--data", data, "--calibrated")
    calibrated = mspt(capsys, "retrieve", trained, "--data", data, "--query", "ir", path, "--top", 5, "--calibrated")
    assert calibrated != answers[0]


def test_queries_that_are_refused(capsys, trained, data, tmp_path):
    ask = ("retrieve", trained, "--data", data, "--query")
    assert "--query nmr: is no spectrum" in refusal(capsys, *ask, "nmr", tmp_path / "a.csv")
    assert "a.csv: cannot be read" in refusal(capsys, *ask, "ir", tmp_path / "a.csv")
    for text, expected in (
        ("600,1\n700,2\n", "cover 3% of the grid"),
        ("500,1\n4000,x\n", "line 2 is '4000,x' where two numbers are needed"),
        ("500,1,2\n4000,1,2\n", "line 1 has 3 columns"),
        ("x,y\n", "holds no two columns"),
        ("500,0\n4000,0\n", "no intensity above zero"),
    ):
        (tmp_path / "a.csv").write_text(text)
        assert expected in refusal(capsys, *ask, "ir", tmp_path / "a.csv")
    write_set(tmp_path / "bare", plain([3, 4, 5]))
    (tmp_path / "a.csv").write_text("500,1\n4000,1\n")
    bare = ("retrieve", trained, "--data", tmp_path / "bare")
    assert "--calibrated" in refusal(capsys, *bare, "--query", "ir", tmp_path / "a.csv")
    assert "--spectra uv_vis,ir,raman: no molecule of" in refusal(capsys, *bare)


def test_subsets_that_are_named_twice_count_once(capsys, trained, data):
    once, twice = (
        mspt(capsys, "retrieve", trained, "--data", data, "--spectra", *names) for names in (["ir"], ["ir"] * 2)
    )
    assert once == twice


def test_spectra_that_the_run_did_not_see(capsys, trained, data, tmp_path):
    """Their embeddings are those of an untrained network."""
    checkpoint = max((trained / "checkpoints").iterdir())
    copy = tmp_path / checkpoint.name
    shutil.copytree(checkpoint, copy)
    meta = json.loads((copy / "meta.json").read_text())
    meta["config"]["data"]["spectra"] = ["ir"]
    meta["config"]["data"]["on_bad_block"] = "skip"
    (copy / "meta.json").write_text(json.dumps(meta))
    assert loading.load(copy).data.on_bad_block == "error"  # answers are named by the numbers of records
    expected = "the run learnt from ir alone (data.spectra)"
    ask = ("retrieve", copy, "--data", data)
    path = measured(tmp_path, 7, "raman", 1.0)
    assert f"--query raman: {expected}" in refusal(capsys, *ask, "--query", "raman", path, "--calibrated")
    assert f"--spectra uv_vis,raman: {expected}" in refusal(capsys, *ask, "--spectra", "uv_vis,raman")
    assert "ir" in mspt(capsys, *ask)


def test_predicted_spectra(capsys, trained, data, tmp_path):
    """Scores are those of the stored spectra; the training set's baselines come from the run's configuration."""
    out, figure = tmp_path / "out.zarr", tmp_path / "figure.png"
    said = mspt(capsys, "predict-spectrum", trained, "--data", data, "--out", out, "--figure", figure)
    assert said.splitlines()[0].split() == ["spectrum", "molecules", "by", "cosine", "Pearson", "SIS"]
    attributes, arrays = open_arrays(out, KIND)
    assert attributes["records"] == attributes["scores"]["ir"]["molecules"] == COUNT
    records = list(ShardSet.open(SHARDS).records(range(20)))
    true = MoleculeBatch.from_records(records).broadened(LINE_SHAPES).spectra["ir"].double().numpy()
    predicted = arrays["spectra/ir"][:20].astype(float)
    assert (predicted >= 0).all() and predicted.shape == (20, 3501)
    expected = (true * predicted).sum(1) / np.linalg.norm(true, axis=1) / np.linalg.norm(predicted, axis=1)
    np.testing.assert_allclose(arrays["scores/ir/cosine"][:20], expected, rtol=1e-5)
    mean = attributes["scores"]["ir"]["mean"]["cosine"]
    assert f"{mean:.3f}" in said.splitlines()[6] and 0.2 < mean < 0.7
    # After two steps from the mean it is close to it.
    assert abs(attributes["scores"]["ir"]["model"]["cosine"] - mean) < 0.1
    assert matplotlib.image.imread(figure).shape[1] == 1650


def test_a_picture_of_molecules_without_one_spectrum(capsys, trained, tmp_path):
    """The best, the middling and the worst by the spectra that they have."""
    some = [dataclasses.replace(r, spectra={"ir": r.spectra["ir"]}) for r in ShardSet.open(SHARDS).records(range(9))]
    write_set(tmp_path / "set", some)
    out, figure = tmp_path / "out.zarr", tmp_path / "figure.png"
    mspt(capsys, "predict-spectrum", trained, "--data", tmp_path / "set", "--out", out, "--figure", figure)
    assert matplotlib.image.imread(figure).shape[0] == pytest.approx(110 * (3 * 3.1 + 0.5), abs=2)


def test_attention(capsys, trained, data, tmp_path):
    out = tmp_path / "attention.png"
    rows = mspt(capsys, "attention", trained, "--data", data, "--record", 5, "--out", out).splitlines()
    assert rows[0].split() == ["layer", "attends", "to", "UV-Vis", "to", "IR", "to", "Raman"]
    for row in rows[1:-1]:
        shares = [float(cell.rstrip("%")) for cell in row.split()[-3:]]
        assert sum(shares) == pytest.approx(100, abs=0.2)
    assert matplotlib.image.imread(out).shape[0] == 726
    assert "the picture is a PNG" in refusal(
        capsys, "attention", trained, "--data", data, "--record", 5, "--out", tmp_path / "a.pdf"
    )


def test_runs_without_what_is_asked_for(capsys, trained, data, tmp_path):
    assert "no checkpoint" in refusal(capsys, "retrieve", tmp_path, "--data", data)
    write_set(tmp_path / "bare", plain([3, 4, 5]))
    said = refusal(
        capsys, "attention", trained, "--data", tmp_path / "bare", "--record", 0, "--out", tmp_path / "a.png"
    )
    assert "has no spectrum that the run attends to" in said
