"""Whole runs through the real command: interrupted and resumed, in parts, made to collapse."""

import json
import os
import signal
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from PIL import Image
from torch import nn

import byol.pretrain
from byol.config import DEMO
from byol.model import Online, group_norm_weight_standardised, init_weights
from byol.optim import LARS, parameter_groups, tau_at
from byol.pretrain import train, train_in_parts
from common import encoders
from common.health import collapse_warning
from common.run import Run
from tests.byol.harness import play
from tests.helpers import (
    METHODS,
    assert_same_run,
    checkpoints,
    ended,
    exported,
    forked,
    pretrain,
    rows,
)

COUNT, BATCH, EPOCHS = 96, 16, 3
STEPS = COUNT * EPOCHS // BATCH
STOPPED_AT = 10  # in mid-epoch, after the checkpoint of 9 steps and a logged step
SCALARS = {
    "step", "loss", "lr", "tau", "chance_loss", "feature_std", "effective_rank", "alignment",
    "uniformity",
}  # fmt: skip


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
        "data": source, "out": out, "image_size": 16, "eval_size": 16, "batch_size": BATCH,
        "epochs": EPOCHS, "warmup_epochs": 1, "hidden_dim": 32, "dim": 16, "log_every": 1,
        "save_every": 0.5, "knn_every": 1,
    }  # fmt: skip
    pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in settings.items()]
    return ["demo", *(word for pair in pairs for word in pair), *map(str, more)]


here = partial(pretrain, "byol")


def column(run, name="loss"):
    return np.array([row[name] for row in rows(run)])


def last_checkpoint(run):
    return list(checkpoints(run).values())[-1]


# ---- interrupted and resumed ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    here(*flags(source, folder))
    return folder


def stop_at(step, stop):
    """Have `stop` called in a run after so many steps, before it writes anything of the next."""
    end_step = Run.end_step

    def stopping(run, now, *args, **metrics):
        if now == step:
            stop()
        end_step(run, now, *args, **metrics)

    return stopping


class Stopped(Exception):
    pass


def test_interrupted_and_resumed_is_the_uninterrupted_run_bit_for_bit(
    whole, source, tmp_path, monkeypatch
):
    """Online, target with its buffers, optimiser, metrics and the exported encoder."""

    def stop():
        raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Run, "end_step", stop_at(STOPPED_AT, stop))
        here(*flags(source, tmp_path / "run"))
    assert last_checkpoint(tmp_path / "run")["step"] == STOPPED_AT - 1
    assert len(rows(tmp_path / "run")) == STOPPED_AT  # one is not in the checkpoint
    here(*flags(source, tmp_path / "run"))
    assert last_checkpoint(whole).keys() == {"step", "online", "target", "optimizer"}
    assert last_checkpoint(whole)["step"] == STEPS
    assert_same_run(whole, tmp_path / "run")


def die():
    Run.end_step = stop_at(STOPPED_AT, lambda: os.kill(os.getpid(), signal.SIGKILL))


@pytest.mark.slow
def test_killed_and_started_again_is_the_uninterrupted_run_bit_for_bit(whole, source, tmp_path):
    argv, log = flags(source, tmp_path / "run"), tmp_path / "log"
    assert ended(forked("byol", argv, log, before=die)) == [-signal.SIGKILL], log.read_text()
    assert ended(forked("byol", argv, log)) == [0], log.read_text()
    assert f"going on from step {STOPPED_AT - 1} of {STEPS}" in log.read_text()
    assert_same_run(whole, tmp_path / "run")


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
    assert (about["method"], about["norm"], about["encoder"]) == ("byol", "bn", "demo")
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


def test_the_predictor_may_have_a_rate_of_its_own(source, tmp_path):
    """--predictor-lr: by the same gradients, q alone moves so many times as far (App. I).

    Of two steps the first has the rate 0, so that the second finds the same weights in every run.
    """
    two_steps = ("--epochs", 2 * BATCH / COUNT, "--warmup-epochs", BATCH / COUNT)
    sgd = ("--optimizer", "sgd", "--precision", "fp64", "--knn-every", 0, *two_steps)
    ends = []
    for lr_multiplier in (0, 1, 3):
        here(*flags(source, tmp_path / str(lr_multiplier), *sgd, "--predictor-lr", lr_multiplier))
        ends.append(last_checkpoint(tmp_path / str(lr_multiplier)))
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


def record_of(loop, norm="bn", accumulate=1):
    """Losses, and both networks after each step, of a few float64 steps of `loop`.

    A hidden layer of 32 in 16 groups would be pairs of units, each normalised to -1 and 1, where
    rounding decides signs.
    """
    cfg = replace(
        DEMO, batch_size=BATCH, epochs=EPOCHS, warmup_epochs=1, accumulate=accumulate,
    )  # fmt: skip
    torch.manual_seed(0)
    network = Online(encoders.build("demo"), 256, 16)
    if norm == "gn+ws":
        group_norm_weight_standardised(network)
    init_weights(network)
    views, seen = torch.rand(12, 2, BATCH, 3, 16, 16, dtype=torch.float64), []

    def observe(online, target, optimizer):
        seen.append({f"online.{k}": v.clone() for k, v in online.state_dict().items()})
        seen[-1] |= {f"target.{k}": v.clone() for k, v in target.state_dict().items()}

    steps = ((step, (view1, view2)) for step, (view1, view2) in enumerate(views))
    record = play(cfg, COUNT, network.double(), lambda *_: None, steps, observe, loop)
    return torch.stack(record.losses), seen


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_equal_the_whole_without_batch_statistics(parts):
    """The same losses and weights after each step, the moving average among them."""
    losses, whole = record_of(train, "gn+ws")
    theirs, in_parts = record_of(train_in_parts, "gn+ws", parts)
    assert (losses - theirs).abs().max() < 1e-10 and (losses[-1] - losses[0]).abs() > 1e-3
    for one, other in zip(whole, in_parts, strict=True):
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=1e-8, atol=1e-10)
    assert any(not torch.equal(value, whole[0][name]) for name, value in whole[-1].items())


def test_parts_have_batch_statistics_of_their_own():
    losses, whole = record_of(train)
    theirs, in_parts = record_of(train_in_parts, accumulate=2)
    assert (losses - theirs)[0].abs() > 1e-4
    tracked = [
        state["online.encoder.layers.1.num_batches_tracked"] for state in (whole[1], in_parts[1])
    ]
    assert tracked == [2, 4]


def test_every_so_manyth_image_is_of_a_part():
    """So that a part holds the same images on any number of processes."""
    seen = []

    class Spy(nn.Linear):
        num_features = 4

        def forward(self, x):
            seen.append(x[:, 0].tolist())
            return super().forward(x)

    cfg = replace(DEMO, batch_size=6, accumulate=3)
    view = torch.arange(6.0)[:, None]
    steps = [(0, (view, 10 + view))]
    play(
        cfg, COUNT, Online(Spy(1, 4), 4, 4), lambda *_: None, steps, lambda *_: None, train_in_parts
    )
    parts = [part for one in seen for part in one if part < 10]
    assert parts == [0, 3, 0, 3, 1, 4, 1, 4, 2, 5, 2, 5]  # each by both networks


def test_the_command_takes_the_parts_that_it_is_asked_for(source, tmp_path, moved):
    """And moves the target once an optimiser step."""
    settings = ("--precision", "fp64", "--knn-every", 0)
    here(*flags(source, tmp_path / "one", *settings))
    here(*flags(source, tmp_path / "parts", *settings, "--accumulate", 2))
    assert len(moved) == 2 * STEPS and moved[:STEPS] == moved[STEPS:]
    assert abs(column(tmp_path / "one") - column(tmp_path / "parts"))[0] > 1e-4


# ---- a skipped step ------------------------------------------------------------------------------


@pytest.fixture
def moved(monkeypatch):
    """The tau of every update of the target."""
    calls, real = [], byol.pretrain.ema_

    def counted(target, online, tau):
        calls.append(tau)
        real(target, online, tau)

    monkeypatch.setattr(byol.pretrain, "ema_", counted)
    return calls


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


class NoPredictor(Online):
    def __init__(self, *args):
        super().__init__(*args)
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
    return [row["step"] for row in rows(out) if collapse_warning(row)]


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
    warmup = [] if method == "moco" else ["--warmup-epochs", "0.2"]
    short = ["--epochs", "2", *warmup, "--knn-every", "0", "--log-every", "5"]
    pretrain(method, "demo", "--out", tmp_path / "run", "--seed", seed, *short)
    assert "COLLAPSE" not in capsys.readouterr().err
    last = rows(tmp_path / "run")[-1]
    assert last["feature_std"] > 0.3 and last["uniformity"] < -0.3  # far from the thresholds
