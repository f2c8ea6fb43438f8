"""Checkpoints: any stage and world size into any other, and nothing lost whatever breaks."""

import json
import sys
from pathlib import Path

import pytest
import torch

from mspt.errors import UserError
from mspt.training import checkpoint
from mspt.training.engine import Engine, EngineSettings
from tests.launching import launch

WORKERS = Path(__file__).parent / "workers"
sys.path.insert(0, str(WORKERS))
import tiny  # noqa: E402
from resume import HALF  # noqa: E402

FP32 = [f"{stage}-fp32-float32" for stage in range(4)]
BF16 = {stage: f"{stage}-bf16-float32" for stage in (1, 3)}
# (world size, run, the job it resumes from); a job that resumes from nothing is called by world size and run.
WHOLE = [(2, run) for run in [*FP32, *BF16.values()]]
RESUMED = [
    *((2, run, (2, run)) for run in [*FP32, *BF16.values()]),
    *((2, FP32[stage], (2, FP32[1])) for stage in (0, 2, 3)),
    *((2, FP32[stage], (2, FP32[3])) for stage in (0, 1, 2)),
    (2, FP32[3], (2, FP32[0])),
    (2, FP32[1], (2, BF16[3])),
    (2, BF16[1], (2, FP32[3])),
    (2, BF16[3], (2, BF16[1])),
    (1, FP32[0], (2, FP32[3])),
    (1, FP32[1], (2, FP32[0])),
    (1, FP32[3], (2, FP32[1])),
    (1, BF16[3], (2, BF16[1])),
]


def name(world_size, run, source=None):
    return f"{world_size}-{run}" + (f"-from-{name(*source)}" if source else "")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(folder of all jobs' run folders, job name -> its losses after the resumption)."""
    out, losses = tmp_path_factory.mktemp("runs"), {}

    def perform(world_size, jobs):
        # Those at ZeRO 3 last: it leaves torch patched.
        specs = [":".join([name(*job), job[1], *([name(*job[2])] if len(job) > 2 else [])]) for job in jobs]
        ordered = sorted(specs, key=lambda spec: spec.split(":")[1].startswith("3"))
        losses.update(json.loads(launch(WORKERS / "resume.py", world_size, out, *ordered)[0].stdout))

    perform(2, WHOLE)
    perform(2, [job for job in RESUMED if job[0] == 2])
    perform(1, [job for job in RESUMED if job[0] == 1])
    return out, losses


def final(out, job):
    return out / name(*job) / "checkpoints" / f"step-{tiny.STEPS:08d}"


@pytest.mark.parametrize("job", RESUMED, ids=lambda job: name(*job))
def test_resumed_as_if_never_interrupted(runs, job):
    out, losses = runs
    _, run, source = job
    # A run that goes on in another precision than it began in has no uninterrupted twin: it must come near.
    tolerance = 1e-6 if "bf16" not in run + source[1] else 2e-2
    assert losses[name(*job)] == pytest.approx(losses[name(*source)], rel=tolerance)
    ours, theirs = final(out, job), final(out, source)
    for ema in (False, True):
        expected, found = checkpoint.read_weights(theirs, ema), checkpoint.read_weights(ours, ema)
        assert expected.keys() == found.keys() >= {"offset", "embedding.weight"}
        for key in expected:
            assert found[key].dtype == torch.float32
            assert (found[key] - expected[key]).norm() <= 3 * tolerance * expected[key].norm(), key


@pytest.mark.parametrize("run", [run for _, run in WHOLE])
def test_the_same_stage_and_world_size_goes_on_bit_by_bit(runs, run):
    out, losses = runs
    job = (2, run, (2, run))
    assert losses[name(*job)] == losses[name(2, run)]
    # Weights, moments, averages, buffers and random states: the files are the same.
    ours, theirs = (json.loads((final(out, j) / "meta.json").read_text()) for j in (job, (2, run)))
    assert ours["files"] == theirs["files"] and len(ours["files"]) == 2
    assert ours["updates"] == theirs["updates"] == tiny.STEPS


def test_every_element_is_written_once(runs):
    out, _ = runs
    elements = sum(p.numel() for p in tiny.Tiny().parameters())
    for run in (run for _, run in WHOLE):
        directory = out / name(2, run) / "checkpoints" / f"step-{HALF:08d}"
        sizes = [path.stat().st_size for path in directory.glob("*.safetensors")]
        # Four numbers of 4 bytes an element; each rank about half. The rest is names and random states.
        assert 16 * elements < sum(sizes) < 16 * elements + 40_000
        assert max(sizes) < 1.25 * min(sizes)


def test_a_save_that_breaks_loses_nothing(tmp_path):
    ranks = launch(WORKERS / "break_save.py", 2, tmp_path, check=False)
    assert [rank.stdout for rank in ranks] == ["refused\n"] * 2, ranks
    assert ranks[1].returncode == -9 and ranks[0].returncode != 0
    assert "DAMAGED CHECKPOINT" in ranks[0].stderr and "rank-00001.safetensors" in ranks[0].stderr
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == [
        "step-00000001",
        "step-00000002",
        "step-00000004.partial",
    ]
    assert checkpoint.latest(tmp_path) == folder / "step-00000002"
    save(engine(), tmp_path, 5)
    assert not list(folder.glob("*.partial"))


def engine(module=None, **settings):
    return Engine(module or tiny.Tiny(), EngineSettings(**({"zero_stage": 0} | settings)), tiny.SCHEDULE, steps=10)


def save(own, run_dir, step):
    return checkpoint.save(own, run_dir, step, position={"at": step}, seed=5, config={"model": 1}, extra={"x": [1]})


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "flipped byte": lambda directory: flip(directory / "rank-00000.safetensors"),
    "missing file": lambda directory: (directory / "rank-00000.safetensors").unlink(),
    "truncated": lambda directory: (directory / "rank-00000.safetensors").write_bytes(b"partial"),
    "torn meta": lambda directory: (directory / "meta.json").write_text('{"schema": 1, "fi'),
    "no meta": lambda directory: (directory / "meta.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_falls_back_loudly(tmp_path, damage, caplog):
    assert checkpoint.latest(tmp_path) is None
    own = engine()
    first, second = save(own, tmp_path, 1), save(own, tmp_path, 2)
    assert checkpoint.latest(tmp_path) == second and not caplog.records
    DAMAGES[damage](second)
    assert checkpoint.latest(tmp_path) == first
    assert "DAMAGED CHECKPOINT" in caplog.text and str(second) in caplog.text
    DAMAGES[damage](first)
    with pytest.raises(UserError, match="none of 2 checkpoints is whole"):
        checkpoint.latest(tmp_path)


def test_what_is_given_comes_back(tmp_path):
    own = engine(ema_decay=0.5)
    own.backward(own(*tiny.global_batch(0)))
    own.step()
    path = save(own, tmp_path, 1)
    random = torch.rand(3)
    other = engine(ema_decay=0.5)
    restored = checkpoint.load(other, path)
    assert restored == checkpoint.Restored(step=1, position={"at": 1}, seed=5, config={"model": 1}, extra={"x": [1]})
    assert torch.equal(torch.rand(3), random)
    for ema in (False, True):
        from_engine, from_files = other.weights(ema=ema), checkpoint.read_weights(path, ema=ema)
        assert from_engine.keys() == from_files.keys() == tiny.Tiny().state_dict().keys()
        assert all(torch.equal(from_engine[key], from_files[key]) for key in from_engine)
    assert not torch.equal(own.weights()["out.weight"], own.weights(ema=True)["out.weight"])
    meta = json.loads((path / "meta.json").read_text())
    assert meta["versions"]["torch"] and meta["world_size"] == 1 and meta["zero_stage"] == 0


def test_a_moving_average_that_is_not_there(tmp_path):
    path = save(engine(), tmp_path, 1)
    with pytest.raises(UserError, match="no moving average"):
        checkpoint.read_weights(path, ema=True)
    fresh = tiny.Tiny()
    with torch.no_grad():
        fresh.out.weight.fill_(9.0)
    own = engine(fresh, ema_decay=0.5)
    checkpoint.load(own, path)
    assert torch.equal(own.weights(ema=True)["out.weight"], tiny.Tiny().out.weight)


def test_another_model_is_refused_by_its_first_difference(tmp_path):
    path = save(engine(), tmp_path, 1)
    wider, deeper, smaller = tiny.Tiny(), tiny.Tiny(), tiny.Tiny()
    wider.second = torch.nn.Linear(33, 34)
    deeper.third = torch.nn.Linear(2, 2)
    del smaller.out
    for module, said in [
        (wider, r"second.weight has shape \[33, 33\] there and has shape \[34, 33\] here"),
        (deeper, r"third.weight is missing there and has shape \[2, 2\] here"),
        (smaller, r"out.weight has shape \[1, 33\] there and is missing here"),
    ]:
        with pytest.raises(UserError, match=said):
            checkpoint.load(engine(module), path)


def test_prune_keeps_the_newest_and_the_multiples(tmp_path):
    own = engine()
    for step in range(1, 8):
        save(own, tmp_path, step)
    checkpoint.prune(tmp_path, keep_last=2, keep_every=3)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == [f"step-{step:08d}" for step in (3, 6, 7)]
    checkpoint.prune(tmp_path, keep_last=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000007"]
