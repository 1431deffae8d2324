"""The linear classifier: its steps, its solution, its protocols, and an encoder left alone."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from common.augment import Batched
from common.data import ImageSplit, epoch_order
from common.errors import UserError
from common.launch import launch
from eval import linear, training
from eval.encoder import Preprocess
from eval.identity import fingerprint
from eval.linear import BYOL, FEATURES, MOCO, PROTOCOLS, SIMCLR, SIMCLR_CIFAR, Probe, Settings
from eval.results.record import confidence
from eval.splits import to_choose_on
from eval.training import Crops, Order
from eval.unfinished import Unfinished
from tests import helpers
from tests.eval.harness import again, assert_same_records, coloured, record_of, subject_of

PLAIN = replace(FEATURES, rates=(0.5,), batch_size=256, init_std=0.0)


def probe_of(protocol, width=4, classes=3):
    return Probe(width, classes, protocol).double()


def problem(count=300, width=4, classes=3, noise=2.0, seed=0):
    """Overlapping clusters, so that the best classifier is finite."""
    draw = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=draw, dtype=torch.float64)
    labels = torch.arange(count) % classes
    noise = noise * torch.randn(count, width, generator=draw, dtype=torch.float64)
    return centres[labels] + noise, labels


def train(probe, x, y, protocol):
    size = protocol.batch_size
    order = Order(len(x), size, protocol.epochs, 1, part=size)
    accelerator = launch("fp32")
    training.train(
        probe,
        linear.optimizer_of(probe, protocol),
        partial(linear.in_memory, x, y, order, accelerator),
        order,
        lambda step: [rate * protocol.decay_at(step, order.steps) for rate in protocol.peaks()],
        Unfinished(None, "", ""),
        what="",
        accelerator=accelerator,
    )


# ---- the classifier ------------------------------------------------------------------------------


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_step_is_the_papers_sgd_for_each_rate(nesterov):
    """In loops: the gradient of the mean cross entropy, momentum 0.9, no weight decay."""
    protocol = replace(
        PLAIN, rates=(0.5, 0.05), batch_size=50, epochs=1, nesterov=nesterov, init_std=0.01
    )
    x, y = problem()
    probe = probe_of(protocol)
    assert all(w[:-1].std() > 0 and not w[-1].any() for w in probe.weights)
    weights = [w.detach().clone() for w in probe.weights]
    velocity = [torch.zeros_like(w) for w in weights]
    train(probe, x, y, protocol)
    order = epoch_order(1, 0, 300)
    for step in range(6):
        rows = order[50 * step : 50 * step + 50]
        inputs = F.pad(x[rows], (0, 1), value=1.0)
        decay = 0.5 * (1 + math.cos(math.pi * step / 6))
        for weight, v, rate in zip(weights, velocity, (0.5, 0.05), strict=True):
            error = (inputs @ weight).softmax(1) - F.one_hot(y[rows], 3)
            gradient = inputs.T @ error / 50
            v.mul_(0.9).add_(gradient)
            weight -= rate * 50 / 256 * decay * (gradient + 0.9 * v if nesterov else v)
    for found, weight in zip(probe.weights, weights, strict=True):
        assert torch.allclose(found, weight, rtol=0, atol=1e-12)
    logits = torch.stack([F.pad(x, (0, 1), value=1.0) @ weight for weight in weights], dim=1)
    assert torch.allclose(probe(x), logits, rtol=0, atol=1e-12)


def test_a_class_lies_together_in_memory():
    """What the speed on a CPU rests on: of weights that were moved and gradients, and of logits."""
    probe = probe_of(FEATURES).to(torch.float32).to(torch.float64)
    x, y = problem()
    logits = probe(x)
    training.total_loss(logits, y).backward()
    assert logits.permute(1, 2, 0).is_contiguous()
    for weight in probe.weights:
        assert weight.shape == (5, 3) and weight.T.is_contiguous()
        assert weight.grad.T.is_contiguous()


def test_the_loss_is_the_sum_over_images_and_rates():
    x, y = problem(count=20)
    logits = torch.stack([x[:, :3], -2 * x[:, :3]], dim=1)
    expected = -sum(logits[i, r].log_softmax(0)[y[i]] for i in range(20) for r in range(2))
    assert training.total_loss(logits, y).item() == pytest.approx(expected.item(), rel=1e-12)


def best_logits(x, y, classes):
    """The minimum of the mean cross entropy, in float64, by Newton's method with line search."""
    inputs, target = F.pad(x, (0, 1), value=1.0), F.one_hot(y, classes).double()
    weight = torch.zeros(inputs.shape[1] * classes, dtype=torch.float64)

    def loss(flat):
        return -(target * (inputs @ flat.view(-1, classes)).log_softmax(1)).sum(1).mean()

    for _ in range(30):
        gradient = torch.autograd.functional.jacobian(loss, weight)
        curvature = torch.autograd.functional.hessian(loss, weight)
        move, size = torch.linalg.pinv(curvature, hermitian=True) @ gradient, 1.0
        while loss(weight - size * move) > loss(weight) and size > 1e-6:
            size /= 2
        weight = weight - size * move
    assert torch.autograd.functional.jacobian(loss, weight).abs().max() < 1e-10
    return inputs @ weight.view(-1, classes)


def test_training_finds_the_one_best_classifier():
    x, y = problem()
    protocol = replace(PLAIN, batch_size=300, epochs=3000, rates=(0.2,))
    probe = probe_of(protocol)
    train(probe, x, y, protocol)
    found, expected = probe(x)[:, 0].softmax(1), best_logits(x, y, 3).softmax(1)
    assert (found - expected).abs().max() < 1e-6


def test_separable_features_are_told_apart():
    x, y = problem(noise=0.02)
    protocol = replace(FEATURES, epochs=30, batch_size=64)
    probe = probe_of(protocol)
    train(probe, x, y, protocol)
    assert probe(x).shape == (300, len(protocol.rates), 3)
    assert (probe(x)[:, -1].argmax(1) == y).all()


def test_rates_trained_together_are_rates_trained_alone():
    x, y = problem()
    protocol = replace(BYOL, epochs=3, batch_size=50)
    together = probe_of(protocol)
    train(together, x, y, protocol)
    for i, rate in enumerate(protocol.rates):
        alone = probe_of(replace(protocol, rates=(rate,)))
        train(alone, x, y, replace(protocol, rates=(rate,)))
        assert torch.allclose(together.weights[i], alone.weights[0], rtol=0, atol=1e-12)


# ---- protocols -----------------------------------------------------------------------------------


def test_the_papers_protocols():
    assert SIMCLR.rates == (0.1,) and SIMCLR.batch_size == 4096 and SIMCLR.epochs == 90
    assert SIMCLR.nesterov and SIMCLR_CIFAR.batch_size == 512 and SIMCLR_CIFAR.epochs == 100
    assert MOCO.rates == (30.0,) and MOCO.batch_size == 256 and MOCO.epochs == 100
    assert not MOCO.nesterov
    v3 = PROTOCOLS["moco-v3"]  # 0.4 at a batch of 1024
    assert v3.peaks() == pytest.approx([0.4]) and v3.epochs == 90 and not v3.nesterov
    assert v3.decay_at(45, 90) == pytest.approx(0.5) and v3.init_std == 0.01
    assert BYOL.rates == (0.4, 0.3, 0.2, 0.1, 0.05) and BYOL.epochs == 80 and BYOL.nesterov
    assert [PROTOCOLS[name].augment for name in ("simclr", "moco", "byol")] == [True] * 3
    assert not FEATURES.augment
    assert [MOCO.decay_at(step, 100) for step in (0, 59, 60, 79, 80, 99)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01, 0.01]
    )
    assert [SIMCLR.decay_at(step, 8) for step in (0, 2, 4, 8)] == pytest.approx(
        [1, 0.5 + 0.5**1.5, 0.5, 0]
    )
    assert SIMCLR.peaks() == pytest.approx([0.1 * 4096 / 256])
    assert replace(MOCO, batch_size=1024).peaks() == [30.0]  # main_lincls.py does not scale it
    assert MOCO.partial and not SIMCLR.partial and not BYOL.partial


def test_the_rate_is_chosen_on_images_that_are_not_trained_on():
    images = coloured(205)
    rest, choice, held_out = to_choose_on(images, None, seed=1)
    assert len(held_out) == 20 and choice is images
    assert torch.equal(torch.cat([rest, held_out]).sort().values, torch.arange(205))
    rest, choice, held_out = to_choose_on(coloured(2), None, seed=1)
    assert len(rest) == len(held_out) == 1
    with pytest.raises(UserError, match="one training image"):
        to_choose_on(coloured(1), None, seed=1)
    own = coloured(30)
    rest, choice, index = to_choose_on(images, own, seed=1)
    assert len(rest) == 205 and choice is own and len(index) == 30
    pool = torch.arange(100, 130)
    _, _, held_out = to_choose_on(images, None, 1, pool)
    assert len(held_out) == 20 and torch.isin(held_out, pool).all()


def test_every_epoch_is_a_permutation():
    index = torch.arange(31)
    order = Order(31, batch_size=8, epochs=2, seed=1)
    steps = [order.batch(step) for step in range(order.steps)]
    assert len(steps) == 6 and all(len(step) == 8 for step in steps)
    for epoch in (steps[:3], steps[3:]):
        seen = torch.cat(epoch)
        assert len(seen.unique()) == 24 and torch.isin(seen, index).all()
    order = replace(order, partial=True)  # MoCo's: nothing is left out
    steps = [order.batch(step) for step in range(order.steps)]
    assert [len(step) for step in steps] == [8, 8, 8, 7] * 2
    assert all(torch.equal(torch.cat(steps[i : i + 4]).sort().values, index) for i in (0, 4))


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize("partial", [False, True])
def test_the_processes_share_every_part_of_every_batch(processes, partial):
    order = Order(23, batch_size=7, epochs=2, seed=1, partial=partial, part=3)
    for step in range(order.steps):
        batch, rows = order.batch(step), []
        for part in range(order.parts_per_step):
            for rank in range(processes):
                rows += range(len(batch))[order.share(step, part, rank, processes)]
        assert rows == list(range(len(batch)))


def test_views_stay_in_the_range_of_pixels():
    """Bicubic resampling overshoots at edges; pretraining and judging clip, so this does too."""
    edges = torch.zeros(1, 3, 9, 9, dtype=torch.uint8)
    edges[..., ::2] = 255
    augmentation = Batched(training.train_views(Preprocess(24)))
    draws = torch.rand(64, augmentation.draws, dtype=torch.float64)
    views = augmentation(edges.expand(64, -1, -1, -1), draws)
    assert views.min() == 0 and views.max() == 1


@pytest.mark.parametrize("interpolation, levels", [("bicubic", 32), ("bilinear", 1.6)])  # on noise
def test_views_of_workers_are_those_of_memory_but_for_rounding(interpolation, levels):
    draw = torch.Generator().manual_seed(5)
    sizes = [(40, 30), (33, 60), (24, 24), (50, 90)] * 3
    pixels = [torch.randint(256, (3, *size), generator=draw).byte() for size in sizes]
    labels = torch.arange(12)
    order = Order(12, batch_size=5, epochs=2, seed=1, partial=True, part=4)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    given = Preprocess(16, interpolation=interpolation, mean=mean, std=std)
    decoded = ImageSplit("x", pixels, labels, store=pixels)
    one, other = (
        Crops(images, order, given, "x") for images in (decoded, ImageSplit("x", pixels, labels))
    )
    found = list(zip(one(1), other(1), strict=True))
    assert len(found) == (order.steps - 1) * order.parts_per_step
    for (views, labels), (theirs, same) in found:
        assert torch.equal(labels, same) and views.shape == theirs.shape
        if len(labels):
            assert (views - theirs).abs().max() < levels / 255 / 0.2
            assert (views - theirs).abs().mean() < 0.5 / 255 / 0.2


def test_a_held_out_image_does_not_replace_a_damaged_one(tmp_path, monkeypatch):
    """Image 0 cannot be decoded, and image 1, which would take its place, is held out."""
    subject = subject_of(tmp_path, method="byol", counts=(24, 6))
    images = subject.splits()[0]
    images.encoded, images.store = ["nowhere.png", *images.encoded[1:]], None
    seed = next(s for s in range(999) if 1 in to_choose_on(images, None, s)[2].tolist())
    _, _, held_out = to_choose_on(images, None, seed)
    seen = []
    train = training.train

    def watched(probe, optimizer, inputs, *args, **kwargs):
        pixels = inputs.images
        seen.extend(pixels.encoded[i] for i in range(len(pixels)))
        return train(probe, optimizer, inputs, *args, **kwargs)

    monkeypatch.setattr(linear, "train", watched)
    linear.judge(subject, Settings(epochs=1, batch_size=8, seed=seed))
    assert len(seen) == 24 - len(held_out)
    assert not any(one is images.encoded[i] for one in seen for i in held_out.tolist())


@pytest.mark.parametrize("change", ["validation", "seed"])
def test_other_images_to_choose_on_are_another_judgement(tmp_path, monkeypatch, change):
    keys = []

    class Recorded(Unfinished):
        def __init__(self, folder, name, key, accelerator):
            keys.append(key)
            super().__init__(None, name, key, accelerator)

    monkeypatch.setattr(linear, "Unfinished", Recorded)
    for i in range(2):
        subject = subject_of(tmp_path, method="byol", counts=(40, 6))
        if change == "validation" and i:
            subject.opened["validation"] = coloured(12)
        seed = i + 1 if change == "seed" else 1
        linear.judge(subject, Settings(epochs=1, batch_size=8, seed=seed))
    assert keys[0] != keys[1]


# ---- a whole judgement ---------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["simclr", "moco", "byol", "features"])
def test_every_protocol_reaches_what_can_be_reached(tmp_path, protocol):
    subject = subject_of(tmp_path)
    before = fingerprint(subject.encoder.network)
    linear.judge(subject, Settings(protocol=protocol, epochs=10, batch_size=16))
    assert fingerprint(subject.encoder.network) == before
    row = record_of(tmp_path)
    assert row["metrics"]["top1"] == 100.0
    assert (row["task"], row["protocol"], row["metric"]) == ("linear", protocol, "top1")
    assert row["settings"]["epochs"] == 10 and row["settings"]["batch_size"] == 16
    rates = replace(PROTOCOLS[protocol], batch_size=16).peaks()
    assert min(abs(row["settings"]["lr"] - rate) for rate in rates) < 1e-6


@pytest.mark.parametrize("protocol", ["simclr", "moco", "byol", "features"])
@pytest.mark.parametrize("count", [2, 9])
def test_a_few_images(tmp_path, protocol, count):
    subject = subject_of(tmp_path, counts=(count, 3))
    linear.judge(subject, Settings(protocol=protocol, epochs=2))
    row = record_of(tmp_path)
    assert 0 <= row["metrics"]["top1"] <= 100 and row["train_images"] == count
    assert row["settings"]["batch_size"] == count - (protocol in ("byol", "features"))


def test_an_encoder_that_learns_under_the_classifier_is_caught(tmp_path, monkeypatch):
    """A backbone left unfrozen: an optimiser step on the encoder within the probe's training."""
    subject = subject_of(tmp_path)
    train = training.train

    def unfrozen(*args, frozen, **kwargs):
        optimizer = torch.optim.SGD(frozen.parameters(), lr=1e-3)
        frozen(torch.rand(4, 3, 8, 8)).square().sum().backward()
        optimizer.step()
        return train(*args, frozen=frozen, **kwargs)

    monkeypatch.setattr(linear, "train", unfrozen)
    with pytest.raises(RuntimeError, match="not a linear evaluation"):
        linear.judge(subject, Settings(protocol="simclr", epochs=1, batch_size=16))
    assert not list(tmp_path.glob("linear*"))


@pytest.mark.parametrize(
    "changes, recorded",
    [({}, {}), ({"epochs": 2, "batch_size": 16}, {"epochs": 2, "batch_size": 16})],
)
def test_what_is_not_the_protocols_own_is_recorded(tmp_path, changes, recorded):
    subject = subject_of(tmp_path)
    linear.judge(subject, Settings(protocol="features", **changes))
    assert record_of(tmp_path)["changed"] == recorded


@pytest.mark.parametrize(("method", "name"), [("moco", "moco"), ("byol", "byol")])
def test_the_protocol_is_the_methods_unless_said(tmp_path, method, name):
    subject = subject_of(tmp_path, method=method)
    assert linear.protocol_of(subject, Settings()) == PROTOCOLS[name]
    assert linear.protocol_of(subject, Settings(protocol="features")) == FEATURES
    subject.encoder.metadata["method"] = "dino"  # of no protocol here
    assert linear.protocol_of(subject, Settings()) == FEATURES
    assert linear.protocol_of(subject, Settings(protocol=name)) == PROTOCOLS[name]
    subject = subject_of(tmp_path)
    for size, paper in ((24, SIMCLR_CIFAR), (32, SIMCLR_CIFAR), (33, SIMCLR), (224, SIMCLR)):
        subject.encoder.input = Preprocess(size)
        assert linear.protocol_of(subject, Settings()) == paper
    subject.encoder.name = "pixels"
    assert linear.protocol_of(subject, Settings()) == FEATURES


@pytest.mark.parametrize("protocol", ["simclr", "features"])
def test_only_images_that_are_judged_are_counted(tmp_path, protocol):
    subject = subject_of(tmp_path)
    test = coloured(30)
    test.encoded, test.store = ["nowhere.png", *test.encoded[1:]], None
    subject.opened["splits"] = (subject.splits()[0], test)
    linear.judge(subject, Settings(protocol=protocol, epochs=1, batch_size=16))
    row = record_of(tmp_path)
    assert (row["train_images"], row["test_images"]) == (120, 29)
    assert row["interval"] == pytest.approx(confidence(row["metrics"]["top1"], 29), abs=1e-3)


def test_the_same_seed_gives_the_same_answer(tmp_path, monkeypatch):
    probes = []

    class Recorded(Probe):
        def __init__(self, *args):
            super().__init__(*args)
            probes.append(self)

    monkeypatch.setattr(linear, "Probe", Recorded)
    for i, seed in enumerate((1, 1, 2)):
        torch.manual_seed(i)
        settings = Settings(protocol="simclr", epochs=1, batch_size=16, seed=seed)
        linear.judge(subject_of(tmp_path / str(i)), settings)
    weights = [probe.weights[0] for probe in probes]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_an_encoder_in_training_mode_is_caught(tmp_path):
    subject = subject_of(tmp_path)
    subject.encoder.network.train()  # its running statistics move
    with pytest.raises(RuntimeError, match="the encoder changed"):
        linear.judge(subject, Settings(epochs=1, batch_size=16))
    assert not list(tmp_path.iterdir())


def test_a_wrong_protocol_is_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        helpers.evaluate(linear, "run", "--protocol", "best")
    assert caught.value.code == 2 and "byol" in capsys.readouterr().err


def test_the_rate_follows_the_batch_that_there_is(tmp_path):
    linear.judge(subject_of(tmp_path), Settings(protocol="simclr", epochs=1))
    row = record_of(tmp_path)
    assert row["settings"]["batch_size"] == 120  # all images; the protocol says 4096
    assert row["settings"]["lr"] == pytest.approx(0.1 * 120 / 256, abs=1e-6)


@pytest.mark.parametrize("protocol", ["moco", "byol", "features"])
def test_stopped_and_started_again_it_ends_the_same(tmp_path, monkeypatch, protocol):
    settings = Settings(protocol=protocol, epochs=2, batch_size=20)

    def judge(folder):
        linear.judge(subject_of(tmp_path / folder), settings)

    judge("whole")
    again(monkeypatch, {3, 4, 9}, lambda: judge("stopped"))
    assert_same_records(tmp_path / "whole", tmp_path / "stopped")
