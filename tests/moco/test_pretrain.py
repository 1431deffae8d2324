"""Whole runs through the real command: what they record, killed and started again."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from math import cos, log, pi

import numpy as np
import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from PIL import Image

from common import encoders
from eval.encoder import load_encoder
from moco.config import MOCO_V1, RECIPES
from moco.model import MoCo
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
from tests.moco.harness import Tiny, play

COUNT, BATCH, EPOCHS, QUEUE = 96, 16, 3, 40
STEPS = COUNT // BATCH * EPOCHS
KILLED_AT = 10  # in mid-epoch, after the checkpoint of 9 steps and a logged step


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


def flags(source, out, *more, recipe="demo"):
    settings = {
        "data": source, "out": out, "arch": "demo", "image_size": 16, "batch_size": BATCH,
        "epochs": EPOCHS, "base_lr": 0.5, "queue_size": QUEUE, "bn_splits": 4, "log_every": 1,
        "save_every": 0.5, "knn_every": 1, "workers": 0,
    }  # fmt: skip
    pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in settings.items()]
    return [recipe, *(word for pair in pairs for word in pair), *map(str, more)]


def column(run, name):
    return np.array([row[name] for row in rows(run)])


def state_after(run, step):
    return checkpoints(run)[f"step-{step:08d}.pt"]["model"]


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    pretrain("moco", *flags(source, out))
    return out


# ---- what a run records --------------------------------------------------------------------------


def test_metrics(whole):
    assert column(whole, "step").tolist() == list(range(STEPS))
    for row in rows(whole):
        assert {"loss", "lr", "contrastive_top1", "feature_std", "effective_rank"} < set(row)
        assert row["chance_loss"] == pytest.approx(2 * log(1 + QUEUE))
    cosine = [0.5 * BATCH / 256 * (1 + cos(pi * (step // 6) / 3)) / 2 for step in range(STEPS)]
    assert column(whole, "lr") == pytest.approx(cosine)  # constant in each of the three epochs
    filled = [min(1, 2 * BATCH * (step + 1) / QUEUE) for step in range(STEPS)]
    assert column(whole, "queue_fill") == pytest.approx(filled)
    monitored = [row for row in rows(whole) if "knn" in row]
    assert [row["step"] for row in monitored] == [5, 11, 17]
    assert all(0 <= row["knn_output"] <= 100 for row in monitored)


def test_loss_rises_while_the_queue_fills(whole):
    loss = column(whole, "loss")
    assert loss[0] < 0.7 * loss[2] and loss[2] < 1.3 * 2 * log(1 + QUEUE)


def test_it_is_said_that_the_loss_rises(source, tmp_path, capfd):
    pretrain("moco", *flags(source, tmp_path / "run", "--epochs", "0.1", "--knn-every", "0"))
    said = capfd.readouterr().err
    assert "loss at chance 7.427;" in said and "RISES" in said and "2 steps" in said
    assert "queue_fill=80%" in said  # in the progress bar


def test_checkpoint_holds_everything(whole):
    state = state_after(whole, STEPS)
    expected = MoCo(partial(encoders.build, "demo"), dim=64, queue_size=QUEUE).state_dict()
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in expected.items()}
    assert state["queue_ptr"].item() == 2 * BATCH * STEPS % QUEUE
    assert state["queue_fill"].item() == QUEUE
    assert torch.allclose(state["queue"].norm(dim=0), torch.ones(QUEUE))
    layer = "encoder.layers.0.weight"
    assert not torch.equal(state[f"encoder_q.{layer}"], state[f"encoder_k.{layer}"])


def test_the_query_network_is_exported(whole):
    state = state_after(whole, STEPS)
    about = {key: json.loads(value) for key, value in exported(whole)[1].items()}
    assert about["method"] == "moco" and about["head"] == ["Linear"]
    assert about["input"]["mean"] == [0.4914, 0.4822, 0.4465] and about["finished"] is True
    for layer in (0, -1):
        encoder = load_encoder(str(whole), layer=layer)
        ours = dict(encoder.network.state_dict())
        for key, value in ours.items():
            name = key if layer else f"encoder.{key}"
            assert torch.equal(value, state[f"encoder_q.{name}"]), key
        assert len(ours) == (24 if layer == 0 else 26)


def test_queue_is_single_precision_under_bf16(source, tmp_path):
    out = tmp_path / "run"
    pretrain(
        "moco", *flags(source, out, "--precision", "bf16", "--epochs", "0.5", "--knn-every", "0")
    )
    queue = state_after(out, 3)["queue"]
    assert queue.dtype == torch.float32
    assert (queue.bfloat16().float() != queue).float().mean() > 0.9  # nor was it rounded before
    assert (queue.norm(dim=0) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "demo"])
def test_every_recipe_starts(source, tmp_path, recipe):
    out = tmp_path / "run"
    pretrain("moco", *flags(source, out, "--epochs", "0.5", "--knn-every", "0", recipe=recipe))
    assert len(rows(out)) == 3 and np.isfinite(column(out, "loss")).all()
    single = not RECIPES[recipe][0].symmetric
    assert state_after(out, 3)["queue_ptr"] == 3 * BATCH * (2 - single) % QUEUE


# ---- going on ------------------------------------------------------------------------------------


def test_killed_and_started_again_is_the_uninterrupted_run_bit_for_bit(source, whole, tmp_path):
    killed, log = tmp_path / "killed", tmp_path / "log"
    assert ended(forked("moco", flags(source, killed), log, before=die)) == [-signal.SIGKILL]
    assert list(checkpoints(killed)) == ["step-00000006.pt", "step-00000009.pt"]
    pretrain("moco", *flags(source, killed))
    assert_same_run(whole, killed)
    assert all(
        {"queue", "queue_ptr", "queue_fill"} < x["model"].keys()
        for x in checkpoints(killed).values()
    )


def test_another_queue_is_refused(source, whole, capsys):
    with pytest.raises(SystemExit) as caught:
        pretrain("moco", *flags(source, whole, "--queue-size", "50"))
    said = capsys.readouterr().err
    assert caught.value.code == 2 and said.count("\n") == 1
    assert "queue_size 40 (now 50)" in said


# ---- what is odd ---------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [False, True])
def test_nothing_moves_where_an_optimiser_step_was_skipped(symmetric, monkeypatch):
    """A stand-in for an overflow in float16 at step 3: its keys, NaN, stay out of the queue, and
    the key network does not follow a query network that has not moved."""
    real, calls = AcceleratedOptimizer.step, []

    def overflowing(optimizer, closure=None):
        optimizer._is_overflow = len(calls) == 3
        calls.append(optimizer)
        if not optimizer._is_overflow:
            real(optimizer, closure)

    monkeypatch.setattr(AcceleratedOptimizer, "step", overflowing)
    torch.manual_seed(0)
    cfg = replace(
        MOCO_V1, dim=6, queue_size=40, batch_size=4, bn_splits=2, key_momentum=0.9, base_lr=10.0,
        symmetric=symmetric,
    )  # fmt: skip
    views = torch.randn(6, 2, 4, 3, 5, 5)
    views[3, 1] = torch.nan
    network, shuffles = (
        MoCo(Tiny, cfg.head, cfg.dim, cfg.queue_size),
        torch.arange(4).expand(6, 2, 4),
    )
    seen = play(cfg, network, views, shuffles, count=24)

    def moved(step, name):
        return not torch.equal(seen.states[step][name], seen.states[step + 1][name])

    weight = "encoder.conv1.weight"
    assert [step for step in range(6) if moved(step, f"encoder_q.{weight}")] == [0, 1, 2, 4, 5]
    assert [step for step in range(6) if moved(step, f"encoder_k.{weight}")] == [1, 2, 3, 5]
    assert [step for step in range(6) if moved(step, "queue")] == [0, 1, 2, 4, 5]
    assert seen.states[-1]["queue"].isfinite().all()
    assert seen.states[-1]["queue_fill"].item() == 5 * 4 * (1 + symmetric)


def test_groups_of_one_image(source, tmp_path, capsys):
    """It is pointed out, and trains where a map has more than one pixel to the end."""
    one = ("--bn-splits", BATCH, "--epochs", "0.5", "--knn-every", "0")
    pretrain("moco", *flags(source, tmp_path / "run", *one))
    assert "--bn-splits 16: BatchNorm groups of one image" in capsys.readouterr().err
    assert len(rows(tmp_path / "run")) == 3 and np.isfinite(column(tmp_path / "run", "loss")).all()

    with pytest.raises(SystemExit) as caught:  # 8 px: the last map has one
        pretrain("moco", *flags(source, tmp_path / "small", *one, "--image-size", 8))
    said = capsys.readouterr().err
    assert caught.value.code == 2 and said.count("error:") == 1
    assert "a map of one pixel" in said.splitlines()[-1]


def test_networks_of_timm_cannot_be_cut_into_groups(source, tmp_path, capsys):
    pytest.importorskip("timm")
    timm = ("--arch", "timm:mobilenetv3_small_100", "--image-size", 32, "--epochs", "0.1")
    with pytest.raises(SystemExit) as caught:
        pretrain("moco", *flags(source, tmp_path / "run", *timm))
    said = capsys.readouterr().err
    assert caught.value.code == 2 and said.count("error:") == 1
    assert "BatchNormAct2d that is no plain BatchNorm" in said and "--bn-splits 1" in said
    pretrain("moco", *flags(source, tmp_path / "one", *timm, "--bn-splits", 1, "--knn-every", "0"))
    assert np.isfinite(column(tmp_path / "one", "loss")).all()


# ---- processes -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_groups_that_two_processes_cannot_share_are_refused_once(tmp_path):
    """By the real command under the real launcher, on linked CPU processes."""
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launcher += ["--main_process_port", str(free_port()), "-m", "moco.pretrain"]
    done = subprocess.run(
        [sys.executable, *launcher, "demo", "--out", str(tmp_path / "run"), "--bn-splits", "3"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.count("error: --bn-splits 3: cannot be shared by 2 processes") == 1


# ---- reproduce.sh --------------------------------------------------------------------------------

STAND_IN = """#!/usr/bin/env bash
# Says what it was asked; a judgement leaves the file that the real one would
echo "$*" >> "$SAID"
mkdir -p "$RUN/results"
case "$2:$*" in
moco.pretrain:*) [ -e "$RUN/encoder.safetensors" ] || touch "$RUN/encoder.safetensors" ;;
eval:*) touch "$RUN/results/finetune-simclr-100-random-00000000.json" ;;
eval.knn:*--layer*) touch "$RUN/results/knn-weighted-k200-output-encoder-00000000.json" ;;
eval.knn:*) touch "$RUN/results/knn-weighted-k200-encoder-00000000.json" ;;
eval.linear:*) touch "$RUN/results/linear-moco-encoder-00000000.json" ;;
esac
"""


@pytest.mark.parametrize("recipe, judged", [("demo", 1), ("cifar10-symmetric", 3)])
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
    if recipe == "demo":
        assert first[1].count(" -- ") == 2 and first[1].startswith(f"-m eval knn {run} ")
    else:
        assert f"-m eval.knn {run} --layer -1" in first and f"-m eval.linear {run}" in first
