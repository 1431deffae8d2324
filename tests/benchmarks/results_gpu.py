"""The CIFAR-10 table on a GPU: every row that is missing, in order, without anybody watching.

    make results-gpu
    python tests/benchmarks/results_gpu.py --data uoft-cs/cifar10 --budget-minutes 120 --only moco

Each job pretrains, judges and adds its rows to `results/`, from which RESULTS.md is made. A row
that is there is not measured again; stopped anywhere, the queue goes on where it was. The output of
all commands of a job is kept beside its run, in OUT/NAME.log.
"""

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from common import cli
from common.encoders import CIFAR
from common.errors import UserError
from eval.results.page import read_folder
from eval.results.record import Result


@dataclass(frozen=True)
class Settings:
    """Measure the rows of the CIFAR-10 table that are missing."""

    data: str = "uoft-cs/cifar10"  # where the images are, as everywhere
    out: str = "runs/results-gpu"  # a folder for each run and its log
    keep: str = "results"  # the rows that there are, and will be
    budget_minutes: float = 0.0  # stop after so long, 0: when all is done
    only: str = ""  # jobs whose name holds this, e.g. byol, 200ep, seed2, r50
    cpu: bool = False  # go on without a GPU


@dataclass(frozen=True)
class Job:
    """One run and how it is judged."""

    method: str
    recipe: str
    epochs: int
    seed: int = 1
    arch: str = "resnet18"
    batch_size: int = 512
    supervised: bool = False  # judge the supervised baseline of this run instead
    flags: tuple[str, ...] = ("--precision", "bf16")

    @property
    def run(self) -> str:
        """The run's name; a supervised baseline is judged beside its run."""
        arch = self.arch.replace("resnet", "r")
        return f"{self.method}-{self.recipe}-{arch}-{self.epochs}ep-seed{self.seed}"

    @property
    def name(self) -> str:
        return self.run + "-supervised" * self.supervised

    def pretraining(self, data: str, folder: Path) -> list[str]:
        given = {"data": data, "out": folder, "epochs": self.epochs, "seed": self.seed}
        given |= {"arch": self.arch, "batch-size": self.batch_size}
        words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
        return [f"{self.method}.pretrain", self.recipe, *words, *self.flags]

    def judgements(self, folder: Path) -> dict[tuple[str, str, int], list[str]]:
        """(task, protocol, layer) to the command that measures it.

        Every method by its own linear protocol and by SimCLR's, so that methods compare; MoCo by
        kNN on its output as well, as its notebook has it.
        """
        run = str(folder)
        if self.supervised:  # weight decay and rate that are usual for ResNets on CIFAR-10
            usual = ["--batch-size", "128", "--base-lr", "0.2", "--weight-decay", "5e-4"]
            baseline = ["eval.finetune", run, "--weights", "random", "--epochs", str(self.epochs)]
            return {("finetune", "simclr", 0): [*baseline, *usual]}
        found = {("knn", "weighted", 0): ["eval.knn", run, "--k", "200"]}
        if self.method == "moco":
            found["knn", "weighted", -1] = [*found["knn", "weighted", 0], "--layer", "-1"]
        for protocol in dict.fromkeys((self.method, "simclr")):
            found["linear", protocol, 0] = ["eval.linear", run, "--protocol", protocol]
        return found


def all_methods(epochs: int, seed: int = 1) -> list[Job]:
    recipes = ("simclr", "cifar10"), ("moco", "cifar10"), ("moco", "cifar10-symmetric")
    return [Job(*names, epochs, seed) for names in (*recipes, ("byol", "cifar10"))]


QUEUE = [
    *all_methods(200),
    Job("simclr", "cifar10", 200, supervised=True),
    Job("simclr", "cifar10", 1000),  # as many epochs as the published rows
    Job("moco", "cifar10", 800),
    Job("moco", "cifar10-symmetric", 800),
    Job("byol", "cifar10", 1000),
    *all_methods(200, seed=2),
    *all_methods(200, seed=3),
    Job("simclr", "cifar10-r50", 200, arch="resnet50", batch_size=1024),
    Job("moco", "cifar10-symmetric", 200, arch="resnet50"),
    Job("byol", "cifar10", 200, arch="resnet50"),
    Job("simclr", "cifar10-r50", 1000, arch="resnet50", batch_size=1024),
]


def is_there(results: list[Result], job: Job, task: str, protocol: str, layer: int) -> bool:
    """Whether a kept result is this judgement of this job."""
    return any(
        (r.method, r.recipe, r.seed, r.epochs) == (job.method, job.recipe, job.seed, job.epochs)
        and (r.task, r.protocol, r.layer) == (task, protocol, layer)
        and r.subject == ("random" if job.supervised else "encoder")
        and r.settings.get("k", 200) == 200
        and (r.encoder or "").removesuffix(CIFAR) == job.arch
        for r in results
    )


def kept(folder: str) -> list[Result]:
    return [result for _, result in read_folder(Path(folder)) if isinstance(result, Result)]


class OutOfTime(Exception):
    """The budget is spent; what was begun goes on with the next call."""


def execute(command: list[str], log: Path, deadline: float) -> bool:
    """Run `python -m COMMAND`, its output added to `log`; whether it succeeded."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as file:
        print("$ python -m", *command, file=file, flush=True)
        child = subprocess.Popen(
            [sys.executable, "-m", *command], stdout=file, stderr=subprocess.STDOUT
        )
        try:
            return child.wait(max(0.0, deadline - time.monotonic())) == 0
        except subprocess.TimeoutExpired:
            raise OutOfTime from None
        finally:
            child.terminate()  # a run writes what it has, and stops
            try:
                child.wait(60)
            except subprocess.TimeoutExpired:
                child.kill()


def work(job: Job, settings: Settings, deadline: float) -> bool:
    """Measure what is missing of a job; whether nothing failed."""
    folder, log = Path(settings.out) / job.run, Path(settings.out) / f"{job.name}.log"
    results = kept(settings.keep)
    missing = [c for key, c in job.judgements(folder).items() if not is_there(results, job, *key)]
    if not missing:
        print(f"{job.name:<44} there", flush=True)
        return True
    began = time.monotonic()
    commands = [job.pretraining(settings.data, folder)]
    for command in missing:
        commands += [command, ["eval.compare", str(folder), "--keep", settings.keep]]
    for command in commands:
        if not execute(command, log, deadline):
            print(f"{job.name:<44} FAILED: {command[0]}, see {log}", flush=True)
            return False
    print(f"{job.name:<44} {(time.monotonic() - began) / 60:.1f} min", flush=True)
    return True


def main() -> None:
    settings = tyro.cli(Settings, prog="results_gpu.py", description=__doc__)
    if not (settings.cpu or torch.cuda.is_available()):
        raise UserError("no GPU: these rows are measured on one; --cpu to go on without")
    jobs = [job for job in QUEUE if settings.only in job.name]
    if not jobs:
        names = ", ".join(job.name for job in QUEUE)
        raise UserError(f"--only {settings.only}: none of {names}")
    budget = settings.budget_minutes * 60 or float("inf")
    deadline = time.monotonic() + min(budget, 1e9)
    done = []
    try:
        for job in jobs:
            done.append(work(job, settings, deadline))
    except OutOfTime:
        print(f"out of time at {jobs[len(done)].name}; the same command goes on from there")
    if not all(done):
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
