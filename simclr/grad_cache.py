"""Gradient caching, arXiv 2101.06983: a batch of any size with the memory of a part of it.

Symbols: B images per process, D dimension of z, K chunks of a batch.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class GradCache(nn.Module):
    """A model of two views that takes them in K chunks, with the memory of one.

    The z of every chunk are kept, its activations are not. The loss is taken over all z as ever;
    its gradient reaches the z, and then each chunk goes through the model a second time, to be
    differentiated at once. The gradients are exact, for a forward pass more.

    What differs: BatchNorm sees the 2B / K images of a chunk. Its running statistics move once a
    step, by the mean of the chunks' (the second pass does not touch them).

    A chunk is every K-th image, so that it holds the same ones on any number of processes.

    Args:
        model: (B, C, H, W) twice to (B, D) twice.
        chunks: K, a divisor of B.
    """

    def __init__(self, model: nn.Module, chunks: int) -> None:
        super().__init__()
        self.model, self.chunks = model, chunks

    def forward(self, view1: Tensor, view2: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) twice to (B, D) twice."""
        buffers = list(self.buffers())
        parts, moved = [], []
        for k in range(self.chunks):
            with _unmoved(buffers):
                z = checkpoint(
                    self.model,
                    view1[k :: self.chunks],
                    view2[k :: self.chunks],
                    use_reentrant=False,
                    context_fn=lambda: (nullcontext(), _unmoved(buffers)),  # of either pass
                )
                moved.append([b.clone() for b in buffers])
            parts.append(z)
            # else chunks share one low-precision copy of the weights, and sum their gradients in it
            torch.clear_autocast_cache()
        for buffer, after in zip(buffers, zip(*moved, strict=True), strict=True):
            buffer.copy_(sum(after) / self.chunks)
        z1, z2 = (torch.stack(z, dim=1).flatten(0, 1) for z in zip(*parts, strict=True))
        return z1, z2


@contextmanager
def _unmoved(buffers: Sequence[Tensor]) -> Iterator[None]:
    """Afterwards `buffers` are as they were before."""
    before = [b.clone() for b in buffers]
    try:
        yield
    finally:
        for b, value in zip(buffers, before, strict=True):
            b.copy_(value)
