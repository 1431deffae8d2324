"""Whole runs through the real command: interrupted and resumed, in parts, made to collapse."""

import importlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from PIL import Image
from safetensors import safe_open
from torch import nn

import byol.pretrain
from byol.config import DEMO
from byol.optim import LARS, parameter_groups, tau_at
from common import cli
from common.run import Run
from eval.health import diagnosis
from tests.helpers import METHODS, ROOT

COUNT, BATCH, EPOCHS = 96, 16, 3
STEPS = COUNT * EPOCHS // BATCH
STOPPED_AT = 10  # in mid-epoch, after the checkpoint of 9 steps and a logged step
SCALARS = {
    "step", "loss", "lr", "tau", "chance_loss", "feature_std", "effective_rank", "alignment",
    "uniformity",
}  # fmt: skip

DEADLY = f"""
import os, signal
import common.cli, common.run, byol.pretrain
log = common.run.Run.log
def deadly(run, step, **values):
    log(run, step, **values)
    if step == {STOPPED_AT}:
        os.kill(os.getpid(), signal.SIGKILL)
common.run.Run.log = deadly
common.cli.run(byol.pretrain.main)
"""


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
        "data": source, "out": out, "image_size": 16, "test_size": 16, "batch_size": BATCH,
        "epochs": EPOCHS, "warmup_epochs": 1, "hidden_dim": 32, "dim": 16, "log_every": 1,
        "save_every": 0.5, "knn_every": 1,
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


def here(*argv, main=byol.pretrain.main):
    """The command in this process, on one thread."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pretrain", *argv])
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            cli.run(main)
        finally:
            torch.set_num_threads(threads)


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def column(run, name="loss"):
    return np.array([row[name] for row in rows(run)])


def last_checkpoint(run):
    return torch.load(sorted((run / "checkpoints").glob("*.pt"))[-1])


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def exported(run):
    with safe_open(run / "encoder.safetensors", framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


# ---- interrupted and resumed ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    here(*flags(source, folder))
    return folder


def equal_runs(one, other):
    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    tensors, about = exported(one)
    assert len(tensors) > 20 and same(tensors, exported(other)[0])
    assert about == exported(other)[1]
    names = [path.name for path in sorted((one / "checkpoints").iterdir())]
    assert names == [path.name for path in sorted((other / "checkpoints").iterdir())]
    assert names[-1] == f"step-{STEPS:08d}.pt"
    for name in names:
        a, b = (torch.load(run / "checkpoints" / name) for run in (one, other))
        assert a.keys() == {"step", "online", "target", "optimizer"} and same(a, b)


class Stopped(Exception):
    pass


def test_interrupted_and_resumed_is_the_uninterrupted_run_bit_for_bit(
    whole, source, tmp_path, monkeypatch
):
    """Online, target with its buffers, optimiser, metrics and the exported encoder."""
    log = Run.log

    def stopping(run, step, **values):
        log(run, step, **values)
        if step == STOPPED_AT:
            raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Run, "log", stopping)
        here(*flags(source, tmp_path / "run"))
    assert last_checkpoint(tmp_path / "run")["step"] == STOPPED_AT - 1
    here(*flags(source, tmp_path / "run"))
    equal_runs(whole, tmp_path / "run")


@pytest.mark.slow
def test_killed_and_started_again_is_the_uninterrupted_run_bit_for_bit(whole, source, tmp_path):
    finished(start("-c", DEADLY, *flags(source, tmp_path / "run")), -signal.SIGKILL)
    said = finished(start("-m", "byol.pretrain", *flags(source, tmp_path / "run")))
    assert f"going on from step {STOPPED_AT - 1} of {STEPS}" in said
    equal_runs(whole, tmp_path / "run")


def test_what_a_run_records(whole):
    lines = rows(whole)
    assert [line["step"] for line in lines] == list(range(STEPS))
    assert all(line.keys() >= SCALARS for line in lines)
    assert [line["step"] for line in lines if "knn" in line] == [5, 11, 17]
    assert all(np.isfinite(value) for line in lines for value in line.values())
    assert lines[0]["lr"] == 0.0 and lines[6]["lr"] == pytest.approx(DEMO.base_lr * BATCH / 256)
    assert lines[0]["tau"] == pytest.approx(DEMO.tau_base) and lines[0]["chance_loss"] == 4.0
    assert 3 < lines[0]["loss"] < 5
    about = {key: json.loads(value) for key, value in exported(whole)[1].items()}
    assert (about["method"], about["norm"], about["arch"]) == ("byol", "bn", "demo")
    assert about["finished"] is True and about["epochs"] == EPOCHS
    assert tuple(about["input"]["mean"]) == DEMO.mean and tuple(about["input"]["std"]) == DEMO.std


def test_the_online_encoder_is_exported(whole):
    tensors, _ = exported(whole)
    state = last_checkpoint(whole)
    for name, value in tensors.items():
        inside = (
            name.replace("head.", "projector.", 1)
            if name.startswith("head.")
            else f"encoder.{name}"
        )
        assert torch.equal(value, state["online"][inside]), name
    differs = [k for k, v in state["target"].items() if not torch.equal(v, state["online"][k])]
    assert len(differs) > 20  # weights, and the buffers too
    assert any("running_mean" in name for name in differs)


def test_a_run_of_another_config_is_refused(whole, source, capsys):
    with pytest.raises(SystemExit) as caught:
        here(*flags(source, whole, "--tau-base", "0.5", "--accumulate", "2"))
    said = capsys.readouterr().err
    assert caught.value.code == 2 and said.count("\n") == 1
    assert "tau_base" in said and "(now 0.5)" in said and "accumulate 1 (now 2)" in said


def test_a_run_that_is_all_warm_up_is_pointed_out(source, tmp_path, capsys):
    for warmup, said in ((1, False), (2, True)):
        flat = ("--epochs", "2", "--warmup-epochs", warmup, "--knn-every", "0")
        here(*flags(source, tmp_path / str(warmup), *flat))
        line = "the learning rate only rises: --warmup-epochs 2 of --epochs 2; try"
        assert (line in capsys.readouterr().err) == said


@pytest.mark.parametrize(("optimizer", "adapted"), [("lars", True), ("sgd", False)])
def test_the_optimizer_flag_says_whether_rates_adapt(source, tmp_path, optimizer, adapted):
    here(*flags(source, tmp_path / "run", "--optimizer", optimizer, "--knn-every", 0))
    groups = last_checkpoint(tmp_path / "run")["optimizer"]["param_groups"]
    assert [group["adapt"] for group in groups] == [adapted, False, adapted, False]


def test_the_predictor_may_have_a_rate_of_its_own(source, tmp_path):
    """--predictor-lr: by the same gradients, q alone moves so many times as far (App. I).

    Of two steps the first has the rate 0, so that the second finds the same weights in every run.
    """
    two_steps = ("--epochs", 2 * BATCH / COUNT, "--warmup-epochs", BATCH / COUNT)
    sgd = ("--optimizer", "sgd", "--precision", "fp64", "--knn-every", 0, *two_steps)
    ends = []
    for times in (0, 1, 3):
        here(*flags(source, tmp_path / str(times), *sgd, "--predictor-lr", times))
        ends.append(last_checkpoint(tmp_path / str(times)))
    still, once, thrice = (end["online"] for end in ends)
    parameters = [name for name in once if name.endswith((".weight", ".bias"))]
    moved = {name for name in parameters if not torch.equal(still[name], once[name])}
    assert moved == {name for name in parameters if name.startswith("predictor.")} != set()
    for name in parameters:
        expected = still[name] + 3 * (once[name] - still[name])
        torch.testing.assert_close(thrice[name], expected, rtol=1e-12, atol=1e-12)
    rates = [group["lr"] for group in ends[-1]["optimizer"]["param_groups"]]
    assert rates == [rates[0], rates[0], 3 * rates[0], 3 * rates[0]] and rates[0] > 0


# ---- one optimiser step in parts -----------------------------------------------------------------


@pytest.fixture
def moved(monkeypatch):
    """The tau of every update of the target."""
    calls, real = [], byol.pretrain.ema_

    def counted(target, online, tau):
        calls.append(tau)
        real(target, online, tau)

    monkeypatch.setattr(byol.pretrain, "ema_", counted)
    return calls


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_equal_the_whole_without_batch_statistics(source, tmp_path, moved, parts):
    """In float64, the same losses and weights; and the target moves once an optimiser step.

    A hidden layer of 32 in 16 groups would be pairs of units, each normalised to -1 and 1, where
    rounding decides signs.
    """
    settings = ("--norm", "gn+ws", "--precision", "fp64", "--knn-every", "0", "--hidden-dim", "256")
    here(*flags(source, tmp_path / "one", *settings))
    assert len(moved) == STEPS
    here(*flags(source, tmp_path / "parts", *settings, "--accumulate", parts))
    assert len(moved) == 2 * STEPS and moved[:STEPS] == moved[STEPS:]
    losses = column(tmp_path / "one")
    assert np.abs(column(tmp_path / "parts") - losses).max() < 1e-10
    assert losses[-1] < losses[0]
    one, other = (last_checkpoint(tmp_path / name) for name in ("one", "parts"))
    for network in ("online", "target"):
        for name, value in one[network].items():
            torch.testing.assert_close(other[network][name], value, rtol=1e-8, atol=1e-10)


def test_parts_have_batch_statistics_of_their_own(source, tmp_path):
    settings = ("--precision", "fp64", "--knn-every", "0")
    here(*flags(source, tmp_path / "one", *settings))
    here(*flags(source, tmp_path / "parts", *settings, "--accumulate", 2))
    assert abs(column(tmp_path / "one") - column(tmp_path / "parts"))[0] > 1e-4


def test_parts_hold_the_same_images_on_any_number_of_processes():
    images = torch.arange(24.0)

    def parts(rank, world):
        share = images.chunk(world)[rank]
        return [
            (part[0], last)
            for _, part, last in byol.pretrain.micro_batches([(0, (share, share))], 3)
        ]

    alone = parts(0, 1)
    assert [last for _, last in alone] == [False, False, True]
    assert torch.cat([part for part, _ in alone]).unique().tolist() == images.tolist()
    for world in (2, 4):
        together = zip(*(parts(rank, world) for rank in range(world)), strict=True)
        for (part, _), pieces in zip(alone, together, strict=True):
            assert torch.equal(torch.cat([piece for piece, _ in pieces]), part)


def test_a_batch_that_cannot_be_divided_is_refused(source, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        here(*flags(source, tmp_path / "run", "--accumulate", "3"))
    assert caught.value.code == 2
    assert "not divisible by 1 processes times --accumulate 3" in capsys.readouterr().err


# ---- a skipped step ------------------------------------------------------------------------------


def test_the_target_stays_where_an_optimiser_step_was_skipped(source, tmp_path, moved, monkeypatch):
    """A stand-in for an overflow of the loss scale at step 7."""
    real, calls = AcceleratedOptimizer.step, []

    def overflowing(optimizer, closure=None):
        calls.append(optimizer)
        optimizer._is_overflow = len(calls) == 8
        if not optimizer._is_overflow:
            real(optimizer, closure)

    monkeypatch.setattr(AcceleratedOptimizer, "step", overflowing)
    here(*flags(source, tmp_path / "run", "--knn-every", "0"))
    cfg = replace(DEMO, batch_size=BATCH, epochs=EPOCHS)
    assert len(calls) == STEPS
    assert moved == [tau_at(step, cfg, COUNT) for step in range(STEPS) if step != 7]


def test_an_overflow_is_reported_by_the_real_scaler():
    """Accelerate's wrapper of our optimiser over `torch.amp.GradScaler`, on a CPU."""
    Accelerator(cpu=True)
    model = nn.Linear(3, 3)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = AcceleratedOptimizer(LARS(parameter_groups(model, 0.0)), scaler=scaler)
    for group in optimizer.param_groups:
        group["lr"] = 1.0
    for factor, skipped in ((1.0, False), (torch.inf, True), (1.0, False)):
        before = model.weight.detach().clone()
        scaler.scale(model(torch.ones(2, 3)).square().sum() * factor).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.step_was_skipped == skipped
        assert torch.equal(before, model.weight) == skipped


# ---- collapse ------------------------------------------------------------------------------------


class NoPredictor(byol.pretrain.Online):
    def __init__(self, cfg):
        super().__init__(cfg)
        self.predictor = nn.Identity()


class NoStopGradient(byol.pretrain.Target):
    """tau 0, so that target and online are one, and gradients through both."""

    def __init__(self, online):
        super().__init__(online)
        self.online = [online]  # not a module of this one

    def forward(self, view1, view2):
        online = self.online[0]
        with torch.enable_grad():
            z1, z2 = (online.projector(online.encoder(view)) for view in (view1, view2))
        return z1, z2


def demo_run(out, seed):
    """200 steps of the demo on 64 images each."""
    epochs, base_lr = str(200.5 * 64 / 5120), str(DEMO.base_lr * DEMO.batch_size / 64)
    here(
        "demo", "--out", str(out), "--seed", str(seed), "--batch-size", "64", "--epochs", epochs,
        "--warmup-epochs", "0.25", "--base-lr", base_lr, "--knn-every", "0",
    )  # fmt: skip
    assert rows(out)[-1]["step"] == 199
    return [row["step"] for row in rows(out) if diagnosis(row)]


@pytest.mark.slow
@pytest.mark.parametrize("name, broken", [("Online", NoPredictor), ("Target", NoStopGradient)])
def test_a_run_made_to_collapse_is_named_within_200_steps(
    name, broken, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(byol.pretrain, name, broken)
    named = demo_run(tmp_path / "run", 1)
    assert named and named[0] <= 100 and named[-1] == 199  # and it stays so
    said = capsys.readouterr().err
    assert said.count("COLLAPSE: all embeddings are nearly one point") == 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("method", METHODS)
def test_a_healthy_run_is_not_named(method, seed, tmp_path, capsys):
    """The demo recipe of each method through its whole schedule, in two epochs."""
    main = importlib.import_module(f"{method}.pretrain").main
    warmup = [] if method == "moco" else ["--warmup-epochs", "0.2"]
    short = ["--epochs", "2", *warmup, "--knn-every", "0", "--log-every", "5"]
    here("demo", "--out", str(tmp_path / "run"), "--seed", str(seed), *short, main=main)
    assert "COLLAPSE" not in capsys.readouterr().err
    last = rows(tmp_path / "run")[-1]
    assert last["feature_std"] > 0.3 and last["uniformity"] < -0.3  # far from the thresholds
