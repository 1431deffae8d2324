"""Ours, lightly and a plain torchvision and DataLoader loop, side by side on this machine.

    make bench
    python tests/benchmarks/throughput.py --keep results    # also write results/bench-DEVICE.json

Each side is a process of its own; they take turns, row by row and round by round, on the same
images, encoder, batch and precision, and run the same operations with the same probabilities, which
is checked. The figures are medians over the rounds. It prints and judges nothing.

lightly comes from the package registry into an environment of its own, build/lightly, that sees
this one's torch and torchvision: both sides run on the same. The images are those of the folder
that SSL_TEST_IMAGES names: CIFAR-10 as JPEGs in cifar10-jpeg, photographs in clothing/train.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import sides
import torch
import torchvision

from common import cli
from common.data import open_images
from common.errors import UserError
from eval.results.page import keep_measurement

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build"
DATA = Path(os.environ.get("SSL_TEST_IMAGES") or ROOT.parent / "shared" / "data")  # real images
ROUNDS = 10


# ---- a side: a process that does rounds when told ------------------------------------------------


def serve(side: str) -> None:
    """Describe the side in a line of JSON; then, for each row's name read, a round's seconds."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no answer
    views, rows = sides.SIDES[side](BUILD / "bench")
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__}
    if side == "lightly":
        import lightly

        versions["lightly"] = lightly.__version__
    about = {"views": views, "rows": list(rows), "versions": versions, "device": device()}
    print(json.dumps(about), file=answers, flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        rows[line.strip()]()
        if sides.DEVICE == "cuda":
            torch.cuda.synchronize()
        print(json.dumps(time.perf_counter() - began), file=answers, flush=True)


def device() -> str:
    if sides.DEVICE == "cuda":
        return torch.cuda.get_device_name()
    return f"cpu-{torch.get_num_threads()}-threads"


class Side:
    """The other end of `serve`.

    Raises:
        UserError: the process ended; its own words are on the terminal, above.
    """

    def __init__(self, name: str, python: str) -> None:
        command = [python, __file__, "--serve", name]
        pipe = subprocess.PIPE
        self.name = name
        project = {**os.environ, "PYTHONPATH": str(ROOT)}  # lightly's environment lacks it
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=project)
        self.about = self.answer()

    def answer(self):
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise UserError(f"bench: the side {self.name} failed (see above)")
        return json.loads(line)

    def seconds(self, row: str) -> float:
        print(row, file=self.process.stdin, flush=True)
        return self.answer()


# ---- what the sides need -------------------------------------------------------------------------


def lightly_python() -> str:
    """The interpreter of an environment with lightly, made on the first call."""
    home = BUILD / "lightly"
    python, ready = home / "bin" / "python", home / "ready"
    if not ready.exists():
        print(f"installing lightly into {home.relative_to(ROOT)}", flush=True)
        try:
            subprocess.run([sys.executable, "-m", "venv", home], check=True)
            find = "import sysconfig; print(sysconfig.get_path('purelib'))"
            place = subprocess.run([python, "-c", find], check=True, capture_output=True, text=True)
            here = sysconfig.get_path("purelib")
            Path(place.stdout.strip(), "torch-of-the-project.pth").write_text(here + "\n")
            subprocess.run([python, "-m", "pip", "install", "-q", "lightly"], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            command = shlex.join([str(python), "-m", "pip", "install", "lightly"])
            raise UserError(f"bench: lightly cannot be installed; try: {command}") from error
        ready.touch()
    return str(python)


def folder_of(name: str) -> Path:
    """Where the real images of a name are.

    Raises:
        UserError: they are not there.
    """
    if not (DATA / name).exists():
        raise UserError(f"{DATA / name}: not there; SSL_TEST_IMAGES names the folder of images")
    return DATA / name


def lay_down_images() -> None:
    """Decoded CIFAR-10 images and paths of photographs, the same for all sides."""
    small = open_images(str(folder_of("cifar10-jpeg")))
    folder = folder_of("clothing") / "train"
    large = sorted(str(path) for path in folder.rglob("*.jpg"))
    if len(large) < sides.ROWS[sides.LARGE][0]:
        raise UserError(f"{folder}: too few photographs in it")
    (BUILD / "bench").mkdir(parents=True, exist_ok=True)
    count = sides.ROWS[sides.SMALL][0]
    decoded = torch.stack([small.decode_near(i)[1] for i in range(count)])
    np.save(BUILD / "bench" / "small.npy", decoded.permute(0, 2, 3, 1).numpy())
    count = sides.ROWS[sides.LARGE][0]
    chosen = large[:: len(large) // count][:count]
    (BUILD / "bench" / "large.txt").write_text("\n".join(chosen))


# ---- the table -----------------------------------------------------------------------------------


def check_alike(running: dict[str, Side]) -> None:
    expected = {row: sides.description(**settings) for row, settings in sides.VIEWS.items()}
    for side in running.values():
        found = {row: rounded(views) for row, views in side.about["views"].items()}
        assert found == {row: rounded(views) for row, views in expected.items()}, side.name
        assert side.about["rows"] == running["ours"].about["rows"], side.name
        for library in ("torch", "torchvision"):
            assert side.about["versions"][library] == running["ours"].about["versions"][library]


def rounded(value):
    """Ranges computed in another order differ in their last bit."""
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return round(value, 9) if isinstance(value, float) else value


def compare(running: dict[str, Side]) -> dict[str, dict[str, float]]:
    """Per row and side, the median rate; the ratio is ours over lightly's."""
    figures = {}
    print(f"{'':<34}" + "".join(f"{name:>12}" for name in running) + "   ours / lightly (rounds)")
    for row in running["ours"].about["rows"]:
        for side in running.values():
            side.seconds(row)  # warm-up
        rounds = [{n: side.seconds(row) for n, side in running.items()} for _ in range(ROUNDS)]
        amount, unit = sides.ROWS[row]
        rates = {n: amount / statistics.median(each[n] for each in rounds) for n in running}
        ratios = sorted(each["lightly"] / each["ours"] for each in rounds)
        shown = "".join(f"{rate:>12,.{0 if rate >= 100 else 1}f}" for rate in rates.values())
        spread = f"{rates['ours'] / rates['lightly']:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"{row + ', ' + unit + '/s':<34}{shown}   {spread}", flush=True)
        figures[row] = rates
    return figures


def keep(folder: Path, figures: dict, about: dict) -> None:
    """The table as a record: results/bench-DEVICE.json."""
    path = folder / f"bench-{about['device'].replace(' ', '-').lower()}.json"
    keep_measurement(
        path,
        title=f"throughput beside lightly {about['versions']['lightly']} and torchvision",
        command="python tests/benchmarks/throughput.py",
        figures={
            f"{row} ({sides.ROWS[row][1]}/s)": {n: round(rate, 2) for n, rate in rates.items()}
            for row, rates in figures.items()
        },
        device=about["device"],
    )
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="also write a record there")
    parser.add_argument("--serve", choices=sides.SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve)
    lay_down_images()
    pythons = {"ours": sys.executable, "lightly": lightly_python(), "plain": sys.executable}
    running = {name: Side(name, python) for name, python in pythons.items()}
    check_alike(running)
    about = running["lightly"].about
    print(", ".join(f"{name} {version}" for name, version in about["versions"].items()), end="")
    print(f", {about['device']}, medians of {ROUNDS} alternating rounds\n")
    figures = compare(running)
    if options.keep:
        keep(options.keep, figures, about)
    for side in running.values():
        side.process.communicate()  # its end of input


if __name__ == "__main__":
    cli.run(main)
