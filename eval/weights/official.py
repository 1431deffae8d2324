"""Checkpoints of the papers' authors as encoders: whose a file is, is found from its content.

| file | what is judged | what is left out |
|---|---|---|
| MoCo v1, v2, v3: `.pth.tar` | `encoder_q`, `base_encoder` | keys' network, queue, predictor |
| SimCLR v1, v2: TensorFlow checkpoint, SavedModel | the network | slots, `ema_model`, classifier |
| BYOL: `.pkl` | the online network | target network, predictor, classifier, optimiser |
| a state dict of a torchvision ResNet | the network | `fc` |

A projection head comes along. Every tensor of the network must be there with its shape, and none
more; what is left out is counted. Nothing in a file is run.
"""

import functools
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.models.resnet import BasicBlock

from common import encoders
from common.encoders import BLOCKS, RESNETS, ResNet
from common.errors import UserError, first_line
from eval.encoder import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from eval.weights import pickles, tensorflow

# What a file of torch.save before version 1.6 begins with: the pickle of a number
OLD_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
ZIP = b"PK\x03\x04"  # one of a later version
GZIP, TAR = b"\x1f\x8b", (b"ustar", 257)  # where the second stands
COUNTER = ".num_batches_tracked"  # which has no part in the function
ARCHIVE = "an archive; unpack it, and give a file or a folder that was in it"
KINDS = "MoCo's .pth.tar, SimCLR's model.ckpt-* or SavedModel, BYOL's .pkl, or a state dict"


@dataclass
class Official:
    """A checkpoint, as an encoder."""

    kind: str  # in words
    method: str  # simclr, moco, byol; "" where the file does not tell
    network: str  # a name of common/encoders.py
    input: Preprocess
    tensors: dict[str, Tensor]  # the network's
    head: list[str] = field(default_factory=list)  # classes of the head's layers
    head_tensors: dict[str, Tensor] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)  # tensors, by what they belong to
    facts: dict[str, int] = field(default_factory=dict)  # of the training: epoch or step
    notes: list[str] = field(default_factory=list)  # what the file leaves open
    linear_protocol: str = ""  # of eval/linear.py, where it is not the method's

    @property
    def metadata(self) -> dict[str, Any]:
        """That of an exported encoder; see eval/encoder.py."""
        return {
            "encoder": self.network,
            "channels": channels_of(self.tensors),
            "norm": "bn",
            "input": asdict(self.input),
            "method": self.method,
            "published": "",
            "head": self.head,
            **({"linear_protocol": protocol} if (protocol := self.linear_protocol) else {}),
            "official": {"kind": self.kind, **self.facts},
        }

    def lines(self) -> list[str]:
        """What was found, and what was left out."""
        size = sum(tensor.numel() for tensor in self.tensors.values()) / 1e6
        facts = "".join(f", {name} {value:,}" for name, value in self.facts.items())
        head = f"a head of {', '.join(self.head)}" if self.head else "no head"
        lines = [f"{self.kind}{facts}: {self.network}, {size:.1f} million values, and {head}"]
        lines += self.notes
        if self.left_out:
            parts = [f"{name} ({count})" for name, count in sorted(self.left_out.items())]
            lines.append(f"left out, with the number of arrays: {', '.join(parts)}")
        return lines


def format_of(path: Path) -> str:
    """ "tensorflow", "torch" or "pickle", by the content; "" of anything else, and of no file."""
    if tensorflow.find(path):
        return "tensorflow"
    if not path.is_file():
        return ""
    try:
        with path.open("rb") as file:
            start = file.read(len(OLD_TORCH))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if start.startswith(ZIP) or start == OLD_TORCH:
        return "torch"
    return "pickle" if re.match(rb"\x80[\x02-\x05]", start) else ""


def read_official(path: Path) -> Official:
    """The encoder in a file, a folder, or a TensorFlow checkpoint named without its endings.

    Raises:
        UserError: it is none of the formats above, or holds no network that can be built here.
    """
    try:
        found = _read(path)
        if found.head:
            check_head(found)
        for key, tensor in (found.tensors | found.head_tensors).items():
            if not tensor.isfinite().all():
                raise UserError(f"{key} has values that are not finite")
    except UserError as error:
        text = str(error)
        raise UserError(text if text.startswith(str(path)) else f"{path}: {text}") from error
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = f"cannot be read as a checkpoint ({first_line(error)})"
        raise UserError(f"{path}: {reason}") from error
    return found


def _read(path: Path) -> Official:
    match format_of(path):
        case "tensorflow":
            return simclr(tensorflow.Checkpoint(tensorflow.find(path) or path))
        case "torch":
            return moco(content_of_torch(path), path.stat().st_size)
        case "pickle":
            return byol(pickles.read(path))
    if path.is_file() and is_archive(path):
        raise UserError(ARCHIVE)
    raise UserError(f"none of {KINDS}" if path.exists() else "no such file")


def is_archive(path: Path) -> bool:
    """Whether a file is a tar, as the name of MoCo's files says in vain, or of gzip."""
    with path.open("rb") as file:
        start = file.read(TAR[1] + len(TAR[0]))
    return start.startswith(GZIP) or start[TAR[1] :] == TAR[0]


def content_of_torch(path: Path) -> Any:
    """What torch.load reads from a file, without running any of it or taking more than its size.

    Raises:
        UserError: it is of other things than weights, or damaged.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                parts = archive.infolist()
            # torch neither compresses a part nor has two in one place, but would read both.
            if sum(part.file_size for part in parts) > path.stat().st_size:
                raise UserError("parts that claim to be larger than the file")
            if not any(part.filename.endswith("/data.pkl") for part in parts):
                raise UserError(ARCHIVE)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, UserError):
        raise
    except Exception as error:
        if refused := re.search(
            r"GLOBAL (\S+) was not an allowed|Unsupported class (\S+)", str(error)
        ):
            raise UserError(
                f"asks for {refused[1] or refused[2]}, which is more than weights; nothing was run"
            ) from error
        reason = first_line(error)
        raise UserError(f"not weights of torch, or damaged ones ({reason})") from error


# ---- every tensor in its place -------------------------------------------------------------------


def channels_of(tensors: Mapping[str, Tensor]) -> int:
    """Of the images: a ResNet's first convolution takes them."""
    stem = "conv1.weight" if "conv1.weight" in tensors else "conv1.0.weight"
    return tensors[stem].shape[1]


@functools.cache
def shapes_of(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a network's tensors, without counters; the network takes no memory."""
    if not 1 <= channels <= 1_000:
        raise UserError(f"its first convolution takes {channels:,} channels")
    with torch.device("meta"):
        network = encoders.build(name, channels)
    state = network.state_dict()
    return {key: tuple(value.shape) for key, value in state.items() if not key.endswith(COUNTER)}


def check_places(
    name: str, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse tensors of a network that are missing, too many, or of another shape."""
    for words, keys in (
        ("is missing", [key for key in expected if key not in found]),
        ("is left over", [key for key in found if key not in expected]),
    ):
        if keys:
            more = f", and {len(keys) - 1:,} more" if len(keys) > 1 else ""
            raise UserError(f"{name}: {keys[0]} {words}{more}")
    for key, shape in expected.items():
        if found[key] != shape:
            raise UserError(f"{key} has the shape {found[key]}, in {name} it is {shape}")


def check_head(found: Official) -> None:
    """Refuse a head whose layers do not follow from the network and from each other."""
    with torch.device("meta"):
        network: Any = encoders.build(found.network, channels_of(found.tensors))
    width: int = network.num_features
    given = {k: tuple(v.shape) for k, v in found.head_tensors.items() if not k.endswith(COUNTER)}
    expected: dict[str, tuple[int, ...]] = {}
    for place, kind in enumerate(found.head):
        if kind == "Linear":
            inputs, width = width, (*given.get(f"{place}.weight", ()), 0)[0]
            expected[f"{place}.weight"] = width, inputs
            if f"{place}.bias" in given:
                expected[f"{place}.bias"] = (width,)
        elif kind != "ReLU":
            expected |= {f"{place}.{part}": (width,) for part in BATCH_NORM.values()}
    check_places("its head", given, expected)


def with_counters(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same, with a counter of batches for each BatchNorm, which other formats do not keep."""
    norms = [key.removesuffix(".running_mean") for key in tensors if key.endswith(".running_mean")]
    return {f"{norm}{COUNTER}": torch.tensor(0) for norm in norms} | tensors


# ---- MoCo, and torchvision's names ---------------------------------------------------------------


def moco(content: Any, size: int) -> Official:
    """A checkpoint of facebookresearch/moco or moco-v3, or a plain state dict.

    It may hold the network of the queries alone, with or without the prefixes.

    Args:
        size: of the file, in bytes. A view may be of any shape, however few values are stored.
    """
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise UserError("holds no state dict")
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        if isinstance(value, Tensor):
            name = key.removeprefix("module.")  # of DistributedDataParallel
            if name in tensors:
                raise UserError(f"{name} and module.{name} would be the same tensor")
            tensors[name] = check_plain(key, value)
    if not tensors:
        raise UserError(
            f"holds no state dict: {', '.join(state)[:200] or 'nothing'}, and no tensor"
        )
    left = Counter({"no tensors": len(state) - len(tensors)})
    judged = next(
        (p for p in ("encoder_q.", "base_encoder.") if any(k.startswith(p) for k in tensors)), ""
    )
    left.update(key.split(".")[0] for key in tensors if not key.startswith(judged))
    # A tensor may be a view of few values, or have more than were stored.
    if sum(v.numel() * v.element_size() for k, v in tensors.items() if k.startswith(judged)) > size:
        raise UserError("its tensors claim to be larger than the file")
    body: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if key.startswith(judged):
            key = key.removeprefix(judged)
            if not value.is_floating_point() and not key.endswith(COUNTER):
                raise UserError(f"{key} is of {value.dtype}, not of floats")
            where = head if key.startswith("fc.") else body
            value = value.float() if value.is_floating_point() else value
            where[key.removeprefix("fc.")] = value.contiguous()
    kind = {
        "encoder_q.": "MoCo v1" if "weight" in head else "MoCo v2" if head else "MoCo v1 or v2",
        "base_encoder.": "MoCo v3",
        "": "a state dict with torchvision's names",
    }[judged]
    if not judged:  # a classifier, not the head of a method
        left["fc"] = len(head)
        head = {}
    name = recognise(body)
    if (channels := channels_of(body)) != 3:
        raise UserError(f"takes images of {channels} channels, whose mean and deviation it lacks")
    layers, head = _head_of(head)
    epoch = content.get("epoch")
    resnet = encoders.parse(name)
    pixels = 32 if resnet and resnet.cifar else 224
    guess = (
        f"how images are prepared is not in the file: assumed {pixels} pixels, bilinear, and "
        "ImageNet's mean and deviation"
    )
    return Official(
        kind,
        "moco" if judged else "",
        name,
        Preprocess.of(pixels, interpolation="bilinear", mean=IMAGENET_MEAN, std=IMAGENET_STD),
        with_counters(body),
        layers,
        head,
        +left,
        {"epoch": epoch} if type(epoch) is int and epoch > 0 else {},
        [] if judged else [guess],
        linear_protocol="moco-v3" if kind == "MoCo v3" else "",
    )


def check_plain(key: str, tensor: Tensor) -> Tensor:
    """The tensor, which must be one of values in memory, and of a network's of floats.

    Raises:
        UserError: it is sparse, quantised, without values, or of complex numbers.
    """
    kind = str(tensor.dtype).removeprefix("torch.")
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not plain or tensor.is_quantized or tensor.is_complex():
        raise UserError(f"{key} is not a plain tensor ({kind}, {tensor.layout}, {tensor.device})")
    return tensor


def recognise(tensors: Mapping[str, Tensor]) -> str:
    """The name of the ResNet that has these tensors.

    Raises:
        UserError: there is none.
    """
    found = {k: tuple(v.shape) for k, v in tensors.items() if not k.endswith(COUNTER)}
    stem = found.get("conv1.weight", ())
    if len(stem) != 4:
        first = ", ".join([*tensors][:2])
        raise UserError(f"holds no ResNet: there is no conv1.weight, but {first:.200}")
    names = [
        str(ResNet(arch, stem[0] // 64, cifar=stem[2] == 3))
        for arch in RESNETS
        if stem[0] == 64 or (arch in BLOCKS and stem[0] in (128, 192, 256))
    ]
    near = {name: shapes_of(name, stem[1]) for name in names}
    if not near:
        raise UserError(f"holds no ResNet that can be built here: conv1.weight is {stem}")
    name = min(near, key=lambda name: len(near[name].items() ^ found.items()))
    check_places(name, found, near[name])
    return name


def _head_of(tensors: dict[str, Tensor]) -> tuple[list[str], dict[str, Tensor]]:
    """Layers and tensors of one layer or of a `Sequential`, in which those without any are ReLUs.

    MoCo v3's last BatchNorm has neither gain nor shift: here they are 1 and 0.
    """
    if "weight" in tensors:
        tensors = {f"0.{key}": value for key, value in tensors.items()}
    numbers = {key.split(".")[0] for key in tensors}
    if not all(number.isdecimal() and int(number) < 20 for number in numbers):
        raise UserError(f"no head of MoCo's: fc.{', fc.'.join(sorted(numbers))[:80]}")
    layers: list[str] = []
    for number in sorted(map(int, numbers)):
        layers += ["ReLU"] * (number - len(layers))
        mean = tensors.get(f"{number}.running_mean")
        layers.append("Linear" if mean is None else "BatchNorm1d")
        if mean is not None:
            tensors.setdefault(f"{number}.weight", torch.ones_like(mean))
            tensors.setdefault(f"{number}.bias", torch.zeros_like(mean))
    return layers, with_counters(tensors)


# ---- SimCLR --------------------------------------------------------------------------------------

BODY = re.compile(r"(?:.*/)?(conv2d|(?:sync_)?batch_normalization)(?:_(\d+))?/(\w+)")
HEAD = re.compile(r"(?:.*/)?(?:head_contrastive|projection_head)/nl_(\d+)/(?:.*/)?(\w+)")
SLOT = re.compile(r".*/((?:\w*[mM]omentum|ExponentialMovingAverage)(?:_\d+)?)")
STEP = "global_step"  # of TensorFlow 1
BATCH_NORM = {
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}


def simclr(checkpoint: tensorflow.Checkpoint) -> Official:
    """A checkpoint of google-research/simclr, of TensorFlow 1 or 2, or a SavedModel's variables.

    Layers are numbered in the order in which the code makes them, a block's shortcut first. A
    kernel is (H, W, in, out) or (in, out) there.
    """
    kernels: dict[int, str] = {}
    norms: dict[int, dict[str, str]] = {}
    head: dict[int, dict[str, str]] = {}
    left: Counter[str] = Counter()
    for name in checkpoint.names:
        if name in checkpoint.slots:
            left["slots of the optimizer"] += 1
        elif name.startswith("ema_model/"):
            left["ema_model"] += 1
        elif slot := SLOT.fullmatch(name):
            left[slot[1]] += 1
        elif name == STEP:
            continue
        elif found := HEAD.fullmatch(name):
            _put(head.setdefault(int(found[1]), {}), found[2], name)
        elif found := BODY.fullmatch(name):
            number = int(found[2] or 0)
            if found[1] == "conv2d":
                _put(kernels, number, name)
            else:
                _put(norms.setdefault(number, {}), found[3], name)
        else:
            left[name.split("/")[0]] += 1
    shapes = [checkpoint.shape(kernels[number]) for number in sorted(kernels)]
    resnet = simclr_resnet(shapes)
    places = {}  # our names to theirs
    remaining = [norms[number] for number in sorted(norms)]
    for number, (conv, norm) in zip(sorted(kernels), creation_order(resnet), strict=True):
        places[f"{conv}.weight"] = kernels[number]
        if norm and remaining:
            for part, name in remaining.pop(0).items():
                places[f"{norm}.{BATCH_NORM.get(part, part)}"] = name
    for variables in remaining:  # more than the network has
        places |= {name: name for name in variables.values()}
    given = {ours: _torch_shape(checkpoint.shape(theirs)) for ours, theirs in places.items()}
    check_places(str(resnet), given, shapes_of(str(resnet), shapes[0][2]))
    tensors = {ours: _torch_tensor(checkpoint.read(theirs)) for ours, theirs in places.items()}
    layers, head_tensors = _simclr_head(checkpoint, head)
    known = STEP in checkpoint.names and checkpoint.shape(STEP) == ()
    known = known and checkpoint.dtype(STEP) in ("int32", "int64")
    return Official(
        {2: "SimCLR v1", 3: "SimCLR v2"}.get(len(head), "SimCLR"),
        "simclr",
        str(resnet),
        Preprocess.of(32 if resnet.cifar else 224),  # there is no mean and deviation
        with_counters(tensors),
        layers,
        head_tensors,
        left,
        {"step": int(checkpoint.read(STEP))} if known else {},
        checkpoint.notes,
    )


def _put(table: dict[Any, str], key: Any, name: str) -> None:
    if key in table:
        raise UserError(f"{table[key]} and {name} would be the same variable")
    table[key] = name


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(reversed(shape[-2:])) + tuple(shape[:-2])


def _torch_tensor(value: np.ndarray) -> Tensor:
    """In float32, a kernel with its outputs and then its inputs first."""
    if value.dtype.kind != "f":
        raise UserError(f"an array of {value.dtype}, where a network has floats")
    tensor = torch.from_numpy(value.astype(np.float32))
    if tensor.ndim == 4:
        tensor = tensor.permute(3, 2, 0, 1)
    return (tensor.T if tensor.ndim == 2 else tensor).contiguous()


def simclr_resnet(kernels: list[tuple[int, ...]]) -> ResNet:
    """The network that has these kernels, in the order in which they were made."""
    if len(kernels) < 3 or any(len(shape) != 4 for shape in kernels):
        raise UserError("holds no network of SimCLR's: no convolutions that are named conv2d")
    deep = kernels[0][0] == kernels[1][0] == 3  # in any other, a 1x1 shortcut is made second
    cifar = kernels[0][0] == 3 and not deep
    width = (kernels[2] if deep else kernels[0])[3] / 64
    for arch in BLOCKS if width in (1, 2, 3, 4) else ():
        for sk in (False, True):
            resnet = ResNet(arch, int(width), sk, "simclr", cifar)
            if encoders.parse(str(resnet)) and len([*creation_order(resnet)]) == len(kernels):
                return resnet
    raise UserError(
        f"{len(kernels):,} convolutions behind a stem of {64 * width:,.0f} channels: none of the "
        f"networks of SimCLR's that can be built here ({', '.join(BLOCKS)}; x2 to x4; -sk)"
    )


def creation_order(resnet: ResNet) -> Iterator[tuple[str, str]]:
    """Our names of convolutions and of the BatchNorms behind them, in the official order."""
    if resnet.sk and not resnet.cifar:
        yield from (("conv1.0", "conv1.1"), ("conv1.3", "conv1.4"), ("conv1.6", "bn1"))
    else:
        yield "conv1", "bn1"
    block, layers = BLOCKS[resnet.arch]
    for group, blocks in enumerate(layers, start=1):
        for place in range(blocks):
            at = f"layer{group}.{place}"
            if place == 0:
                first = 2 if resnet.sk else 0  # behind padding and pool
                yield f"{at}.downsample.{first}", f"{at}.downsample.{first + 1}"
            yield f"{at}.conv1", f"{at}.bn1"
            if resnet.sk:
                yield f"{at}.conv2.conv", f"{at}.conv2.bn"
                yield f"{at}.conv2.reduce", f"{at}.conv2.reduce_bn"
                yield f"{at}.conv2.select", ""
            else:
                yield f"{at}.conv2", f"{at}.bn2"
            if block is not BasicBlock:
                yield f"{at}.conv3", f"{at}.bn3"


def _simclr_head(
    checkpoint: tensorflow.Checkpoint, variables: Mapping[int, Mapping[str, str]]
) -> tuple[list[str], dict[str, Tensor]]:
    """The projection head: in each layer Linear without bias and BatchNorm, a ReLU between layers.

    The last BatchNorm has no shift: here it is 0.
    """
    layers: list[str] = []
    tensors: dict[str, Tensor] = {}
    for number in sorted(variables):
        layers += ["ReLU"] * bool(layers)
        at = len(layers)
        layers += ["Linear", "BatchNorm1d"]
        names = dict(variables[number])
        missing = {"kernel", *BATCH_NORM} - {"beta"} - names.keys()
        if missing or (more := names.keys() - {"kernel", *BATCH_NORM}):
            what = f"lacks {sorted(missing)[0]}" if missing else f"has a {sorted(more)[0]}"
            raise UserError(f"layer {number} of the head {what}")
        read = {part: _torch_tensor(checkpoint.read(name)) for part, name in names.items()}
        tensors[f"{at}.weight"] = read["kernel"]
        for theirs, ours in BATCH_NORM.items():
            tensors[f"{at + 1}.{ours}"] = read.get(theirs, torch.zeros_like(read["gamma"]))
    return layers, with_counters(tensors)


# ---- BYOL ----------------------------------------------------------------------------------------


BASIC_BLOCKS = (
    "assumed that blocks stride in their first convolution, as in Haiku since December 2020; before"
    ", they did in the second, and the file does not tell"
)


def byol(content: Mapping[str, Any]) -> Official:
    """A checkpoint of deepmind-research/byol; its online network, as the paper judges it.

    Images are normalised by ImageNet's mean and deviation, which the networks there do inside.
    """
    found: dict[str, np.ndarray] = {}
    left: Counter[str] = Counter()
    for part in ("online_params", "online_state"):
        for module, variables in content.get(part, {}).items():
            for key, value in variables.items():
                found[f"{module}/{key}"] = value
    numbers = {m[1] for key in found if (m := re.match(r"res_net(\d+)/~/", key))}
    if len(numbers) != 1 or f"resnet{min(numbers)}" not in BLOCKS:
        raise UserError("holds no online network of BYOL's: no variables of one res_net50/~/...")
    top = f"res_net{min(numbers)}/~/"
    first = found.get(f"{top}block_group_0/~/block_0/~/conv_0/w", np.zeros(0)).shape
    width = first[3] // 64 if len(first) == 4 else 0
    if width not in (1, 2, 3, 4):
        raise UserError(f"holds no network of BYOL's: the first block is of shape {first}")
    resnet = ResNet(f"resnet{min(numbers)}", width, padding="byol")
    tensors: dict[str, Tensor] = {}
    for conv, norm, our_conv, our_norm in haiku_names(resnet):
        tensors |= _taken(found, {f"{our_conv}.weight": f"{top}{conv}/w"})
        tensors |= _taken(found, _haiku_norm(f"{top}{norm}", our_norm))
    projector = {
        "0.weight": "projector/linear/w",
        "0.bias": "projector/linear/b",
        **_haiku_norm("projector/batch_norm", "1"),
        "3.weight": "projector/linear_1/w",
    }
    head = _taken(found, projector) if found.keys() >= set(projector.values()) else {}
    for key in found:
        if key.endswith(("_ema/hidden", "_ema/counter")):  # their average is what is used
            left["hidden and counter of moving averages"] += 1
        elif key.startswith(top):
            tensors[key] = _torch_tensor(found[key])  # which is refused
        else:
            left[key.split("/")[0]] += 1
    for name, tree in content.items():
        if name not in ("online_params", "online_state"):
            left[name] += sum(map(len, tree.values())) if isinstance(tree, Mapping) else 1
    given = {key: tuple(value.shape) for key, value in tensors.items()}
    check_places(str(resnet), given, shapes_of(str(resnet), 3))
    return Official(
        "BYOL",
        "byol",
        str(resnet),
        Preprocess.of(224, mean=IMAGENET_MEAN, std=IMAGENET_STD),
        with_counters(tensors),
        ["Linear", "BatchNorm1d", "ReLU", "Linear"] if head else [],
        with_counters(head),
        left,
        {"step": step} if type(step := content.get("step")) is int else {},
        [BASIC_BLOCKS] if BLOCKS[resnet.arch][0] is BasicBlock else [],
    )


def haiku_names(resnet: ResNet) -> Iterator[tuple[str, str, str, str]]:
    """Haiku's names of each convolution and its BatchNorm, and ours of both."""
    yield "initial_conv", "initial_batchnorm", "conv1", "bn1"
    block, layers = BLOCKS[resnet.arch]
    for group, blocks in enumerate(layers):
        for place in range(blocks):
            theirs, ours = f"block_group_{group}/~/block_{place}/~/", f"layer{group + 1}.{place}."
            if place == 0:
                names = "shortcut_conv", "shortcut_batchnorm", "downsample.0", "downsample.1"
                yield theirs + names[0], theirs + names[1], ours + names[2], ours + names[3]
            for i in range(2 if block is BasicBlock else 3):
                yield (
                    f"{theirs}conv_{i}",
                    f"{theirs}batchnorm_{i}",
                    f"{ours}conv{i + 1}",
                    f"{ours}bn{i + 1}",
                )


def _haiku_norm(theirs: str, ours: str) -> dict[str, str]:
    return {
        f"{ours}.weight": f"{theirs}/scale",
        f"{ours}.bias": f"{theirs}/offset",
        f"{ours}.running_mean": f"{theirs}/~/mean_ema/average",
        f"{ours}.running_var": f"{theirs}/~/var_ema/average",
    }


def _taken(found: dict[str, np.ndarray], places: Mapping[str, str]) -> dict[str, Tensor]:
    """Variables under our names, taken out of those that were found.

    Gains, shifts and averages are (1, ..., C) there.
    """
    taken = {}
    for ours, theirs in places.items():
        if theirs in found:
            value = found.pop(theirs)
            taken[ours] = _torch_tensor(value if theirs.endswith("/w") else value.reshape(-1))
    return taken
