"""What takes memory, beside the formulas that predict it; and what a run holds epoch after epoch.

    PYTHONPATH=. python tests/benchmarks/memory.py

The table is of images in memory, a batch on its way through CPU workers, a checkpoint and an
encoder being written, and features that an evaluation keeps. Each row is measured in a process of
its own, by resident memory (Linux): `kept` is what stays, `peak` the most above what was there
before. Below it is what the process of a tiny run holds after some of its epochs.
"""

import argparse
import contextlib
import ctypes
import gc
import io
import math
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.multiprocessing.reductions import shared_cache

import simclr.pretrain
from common import cli
from common.checkpoints import Checkpoints, tensors_in
from common.data import ImageSplit
from common.errors import UserError
from common.run import Run
from common.views import ViewPairs
from eval.encoder import Preprocess
from eval.features import cached, encode
from simclr.augment import views
from simclr.config import IMAGENET_100

MB = 2**20
PREFETCHED = 2  # batches of each worker that wait; DataLoader's default
SIZES = [(400, 533), (533, 400), (400, 400), (300, 640)]  # of photographs, height and width


@dataclass(frozen=True)
class Row:
    """A line of the table; bytes."""

    what: str
    formula: str
    predicted: float
    measured: float


# ---- measuring -----------------------------------------------------------------------------------


def status(name: str) -> int:
    """Bytes that /proc says of this process, e.g. "VmRSS"."""
    lines = Path("/proc/self/status").read_text().splitlines()
    [line] = [line for line in lines if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


def measured(
    function: Callable[[], Any], first: Callable[[], Any] | None = None
) -> tuple[Any, int, int]:
    """What `function` returns; the bytes kept since, and the most in between.

    Args:
        first: called before, and forgotten: the code that it loads is not counted, and memory that
            was freed has to be taken anew. Without it, freed memory is used as it is in a run.
    """
    if first:
        first()
        trim()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM is counted from here
    before = status("VmRSS")
    result = function()
    peak = status("VmHWM") - before
    if first:
        trim()
    return result, status("VmRSS") - before, peak


def trim() -> None:
    """Give back what is not in use; glibc would keep it, to be used again."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def in_a_process(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` in a fork of this process, whose memory nothing has been through.

    Raises:
        UserError: it failed; its own words are on the terminal, above.
    """
    forks = multiprocessing.get_context("fork")
    here, there = forks.Pipe(duplex=False)
    child = forks.Process(target=answer, args=(there, function, args))
    child.start()
    there.close()
    try:
        return here.recv()
    except EOFError as error:
        raise UserError(f"memory: {function.__name__} failed (see above)") from error
    finally:
        child.join()


def answer(there: Any, function: Callable[..., Any], args: tuple) -> None:
    torch.set_num_threads(1)
    there.send(function(*args))


def jpeg(height: int, width: int) -> dict[str, Any]:
    """An encoded image of smooth noise, as a table holds it."""
    small = np.random.default_rng(height).integers(0, 255, (height // 8, width // 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).resize((width, height)).save(file, "JPEG")
    return {"bytes": file.getvalue(), "path": None}


def photographs(count: int) -> ImageSplit:
    """Encoded images of a few sizes."""
    files = [jpeg(*size) for size in SIZES]
    return ImageSplit("photographs", [files[i % len(files)] for i in range(count)])


def pixels(count: int) -> float:
    """Of so many photographs."""
    return sum(h * w for h, w in (SIZES[i % len(SIZES)] for i in range(count)))


# ---- the rows ------------------------------------------------------------------------------------


def store(count: int) -> list[Row]:
    """Images of 32 px in memory."""
    images, few = (ImageSplit("small", [jpeg(32, 32)] * n) for n in (count, 64))
    _, kept, peak = measured(lambda: images.into_memory(4), lambda: few.into_memory(4))
    what, size = f"{count:,} images of 32 px in memory", count * 3 * 32 * 32
    return [
        Row(what, "N x 3 H W", size, kept),
        Row("  while they are decoded", "that, and one a thread", size, peak),
    ]


def varied_store(count: int) -> list[Row]:
    """Images of several sizes in memory, which are not stacked."""
    images, few = photographs(count), photographs(8)
    _, kept, peak = measured(lambda: images.into_memory(4), lambda: few.into_memory(4))
    what, size = f"{count:,} photographs in memory", 3 * pixels(count)
    return [
        Row(what, "sum of 3 H W", size, kept),
        Row("  while they are decoded", "that, and one a thread", size, peak),
    ]


def making(batch: int) -> list[Row]:
    """A batch of views at 224 px, from JPEG, as a worker makes it."""
    images = photographs(batch)
    pairs = ViewPairs(images, views(IMAGENET_100), batch_size=batch, seed=1)
    few = ViewPairs(images, views(IMAGENET_100), batch_size=4, seed=1)

    def make(pairs: ViewPairs) -> Any:
        return pairs.pair(0, 0, images.at(pairs.indices(0))[0])

    _, kept, peak = measured(lambda: make(pairs), lambda: make(few))
    size = IMAGENET_100.image_size
    made = 2 * batch * 3 * size**2 * 4
    longest, largest = (max(map(of, SIZES)) for of in (max, math.prod))
    taps = 2 * math.ceil(2 * longest / size) + 1  # of a bicubic crop
    weights = batch * size * taps * 40  # each 6 floats and 2 indices while it is computed
    one = 6 * 3 * largest * 4  # an image on its way through the steps, in so many float copies
    return [
        Row(f"views of {batch} photographs, 224 px", "2 B x 3 S^2 x 4", made, kept),
        Row(
            "  while they are made, in each worker",
            "images, views, crop weights, the steps of one image",
            3 * pixels(batch) + made + weights + one,
            peak,
        ),
    ]


def in_flight(batch: int, workers: int) -> list[Row]:
    """Views in shared memory, once the workers wait for the step."""
    images = photographs(4 * batch)
    pairs = ViewPairs(images, views(IMAGENET_100), batch_size=batch, seed=1, workers=workers)
    before, still, now = shared_memory(), 0, 0
    stream = pairs(0, 10 * workers)
    given = next(stream)
    while still < 20:  # 2 s without a change
        time.sleep(0.1)
        last, now = now, shared_memory() - before
        still = still + 1 if now == last else 0
    size = given[0].nbytes + given[1].nbytes
    waiting = (PREFETCHED * workers + 1) * size
    return [Row(f"  on their way, {workers} workers", "2 a worker, and the step's", waiting, now)]


def shared_memory() -> int:
    """Bytes of the machine's shared memory in use."""
    space = os.statvfs("/dev/shm")
    return (space.f_blocks - space.f_bfree) * space.f_frsize


def writing(folder: Path, batch: int) -> list[Row]:
    """The checkpoint and the encoder of SimCLR on CIFAR-10, ResNet-18, after the third step."""
    rows: dict[str, Row] = {}
    save, export = Checkpoints.save, Run._export

    def watched_save(checkpoints: Checkpoints, step: int) -> None:
        _, _, peak = measured(lambda: save(checkpoints, step))
        state = [part.state_dict() for part in checkpoints.parts.values()]
        tensors = list(tensors_in(state))
        held = sum(tensor.nbytes for tensor in tensors)
        file = checkpoints._path(step).stat().st_size
        # isfinite of the largest: its absolute values, and a byte for each of three comparisons
        check = max(tensor.numel() for tensor in tensors) * (4 + 3)
        rows["file"] = Row("  checkpoint file", "4 (P + V)", held, file)
        rows["save"] = Row("  memory to write it", "at most isfinite of one tensor", check, peak)

    def watched_export(run: Run, step: int) -> None:
        _, _, peak = measured(lambda: export(run, step))
        tensors = [*run.encoder.state_dict().values(), *run.head.state_dict().values()]
        held = sum(tensor.nbytes for tensor in tensors)
        file = (run.folder / "encoder.safetensors").stat().st_size
        rows["encoder"] = Row("R18 with SimCLR's head: encoder file", "4 P", held, file)
        rows["export"] = Row("  memory to write it", "at most that, laid out anew", held, peak)

    words = ["cifar10", "--data", "demo", "--knn-every", "0", "--save-every", "0.000001"]
    words += ["--epochs", str(2.5 * batch / 5120), "--warmup-epochs", "0"]
    words += ["--batch-size", str(batch), "--out", str(folder / "run")]
    with (
        patch.object(Checkpoints, "save", watched_save),
        patch.object(Run, "_export", watched_export),
    ):
        run_simclr(words)
    return list(rows.values())


class MeanColours(nn.Module):
    """As many features as wanted, for nothing."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)).repeat(1, 171)[:, :512]


def features(folder: Path, count: int) -> list[Row]:
    """Features of all images of a split, kept by an evaluation."""
    pixels = torch.zeros(count, 3, 4, 4, dtype=torch.uint8)
    images, few = (ImageSplit("dark", part, store=part) for part in (pixels, pixels[:64]))

    def extracted(images: ImageSplit) -> tuple[Tensor, Tensor]:
        network = MeanColours().eval()
        return encode(network, images, Preprocess(4, crop=1.0), progress=False)

    (found, index), kept, peak = measured(lambda: extracted(images), lambda: extracted(few))
    size = found.nbytes + index.nbytes
    cached(folder, "key", lambda: (found, index))
    file = (folder / "key.safetensors").stat().st_size
    return [
        Row(f"{count:,} x 512 features", "N (4 F + 8)", count * (4 * 512 + 8), kept),
        Row("  while they are found", "twice that: parts, joined", 2 * size, peak),
        Row("  kept on the disk", "N (4 F + 8)", size, file),
    ]


def table(scale: float = 1.0) -> list[Row]:
    """All rows; a `scale` below 1 takes fewer images."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        return [
            *in_a_process(store, int(20_000 * scale)),
            *in_a_process(varied_store, int(400 * scale)),
            *in_a_process(making, int(128 * scale)),
            *in_a_process(in_flight, int(128 * scale), 2),
            *in_a_process(writing, folder, 16),
            *in_a_process(features, folder, int(50_000 * scale)),
        ]


# ---- epoch after epoch ---------------------------------------------------------------------------


def run_simclr(words: list[str]) -> None:
    """`python -m simclr.pretrain WORDS` in this process, without what it says."""
    program = simclr.pretrain
    with contextlib.redirect_stderr(io.StringIO()):
        program.main(*cli.parse("simclr", program.Config, program.RECIPES, words))


def held() -> dict[str, float]:
    """What this process holds on to."""
    shared_cache.free_dead_references()  # batches of workers, of which torch lists 128 and more
    gc.collect()
    objects = gc.get_objects()
    return {
        "resident MB": round(status("VmRSS") / MB, 1),
        "objects": len(objects),
        "tensors": sum(issubclass(type(each), Tensor) for each in objects),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "children": len(multiprocessing.active_children()),
    }


def epochs(folder: Path, count: int, *more: str) -> list[dict[str, float]]:
    """What a tiny run holds after each of its epochs: 4 steps, a kNN, an export and a checkpoint.

    Args:
        more: flags of the run.
    """
    for i in range(64):
        place = folder / "images" / "ab"[i % 2] / f"{i}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(jpeg(16, 16 + 8 * (i % 3))["bytes"])
    found = []
    save = Checkpoints.save

    def watched(checkpoints: Checkpoints, step: int) -> None:
        save(checkpoints, step)
        found.append(held())

    words = ["demo", "--data", str(folder / "images"), "--out", str(folder / "run")]
    words += ["--batch-size", "16", "--image-size", "8", "--log-every", "1"]
    words += ["--epochs", str(count - 0.1), "--knn-every", "1", "--save-every", "1", *more]
    with patch.object(Checkpoints, "save", watched):
        run_simclr(words)
    return found


# ---- what is shown -------------------------------------------------------------------------------


def show(rows: list[Row]) -> None:
    print("| what | formula | predicted, MB | measured, MB | ratio |\n|---|---|---:|---:|---:|")
    for row in rows:
        sizes = f"{row.predicted / MB:.1f} | {row.measured / MB:.1f}"
        ratio = f"{row.measured / row.predicted:.2f}"
        print(f"| {row.what} | {row.formula} | {sizes} | {ratio} |")


def main() -> None:
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    if sys.platform != "linux":
        raise UserError("memory: of Linux only, which says what a process holds in /proc")
    show(table())
    print()
    with tempfile.TemporaryDirectory() as name:
        found = in_a_process(epochs, Path(name), 50)
    print(f"| after epoch | {' | '.join(found[0])} |\n|---|{'---:|' * len(found[0])}")
    for epoch in (1, 5, 10, 25, 50):
        print(f"| {epoch} | {' | '.join(f'{value:,}' for value in found[epoch - 1].values())} |")


if __name__ == "__main__":
    cli.run(main)
