"""InfoNCE against a queue: Eq. 1 of MoCo (arXiv 1911.05722 v3, Sec. 3.1).

Symbols: B queries on this process, D dimension of queries and keys, K keys in the queue.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The loss of telling each query's own key from the K keys in the queue:

        -log exp(q.k / tau) / (exp(q.k / tau) + sum over the queue of exp(q.k' / tau))

    averaged over the queries (Eq. 1). The queue must not hold the keys of this batch yet: a query
    would then find its own key among the negatives.

    Args:
        q: (B, D) queries of unit length, with gradient.
        k: (B, D) keys of the same images, of unit length.
        queue: (D, K) earlier keys.

    Returns:
        The loss, and the (B, 1 + K) logits, in at least float32: the positive is column 0.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, queue = q.to(wide), k.detach().to(wide), queue.detach().to(wide)
    positive = (q * k).sum(1, keepdim=True)  # (B, 1)
    logits = torch.cat([positive, q @ queue], dim=1) / temperature  # (B, 1 + K)
    target = torch.zeros(len(q), dtype=torch.long, device=q.device)
    return F.cross_entropy(logits, target), logits


def contrastive_top1(logits: Tensor) -> Tensor:
    """Share of queries that are nearer to their own key than to any in the queue."""
    return (logits[:, 0] > logits[:, 1:].amax(1)).float().mean()


def chance_loss(queue_size: int) -> float:
    """The loss when all similarities are equal: log(1 + K)."""
    return math.log(1 + queue_size)
