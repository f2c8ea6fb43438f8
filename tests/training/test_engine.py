"""The engine against plain torch in float64, one process and one batch: real ranks, every ZeRO stage."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from mspt.errors import UserError
from mspt.training.engine import LAUNCHED_WITH, Engine, EngineSettings, initialise
from mspt.training.schedule import learning_rate
from tests.launching import launch

WORKERS = Path(__file__).parent / "workers"
sys.path.insert(0, str(WORKERS))
import tiny  # noqa: E402
from train import train  # noqa: E402

EXACT = "0-fp32-float64"
STAGES = [f"{stage}-fp32-float32" for stage in range(4)]
BF16 = [f"{stage}-bf16-float32" for stage in (1, 2, 3)]
OFFLOAD = [f"{stage}-fp32-float32-offload" for stage in (1, 3)]
# Ranks and micro-batches a rank, and what is trained so cut; those at ZeRO 3 last.
CUTS = {
    (1, 4): [EXACT, *STAGES[:3]],
    (2, 2): sorted([EXACT, *STAGES, *BF16, *OFFLOAD]),
    (4, 1): [EXACT, STAGES[2]],
}
FORCES = sorted([*STAGES, *OFFLOAD])
SKIPS = sorted([*STAGES, *BF16, *OFFLOAD])


@pytest.fixture(scope="module")
def reference():
    """Losses, norms, first gradients, final weights and moving average of plain torch."""
    module, settings = tiny.Tiny().double(), tiny.settings()
    matrices = [module.first.weight, module.second.weight, module.out.weight]
    others = [p for p in module.parameters() if not any(p is matrix for matrix in matrices)]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, betas=settings.betas, eps=settings.eps)
    mean = {name: p.detach().clone() for name, p in module.named_parameters()}
    losses, norms = [], []
    for step in range(tiny.STEPS):
        loss = module(*tiny.global_batch(step, torch.float64)) / tiny.BATCH
        adamw.zero_grad()
        loss.backward()
        if step == 0:
            gradients = {name: p.grad.clone() for name, p in module.named_parameters()}
        norms.append(float(torch.nn.utils.clip_grad_norm_(module.parameters(), settings.clip)))
        for group in adamw.param_groups:
            group["lr"] = learning_rate(tiny.SCHEDULE, step, tiny.STEPS)
        adamw.step()
        for name, p in module.named_parameters():
            mean[name] = settings.ema_decay * mean[name] + (1 - settings.ema_decay) * p.detach()
        losses.append(float(loss.detach()))
    with torch.no_grad():
        batch = tiny.global_batch(99, torch.float64)
        evaluated = [float(module(*batch)), float(torch.func.functional_call(module, mean, batch))]
    tensors = {"gradient": gradients, "weight": module.state_dict(), "ema": mean}
    return {"losses": losses, "norms": norms, "evaluated": evaluated, **tensors}


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    """ranks -> (folder of results, what each rank printed)."""
    done = {}
    for (ranks, accumulation), runs in CUTS.items():
        out, said = tmp_path_factory.mktemp(f"trained-{ranks}"), []
        if ranks == 1:
            for run in runs:
                train(out, accumulation, run)
        else:
            jobs = [f"train:{run}" for run in runs]
            if ranks == 2:
                jobs += [f"skip:{run}" for run in SKIPS] + [f"forces:{run}" for run in FORCES]
            jobs.sort(key=lambda job: ":3" in job)
            results = launch(WORKERS / "train.py", ranks, out, accumulation, *jobs)
            said = [rank.stdout.split("\n")[:-1] for rank in results]
        done[ranks] = out, said
    return done


@pytest.fixture(scope="module")
def trained(workers):
    """(ranks, run) -> its numbers and tensors."""
    found = {}
    for (ranks, _), runs in CUTS.items():
        out, _ = workers[ranks]
        for run in runs:
            numbers = json.loads((out / f"{run}.json").read_text())
            found[ranks, run] = numbers, safetensors.torch.load_file(out / f"{run}.safetensors")
    return found


@pytest.mark.parametrize(("ranks", "run"), [(ranks, run) for (ranks, _), runs in CUTS.items() for run in runs])
def test_every_stage_and_cut_trains_as_plain_torch(trained, reference, ranks, run):
    numbers, tensors = trained[ranks, run]
    tolerance = 1e-10 if run == EXACT else 3e-2 if "bf16" in run else 1e-5
    assert numbers["losses"] == pytest.approx(reference["losses"], rel=tolerance)
    assert numbers["norms"] == pytest.approx(reference["norms"], rel=tolerance)
    assert numbers["evaluated"] == pytest.approx(reference["evaluated"], rel=tolerance)
    assert numbers["rates"] == [learning_rate(tiny.SCHEDULE, step, tiny.STEPS) for step in range(tiny.STEPS)]
    for kind in ("gradient", "weight", "ema"):
        for name, expected in reference[kind].items():
            found = tensors[f"{kind}/{name}"]
            assert found.shape == expected.shape
            error = (found.double() - expected).norm() / expected.norm()
            # Adam divides by tiny second moments: weights of a bf16 run go their own way faster than its losses.
            assert error < (5 * tolerance if kind != "gradient" else tolerance), f"{kind} of {name}: {error}"


def test_all_cuts_and_stages_agree_in_fp32(trained):
    curves = [numbers["losses"] for (_, run), (numbers, _) in trained.items() if run in [*STAGES, *OFFLOAD]]
    assert len(curves) == 10
    for curve in curves:
        assert curve == pytest.approx(curves[0], rel=1e-6)


def test_weights_hold_the_buffers(trained):
    _, tensors = trained[2, STAGES[3]]
    assert tensors["weight/offset"].tolist() == [0.25]


def test_a_step_that_is_not_finite_on_one_rank_leaves_no_trace(workers):
    _, said = workers[2]
    for lines in said:
        assert [line for line in lines if "trace" in line] == [f"{run} leaves no trace" for run in SKIPS]


def test_second_derivatives_are_right_at_every_stage(workers):
    _, said = workers[2]
    for lines in said:
        assert [line for line in lines if "forces" in line] == [f"{run} gives right forces" for run in FORCES]


def test_bf16_at_stage_0_runs_as_stage_1():
    assert [EngineSettings(zero_stage=stage, precision="bf16").stage for stage in range(4)] == [1, 1, 2, 3]


def test_the_wrong_number_of_micro_batches_is_refused():
    engine = Engine(tiny.Tiny(), EngineSettings(zero_stage=0), tiny.SCHEDULE, steps=1, accumulation=2)
    with pytest.raises(RuntimeError, match="0 of 2"):
        engine.step()
    for batch in tiny.micro_batches(0, 0, 1, 2):
        engine.backward(engine(*batch))
    with pytest.raises(RuntimeError, match="once more than the 2"):
        engine.backward(engine(*batch))


def test_half_an_environment_is_refused(monkeypatch):
    initialise()
    monkeypatch.delenv("RANK")
    with pytest.raises(UserError, match="RANK not set"):
        initialise()


def test_waits_outlast_the_watchdog():
    """DeepSpeed's own patience is ten minutes, less than run.hang_timeout."""
    code = (
        "import torch, torch.distributed as dist\n"
        "from mspt.training.engine import initialise\n"
        "initialise(patience=4200)\n"
        "print(dist.group.WORLD._get_backend(torch.device('cpu')).options._timeout.total_seconds())\n"
    )
    # What joined this process to a run of its own is not for another.
    clean = {name: value for name, value in os.environ.items() if name not in (*LAUNCHED_WITH, "LOCAL_RANK")}
    done = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, timeout=100)
    assert done.stdout.split() == ["4200.0"], done.stderr


def test_offload_at_stage_0_is_refused():
    with pytest.raises(UserError, match="engine.zero_stage"):
        Engine(tiny.Tiny(), EngineSettings(zero_stage=0, offload=True), tiny.SCHEDULE, steps=1)
