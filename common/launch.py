"""Starting the processes of a run, stopping them together, and where a result comes from."""

import contextlib
import datetime
import os
import platform
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
import torchvision
from accelerate import Accelerator
from torch import Tensor, nn

from common.cli import world_size
from common.errors import UserError, first_line, printable

OVERRIDDEN = {  # variables by which Accelerate would change a run, and the flags that say it here
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "--batch-size is that of a whole step"),
    "ACCELERATE_MIXED_PRECISION": ("no", "--precision says it"),
    "ACCELERATE_DYNAMO_BACKEND": ("no", "--compile says it"),
}
SHARDED = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG")


def launch(precision: str, one_thread: bool = False) -> Accelerator:
    """The accelerator of this process.

    On GPUs convolutions of float32 are TF32 (torch's default: 10 bits of mantissa), and the fastest
    of cudnn's; matrix products, and so views, similarities and LARS, are float32.

    Args:
        precision: of the networks; "bf16" and "fp16" are Accelerate's mixed precision.
        one_thread: compute on one thread, unless `OMP_NUM_THREADS` is set. Operations of a small
            network are so short that two threads mostly wait for each other at barriers, and where
            another process takes a core they do little else (1,400 pairs/s fell to 40). With an
            accelerator, for which the CPU draws the views' parameters, it is always so: 5,000
            exponentials took 0.8 ms on the 16 threads beside an H200.

    Raises:
        UserError: another number of processes is linked than the environment says, or it asks for
            networks that are spread over processes.
    """
    for name in SHARDED:
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("1", "true"):
            raise UserError(
                f"ACCELERATE_USE_{name}: every process holds whole networks here; start them with "
                "accelerate launch --multi_gpu, or torchrun"
            )
    # they are removed, as a number of accumulated steps would divide the loss
    given = {name: os.environ.pop(name, own) for name, (own, _) in OVERRIDDEN.items()}
    accelerated = torch.cuda.is_available() or torch.backends.mps.is_available()
    mixed = precision if precision in ("bf16", "fp16") else "no"
    try:
        accelerator = Accelerator(cpu=not accelerated, mixed_precision=mixed)
    except ValueError as error:
        if "MASTER_" not in str(error):
            raise
        names = [name for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK") if name in os.environ]
        left = ", ".join(f"{name}={printable(os.environ[name])}" for name in names)
        raise UserError(
            f"{left}: in the environment without a launcher's MASTER_ADDR and MASTER_PORT; unset "
            "them, or start with accelerate launch or torchrun"
        ) from error
    if accelerator.num_processes != world_size():  # by which settings have been checked
        raise UserError(
            f"{accelerator.num_processes} processes are linked where WORLD_SIZE says "
            f"{world_size()}; start them with accelerate launch or torchrun"
        )
    for name, value in given.items():
        own, instead = OVERRIDDEN[name]
        if value.lower() not in (own, "") and accelerator.is_main_process:
            print(f"{name}={printable(value)} is not used: {instead}", file=sys.stderr)
    on_cpu = accelerator.device.type == "cpu"  # as `accelerate launch --cpu` may have it
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = True  # all steps have the same shapes
    if (one_thread or not on_cpu) and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    if on_cpu:
        # Once 31 MiB are freed, glibc keeps twice as much, and does not fault in what it gave back
        # a moment ago: views of large images take half the time (tests/benchmarks/NOTES.md).
        torch.empty(31 * 2**20, dtype=torch.uint8)
    return accelerator


def bfloat16_advice(precision: str, device: torch.device) -> list[str]:
    """A line on bfloat16, where a processor computes in it and float32 was asked for."""
    if device.type != "cpu" or precision != "fp32" or not fast_bfloat16():
        return []
    return [
        "faster, with coarser rounding: --precision bf16, in which this processor computes; "
        "ResNets were 1.3 to 1.9 times as fast (docs/gpus.md)"
    ]


def fast_bfloat16() -> bool:
    """Whether the processor multiplies in bfloat16, and adds in float32."""
    return bool(torch.cpu.get_capabilities().get("avx512_bf16"))


def record_cuda_graphs(
    network: nn.Module, views: Sequence[Tensor], accelerator: Accelerator
) -> None:
    """Record the forward and the backward pass of a network, each to be started by one call.

    A step of ResNet-18 at 32 px starts 583 kernels with SimCLR and more with the others, and most
    of them are over before the next is called (tests/benchmarks/NOTES.md, "On a GPU"). In training
    mode the network then runs its recording, which knows nothing of later hooks, of a second call
    before the backward pass, or of gradients that are accumulated. Its next call overwrites what it
    has returned.

    Args:
        network: of whose parameters and buffers the places stay; as `accelerator.prepare` gets it.
        views: as it is called with, (B, C, H, W) each: always so many of this shape and dtype.

    Raises:
        UserError: there is no CUDA device, a launcher has linked processes, or the network does
            what cannot be recorded, such as waiting for a value.
    """
    if accelerator.device.type != "cuda" or dist.is_initialized():
        raise UserError("--cuda-graphs: for one process on a CUDA device, without a launcher")
    network.to(accelerator.device)
    buffers = list(network.buffers())  # running statistics, which the passes before it move
    before = [buffer.clone() for buffer in buffers]
    views = [view.clone() for view in views]  # into which those of each step are copied
    precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    mixed = precision is not None
    try:
        with torch.autocast("cuda", precision, enabled=mixed, cache_enabled=False):
            torch.cuda.make_graphed_callables(network, tuple(views), allow_unused_input=True)
    except RuntimeError as error:
        why = printable(first_line(error))
        raise UserError(f"--cuda-graphs: this network cannot be recorded ({why})") from error
    for buffer, value in zip(buffers, before, strict=True):
        buffer.copy_(value)


# ---- stopping ------------------------------------------------------------------------------------


class StopSignal:
    """While open, SIGTERM and SIGINT ask for a stop after the step under way, not at once.

    All processes must stop after the same step, so after each step they agree on whether any has
    received a signal: one integer over gloo, by the CPU, so that no GPU is waited for. On two CPU
    processes that takes 0.2 ms a step (measured by tests/benchmarks/overhead.py); one process alone
    just looks at its own.
    """

    def __init__(self, world_size: int) -> None:
        self.received = 0
        self.group: Any = dist.new_group(backend="gloo") if world_size > 1 else None

    def __enter__(self) -> "StopSignal":
        self.before = {s: signal.signal(s, self._receive) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self.received = signum
        if self.group is None:  # a second signal kills; not under a launcher, which sends it twice
            for known in self.before:
                signal.signal(known, signal.SIG_DFL)

    def agreed(self) -> int:
        """The signal that any process has received, or 0. All processes must call."""
        if self.group is None:
            return self.received
        signum = torch.tensor(self.received)
        dist.all_reduce(signum, dist.ReduceOp.MAX, group=self.group)
        return int(signum)


# ---- provenance ----------------------------------------------------------------------------------


def provenance(world_size: int) -> dict[str, Any]:
    """What a result must name: command, commit, versions, machine, time."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"python -m {spec.name.removesuffix('.__main__')}" if spec else sys.argv[0]
    gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if gpu else f"CPU ({os.cpu_count()} cores)"
    return {
        "command": shlex.join([*program.split(), *sys.argv[1:]]),
        "commit": commit(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        },
        "device": device,
        "processes": world_size,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def commit() -> str:
    """The git commit of this code, `+` where it differs; outside a checkout `GIT_COMMIT`, or
    "unknown".

    Records are not code: measuring again changes those that are there.
    """
    here = Path(__file__).resolve().parent.parent

    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", here, *args], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    with contextlib.suppress(OSError):
        if head := git("rev-parse", "--short=12", "HEAD"):
            changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results")
            return head + ("+" if changed else "")
    return os.environ.get("GIT_COMMIT") or "unknown"
