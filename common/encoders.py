"""Networks by name, from images to features.

    demo                                a small CNN for the embedded images
    resnet18, resnet50, resnext50_32x4d, wide_resnet50_2, ...      torchvision's ResNets
    resnet18-cifar                      the same with a 3x3 stem of stride 1 and no max-pooling
    timm:NAME                           any network of timm (`pip install -e '.[timm]'`)

The same name stands in an exported encoder. A network of your own is one more line in `build`.
"""

import contextlib
import difflib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from common.cli import require
from common.errors import UserError, first_line

CIFAR = "-cifar"  # the end of the name of a ResNet with CIFAR's stem
PREFIXES = ("resnet", "resnext", "wide_resnet")
RESNETS = tuple(n for n in torchvision.models.list_models() if n.startswith(PREFIXES))


def full_name(arch: str, stem: str = "imagenet") -> str:
    """The name of a network whose stem is given apart: resnet18 and cifar are resnet18-cifar."""
    return arch + CIFAR if stem == "cifar" and arch in RESNETS else arch


def keeps_its_weights(name: str) -> bool:
    """Whether a network keeps the initial weights that it is built with, as timm's and your own do.

    Torchvision's ResNets and the demo network get those of the official code in SimCLR and BYOL.
    """
    return name != "demo" and name.removesuffix(CIFAR) not in RESNETS


def build(name: str, channels: int = 3, image_size: int | None = None) -> nn.Module:
    """A network from (B, channels, H, W) images to (B, num_features) features.

    ResNets have torchvision's key names. Their initial weights, as those of timm's networks, are
    their library's own.

    Args:
        image_size: pixels, height and width, that the network must be able to take; networks that
            are made for one size, as many transformers are, are made for this one.

    Raises:
        UserError: no such network; the package of an extra is missing; images of that size are too
            small or do not fit.
    """
    arch = name.removesuffix(CIFAR)
    if name == "demo":
        network: nn.Module = DemoEncoder(channels)
    elif name.startswith("timm:"):
        network = _build_timm(name.removeprefix("timm:"), channels, image_size)
    elif arch in RESNETS:
        network = _build_resnet(arch, channels, name.endswith(CIFAR))
    else:
        known = f"demo, {', '.join(RESNETS)} (each also with {CIFAR}), timm:NAME"
        raise UserError(f"{name[:80]}: no such network; there are {known}")
    width = output_width(network, channels, image_size or 224, name)
    network.num_features = width  # type: ignore[assignment]
    return network


def output_width(network: nn.Module, channels: int, image_size: int, name: str = "") -> int:
    """F, the width of the network's output, by one forward pass: what it says may be another.

    Raises:
        UserError: it cannot take images of that size, or gives no vector for each.
    """
    first = next(network.parameters(), torch.empty(0))
    try:
        with evaluation_mode(network), torch.no_grad():
            features = network(first.new_zeros(1, channels, image_size, image_size))
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        size = f"images of {image_size} x {image_size} pixels"
        reason = first_line(error)
        raise UserError(f"{name or 'the encoder'}: cannot take {size} ({reason})") from error
    if not isinstance(features, Tensor) or features.ndim != 2:
        shape = tuple(getattr(features, "shape", ())) or type(features).__name__
        raise UserError(f"{name or 'the encoder'}: gives {shape}, not one vector for each image")
    return features.shape[1]


@contextlib.contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Evaluate in the block; afterwards every layer has its own mode again, also a frozen one."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _build_resnet(arch: str, channels: int, cifar: bool) -> nn.Module:
    network = getattr(torchvision.models, arch)(weights=None)
    network.fc = nn.Identity()
    if cifar:
        network.conv1 = nn.Conv2d(channels, 64, kernel_size=3, stride=1, padding=1, bias=False)
        network.maxpool = nn.Identity()
    elif channels != 3:
        network.conv1 = nn.Conv2d(channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
    return network


def _build_timm(name: str, channels: int, image_size: int | None) -> nn.Module:
    require("timm")
    import timm

    if not timm.is_model(name):  # so that no name can be one of a file or a hub
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise UserError(f"timm:{name[:80]}: no such network{hint}")
    known = timm.get_pretrained_cfg(name)
    size: dict[str, Any] = (
        {"img_size": image_size} if image_size and known and known.fixed_input_size else {}
    )
    try:
        return timm.create_model(name, pretrained=False, num_classes=0, in_chans=channels, **size)
    except Exception as error:
        raise UserError(f"timm:{name}: {first_line(error)}") from error


class DemoEncoder(nn.Module):
    """Four 3x3 convolutions with BatchNorm and ReLU, then the mean over positions.

    241,184 parameters, for the demo's 32 px images on a few cores. The first layer strides already:
    at full resolution it would cost more than the others together.
    """

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, width, stride in ((channels, 32, 2), (32, 64, 2), (64, 128, 2), (128, 128, 1)):
            layers += [nn.Conv2d(before, width, 3, stride, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


# ---- without batch statistics (arXiv 2010.10241) -------------------------------------------------


def group_norm_weight_standardised(model: nn.Module) -> nn.Module:
    """Replace every BatchNorm by GroupNorm and standardise the weights of every other layer.

    Twin: byol/model.py. Keys and shapes of the parameters stay. Only the paper's abstract was
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

    Twin: byol/model.py. weight: (outputs, ...); the deviation is the biased one, plus `eps`.
    """
    flat = weight.flatten(1)
    flat = flat - flat.mean(1, keepdim=True)
    return (flat / (flat.std(1, correction=0, keepdim=True) + eps)).view_as(weight)


class StandardisedConv2d(nn.Conv2d):
    """Twin: byol/model.py."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, standardise(self.weight), self.bias)


class StandardisedLinear(nn.Linear):
    """Twin: byol/model.py."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, standardise(self.weight), self.bias)
