"""SimCLR's optimiser: LARS, its parameter groups and the learning rate (Sec. 2.3, App. B.1).

Cousin of byol/optim.py: here the learning rate is inside the momentum buffer, as in CODE
lars_optimizer.py:99-115, there it multiplies the buffer. The two differ whenever the rate changes.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .config import Config

ETA = 0.001  # trust coefficient (CODE lars_optimizer.py EETA_DEFAULT; arXiv 1708.03888)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Weights with decay and adaptation; normalisation gains and all biases with neither.

    CODE model_util.py:95-100 excludes by name: `batch_normalization` and `bias`. In ResNets
    these are exactly the parameters with one dimension; others go by the dimension too.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    return [
        {
            "params": [p for p in params if p.ndim > 1],
            "weight_decay": weight_decay,
            "lars_adaptation": True,
        },
        {
            "params": [p for p in params if p.ndim <= 1],
            "weight_decay": 0.0,
            "lars_adaptation": False,
        },
    ]


def lars(network: nn.Module, cfg: Config) -> "LARS":
    """The optimiser of a run."""
    return LARS(parameter_groups(network, cfg.weight_decay), cfg.momentum)


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling as SimCLR defines it:

        g <- g + wd * w
        trust = eta * |w| / |g|  for adapted parameters, 1 where either norm is 0
        v <- momentum * v + lr * trust * g
        w <- w - v

    Parameters that are not adapted move by plain momentum at the full learning rate. Set `lr` of
    every group before each step: see `lr_at`.

    Twin: eval/finetune.py.
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
            rates = [group["lr"]] * len(params)
            if group["lars_adaptation"]:
                trust = torch.stack(torch._foreach_norm(params)) * group["eta"]
                trust /= torch.stack(torch._foreach_norm(grads))
                trust = torch.where((trust > 0) & trust.isfinite(), trust, 1.0)
                rates = list((trust * group["lr"]).unbind())
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, torch._foreach_mul(grads, rates))
            torch._foreach_sub_(params, buffers)


def total_steps(cfg: Config, count: int) -> int:
    """Steps of the whole run on `count` images (CODE model_util.py:76-80; the + 1 is theirs)."""
    return int(count * cfg.epochs // cfg.batch_size) + 1


def lr_at(step: int, cfg: Config, count: int) -> float:
    """Learning rate of the `step`-th update, from 0, on `count` images (Sec. 2.3; App. B.1).

    Linear warm-up from 0 (so that the first update does nothing), then cosine to 0, per step.
    """
    scale = cfg.batch_size / 256 if cfg.lr_scaling == "linear" else math.sqrt(cfg.batch_size)
    peak = cfg.base_lr * scale
    warmup = int(count * cfg.warmup_epochs // cfg.batch_size)
    if step < warmup:
        return peak * step / warmup
    progress = (step - warmup) / (total_steps(cfg, count) - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
