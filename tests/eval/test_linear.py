"""The linear classifier: its steps, its solution, its protocols, and an encoder left alone."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.errors import UserError
from eval import linear
from eval.encoder import Preprocess
from eval.features import fingerprint
from eval.linear import BYOL, FEATURES, MOCO, PROTOCOLS, SIMCLR, SIMCLR_CIFAR, Probe, Settings
from eval.results.record import confidence
from eval.unfinished import Unfinished
from tests import helpers
from tests.eval.harness import again, assert_same_records, coloured, record_of, subject_of

PLAIN = replace(FEATURES, rates=(0.5,), batch_size=256, init_std=0.0)


def double(probe):
    probe.weight, probe.velocity = probe.weight.double(), probe.velocity.double()
    scale = probe.protocol.batch_size / 256
    probe.rates = torch.tensor(probe.protocol.rates, dtype=torch.float64).view(-1, 1, 1) * scale
    return probe


def problem(count=300, width=4, classes=3, noise=2.0, seed=0):
    """Overlapping clusters, so that the best classifier is finite."""
    draw = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=draw, dtype=torch.float64)
    labels = torch.arange(count) % classes
    noise = noise * torch.randn(count, width, generator=draw, dtype=torch.float64)
    return centres[labels] + noise, labels


def train(probe, x, y, protocol, steps, seed=1):
    def batches(first):
        return ((x[i], y[i]) for i in linear.shuffled(torch.arange(len(x)), protocol, seed, first))

    linear.train(probe, batches, steps, Unfinished(None, "", ""))


# ---- the classifier ------------------------------------------------------------------------------


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_step_is_torchs_sgd_for_each_rate(nesterov):
    protocol = replace(PLAIN, rates=(0.5, 0.05), batch_size=512, nesterov=nesterov, init_std=0.01)
    x, y = problem()
    probe = double(Probe(4, 3, protocol))
    assert probe.weight.shape == (2, 5, 3) and probe.rates.flatten().tolist() == [1.0, 0.1]
    assert probe.weight[:, :-1].std() > 0 and not probe.weight[:, -1].any()
    modules = []
    for i in range(2):
        module = nn.Linear(4, 3).double()
        with torch.no_grad():
            module.weight.copy_(probe.weight[i, :-1].T)
            module.bias.copy_(probe.weight[i, -1])
        modules.append(module)
    optimizers = [
        torch.optim.SGD(m.parameters(), lr=1.0, momentum=0.9, nesterov=nesterov) for m in modules
    ]
    for step in range(6):
        part, decay = slice(40 * step, 40 * step + 40), 1 - 0.1 * step
        probe.step(x[part], y[part], decay)
        for rate, module, optimizer in zip((1.0, 0.1), modules, optimizers, strict=True):
            optimizer.param_groups[0]["lr"] = rate * decay
            optimizer.zero_grad()
            F.cross_entropy(module(x[part]), y[part]).backward()
            optimizer.step()
    for i, module in enumerate(modules):
        assert torch.allclose(probe.weight[i, :-1].T, module.weight, rtol=0, atol=1e-12)
        assert torch.allclose(probe.weight[i, -1], module.bias, rtol=0, atol=1e-12)
        assert torch.allclose(probe.logits(x)[i], module(x), rtol=0, atol=1e-12)


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
    probe = double(Probe(4, 3, protocol))
    train(probe, x, y, protocol, 3000)
    found, expected = probe.logits(x)[0].softmax(1), best_logits(x, y, 3).softmax(1)
    assert (found - expected).abs().max() < 1e-6


def test_separable_features_are_told_apart():
    x, y = problem(noise=0.02)
    protocol = replace(FEATURES, epochs=30, batch_size=64)
    probe = double(Probe(4, 3, protocol))
    train(probe, x, y, protocol, 300 // 64 * 30)
    assert probe.logits(x).shape == (len(protocol.rates), 300, 3)
    assert (probe.logits(x)[-1].argmax(1) == y).all()


def test_rates_trained_together_are_rates_trained_alone():
    x, y = problem()
    protocol = replace(BYOL, epochs=3, batch_size=50)
    together = double(Probe(4, 3, protocol))
    train(together, x, y, protocol, 18)
    for i, rate in enumerate(protocol.rates):
        alone = double(Probe(4, 3, replace(protocol, rates=(rate,))))
        train(alone, x, y, protocol, 18)
        assert torch.allclose(together.weight[i], alone.weight[0], rtol=0, atol=1e-12)
    chosen = together.logits(x)[3]
    together.select(3)
    assert torch.allclose(together.logits(x)[0], chosen, rtol=0, atol=1e-12)
    assert together.rates.item() == pytest.approx(protocol.rates[3] * 50 / 256)


# ---- protocols -----------------------------------------------------------------------------------


def test_the_papers_protocols():
    assert SIMCLR.rates == (0.1,) and SIMCLR.batch_size == 4096 and SIMCLR.epochs == 90
    assert SIMCLR.nesterov and SIMCLR_CIFAR.batch_size == 512 and SIMCLR_CIFAR.epochs == 100
    assert MOCO.rates == (30.0,) and MOCO.batch_size == 256 and MOCO.epochs == 100
    assert not MOCO.nesterov
    assert BYOL.rates == (0.4, 0.3, 0.2, 0.1, 0.05) and BYOL.epochs == 80 and BYOL.nesterov
    assert [PROTOCOLS[name].augment for name in ("simclr", "moco", "byol")] == [True] * 3
    assert not FEATURES.augment
    assert [MOCO.decay_at(step, 100) for step in (0, 59, 60, 79, 80, 99)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01, 0.01]
    )
    assert [SIMCLR.decay_at(step, 8) for step in (0, 2, 4, 8)] == pytest.approx(
        [1, 0.5 + 0.5**1.5, 0.5, 0]
    )
    assert Probe(2, 2, SIMCLR).rates.item() == pytest.approx(0.1 * 4096 / 256)


def test_the_rate_is_chosen_on_images_that_are_not_trained_on():
    training, held_out = linear.hold_out(205, BYOL, seed=1)
    assert len(held_out) == 20
    assert torch.equal(torch.cat([training, held_out]).sort().values, torch.arange(205))
    used = torch.cat(list(linear.shuffled(training, replace(BYOL, batch_size=37, epochs=4), 1)))
    assert not torch.isin(used, held_out).any()
    training, held_out = linear.hold_out(2, BYOL, seed=1)
    assert len(training) == len(held_out) == 1
    with pytest.raises(UserError, match="one training image"):
        linear.hold_out(1, BYOL, seed=1)
    training, held_out = linear.hold_out(205, SIMCLR, seed=1)
    assert len(training) == 205 and len(held_out) == 0  # one rate: nothing to choose


def test_every_epoch_is_a_permutation_cut_at_the_last_whole_batch():
    index = torch.arange(100, 131)
    steps = list(linear.shuffled(index, replace(SIMCLR, batch_size=8, epochs=2), 1))
    assert len(steps) == 6 and all(len(step) == 8 for step in steps)
    for epoch in (steps[:3], steps[3:]):
        seen = torch.cat(epoch)
        assert len(seen.unique()) == 24 and torch.isin(seen, index).all()


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
    rates = [rate * 16 / 256 for rate in PROTOCOLS[protocol].rates]
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
    probed = linear.run_probe

    def unfrozen(subject, *rest):
        network = subject.encoder.network
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
        network(torch.rand(4, 3, 8, 8)).square().sum().backward()
        optimizer.step()
        return probed(subject, *rest)

    monkeypatch.setattr(linear, "run_probe", unfrozen)
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
    subject._splits = (subject.splits()[0], test)
    linear.judge(subject, Settings(protocol=protocol, epochs=1, batch_size=16))
    row = record_of(tmp_path)
    assert (row["train_images"], row["test_images"]) == (120, 29)
    assert row["interval"] == pytest.approx(confidence(row["metrics"]["top1"], 29), abs=1e-3)


def test_the_same_seed_gives_the_same_answer(tmp_path):
    found = []
    for seed in (1, 1, 2):
        subject = subject_of(tmp_path)
        protocol = replace(SIMCLR, epochs=1, batch_size=16)
        torch.manual_seed(len(found))
        probes = []

        class Recorded(Probe):
            def __init__(self, *args, probes=probes):
                super().__init__(*args)
                probes.append(self)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(linear, "Probe", Recorded)
            linear.run_probe(subject, protocol, seed, Unfinished(None, "", ""))
        found.append(probes[0].weight)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


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
