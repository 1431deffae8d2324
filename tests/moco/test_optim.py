"""SGD on all parameters, and the learning rate; recorded schedules are in test_golden.py."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

from moco.config import CIFAR10, MOCO_V1, MOCO_V2
from moco.model import MoCo
from moco.optim import lr_at, sgd, total_steps
from tests.moco.harness import Tiny

IMAGENET = 1_281_167


def test_weight_decay_reaches_every_parameter():
    """And no setting is another's: momentum, decay, none of SGD's variants."""
    network = MoCo(Tiny, queue_size=4).encoder_q
    cfg = replace(MOCO_V1, momentum=0.8, weight_decay=0.02)  # as no recipe has them
    optimizer = sgd(network, cfg)
    assert type(optimizer) is torch.optim.SGD
    (group,) = optimizer.param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in network.parameters()]
    assert (group["momentum"], group["weight_decay"], group["dampening"]) == (0.8, 0.02, 0)
    assert not group["nesterov"] and not group["maximize"]
    for recipe in (MOCO_V1, MOCO_V2, CIFAR10):
        (group,) = sgd(network, recipe).param_groups
        assert (group["momentum"], group["weight_decay"]) == (0.9, recipe.weight_decay)


def test_against_the_rule():
    """v <- m v + g + wd w; w <- w - lr v, with the rate outside of the buffer."""
    module = torch.nn.Linear(1, 1).double()
    optimizer = sgd(module, replace(MOCO_V1, weight_decay=0.1))
    w, v = [p.item() for p in module.parameters()], [0.0, 0.0]
    for step, lr in enumerate((1.0, 0.5, 0.25)):
        grads = [0.3 + step, -0.2 * step]
        for p, g in zip(module.parameters(), grads, strict=True):
            p.grad = torch.full_like(p, g)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        v = [0.9 * b + g + 0.1 * x for b, g, x in zip(v, grads, w, strict=True)]
        w = [x - lr * b for x, b in zip(w, v, strict=True)]
        for p, x in zip(module.parameters(), w, strict=True):
            assert abs(p.item() - x) < 1e-14


def test_an_overflow_is_reported():
    """Accelerate's wrapper over the real scaler: with a fused optimiser it would be hidden."""
    Accelerator(cpu=True)
    network = MoCo(Tiny, queue_size=8).encoder_q
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = AcceleratedOptimizer(sgd(network, MOCO_V1), scaler=scaler)
    optimizer.param_groups[0]["lr"] = 1.0
    weight = network.head[0].weight
    for factor, skipped in ((1.0, False), (torch.inf, True), (1.0, False)):
        before = weight.detach().clone()
        scaler.scale(network.head[0](torch.ones(2, 4)).square().sum() * factor).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.step_was_skipped == skipped
        assert torch.equal(before, weight) == skipped


def test_epochs_end_at_their_last_whole_batch():
    assert total_steps(MOCO_V1, IMAGENET) == 200 * 5004
    assert total_steps(CIFAR10, 50_000) == 200 * 97
    assert total_steps(replace(CIFAR10, epochs=1e-6), 50_000) == 1


@pytest.mark.parametrize(
    "epoch, rate",
    [(0, 0.03), (119, 0.03), (120, 0.003), (159, 0.003), (160, 0.0003), (199, 0.0003)],
)
def test_steps(epoch, rate):
    for step in (epoch * 5004, epoch * 5004 + 5003):
        assert abs(lr_at(step, MOCO_V1, IMAGENET) - rate) < 1e-12


def test_cosines():
    assert lr_at(0, MOCO_V2, IMAGENET) == 0.03
    assert abs(lr_at(100 * 5004, MOCO_V2, IMAGENET) - 0.015) < 1e-12
    assert lr_at(199 * 5004, MOCO_V2, IMAGENET) > 0
    assert lr_at(0, CIFAR10, 50_000) < 0.06
    assert abs(lr_at(0, replace(CIFAR10, schedule="cosine"), 50_000) - 0.06) < 1e-12
    assert lr_at(199 * 97, CIFAR10, 50_000) == 0


def test_rate_is_linear_in_the_batch():
    assert lr_at(0, replace(MOCO_V2, batch_size=128), IMAGENET) == 0.015  # README
