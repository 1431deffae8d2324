"""A whole run through the real command: killed and started again, on two processes, and looked at
in TensorBoard."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
from PIL import Image

from tests.helpers import (
    ROOT,
    assert_same_run,
    checkpoints,
    ended,
    exported,
    forked,
    free_port,
    pretrain,
    rows,
)

COUNT, BATCH, EPOCHS = 96, 16, 3
STEPS = COUNT * EPOCHS // BATCH + 1  # the + 1 is SimCLR's
KILLED_AT = 10  # in mid-epoch, after the checkpoint of 9 steps and a logged step
SCALARS = {
    "loss", "lr", "contrastive_top1", "chance_loss", "feature_std", "effective_rank", "alignment",
    "uniformity", "knn", "timing/pairs_per_second", "timing/data_wait", "timing/peak_memory_gb",
}  # fmt: skip


def die():
    """SIGKILL once a step is trained, before it is logged or saved."""
    from common.run import Run

    end_step = Run.end_step

    def deadly(run, step, *args, **metrics):
        if step == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)
        end_step(run, step, *args, **metrics)

    Run.end_step = deadly


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Noise of three colours, in class folders."""
    folder, draw = tmp_path_factory.mktemp("source"), np.random.default_rng(0)
    for split, count in (("train", COUNT), ("test", 15)):
        for i in range(count):
            path = folder / split / "rgb"[i % 3] / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = draw.integers(0, 180, (20, 20, 3))
            pixels[..., i % 3] += 70
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


def flags(source, out, *more):
    settings = {
        "data": source, "out": out, "arch": "demo", "image_size": 16, "batch_size": BATCH,
        "epochs": EPOCHS, "warmup_epochs": 1, "base_lr": 1.0, "log_every": 1, "save_every": 0.5,
        "knn_every": 1, "workers": 0,
    }  # fmt: skip
    pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in settings.items()]
    return ["demo", *(word for pair in pairs for word in pair), *map(str, more)]


def start(*command):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finished(process, status=0):
    _, said = process.communicate(timeout=300)
    assert process.returncode == status, said
    return said


@pytest.fixture(scope="module")
def runs(source, tmp_path_factory):
    """The folder of an uninterrupted run, and that of one killed and started again."""
    folder = tmp_path_factory.mktemp("runs")
    whole, killed, log = folder / "whole", folder / "killed", folder / "log"
    [one] = forked("simclr", flags(source, whole), log)
    [two] = forked("simclr", flags(source, killed), log, before=die)
    assert ended([one, two]) == [0, -signal.SIGKILL], log.read_text()
    assert list(checkpoints(killed)) == ["step-00000006.pt", "step-00000009.pt"]
    assert rows(killed)[-1]["step"] == KILLED_AT - 1  # one more than the checkpoint holds
    with open(killed / "metrics.jsonl", "a") as file:
        file.write('{"step": 10, "lo')
    assert ended(forked("simclr", flags(source, killed), log)) == [0], log.read_text()
    assert f"going on from step 9 of {STEPS}" in log.read_text()
    return whole, killed


def test_killed_and_started_again_is_the_uninterrupted_run_bit_for_bit(runs):
    assert_same_run(*runs)
    saved = checkpoints(runs[0])
    assert list(saved) == ["step-00000018.pt", "step-00000019.pt"]
    assert all({"step", "model", "optimizer"} <= state.keys() for state in saved.values())


def test_what_a_run_records(runs):
    whole, killed = runs
    lines = rows(whole)
    assert [line["step"] for line in lines] == list(range(STEPS))
    always = {name for name in SCALARS if "/" not in name} - {"knn"}
    assert all(always <= line.keys() for line in lines)
    assert [line["step"] for line in lines if "knn" in line] == [5, 11, 17, 18]
    assert all(np.isfinite(value) for line in lines for value in line.values())
    assert lines[0]["lr"] == 0.0 and lines[6]["lr"] == pytest.approx(1.0 * BATCH / 256)
    assert lines[0]["chance_loss"] == pytest.approx(2 * np.log(2 * BATCH - 1))
    assert len(json.loads((killed / "config.json").read_text())["launches"]) == 2
    about = {key: json.loads(value) for key, value in exported(whole)[1].items()}
    assert about["method"] == "simclr" and about["finished"] is True
    assert about["epochs"] == round(STEPS * BATCH / COUNT, 3) and about["encoder"] == "demo"


def test_a_finished_run_started_again_stays_as_it_is(runs, source):
    whole, _ = runs
    files = ["metrics.jsonl", "encoder.safetensors", "checkpoints/step-00000019.pt"]
    before = [(whole / name).read_bytes() for name in files]
    pretrain("simclr", *flags(source, whole))
    assert [(whole / name).read_bytes() for name in files] == before


def test_a_run_of_another_config_is_refused(runs, source, capsys):
    with pytest.raises(SystemExit) as caught:
        pretrain("simclr", *flags(source, runs[0], "--temperature", "0.3", "--seed", "5"))
    said = capsys.readouterr().err
    assert caught.value.code == 2 and said.count("\n") == 1
    assert "seed 1 (now 5)" in said and "temperature" in said and "(now 0.3)" in said


def test_decoding_workers_and_memory_give_the_same_run(runs, source, tmp_path):
    pretrain("simclr", *flags(source, tmp_path / "run", "--workers", "2", "--memory-gb", "0"))
    assert rows(tmp_path / "run") == rows(runs[0])


def test_a_real_command_fails_in_one_line(tmp_path):
    said = finished(start("-m", "simclr.pretrain", "demo", "--data", str(tmp_path / "none")), 2)
    assert (
        said == f"error: {tmp_path / 'none'}: no such folder or file (nor a Hub id of the form "
        "owner/name)\n"
    )


def test_tensorboard_shows_a_resumed_run(runs):
    port = free_port()
    server = start(
        "-m", "tensorboard.main", "--logdir", str(runs[1]), "--port", str(port),
        "--host", "127.0.0.1",
    )  # fmt: skip

    def ask(path):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/data/plugin/{path}", timeout=10) as r:
            return json.loads(r.read())

    try:
        deadline, tags, points = time.monotonic() + 90, {}, []
        while not (tags.get(".", {}).keys() >= SCALARS and len(points) >= STEPS):
            assert server.poll() is None, server.stderr.read()
            if time.monotonic() > deadline:
                break
            time.sleep(0.5)  # it reads while it serves, one file of the run after the other
            with contextlib.suppress(OSError):
                tags = ask("scalars/tags")
                points = ask("scalars/scalars?run=.&tag=loss")  # [wall time, step, value]
        assert tags.keys() == {"."}
        assert tags["."].keys() >= SCALARS
        assert [step for _, step, _ in points] == list(range(STEPS))
        assert "views" in ask("images/tags")["."]
        shown = [value for _, _, value in points]
        assert shown == pytest.approx([row["loss"] for row in rows(runs[1])], rel=1e-6)
    finally:
        server.terminate()
        server.communicate(timeout=30)


def on_two_processes(source, out, *more):
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launcher += ["--main_process_port", str(free_port()), "-m", "simclr.pretrain"]
    return start(*launcher, *flags(source, out, "--processes", "2", *more))


def worst(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
    return [max(abs(a[key] - b[key]) for key in a) for a, b in zip(one, other, strict=True)]


def test_two_processes_are_one_in_double_precision(source, tmp_path):
    double = ("--precision", "fp64", "--knn-every", "0")
    pretrain("simclr", *flags(source, tmp_path / "one", *double))
    finished(on_two_processes(source, tmp_path / "two", *double))
    launched = json.loads((tmp_path / "two" / "config.json").read_text())["launches"]
    assert [launch["processes"] for launch in launched] == [2]
    one, other = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert len(one) == STEPS and max(worst(one, other)) < 1e-10
    pretrain("simclr", *flags(source, tmp_path / "still", *double, "--base-lr", "0"))
    still = rows(tmp_path / "still")
    # it learns, else the comparison would say nothing; batches alone range over 4
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(one, still, strict=True)) > 0.5


@pytest.mark.slow
def test_a_mistake_on_two_processes_is_said_once(source, tmp_path):
    said = finished(on_two_processes(source, tmp_path / "two", "--batch-size", "15"), 1)
    assert said.count("error: --batch-size 15: not divisible by 2 processes") == 1
