"""Real processes that train together, one core each, and what is measured in them. Nothing happens when this is run.

    with Ranks(2) as ranks:
        results = ranks.ask(measure_something, argument)   # one a rank

Each rank is a fresh process with one thread, joined by the trainer's own initialise().
"""

import _thread
import multiprocessing
import os
import socket
import statistics
import struct
import threading
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import torch
import torch.distributed as dist

from launch.local import environments
from mspt import config
from mspt.data.keyed import Keyed
from mspt.data.stream import Stream
from mspt.objectives import Pretraining
from mspt.training.engine import Engine, initialise
from mspt.training.trainer import accumulate

ROOT = Path(__file__).parent.parent
# Of Linux's struct tcp_info: what the other side has acknowledged, in bytes.
TCP_INFO_ACKED = 120
COLLECTIVES = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "allgather_into_tensor_coalesced_": "all_gather",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "reduce_": "reduce",
    "broadcast_": "broadcast",
}


class Ranks:
    """So many processes, joined, on a core each from the first-th on of those that this process may use."""

    def __init__(self, count, first=0):
        context = multiprocessing.get_context("spawn")
        cores = sorted(os.sched_getaffinity(0))
        self.pipes, self.processes = [], []
        for rank, environment in enumerate(environments(count)):
            ours, theirs = context.Pipe()
            core = cores[(first + rank) % len(cores)]
            own = environment | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
            process = context.Process(target=_rank, args=(theirs, own, core), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def ask(self, function, *arguments):
        """function(*arguments) in every rank at once -> the results by rank. Raises RuntimeError where one fails."""
        self.send(function, *arguments)
        return self.receive()

    def send(self, function, *arguments):
        for pipe in self.pipes:
            pipe.send((function, arguments))

    def receive(self):
        try:
            replies = [pipe.recv() for pipe in self.pipes]
        except EOFError:
            for process in self.processes:
                process.join(timeout=5)
            codes = [process.exitcode for process in self.processes]
            raise RuntimeError(f"a rank is gone; exit codes {codes} (None: still there)") from None
        for rank, (_, error) in enumerate(replies):
            if error:
                raise RuntimeError(f"rank {rank}: {error}")
        return [result for result, _ in replies]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.join()


def _rank(pipe, environment, core):
    os.environ |= environment
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {core})
    initialise()
    while True:
        function, arguments = pipe.recv()
        try:
            reply = function(*arguments), None
        except Exception as error:  # the parent raises it
            reply = None, repr(error)
        pipe.send(reply)


class Training:
    """The trainer's step on bundled molecules: batches from the trainer's stream, its accumulate() and its engine."""

    def __init__(self, file, overrides):
        self.config = config.load(ROOT / file, overrides)
        process = initialise()
        torch.manual_seed(0)
        self.module = Pretraining(self.config.model, self.config.objectives)
        accumulation = self.config.data.lanes // process.world_size
        self.engine = Engine(
            self.module, self.config.engine, self.config.schedule, self.config.training.steps, accumulation
        )
        self.stream = Stream(
            self.config.data.open(), self.config.data, self.config.seed, process.rank, process.world_size
        )
        self.batches = self._batches()

    def _batches(self):
        """Micro-batches of one step after another; the last step of an epoch, which is not full, is left out."""
        epoch = 0
        while True:
            with closing(self.stream.batches(epoch, 0, self.stream.steps(epoch) - 1)) as batches:
                yield from batches
            epoch += 1

    def step(self):
        """One step -> its molecules on this rank."""
        batches = [batch.broadened(self.config.data.line_shapes) for batch in next(self.batches)]
        accumulate(self.engine, self.module, batches, Keyed(self.config.seed, 0))
        if self.engine.step().skipped:
            raise RuntimeError("a step was skipped: its loss or gradient is not finite")
        return sum(len(batch.keys) for batch in batches)


_training = None  # of this rank


def build(file, overrides):
    """Make this rank's Training -> parameters, and its seconds."""
    global _training
    begin = time.perf_counter()
    _training = Training(file, overrides)
    return sum(torch.Size(shape).numel() for shape in _training.engine.shapes.values()), time.perf_counter() - begin


def run(steps):
    """Take so many steps -> molecules and seconds of each on this rank; all ranks begin together."""
    dist.barrier()
    result = []
    for _ in range(steps):
        begin = time.perf_counter()
        molecules = _training.step()
        result.append((molecules, time.perf_counter() - begin))
    return result


def traffic(steps):
    """What a step sends -> bytes this rank's sockets have sent, and calls and bytes by collective, per step."""
    _training.step()  # DeepSpeed learns the order of modules at the first
    dist.barrier()
    before = _sent()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        for _ in range(steps):
            _training.step()
    sent = _sent() - before
    calls = Counter()
    for event in profile.events():
        space, _, name = event.name.partition("::")
        if space == "c10d" and name in COLLECTIVES:
            calls[COLLECTIVES[name]] += 1
    return {"bytes": sent / steps, "calls": {name: count / steps for name, count in calls.items()}}


def memory(file, overrides, steps):
    """Peaks of a Training above what there was before it, in bytes -> tensors, while it is built and while it trains;
    resident size, the same two, with what the profiler keeps.
    """
    before = _status("VmRSS")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as building:
        build(file, overrides)
    built = _status("VmHWM")
    Path("/proc/self/clear_refs").write_text("5")  # the peak of the resident size starts again from here
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as training:
        for _ in range(steps):
            _training.step()
    kept, peak = _allocated(building)
    return {
        "tensors_building": peak,
        "tensors_training": kept + _allocated(training)[1],
        "resident_building": built - before,
        "resident_training": _status("VmHWM") - before,
    }


def one_step(file, overrides, keep_free):
    """Build and take one step -> seconds of both and the peak of the resident size above what there was before.

    Raises MemoryError, with what the process holds by then, before less than keep_free GB of the machine's are left.
    """
    before, begin = _status("VmRSS"), time.perf_counter()
    Path("/proc/self/oom_score_adj").write_text("1000")  # if anything is killed for its memory, then this
    over = threading.Event()
    watched = threading.Thread(target=_watch, args=(1e9 * keep_free, over))
    watched.start()
    try:
        _, building = build(file, overrides)
        _training.step()
    except KeyboardInterrupt:
        raise MemoryError(
            f"gave up with {available() / 1e9:.1f} GB of the machine's left, holding {_status('VmRSS') / 1e9:.1f} GB"
        ) from None
    finally:
        over.set()
        watched.join()
    seconds = time.perf_counter() - begin
    return {
        "seconds_building": building,
        "seconds": seconds,
        "resident_bytes": _status("VmHWM") - before,
        "bytes_before": before,
    }


def _watch(least, over):
    while not over.wait(0.02):
        if available() < least:
            _thread.interrupt_main()
            return


def available():
    """Bytes of this machine's memory that a process could still have."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])


def _allocated(profile):
    """What tensors made under a profile hold at its end, and the most that they held."""
    now = peak = 0
    events = (event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return now, peak


def _status(name):
    """A size of this process in bytes, as Linux has it."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def _sent():
    """Bytes that the other ends of this process's TCP connections have acknowledged."""
    total = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if not os.readlink(entry).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(entry.name))) as connection:
                if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM:
                    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_ACKED + 8)
                    total += struct.unpack_from("Q", info, TCP_INFO_ACKED)[0]
        except OSError:
            continue
    return total


def collective_times(name, sizes, runs):
    """Median seconds of a collective at each size: bytes of the whole tensor, reduced or gathered."""
    world_size, times = dist.get_world_size(), []
    for size in sizes:
        whole = torch.ones(size // 4 // world_size * world_size)
        part = torch.ones(len(whole) // world_size)
        call = {
            "all_reduce": lambda whole=whole: dist.all_reduce(whole),
            "all_gather": lambda whole=whole, part=part: dist.all_gather_into_tensor(whole, part),
            "reduce_scatter": lambda whole=whole, part=part: dist.reduce_scatter_tensor(part, whole),
        }[name]
        call()
        own = []
        for _ in range(runs):
            dist.barrier()
            begin = time.perf_counter()
            call()
            own.append(time.perf_counter() - begin)
        times.append(statistics.median(own))
    return times
