"""BYOL's regression loss, Eq. 2 of arXiv 2006.07733 v3 (Sec. 3.1).

Symbols: B images on each process, D dimension of predictions p = q(z) and of projections z.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def byol_loss(p: Tensor, z: Tensor) -> Tensor:
    """The mean squared distance of unit vectors, |p/|p| - z/|z||^2 = 2 - 2 cos(p, z), 0 to 4.

    Averaged over processes (as DDP averages gradients) the result is the loss of the global batch.
    The loss of a step is byol_loss(p1, z2) + byol_loss(p2, z1): CODE byol_experiment.py:243-250
    adds the two directions, as the paper does. App. J of the paper leaves out the constant 2.

    Args:
        p, z: (B, D) online predictions and target projections, any scale; computed in at least
            float32. A row of zeros stays zero (CODE helpers.py l2_normalize).
    """
    wide = torch.promote_types(p.dtype, torch.float32)
    p, z = (F.normalize(x.to(wide), dim=1, eps=1e-6) for x in (p, z))
    return (p - z).square().sum(1).mean()


def chance_loss() -> float:
    """The loss when predictions and projections have nothing to do with one another: 2 + 2."""
    return 4.0
