"""METHOD/reproduce.sh: one script but for the method; killed or not, it ends in the same rows."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.helpers import METHODS, ROOT

NAMES = {"simclr": "SimCLR", "moco": "MoCo", "byol": "BYOL"}


def script(method):
    """The lines of a method's script, with METHOD in the place of its name."""
    text = (ROOT / method / "reproduce.sh").read_text()
    text = text.replace("finetune-simclr-100", "supervised")  # SimCLR's protocol for all three
    return text.replace(method, "METHOD").replace(NAMES[method], "METHOD").splitlines()


def test_the_scripts_differ_in_the_method_alone():
    notebook = "    once knn-weighted-k200-output-encoder python -m eval.knn"  # MoCo's own figures
    texts = {method: script(method) for method in METHODS}
    extra = [line for line in texts["moco"] if line.startswith(notebook)]
    texts["moco"] = [line for line in texts["moco"] if line not in extra]
    assert len(extra) == 1 and texts["simclr"] == texts["moco"] == texts["byol"]
    assert sum("METHOD" in line for line in texts["simclr"]) >= 6


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "given, trained",
    [
        ([], "demo --out runs/METHOD-demo"),
        (["cifar10"], "cifar10 --out runs/METHOD-cifar10"),
        (["cifar10", "my images"], "cifar10 --data my images --out runs/METHOD-cifar10"),
        (["cifar10", "", "run", "--seed", "2"], "cifar10 --out run --seed 2"),
    ],
)
def test_a_recipe_is_trained_on_the_given_images_or_its_own(method, given, trained, tmp_path):
    python = tmp_path / "python"  # says its arguments, separated by bars
    python.write_text('#!/bin/sh\n(IFS="|"; echo "$*")\n')
    python.chmod(0o755)
    said = subprocess.run(
        ["bash", ROOT / method / "reproduce.sh", *given],
        cwd=tmp_path,
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()[0]
    assert said.startswith(f"-m|{method}.pretrain|")
    words = said.split("|")[2:]
    assert " ".join(words) == trained.replace("METHOD", method)
    assert "my" not in words  # a name with a space is one word


@pytest.fixture
def source(tmp_path):
    """90 labelled images in two splits."""
    stream = torch.Generator().manual_seed(5)
    for i in range(90):
        path = tmp_path / "source" / ("test" if i < 30 else "train") / "abc"[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        colour = torch.randint(0, 190, (3,), generator=stream).tolist()
        colour[i % 3] += 60
        Image.new("RGB", (16, 16), tuple(colour)).save(path)
    return tmp_path / "source"


def reproduce(source, run, until=None):
    """Run the script to its end or, with `until`, kill all of it once that file of RUN is there.

    Returns:
        What it printed.
    """
    flags = "--batch-size 20 --epochs 6 --save-every 1 --log-every 1 --knn-every 0"
    command = ["bash", "simclr/reproduce.sh", "demo", str(source), str(run), *flags.split()]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        deadline = time.monotonic() + 300
        while until and process.poll() is None and not list(run.glob(until)):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        if until:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        said = process.communicate(timeout=300)[0]
    assert until or process.returncode == 0, said
    return said


def judgements(run):
    """{file: record} without times, commands and commits."""
    found = {path.name: json.loads(path.read_text()) for path in (run / "results").glob("*.json")}
    for record in found.values():
        for name in ("seconds", "speed", "judged", "pretrained_at"):
            del record[name]
        del record["run"]["out"]
    return found


@pytest.mark.slow
def test_killed_between_and_inside_its_stages_it_ends_in_the_same_rows(source, tmp_path):
    whole, killed = tmp_path / "whole" / "run", tmp_path / "killed" / "run"
    table = reproduce(source, whole)
    reproduce(source, killed, "checkpoints/step-*.pt")  # inside pretraining
    assert not list(killed.glob("results/*.json"))
    reproduce(source, killed, "results/knn-weighted-k20-encoder-*.json")  # inside kNN
    assert not list(killed.glob("results/knn-weighted-k200-random-*.json"))
    reproduce(source, killed, "results/knn-weighted-k200-random-*.json")  # between two judgements
    assert not list(killed.glob("results/linear-features-random-*.json"))
    again = reproduce(source, killed)
    assert judgements(killed) == judgements(whole) and len(judgements(whole)) == 10
    assert (killed / "compare.md").read_bytes() == (whole / "compare.md").read_bytes()
    assert "SimCLR demo" in table and "SimCLR demo" in again
    before = {path: path.stat().st_mtime_ns for path in (killed / "results").iterdir()}
    reproduce(source, killed)  # a judgement that is there is not repeated
    assert before == {path: path.stat().st_mtime_ns for path in (killed / "results").iterdir()}
    (killed / "encoder.safetensors").touch()  # but one of an older encoder is
    reproduce(source, killed)
    assert all(path.stat().st_mtime_ns > time for path, time in before.items())
