"""DeepSpeed as mspt uses it: processes, forward, gradient sums, and a step that is taken everywhere or nowhere.

DeepSpeed is imported where it is first needed: it takes seconds, and reading a configuration or a checkpoint needs
none of it.
"""

import atexit
import ctypes
import io
import logging
import os
import warnings
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import nn

from mspt.errors import UserError
from mspt.settings import Settings
from mspt.training import partition
from mspt.training.ports import free_port
from mspt.training.schedule import learning_rate
from mspt.training.slurm import launcher_variables
from mspt.training.whole import Whole

NEVER = timedelta(days=3650)
LAUNCHED_WITH = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Elements that are reduced at a time and, at ZeRO 3, gathered or updated; DeepSpeed's own defaults keep 2 GB for the
# one and 4 GB for the others.
BUCKET = 50_000_000


Beta = Annotated[float, Field(ge=0, lt=1)]


class EngineSettings(Settings):
    """How the module is trained; what is not AdamW's own is DeepSpeed's.

    zero_stage: what ranks share out: 0 nothing, 1 optimiser state, 2 gradients too, 3 weights too. precision: bf16
    keeps fp32 master weights and adds gradients up in fp32; DeepSpeed shards the masters then, so that bf16 at stage 0
    runs as stage 1. clip: largest global gradient norm. weight_decay: of matrices only. ema_decay: keep a moving
    average of the weights. offload: optimiser state in the host's memory (ZeRO 1 to 3).
    """

    zero_stage: int = Field(1, ge=0, le=3)
    precision: Literal["fp32", "bf16"] = "fp32"
    clip: float | None = Field(None, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    ema_decay: float | None = Field(None, gt=0, lt=1)
    offload: bool = False

    @property
    def stage(self):
        """The ZeRO stage that DeepSpeed runs."""
        return max(1, self.zero_stage) if self.precision == "bf16" else self.zero_stage


@dataclass(frozen=True)
class Process:
    """This process among all of a run."""

    rank: int
    world_size: int
    device: torch.device


@dataclass(frozen=True)
class StepResult:
    """grad_norm: global, before clipping; not finite where skipped. skipped: nothing was updated, on any rank."""

    grad_norm: float
    learning_rate: float
    skipped: bool


def initialise(patience=None):
    """Join the processes of this run -> Process. Without a launcher: a run of one.

    patience: seconds after which a wait of one process for another is broken off; None: never. What is to be heard of
    sooner, and with the rank's name, is the watchdog's.

    Launchers (torchrun, launch/) set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; under srun they follow
    from SLURM's variables. NCCL on GPUs, gloo on CPUs. Calling it again returns the same Process. Raises UserError
    where the environment is set in part.
    """
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    deepspeed = _deepspeed()
    if "RANK" not in os.environ:
        os.environ.update(launcher_variables(os.environ))
    missing = [name for name in LAUNCHED_WITH if name not in os.environ]
    if len(missing) == len(LAUNCHED_WITH):
        alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        os.environ.update({name: str(value) for name, value in alone.items()})
    elif missing:
        raise UserError(
            f"environment: {', '.join(missing)} not set though other variables of a launcher are; start with torchrun "
            "or launch/local.py, or unset " + ", ".join(name for name in LAUNCHED_WITH if name in os.environ)
        )
    os.environ.setdefault("LOCAL_RANK", "0")
    if on_gpu:
        # A launcher may show each rank one GPU alone. DeepSpeed takes LOCAL_RANK for the number of a GPU as well.
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        os.environ["LOCAL_RANK"] = str(device.index)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        keep_freed_memory()
    if not dist.is_initialized() and not on_gpu:
        # Gloo's threads must end before the interpreter does, or it may abort a rank that is done.
        atexit.register(_leave)
    waits = NEVER if patience is None else timedelta(seconds=patience)
    deepspeed.init_distributed("nccl" if on_gpu else "gloo", auto_mpi_discovery=False, verbose=False, timeout=waits)
    return Process(dist.get_rank(), dist.get_world_size(), device)


def keep_freed_memory():
    """Let glibc keep the memory that tensors give back, where that is the C library.

    It would hand large blocks back to the kernel at once, and every step would pay for fresh pages: from a few per cent
    of its time to a third of it for large systems. What it costs is memory, up to two fifths more.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        most_maps, trim_threshold = -4, -1  # M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h
        mallopt(most_maps, 0)
        mallopt(trim_threshold, -1)  # never


def give_back_freed_memory():
    """Return once what has been freed so far, such as what building a model leaves between the tensors that stay."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def all_reduce(tensor, op=dist.ReduceOp.SUM):
    """Reduce a tensor over all ranks, in place; nothing to do where there is one process."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor, op=op)


def rank_and_size():
    """(rank, world size) of the processes joined so far; (0, 1) before."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather_objects(value):
    """The values of all ranks, by rank."""
    _, world_size = rank_and_size()
    if world_size == 1:
        return [value]
    values = [None] * world_size
    dist.all_gather_object(values, value)
    return values


class Engine:
    """A module under DeepSpeed. module: model and objectives together, the only thing wrapped; all of it is trained.

    steps: of the whole run, for the schedule. accumulation: micro-batches per step, the same on every rank.
    takes_forces: its forward calls torch.autograd.grad, and returns a loss or a tuple with the loss first; ZeRO 3 then
    gathers all weights at once, and saves no memory over ZeRO 2 while it computes.
    """

    def __init__(self, module, settings, schedule, steps, accumulation=1, takes_forces=False):
        self.settings, self.schedule, self.steps, self.accumulation = settings, schedule, steps, accumulation
        self.process = initialise()
        self.stage = settings.stage
        self.done = 0  # steps, skipped ones too
        self._backwards = 0  # micro-batches since the last step
        self.shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
        frozen = [name for name, p in module.named_parameters() if not p.requires_grad]
        if frozen:
            raise ValueError(f"parameter {frozen[0]} does not require a gradient; register constants as buffers")
        self._double = next(module.parameters()).dtype == torch.float64
        if self._double and self.stage > 0:
            raise ValueError("DeepSpeed trains a float64 module at zero_stage 0 and precision fp32 only")
        if settings.offload and self.stage == 0:
            raise UserError("engine.offload=true at engine.zero_stage=0; set engine.zero_stage to 1, 2 or 3")
        deepspeed = _deepspeed()
        self._origin, wrapped = None, module
        if self.stage == 3 and takes_forces:
            self._origin, wrapped = torch.zeros(1, device=self.process.device, requires_grad=True), Whole(module)
            deepspeed.utils.set_z3_leaf_modules(wrapped, [Whole])
        # Fused: the others need twice the weights' memory for what they compute in between.
        groups = _parameter_groups(module, settings.weight_decay)
        adamw = torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, eps=settings.eps, fused=True)
        with redirect_stdout(io.StringIO()):  # its bf16 optimiser of stage 1 prints memory tables
            self._wrapped, self._optimizer, _, _ = deepspeed.initialize(
                model=wrapped, optimizer=adamw, config=self._config(module)
            )
        # DeepSpeed reduces no float64, and copies all gradients to reduce them over one rank: backward() does.
        self._reduces = self._double or (self.stage == 0 and self.process.world_size == 1)
        self._wrapped.enable_backward_allreduce = not self._reduces
        self.module = module
        self._parameters = dict(module.named_parameters())
        self.adamw = getattr(self._optimizer, "optimizer", self._optimizer)
        self.masters = partition.masters(self._parameters, self._optimizer, self.stage)
        self.fragments = partition.fragments(self._parameters, self._optimizer, self.stage, self.process.rank)
        for flat in self.masters:
            # Now and not at the first step, so that a checkpoint can be loaded before it.
            self.adamw.state[flat] = {
                "step": torch.tensor(0.0, device=flat.device),  # there the fused AdamW wants it
                "exp_avg": torch.zeros_like(flat).detach(),
                "exp_avg_sq": torch.zeros_like(flat).detach(),
            }
        self.ema = None if settings.ema_decay is None else [flat.detach().clone() for flat in self.masters]
        give_back_freed_memory()

    def _config(self, module):
        settings = self.settings
        bucket = min(BUCKET, sum(p.numel() for p in module.parameters()))
        zero = {"stage": self.stage, "reduce_bucket_size": bucket}
        if self.stage == 3:
            limits = ("sub_group_size", "stage3_max_live_parameters", "stage3_max_reuse_distance")
            zero |= dict.fromkeys(limits, BUCKET)
        if settings.offload:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": self.process.device.type == "cuda"}
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": self.accumulation,
            # At stage 0 step() clips, because it needs the norm anyway.
            "gradient_clipping": settings.clip or 0.0 if self.stage > 0 else 0.0,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": settings.precision == "bf16"},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
            "steps_per_print": None,
        }

    def __call__(self, *args, **kwargs):
        """The module's forward. Under torch.no_grad() it may be called as often as needed between steps."""
        return self._wrapped(*args, **kwargs) if self._origin is None else self._wrapped(self._origin, *args, **kwargs)

    def train(self):
        self._wrapped.train()

    def eval(self):
        self._wrapped.eval()

    def backward(self, loss):
        """Add the gradient of this micro-batch's share of the global loss.

        The gradient of the global batch is the plain sum over ranks and micro-batches of the gradients of these.
        """
        if self._backwards == self.accumulation:
            raise RuntimeError(f"backward() once more than the {self.accumulation} micro-batches of a step")
        # A loss that is not finite may have a finite gradient: made NaN here, it spoils the reduced gradient on every
        # rank, which is what makes all of them skip the step. The world size undoes DeepSpeed's averaging over ranks.
        averaged_over = 1 if self._double else self.process.world_size
        scale = torch.where(torch.isfinite(loss.detach()), float(averaged_over), float("nan"))
        self._wrapped.backward(loss * scale.to(loss.dtype), scale_wrt_gas=False)
        self._backwards += 1
        if self._backwards < self.accumulation:
            self._wrapped.step()  # only counts
        elif self._reduces:
            for parameter in self._parameters.values():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)  # as DeepSpeed does
                all_reduce(parameter.grad)

    def step(self):
        """Update the weights from the gradients added up -> StepResult.

        A loss or gradient that is not finite on any rank leaves weights, optimiser state and moving average as they
        are, on all ranks.
        """
        if self._backwards != self.accumulation:
            raise RuntimeError(f"step() after {self._backwards} of {self.accumulation} micro-batches")
        rate = learning_rate(self.schedule, self.done, self.steps)
        for group in self.adamw.param_groups:
            group["lr"] = rate
        if self.stage == 0:
            norm = float(nn.utils.clip_grad_norm_(self.module.parameters(), self.settings.clip or float("inf")))
            skipped = not norm < float("inf")
            if skipped:
                self.module.zero_grad(set_to_none=True)  # without gradients AdamW leaves everything as it is
            self._wrapped.step()
        else:
            self._wrapped.step()
            norm, skipped = float(self._wrapped.get_global_grad_norm()), not self._wrapped.was_step_applied()
        if self.ema is not None and not skipped:
            with torch.no_grad():
                for mean, flat in zip(self.ema, self.masters, strict=True):
                    mean.lerp_(flat, 1 - self.settings.ema_decay)
        self._backwards = 0
        self.done += 1
        return StepResult(norm, rate, skipped)

    def gradients(self):
        """The full summed gradients by parameter name, on every rank, between the last backward() and step()."""
        from deepspeed.utils import safe_get_full_grad

        gradients = {}
        for name, parameter in self._parameters.items():
            if self.stage == 0:
                gradients[name] = parameter.grad.clone()
            elif self.stage == 3:
                gradients[name] = safe_get_full_grad(parameter).clone()
            else:
                # Not safe_get_full_grad: it prefers parameter.grad, which is not reduced at stage 1.
                gradients[name] = parameter.get_full_hp_grad()
        return gradients

    def state_tensors(self):
        """What is kept per element: kind (weight, exp_avg, exp_avg_sq and, if kept, ema) -> tensors as masters are."""
        state = [self.adamw.state[flat] for flat in self.masters]
        kinds = {"weight": self.masters} | {k: [s[k] for s in state] for k in ("exp_avg", "exp_avg_sq")}
        return kinds if self.ema is None else kinds | {"ema": self.ema}

    def fragment_state(self, fragment):
        """kind -> this fragment's elements [length], views."""
        return {kind: fragment.of(tensors) for kind, tensors in self.state_tensors().items()}

    def buffers(self):
        """The module's persistent buffers by name."""
        persistent = self.module.state_dict().keys()
        return {name: buffer for name, buffer in self.module.named_buffers() if name in persistent}

    @property
    def updates(self):
        """Steps that were taken, by AdamW's count."""
        return int(self.adamw.state[self.masters[0]]["step"])

    @updates.setter
    def updates(self, count):
        for flat in self.masters:
            self.adamw.state[flat]["step"].fill_(count)

    def refresh(self):
        """Bring the working weights up to date after the masters were changed from outside; all ranks call it."""
        partition.refresh_working_weights(self._optimizer, self.stage)

    @torch.no_grad()
    def weights(self, ema=False):
        """Full float32 state of the module, or its moving average, on rank 0's CPU; None elsewhere. All ranks call it.

        One parameter at a time passes through the ranks' memory.
        """
        kind, leads = "ema" if ema else "weight", self.process.rank == 0
        own = {fragment.name: fragment for fragment in self.fragments}
        state = {}
        for name, shape in self.shapes.items():
            full = torch.zeros(shape, dtype=self.masters[0].dtype, device=self.process.device)
            if name in own:
                piece = own[name]
                full.view(-1)[piece.start : piece.start + piece.length] = self.fragment_state(piece)[kind]
            if self.stage > 0 and self.process.world_size > 1:
                dist.reduce(full, dst=0)
            if leads:
                state[name] = full.cpu()
        state |= {name: buffer.cpu().clone() for name, buffer in self.buffers().items()}
        return state if leads else None

    @contextmanager
    def ema_weights(self):
        """Inside, the module computes with the moving average of the weights; for evaluation. All ranks enter it."""
        self._exchange_ema()
        try:
            yield
        finally:
            self._exchange_ema()

    @torch.no_grad()
    def _exchange_ema(self):
        for mean, flat in zip(self.ema, self.masters, strict=True):
            kept = flat.clone()
            flat.copy_(mean)
            mean.copy_(kept)
        self.refresh()


def _parameter_groups(module, weight_decay):
    """Matrices decay; biases, norms, scales and embeddings do not."""
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    decays = {True: [], False: []}
    for parameter in module.parameters():
        decays[parameter.ndim > 1 and id(parameter) not in embeddings].append(parameter)
    groups = [
        {"params": decays[True], "weight_decay": weight_decay},
        {"params": decays[False], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _deepspeed():
    """Import DeepSpeed, quiet and without what costs time: the shared-memory extension that it would compile for a
    minute, and the compiler that its Muon, an optimiser which it looks for at every start, would load for seconds.
    """
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)
    import deepspeed
    import deepspeed.ops
    from deepspeed.runtime import compiler
    from deepspeed.utils import logger

    published, compiler.compile = compiler.compile, lambda: lambda function: function
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer
    finally:
        compiler.compile = published
    logger.setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _leave():
    if dist.is_initialized():
        dist.destroy_process_group()
