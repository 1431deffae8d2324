"""Whole runs through the real command: what they record, killed and started again."""

import json
import os
import signal
import subprocess
import sys
from math import log

import numpy as np
import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from PIL import Image
from safetensors import safe_open

from common.cli import UserError
from eval.encoder import load
from moco.config import RECIPES
from moco.model import MoCo
from tests.helpers import ROOT, free_port
from tests.moco.harness import run_main

COUNT, BATCH, EPOCHS, QUEUE = 96, 16, 3, 40
STEPS = COUNT // BATCH * EPOCHS
KILLED_AT = 10  # in mid-epoch, after the checkpoint of 9 steps and a logged step

DEADLY = f"""
import os, signal
import common.cli, common.run, moco.pretrain
log = common.run.Run.log
def deadly(run, step, **values):
    log(run, step, **values)
    if step == {KILLED_AT}:
        os.kill(os.getpid(), signal.SIGKILL)
common.run.Run.log = deadly
common.cli.run(moco.pretrain.main)
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


def flags(source, out, *more, recipe="demo"):
    settings = {
        "data": source, "out": out, "arch": "demo", "image_size": 16, "batch_size": BATCH,
        "epochs": EPOCHS, "base_lr": 0.5, "queue_size": QUEUE, "bn_splits": 4, "log_every": 1,
        "save_every": 0.5, "knn_every": 1, "workers": 0,
    }  # fmt: skip
    pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in settings.items()]
    return [recipe, *(word for pair in pairs for word in pair), *map(str, more)]


def start(*command):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finished(process, status=0):
    _, said = process.communicate(timeout=500)
    assert process.returncode == status, said
    return said


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def column(run, name):
    return np.array([row[name] for row in rows(run)])


def checkpoint(run, step):
    return torch.load(run / "checkpoints" / f"step-{step:08d}.pt", weights_only=True)


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    run_main(*flags(source, out))
    return out


# ---- what a run records --------------------------------------------------------------------------


def test_metrics(whole):
    assert column(whole, "step").tolist() == list(range(STEPS))
    for row in rows(whole):
        assert {"loss", "lr", "contrastive_top1", "feature_std", "effective_rank"} < set(row)
        assert row["chance_loss"] == pytest.approx(2 * log(1 + QUEUE))
    filled = [min(1, 2 * BATCH * (step + 1) / QUEUE) for step in range(STEPS)]
    assert column(whole, "queue_fill") == pytest.approx(filled)
    monitored = [row for row in rows(whole) if "knn" in row]
    assert [row["step"] for row in monitored] == [5, 11, 17]
    assert all(0 <= row["knn_output"] <= 100 for row in monitored)


def test_loss_rises_while_the_queue_fills(whole):
    loss = column(whole, "loss")
    assert loss[0] < 0.7 * loss[2] and loss[2] < 1.3 * 2 * log(1 + QUEUE)


def test_it_is_said_that_the_loss_rises(source, tmp_path, capfd):
    run_main(*flags(source, tmp_path / "run", "--epochs", "0.1", "--knn-every", "0"))
    said = capfd.readouterr().err
    assert "7.427 = 2 log(1 + K)" in said and "RISES" in said and "2 steps" in said
    assert "queue=80%" in said  # in the progress bar, until it is full


def test_a_full_queue_is_not_shown(source, tmp_path, capfd):
    run_main(*flags(source, tmp_path / "run", "--epochs", "0.5", "--knn-every", "0"))
    said = capfd.readouterr().err
    assert "loss=" in said and "queue=" not in said.rpartition("loss=")[2]


def test_milestones_that_are_never_reached_are_pointed_out(source, tmp_path, capsys):
    for last, said in ((0, False), (2, True)):
        steps = ("--schedule", "step", "--milestones", last, 3, "--epochs", "0.5")
        run_main(*flags(source, tmp_path / str(last), *steps, "--knn-every", "0"))
        line = "the learning rate stays as it is: --milestones 2 3 of --epochs 0.5"
        assert (line in capsys.readouterr().err) == said


def test_a_shuffle_that_hides_nothing_is_pointed_out(source, tmp_path, capsys):
    for groups, said in ((2, False), (1, True)):
        short = ("--bn-splits", groups, "--epochs", "0.1", "--knn-every", "0")
        run_main(*flags(source, tmp_path / str(groups), *short))
        line = "--bn-splits 1: one BatchNorm group, in which shuffled keys hide nothing"
        assert (line in capsys.readouterr().err) == said


def test_checkpoint_holds_everything(whole):
    state = checkpoint(whole, STEPS)["model"]
    expected = MoCo(RECIPES["demo"]).state_dict()
    assert list(state) == list(expected)
    assert state["queue_ptr"].item() == 2 * BATCH * STEPS % QUEUE
    assert state["queue_fill"].item() == QUEUE
    assert torch.allclose(state["queue"].norm(dim=0), torch.ones(QUEUE))
    layer = "encoder.layers.0.weight"
    assert not torch.equal(state[f"encoder_q.{layer}"], state[f"encoder_k.{layer}"])


def test_the_query_network_is_exported(whole):
    state = checkpoint(whole, STEPS)["model"]
    with safe_open(whole / "encoder.safetensors", framework="pt") as file:
        about = {key: json.loads(value) for key, value in file.metadata().items()}
    assert about["method"] == "moco" and about["head"] == ["Linear"]
    assert about["input"]["mean"] == [0.4914, 0.4822, 0.4465] and about["finished"] is True
    for layer in (0, -1):
        encoder = load(str(whole), layer=layer)
        ours = dict(encoder.network.state_dict())
        for key, value in ours.items():
            name = key if layer else f"encoder.{key}"
            assert torch.equal(value, state[f"encoder_q.{name}"]), key
        assert len(ours) == (24 if layer == 0 else 26)


def test_queue_is_single_precision_under_bf16(source, tmp_path):
    out = tmp_path / "run"
    run_main(*flags(source, out, "--precision", "bf16", "--epochs", "0.5", "--knn-every", "0"))
    queue = checkpoint(out, 3)["model"]["queue"]
    assert queue.dtype == torch.float32
    assert (queue.bfloat16().float() != queue).float().mean() > 0.9  # nor was it rounded before
    assert (queue.norm(dim=0) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "demo"])
def test_every_recipe_starts(source, tmp_path, recipe):
    out = tmp_path / "run"
    run_main(*flags(source, out, "--epochs", "0.5", "--knn-every", "0", recipe=recipe))
    assert len(rows(out)) == 3 and np.isfinite(column(out, "loss")).all()
    single = not RECIPES[recipe].symmetric
    assert checkpoint(out, 3)["model"]["queue_ptr"] == 3 * BATCH * (2 - single) % QUEUE


# ---- going on ------------------------------------------------------------------------------------


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_killed_and_started_again_is_the_uninterrupted_run_bit_for_bit(source, whole, tmp_path):
    killed = tmp_path / "killed"
    finished(start("-c", DEADLY, *flags(source, killed)), -signal.SIGKILL)
    names = sorted(path.name for path in (killed / "checkpoints").glob("*.pt"))
    assert names == ["step-00000006.pt", "step-00000009.pt"]
    run_main(*flags(source, killed))
    assert (whole / "metrics.jsonl").read_bytes() == (killed / "metrics.jsonl").read_bytes()
    for step in (STEPS - 3, STEPS):
        one, other = checkpoint(whole, step), checkpoint(killed, step)
        assert {"queue", "queue_ptr", "queue_fill"} < set(one["model"])
        assert same(one, other)


def test_nothing_moves_where_an_optimiser_step_was_skipped(source, tmp_path, monkeypatch):
    """A stand-in for an overflow in float16 at step 7: its keys, NaN, stay out of the queue, and
    the key network does not follow a query network that has not moved."""
    real, calls, moves = AcceleratedOptimizer.step, [], []
    keys, update = MoCo.keys, MoCo.update_key

    def overflowing(optimizer, closure=None):
        calls.append(optimizer)
        optimizer._is_overflow = len(calls) == 8
        if not optimizer._is_overflow:
            real(optimizer, closure)

    def infinite(network, views, permutation):
        return keys(network, views, permutation) * (torch.nan if len(calls) == 7 else 1)

    def moved(network, momentum):
        moves.append(len(calls))
        update(network, momentum)

    monkeypatch.setattr(AcceleratedOptimizer, "step", overflowing)
    monkeypatch.setattr(MoCo, "keys", infinite)
    monkeypatch.setattr(MoCo, "update_key", moved)
    run_main(*flags(source, tmp_path / "run", "--knn-every", "0", "--log-every", "2"))
    assert len(calls) == STEPS and np.isfinite(column(tmp_path / "run", "loss")).all()
    assert moves == [step for step in range(STEPS) if step != 8]
    state = checkpoint(tmp_path / "run", STEPS)["model"]
    assert state["queue"].isfinite().all()
    assert state["queue_ptr"].item() == (STEPS - 1) * 2 * BATCH % QUEUE


def test_another_queue_is_refused(source, whole):
    with pytest.raises(UserError, match=r"queue_size 40 \(now 50\)"):
        run_main(*flags(source, whole, "--queue-size", "50"))


# ---- processes -----------------------------------------------------------------------------------


def launched(processes, *argv):
    """The real command under the real launcher, on linked CPU processes."""
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--main_process_port"]
    launcher += [str(free_port()), "--num_processes", str(processes), "-m"]
    return start(*(launcher if processes > 1 else ["-m"]), "moco.pretrain", *map(str, argv))


@pytest.mark.slow
def test_groups_that_two_processes_cannot_share_are_refused_once(tmp_path):
    said = finished(launched(2, "demo", "--out", tmp_path / "run", "--bn-splits", "3"), 1)
    assert said.count("error: --bn-splits 3: cannot be shared by 2 processes") == 1


# ---- reproduce.sh --------------------------------------------------------------------------------

STAND_IN = """#!/usr/bin/env bash
# Says what it was asked; a judgement leaves the file that the real one would
echo "$*" >> "$SAID"
mkdir -p "$RUN/results"
case "$2:$*" in
eval.knn:*random) touch "$RUN/results/knn200-random.json" ;;
eval.knn:*--layer*) touch "$RUN/results/knn200-output-encoder.json" ;;
eval.knn:*) touch "$RUN/results/knn200-encoder.json" ;;
eval.linear:*random) touch "$RUN/results/linear-features-random.json" ;;
eval.linear:*) touch "$RUN/results/linear-moco-encoder.json" ;;
eval.finetune:*) touch "$RUN/results/finetune-100-simclr-random.json" ;;
esac
"""


@pytest.mark.parametrize("recipe, judged", [("demo", 3), ("cifar10-symmetric", 3)])
def test_reproduce_judges_once(tmp_path, recipe, judged):
    """Pretrain, judge, compare; a second time pretraining (which goes on) and the table alone."""
    python, said, run = tmp_path / "bin" / "python", tmp_path / "said", tmp_path / "run"
    python.parent.mkdir()
    python.write_text(STAND_IN)
    python.chmod(0o755)
    environment = os.environ | {"SAID": str(said), "RUN": str(run)}
    environment["PATH"] = f"{python.parent}:{os.environ['PATH']}"
    command = ["bash", "moco/reproduce.sh", recipe, "SOURCE", str(run), "--seed", "2"]
    for _ in range(2):
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
    lines = said.read_text().splitlines()
    first, again = lines[: judged + 2], lines[judged + 2 :]
    assert first[0] == f"-m moco.pretrain {recipe} --data SOURCE --out {run} --seed 2"
    assert first[-1] == f"-m eval.compare {run}"
    assert again == [first[0], first[-1]]
    if recipe != "demo":
        assert f"-m eval.knn {run} --layer -1" in first and f"-m eval.linear {run}" in first
