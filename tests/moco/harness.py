"""The loops of moco/pretrain.py on given weights, views and shuffles, with everything recorded."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from moco import pretrain
from moco.config import Config
from moco.loss import info_nce
from moco.model import MoCo, split_batchnorm
from moco.optim import sgd


class Tiny(nn.Module):
    """The encoder of the recorded trajectories: conv 3x3 - BN - ReLU - mean."""

    num_features = 4

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)

    def forward(self, images):
        return self.bn1(self.conv1(images)).relu().mean((2, 3))


@dataclass
class Recording:
    """States after 0, 1, ... steps, and of each step its loss, logits and learning rate."""

    states: list[dict[str, torch.Tensor]]
    losses: list[float] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)


def play(
    cfg: Config,
    network: MoCo,
    views: Any,
    shuffles: Any,
    count: int,
    dtype: torch.dtype = torch.float32,
    after_step: Callable[[MoCo], None] = lambda network: None,
) -> Recording:
    """Train `network` by the loop of `cfg`.

    Args:
        views: (steps, 2, B, 3, H, W) of this process.
        shuffles: (steps, directions, N).
        count: images in an epoch.
        after_step: called once a step is recorded.
    """
    accelerator = Accelerator(cpu=True)
    split_batchnorm(network, cfg.bn_splits // accelerator.num_processes)
    network.to(dtype=dtype, memory_format=torch.channels_last)
    query, optimizer = accelerator.prepare(network.encoder_q, sgd(network.encoder_q, cfg))
    views = torch.as_tensor(np.asarray(views)).to(dtype)
    shuffles = torch.as_tensor(np.asarray(shuffles))
    record = Recording([snapshot(network)])

    def end_step(step, pair, embeddings, *, loss, lr, **metrics):
        queue = record.states[-1]["queue"]  # as it was before the step
        record.losses.append(loss.item())
        record.logits.append(info_nce(*embeddings, queue, cfg.temperature)[1].detach())
        record.rates.append(lr)
        record.states.append(snapshot(network))
        after_step(network)

    loop = pretrain.train_symmetric if cfg.symmetric else pretrain.train
    loop(
        cfg,
        count,
        accelerator,
        network,
        query,
        optimizer,
        lambda step, direction: shuffles[step][direction],
        ((step, tuple(pair)) for step, pair in enumerate(views)),
        end_step,
    )
    return record


def snapshot(network: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.detach().clone() for key, value in network.state_dict().items()}
