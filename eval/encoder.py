"""Encoders to judge: an exported run, torchvision's weights, or a baseline that learned nothing.

    RUN, RUN/encoder.safetensors              what a method exported
    FILE                                      a checkpoint of the papers' authors; eval/weights/
    random                                    RUN's network at random initial weights
    pixels                                    no network: the pixels at RUN's input size
    random:NAME                               any network of common/encoders.py, without a RUN
    torchvision:resnet50[=FILE]               torchvision's weights, or a local state dict of its
    timm:NAME                                 timm's weights
    hf:owner/name, hf:DIR                     a model of the Hub, or a folder that holds one

The file's metadata says how to build the network; no method is imported. Nothing in a file is run.
"""

import json
import math
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors import safe_open
from torch import Tensor, nn

from common import encoders
from common.encoders import StandardisedLinear
from common.errors import UserError, first_line
from common.files import utf8_name

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


MOST_VALUES = 3 * 2048**2  # of an image; the first pass of a network at a file's word is no larger


@dataclass(frozen=True)
class Preprocess:
    """How images are prepared for an encoder that is judged."""

    size: int  # pixels, height and width
    crop: float = 0.875  # central share of the shorter side that is resized to `size`
    interpolation: str = "bicubic"
    mean: tuple[float, ...] | None = None  # of each channel in [0, 1]; None: left as they are
    std: tuple[float, ...] | None = None

    @staticmethod
    def of(size: int, **other: Any) -> "Preprocess":
        """Up to 32 px, as CIFAR's, nothing is cropped (SimCLR's data.py:154-158); above it is."""
        return Preprocess(size, crop=1.0 if size <= 32 else 0.875, **other)


@dataclass
class Encoder:
    """A network from images to features, with its preprocessing and its metadata."""

    network: nn.Module
    input: Preprocess
    name: str  # "encoder", "random", "pixels" or the value of --weights
    metadata: dict[str, Any] = field(default_factory=dict)  # the metadata of the exported file
    layer: int = 0  # see `load_encoder`
    notes: list[str] = field(default_factory=list)  # lines on what was left out or assumed

    @property
    def suffix(self) -> str:
        """The end of a protocol's name where another layer than the representation is judged."""
        return {0: "", -1: "-output"}.get(self.layer, f"-head{self.layer}")


def export_metadata(
    name: str, network: nn.Module, preprocess: Preprocess, published: str, norm: str = "bn"
) -> dict[str, Any]:
    """The metadata by which `load_encoder` builds an exported encoder again.

    Args:
        name: of the network, as in common/encoders.py.

    Raises:
        UserError: the network cannot take images of the size at which it is to be judged.
    """
    channels = 3  # as in all images that `common/data.py` decodes
    if channels * preprocess.size**2 > MOST_VALUES:
        raise UserError(f"--eval-size {preprocess.size}: at most 2048 pixels")
    encoders.output_width(network, channels, preprocess.size, name)
    network_metadata = {"encoder": name, "channels": channels, "norm": norm}
    return network_metadata | {"input": asdict(preprocess), "published": published}


WEIGHTS = "random, pixels, random:NAME, torchvision:NAME[=FILE], timm:NAME, hf:owner/name, FILE"
WITHOUT_RUN = ("random:", "torchvision:", "timm:", "hf:")


def load_encoder(path: str | Path, weights: str = "", layer: int = 0) -> Encoder:
    """The encoder of a run or a file, in evaluation mode, or `weights` instead of it.

    The network is built as the file says, and every tensor of it is checked: none may be missing,
    left over, or of another shape.

    Args:
        path: of a run's folder, an exported encoder, or a checkpoint of the papers' authors.
        weights: see the module.
        layer: 0 is the representation h; k the head's k-th hidden layer after its ReLU; -1 the
            head's output.

    Raises:
        UserError: there is no such run or file, it holds no encoder, or its head has no such layer.
    """
    if weights.startswith(WITHOUT_RUN):
        if layer:
            raise UserError(f"--layer {layer}: --weights {weights} has no head")
        return by_name(weights)
    if weights and weights not in ("random", "pixels"):
        if not is_file(Path(weights).expanduser()):
            raise UserError(f"--weights {weights}: no such file, and not one of {WEIGHTS}")
        return replace(load_encoder(Path(weights).expanduser(), layer=layer), name=weights)
    if layer and weights:
        raise UserError(f"--layer {layer}: --weights {weights} has no head")
    if not path:
        raise UserError(f"say which RUN to judge, or --weights: {WEIGHTS}")
    encoder = read_encoder(Path(path), layer)
    if weights == "pixels":
        encoder.network = Pixels().eval()
    if weights == "random":
        encoder.network = build_seeded(encoder.metadata, encoder.input)
    return replace(encoder, name=weights or "encoder")


def is_file(path: Path) -> bool:
    """Whether there may be an encoder at a path."""
    from eval.weights import tensorflow

    return path.exists() or tensorflow.find(path) is not None


def read_encoder(path: Path, layer: int = 0) -> Encoder:
    """The encoder of a run's folder or a file; see `load_encoder`."""
    from eval.weights.official import format_of, read_official

    path = exported if (exported := path / "encoder.safetensors").is_file() else path
    if path.suffix != ".safetensors" and format_of(path):
        official = read_official(path)
        head = {f"head.{key}": value for key, value in official.head_tensors.items()}
        tensors = official.tensors | head
        return replace(assembled(official.metadata, tensors, layer, path), notes=official.lines())
    path = exported if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{path}: no such file; a run writes it at its first checkpoint")
    try:
        with safe_open(utf8_name(path), framework="pt") as file:
            metadata = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except Exception as error:
        if path.suffix != ".safetensors":
            read_official(path)  # says what it is not
        raise UserError(f"{path}: not an exported encoder ({first_line(error)})") from error
    return assembled(metadata, tensors, layer, path)


def assembled(
    metadata: dict[str, Any], tensors: dict[str, Tensor], layer: int, path: Path
) -> Encoder:
    """The network that the metadata describes, with the tensors, which must all belong to it."""
    try:
        preprocess = Preprocess(**metadata["input"])
        if "encoder" not in metadata:  # files of before a network's name included its stem
            metadata["encoder"] = encoders.full_name(metadata["arch"], metadata["stem"])
        check_metadata(metadata, preprocess)
        prefix = metadata.get("head_prefix", "head.")  # another where the encoder has a `head`
        body = {
            key: value.float() if value.is_floating_point() else value
            for key, value in tensors.items()
            if not key.startswith(prefix)
        }
        # On no device, a network takes no memory, whatever a small file asks for; it gets the
        # file's tensors themselves. Those of timm may have buffers that no file holds.
        empty = not metadata["encoder"].startswith("timm:")
        with torch.device("meta") if empty else nullcontext():
            network = build(metadata, preprocess)
        for key, value in network.state_dict().items():
            if key in body and body[key].is_floating_point() != value.is_floating_point():
                raise UserError(f"{key} is of {body[key].dtype}")
        network.load_state_dict(body, assign=empty)  # strict: each tensor must have its place
        if layer:
            head = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            network = Cut(network, build_head(metadata["head"], head), layer)
        for key, value in tensors.items():
            if not value.isfinite().all():
                raise UserError(f"{key} has values that are not finite")
            if key.endswith("running_var") and (value < 0).any():
                raise UserError(f"{key} has negative values, which no variance has")
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:
        raise UserError(f"{path}: not an exported encoder ({first_line(error)})") from error
    return Encoder(network.eval(), preprocess, "encoder", metadata, layer)


def check_metadata(metadata: dict[str, Any], preprocess: Preprocess) -> None:
    """Refuse what no method writes: anyone may have written the file, which says what is built.

    Raises:
        ValueError: a value is not known, or a size is out of range.
    """
    if metadata.get("norm", "bn") not in ("bn", "gn+ws"):
        raise ValueError(f"norm {metadata['norm']!r:.80}, neither bn nor gn+ws")
    channels = metadata.get("channels", 3)
    if type(channels) is not int or not 1 <= channels <= 1_000:
        raise ValueError(f"channels {channels!r:.80}, not a number from 1 to 1,000")
    texts = ("encoder", "method", "recipe", "published", "commit", "head_prefix", "linear_protocol")
    for key in texts:
        if not isinstance(metadata.get(key, ""), str):
            raise ValueError(f"{key} {metadata[key]!r:.80}, not a text")
    head = metadata.get("head", [])
    if not isinstance(head, list) or len(head) > 100 or not all(isinstance(x, str) for x in head):
        raise ValueError(f"head {head!r:.80}, not the classes of at most 100 layers")
    if (stored := metadata.get("value_range")) is not None and not is_range(stored):
        raise ValueError(f"value_range {stored!r:.80}, not two numbers, the lower first")
    if not isinstance(metadata.get("clip", True), bool):
        raise ValueError(f"clip {metadata['clip']!r:.80}, neither true nor false")
    if not isinstance(metadata.get("epochs", 0), int | float):
        raise ValueError(f"epochs {metadata['epochs']!r:.80}, not a number")
    if (
        type(preprocess.size) is not int
        or not 1 <= preprocess.size <= 10_000
        or channels * preprocess.size**2 > MOST_VALUES
        or not 0 < preprocess.crop <= 1
    ):
        raise ValueError(f"input of {preprocess.size!r:.80} pixels, crop {preprocess.crop!r:.80}")
    if preprocess.interpolation not in ("bilinear", "bicubic"):
        raise ValueError(f"interpolation {preprocess.interpolation!r:.80}")
    for values, lowest in ((preprocess.mean, -math.inf), (preprocess.std, 0)):
        if values is not None and not (
            len(values) == channels and all(lowest < x < math.inf for x in values)
        ):
            raise ValueError(f"mean {preprocess.mean!r:.80} and std {preprocess.std!r:.80}")


def is_range(values: Any) -> bool:
    """Whether these are two finite numbers, the lower first."""
    return (
        isinstance(values, list)
        and [type(value) in (int, float) and math.isfinite(value) for value in values]
        == [True, True]
        and values[0] < values[1]
    )


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
            raise UserError(f"the exported head has a layer of an unknown kind: {kind}")
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
    """What is named without a run: `random:`, `torchvision:`, `timm:` and `hf:`, see the module.

    Torchvision's and random networks have ImageNet's size and normalisation, the others their own.
    """
    kind, name = weights.split(":", 1)
    if kind in ("timm", "hf"):
        from eval.weights.hub import from_hub, timm_repository

        encoder = from_hub(timm_repository(name) if kind == "timm" else name)
        return replace(encoder, name=weights)
    from eval.weights.official import content_of_torch

    name, _, file = name.partition("=")
    if kind == "torchvision" and name not in encoders.RESNETS:
        raise UserError(f"--weights {weights}: no such torchvision ResNet")
    preprocess = Preprocess(224, interpolation="bilinear", mean=IMAGENET_MEAN, std=IMAGENET_STD)
    metadata = {"encoder": name}
    network = build_seeded(metadata, preprocess)
    if kind == "torchvision":
        try:
            if file:
                state = content_of_torch(Path(file))
            else:
                official = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
                state = official.get_state_dict(check_hash=True, weights_only=True)
        except Exception as error:
            what = "read" if file else "fetched"
            reason = f"cannot be {what} ({first_line(error)})"
            raise UserError(f"--weights {weights}: {reason}") from error
        try:
            network.load_state_dict({k: v for k, v in state.items() if not k.startswith("fc.")})
        except (AttributeError, RuntimeError) as error:
            raise UserError(f"--weights {weights}: not a state dict of {name}") from error
    return Encoder(network.eval(), preprocess, weights, metadata)


def build(metadata: dict[str, Any], preprocess: Preprocess) -> nn.Module:
    """The network that the metadata describes, with BatchNorm or with GN + WS."""
    network = encoders.build(metadata["encoder"], metadata.get("channels", 3), preprocess.size)
    if metadata.get("norm") == "gn+ws":
        encoders.group_norm_weight_standardised(network)
    return network


def build_seeded(metadata: dict[str, Any], preprocess: Preprocess) -> nn.Module:
    """The same at initial weights that are equal at every call, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build(metadata, preprocess).eval()


class Pixels(nn.Module):
    """The pixels themselves as features: (B, C, H, W) to (B, C H W)."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)
