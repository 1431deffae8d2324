"""Encoders to judge: an exported run, torchvision's weights, or a baseline that learned nothing.

    RUN, RUN/encoder.safetensors              what a method exported
    random                                    RUN's network at random initial weights
    pixels                                    no network: the pixels at RUN's input size
    random:resnet18, torchvision:resnet50     without a RUN

The file's metadata says how to build the network; no method is imported.
"""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from safetensors import safe_open
from torch import Tensor, nn

from common.cli import UserError
from common.data import first_line

RESNETS = tuple(torchvision.models.list_models(include="resnet*"))
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Input:
    """How an encoder wants its images when it is judged."""

    size: int  # pixels, height and width
    crop: float = 0.875  # central share of the shorter side that is resized to `size`
    interpolation: str = "bicubic"
    mean: tuple[float, ...] | None = None  # of each channel in [0, 1]; None: left as they are
    std: tuple[float, ...] | None = None

    @staticmethod
    def of(size: int, **other: Any) -> "Input":
        """Up to 32 px, as CIFAR's, nothing is cropped (SimCLR's data.py:154-158); above it is."""
        return Input(size, crop=1.0 if size <= 32 else 0.875, **other)


@dataclass
class Encoder:
    """A network from images to features, with what is known of it."""

    network: nn.Module
    input: Input
    name: str  # "encoder", "random", "pixels" or what --weights said
    about: dict[str, Any] = field(default_factory=dict)  # the metadata of the exported file
    layer: int = 0  # see `load`

    @property
    def suffix(self) -> str:
        """What a protocol's name ends in where it is not the representation that is judged."""
        return {0: "", -1: "-output"}.get(self.layer, f"-head{self.layer}")


def build_encoder(arch: str, stem: str) -> nn.Module:
    """A network from (B, 3, H, W) images to (B, num_features) features, torchvision's key names.

    Twin: simclr/model.py, moco/model.py, byol/model.py.
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

    Twin: simclr/model.py, moco/model.py, byol/model.py. The first layer strides already: at full
    resolution it would cost more than the others together.
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


def metadata(arch: str, stem: str, given: Input, published: str) -> dict[str, Any]:
    """What an exported encoder must say of itself for `load` to build it again."""
    return {"arch": arch, "stem": stem, "input": asdict(given), "published": published}


def load(target: str, weights: str = "", layer: int = 0) -> Encoder:
    """The encoder of a run (a folder or a file), or `weights` in its place.

    Args:
        layer: 0 is the representation h; k the head's k-th hidden layer after its ReLU; -1 the
            head's output.

    Raises:
        UserError: no such run or file, not an exported encoder, or a head without that layer.
    """
    if weights.startswith(("random:", "torchvision:")):
        return by_name(weights)
    if not target:
        raise UserError("say which RUN to judge, or --weights random:ARCH or torchvision:ARCH")
    path = Path(target)
    path = path / "encoder.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{path}: no such file; a run writes it at its first checkpoint")
    try:
        with safe_open(path, framework="pt") as file:
            about = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        given = Input(**about["input"])
        check_metadata(about, given)
        network = build_normed(about)
        body = {key: value for key, value in tensors.items() if not key.startswith("head.")}
        network.load_state_dict(body)  # strict: every tensor has its place
        if layer:
            head = {k.removeprefix("head."): v for k, v in tensors.items() if k.startswith("head.")}
            network = Cut(network, build_head(about["head"], head), layer)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: not an exported encoder ({first_line(error)})") from error
    if weights == "pixels":
        return Encoder(Pixels().eval(), given, "pixels", about)
    if weights == "random":
        return Encoder(build_seeded(about), given, "random", about)
    if weights:
        known = "random, pixels, random:ARCH, torchvision:ARCH[=FILE]"
        raise UserError(f"--weights {weights}: not one of {known}")
    return Encoder(network.eval(), given, "encoder", about, layer)


def check_metadata(about: dict[str, Any], given: Input) -> None:
    """Refuse what no method writes: the file may come from anyone, and its words build a network.

    Raises:
        ValueError: a value that is not known, or a size that no image has.
    """
    known = {"arch": ("demo", *RESNETS), "stem": ("imagenet", "cifar"), "norm": ("bn", "gn+ws")}
    for key, choices in known.items():
        if about.get(key, "bn" if key == "norm" else None) not in choices:
            raise ValueError(f"{key} {about.get(key)!r:.80}, not one of {', '.join(choices)}")
    for key in ("method", "recipe", "published", "commit"):
        if not isinstance(about.get(key, ""), str):
            raise ValueError(f"{key} {about[key]!r:.80}, not a text")
    if not isinstance(about.get("epochs", 0), int | float):
        raise ValueError(f"epochs {about['epochs']!r:.80}, not a number")
    if type(given.size) is not int or not 1 <= given.size <= 10_000 or not 0 < given.crop <= 1:
        raise ValueError(f"input of {given.size!r:.80} pixels, crop {given.crop!r:.80}")
    if given.interpolation not in ("bilinear", "bicubic"):
        raise ValueError(f"interpolation {given.interpolation!r:.80}")
    for channels, least in ((given.mean, -math.inf), (given.std, 0)):
        if channels is not None and not (
            len(channels) == 3 and all(least < x < math.inf for x in channels)
        ):
            raise ValueError(f"mean {given.mean!r:.80} and std {given.std!r:.80}")


def build_head(kinds: list[str], tensors: dict[str, Tensor]) -> nn.Sequential:
    """The exported head: the classes of its layers, in order, with their sizes from the tensors."""
    layers: list[nn.Module] = []
    for i, kind in enumerate(kinds):
        weight, biased = tensors.get(f"{i}.weight"), f"{i}.bias" in tensors
        if kind == "ReLU":
            layers.append(nn.ReLU())
        elif kind in ("Linear", "StandardisedLinear") and weight is not None:
            linear = nn.Linear if kind == "Linear" else StandardisedLinear
            layers.append(linear(weight.shape[1], weight.shape[0], bias=biased))
        elif kind == "GroupNorm" and weight is not None:
            layers.append(nn.GroupNorm(16, len(weight)))
        elif weight is not None and "BatchNorm" in kind:
            layers.append(nn.BatchNorm1d(len(weight)))
        else:
            raise UserError(f"the exported head has a layer of a kind not known here: {kind}")
    head = nn.Sequential(*layers)
    head.load_state_dict(tensors)
    return head


class Cut(nn.Module):
    """An encoder with the first part of its head: features from the middle of the head."""

    def __init__(self, encoder: nn.Module, head: nn.Sequential, layer: int) -> None:
        super().__init__()
        ends = [i + 1 for i, module in enumerate(head) if isinstance(module, nn.ReLU)]
        if layer > len(ends):
            raise UserError(f"--layer {layer}: the head has {len(ends)} hidden layers")
        self.encoder, self.head = encoder, head if layer < 0 else head[: ends[layer - 1]]
        linear = [module for module in self.head if isinstance(module, nn.Linear)]
        self.num_features = linear[-1].out_features

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(images))


def by_name(weights: str) -> Encoder:
    """`random:ARCH` or `torchvision:ARCH[=FILE]`, at ImageNet's size and normalisation.

    FILE is a local state dict with torchvision's key names.
    """
    kind, arch = weights.split(":", 1)
    arch, _, file = arch.partition("=")
    if arch not in RESNETS:
        raise UserError(f"--weights {weights}: no such torchvision ResNet")
    given = Input(224, interpolation="bilinear", mean=IMAGENET_MEAN, std=IMAGENET_STD)
    about = {"arch": arch, "stem": "imagenet"}
    network = build_seeded(about)
    if kind == "torchvision":
        try:
            if file:
                state = torch.load(file, map_location="cpu", weights_only=True)
            else:
                known = torchvision.models.get_model_weights(arch)["IMAGENET1K_V1"]
                state = known.get_state_dict(check_hash=True, weights_only=True)
        except Exception as error:
            what = "read" if file else "fetched"
            said = f"cannot be {what} ({first_line(error)})"
            raise UserError(f"--weights {weights}: {said}") from error
        try:
            network.load_state_dict({k: v for k, v in state.items() if not k.startswith("fc.")})
        except (AttributeError, RuntimeError) as error:
            raise UserError(f"--weights {weights}: not a state dict of {arch}") from error
    return Encoder(network.eval(), given, f"{kind}:{arch}", about)


def build_normed(about: dict[str, Any]) -> nn.Module:
    """The network that an exported file's metadata describes, with BatchNorm or GN + WS."""
    network = build_encoder(about["arch"], about["stem"])
    return group_norm_weight_standardised(network) if about.get("norm") == "gn+ws" else network


def build_seeded(about: dict[str, Any]) -> nn.Module:
    """The same, at torchvision's own initial weights, equal at every call, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_normed(about).eval()


# ---- without batch statistics (arXiv 2010.10241) -------------------------------------------------


def group_norm_weight_standardised(model: nn.Module) -> nn.Module:
    """Replace every BatchNorm by GroupNorm and standardise the weights of every other layer.

    Twin: byol/model.py. Keys and shapes of the parameters stay. Only the paper's abstract was
    read: that there are 16 groups, that all layers are standardised, and that LARS and the moving
    average act on the weights before standardisation, is not verified.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
                setattr(module, name, nn.GroupNorm(16, child.num_features, child.eps))
            elif isinstance(child, nn.Conv2d):
                child.__class__ = StandardisedConv2d  # the same parameters, another forward
            elif isinstance(child, nn.Linear):
                child.__class__ = StandardisedLinear
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


class Pixels(nn.Module):
    """No network at all: (B, 3, H, W) to (B, 3 H W)."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)
