"""How fast the real commands are on this machine, and what the papers' schedules would take on it.

    make speed-gpu
    python tests/benchmarks/gpu_speed.py --only imagenet- --steps 100

ImageNet is generated: JPEGs of its distribution of sizes, decoded by workers as the real ones are.
Each case is `python -m METHOD.pretrain`, as a user would call it, for some steps; its figures are
the medians of what the run itself recorded, and become a record in `results/`.
"""

import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import tyro
from PIL import Image

import byol.config
import moco.config
import simclr.config
from common import cli
from common.errors import UserError
from common.files import atomic_write_bytes, read_json
from common.launch import provenance
from eval.results.page import public

IMAGENET = 1_281_167  # training images
GPUS = 8
RECIPES = {
    "simclr": simclr.config.RECIPES,
    "moco": moco.config.RECIPES,
    "byol": byol.config.RECIPES,
}


@dataclass(frozen=True)
class Settings:
    """Time pretraining steps on generated JPEGs and on CIFAR-10."""

    steps: int = 100  # of each case; a large cached batch gets a fifth
    images: int = 8192  # JPEGs to generate, about 110 kB each
    cifar: str = "uoft-cs/cifar10"  # where CIFAR-10 is
    out: str = "runs/speed-gpu"  # a folder for the JPEGs, the runs and their logs
    keep: str = "results"  # a folder for the records
    only: str = ""  # cases whose name holds this
    workers: int = os.cpu_count() or 1  # that decode
    flags: str = ""  # more for each command, for a trial: --flags="--image-size 64"


@dataclass(frozen=True)
class Case:
    """A recipe for some steps; on generated ImageNet unless it is CIFAR-10's."""

    name: str
    method: str
    recipe: str
    batch_size: int
    title: str
    flags: tuple[str, ...] = ()
    share: float = 1.0  # of the steps asked for
    extrapolated: bool = False  # to the recipe's epochs of ImageNet on GPUS of these


# Batches: the papers' N over eight GPUs. One process is one GPU's part of MoCo's BatchNorm groups.
CASES = [
    Case("cifar10", "simclr", "cifar10", 512, "SimCLR, CIFAR-10, R18, batch 512", share=2.0),
    Case("r50-256", "simclr", "imagenet-100ep", 256, "SimCLR, R50 at 224 px, batch 256"),
    Case(
        "r50-4096-cached", "simclr", "imagenet-100ep", 4096,
        "SimCLR, R50 at 224 px, batch 4096 in chunks of 256", ("--grad-cache-chunk", "256"),
        share=0.2,
    ),
    Case("imagenet-simclr", "simclr", "imagenet", 512, "SimCLR, 512 a GPU", extrapolated=True),
    Case(
        "imagenet-moco", "moco", "imagenet", 32, "MoCo v2, 32 a GPU", ("--bn-splits", "1"),
        extrapolated=True,
    ),
    Case("imagenet-byol", "byol", "imagenet", 512, "BYOL, 512 a GPU", extrapolated=True),
]  # fmt: skip


# ---- images --------------------------------------------------------------------------------------


def draw_size(draw: np.random.Generator) -> tuple[int, int]:
    """Width and height: mostly 500 along the longer side, a few larger, 500 x 375 in the middle."""
    if draw.random() < 0.05:
        side = int(draw.uniform(600, 1200))
    else:
        side = 500 if draw.random() < 0.8 else int(draw.uniform(200, 500))
    other = round(side * draw.choice([0.667, 0.75, 0.75, 0.75, 0.8, 1.0]))
    return (side, other) if draw.random() < 0.75 else (other, side)


def generate(index: int, folder: Path) -> int:
    """One JPEG whose detail falls with its scale as a photograph's; its bytes."""
    draw = np.random.default_rng(index)
    width, height = draw_size(draw)
    picture = np.zeros((height, width, 3), np.float32)
    for cells, strength in ((4, 60), (16, 35), (64, 18), (width, 14)):
        rough = draw.normal(0, strength, (max(1, cells * height // width), cells, 3))
        for channel in range(3):
            layer = Image.fromarray(rough[..., channel].astype(np.float32))
            resized = layer.resize((width, height), Image.Resampling.BICUBIC)
            picture[..., channel] += np.asarray(resized)
    path = folder / f"{index:06}.jpg"
    Image.fromarray((picture + 128).clip(0, 255).astype(np.uint8)).save(path, quality=92)
    return path.stat().st_size


def jpegs(settings: Settings) -> tuple[Path, str]:
    """The folder of generated images, made once, and a line on what is in it."""
    folder = Path(settings.out) / f"jpegs-{settings.images}"
    known = folder.with_suffix(".txt")
    if not known.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with ProcessPoolExecutor(settings.workers) as pool:
            indices = range(settings.images)
            sizes = list(pool.map(partial(generate, folder=folder), indices, chunksize=16))
        mean = sum(sizes) / len(sizes) / 1000
        known.write_text(f"{settings.images:,} generated JPEGs, {mean:.0f} kB on average")
    return folder, known.read_text()


# ---- a case --------------------------------------------------------------------------------------


def command_of(case: Case, source: str, count: int, settings: Settings) -> list[str]:
    steps = max(2, round(settings.steps * case.share))
    batch = case.batch_size
    given = {
        "data": source, "out": Path(settings.out) / case.name, "batch-size": batch,
        "epochs": (steps + 0.5) * batch / count if case.method != "moco"
        else steps / (count // batch),
        "knn-every": 0, "save-every": 0, "log-every": max(1, steps // 10),
        "workers": settings.workers, "precision": "bf16",
    }  # fmt: skip
    if case.recipe != "cifar10":
        given["memory-gb"] = 0  # decode every image every time
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    more = [*case.flags, *shlex.split(settings.flags)]
    return [f"{case.method}.pretrain", case.recipe, *words, *more]


def measure(case: Case, source: str, count: int, images: str, settings: Settings) -> dict:
    """Run a case and make its record."""
    out = Path(settings.out) / case.name
    command = command_of(case, source, count, settings)
    log = Path(settings.out) / f"{case.name}.log"
    if not (out / "timings.jsonl").exists():
        with open(log, "w") as file:
            child = [sys.executable, "-m", *command]
            done = subprocess.run(child, stdout=file, stderr=subprocess.STDOUT)
        if done.returncode:
            last = log.read_text().strip().splitlines()[-1:]
            raise UserError(f"{case.name} failed: {' '.join(last)}; see {log}")
    text = (out / "timings.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()][1:]  # the first step is a cold one
    config = read_json(out / "config.json")["config"]
    figures = {
        name: median(row[name] for row in rows) for name in ("pairs_per_second", "data_wait")
    }
    figures["peak_memory_gb"] = max(row["peak_memory_gb"] for row in rows)
    figures["batch_size"] = config["batch_size"]
    rate = figures["pairs_per_second"]
    if case.recipe == "cifar10":
        figures["seconds_per_epoch"] = count / rate
    if case.extrapolated:
        epochs = RECIPES[case.method][case.recipe][0].epochs
        figures["schedule_epochs"] = epochs
        figures[f"schedule_hours_on_{GPUS}"] = epochs * IMAGENET / rate / GPUS / 3600
    here = provenance(1)
    return {
        "kind": "measurement",
        "title": f"{case.title}; {images}",
        "command": public(shlex.join(["python", "-m", *command])),
        "figures": {name: round(value, 4) for name, value in figures.items()},
        "device": here["device"],
        "commit": here["commit"],
    }


def main() -> None:
    settings = tyro.cli(Settings, prog="gpu_speed.py", description=__doc__)
    cases = [case for case in CASES if settings.only in case.name]
    if not cases:
        names = ", ".join(case.name for case in CASES)
        raise UserError(f"--only {settings.only}: none of {names}")
    Path(settings.out).mkdir(parents=True, exist_ok=True)
    for case in cases:
        if case.recipe == "cifar10":
            source, count, images = settings.cifar, 50_000, "CIFAR-10"
        else:
            folder, images = jpegs(settings)
            source, count = str(folder), settings.images
        record = measure(case, source, count, images, settings)
        target = Path(settings.keep) / f"speed-{case.name}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(target, (json.dumps(record, indent=1) + "\n").encode())
        shown = ", ".join(f"{name} {value:,.6g}" for name, value in record["figures"].items())
        print(f"{case.name}: {shown}", flush=True)


if __name__ == "__main__":
    cli.run(main)
