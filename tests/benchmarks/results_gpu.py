"""What RESULTS.md should say about a GPU, measured stage by stage, without anybody watching.

    make results-gpu                 # all of it, hours
    make results-gpu MINUTES=10      # as much as fits into ten minutes; the next call goes on
    python -m tests.benchmarks.results_gpu --list
    python -m tests.benchmarks.results_gpu --minutes 10 --only moco

First, is it right: each check of `right.py`. Then, how fast: some steps of the commands that a user
would call, on CIFAR-10 and on generated JPEGs of ImageNet's sizes. Then the rows of the CIFAR-10
table: each is pretrained and judged. With a limit of minutes a row has as many epochs as its
measured speed allows; a later call with more time measures it with more.

A stage leaves its records in `results/` as soon as it has them (`make results` then writes
RESULTS.md), and is passed over when they are there, and checks and speeds of this kind of GPU.
Stopped anywhere, the same command goes on. One that fails is named with its log, OUT/NAME.log, and
the next one begins; exit status 1 then.
"""

import contextlib
import fcntl
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
import tyro
from safetensors import SafetensorError, safe_open

import byol.config
import moco.config
import simclr.config
from common import cli
from common.encoders import full_name
from common.errors import UserError
from common.files import read_json, read_rows
from eval.results.compare import as_text, named, one_baseline, overview
from eval.results.page import (
    MEASUREMENT,
    RIGHT,
    keep_measurement,
    number,
    public,
    read_folder,
)
from eval.results.record import Result
from tests.benchmarks.jpegs import jpegs, make_folders
from tests.benchmarks.right import CHECKS

RECIPES = {
    "simclr": simclr.config.RECIPES,
    "moco": moco.config.RECIPES,
    "byol": byol.config.RECIPES,
}
IMAGENET = 1_281_167  # training images
GPUS = 8  # that the papers' schedules are extrapolated to
FILES = 4096  # generated JPEGs, as many as the largest batch; `images` of them differ
GRACE = 15  # seconds for a command to write what it has, when the time is up


@dataclass(frozen=True)
class Settings:
    """Measure what RESULTS.md lacks, on a GPU."""

    minutes: float = 0.0  # end within so many; 0: when all is done
    only: str = ""  # stages whose name holds this: right, speed-, row-moco, seed2
    again: str = ""  # measure these anew, at each call; else what is there is passed over
    list: bool = False  # show the stages and which are measured, and do nothing
    cpu: bool = False  # go on without a GPU, for a trial; it needs a --keep
    data: str = "uoft-cs/cifar10"  # where CIFAR-10 is, as everywhere
    out: str = "runs/results-gpu"  # a folder for runs, generated images and logs
    keep: str = "results"  # the records that there are, and will be
    flags: str = ""  # more for each pretraining, for a trial: --flags="--image-size 64"
    images: int = 2048  # different JPEGs to generate, about 110 kB each
    workers: int = os.cpu_count() or 1  # processes that decode them


@dataclass(frozen=True)
class Stage:
    """Something to measure once. The time left, in seconds, may decide about its size."""

    name: str
    needs: Callable[[float], float]  # seconds at least, with so many left; 0: its records are there
    measure: Callable[[float], None]  # until that time of `time.monotonic`


class Failed(Exception):
    """A stage did not come to its end; the text says why in one line."""


def execute(command: list[str], log: Path, deadline: float, most: float = 86_400) -> None:
    """Run `python -m COMMAND`, its output added to `log`, until the deadline.

    Args:
        most: seconds after which something must be wrong.

    Raises:
        Failed: it did not succeed, or took longer than `most`.
        TimeoutError: the deadline was before its end; what was begun goes on with the next call.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    until = min(deadline, began + most)
    with open(log, "a") as file:
        print("$ python -m", *command, file=file, flush=True)
        child = subprocess.Popen(  # a session of its own: Ctrl-C is passed on as one signal
            [sys.executable, "-m", *command],
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            close_fds=False,  # it holds what `alone` holds
        )
        try:
            status = child.wait(max(0.0, until - began))
        except subprocess.TimeoutExpired:
            if until == deadline:
                raise TimeoutError from None
            raise Failed(f"{command[0]} takes more than {most:.0f} s") from None
        finally:
            if child.poll() is None:
                child.terminate()  # a run writes what it has, and stops
                try:
                    child.wait(GRACE)
                except subprocess.TimeoutExpired:
                    os.killpg(child.pid, signal.SIGKILL)
                    child.wait()
    if status:
        last = log.read_text(errors="replace").replace("\r", "\n").strip().splitlines()[-1]
        raise Failed(f"{command[0]}: {last[:200]}")


def record_of(path: Path) -> dict | None:
    """The measurement in a file, if there is one; where there is a GPU, of this one."""
    content = read_json(path) if path.exists() else None
    whole = isinstance(content, dict) and content.keys() >= MEASUREMENT
    if not whole or not isinstance(content["figures"], dict):
        return None
    elsewhere = torch.cuda.is_available() and content["device"] != torch.cuda.get_device_name()
    return None if elsewhere else content


# ---- is it right ---------------------------------------------------------------------------------


def unchecked(again: bool, settings: Settings) -> dict[str, Path]:
    """The checks without a record, or all of them, and where their records will be."""
    paths = {check: Path(settings.keep) / f"right-{check}.json" for check in CHECKS}
    return {check: path for check, path in paths.items() if again or not record_of(path)}


def measure_right(again: bool, settings: Settings, deadline: float) -> None:
    """Make the checks in one process, each of which keeps its record at once."""
    missing, out = unchecked(again, settings), Path(settings.out)
    for path in missing.values():
        path.unlink(missing_ok=True)  # else an older one would stand for a check that fails
    given = ["--out", str(out / "right"), "--record-in", settings.keep]
    execute([RIGHT, *missing, *given], out / "right.log", deadline, most=60 * len(missing))


# ---- how fast ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A recipe for some steps; on generated ImageNet unless it is CIFAR-10's."""

    stage: str
    method: str
    recipe: str
    batch_size: int
    title: str
    steps: int = 40
    flags: tuple[str, ...] = ()

    @property
    def imagenet(self) -> bool:
        return self.recipe.startswith("imagenet")


def cifar(name: str, title: str, method: str, recipe: str = "cifar10") -> Case:
    title = f"{title}, CIFAR-10, R18, batch 512"
    return Case(f"speed-cifar10-{name}", method, recipe, 512, title, 120)


CIFAR = [
    cifar("simclr", "SimCLR", "simclr"),
    cifar("byol", "BYOL", "byol"),
    cifar("moco", "MoCo", "moco"),
    cifar("moco-symmetric", "symmetric MoCo", "moco", "cifar10-symmetric"),
]
WHOLE, CACHED = R50 = [
    Case("speed-r50-256", "simclr", "imagenet-100ep", 256, "SimCLR, R50 at 224 px, batch 256"),
    Case(
        "speed-r50-4096-cached", "simclr", "imagenet-100ep", 4096,
        "SimCLR, R50 at 224 px, batch 4096 in chunks of 256", 5, ("--grad-cache-chunk", "256"),
    ),
]  # fmt: skip
# Extrapolated to the recipes' epochs. Batches: the papers' N over eight GPUs. One process is one
# GPU's part of MoCo's BatchNorm groups.
SCHEDULES = [
    Case("speed-imagenet-simclr", "simclr", "imagenet", 512, "SimCLR, 512 a GPU"),
    Case(
        "speed-imagenet-moco", "moco", "imagenet", 32, "MoCo v2, 32 a GPU",
        flags=("--bn-splits", "1"),
    ),
    Case("speed-imagenet-byol", "byol", "imagenet", 512, "BYOL, 512 a GPU"),
]  # fmt: skip


def speed_command(case: Case, source: str, settings: Settings) -> list[str]:
    batch, count = case.batch_size, FILES if case.imagenet else 50_000
    given = {
        "data": source, "out": Path(settings.out) / case.stage, "batch-size": batch,
        "epochs": (case.steps + 0.5) * batch / count if case.method != "moco"
        else case.steps / (count // batch),
        "knn-every": 0, "save-every": 0, "log-every": max(1, case.steps // 10),
        "workers": settings.workers, "precision": "bf16",
    }  # fmt: skip
    if case.imagenet:
        given["memory-gb"] = 0  # decode every image every time
    return pretraining(case.method, case.recipe, given, case.flags, settings)


def pretraining(
    method: str, recipe: str, given: dict, flags: Iterable[str], settings: Settings
) -> list[str]:
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    return [f"{method}.pretrain", recipe, *words, *flags, *shlex.split(settings.flags)]


def measure_speed(case: Case, settings: Settings, deadline: float) -> None:
    """Run a case and keep its record."""
    source, images = settings.data, public(settings.data)
    if case.imagenet:
        source, images = jpegs(
            Path(settings.out), FILES, settings.images, settings.workers, deadline
        )
    out = Path(settings.out) / case.stage
    shutil.rmtree(out, ignore_errors=True)  # steps of a run that was stopped
    command = speed_command(case, source, settings)
    began = time.monotonic()
    execute(command, Path(settings.out) / f"{case.stage}.log", deadline, most=300)
    figures = figures_of_speed(case, out, time.monotonic() - began, settings)
    keep_measurement(
        Path(settings.keep) / f"{case.stage}.json",
        title="; ".join(part for part in (case.title, images, settings.flags) if part),
        command=public(shlex.join(["python", "-m", *command])),
        figures={name: round(value, 4) for name, value in figures.items()},
    )


def figures_of_speed(case: Case, out: Path, spent: float, settings: Settings) -> dict:
    """Medians of what the run recorded, its first step left out, which is a cold one."""
    cold, *rows = read_rows(out / "timings.jsonl")
    if not rows:
        raise Failed("too few steps to measure")
    run = read_json(out / "config.json")
    rate = median(row["pairs_per_second"] for row in rows)
    batch, before, warm = run["config"]["batch_size"], cold["step"], 0.0
    for row in rows:
        warm += (row["step"] - before) * batch / row["pairs_per_second"]
        before = row["step"]
    figures = {
        "pairs_per_second": rate,
        "data_wait": median(row["data_wait"] for row in rows),
        "peak_memory_gb": max(row["peak_memory_gb"] for row in rows),
        "batch_size": batch,
        # of the wall clock, all but warm steps: imports, images, the first step, the last writing
        "start_seconds": max(0.0, spent - warm),
    }
    if not case.imagenet:
        figures["seconds_per_epoch"] = run["images"] / rate
    whole = record_of(Path(settings.keep) / f"{WHOLE.stage}.json")
    if case.stage == CACHED.stage and whole:
        more = 100 * (whole["figures"]["pairs_per_second"] / rate - 1)
        figures["more_time_a_pair_percent"] = more
    if case.recipe == "imagenet":
        epochs = RECIPES[case.method][case.recipe][0].epochs
        figures["schedule_epochs"] = epochs
        figures[f"schedule_hours_on_{GPUS}"] = epochs * IMAGENET / rate / GPUS / 3600
    return figures


# ---- the CIFAR-10 table --------------------------------------------------------------------------

Key = tuple[str, str, int, int]  # task, protocol, layer and k of a judgement
# seconds that a judgement needs at least, where there is a limit: those of the slow protocols are
# not known, and they go on where they were
JUDGING = {"": 60, "protocols": 200, "supervised": 200}
R50_COST = 36.9 / 11.9  # seconds an epoch of R50 over R18's, on an A100 (dkobak/simclr-cifar10)


@dataclass(frozen=True)
class Row:
    """One run of CIFAR-10 and how it is judged."""

    method: str
    recipe: str
    sizes: tuple[int, ...]  # epochs, the most first; the first that fits
    seed: int = 1
    arch: str = "resnet18"
    batch_size: int = 512
    judging: str = ""  # quick; protocols: the papers' linear ones; supervised: the control
    flags: tuple[str, ...] = ("--precision", "bf16", "--knn-every", "20", "--save-every", "10")

    @property
    def name(self) -> str:
        epochs = f"{self.sizes[0]}ep" if len(self.sizes) == 1 else ""
        return "row-" + self._name(epochs, self.judging)

    def _name(self, epochs: str, judging: str = "") -> str:
        arch = self.arch.replace("resnet", "r")
        parts = [self.method, self.recipe, arch, epochs, f"seed{self.seed}", judging]
        return "-".join(part for part in parts if part)

    def folder(self, epochs: int, settings: Settings) -> Path:
        return Path(settings.out) / self._name(f"{epochs}ep")

    def command(self, epochs: int, settings: Settings) -> list[str]:
        given = {"data": settings.data, "out": self.folder(epochs, settings), "epochs": epochs}
        given |= {"seed": self.seed, "arch": self.arch, "batch-size": self.batch_size}
        return pretraining(self.method, self.recipe, given, self.flags, settings)

    def judgements(self, run: str, epochs: int) -> list[tuple[list[Key], list[str]]]:
        """What is measured, and the command that does, as `python -m eval` takes it.

        Every method by its own linear protocol and by SimCLR's, so that methods compare; MoCo by
        kNN on its output as well, as its notebook has it.
        """
        if self.judging == "supervised":  # decay and rate that are usual for ResNets on CIFAR-10
            usual = ["--batch-size", "128", "--base-lr", "0.2", "--weight-decay", "5e-4"]
            baseline = ["finetune", run, "--weights", "random", "--epochs", str(epochs)]
            return [([("finetune", "simclr", 0, 0)], [*baseline, *usual])]
        linear = ("features",) if not self.judging else dict.fromkeys((self.method, "simclr"))
        found = [
            ([("linear", protocol, 0, 0)], ["linear", run, "--protocol", protocol])
            for protocol in linear
        ]
        if self.judging:
            return found
        keys, output = [("knn", "weighted", 0, k) for k in (20, 200)], ("knn", "weighted", -1, 200)
        knn = [(keys, ["knn", run, "--k", "20", "200"])]
        if self.method == "moco":
            knn.append(([output], ["knn", run, "--k", "200", "--layer", "-1"]))
        return knn + found


def all_methods(*sizes: int, seed: int = 1, judging: str = "") -> list[Row]:
    recipes = ("simclr", "cifar10"), ("byol", "cifar10")
    recipes += ("moco", "cifar10"), ("moco", "cifar10-symmetric")
    return [Row(*names, sizes, seed, judging=judging) for names in recipes]


def with_protocols(*rows: Row) -> list[Row]:
    return [each for row in rows for each in (row, Row(**vars(row) | {"judging": "protocols"}))]


SIZES = 200, 100, 50
FIRST = all_methods(*SIZES)
LATER = [
    Row("simclr", "cifar10", SIZES, judging="supervised"),
    *all_methods(*SIZES, judging="protocols"),
    *with_protocols(
        Row("simclr", "cifar10", (1000,)),  # as many epochs as the published rows
        Row("moco", "cifar10", (800,)),
        Row("moco", "cifar10-symmetric", (800,)),
        Row("byol", "cifar10", (1000,)),
        *all_methods(200, seed=2),
        *all_methods(200, seed=3),
        Row("simclr", "cifar10-r50", (200,), arch="resnet50", batch_size=1024),
        Row("moco", "cifar10-symmetric", (200,), arch="resnet50"),
        Row("byol", "cifar10", (200,), arch="resnet50"),
        Row("simclr", "cifar10-r50", (1000,), arch="resnet50", batch_size=1024),
    ),
]


def kept(keep: str) -> list[Result]:
    return [result for _, result in read_folder(Path(keep)) if isinstance(result, Result)]


def there(results: list[Result], row: Row) -> set[tuple[float | None, Key]]:
    """(epochs, judgement) of the kept results that are of this row."""
    return {
        (r.epochs, (r.task, r.protocol, r.layer, r.settings.get("k") or 0))
        for r in results
        if (r.method, r.recipe, r.seed) == (row.method, row.recipe, row.seed)
        and r.subject == ("random" if row.judging == "supervised" else "encoder")
        and r.encoder == full_name(row.arch, "cifar")
        and r.run.get("batch_size", row.batch_size) == row.batch_size
        and r.epochs in row.sizes
    }


def missing(results: list[Result], row: Row, epochs: int, run: str = "") -> list[list[str]]:
    """The commands of the judgements that no kept result has."""
    found, judgements = there(results, row), row.judgements(run, epochs)
    return [command for keys, command in judgements if not {(epochs, k) for k in keys} <= found]


def seconds_of(row: Row, epochs: int, settings: Settings) -> float:
    """What a row would take, by its method's speed; infinity where that is not measured."""
    symmetric = "-symmetric" if row.recipe.endswith("symmetric") else ""
    path = Path(settings.keep) / f"speed-cifar10-{row.method}{symmetric}.json"
    record = record_of(path)
    if not record:
        return math.inf
    figures, cost = record["figures"], R50_COST if row.arch == "resnet50" else 1.0
    try:
        pretraining = epochs * cost * 1.08 * figures["seconds_per_epoch"]  # kNN and saving beside
        return pretraining + figures["start_seconds"] + JUDGING[row.judging]
    except (KeyError, TypeError):
        raise UserError(f"{path}: has no speed; remove it, and it is measured again") from None


def plan(row: Row, again: bool, settings: Settings, left: float) -> tuple[int, float]:
    """The epochs that a row is to have, and the seconds that it needs; (0, 0): it is there.

    A run that was begun goes on with its epochs; else they are the most that fit. A row is there
    if one with as many epochs is, or with any if none fits.
    """
    results = [] if again else kept(settings.keep)
    most = max((e for e in row.sizes if not missing(results, row, e)), default=0)
    for epochs in row.sizes if row.judging or not again else ():
        begun = (row.folder(epochs, settings) / "config.json").exists()
        if begun and missing(results, row, epochs):
            return (0, 0) if most > epochs else (epochs, JUDGING[row.judging])
    costs = {epochs: seconds_of(row, epochs, settings) for epochs in row.sizes}
    epochs = next((e for e, cost in costs.items() if cost <= left), 0)
    return (0, 0) if most and most >= epochs else (epochs, costs.get(epochs, math.inf))


def measure_row(row: Row, again: bool, settings: Settings, deadline: float) -> None:
    """Pretrain a row, unless that is done, and judge it; each judgement is kept at once."""
    epochs, _ = plan(row, again, settings, deadline - time.monotonic())
    if not epochs:  # the last moment in which it fitted is over
        raise TimeoutError
    folder, log = row.folder(epochs, settings), Path(settings.out) / f"{row.name}.log"
    if again and not row.judging:
        shutil.rmtree(folder, ignore_errors=True)
    if not is_finished(folder):
        execute(row.command(epochs, settings), log, deadline)
    words = ["eval"]  # all in one process, whose start takes as long as a judgement
    results = [] if again else kept(settings.keep)
    for command in missing(results, row, epochs, str(folder)):
        words += [*command, "--", "compare", str(folder), "--keep", settings.keep, "--"]
    execute(words[:-1], log, deadline)


def is_finished(folder: Path) -> bool:
    """Whether a run's encoder is that of its last step."""
    if not (path := folder / "encoder.safetensors").exists():
        return False
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("finished") == "true"
    except SafetensorError:
        return False  # whoever judges it says so


# ---- the stages ----------------------------------------------------------------------------------


def stages(settings: Settings) -> list[Stage]:
    """All stages in order; with a limit, what ImageNet would cost comes after the rows."""

    def is_again(name: str) -> bool:
        return bool(settings.again) and settings.again in name

    def simple(name: str, seconds: float, measure: Callable[[float], None]) -> Stage:
        path, anew = Path(settings.keep) / f"{name}.json", is_again(name)
        return Stage(name, lambda _: 0 if record_of(path) and not anew else seconds, measure)

    def speed(cases: list[Case]) -> list[Stage]:
        return [
            simple(case.stage, 60 if case.imagenet else 40, partial(measure_speed, case, settings))
            for case in cases
        ]

    def row_stage(row: Row) -> Stage:
        told = (row, is_again(row.name), settings)
        return Stage(row.name, lambda left: plan(*told, left)[1], partial(measure_row, *told))

    results = kept(settings.keep)
    told = (is_again("right"), settings)
    right = Stage("right", lambda _: 15 * len(unchecked(*told)), partial(measure_right, *told))
    first = sorted(FIRST, key=lambda row: bool(there(results, row)))  # without any figure: first
    table = [row_stage(row) for row in [*first, *LATER]]
    last = [*table, *speed(SCHEDULES)] if settings.minutes else [*speed(SCHEDULES), *table]
    return [right, *speed(CIFAR + R50), *last]


def work(stage: Stage, settings: Settings, deadline: float) -> str:
    """Measure a stage, unless it is there or the time is short; what became of it."""
    left = deadline - time.monotonic()
    if not (needed := stage.needs(left)):
        return "was there"
    if needed > left:
        return "no time"
    print(f"{stage.name} ...", flush=True)
    began, log = time.monotonic(), Path(settings.out) / f"{stage.name}.log"
    try:
        stage.measure(deadline)
    except TimeoutError:
        return "no time, begun"
    except (Failed, UserError, OSError) as error:
        return f"FAILED: {error}; see {log}"
    except Exception as error:  # what nobody thought of does not stop the queue either
        with open(log, "a") as file:
            traceback.print_exc(file=file)
        return f"FAILED: {type(error).__name__}: {error}; see {log}"
    return f"measured in {time.monotonic() - began:.0f} s"


def summary(outcomes: dict[str, str], settings: Settings) -> str:
    """What became of each stage, and the figures that there are."""
    lines = ["", *(f"{name:<56} {outcome}" for name, outcome in outcomes.items()), ""]
    names = [f"right-{check}" for check in CHECKS if "right" in outcomes]
    for name in [*names, *outcomes]:
        if record := record_of(Path(settings.keep) / f"{name}.json"):
            figures = (f"{k.replace('_', ' ')} {number(v)}" for k, v in record["figures"].items())
            lines.append(f"{name:<32} {'; '.join(figures)} ({record['device']})")
    rows = [row for row in FIRST + LATER if row.name in outcomes]
    if found := [r for r in kept(settings.keep) if any(there([r], row) for row in rows)]:
        lines += ["", as_text(overview(one_baseline(named(found))[0]))]
    return "\n".join(lines)


def check(settings: Settings) -> None:
    """Raise a UserError for a setting with which no stage would come to its end."""
    if not settings.minutes >= 0:
        raise UserError(f"--minutes {settings.minutes}: give 0, for no limit, or more")
    for flag, value in (("--images", settings.images), ("--workers", settings.workers)):
        if value < 1:
            raise UserError(f"{flag} {value}: give 1 or more")
    if settings.cpu and Path(settings.keep).resolve() == Path("results").resolve():
        raise UserError("--cpu: give another --keep; a record in results/ stands for one of a GPU")
    try:
        shlex.split(settings.flags)
    except ValueError as error:
        raise UserError(f"--flags {settings.flags}: {error}") from error


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder until this process and its commands have ended, in whatever way.

    Raises:
        UserError: another process holds it, whose runs this one would remove.
    """
    with open(folder / "lock", "a") as file:
        os.set_inheritable(file.fileno(), True)  # a command may outlive a process that is killed
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            what = "another measurement, or a command that one has left, goes on there"
            raise UserError(f"{folder}: {what}") from None
        yield


def main() -> None:
    settings = tyro.cli(Settings, prog="results_gpu.py", description=__doc__)
    check(settings)
    began = time.monotonic()
    deadline = began + settings.minutes * 60 - GRACE if settings.minutes else math.inf
    every = stages(settings)
    for flag, part in (("--only", settings.only), ("--again", settings.again)):
        if not any(part in stage.name for stage in every):
            raise UserError(f"{flag} {part}: in no stage's name; --list shows them")
    chosen = [stage for stage in every if settings.only in stage.name]
    if settings.list:
        for stage in chosen:
            left = deadline - began
            print(f"{stage.name:<56} {'not ' * bool(stage.needs(left))}measured")
        return
    if not (settings.cpu or torch.cuda.is_available()):
        raise UserError("no GPU: this is measured on one; --cpu --keep FOLDER to go on without")
    make_folders(keep=Path(settings.keep), out=Path(settings.out))
    with alone(Path(settings.out)):
        measure(chosen, settings, deadline)


def measure(chosen: list[Stage], settings: Settings, deadline: float) -> None:
    """Measure stages one after the other, and show what became of them."""
    for signum in (signal.SIGTERM, signal.SIGHUP):  # so that commands are ended, too
        if signal.getsignal(signum) is not signal.SIG_IGN:  # as under nohup
            signal.signal(signum, lambda signum, _: sys.exit(128 + signum))
    outcomes = dict.fromkeys((stage.name for stage in chosen), "not reached")
    try:
        for stage in chosen:
            outcomes[stage.name] = outcome = work(stage, settings, deadline)
            print(f"{stage.name:<56} {outcome}", flush=True)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        print(summary(outcomes, settings), flush=True)
    if any(outcome.startswith("FAILED") for outcome in outcomes.values()):
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
