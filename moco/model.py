"""MoCo's networks: query and key, the queue of keys, BatchNorm in groups and its shuffle.

Sec. 3 of arXiv 1911.05722 v3; the head of v2 is Sec. 3 of arXiv 2003.04297 v1. Symbols: R
processes, B images on each, N = R B in the global batch, D dimension of queries and keys, K keys.
"""

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class MoCo(nn.Module):
    """The query network, which is trained; the key network, which follows it; the queue.

    Only `encoder_q` is to be wrapped for training. The queue is float32 under mixed precision.

    Args:
        make_encoder: makes an encoder, any network from images to (B, F) features that has
            `num_features`, F. It is called for the query network and for the key network, whose
            weights are then those of the query network.
        head: "linear" as in v1, or "mlp" as in v2.
        dim: D.
        queue_size: K.
    """

    def __init__(
        self,
        make_encoder: Callable[[], nn.Module],
        head: str = "linear",
        dim: int = 128,
        queue_size: int = 65536,
    ) -> None:
        super().__init__()
        self.encoder_q = Network(make_encoder(), head, dim)
        self.encoder_k = Network(make_encoder(), head, dim)
        if self.encoder_q.encoder is self.encoder_k.encoder:
            raise ValueError("make_encoder must make another encoder at each call")
        self.encoder_k.load_state_dict(self.encoder_q.state_dict())
        self.encoder_k.requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(dim, queue_size), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
        self.register_buffer("queue_fill", torch.zeros(1, dtype=torch.long))  # keys, not noise

    @torch.no_grad()
    def momentum_update(self, momentum: float) -> None:
        """theta_k <- m theta_k + (1 - m) theta_q (Eq. 2), for parameters alone.

        BatchNorm's running statistics are the key network's own, neither averaged nor copied.
        """
        keys, queries = list(self.encoder_k.parameters()), list(self.encoder_q.parameters())
        torch._foreach_lerp_(keys, queries, 1 - momentum)  # one call for all tensors

    @torch.no_grad()
    def encode_keys(self, views: Tensor, permutation: Tensor) -> Tensor:
        """(B, C, H, W) views of every process to the (N, D) keys of all, rank by rank.

        Shuffling BatchNorm (Sec. 3.3): the images of all processes are permuted before they are
        shared out, and the keys are then brought back into order. So the statistics of a query's
        group and of its key's group come from different images, and cannot tell which key is whose.

        Args:
            permutation: (N,) the same on every process.
        """
        permutation = permutation.to(views.device)
        keys = gather(self.encoder_k(gather(views)[local_shard(permutation)])[0])
        return keys[permutation.argsort()]

    @torch.no_grad()
    def dequeue_and_enqueue(self, keys: Tensor) -> None:
        """Put (N, D) keys in the place of the oldest; the queue is a ring, N need not divide K.

        PAPER/CODE: the paper enqueues at the end of a step (Algorithm 1), the code before the
        backward pass, from a copy of the queue (builder.py:115-160). The keys are the same; we
        follow the paper and need no copy.
        """
        size = self.queue.shape[1]
        place = torch.arange(len(keys), device=keys.device) + self.queue_ptr
        self.queue[:, place[-size:] % size] = keys[-size:].T.to(self.queue.dtype)
        self.queue_ptr.add_(len(keys)).remainder_(size)
        self.queue_fill.add_(len(keys)).clamp_(max=size)

    @torch.no_grad()
    def average_statistics(self) -> None:
        """Give every process the mean of all processes' running statistics, in one all-reduce.

        PAPER/CODE: the paper does not say; in the code DistributedDataParallel overwrites those of
        all processes with the first one's. Averaged, the encoder that is exported does not depend
        on the number of processes. Training does not use them.
        """
        statistics = [b for name, b in self.named_buffers() if ".running_" in name]
        if world_size() == 1 or not statistics:
            return
        flat = torch.cat(statistics)
        dist.all_reduce(flat)
        means = (flat / world_size()).split([len(b) for b in statistics])
        torch._foreach_copy_(statistics, list(means))


class Network(nn.Module):
    """An encoder and its head; queries and keys each have one."""

    def __init__(self, encoder: nn.Module, head: str, dim: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = projection_head(encoder.num_features, head, dim)

    def forward(self, *views: Tensor) -> tuple[Tensor, ...]:
        """(B, C, H, W) each to (B, D) each, of unit length, in at least float32.

        Several views go through one after the other, each with its own BatchNorm statistics.
        """
        outputs = [self.head(self.encoder(view)) for view in views]
        wide = [z.to(torch.promote_types(z.dtype, torch.float32)) for z in outputs]
        return tuple(F.normalize(z, dim=1) for z in wide)


def projection_head(features: int, kind: str, dim: int) -> nn.Sequential:
    """v1: one linear layer to D (Sec. 3.3). v2: a hidden layer of the features' own width as well.

    Biases everywhere and no BatchNorm (2003.04297 Sec. 3; CODE builder.py:29-32).
    """
    hidden = [nn.Linear(features, features), nn.ReLU()] if kind == "mlp" else []
    return nn.Sequential(*hidden, nn.Linear(features, dim))


# ---- BatchNorm in groups (Sec. 3.3) --------------------------------------------------------------


def split_batchnorm(model: nn.Module, groups: int) -> nn.Module:
    """Give every BatchNorm of `model` statistics of each of `groups` equal parts of its batch.

    `groups` is that of one process: with G in the global batch, G / R. SyncBatchNorm is the
    opposite and no substitute: one group has no statistics to hide.

    Raises:
        ValueError: a BatchNorm is not plain, as one of a derived class, which may do more.
    """
    if groups == 1:
        return model
    for module in list(model.modules()):
        for name, child in module.named_children():
            if is_plain_batchnorm(child):
                split = SplitBatchNorm(child.num_features, child.eps, child.momentum)
                split._parameters, split._buffers = child._parameters, child._buffers
                split.groups = groups
                setattr(module, name, split.train(child.training))
            elif isinstance(child, nn.modules.batchnorm._BatchNorm):
                what = f"{name}: a {type(child).__name__} that is no plain BatchNorm"
                raise ValueError(f"{what} cannot be cut into groups: --bn-splits 1")
    return model


def is_plain_batchnorm(module: nn.Module) -> bool:
    """Whether a layer is BatchNorm and nothing besides, with weights and running statistics.

    Twin: simclr/model.py, byol/model.py, eval/batch_norm.py.
    """
    return type(module) in (nn.BatchNorm1d, nn.BatchNorm2d) and not (
        module.weight is None or module.running_mean is None or module.momentum is None
    )


class SplitBatchNorm(nn.BatchNorm2d):
    """BatchNorm of contiguous groups of the batch, as if each were on a process of its own.

    PAPER/CODE: the paper's groups are the GPUs' parts of the batch (Sec. 3.3); those of the
    notebook, on one GPU, are strided. Ours are contiguous, so that G groups on one process are one
    on each of G. Running statistics move by the groups' mean.
    """

    groups = 1

    def _check_input_dim(self, input: Tensor) -> None:
        """(B, C) and (B, C, H, W) are both welcome."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.groups == 1:
            return super().forward(input)
        own = self.running_mean, self.running_var, self.weight, self.bias
        # The groups side by side, as further channels: one call, since with small images a GPU
        # waits for calls. It costs two copies, which a CPU feels (tests/benchmarks/NOTES.md).
        mean, var, weight, bias = (x.repeat(self.groups) for x in own)
        side_by_side = torch.cat(input.chunk(self.groups), dim=1)  # (B / groups, groups C, ...)
        output = F.batch_norm(side_by_side, mean, var, weight, bias, True, self.momentum, self.eps)
        with torch.no_grad():
            self.running_mean.copy_(mean.view(self.groups, -1).mean(0))
            self.running_var.copy_(var.view(self.groups, -1).mean(0))
            self.num_batches_tracked += 1
        return torch.cat(output.chunk(self.groups, dim=1))


# ---- processes -----------------------------------------------------------------------------------


def world_size() -> int:
    """R, the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(x: Tensor) -> Tensor:
    """(B, ...) of every process to (N, ...), rank by rank, without gradient."""
    if world_size() == 1:
        return x
    parts = [
        torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())
    ]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def local_shard(x: Tensor) -> Tensor:
    """This process's (B, ...) of (N, ...): the inverse of `gather`."""
    return x.chunk(world_size())[dist.get_rank()] if world_size() > 1 else x


# ---- official checkpoints ------------------------------------------------------------------------


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The `state_dict` of an official v1 or v2 checkpoint under our names, for `MoCo`.

    The code's `fc`, a linear layer (v1) or a Sequential (v2), is our `head`, always a Sequential.
    """
    renamed = {}
    for key, value in state.items():
        name = key.removeprefix("module.")
        branch, _, inner = name.partition(".")
        if inner in ("fc.weight", "fc.bias"):
            name = f"{branch}.head.0.{inner.removeprefix('fc.')}"
        elif inner.startswith("fc."):
            name = f"{branch}.head.{inner.removeprefix('fc.')}"
        elif inner:
            name = f"{branch}.encoder.{inner}"
        renamed[name] = value
    if "queue" in renamed:  # every key in it is one
        renamed["queue_fill"] = torch.tensor([renamed["queue"].shape[1]])
    return renamed
