"""`byol.pretrain.main` itself on given images and weights, with everything recorded."""

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar
from unittest import mock

import torch

from byol import pretrain
from common.run import Run


@dataclass
class Recording:
    """What a run did: at each step the loss, and the rate of every parameter group."""

    losses: list[torch.Tensor] = field(default_factory=list)
    rates: list[list[float]] = field(default_factory=list)


def play(argv, network, views, count, start: Callable, observe: Callable) -> Recording:
    """Run `main` with `argv` around the online `network`, for as many steps as there are views.

    Args:
        views: (view1, view2) for each step, (B, 3, H, W) each, of this process.
        count: images in an epoch.
        start: called with what a checkpoint holds (online, target, optimizer), to set weights.
        observe: called with the same before the first step and after every one.
    """
    record = Recording()
    resume = Run.resume

    class Images:
        bad: ClassVar[dict] = {}
        load = staticmethod(lambda memory_gb: "recorded images")
        __len__ = staticmethod(lambda: count)

    def stream(images, transforms, cfg, accelerator, *, dtype):
        def pairs(first, last):
            return (tuple(view.to(dtype) for view in views[step]) for step in range(first, last))

        pairs.images = images
        return pairs

    def started(run, parts):
        assert set(parts) == {"online", "target", "optimizer"}
        start(**parts)
        observe(**parts)
        resume(run, parts)

    def log(run, step, **values):
        if "loss" in values:
            record.losses.append(values["loss"])

    def save(run, step, parts):
        record.rates.append([group["lr"] for group in parts["optimizer"].param_groups])
        assert step == len(record.rates) == len(record.losses)
        observe(**parts)

    always = ["--save-every", "1e-6", "--log-every", "1", "--knn-every", "0"]
    with contextlib.ExitStack() as stack:
        replaced = {
            "open_images": lambda *_, **__: Images(),
            "total_steps": lambda *_: len(views),
            "Online": lambda cfg: network,
        }
        for name, value in replaced.items():
            stack.enter_context(mock.patch.object(pretrain, name, value))
        stack.enter_context(mock.patch.object(pretrain.Pairs, "of_run", stream))
        methods = {"resume": started, "log": log, "save": save}
        methods |= dict.fromkeys(["export", "log_views", "finish"], nothing)
        for name, value in methods.items():
            stack.enter_context(mock.patch.object(Run, name, value))
        stack.enter_context(mock.patch.object(sys, "argv", ["byol.pretrain", *argv, *always]))
        pretrain.main()
    return record


def nothing(*_, **__) -> None:
    pass
