"""Checkpoints: any stage and world size into any other, and nothing lost whatever breaks."""

import errno
import json
import os
import shutil
import sys
import threading
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from mspt.errors import UserError
from mspt.training import checkpoint, image, loading
from mspt.training.engine import Engine, EngineSettings
from mspt.training.saving import Saver
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


@pytest.mark.parametrize("run", [run for _, run in WHOLE])
def test_what_is_written_later_is_the_moment_of_the_save(runs, run):
    """Training went on, to its end, before the first byte was written: the files are those of a save at once."""
    out, _ = runs
    folders = (name(2, run), f"{name(2, run)}-at-once")
    later, at_once = (out / folder / "checkpoints" / f"step-{HALF:08d}" / "meta.json" for folder in folders)
    assert json.loads(later.read_text())["files"] == json.loads(at_once.read_text())["files"]


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
    "torn meta": lambda directory: (directory / "meta.json").write_text('{"schema": 2, "fi'),
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


def test_another_version_s_is_not_called_damaged(tmp_path):
    own = engine()
    meta = save(own, tmp_path, 1) / "meta.json"
    meta.write_text(meta.read_text().replace('"schema": 2', '"schema": 99'))
    for read in (lambda: checkpoint.latest(tmp_path), lambda: loading.load(meta.parent)):
        with pytest.raises(UserError, match="schema 99, this version of mspt reads 2; use the version that wrote it$"):
            read()


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
    assert torch.equal(checkpoint.averaged(path)["out.weight"], own.weights(ema=True)["out.weight"])
    meta = json.loads((path / "meta.json").read_text())
    assert meta["versions"]["torch"] and meta["world_size"] == 1 and meta["zero_stage"] == 0


def test_a_moving_average_that_is_not_there(tmp_path):
    path = save(engine(), tmp_path, 1)
    with pytest.raises(UserError, match="no moving average"):
        checkpoint.read_weights(path, ema=True)
    assert torch.equal(checkpoint.averaged(path)["out.weight"], tiny.Tiny().out.weight)
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


def test_a_file_is_what_safetensors_reads(tmp_path):
    """Every type that a buffer may have, lengths that do not align, scalars and empty ones."""
    module, generator = tiny.Tiny(), torch.Generator().manual_seed(0)
    for index, dtype in enumerate(image.DTYPES):
        for shape in ((), (0,), (2 * index + 3,), (3, 5)):
            values = torch.randint(0, 2, shape, generator=generator).to(dtype)
            module.register_buffer(f"b{index}_{len(shape)}_{values.numel()}", values)
    path = save(engine(module), tmp_path, 1)
    there = load_file(path / "rank-00000.safetensors")
    buffers = dict(module.named_buffers())
    assert len(buffers) == 4 * len(image.DTYPES) + 1
    for key, buffer in buffers.items():
        found = there.pop(f"buffer/{key}")
        assert found.dtype == buffer.dtype and torch.equal(found, buffer), key
    for key, parameter in module.named_parameters():
        assert torch.equal(there.pop(f"weight/{key}@0").view_as(parameter), parameter)
    assert torch.equal(there.pop("random/cpu"), torch.get_rng_state())
    assert {key.partition("/")[0] for key in there} == {"exp_avg", "exp_avg_sq"}


def test_a_save_waits_for_the_one_before(tmp_path):
    own, folder = engine(), tmp_path / "checkpoints"
    disk, write = threading.Event(), os.write
    state = {"position": {}, "seed": 5, "config": {}}
    counts = {"records": 1}
    saver = Saver(own, tmp_path)
    assert saver.finished and saver.step is None
    with mock.patch("os.write", lambda *arguments: disk.wait() and write(*arguments)):
        assert saver.begin(1, extra=counts, **state) == 0
        counts["records"] = 2  # as the trainer counts on
        assert not saver.finished and [path.name for path in folder.glob("*")] in ([], ["step-00000001.partial"])
        threading.Timer(0.2, disk.set).start()
        assert saver.begin(2, extra=counts, **state) > 0.1
        assert [path.name for path in folder.iterdir() if not path.name.endswith(".partial")] == ["step-00000001"]
    saver.wait()
    assert saver.saved == 2 and saver.step is None and saver.seconds > 0
    assert [checkpoint.load(own, path).extra["records"] for path in sorted(folder.iterdir())] == [1, 2]


def test_an_error_that_is_not_the_disk_s_is_raised_as_it_is(tmp_path):
    saver = Saver(engine(), tmp_path)
    saver.begin(1, position={}, seed=5, config={}, extra={"x": object()})
    with pytest.raises(TypeError, match="not JSON serializable"):
        saver.wait()
    assert saver.step is None and not (tmp_path / "checkpoints" / "step-00000001").exists()
    saver.wait()


def test_keep_best(tmp_path, caplog):
    own, published = engine(), []
    losses = dict(enumerate((0.5, 0.3, 0.9, 0.3, float("nan"), 0.7, 0.8), start=1))
    saver = Saver(own, tmp_path, published=lambda _: published.append(checkpoint.latest(tmp_path).name))
    for step, loss in losses.items():
        saver.begin(step, position={}, seed=5, config={}, extra={}, metrics={"loss": loss, "other": -step})
    saver.wait()
    assert published == [f"step-{step:08d}" for step in losses]

    def kept(**keep):
        folder = tmp_path / f"pruned-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(tmp_path / "checkpoints", folder / "checkpoints")
        checkpoint.prune(folder, 7, **keep)
        return [int(path.name[5:]) for path in sorted((folder / "checkpoints").iterdir())]

    assert kept(keep_last=1, keep_best=1) == [4, 7]  # of equals the newest
    assert kept(keep_last=1, keep_best=3) == [1, 2, 4, 7]
    assert kept(keep_last=2, keep_best=6, keep_every=5) == [1, 2, 3, 4, 5, 6, 7]
    assert kept(keep_last=2, keep_best=9) == [1, 2, 3, 4, 6, 7]  # what is not a number is never the best
    assert kept(keep_last=1, keep_best=2, metric="other") == [6, 7]
    assert kept(keep_last=1, keep_best=2, metric="unknown") == [7]
    (tmp_path / "checkpoints" / "step-00000004" / "meta.json").write_text("torn")
    assert kept(keep_last=1, keep_best=1) == [2, 7]
    with mock.patch("shutil.rmtree", side_effect=OSError("busy")):
        checkpoint.prune(tmp_path, 7, keep_last=6)
    assert "step-00000001: an old checkpoint that could not be removed: busy" in caplog.text


def test_prune_keeps_the_newest_and_the_multiples(tmp_path):
    own = engine()
    for step in range(1, 8):
        save(own, tmp_path, step)
    checkpoint.prune(tmp_path, 7, keep_last=2, keep_every=3)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == [f"step-{step:08d}" for step in (3, 6, 7)]
    checkpoint.prune(tmp_path, 7, keep_last=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000007"]


def test_a_damaged_one_does_not_push_out_what_is_saved_after_it(tmp_path):
    """latest() has gone back, and the run has saved at a step below the damaged one."""
    own = engine()
    for step in (3, 5, 6):
        save(own, tmp_path, step)
    flip(tmp_path / "checkpoints" / "step-00000006" / "rank-00000.safetensors")
    checkpoint.prune(tmp_path, 5, keep_last=1)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000005", "step-00000006"]
    assert checkpoint.latest(tmp_path).name == "step-00000005"


def test_a_damaged_one_is_not_read_for_its_weights(tmp_path):
    save(engine(), tmp_path, 3)
    save(engine(), tmp_path, 6)
    newest = tmp_path / "checkpoints" / "step-00000006"
    assert checkpoint.read_weights(newest)
    flip(newest / "rank-00000.safetensors")
    with pytest.raises(UserError, match="step-00000006.*its content is not what was written.*give another checkpoint"):
        checkpoint.read_weights(newest)


def test_a_disk_that_cannot_be_read_is_gone_back_from(tmp_path, caplog):
    save(engine(), tmp_path, 3)
    save(engine(), tmp_path, 6)
    summed = checkpoint.checksum

    def broken(path):
        if path.parent.name == "step-00000006":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return summed(path)

    with mock.patch.object(checkpoint, "checksum", broken):
        assert checkpoint.latest(tmp_path).name == "step-00000003"
    assert "step-00000006/rank-00000.safetensors: cannot be read (Input/output error)" in caplog.text
