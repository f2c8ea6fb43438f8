"""Every ZeRO stage on 1, 2 and 3 ranks loads what every other has saved: 12 × 12 pairs, element by element."""

import os
import sys
import time
import zlib
from pathlib import Path

import torch

from launch.local import environments
from mspt.training import checkpoint
from mspt.training.engine import Engine
from tests.end_to_end.faults.ranks import FORKS

sys.path.insert(0, str(Path(__file__).parent / "workers"))
import tiny

WORLDS, STAGES = (1, 2, 3), (0, 1, 2, 3)
STEPS = 5
SECONDS = 300  # that the ranks wait for each other's checkpoints


def expected(kind, name, elements):
    """What every checkpoint holds, [elements]."""
    return torch.rand(elements, generator=torch.Generator().manual_seed(zlib.crc32(f"{kind}/{name}".encode())))


def each(engine):
    """(elements held here, what they are to be) of all kinds."""
    for fragment in engine.fragments:
        numel = torch.Size(engine.shapes[fragment.name]).numel()
        for kind, elements in engine.fragment_state(fragment).items():
            yield elements, expected(kind, fragment.name, numel)[fragment.start : fragment.start + fragment.length]


def rank(environment, out):
    """One rank: saves at each stage, then loads at each stage what all have saved."""
    os.environ |= environment
    log = os.open(out / f"{environment['WORLD_SIZE']}-{environment['RANK']}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    # Those at ZeRO 3 last: it leaves torch patched.
    engines = {stage: Engine(tiny.Tiny(), tiny.settings(zero_stage=stage), tiny.SCHEDULE, 10) for stage in STAGES}
    for stage, engine in engines.items():
        for elements, values in each(engine):
            elements.copy_(values)
        engine.updates, engine.done = STEPS, STEPS
        folder = out / f"{environment['WORLD_SIZE']}-{stage}"
        checkpoint.save(engine, folder, STEPS, position={}, seed=0, config={}, extra={})
    sources = [out / f"{world}-{stage}" / "checkpoints" / f"step-{STEPS:08d}" for world in WORLDS for stage in STAGES]
    end = time.monotonic() + SECONDS
    while not all(source.exists() for source in sources):
        assert time.monotonic() < end
        time.sleep(0.05)
    reference = tiny.Tiny()
    for name, parameter in reference.named_parameters():
        parameter.data.copy_(expected("weight", name, parameter.numel()).view_as(parameter))
    batch = tiny.global_batch(0)
    with torch.no_grad():
        loss = reference(*batch)
        for stage, engine in engines.items():
            for source in sources:
                for elements, _ in each(engine):
                    elements.fill_(-1.0)
                engine.updates = 0
                assert checkpoint.load(engine, source).step == STEPS
                assert all(torch.equal(elements, values) for elements, values in each(engine)), (stage, source)
                assert engine.updates == STEPS
                torch.testing.assert_close(engine(*batch), loss)  # the weights that the forward pass uses


def test_any_stage_and_world_size_into_any_other(tmp_path):
    ranks = [
        FORKS.Process(target=rank, args=({**environment, "OMP_NUM_THREADS": "1"}, tmp_path))
        for world in WORLDS
        for environment in environments(world)
    ]
    for each_rank in ranks:
        each_rank.start()
    for each_rank in ranks:
        each_rank.join()
    logs = "".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert [each_rank.exitcode for each_rank in ranks] == [0] * len(ranks), logs
