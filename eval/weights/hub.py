"""Encoders of a Hub: a folder of timm, of a ResNet of transformers, or with `encoder.safetensors`.

`from_hub` fetches what `from_hub_folder` reads. No pickle and no code of a folder is read, and no
network is built before the file's tensors are seen to be those of it.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torchvision.models.resnet import BasicBlock, Bottleneck

from common import encoders
from common.cli import is_hub_id, require
from common.errors import UserError, first_line
from common.files import utf8_name
from eval.encoder import Encoder, Preprocess, assembled, build, check_metadata, load_encoder
from eval.weights.official import COUNTER, check_places, with_counters
from eval.weights.targets import CONFIG, PIL_FILTERS, PROCESSOR, WEIGHTS, transformers_key

OURS = "encoder.safetensors"
LARGEST_JSON = 2**20  # bytes


def timm_repository(name: str) -> str:
    """Where on the Hub timm's weights of a network are: timm/resnet50.a1_in1k of resnet50.

    Raises:
        UserError: there is no such network, or it has no weights there.
    """
    require("timm")
    import timm

    try:
        known = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    except RuntimeError:  # for a tag that it does not have
        known = None
    if known is None:
        raise UserError(f"timm:{name[:80]}: no such network, or not of that tag")
    if not known.hf_hub_id:
        raise UserError(f"timm:{name}: timm has no weights of it on the Hub")
    return known.hf_hub_id


def from_hub(name: str) -> Encoder:
    """The encoder of a model on the Hub, or of a local folder; see `from_hub_folder`.

    Only the files that can be read are fetched, into the cache of `huggingface_hub`.

    Raises:
        UserError: there is no such model or folder, it cannot be fetched, or it is refused.
    """
    if Path(name).is_dir():
        return from_hub_folder(Path(name))
    if not is_hub_id(name) or ":" in name:
        raise UserError(f"hf:{name}: no such folder, nor of the form owner/name")
    require("huggingface_hub")
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=[CONFIG, PROCESSOR, OURS]))
        if not (folder / OURS).is_file():
            described(folder)  # before any weights are fetched
            folder = Path(snapshot_download(name, allow_patterns=[CONFIG, PROCESSOR, WEIGHTS]))
    except UserError as error:
        raise UserError(f"hf:{name}: {error}") from error
    except Exception as error:
        raise UserError(f"hf:{name}: cannot be fetched ({first_line(error)})") from error
    try:
        return from_hub_folder(folder)
    except UserError as error:
        raise UserError(f"hf:{name}: {str(error).removeprefix(f'{folder}: ')}") from error


def from_hub_folder(folder: Path) -> Encoder:
    """The encoder in a folder of files, in evaluation mode.

    Raises:
        UserError: the folder is none that can be read, or its files contradict each other.
    """
    if (folder / OURS).is_file():
        return load_encoder(folder)
    try:
        return filled(folder / WEIGHTS, *described(folder))
    except UserError as error:
        text = str(error)
        raise UserError(text if text.startswith(str(folder)) else f"{folder}: {text}") from error
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UserError(f"{folder}: cannot be read ({first_line(error)})") from error


Described = tuple[dict[str, Any], Preprocess, Callable[[str], str], tuple[str, ...]]


def described(folder: Path) -> Described:
    """What the configs of a folder say: metadata, preprocessing, names of tensors, other layers.

    Raises:
        UserError: they are of something else, or damaged.
    """
    config = read_small(folder / CONFIG)
    try:
        if "architecture" in config:
            found = of_timm(config)
        elif config.get("model_type") == "resnet":
            found = of_transformers(config, folder / PROCESSOR)
        else:
            kind = config.get("model_type")
            raise UserError(
                f"{CONFIG} is of {kind!r:.80}; what can be read are folders of timm, of a ResNet "
                f"of transformers, or with an {OURS}"
            )
        check_metadata(*found[:2])
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{CONFIG} or {PROCESSOR}: {first_line(error)}") from error
    return found


def read_small(path: Path) -> dict[str, Any]:
    """A file of JSON that holds an object.

    Raises:
        UserError: there is none.
    """
    if not path.is_file():
        raise UserError(f"no {path.name}")
    with open(path, "rb") as file:
        text = file.read(LARGEST_JSON + 1)
    try:
        content = json.loads(text) if len(text) <= LARGEST_JSON else None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path.name} is no JSON ({first_line(error)})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path.name} holds no settings")
    return content


def of_timm(config: Mapping[str, Any]) -> Described:
    """`described` of timm's config.json; the other layers are the classifier's.

    Raises:
        UserError: an unknown network, or one that is changed by arguments that are not read.
    """
    require("timm")
    import timm

    name, known = config["architecture"], config.get("pretrained_cfg", config)
    if not (isinstance(name, str) and re.fullmatch(r"\w+", name) and timm.is_model(name)):
        raise UserError(f"timm has no network {name!r:.80}")
    channels, height, width = known.get("input_size", (3, 224, 224))
    if height != width:
        raise UserError(f"images of {height!r:.20} x {width!r:.20} pixels; only squares are read")
    sizes = (height, [height, width])
    allowed = {
        "img_size": sizes,
        "in_chans": (channels,),
        "num_classes": (config.get("num_classes"),),
    }
    for key, value in (config.get("model_args") or {}).items():
        if value not in allowed.get(key, ()):
            raise UserError(f"the network is changed by {key}={value!r:.80}, which is not read")
    if (mode := known.get("crop_mode", "center")) != "center":
        raise UserError(f"crop_mode {mode!r:.80}; only center is read")
    preprocess = Preprocess(
        height,
        known.get("crop_pct", 0.875),
        known.get("interpolation", "bicubic"),
        *normalisation(known["mean"], known["std"]),
    )
    own = timm.get_pretrained_cfg(name)
    classifier = own.classifier if own else None
    others = (classifier,) if isinstance(classifier, str) else tuple(classifier or ())
    plain = name if encoders.parse(name) else f"timm:{name}"  # the same keys and function
    return {"encoder": plain, "channels": channels}, preprocess, str, others


def of_transformers(config: Mapping[str, Any], processor: Path) -> Described:
    """`described` of the configs of a ResNet of transformers and of its image processor."""
    kind, depths = config.get("layer_type", "bottleneck"), config.get("depths", [3, 4, 6, 3])
    blocks = {"basic": BasicBlock, "bottleneck": Bottleneck}
    names = [
        name
        for name, (block, layers) in encoders.BLOCKS.items()
        if (blocks.get(kind), depths) == (block, layers)
    ]
    stem, widths = config.get("embedding_size", 64), config.get("hidden_sizes", [])
    factor = 1 if kind == "basic" else 4
    changed = {
        key: config[key]
        for key, ours in (
            ("hidden_act", "relu"),
            ("downsample_in_first_stage", False),
            ("downsample_in_bottleneck", False),
        )
        if config.get(key, ours) != ours
    }
    if not names or stem % 64 or widths != [stem * factor * 2**i for i in range(4)] or changed:
        told = changed or {"layer_type": kind, "depths": depths, "hidden_sizes": widths}
        raise UserError(f"no ResNet that is known here: {told!s:.200}")
    wider = "" if stem == 64 else f"x{stem // 64}"
    metadata = {"encoder": names[0] + wider, "channels": config.get("num_channels", 3)}
    return metadata, of_processor(read_small(processor)), transformers_key, ("classifier",)


def of_processor(known: Mapping[str, Any]) -> Preprocess:
    """The preprocessing that an image processor of transformers describes.

    Raises:
        UserError: it is none that crops the centre and resizes it.
    """
    kind = known.get("image_processor_type", known.get("feature_extractor_type", ""))
    size = known.get("size")
    short = size.get("shortest_edge") if isinstance(size, dict) else size
    if str(kind).startswith("ConvNext") and isinstance(short, int) and short < 384:
        side, crop = short, known.get("crop_pct", 224 / 256)  # from 384 on it crops nothing
    elif known.get("do_center_crop") and isinstance(short, int):
        box = known["crop_size"]
        side = box["height"] if isinstance(box, dict) else box
        crop = known.get("crop_pct", side / short)
        square = not isinstance(box, dict) or box["width"] == side
        if not square or round(side / crop) != short:
            raise UserError(f"{PROCESSOR} has crops of {box!r:.80} from {short}")
    else:
        raise UserError(f"{PROCESSOR} is of {kind!r:.80}, which does not crop the centre")
    names = {number: name for name, number in PIL_FILTERS.items()}
    if known.get("resample", 3) not in names or not known.get("do_resize", True):
        raise UserError(f"{PROCESSOR} resizes by neither bilinear nor bicubic interpolation")
    if (
        not known.get("do_rescale", True)
        or abs(known.get("rescale_factor", 1 / 255) * 255 - 1) > 0.01
    ):
        raise UserError(f"{PROCESSOR} does not bring values to [0, 1]")
    mean, std = (
        normalisation(known["image_mean"], known["image_std"])
        if known.get("do_normalize", True)
        else (None, None)
    )
    return Preprocess(side, crop, names[known.get("resample", 3)], mean, std)


def normalisation(
    mean: list[float], std: list[float]
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Mean and deviation; None where they change nothing."""
    if not any(mean) and all(x == 1 for x in std):
        return None, None
    return tuple(mean), tuple(std)


def filled(
    path: Path,
    metadata: dict[str, Any],
    preprocess: Preprocess,
    rename: Callable[[str], str],
    others: tuple[str, ...],
) -> Encoder:
    """The encoder of the metadata with a file's tensors, whose names and shapes are checked first.

    Args:
        rename: our name of a tensor to the file's, which may have `resnet.` before it.
        others: layers of the file that are left out, and counted.

    Raises:
        UserError: a tensor is missing, left over, of another shape, or has no finite values.
    """
    if not path.is_file():
        raise UserError(
            f"no {path.name}; other files of weights are not read, as a pickle runs code"
        )
    with torch.device("meta"):  # no memory is taken before the file is seen to hold it all
        expected = build(metadata, preprocess).state_dict()
    shapes = {rename(k): tuple(v.shape) for k, v in expected.items() if not k.endswith(COUNTER)}
    with safe_open(utf8_name(path), framework="pt") as file:
        names = {key.removeprefix("resnet."): key for key in file.keys()}  # noqa: SIM118
        left = [key for key in names if key.startswith(tuple(f"{name}." for name in others))]
        found = {
            key: tuple(file.get_slice(theirs).get_shape())
            for key, theirs in names.items()
            if key not in left and not key.endswith(COUNTER)
        }
        check_places(metadata["encoder"], found, shapes)
        tensors = {k: file.get_tensor(names[rename(k)]) for k in expected if rename(k) in names}
    about = metadata | {"input": asdict(preprocess)}
    notes = [f"{path}: {len(left)} tensors of the classifier left out"] if left else []
    return replace(assembled(about, with_counters(tensors), 0, path), notes=notes)
