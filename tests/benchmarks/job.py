"""Files in, an encoder out: our command, lightly's SimCLR example and a plain torchvision loop.

    make bench-job
    python tests/benchmarks/job.py --keep results    # also write results/job-DEVICE.json
    python tests/benchmarks/job.py --bf16            # our command with --precision bf16 as well

CIFAR-10 (JPEG copy), ResNet-18 with the ImageNet stem, float32. Each side is a process of its own,
given the same 10,000 files, encoder, batch and number of pairs; they take turns, and each round has
its own seed. Wall time is from the start of the process to its end, with the encoder saved. One
judge then takes all encoders: kNN (k 20) over the training images, on test images of CIFAR-10.

All views are crops of 32 px, flips, jitter and gray, without blur. What the sides are not told is
their own. Ours: the recipe cifar10 (jitter 0.5, 3 layers in the head, LARS; the warm-up as its own
advice has it). lightly's example: jitter 1, views normalised, 2 layers, SGD of 0.06, one forward
pass a view. The plain loop: jitter 0.5, 2 layers, SGD of 0.1 with momentum and a cosine. Order and
draws are each side's as well.

SSL_TEST_IMAGES names the folder that has cifar10-jpeg. A table and the picture build/bench/job.png.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean

import sides
import throughput
import torch
from torch import nn

from common import cli, encoders
from common.data import ImageSplit, open_images
from common.errors import UserError
from eval.encoder import Preprocess, load_encoder
from eval.features import extract
from eval.knn import accuracy, predict
from eval.results.page import keep_measurement

SIDES = ("ours", "lightly", "plain")
NEIGHBOURS, TEMPERATURE = 20, 0.1
HERE = Path(__file__).parent
COLOURS = {"ours": "C0", "ours, bf16": "C2", "lightly": "C1", "plain": "C7"}


@dataclass(frozen=True)
class Outcome:
    """What one side did in one round."""

    side: str
    epochs: int
    seed: int
    pairs: int
    wall: float  # seconds of the process
    training: float  # seconds from when the first batch is asked for to the last update
    knn: float = 0.0  # Top-1 in percent

    @property
    def title(self) -> str:
        return f"{self.side}, {self.epochs} epoch{'s' if self.epochs > 1 else ''}"


# ---- images --------------------------------------------------------------------------------------


def lay_down(folder: Path, split: str, count: int) -> None:
    """`count` images of a split, evenly spaced, as the files that they are: CLASS/00000.jpg.

    Raises:
        UserError: the images are not there, or too few.
    """
    images = open_images(str(throughput.folder_of("cifar10-jpeg")), split)
    if len(images) < count:
        raise UserError(f"bench-job: {images.name} has {len(images):,} images, not {count:,}")
    assert images.labels is not None
    for name in images.classes:
        (folder / name).mkdir(parents=True)
    for i in (len(images) * n // count for n in range(count)):
        place = folder / images.classes[images.labels[i]] / f"{i:05d}.jpg"
        place.write_bytes(images.encoded[i]["bytes"])


# ---- a side, from the start of its process to the end --------------------------------------------


def run(side: str, images: Path, out: Path, epochs: int, batch_size: int, seed: int) -> Outcome:
    """Train one side on `images`/train.

    Raises:
        UserError: its process failed; its own words are in the log beside `out`.
    """
    count = sum(1 for _ in (images / "train").rglob("*.jpg"))
    steps = epochs * (count // batch_size)  # the two peers leave out the rest of an epoch
    same = ["--batch-size", str(batch_size), "--seed", str(seed)]
    if side.startswith("ours"):
        command = [sys.executable, "-m", "simclr.pretrain", "cifar10", "--stem", "imagenet"]
        command += ["--data", str(images), "--out", str(out), *same]
        # the steps of ours are the epochs' whole batches and one (optim.py): half of it is dropped
        command += ["--epochs", str(round((steps - 0.5) * batch_size / count, 6))]
        command += ["--warmup-epochs", str(epochs / 10)]  # as the command itself advises
        command += ["--knn-every", "0"]  # no other side judges its encoder
        command += ["--precision", "bf16"] if side == "ours, bf16" else []
    else:
        python = throughput.lightly_python() if side == "lightly" else sys.executable
        command = [python, str(HERE / "peers.py"), side, str(images / "train")]
        command += [str(encoder_of(out)), "--epochs", str(epochs), *same]
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    log = out.with_suffix(".log")
    began = time.perf_counter()
    with log.open("w") as errors:
        done = subprocess.run(
            command, cwd=throughput.ROOT, stdout=subprocess.PIPE, stderr=errors, text=True
        )
    wall = time.perf_counter() - began
    if done.returncode or not encoder_of(out).exists():
        raise UserError(f"bench-job: the side {side} failed; its words are in {log}")
    if side.startswith("ours"):
        found, seconds = of_record(out, batch_size)
    else:
        said = json.loads(done.stdout.splitlines()[-1])
        found, seconds = said["steps"], said["seconds"]
    return Outcome(side, epochs, seed, found * batch_size, wall, seconds)


def of_record(run: Path, batch_size: int) -> tuple[int, float]:
    """Steps, and seconds from when the first batch is asked for, of a run's own timings."""
    rows = [json.loads(line) for line in (run / "timings.jsonl").read_text().splitlines()]
    steps = [row["step"] + 1 for row in rows]
    parts = [now - before for before, now in zip([0, *steps], steps, strict=False)]
    rates = [row["pairs_per_second"] for row in rows]
    return steps[-1], sum(n * batch_size / r for n, r in zip(parts, rates, strict=True))


def encoder_of(out: Path) -> Path:
    return out / "encoder.safetensors"


# ---- the judge -----------------------------------------------------------------------------------


def judged(encoder: Path, train: ImageSplit, test: ImageSplit) -> float:
    """kNN Top-1 in percent: the same images, network and code for whoever trained the encoder."""
    loaded = load_encoder(encoder)
    return knn_of(loaded.network, loaded.input, train, test)


def knn_of(
    network: nn.Module, preprocess: Preprocess, train: ImageSplit, test: ImageSplit
) -> float:
    network = network.to(sides.DEVICE).eval()
    (bank, labels), (queries, truth) = (
        extract(network, split, preprocess, sides.DEVICE, progress=False) for split in (train, test)
    )
    ranking, _ = predict(
        queries,
        bank,
        labels,
        classes=len(train.classes),
        k=NEIGHBOURS,
        temperature=TEMPERATURE,
    )
    return accuracy(ranking, truth)


# ---- what is shown -------------------------------------------------------------------------------


def table(outcomes: Sequence[Outcome]) -> dict[str, dict[str, float]]:
    """Means over the rounds by side and epochs, printed with the least and the most."""
    figures = {}
    print(f"\n{'':<22}{'wall, s':>18}{'pairs/s':>9}{'training':>10}{'kNN':>7}   beside lightly")
    for epochs, side in dict.fromkeys((each.epochs, each.side) for each in outcomes):
        mine = [each for each in outcomes if (each.epochs, each.side) == (epochs, side)]
        walls, knn = [each.wall for each in mine], [each.knn for each in mine]
        whole = mean(each.pairs / each.wall for each in mine)
        training = mean(each.pairs / each.training for each in mine)
        by_round = [
            other.wall / each.wall
            for each in mine
            for other in outcomes
            if (other.side, other.epochs, other.seed) == ("lightly", epochs, each.seed)
        ]
        beside = ""
        if by_round:
            beside = f"{mean(by_round):.2f} ({min(by_round):.2f} to {max(by_round):.2f})"
        name = mine[0].title
        spread = f"{mean(walls):.1f} ({min(walls):.0f} to {max(walls):.0f})"
        rates = f"{whole:>9.0f}{training:>10.0f}"
        print(f"{name:<22}{spread:>18}{rates}{mean(knn):>7.1f}   {beside}".rstrip())
        figures[name] = {
            "wall (s)": round(mean(walls), 1),
            "pairs/s, whole": round(whole, 1),
            "pairs/s, training": round(training, 1),
            "kNN (%)": round(mean(knn), 1),
        }
    return figures


def picture(outcomes: Sequence[Outcome], path: Path, title: str) -> None:
    """kNN against wall time: a marker for each round, and a line through the means of a side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for side in dict.fromkeys(each.side for each in outcomes):
        means = []
        for epochs in dict.fromkeys(each.epochs for each in outcomes):
            some = [each for each in outcomes if (each.side, each.epochs) == (side, epochs)]
            walls, knn = [each.wall for each in some], [each.knn for each in some]
            axes.plot(walls, knn, "o", color=COLOURS[side], markersize=4)
            means.append((mean(walls), mean(knn)))
            axes.annotate(
                f"{epochs} ep.",
                means[-1],
                xytext=(0, 7),
                textcoords="offset points",
                fontsize=8,
                color=COLOURS[side],
                ha="center",
            )
        axes.plot(*zip(*means, strict=True), color=COLOURS[side], label=side)
    axes.margins(0.1)
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds, from the start of the process to the encoder in its file")
    axes.set_ylabel(f"kNN (k {NEIGHBOURS}) Top-1 (%)")
    axes.set_title(title.replace("stem, ", "stem\n"), fontsize=9)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def keep(folder: Path, figures: dict, outcomes: Sequence[Outcome], title: str) -> None:
    """The table as a record, with every round: results/job-DEVICE.json."""
    device, rounds = throughput.device(), [asdict(each) for each in outcomes]
    path = folder / f"job-{device.replace(' ', '-').lower()}.json"
    command = "python tests/benchmarks/job.py"
    keep_measurement(path, title, command, figures, rounds=rounds, device=device)
    print(f"wrote {path}")


# ---- all of it -----------------------------------------------------------------------------------


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--bf16", action="store_true", help="ours in bfloat16 as a side of its own")
    parser.add_argument("--images", type=int, default=10_000, help="to train on, and the bank")
    parser.add_argument("--tests", type=int, default=5_000, help="images to judge on")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=throughput.BUILD / "bench" / "job")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="also write a record there")
    options = parser.parse_args(argv)
    if min(options.rounds, *options.epochs) < 1:
        raise UserError("--rounds and --epochs: 1 or more")
    options.out = options.out.resolve()  # the sides are started in the project's folder
    if options.images < options.batch_size:
        raise UserError(f"--images {options.images}: fewer than --batch-size {options.batch_size}")
    return options


def main(argv: Sequence[str] | None = None) -> list[Outcome]:
    options = parse(sys.argv[1:] if argv is None else argv)
    names = [*options.sides, *(["ours, bf16"] if options.bf16 else [])]
    throughput.folder_of("cifar10-jpeg")  # what is missing is said before anything takes time
    if "lightly" in names:
        throughput.lightly_python()
    images = options.out / "images"
    shutil.rmtree(images, ignore_errors=True)
    lay_down(images / "train", "train", options.images)
    lay_down(images / "test", "test", options.tests)
    train, test = (open_images(str(images), split) for split in ("train", "test"))
    size = f"{options.images:,} images, batch {options.batch_size}"
    title = f"CIFAR-10 (JPEG copy), R18 with ImageNet stem, {size}, {throughput.device()}"
    print(f"{title}; kNN on {options.tests:,} test images")
    torch.manual_seed(0)
    untrained = knn_of(encoders.build("resnet18"), Preprocess(32, crop=1.0), train, test)
    print(f"untrained: kNN {untrained:.1f}", flush=True)
    outcomes: list[Outcome] = []
    for turn in range(options.rounds):
        for epochs in options.epochs:
            for side in names[:: -1 if turn % 2 else 1]:
                out = options.out / f"{side.replace(', ', '-')}-{epochs}-{turn + 1}"
                found = run(side, images, out, epochs, options.batch_size, turn + 1)
                found = replace(found, knn=judged(encoder_of(out), train, test))
                outcomes.append(found)
                print(
                    f"round {turn + 1}: {found.title}: {found.pairs:,} pairs in "
                    f"{found.wall:.1f} s, kNN {found.knn:.1f}",
                    flush=True,
                )
    for epochs in options.epochs:
        assert len({each.pairs for each in outcomes if each.epochs == epochs}) == 1, outcomes
    figures = table(sorted(outcomes, key=lambda each: (each.epochs, names.index(each.side))))
    path = options.out.with_suffix(".png")
    picture(outcomes, path, title)
    print(f"wrote {path}")
    if options.keep:
        keep(options.keep, figures, outcomes, title)
    return outcomes


if __name__ == "__main__":
    cli.run(main)
