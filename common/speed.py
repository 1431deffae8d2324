"""What a step costs: its floating-point operations, its time, its memory; a trace of a few.

Each function takes the stream of view pairs of a run and gives it back unchanged, so that what is
measured is the training loop itself. FLOPs are those of convolutions and matrix products, a
multiplication and an addition counting as two, as published peaks count them.
"""

import platform
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import profile, record_function
from torch.utils.flop_counter import FlopCounterMode

Views = tuple[Tensor, Tensor]

# FLOP/s of dense bfloat16 and float16 products with float32 sums, by the device's whole name: a
# laptop's, a slice's (MIG) or a cut-down version's is another figure. TF32, which `fp32` runs have
# in their convolutions, is half of it on all.
_A100 = 312e12  # NVIDIA A100 data sheet: SXM and PCIe alike
_H100 = 1979e12 / 2  # nvidia.com/data-center/h100 and /h200 print twice this, "with sparsity"
_NVL = 1671e12 / 2  # the same pages, for the H100 NVL and the H200 NVL
PEAKS = {
    "NVIDIA H200": _H100,
    "NVIDIA H200 NVL": _NVL,
    "NVIDIA H100 80GB HBM3": _H100,
    "NVIDIA H100 NVL": _NVL,
    "NVIDIA H100 PCIe": 1513e12 / 2,  # NVIDIA H100 data sheet: 1513 with sparsity
    "NVIDIA A100-SXM4-80GB": _A100,
    "NVIDIA A100-SXM4-40GB": _A100,
    "NVIDIA A100 80GB PCIe": _A100,
    "NVIDIA A100-PCIE-40GB": _A100,
    # NVIDIA L40S data sheet: 733 with sparsity; its 362.05 without fits neither that nor TF32's 183
    "NVIDIA L40S": 733e12 / 2,
    "NVIDIA GeForce RTX 4090": 165.2e12,  # NVIDIA Ada architecture white paper
}


def peak_flops(device: str, precision: str) -> float | None:
    """The FLOP/s that `device` has at most in a run's precision; None where that is not known."""
    share = {"bf16": 1.0, "fp16": 1.0, "fp32": 0.5}.get(precision)
    peak = PEAKS.get(device)
    return peak * share if peak and share else None


def peak_memory_gb() -> float:
    """The most memory that was in use so far: the GPU's, or this process's on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 2**30 if platform.system() == "Darwin" else 2**20  # kilobytes on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return "MPS" if torch.backends.mps.is_available() else "CPU"


def counted(stream: Iterator[Views], tell: Callable[[float], None]) -> Iterator[Views]:
    """`stream`; the FLOPs per pair of the step taken with its first pair go to `tell`.

    All of that step: both networks, forward and backward, loss, and the second forward of cached
    chunks.
    """
    for views in islice(stream, 1):
        with FlopCounterMode(display=False) as counter:
            yield views
        tell(counter.get_total_flops() / len(views[0]))
    yield from stream


def profiled(
    stream: Iterator[Views], target: Path, skip: int = 3, count: int = 3
) -> Iterator[Views]:
    """`stream`; a trace of `count` steps, after `skip` to warm up, is written to `target`."""
    yield from islice(stream, skip)
    with profile() as profiler:
        for i in range(count):
            with record_function("data"):
                views = next(stream, None)
            if views is not None:
                with record_function(f"step {skip + i}"):
                    yield views
    profiler.export_chrome_trace(str(target))
    yield from stream


# ---- before a run --------------------------------------------------------------------------------


@dataclass
class Trial:
    """What a few steps took on each of the processes."""

    steps: int
    seconds: float
    waited: float  # seconds of these, for data
    pairs: int  # of this process, in a step
    fixed_gb: float  # weights, gradients and momentum; the rest of the peak goes with the batch
    flops: float = 0.0  # per pair

    @property
    def rate(self) -> float:
        """Pairs/s of this process."""
        return self.steps * self.pairs / self.seconds


def tried(
    stream: Iterator[Views],
    trained: int,
    tell: Callable[[Trial], None],
    warm: int = 3,
    steps: int = 10,
) -> Iterator[Views]:
    """`stream` for `steps` steps, after `warm` untimed ones; what they cost goes to `tell`.

    Args:
        trained: bytes of the parameters that are trained.
    """
    gpu = torch.cuda.is_available()
    fixed = (torch.cuda.memory_allocated() if gpu else 0) + 2 * trained
    flops: list[float] = []
    stream = counted(stream, flops.append)
    views = None
    for views in islice(stream, warm):
        yield views
    trial = Trial(0, 0.0, 0.0, 0 if views is None else len(views[0]), fixed / 2**30)
    _synchronize()
    if gpu:
        torch.cuda.reset_peak_memory_stats()  # cudnn tried its ways, some with much scratch memory
    began = time.perf_counter()
    while trial.steps < steps:
        asked = time.perf_counter()
        views = next(stream, None)
        trial.waited += time.perf_counter() - asked
        if views is None:
            break
        yield views
        trial.steps += 1
    _synchronize()
    trial.seconds, trial.flops = time.perf_counter() - began, sum(flops)
    tell(trial)


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def trained_parameters(*parts: object) -> list[nn.Parameter]:
    """Those with gradients of the modules among `parts`."""
    modules = [part for part in parts if isinstance(part, nn.Module)]
    return [p for module in modules for p in module.parameters() if p.requires_grad]


def report(trial: Trial, *, precision: str, parameters: int, total: int, processes: int) -> str:
    """What a run of `total` steps takes, by a trial on `processes` processes, as lines to print."""
    if not trial.steps:
        return f"a run of {total} steps is over before it can be measured: just start it"
    peak, most = peak_memory_gb(), peak_flops(device_name(), precision)
    achieved = trial.rate * trial.flops
    used = f", {achieved / most:.1%} of its peak" if most else ""
    memory = f"{peak:.2f} GB at {trial.pairs:,} pairs a process, {precision}"
    if torch.cuda.is_available():
        there = torch.cuda.get_device_properties().total_memory / 2**30
        each = (peak - trial.fixed_gb) / trial.pairs
        fits = int((0.9 * there - trial.fixed_gb) / each)  # the rest: context and fragments
        memory += f"; {there:.0f} GB there are, about {fits:,} pairs fit"
    else:
        memory += ", images included; which batch fits is measured on a GPU only"
    alone = total * trial.pairs * processes / trial.rate
    times = [f"{duration(alone / n)} with {n}" for n in sorted({1, 2, 4, 8, processes})]
    lines = {
        "parameters": f"{parameters / 1e6:.2f} million trained",
        "operations": f"{trial.flops / 1e9:.2f} GFLOP a pair",
        "memory": memory,
        "speed": f"{trial.rate * processes:,.1f} pairs/s, {processes} x {device_name()}, "
        f"{achieved / 1e12:.3g} TFLOP/s each{used}; "
        f"{trial.waited / trial.seconds:.1%} of the time waiting for data",
        "time": f"{total:,} steps: {', '.join(times)} processes, if nothing is lost in sharing",
    }
    return "\n".join(f"{name:<12}{line}" for name, line in lines.items())


def duration(seconds: float) -> str:
    """Two significant units: 45 s, 12 min, 3.4 h, 5.1 days."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
