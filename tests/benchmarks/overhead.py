"""How much of a training step is neither forward nor backward, on a CPU.

    python tests/benchmarks/overhead.py
    python tests/benchmarks/overhead.py --keep results    # also write results/overhead-cpu.json

Each method's own command: ResNet-18 with the CIFAR stem, batch 256, the embedded images of 32 px.
Forward is the time in networks, backward that in `Accelerator.backward`; the rest is views, losses,
optimizer, moving average, queue, shuffle and logging, here of every step. Medians over the steps.
With several processes a step has one thing more: they agree on whether a signal asks to stop.
"""

import argparse
import importlib
import json
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from common import cli
from common.errors import UserError
from common.launch import StopSignal
from common.run import Run
from common.views import ViewPairs
from eval.results.page import keep_measurement

METHODS = {"simclr": "SimCLR", "moco": "MoCo", "byol": "BYOL"}
WARM, STEPS = 2, 6  # the first step is counted and pictured, the last one saved
FLAGS = "cifar10 --data demo --batch-size 256 --log-every 1 --knn-every 0 --precision fp32"


class Stopwatch:
    """Seconds between `enter` and `leave`, those within others once."""

    def __init__(self) -> None:
        self.seconds, self.depth, self.began = 0.0, 0, 0.0

    def enter(self, *_: Any) -> None:
        if self.depth == 0:
            self.began = time.perf_counter()
        self.depth += 1

    def leave(self, *_: Any) -> None:
        self.depth -= 1
        if self.depth == 0:
            self.seconds += time.perf_counter() - self.began


def measure(method: str, out: Path, flags: str) -> dict[str, float]:
    """Seconds of a step, its share that is overhead, and the part of that for the views."""
    watch = Stopwatch()
    marks: list[tuple[float, float]] = []  # at each step's start: the clock, and the stopwatch
    steps, backward = Run.steps, Accelerator.backward

    def marked(run: Run, pairs: ViewPairs) -> Iterator:
        for step in steps(run, pairs):
            marks.append((time.perf_counter(), watch.seconds))
            yield step

    def timed(accelerator: Accelerator, loss: Tensor) -> None:
        watch.enter()
        backward(accelerator, loss)
        watch.leave()

    program = importlib.import_module(f"{method}.pretrain")
    hooks = [
        register_module_forward_pre_hook(watch.enter),
        register_module_forward_hook(watch.leave),
    ]
    argv = [*flags.split(), "--out", str(out)]
    with (
        patch.object(Run, "steps", marked),
        patch.object(Accelerator, "backward", timed),
        patch.object(program, "total_steps", lambda *_: STEPS),
    ):
        program.main(*cli.parse(method, program.Config, program.RECIPES, argv))
    for hook in hooks:
        hook.remove()

    spans = [(now - then, inside - was) for (then, was), (now, inside) in pairwise(marks)][WARM:]
    timings = [json.loads(line) for line in (out / "timings.jsonl").read_text().splitlines()]
    return {
        "step": median(whole for whole, _ in spans),
        "overhead": median(1 - inside / whole for whole, inside in spans),
        "views": median(row["data_wait"] for row in timings[WARM:-1]),
    }


def agreement_ms(processes: int = 2, count: int = 2000) -> float:
    """Milliseconds in which linked CPU processes agree once (`StopSignal.agreed`): the median."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, context.Pool(processes) as pool:
        work = [(rank, processes, folder, count) for rank in range(processes)]
        return 1000 * max(pool.starmap(agree, work, chunksize=1))


def agree(rank: int, world_size: int, folder: str, count: int) -> float:
    """Seconds of one agreement, of one of the processes: the median."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world_size)
    seconds = []
    with StopSignal(world_size) as stop:
        for _ in range(count):
            dist.barrier(stop.group)  # as after a step, which ends on all at about the same time
            began = time.perf_counter()
            stop.agreed()
            seconds.append(time.perf_counter() - began)
    dist.destroy_process_group()
    return median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="also write a record there")
    options = parser.parse_args()
    if torch.accelerator.is_available():
        raise UserError("overhead: of a CPU only; an accelerator's parts overlap (cost.py --trace)")
    figures: dict[str, dict[str, float]] = {}
    for method, name in METHODS.items():
        with tempfile.TemporaryDirectory() as folder:
            found = measure(method, Path(folder) / "run", FLAGS)
        print(
            f"{name:<8}{found['step']:.2f} s a step, {found['overhead']:.2%} of it neither "
            f"forward nor backward: {found['views']:.2%} views",
            flush=True,
        )
        figures[name] = {
            "a step (s)": round(found["step"], 3),
            "neither forward nor backward (%)": round(100 * found["overhead"], 3),
            "of it views (%)": round(100 * found["views"], 3),
        }
    agreement = agreement_ms()
    print(f"{'stop':<8}{agreement:.3f} ms a step for two processes to agree on whether to stop")
    figures["two processes"] = {"agree whether to stop (ms)": round(agreement, 4)}
    if options.keep:
        path = options.keep / "overhead-cpu.json"
        title = "share of a step that is overhead: R18, CIFAR stem, 32 px, batch 256"
        keep_measurement(path, title, "python tests/benchmarks/overhead.py", figures)
        print(f"wrote {path}")


if __name__ == "__main__":
    cli.run(main)
