"""SimCLR's networks: an encoder f, a projection head g, BatchNorm over all processes.

Sec. 2.1 of arXiv 2002.05709 v3; the head of v2 is Sec. 2 of arXiv 2006.10029 v2.
Symbols: B images per process, F features of h = f(x), D dimension of z = g(h).
"""

import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn


class SimCLR(nn.Module):
    """f and g, trained together; h = f(x) is the representation, z = g(h) is for the loss.

    Args:
        encoder: f, any network from images to (B, F) features that has `num_features`, F. It keeps
            the weights that it comes with; `init_weights` has those of the official code.
        head_layers: of g; 2 in v1, 3 in v2.
        head_dim: D.
    """

    def __init__(self, encoder: nn.Module, head_layers: int = 2, head_dim: int = 128) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = projection_head(encoder.num_features, head_layers, head_dim)
        with torch.random.fork_rng(devices=[]):  # the caller's random stream goes on to the encoder
            init_weights(self.head)

    def forward(self, view1: Tensor, view2: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) twice to (B, D) twice, not normalised.

        Both views go through the networks together, so that BatchNorm sees 2B images (CODE
        model.py:58-68). Two calls would give other statistics and other gradients.
        """
        z1, z2 = self.head(self.encoder(torch.cat([view1, view2]))).chunk(2)
        return z1, z2

    def representation(self, images: Tensor, head_layer: int = 0) -> Tensor:
        """(B, C, H, W) to what a task is trained on: h, or the output of a layer of the head.

        `head_layer` 0 is h, (B, F), as in v1; k is the head's k-th layer after its ReLU, the best
        for fine-tuning on few labels in v2 (arXiv 2006.10029 Sec. 2: the first of three); the
        number of layers gives z.
        """
        return self.head[: 3 * head_layer](self.encoder(images))


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


# ---- BatchNorm over all processes ("global BN", Sec. 2.2) ---------------------------------------


def globalize(model: nn.Module) -> nn.Module:
    """Give every BatchNorm of `model` the statistics of the global batch, where there are several
    processes: `SyncBatchNorm` on GPUs, `GlobalBatchNorm` elsewhere. Call it before DDP wraps it.

    Twin: byol/model.py, eval/batch_norm.py. Running variances are unbiased, as
    torch has them; TensorFlow's are not.

    Raises:
        ValueError: a BatchNorm is not plain, as one of a derived class, which may do more.
    """
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return model
    for module in list(model.modules()):
        for name, child in module.named_children():
            if is_plain_batchnorm(child):
                kind = nn.SyncBatchNorm if torch.cuda.is_available() else GlobalBatchNorm
                synced = kind(child.num_features, child.eps, child.momentum)
                synced._parameters, synced._buffers = child._parameters, child._buffers
                setattr(module, name, synced.train(child.training))
            elif isinstance(child, nn.SyncBatchNorm | GlobalBatchNorm):
                continue
            elif isinstance(child, nn.modules.batchnorm._BatchNorm):
                what = f"{name}: a {type(child).__name__} that is no plain BatchNorm"
                raise ValueError(f"{what} cannot share its statistics among processes")
    return model


def is_plain_batchnorm(module: nn.Module) -> bool:
    """Whether a layer is BatchNorm and nothing besides, with weights and running statistics.

    Twin: moco/model.py, byol/model.py, eval/batch_norm.py.
    """
    return type(module) in (nn.BatchNorm1d, nn.BatchNorm2d) and not (
        module.weight is None or module.running_mean is None or module.momentum is None
    )


class GlobalBatchNorm(nn.BatchNorm2d):
    """Differentiable BatchNorm with the statistics of all processes, on any device.

    Twin: byol/model.py, eval/batch_norm.py. `SyncBatchNorm` is the fast one but needs GPUs. A
    process may hold any number of images, or none.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        """(B, C) and (B, C, H, W) are both welcome."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        # In float64, so that several processes are right to float32's last bits. torch's own on a
        # CPU sums in float64 for contiguous maps alone; in channels_last, and for (B, C), it sums
        # in float32, with an error of up to 3e-5 over 1e5 values.
        wide, axes = input.double(), [0, *range(2, input.ndim)]
        shape = [1, -1] + [1] * (input.ndim - 2)
        mine = wide.new_tensor([input.numel() // input.shape[1]])
        total = _AllReduce.apply(torch.cat([wide.sum(axes), mine]))
        n = total[-1].detach()
        mean = total[:-1] / n
        centred = wide - mean.view(shape)
        var = _AllReduce.apply(centred.square().sum(axes)) / n
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            unbiased = var * n / (n - 1)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
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
