"""MoCo's optimiser: SGD, and its learning rate by epochs (arXiv 1911.05722 v3 Sec. 4)."""

import math

import torch
from torch import nn

from .config import Config


def sgd(network: nn.Module, cfg: Config) -> torch.optim.SGD:
    """Plain SGD with momentum, and weight decay on all parameters (CODE main_moco.py).

    On BatchNorm's gains and all biases too, unlike SimCLR and BYOL. Set `lr` of every group before
    each step: see `lr_at`.

    On GPUs torch updates all tensors in a few calls by itself. Not `fused`, which under fp16 hides
    from Accelerate that a step was skipped.
    """
    params = [p for p in network.parameters() if p.requires_grad]
    return torch.optim.SGD(params, lr=0.0, momentum=cfg.momentum, weight_decay=cfg.weight_decay)


def total_steps(cfg: Config, count: int) -> int:
    """Steps of the whole run on `count` images: an epoch ends at its last whole batch."""
    return max(1, round(cfg.epochs * (count // cfg.batch_size)))


def lr_at(step: int, cfg: Config, count: int) -> float:
    """Learning rate of the `step`-th update, from 0, on `count` images; constant in an epoch.

    With e the epoch, counted from 0, of E (CODE main_moco.py:372-381):

        step      tenfold down at each of the milestones (v1)
        cosine    peak * (1 + cos(pi e / E)) / 2 (v2)
        notebook  the same with e counted from 1, so that the last epoch has rate 0
    """
    peak = cfg.base_lr * cfg.batch_size / 256
    epoch = step // (count // cfg.batch_size)
    if cfg.schedule == "step":
        return peak * 0.1 ** sum(epoch >= milestone for milestone in cfg.milestones)
    if cfg.schedule == "notebook":
        epoch += 1
    return peak * 0.5 * (1 + math.cos(math.pi * min(epoch / cfg.epochs, 1.0)))
