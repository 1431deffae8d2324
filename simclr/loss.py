"""NT-Xent, Eq. 1 of SimCLR (arXiv 2002.05709 v3, Sec. 2.1), over all processes.

Symbols: R processes, B images on each, N = R B images in the global batch, D dimension of z.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class _AllGather(torch.autograd.Function):
    """(B, D) of every process to (N, D), rank by rank; the gradient comes back from all of them.

    `dist.all_gather` alone carries no gradient: an embedding would then have its own anchor's
    gradient, but not those of other processes' anchors, whose negative it is.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def all_gather(x: Tensor) -> Tensor:
    """(B, D) to (N, D) with gradient; the identity on one process."""
    is_distributed = dist.is_initialized() and dist.get_world_size() > 1
    return _AllGather.apply(x) if is_distributed else x


def nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The normalised temperature-scaled cross entropy loss (Eq. 1) with this process's anchors.

    For anchor i the candidates are the other view of all N images, of which its own is the
    positive, and the same view of the N - 1 others. Averaged over processes (as DDP averages
    gradients) the result is the loss of the global batch, and so is its gradient.

    PAPER/CODE: the paper averages over the 2N anchors; the code (objective.py:82-86) adds the means
    of the two views, twice that. The weights under LARS do not notice, gains and biases of the
    normalisation layers do. We follow the code, which made the published numbers.

    Args:
        z1, z2: (B, D) projections of the two views, any scale; computed in at least float32.

    Returns:
        The loss, and the (B, N) logits of view 1 against view 2: the positive of row i is column
        rank * B + i.
    """
    wide = torch.promote_types(z1.dtype, torch.float32)
    z1, z2 = (F.normalize(z.to(wide), dim=1) for z in (z1, z2))
    all1, all2 = all_gather(z1), all_gather(z2)  # (N, D)
    rank = dist.get_rank() if dist.is_initialized() else 0
    positive = torch.arange(len(z1), device=z1.device) + rank * len(z1)  # (B,) column of the anchor
    itself = positive[:, None] == torch.arange(len(all1), device=z1.device)  # (B, N)

    def same_view(z: Tensor, all_z: Tensor) -> Tensor:
        return (z @ all_z.T / temperature).masked_fill(itself, -torch.inf)

    logits12 = z1 @ all2.T / temperature
    logits21 = z2 @ all1.T / temperature
    loss1 = F.cross_entropy(torch.cat([logits12, same_view(z1, all1)], dim=1), positive)
    loss2 = F.cross_entropy(torch.cat([logits21, same_view(z2, all2)], dim=1), positive)
    return loss1 + loss2, logits12


def contrastive_top1(logits12: Tensor) -> Tensor:
    """Share of view-1 anchors whose nearest view-2 embedding is their own (CODE metrics.py)."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    positive = torch.arange(len(logits12), device=logits12.device) + rank * len(logits12)
    return (logits12.argmax(1) == positive).float().mean()


def chance_loss(batch_size: int) -> float:
    """The loss when all similarities are equal: 2 log(2N - 1)."""
    return 2 * torch.log(torch.tensor(2.0 * batch_size - 1)).item()
