"""The command line: what a user can fix is said in one line, with exit code 2 and without a traceback."""

import json
import os
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from mspt import cli, kernels
from mspt.errors import UserError
from mspt.models import encoders
from mspt.training import interruption
from shards import cli as shards
from tests.end_to_end.runs import ROOT, SHARDS, command, environment, run

CONFIG = str(ROOT / "configs" / "quickstart.yaml")


def refusal(capsys, main, arguments):
    """Run a main() that must refuse -> the one line that it says."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.count("\n") == 1, said
    return said


def test_full_disk(capsys, monkeypatch):
    """Said in one line, wherever it is met; other errors of the system are not taken for it."""
    met = []

    def meet(options):
        raise OSError(*met)

    monkeypatch.setattr(cli, "doctor", meet)
    met[:] = 28, "No space left on device", "runs/a/metrics.jsonl"
    said = refusal(capsys, cli.main, ["doctor"])
    assert "runs/a/metrics.jsonl: No space left on device; make room" in said
    met[:] = 5, "Input/output error"
    with pytest.raises(OSError, match="Input/output"):
        cli.main(["doctor"])


def test_the_rank_that_ends_first_says_how(monkeypatch, tmp_path):
    """To launch/job.sh: the ranks that SLURM kills for its sake must not be taken for the reason."""

    def end(options):
        raise errors.pop()

    file, errors = tmp_path / "ended", [UserError("wrong"), interruption.Preempted("saved")]
    monkeypatch.setenv("MSPT_ENDED", str(file))
    monkeypatch.setattr(cli, "doctor", end)
    for code in 75, 2:
        with pytest.raises(SystemExit) as ended:
            cli.main(["doctor"])
        assert (ended.value.code, file.read_text()) == (code, "75")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.stpes=5", "did you mean steps?"),
        ("training.steps=many", "training.steps is 'many'"),
        ("data.train=nowhere", "nowhere/manifest.json"),
        ("data.heldout=nowhere", "nowhere/manifest.json"),
        ("model.init=nowhere", "model.init=nowhere"),
        ("data.budget={molecules: 8, atoms: 5}", "data.budget.atoms is 5"),
    ],
)
def test_pretrain_refuses(capsys, tmp_path, override, expected):
    arguments = [f"data.train={SHARDS}", "data.heldout=null", "model.init=null", f"run.dir={tmp_path}/run", override]
    assert expected in refusal(capsys, cli.main, ["pretrain", "--config", CONFIG, *arguments])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["objectives.property=null"], "set objectives.property or .forces"),
        (["objectives.property.target=gapp"], "no record to train on has the target gapp; targets there: alpha, cv"),
        (["data.split.train=30000"], "data.split takes 30000 and 1000 records"),
        (["data.limit=19215"], "data.limit is 19215, but there are 19214 records to train on"),
    ],
)
def test_what_fine_tuning_lacks_is_named(capsys, tmp_path, overrides, expected):
    arguments = ["finetune", "--config", str(ROOT / "configs" / "quickstart-finetune.yaml"), f"run.dir={tmp_path}/run"]
    data = f"data.train={ROOT}/shards/bundled/qm9-geometries/train"
    assert expected in refusal(capsys, cli.main, [*arguments, data, "model.init=null", *overrides])
    assert not (tmp_path / "run").exists()


def test_export_without_a_run(capsys, tmp_path):
    assert "no checkpoint" in refusal(capsys, cli.main, ["checkpoint", "export", str(tmp_path), str(tmp_path / "out")])


def test_debug_shows_the_traceback(capsys):
    with pytest.raises(SystemExit):
        cli.main(["pretrain", "--debug", "--config", CONFIG, "training.stpes=5"])
    assert "Traceback" in capsys.readouterr().err


def test_a_missing_shard(capsys, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for file in SHARDS.iterdir():
        if file.suffix != ".tar":
            (folder / file.name).write_bytes(file.read_bytes())
    said = refusal(capsys, cli.main, ["pretrain", "--config", CONFIG, f"data.train={folder}", "data.heldout=null"])
    assert "shard-00000.tar" in said
    assert "missing" in said


def test_an_unknown_element(capsys, tmp_path):
    """Refused when shards are built: listed by default, fatal with --strict."""
    row = {
        "key": "odd",
        "smiles": "",
        "numbers": [119, 1],
        "positions": [[0, 0, 0], [0, 0, 1]],
        "targets": {},
        "method": {},
        "seconds": {"vibrations": 0, "excitations": 0},
        **{name: [[1000.0], [1.0]] for name in ("ir", "raman", "uv_vis")},
    }
    good = row | {"key": "good", "numbers": [9, 1]}
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(each) + "\n" for each in (row, good)))
    arguments = ["build", "computed", "--from", str(tmp_path), "--out", str(tmp_path / "out"), "--processes", "1"]
    said = refusal(capsys, shards.main, [*arguments, "--strict"])
    assert "odd" in said
    assert "119 is not an atomic number" in said
    shards.main(arguments)
    rejects = (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()
    assert [(reject["key"], reject["field"]) for reject in map(json.loads, rejects)] == [("odd", "numbers")]


def test_ranks_that_do_not_divide_the_lanes(tmp_path):
    done = subprocess.run(
        command(tmp_path / "run", 3, 2), env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    # The transport may warn of how the machine is called.
    assert done.stderr.count("mspt: ") == 1 and "Traceback" not in done.stderr, done.stderr
    assert "data.lanes is 2, which 3 ranks do not divide" in done.stderr


def test_a_run_from_start_to_export(tmp_path):
    """One process, with evaluation: the files and the numbers that the README promises."""
    run(tmp_path / "run", 1, 2, f"data.heldout={SHARDS}", "engine.ema_decay=0.9")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for name in ("recall_at_10_molecule_to_spectrum", "recall_at_10_chance", "denoise_coord", "masked_mse"):
        assert summary["heldout"][name] > 0
    assert summary["heldout"]["masked_mse_baseline"] > 0
    assert summary["train"]["molecules_per_second"] > 0
    assert summary["train"]["records_seen"] > 0
    assert summary["train"]["seconds"] > 0
    assert 0 <= summary["data"]["wait_fraction"] < 1
    assert (summary["world_size"], summary["zero_stage"]) == (1, 1)
    assert summary["kernels"] == kernels.implementation("cpu")
    for name in ("losses", "reconstructions", "retrieval"):
        assert (tmp_path / "run" / "figures" / f"{name}.png").stat().st_size > 10_000
    assert list((tmp_path / "run" / "tensorboard").iterdir())

    exported = tmp_path / "exported"
    assert cli.main(["checkpoint", "export", str(tmp_path / "run"), str(exported)]) is None
    first, second = (safetensors.torch.load_file(d / "model.safetensors") for d in (tmp_path / "run/encoder", exported))
    assert all((first[name] == second[name]).all() for name in first)
    encoder = encoders.build(encoders.parse(json.loads((exported / "config.json").read_text())))
    encoder.load_state_dict(second)

    # The run folder belongs to one order of the data.
    other = command(tmp_path / "run", 1, 3, "data.window=3", "engine.ema_decay=0.9")
    done = subprocess.run(other, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 2
    assert "was made with data.window = 2, now it is 3" in done.stderr


def test_import_of_a_torchmd_net_checkpoint(tmp_path, capsys):
    """As Lightning writes it; the encoder that comes out gives the same numbers, test_torchmd_net_parity.py says."""
    torchmd_et = pytest.importorskip("torchmdnet.models.torchmd_et")
    peer = torchmd_et.TorchMD_ET(hidden_channels=16, num_layers=2, num_rbf=8, num_heads=4, trainable_rbf=False)
    state = {f"model.representation_model.{name}": value for name, value in peer.state_dict().items()}
    made = {"num_heads": 4, "max_num_neighbors": 64}
    torch.save({"state_dict": state, "hyper_parameters": made}, tmp_path / "peer.ckpt")
    cli.main(["checkpoint", "import", str(tmp_path / "peer.ckpt"), str(tmp_path / "encoder")])
    settings = encoders.parse(json.loads((tmp_path / "encoder/config.json").read_text()))
    assert (settings.heads, settings.layers, settings.max_neighbours, settings.norm) == (4, 2, 64, "none")
    encoders.build(settings).load_state_dict(safetensors.torch.load_file(tmp_path / "encoder/model.safetensors"))

    torch.save({"state_dict": state, "callback": test_console_script}, tmp_path / "code.ckpt")
    said = refusal(capsys, cli.main, ["checkpoint", "import", str(tmp_path / "code.ckpt"), str(tmp_path / "no")])
    assert "it could run code" in said
    said = refusal(capsys, cli.main, ["checkpoint", "import", str(tmp_path / "peer.ckpt"), str(tmp_path / "encoder")])
    assert "encoder: is there already" in said
    for what in ([1, 2], {"state_dict": None}, {"hyper_parameters": None}):
        torch.save(what, tmp_path / "other.ckpt")
        said = refusal(capsys, cli.main, ["checkpoint", "import", str(tmp_path / "other.ckpt"), str(tmp_path / "no")])
        assert "other.ckpt: is no checkpoint of TorchMD-Net" in said
    (tmp_path / "text.ckpt").write_text("some words")
    said = refusal(capsys, cli.main, ["checkpoint", "import", str(tmp_path / "text.ckpt"), str(tmp_path / "no")])
    assert "text.ckpt: cannot read the checkpoint" in said
    del state["model.representation_model.out_norm.bias"]
    torch.save(state, tmp_path / "short.pt")
    said = refusal(capsys, cli.main, ["checkpoint", "import", str(tmp_path / "short.pt"), str(tmp_path / "no")])
    assert "short.pt: model.representation_model.out_norm.bias: missing" in said
    assert not (tmp_path / "no").exists()


def test_data_info(capsys):
    cli.main(["data", "info", str(SHARDS), "--blocks", "2"])
    assert "2 of 7 blocks, evenly spread" in capsys.readouterr().out
    cli.main(["data", "info", str(SHARDS.parent), "--json"])
    heldout, train = json.loads(capsys.readouterr().out)
    assert (heldout["records"], train["records"]) == (223, 1326)
    assert heldout["folder"] == str(SHARDS)


def test_data_show(capsys):
    cli.main(["data", "show", str(SHARDS), "31"])
    by_number = capsys.readouterr().out
    cli.main(["data", "show", str(SHARDS), "qm9-020497"])
    assert capsys.readouterr().out == by_number
    assert "CC#CC1=CN=NN1" in by_number
    cli.main(["data", "show", "--xyz", str(SHARDS), "31"])
    rows = capsys.readouterr().out.splitlines()
    assert (rows[0], rows[1], len(rows)) == ("13", "qm9-020497", 15)


def test_data_plot(tmp_path, capsys):
    for name, *record in (("set",), ("record", "31")):
        cli.main(["data", "plot", str(SHARDS), *record, "--out", f"{tmp_path}/pictures/{name}.png"])
        assert capsys.readouterr().out == f"wrote {tmp_path}/pictures/{name}.png\n"
        assert (tmp_path / "pictures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_data_verify(tmp_path, capsys):
    cli.main(["data", "verify", str(SHARDS.parent)])
    assert [line.partition(": whole: ")[0] for line in capsys.readouterr().out.splitlines()] == [
        str(SHARDS),
        str(SHARDS.parent / "train"),
    ]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["info", "nowhere"], "nowhere/manifest.json: not there"),
        (["verify", "nowhere"], "nowhere/manifest.json: not there"),
        (["info", SHARDS, "--blocks", "0"], "--blocks is 0"),
        (["show", SHARDS, "qm9-20497"], "no record has the key 'qm9-20497'; give one such as qm9-020497"),
        (["show", SHARDS.parent, "0"], "is no shard set but holds"),
        (["plot", SHARDS.parent, "--out", "x.png"], "is no shard set but holds"),
        (["plot", SHARDS, "--out", "x.pdf"], "--out is x.pdf"),
        (["plot", SHARDS, "223", "--out", "x.png"], "no record 223; the numbers are 0 to 222"),
    ],
)
def test_data_refuses(capsys, arguments, expected):
    assert expected in refusal(capsys, cli.main, ["data", *map(str, arguments)])
    assert not os.path.exists("x.png")


def test_doctor(capsys):
    cli.main(["doctor"])
    said = capsys.readouterr().out
    assert f"cpu: {kernels.implementation('cpu')}" in said
    assert "MSPT_KERNELS=" in said


def test_console_script():
    """`mspt` is installed beside the interpreter and knows its commands."""
    script = os.path.join(os.path.dirname(sys.executable), "mspt")
    done = subprocess.run([script, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "pretrain" in done.stdout
