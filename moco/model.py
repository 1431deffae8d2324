"""MoCo's networks: query and key, the queue of keys, BatchNorm in groups and its shuffle.

Sec. 3 of arXiv 1911.05722 v3; the head of v2 is Sec. 3 of arXiv 2003.04297 v1. Symbols: R
processes, B images on each, N = R B in the global batch, D dimension of queries and keys, K keys.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from .config import Config


class MoCo(nn.Module):
    """The query network, which is trained; the key network, which follows it; the queue.

    Only `encoder_q` is to be wrapped for training. The queue is float32 under mixed precision.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.encoder_q, self.encoder_k = Network(cfg), Network(cfg)
        self.encoder_k.load_state_dict(self.encoder_q.state_dict())
        self.encoder_k.requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(cfg.dim, cfg.queue_size), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
        self.register_buffer("queue_fill", torch.zeros(1, dtype=torch.long))  # keys, not noise

    @torch.no_grad()
    def update_key(self, momentum: float) -> None:
        """theta_k <- m theta_k + (1 - m) theta_q (Eq. 2), for parameters alone.

        BatchNorm's running statistics are the key network's own, neither averaged nor copied.
        """
        keys, queries = list(self.encoder_k.parameters()), list(self.encoder_q.parameters())
        torch._foreach_lerp_(keys, queries, 1 - momentum)  # one call for all tensors

    @torch.no_grad()
    def keys(self, views: Tensor, permutation: Tensor) -> Tensor:
        """(B, 3, H, W) views of every process to the (N, D) keys of all, rank by rank.

        Shuffling BatchNorm (Sec. 3.3): the images of all processes are permuted before they are
        shared out, and the keys are put back in order. The statistics of a query's group and of its
        key's group then come from different images, and cannot tell which key is whose.

        Args:
            permutation: (N,) the same on every process.
        """
        permutation = permutation.to(views.device)
        keys = gather(self.encoder_k(gather(views)[own(permutation)])[0])
        return keys[permutation.argsort()]

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
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
        if world() == 1:
            return
        statistics = [b for name, b in self.named_buffers() if ".running_" in name]
        flat = torch.cat(statistics)
        dist.all_reduce(flat)
        means = (flat / world()).split([len(b) for b in statistics])
        torch._foreach_copy_(statistics, list(means))


class Network(nn.Module):
    """An encoder and its head; queries and keys each have one."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.encoder = build_encoder(cfg.arch, cfg.stem)
        self.head = projection_head(self.encoder.num_features, cfg.head, cfg.dim)

    def forward(self, *views: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) each to (B, D) each, of unit length, in at least float32.

        Several views go through one after the other, each with its own BatchNorm statistics.
        """
        outputs = [self.head(self.encoder(view)) for view in views]
        wide = [z.to(torch.promote_types(z.dtype, torch.float32)) for z in outputs]
        return tuple(F.normalize(z, dim=1) for z in wide)


def build_encoder(arch: str, stem: str) -> nn.Module:
    """A network from (B, 3, H, W) images to (B, num_features) features, torchvision's key names.

    Twin: eval/encoder.py. Initial weights are torchvision's, as in the official code. The `cifar`
    stem is a 3x3 convolution of stride 1 and no max-pooling.
    """
    if arch == "demo":
        return DemoEncoder()
    encoder = getattr(torchvision.models, arch)(weights=None)
    encoder.num_features = encoder.fc.in_features
    encoder.fc = nn.Identity()
    if stem == "cifar":
        encoder.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        encoder.maxpool = nn.Identity()
    return encoder


class DemoEncoder(nn.Module):
    """Four 3x3 convolutions with BatchNorm and ReLU, then the mean over positions.

    241,184 parameters, for the demo's 32 px images on a few cores.

    Twin: eval/encoder.py. The first layer strides already: at full resolution it would cost
    more than the others together.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, width, stride in ((3, 32, 2), (32, 64, 2), (64, 128, 2), (128, 128, 1)):
            layers += [nn.Conv2d(before, width, 3, stride, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.num_features = 128

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


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
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                split = SplitBatchNorm(child.num_features, child.eps, child.momentum)
                split._parameters, split._buffers = child._parameters, child._buffers
                split.groups = groups
                setattr(module, name, split)
    return model


class SplitBatchNorm(nn.BatchNorm2d):
    """BatchNorm of contiguous groups of the batch, as if each were on a process of its own.

    PAPER/CODE: the paper's groups are the GPUs' parts of the batch (Sec. 3.3); those of the
    notebook, on one GPU, are strided. Ours are contiguous, so that G groups on one process are one
    on each of G. Running statistics move by the groups' mean.
    """

    groups = 1

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.groups == 1:
            return super().forward(input)
        means = self.running_mean.repeat(self.groups, 1)  # (groups, C)
        variances = self.running_var.repeat(self.groups, 1)
        parts = zip(input.chunk(self.groups), means, variances, strict=True)
        output = [
            F.batch_norm(x, mean, var, self.weight, self.bias, True, self.momentum, self.eps)
            for x, mean, var in parts
        ]
        with torch.no_grad():
            self.running_mean.copy_(means.mean(0))
            self.running_var.copy_(variances.mean(0))
            self.num_batches_tracked += 1
        return torch.cat(output)


# ---- processes -----------------------------------------------------------------------------------


def world() -> int:
    """R, the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(x: Tensor) -> Tensor:
    """(B, ...) of every process to (N, ...), rank by rank, without gradient."""
    if world() == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def own(x: Tensor) -> Tensor:
    """This process's (B, ...) of (N, ...): the inverse of `gather`."""
    return x.chunk(world())[dist.get_rank()] if world() > 1 else x


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
