"""SimCLR's networks: encoder f, projection head g, BatchNorm over all processes.

Sec. 2.1 of arXiv 2002.05709 v3; the head of v2 is Sec. 2 of arXiv 2006.10029 v2.
Symbols: B images per process, F features of h = f(x), D dimension of z = g(h), K chunks of a batch.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .config import Config


class SimCLR(nn.Module):
    """f and g, trained together; h = f(x) is the representation, z = g(h) is for the loss."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.encoder = build_encoder(cfg.arch, cfg.stem)
        self.head = projection_head(self.encoder.num_features, cfg.head_layers, cfg.head_dim)
        self.chunks = cfg.batch_size // cfg.cache_chunk if cfg.cache_chunk else 1
        init_weights(self)

    def forward(self, view1: Tensor, view2: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) twice to (B, D) twice, not normalised."""
        return self.cached(view1, view2) if self.chunks > 1 else self.embed(view1, view2)

    def embed(self, view1: Tensor, view2: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) twice to (B, D) twice.

        Both views go through the networks together, so that BatchNorm sees 2B images (CODE
        model.py:58-68). Two calls would give other statistics and other gradients.
        """
        z1, z2 = self.head(self.encoder(torch.cat([view1, view2]))).chunk(2)
        return z1, z2

    def cached(self, view1: Tensor, view2: Tensor) -> tuple[Tensor, Tensor]:
        """`embed` in K chunks, with the memory of one: gradient caching (arXiv 2101.06983).

        The z of every chunk are kept, its activations are not. The loss is taken over all z as
        ever; its gradient reaches the z, and then each chunk goes through the networks a second
        time, to be differentiated at once. The gradients are exact, for a forward pass more.

        What differs: BatchNorm sees the 2B / K images of a chunk. Its running statistics move once
        a step, by the mean of the chunks' (the second pass does not touch them).

        A chunk is every K-th image, so that it holds the same ones on any number of processes.
        """
        moving = list(self.buffers())
        parts, moved = [], []
        for k in range(self.chunks):
            with _unmoved(moving):
                z = checkpoint(
                    self.embed,
                    view1[k :: self.chunks],
                    view2[k :: self.chunks],
                    use_reentrant=False,
                    preserve_rng_state=False,  # nothing here is random
                    context_fn=lambda: (nullcontext(), _unmoved(moving)),  # of either pass
                )
                moved.append([b.clone() for b in moving])
            parts.append(z)
            # else chunks share one low-precision copy of the weights, and sum their gradients in it
            torch.clear_autocast_cache()
        for b, after in zip(moving, zip(*moved, strict=True), strict=True):
            b.copy_(sum(after) / self.chunks)
        z1, z2 = (torch.stack(z, dim=1).flatten(0, 1) for z in zip(*parts, strict=True))
        return z1, z2

    def representation(self, images: Tensor, head_layer: int = 0) -> Tensor:
        """(B, 3, H, W) to what a task is trained on: h, or the output of a layer of the head.

        `head_layer` 0 is h, (B, F), as in v1; k is the head's k-th layer after its ReLU, the best
        for fine-tuning on few labels in v2 (arXiv 2006.10029 Sec. 2: the first of three); the
        number of layers gives z.
        """
        return self.head[: 3 * head_layer](self.encoder(images))


@contextmanager
def _unmoved(buffers: Sequence[Tensor]) -> Iterator[None]:
    """Afterwards `buffers` are as they were before."""
    before = [b.clone() for b in buffers]
    try:
        yield
    finally:
        for b, value in zip(buffers, before, strict=True):
            b.copy_(value)


def build_encoder(arch: str, stem: str) -> nn.Module:
    """A network from (B, 3, H, W) images to (B, num_features) features, torchvision's key names.

    Twin: eval/encoder.py. ResNet-18 is torchvision's, without the extra shortcut of the official
    TensorFlow code. The `cifar` stem is a 3x3 convolution of stride 1 and no max-pooling.
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


def projection_head(features: int, layers: int, dim: int) -> nn.Sequential:
    """g: Linear-BN-ReLU blocks of the features' own width, then Linear-BN to D.

    PAPER/CODE: the paper has g(h) = W2 ReLU(W1 h) alone (Sec. 2.1). The code has no biases, and
    BatchNorm after every linear layer, the last with a gain but no bias (model_util.py:109-177).
    """
    blocks: list[nn.Module] = []
    for _ in range(layers - 1):
        blocks += [nn.Linear(features, features, bias=False), nn.BatchNorm1d(features), nn.ReLU()]
    output = nn.BatchNorm1d(dim)
    output.bias.requires_grad_(False)  # stays zero
    return nn.Sequential(*blocks, nn.Linear(features, dim, bias=False), output)


def init_weights(model: nn.Module) -> None:
    """The official code's initial weights (resnet.py:273-277, 395, 480; model_util.py:122).

    Convolutions: normal cut at two deviations, variance 1 / fan_in. Linear: normal, 0.01. The last
    BatchNorm of every residual block starts at gain 0, so that each block starts as the identity.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            # cutting at 2 sd leaves 0.8796 of a normal's deviation
            std = module.weight[0].numel() ** -0.5 / 0.87962566
            nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
        elif isinstance(module, torchvision.models.resnet.Bottleneck):
            nn.init.zeros_(module.bn3.weight)
        elif isinstance(module, torchvision.models.resnet.BasicBlock):
            nn.init.zeros_(module.bn2.weight)


# ---- BatchNorm over all processes ("global BN", Sec. 3) ------------------------------------------


def globalize(model: nn.Module) -> nn.Module:
    """Give every BatchNorm of `model` the statistics of the global batch, where there are several
    processes: `SyncBatchNorm` on GPUs, `GlobalBatchNorm` elsewhere. Call it before DDP wraps it.

    Twin: byol/model.py. Running variances are unbiased, as torch has them; TensorFlow's are not.
    """
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return model
    if torch.cuda.is_available():
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
                synced = GlobalBatchNorm(child.num_features, child.eps, child.momentum)
                synced._parameters, synced._buffers = child._parameters, child._buffers
                setattr(module, name, synced)
    return model


class GlobalBatchNorm(nn.BatchNorm2d):
    """Differentiable BatchNorm with the statistics of all processes, on any device.

    Twin: byol/model.py. `SyncBatchNorm` is the fast one but needs GPUs. Every process must hold
    the same number of images.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        """(B, C) and (B, C, H, W) are both welcome."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        # torch's BatchNorm on a CPU sums in float64 too, and LARS tells the two apart
        wide = input.double()
        axes, world = [0, *range(2, input.ndim)], dist.get_world_size()
        shape = [1, -1] + [1] * (input.ndim - 2)
        mean = _AllReduce.apply(wide.mean(axes)) / world
        centred = wide - mean.view(shape)
        var = _AllReduce.apply(centred.square().mean(axes)) / world
        with torch.no_grad():
            n = input.numel() // input.shape[1] * world
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(var.to(self.running_var.dtype) * n / (n - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = (self.weight * torch.rsqrt(var + self.eps)).view(shape)
        return (centred * scale + self.bias.view(shape)).to(input.dtype)


class _AllReduce(torch.autograd.Function):
    """The sum over processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad
