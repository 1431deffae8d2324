"""`moco.pretrain.main` itself on given images, weights and shuffles, with everything recorded."""

import contextlib
import sys
from dataclasses import dataclass, field
from typing import ClassVar
from unittest import mock

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState
from torch import nn

from common.run import Run
from moco import pretrain
from moco.config import Config
from moco.loss import info_nce
from moco.model import MoCo, projection_head


class Tiny(nn.Module):
    """The encoder of the recorded trajectories: conv 3x3 - BN - ReLU - mean."""

    num_features = 4

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)

    def forward(self, images):
        return self.bn1(self.conv1(images)).relu().mean((2, 3))


def with_encoder(cfg: Config, build) -> MoCo:
    """MoCo around two encoders of `build()`, like the constructor's own."""
    network = MoCo(cfg)
    for branch in (network.encoder_q, network.encoder_k):
        branch.encoder = build()
        branch.head = projection_head(branch.encoder.num_features, cfg.head, cfg.dim)
    network.encoder_k.load_state_dict(network.encoder_q.state_dict())
    network.encoder_k.requires_grad_(False)
    return network


@dataclass
class Recording:
    """What a run did: states after 0, 1, ... steps, and each call of the loss."""

    states: list[dict] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)


def play(argv, network, views, shuffles, count, after_step=lambda network: None) -> Recording:
    """Run `main` with `argv` from the weights of `network`.

    Args:
        views: (steps, 2, B, 3, H, W) of this process.
        shuffles: (steps, directions, N).
        count: images in an epoch.
        after_step: called once a step's state is recorded.
    """
    record = Recording([snapshot(network)])
    calls = iter(range(len(shuffles)))

    class Images:
        bad: ClassVar[dict] = {}
        load = staticmethod(lambda memory_gb: "recorded images")
        __len__ = staticmethod(lambda: count)

    def stream(images, transforms, cfg, accelerator, *, dtype, drop_last):
        assert drop_last and first_is_last(transforms)
        tensor = torch.as_tensor(np.asarray(views)).to(dtype)

        def pairs(first, last):
            return (tuple(tensor[step]) for step in range(first, last))

        pairs.images = images
        return pairs

    def nce(*args):
        loss, logits = info_nce(*args)
        record.losses.append(loss.item())
        record.logits.append(logits.detach().clone())
        return loss, logits

    def save(run, step, parts):
        assert step == next(calls) + 1
        assert set(parts) == {"model", "optimizer"}
        record.states.append(snapshot(parts["model"]))
        record.rates.append(parts["optimizer"].param_groups[0]["lr"])
        after_step(parts["model"])

    argv = ["moco.pretrain", *argv, "--save-every", "1e-6", "--knn-every", "0"]
    with contextlib.ExitStack() as stack:
        replaced = {
            "open_images": lambda *_, **__: Images(),
            "total_steps": lambda *_: len(shuffles),
            "MoCo": lambda cfg: network,
            "permutation": lambda cfg, step, i: torch.as_tensor(np.array(shuffles[step][i])),
            "info_nce": nce,
        }
        for name, value in replaced.items():
            stack.enter_context(mock.patch.object(pretrain, name, value))
        stack.enter_context(mock.patch.object(pretrain.Pairs, "of_run", stream))
        for name, value in {"save": save, "export": nothing, "finish": nothing}.items():
            stack.enter_context(mock.patch.object(Run, name, value))
        stack.enter_context(mock.patch.object(sys, "argv", argv))
        pretrain.main()
    return record


def run_main(*argv: str) -> None:
    """`python -m moco.pretrain ARGV` in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    with mock.patch.object(sys, "argv", ["moco.pretrain", *argv]):
        pretrain.main()


def first_is_last(pair) -> bool:
    return pair[0] is pair[1]


def nothing(*_, **__) -> None:
    pass


def snapshot(network) -> dict:
    return {key: value.detach().clone() for key, value in network.state_dict().items()}
