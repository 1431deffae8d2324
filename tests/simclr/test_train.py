"""The loop of pretrain.py against Algorithm 1 of arXiv 2002.05709 v3, transcribed in float64."""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from simclr.config import CIFAR10
from simclr.model import SimCLR
from simclr.optim import lars
from simclr.pretrain import train
from tests.helpers import rel

COUNT, STEPS = 20, 10  # images in an epoch; steps of which 3 are the warm-up
CFG = replace(
    CIFAR10,
    temperature=0.3,
    batch_size=6,
    epochs=4,
    base_lr=2.0,
    warmup_epochs=1,
    weight_decay=0.05,
    momentum=0.8,
)
WEIGHTS = ("encoder.conv.weight", "head.0.weight", "head.3.weight")  # with decay and adaptation


class Tiny(nn.Module):
    num_features = 4

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, images):
        return self.bn(self.conv(images)).relu().mean((2, 3))


def batch_norm(x, gain, bias):
    x = x.transpose(0, 1)  # channels first
    flat = x.flatten(1)
    mean = flat.sum(1) / flat.shape[1]
    var = ((flat - mean[:, None]) ** 2).sum(1) / flat.shape[1]
    normal = (flat - mean[:, None]) / (var[:, None] + 1e-5).sqrt()
    return (normal * gain[:, None] + bias[:, None]).view(x.shape).transpose(0, 1)


def embed(w, images):
    """z = g(f(x)): g has no biases, and a BatchNorm after each layer, the last without a bias."""
    x = F.conv2d(images, w["encoder.conv.weight"], padding=1)
    h = batch_norm(x, w["encoder.bn.weight"], w["encoder.bn.bias"]).relu().mean((2, 3))
    hidden = batch_norm(h @ w["head.0.weight"].T, w["head.1.weight"], w["head.1.bias"]).relu()
    gain = w["head.4.weight"]
    return batch_norm(hidden @ w["head.3.weight"].T, gain, torch.zeros_like(gain))


def loss_of(z, n, tau):
    """Eq. 1 for each of the 2N anchors; image k's views are k and n + k. Twice their mean: CODE."""

    def s(i, j):
        return (z[i] * z[j]).sum() / ((z[i] ** 2).sum().sqrt() * (z[j] ** 2).sum().sqrt())

    def ell(i, j):
        others = sum(torch.exp(s(i, k) / tau) for k in range(2 * n) if k != i)
        return -torch.log(torch.exp(s(i, j) / tau) / others)

    return 2 * sum(ell(k, n + k) + ell(n + k, k) for k in range(n)) / (2 * n)


def rate(step):
    """2 * 6 / 256 after 3 steps of warm-up, then a cosine that reaches 0 after 20 * 4 // 6 + 1."""
    peak = 2 * 6 / 256
    if step < 3:
        return peak * step / 3
    return peak * (1 + math.cos(math.pi * (step - 3) / (14 - 3))) / 2


def algorithm_1(w, views):
    """(z, loss, weights after the step) of each step."""
    velocity = {name: torch.zeros_like(value) for name, value in w.items()}
    for step, (view1, view2) in enumerate(views):
        w = {name: value.clone().requires_grad_() for name, value in w.items()}
        z = embed(w, torch.cat([view1, view2]))
        loss = loss_of(z, len(view1), 0.3)
        grads = dict(zip(w, torch.autograd.grad(loss, list(w.values())), strict=True))
        for name in w:
            value, g, trust = w[name].detach(), grads[name], 1.0
            if name in WEIGHTS:
                g = g + 0.05 * value
                trust = 0.001 * (value**2).sum().sqrt() / (g**2).sum().sqrt()
            velocity[name] = 0.8 * velocity[name] + rate(step) * trust * g
            w[name] = value - velocity[name]
        yield z.detach(), loss.detach(), w


def test_the_loop_is_algorithm_1():
    torch.manual_seed(0)
    model = SimCLR(Tiny(), head_layers=2, head_dim=3).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5 * torch.randn_like(parameter))
    trained = {k: p for k, p in model.named_parameters() if p.requires_grad}
    images, noise = torch.randn(6, 3, 4, 4).double(), torch.randn(STEPS, 2, 6, 3, 4, 4).double()
    views = images + 0.3 * noise
    initial = {k: p.detach().clone() for k, p in trained.items()}
    expected, seen = list(algorithm_1(initial, views)), []

    def end_step(step, pair, embeddings, *, loss, lr, **metrics):
        z, loss_then, weights = expected[step]
        seen.append(step)
        assert torch.equal(torch.stack(pair), views[step]) and rel(torch.cat(embeddings), z) < 1e-10
        assert rel(loss, loss_then) < 1e-10 and math.isclose(lr, rate(step), rel_tol=1e-12)
        for name, parameter in trained.items():
            assert rel(parameter, weights[name]) < 1e-10, (step, name)

    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, lars(model, CFG))
    steps = ((step, tuple(pair)) for step, pair in enumerate(views))
    train(CFG, COUNT, accelerator, prepared, optimizer, steps, end_step)
    assert seen == list(range(STEPS))
    # it moved, else the comparison would say nothing
    assert all(rel(parameter, initial[name]) > 1e-4 for name, parameter in trained.items())
