"""The embedded images: what their docstring claims, and that learning on them means something."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

import eval.finetune
import eval.linear
from common import demo, encoders
from common.config import SourceConfig
from common.launch import launch
from common.plan import plan_of
from common.views import ViewPairs
from eval.encoder import Encoder, Pixels, Preprocess, build_seeded
from eval.features import extract
from eval.knn import accuracy, predict
from eval.settings import Finetune, Linear
from eval.splits import open_train_test
from eval.subjects import Subject
from simclr import augment
from simclr.config import DEMO
from simclr.model import SimCLR, init_weights
from simclr.optim import lars, total_steps
from simclr.pretrain import train as train_simclr

PREPROCESS = Preprocess.of(32)


def knn(network: torch.nn.Module) -> float:
    train, test = open_train_test(plan_of("demo"))
    bank, labels = extract(network.eval(), train, PREPROCESS)
    queries, truth = extract(network.eval(), test, PREPROCESS)
    ranking, _ = predict(queries, bank, labels, classes=10, k=20, temperature=0.1)
    return accuracy(ranking, truth)


def subject_of(network: torch.nn.Module) -> Subject:
    encoder = Encoder(network.eval(), PREPROCESS, "encoder")
    return Subject(encoder, "demo", SourceConfig(), None, {}, launch("fp32"))


def linear(network: torch.nn.Module) -> float:
    return eval.linear.judge(subject_of(network), Linear(protocol="features", epochs=20)).value


def test_same_images_for_the_same_seed():
    images, labels = demo.render(200, seed=3)
    again, same = demo.render(200, seed=3)
    assert images.shape == (200, 3, 32, 32) and images.dtype == torch.uint8
    assert torch.equal(images, again) and torch.equal(labels, same)
    assert not torch.equal(images, demo.render(200, seed=4)[0])
    assert labels.bincount().tolist() == [20] * 10 and len(demo.CLASSES) == 10


def test_splits_share_no_image():
    (train, _), (test, _) = demo.split("train"), demo.split("test")
    assert len(train) == 5120 and len(test) == 2000
    digests = [{image.numpy().tobytes() for image in split} for split in (train, test)]
    assert len(digests[0]) == 5120 and not digests[0] & digests[1]


def test_pixels_and_a_random_encoder_know_little():
    assert knn(Pixels()) < 50
    assert linear(Pixels()) < 20
    random = build_seeded({"encoder": "demo"}, PREPROCESS)
    assert knn(random) < 40
    assert linear(random) < 30


@pytest.mark.slow
def test_labels_tell_nearly_all():
    subject = subject_of(build_seeded({"encoder": "demo"}, PREPROCESS))
    settings = Finetune(epochs=20, base_lr=0.2, batch_size=256)
    assert eval.finetune.judge(subject, settings).value > 95


def pretrained(shuffled: bool) -> torch.nn.Module:
    """SimCLR's demo recipe for a fifth of its length; `shuffled`: partners of other images."""
    cfg = replace(DEMO, epochs=8, warmup_epochs=0.8)
    train, _ = open_train_test(plan_of("demo"))
    pairs = ViewPairs(train, augment.views(cfg), batch_size=cfg.batch_size, seed=1)
    torch.manual_seed(1)
    model = SimCLR(encoders.build("demo"), cfg.head_layers, cfg.head_dim)
    init_weights(model)
    model.to(memory_format=torch.channels_last)
    steps = (
        (step, (view1, view2.roll(1, 0) if shuffled else view2))
        for step, (view1, view2) in enumerate(pairs(0, total_steps(cfg, len(train))))
    )
    accelerator, optimizer = Accelerator(cpu=True), lars(model, cfg)
    model, optimizer = accelerator.prepare(model, optimizer)
    train_simclr(cfg, len(train), accelerator, model, optimizer, steps, lambda *_, **__: None)
    return model.encoder


@pytest.mark.slow
def test_without_true_partners_the_gain_is_lost():
    true, false = linear(pretrained(shuffled=False)), linear(pretrained(shuffled=True))
    random = linear(build_seeded({"encoder": "demo"}, PREPROCESS))
    print(f"linear Top-1: random {random:.1f}, shuffled {false:.1f}, SimCLR {true:.1f}")
    assert true - random > 25
    assert false - random < (true - random) / 3
