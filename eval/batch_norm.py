# mypy: ignore-errors
# The same code stands in the methods' models, which are not annotated for it.
"""BatchNorm over several processes, for networks that are trained here."""

import torch
import torch.distributed as dist
from torch import Tensor, nn


def globalize(model: nn.Module) -> nn.Module:
    """Give every BatchNorm of `model` the statistics of the global batch, where there are several
    processes: `SyncBatchNorm` on GPUs, `GlobalBatchNorm` elsewhere. Call it before DDP wraps it.

    Twin: simclr/model.py, byol/model.py. Running variances are unbiased, as
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

    Twin: simclr/model.py, moco/model.py, byol/model.py.
    """
    return type(module) in (nn.BatchNorm1d, nn.BatchNorm2d) and not (
        module.weight is None or module.running_mean is None or module.momentum is None
    )


class GlobalBatchNorm(nn.BatchNorm2d):
    """Differentiable BatchNorm with the statistics of all processes, on any device.

    Twin: simclr/model.py, byol/model.py. `SyncBatchNorm` is the fast one but needs GPUs. A
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
