"""`byol.pretrain.train` on given networks and views, with everything recorded."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor

from byol.config import Config
from byol.model import Online, Target, globalize
from byol.optim import lars
from byol.pretrain import train


@dataclass
class Recording:
    """What a run did: at each step the loss, and the rate of every parameter group."""

    losses: list[Tensor] = field(default_factory=list)
    rates: list[list[float]] = field(default_factory=list)


def play(
    cfg: Config,
    count: int,
    network: Online,
    start: Callable[[Online, Target], None],
    steps: Iterable[tuple[int, tuple[Tensor, Tensor]]],
    observe: Callable[[Online, Target, torch.optim.Optimizer], None],
    loop: Callable[..., None] = train,
) -> Recording:
    """Train the online `network`.

    Args:
        count: images in an epoch.
        start: sets the weights of both networks.
        steps: (step, (view1, view2)) for each step, (B, 3, H, W) each, of this process.
        observe: called before the first step and after every one.
    """
    AcceleratorState._reset_state(reset_partial_state=True)  # of an earlier run
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True)
    globalize(network)
    target = Target(network)
    start(network, target)
    online, optimizer = accelerator.prepare(network, lars(network, cfg))
    record = Recording()

    def end_step(step, views, embeddings, **metrics):
        record.losses.append(metrics["loss"].detach())
        record.rates.append([group["lr"] for group in optimizer.param_groups])
        observe(network, target, optimizer)

    observe(network, target, optimizer)
    loop(cfg, count, accelerator, online, target, optimizer, steps, end_step)
    return record
