"""BYOL's networks: online and target, the target's moving average, BatchNorm over all processes.

Sec. 3.1 and 3.3 of arXiv 2006.07733 v3; GroupNorm and weight standardisation: arXiv 2010.10241.
Symbols: B images per process, F features of y = f(x), D dimension of z = g(y) and p = q(z).
"""

import copy

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn


class Online(nn.Module):
    """f, g and q with weights theta, trained by gradients; y = f(x) is the representation.

    Args:
        encoder: f, any network from images to (B, F) features that has `num_features`, F. It keeps
            the weights that it comes with; `init_weights` has those of the official code.
        hidden_dim: width of g's and q's hidden layer.
        dim: D.
    """

    def __init__(self, encoder: nn.Module, hidden_dim: int = 4096, dim: int = 256) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = mlp(encoder.num_features, hidden_dim, dim)
        self.predictor = mlp(dim, hidden_dim, dim)
        with torch.random.fork_rng(devices=[]):  # the caller's random stream goes on to the encoder
            init_weights(self.projector)
            init_weights(self.predictor)

    def forward(self, view1: Tensor, view2: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) twice to predictions p1, p2, (B, D) each, not normalised.

        View 1 goes through, then view 2, so that BatchNorm sees the B images of one view (CODE
        byol_experiment.py:183-185). The two concatenated would give other statistics and other
        gradients.
        """
        p1, p2 = (self.predictor(self.projector(self.encoder(view))) for view in (view1, view2))
        return p1, p2


class Target(nn.Module):
    """f and g with weights xi, a moving average of the online ones: see `ema_`.

    PAPER/CODE: it starts as a copy of the online network, as in App. J; the code draws other
    weights (byol_experiment.py:368-385) and says that it makes no difference. It stays in training
    mode: its BatchNorm uses the batch's statistics and keeps running ones of its own, which are
    neither averaged nor copied (byol_experiment.py:232-236, 346-351).
    """

    def __init__(self, online: Online) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(online.encoder)
        self.projector = copy.deepcopy(online.projector)
        self.requires_grad_(False)

    def forward(self, view1: Tensor, view2: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) twice to projections z1, z2, (B, D) each, not normalised."""
        z1, z2 = (self.projector(self.encoder(view)) for view in (view1, view2))
        return z1, z2


@torch.no_grad()
def ema_(target: Target, online: Online, tau: float) -> None:
    """xi <- tau xi + (1 - tau) theta (Eq. 1), for parameters alone, in one fused call.

    After the optimiser's step, with the new theta (CODE byol_experiment.py:333-343).
    """
    theta = [*online.encoder.parameters(), *online.projector.parameters()]
    torch._foreach_lerp_(list(target.parameters()), theta, 1 - tau)


def mlp(features: int, hidden: int, dim: int) -> nn.Sequential:
    """g and q: Linear-BN-ReLU, then Linear to D without BatchNorm (Sec. 3.3).

    PAPER/CODE: the last layer has no bias in the code (networks.py:40-45); in the paper's App. J it
    has one. We follow the code.
    """
    return nn.Sequential(
        nn.Linear(features, hidden),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, dim, bias=False),
    )


def init_weights(model: nn.Module) -> None:
    """The official code's initial weights, those of Haiku at 0673817.

    Weights: normal of deviation 1 / sqrt(fan_in) cut at two deviations, which leaves 0.88 of it.
    Biases: 0.

    PAPER/CODE: the last normalisation of a bottleneck starts at gain 0 in the released code, 1 in
    the paper's runs; README finds 0 more stable and no different for ResNet-50. We follow the code.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            std = module.weight[0].numel() ** -0.5
            nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, torchvision.models.resnet.Bottleneck):
            nn.init.zeros_(module.bn3.weight)


# ---- without batch statistics (arXiv 2010.10241) -------------------------------------------------


def group_norm_weight_standardised(model: nn.Module) -> nn.Module:
    """Replace every BatchNorm by GroupNorm and standardise the weights of every other layer.

    Twin: common/encoders.py. Keys and shapes of the parameters stay. Only the paper's abstract was
    read: that there are 16 groups, that all layers are standardised, and that LARS and the moving
    average act on the weights before standardisation, is not verified.

    Raises:
        ValueError: a layer is of a class derived from these, which may do more than they do.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.BatchNorm1d or type(child) is nn.BatchNorm2d:
                setattr(module, name, nn.GroupNorm(16, child.num_features, child.eps))
            elif type(child) is nn.Conv2d:
                child.__class__ = StandardisedConv2d  # the same parameters, another forward
            elif type(child) is nn.Linear:
                child.__class__ = StandardisedLinear
            elif isinstance(child, nn.modules.batchnorm._BatchNorm | nn.Conv2d | nn.Linear):
                raise ValueError(f"{name}: a {type(child).__name__} has no form with GN + WS")
    return model


def standardise(weight: Tensor, eps: float = 1e-5) -> Tensor:
    """Each output unit's weights minus their mean, divided by their deviation (arXiv 1903.10520).

    Twin: common/encoders.py. weight: (outputs, ...); the deviation is the biased one, plus `eps`.
    """
    flat = weight.flatten(1)
    flat = flat - flat.mean(1, keepdim=True)
    return (flat / (flat.std(1, correction=0, keepdim=True) + eps)).view_as(weight)


class StandardisedConv2d(nn.Conv2d):
    """Twin: common/encoders.py."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, standardise(self.weight), self.bias)


class StandardisedLinear(nn.Linear):
    """Twin: common/encoders.py."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, standardise(self.weight), self.bias)


# ---- BatchNorm over all processes (CODE configs/byol.py) -----------------------------------------


def globalize(model: nn.Module) -> nn.Module:
    """Give every BatchNorm of `model` the statistics of the global batch, where there are several
    processes: `SyncBatchNorm` on GPUs, `GlobalBatchNorm` elsewhere. Call it before DDP wraps it.

    Twin: simclr/model.py, eval/batch_norm.py. Running variances are unbiased, as
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

    Twin: simclr/model.py, moco/model.py, eval/batch_norm.py.
    """
    return type(module) in (nn.BatchNorm1d, nn.BatchNorm2d) and not (
        module.weight is None or module.running_mean is None or module.momentum is None
    )


class GlobalBatchNorm(nn.BatchNorm2d):
    """Differentiable BatchNorm with the statistics of all processes, on any device.

    Twin: simclr/model.py, eval/batch_norm.py. `SyncBatchNorm` is the fast one but needs GPUs. A
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
