"""BYOL's optimiser: LARS, its parameter groups, the learning rate and tau (Sec. 3.3).

Cousin of simclr/optim.py: here the learning rate multiplies the momentum buffer, as in CODE
optimizers.py:84-105, there it is inside. The two differ whenever the rate changes.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .config import Config
from .model import Online

ETA = 0.001  # trust coefficient (CODE configs/byol.py; arXiv 1708.03888)


def parameter_groups(
    model: nn.Module, weight_decay: float, lars_adaptation: bool = True, lr_multiplier: float = 1.0
) -> list[dict]:
    """Weights with decay and adaptation; normalisation gains and all biases with neither.

    Without `lars_adaptation` the weights move by plain momentum too, which makes LARS an SGD. The
    groups keep `lr_multiplier`, by which a step multiplies `lr_at`.

    CODE optimizers.py:30-35 excludes by name: `b` and modules with `norm`. In ResNets these are
    exactly the parameters with one dimension; other networks go by the dimension too.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    weights, others = [p for p in params if p.ndim > 1], [p for p in params if p.ndim <= 1]
    return [
        {
            "params": weights,
            "weight_decay": weight_decay,
            "lars_adaptation": lars_adaptation,
            "lr_multiplier": lr_multiplier,
        },
        {
            "params": others,
            "weight_decay": 0.0,
            "lars_adaptation": False,
            "lr_multiplier": lr_multiplier,
        },
    ]


def lars(online: Online, cfg: Config) -> "LARS":
    """The optimiser of a run: encoder and projector at the same rate, the predictor at its own."""
    adaptation = cfg.optimizer == "lars"
    projection = nn.ModuleList([online.encoder, online.projector])
    return LARS(
        [
            *parameter_groups(projection, cfg.weight_decay, adaptation),
            *parameter_groups(online.predictor, cfg.weight_decay, adaptation, cfg.predictor_lr),
        ],
        cfg.momentum,
    )


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling as BYOL defines it:

        g <- g + wd * w
        trust = eta * |w| / |g|  for adapted parameters, 1 where either norm is 0
        v <- momentum * v + trust * g
        w <- w - lr * v

    Parameters that are not adapted move by plain momentum at the full learning rate. Set `lr` of
    every group before each step: see `lr_at`.
    """

    def __init__(
        self, params: Iterable[Tensor] | Iterable[dict], momentum: float = 0.9, eta: float = ETA
    ) -> None:
        settings = {
            "lr": 0.0,
            "weight_decay": 0.0,
            "lars_adaptation": True,
            "momentum": momentum,
            "eta": eta,
        }
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update. A closure has no use here and is not supported."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if "v" not in self.state[p]:
                    self.state[p]["v"] = torch.zeros_like(p)
            buffers = [self.state[p]["v"] for p in params]
            grads = torch._foreach_add(
                [p.grad for p in params], params, alpha=group["weight_decay"]
            )
            if group["lars_adaptation"]:
                trust = torch.stack(torch._foreach_norm(params)) * group["eta"]
                trust /= torch.stack(torch._foreach_norm(grads))
                trust = torch.where((trust > 0) & trust.isfinite(), trust, 1.0)
                torch._foreach_mul_(grads, list(trust.unbind()))
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, grads)
            torch._foreach_add_(params, buffers, alpha=-group["lr"])


def total_steps(cfg: Config, count: int) -> int:
    """Steps of the whole run on `count` images (CODE configs/byol.py)."""
    return int(count * cfg.epochs // cfg.batch_size)


def lr_at(step: int, cfg: Config, count: int) -> float:
    """Learning rate of the `step`-th update, from 0, on `count` images (CODE schedules.py:33-53).

    Linear warm-up from 0 (so that the first update does nothing), then cosine to 0, per step.
    """
    peak = cfg.base_lr * cfg.batch_size / 256
    warmup = int(count * cfg.warmup_epochs // cfg.batch_size)
    if step < warmup:
        return peak * step / warmup
    progress = (step - warmup) / (total_steps(cfg, count) - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def tau_at(step: int, cfg: Config, count: int) -> float:
    """The target's decay after the `step`-th update: tau_base to 1 by cosine (Sec. 3.3).

    1 - (1 - tau_base) (cos(pi k / K) + 1) / 2 with k from 0: CODE byol_experiment.py:333-343 takes
    the step as it was before the update.
    """
    progress = step / total_steps(cfg, count)
    return 1 - (1 - cfg.tau_base) * (math.cos(math.pi * min(progress, 1.0)) + 1) / 2
