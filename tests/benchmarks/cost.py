"""What a run would cost on this machine, by a few steps of the method's own command.

    python tests/benchmarks/cost.py simclr imagenet --data SOURCE --precision bf16
    python tests/benchmarks/cost.py byol cifar10 --batch-size 512 --trace trace.json.gz
    accelerate launch --multi_gpu --num_processes 8 tests/benchmarks/cost.py moco imagenet

The first argument is the method; recipe and flags are those of METHOD.pretrain, and `--trace FILE`
writes three steps for chrome://tracing. FLOPs are those of convolutions and matrix products, a
multiplication and an addition counting as two, as published peaks count them; they are counted on
the first step alone, on which other operations may be chosen, and three steps warm up.
"""

import argparse
import importlib
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext, suppress
from itertools import islice
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from common import cli
from common.errors import UserError
from common.run import Run, peak_memory_gb
from common.views import ViewPairs

METHODS = ("simclr", "moco", "byol")
WARM, STEPS, TRACED = 3, 10, 3
synchronize = torch.accelerator.synchronize if torch.accelerator.is_available() else lambda: None

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


class Measured(Exception):
    """Enough steps were taken."""


def measure(method: str, argv: list[str], trace: str = "") -> dict[str, Any]:
    """The figures of one process; a trace of three more steps is written to `trace`."""
    found: dict[str, Any] = {}
    steps = Run.steps

    def measured(run: Run, pairs: ViewPairs) -> Iterator:
        if run.total_steps < WARM + STEPS + TRACED + 1:
            raise UserError(f"a run of {run.total_steps} steps is over before it can be measured")
        parts = [part for part in run.checkpoints.parts.values() if isinstance(part, nn.Module)]
        trained = [p.numel() for part in parts for p in part.parameters() if p.requires_grad]
        batch, processes = run.cfg.batch_size, run.accelerator.num_processes
        found.update(run=run, parameters=sum(trained), processes=processes)
        generator: Any = steps(run, pairs)
        with closing(generator) as stream:
            step = next(stream)
            with FlopCounterMode(display=False) as counter:
                yield step
            found["flops"] = counter.get_total_flops() * processes / batch  # of a pair
            yield from islice(stream, WARM - 1)
            synchronize()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()  # cudnn tried its ways, some with much memory
            began, waited = time.perf_counter(), 0.0
            for _ in range(STEPS):
                asked = time.perf_counter()
                step = next(stream)
                waited += time.perf_counter() - asked
                yield step
            synchronize()
            seconds = time.perf_counter() - began
            found.update(rate=STEPS * batch / seconds, wait=waited / seconds, gb=peak_memory_gb())
            if trace:
                with profile() if run.main else nullcontext() as profiler:
                    yield from islice(stream, TRACED)
                if profiler:
                    profiler.export_chrome_trace(trace)
            run.accelerator.wait_for_everyone()
        raise Measured

    program = importlib.import_module(f"{method}.pretrain")
    with tempfile.TemporaryDirectory() as out, patch.object(Run, "steps", measured):
        argv = [*argv, "--out", out, "--knn-every", "0", "--save-every", "0", "--trackers"]
        with suppress(Measured):
            program.main(*cli.parse(method, program.Config, program.RECIPES, argv))
    return found


def report(found: dict[str, Any]) -> str:
    """The figures as lines to print."""
    run, processes, rate = found["run"], found["processes"], found["rate"]
    precision, batch = run.run_cfg.precision, run.cfg.batch_size
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    achieved, most = rate / processes * found["flops"], peak_flops(device, precision)
    share = f", {achieved / most:.1%} of its peak" if most else ""
    hours = run.total_steps * batch / (rate / processes) / 3600
    times = [f"{hours / n:,.3g} h with {n}" for n in sorted({1, 2, 4, 8, processes})]
    lines = {
        "parameters": f"{found['parameters'] / 1e6:.2f} million trained",
        "operations": f"{found['flops'] / 1e9:.4g} GFLOP a pair",
        "memory": f"{found['gb']:.2f} GB at {batch // processes:,} pairs a process, {precision}",
        "speed": f"{rate:,.1f} pairs/s, {processes} x {device}, {achieved / 1e12:.3g} TFLOP/s "
        f"each{share}; {found['wait']:.1%} of the time waiting for views",
        "time": f"{run.total_steps:,} steps: {', '.join(times)} processes, if sharing is free",
    }
    return "\n".join(f"{name:<12}{line}" for name, line in lines.items())


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, usage=__doc__)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--trace", default="")
    options, argv = parser.parse_known_args()
    found = measure(options.method, argv, options.trace)
    if found["run"].main:
        print(report(found))


if __name__ == "__main__":
    cli.run(main)
