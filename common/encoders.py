"""Networks by name, from images to features.

    demo                                a small CNN for the embedded images
    resnet18, resnet50, resnext50_32x4d, wide_resnet50_2, ...      torchvision's ResNets
    resnet50x2                          twice as wide in every layer
    resnet50-sk                         with selective kernels and a ResNet-D stem (SimCLR v2)
    resnet50-simclr                     padded as in SimCLR's official code
    resnet50-byol                       padded as in BYOL's official code
    resnet18-cifar                      with a 3x3 stem of stride 1 and no max-pooling
    timm:NAME                           any network of timm (`pip install -e '.[timm]'`)

The parts of a ResNet's name are combined in this order: `resnet152x3-sk-simclr-cifar`. The same
name stands in an exported encoder, for padding is part of the function: at even sizes "SAME" of
TensorFlow and Haiku pads a strided layer less before than after, torchvision pads both sides alike.
A network of your own is one more line in `build`.
"""

import contextlib
import difflib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from common.cli import require
from common.errors import UserError, first_line

CIFAR = "-cifar"  # the end of the name of a ResNet with CIFAR's stem
PREFIXES = ("resnet", "resnext", "wide_resnet")
RESNETS = tuple(n for n in torchvision.models.list_models() if n.startswith(PREFIXES))
BLOCKS: dict[str, tuple[type, list[int]]] = {  # of the ResNets that have variants
    "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet34": (BasicBlock, [3, 4, 6, 3]),
    "resnet50": (Bottleneck, [3, 4, 6, 3]),
    "resnet101": (Bottleneck, [3, 4, 23, 3]),
    "resnet152": (Bottleneck, [3, 8, 36, 3]),
    "resnet200": (Bottleneck, [3, 24, 36, 3]),
}
NAME = re.compile(
    r"(?P<arch>[a-z]\w*?)(x(?P<width>[2-4]))?(?P<sk>-sk)?(-(?P<padding>simclr|byol))?(?P<cifar>-cifar)?"
)


@dataclass(frozen=True)
class ResNet:
    """What the name of a ResNet says; `str()` of it is the name."""

    arch: str  # torchvision's name, or resnet200
    width: int = 1  # of every layer, as a multiple
    sk: bool = False  # selective kernels, and ResNet-D's stem and shortcuts
    padding: str = ""  # simclr or byol: of the official code; "": torchvision's
    cifar: bool = False  # a 3x3 stem of stride 1, no max-pooling

    def __str__(self) -> str:
        width = f"x{self.width}" if self.width > 1 else ""
        padding = f"-{self.padding}" if self.padding else ""
        return self.arch + width + "-sk" * self.sk + padding + CIFAR * self.cifar

    @property
    def plain(self) -> bool:
        """Whether it is torchvision's, apart from the stem."""
        return self == ResNet(self.arch, cifar=self.cifar) and self.arch in RESNETS


def parse(name: str) -> ResNet | None:
    """The parts of a ResNet's name; None where there is no such ResNet."""
    found = NAME.fullmatch(name)
    if not found:
        return None
    parts = found.groupdict()
    resnet = ResNet(
        parts["arch"],
        int(parts["width"] or 1),
        bool(parts["sk"]),
        parts["padding"] or "",
        bool(parts["cifar"]),
    )
    if resnet.arch not in BLOCKS and not resnet.plain:
        return None
    return None if resnet.sk and BLOCKS[resnet.arch][0] is BasicBlock else resnet


def full_name(arch: str, stem: str = "imagenet") -> str:
    """The name of a network whose stem is given apart: resnet18 and cifar are resnet18-cifar."""
    return arch + CIFAR if stem == "cifar" and parse(arch + CIFAR) else arch


def keeps_its_weights(name: str) -> bool:
    """Whether a network keeps the initial weights that it is built with, as timm's and your own do.

    Torchvision's ResNets and the demo network get those of the official code in SimCLR and BYOL.
    """
    return name != "demo" and parse(name) is None


def build(name: str, channels: int = 3, image_size: int | None = None) -> nn.Module:
    """A network from (B, channels, H, W) images to (B, num_features) features.

    ResNets have torchvision's key names, those with selective kernels some more. Their initial
    weights, as those of timm's networks, are their library's own.

    Args:
        image_size: pixels, height and width, that the network must be able to take; networks that
            are made for one size, as many transformers are, are made for this one.

    Raises:
        UserError: no such network; the package of an extra is missing; images of that size are too
            small or do not fit.
    """
    if name == "demo":
        network: nn.Module = DemoEncoder(channels)
    elif name.startswith("timm:"):
        network = _build_timm(name.removeprefix("timm:"), channels, image_size)
    elif resnet := parse(name):
        network = _build_resnet(resnet, channels)
    else:
        variants = f"{', '.join(BLOCKS)} also with x2 to x4, -sk, -simclr or -byol"
        known = f"demo, {', '.join(RESNETS)} ({variants}; each also with {CIFAR}), timm:NAME"
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
    """Evaluate in the block; afterwards every layer has its own mode again, also a frozen one.

    A compiled network runs as it is written: its code would be compiled again for evaluation and
    for each size of batch, which takes longer than the images of most evaluations.
    """
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    may_be_compiled = "torch._dynamo" in sys.modules  # to import it takes a second
    try:
        with (
            torch.compiler.set_stance("force_eager")
            if may_be_compiled
            else contextlib.nullcontext()
        ):
            yield
    finally:
        for module, training in modes:
            module.training = training


def _build_resnet(name: ResNet, channels: int) -> nn.Module:
    network: Any
    if name.plain:
        network = getattr(torchvision.models, name.arch)(weights=None)
    else:
        network = VariantResNet(*BLOCKS[name.arch], name)
    network.fc = nn.Identity()
    stem = network.bn1.num_features
    if name.cifar:
        network.conv1 = nn.Conv2d(channels, stem, kernel_size=3, stride=1, padding=1, bias=False)
        network.maxpool = nn.Identity()
    elif name.sk:
        network.conv1 = _resnet_d_stem(channels, stem)
    elif channels != 3 or stem != 64:
        network.conv1 = nn.Conv2d(channels, stem, kernel_size=7, stride=2, padding=3, bias=False)
    if name.padding and not name.cifar:
        network.maxpool = SameMaxPool2d()
    if name.padding == "byol":  # as Haiku does; at stride 1 there is no difference
        for module in network.modules():
            if type(module) is nn.Conv2d and module.stride[0] > 1 and module.kernel_size[0] > 1:
                module.__class__ = SameConv2d
    return network


class VariantResNet(torchvision.models.ResNet):
    """Torchvision's ResNet with other widths, blocks and shortcuts, by `name`; see the module.

    Without the stem's convolution, which `build` puts in.
    """

    def __init__(self, block: Any, layers: list[int], name: ResNet) -> None:
        self.name = name
        super().__init__(block, layers)
        self.bn1 = nn.BatchNorm2d(64 * name.width)

    def _make_layer(
        self, block: Any, planes: int, blocks: int, stride: int = 1, dilate: bool = False
    ) -> nn.Sequential:
        if planes == 64:  # the first group, behind the stem
            self.inplanes = 64 * self.name.width
        inputs = self.inplanes
        layer = super()._make_layer(block, planes * self.name.width, blocks, stride, dilate)
        # CODE: both official ResNets project the first shortcut of every group, so that of
        # ResNet-18 and 34 has one more convolution than torchvision's.
        if self.name.sk or (self.name.padding and planes == 64):
            pool = _resnet_d_pool(stride) if self.name.sk else []
            conv = nn.Conv2d(inputs, self.inplanes, kernel_size=1, bias=False)
            layer[0].downsample = nn.Sequential(*pool, conv, nn.BatchNorm2d(self.inplanes))
        if self.name.sk:
            for place, module in enumerate(layer):
                width = planes * self.name.width
                module.conv2 = SelectiveKernel(width, stride if place == 0 else 1)
                module.bn2 = nn.Identity()  # the selective kernel has its own
        return layer


def _resnet_d_stem(channels: int, width: int) -> nn.Sequential:
    """Three 3x3 convolutions in place of one of 7x7 (arXiv 1812.01187; SimCLR tf2/resnet.py)."""
    half = width // 2
    layers: list[nn.Module] = []
    for before, after, stride in ((channels, half, 2), (half, half, 1)):
        layers += [nn.Conv2d(before, after, 3, stride, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Conv2d(half, width, 3, padding=1, bias=False))


def _resnet_d_pool(stride: int) -> list[nn.Module]:
    """Average 2x2 positions in front of a projection (arXiv 1812.01187).

    CODE: SimCLR pads by zeros, which count, before a pool of stride 2; one of stride 1 is "SAME" of
    TensorFlow, which averages over the positions that are there: as if the last were repeated.
    """
    pad = nn.ZeroPad2d((0, 1, 0, 1)) if stride > 1 else nn.ReplicationPad2d((0, 1, 0, 1))
    return [pad, nn.AvgPool2d(2, stride)]


class SelectiveKernel(nn.Module):
    """Two streams of 3x3 convolutions, mixed by a softmax for each channel (arXiv 1903.06586).

    As in SimCLR's official code (`SK_Conv2D`, tf2/resnet.py): both kernels are 3x3, the bottleneck
    has 1/16 of the channels (`sk_ratio` 0.0625 of every published network), at least 32.

    (B, C, H, W) to (B, C, H / stride, W / stride).
    """

    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__()
        hidden = max(channels // 16, 32)
        self.conv = nn.Conv2d(channels, 2 * channels, 3, stride, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(2 * channels)
        self.reduce = nn.Conv2d(channels, hidden, 1, bias=False)
        self.reduce_bn = nn.BatchNorm2d(hidden)
        self.select = nn.Conv2d(hidden, 2 * channels, 1, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        streams = F.relu(self.bn(self.conv(images))).unflatten(1, (2, -1))  # (B, 2, C, H, W)
        pooled = streams.sum(1).mean((2, 3), keepdim=True)
        scores = self.select(F.relu(self.reduce_bn(self.reduce(pooled))))
        return (streams * scores.unflatten(1, (2, -1)).softmax(1)).sum(1)


def pad_same(images: Tensor, kernel: int, stride: int) -> Tensor:
    """Zeros around (B, C, H, W) images for ceil(H / stride) outputs, one more after than before.

    That is "SAME" of TensorFlow and Haiku, for a kernel not smaller than its stride.
    """
    sides = []
    for size in (images.shape[3], images.shape[2]):
        total = (size + stride - 1) // stride * stride - stride + kernel - size
        sides += [total // 2, total - total // 2]
    return F.pad(images, sides)


class SameConv2d(nn.Conv2d):
    """A square convolution padded as "SAME", whatever `padding` says."""

    def forward(self, input: Tensor) -> Tensor:
        padded = pad_same(input, self.kernel_size[0], self.stride[0])
        return F.conv2d(padded, self.weight, self.bias, self.stride)


class SameMaxPool2d(nn.Module):
    """3x3 max-pooling of stride 2, padded as "SAME".

    Its input is not negative, so that zeros change no maximum.
    """

    def forward(self, images: Tensor) -> Tensor:
        return F.max_pool2d(pad_same(images, kernel=3, stride=2), kernel_size=3, stride=2)


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
