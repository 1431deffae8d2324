"""An encoder in the layouts of torchvision, timm, transformers and detectron2, and back from a Hub.

`to_torchvision`, `to_timm`, `to_transformers` and `to_detectron2` write into a folder, load what
they wrote, and return it as a function from prepared images, (B, C, H, W), to features, (B, F).
`refuse` says first whether a layout can hold the encoder at all. Only the representation is
written, never a head.

`from_hub` and `from_hub_folder` read a folder of timm, of a ResNet of transformers, or with our own
`encoder.safetensors`. No pickle and no code of the folder is read; sizes are checked before a
network is built.
"""

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import dumps  # writes; nothing here reads a pickle
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from common import encoders
from common.cli import is_first, is_hub_id, require
from common.errors import UserError, first_line
from common.files import atomic_write, atomic_write_bytes, utf8_name
from eval import encoder as judged
from eval.encoder import Encoder, Preprocess

Features = Callable[[Tensor], Tensor]
LAYOUTS = ("torchvision", "timm", "transformers", "detectron2")
WEIGHTS, CONFIG, PROCESSOR = "model.safetensors", "config.json", "preprocessor_config.json"
OURS = "encoder.safetensors"
PIL_FILTERS = {"bilinear": 2, "bicubic": 3}  # PIL.Image.Resampling, as `resample` counts them
NOT_IN = {"torchvision": {"resnet200"}, "detectron2": {"resnet200"}}  # architectures


# ---- what a layout can hold ----------------------------------------------------------------------


def refuse(encoder: Encoder, layout: str) -> None:
    """Refuse a layout that cannot hold an encoder.

    Raises:
        UserError: with the first reason.
    """
    name = encoder.metadata["encoder"]
    others = "timm, onnx or pt2" if name.startswith("timm:") and layout != "timm" else "onnx or pt2"
    if encoder.metadata.get("norm") == "gn+ws":
        others = "onnx or pt2"
    if reason := obstacle(encoder.metadata, layout):
        raise UserError(f"{name}: {reason} no counterpart in {layout}; --to {others} can hold it")


def obstacle(metadata: Mapping[str, Any], layout: str) -> str:
    """What in an encoder has no counterpart in a layout, with its verb; "" where all has one."""
    name, channels = metadata["encoder"], metadata.get("channels", 3)
    resnet = encoders.parse(name)
    if metadata.get("norm") == "gn+ws":
        return "GN + WS has"
    if name.startswith("timm:"):
        return "" if layout == "timm" else "a network of timm has"
    if resnet is None:
        return f"the {name} network has"
    if resnet.cifar:
        return "a CIFAR stem has"
    if resnet.sk:
        return "selective kernels have"
    if resnet.padding:
        return "SAME padding has"
    if resnet.width != 1 and layout in ("torchvision", "timm"):  # whose stems have 64 channels
        return f"a network that is {resnet.width} times as wide from its stem on has"
    if resnet.arch in NOT_IN.get(layout, ()):
        return "this depth has"
    if resnet.arch not in encoders.BLOCKS and layout == "transformers":
        return "bottlenecks with groups or of another width have"
    if channels != 3 and layout in ("torchvision", "detectron2"):
        return f"an input of {channels} channels has"
    return ""


# ---- out -----------------------------------------------------------------------------------------


def to_torchvision(encoder: Encoder, folder: Path) -> Features:
    """`ARCH.pth`: a state dict with torchvision's keys, without `fc`."""
    arch = arch_of(encoder)
    path = folder / f"{arch}.pth"
    with atomic_write(path) as aside:
        torch.save(state_of(encoder), aside)
    model = plain_resnet(arch)
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model.eval()


def to_timm(encoder: Encoder, folder: Path, license: str = "unknown") -> Features:
    """`config.json` and `model.safetensors` as timm has them, with nothing of timm's own weights.

    timm's configuration of a network describes the weights that timm has of it. What is kept of it
    is where its first layer and its classifier are and whether its input has a fixed size, so that
    a classifier and other channels can be put on.
    """
    require("timm")
    import timm

    given, channels = encoder.input, encoder.metadata.get("channels", 3)
    name = encoder.metadata["encoder"].removeprefix("timm:")
    known = timm.get_pretrained_cfg(name)
    mean, std = mean_and_std(given, channels)
    own: dict[str, Any] = {
        "custom_load": False,
        "input_size": [channels, given.size, given.size],
        "fixed_input_size": bool(known and known.fixed_input_size),
        "interpolation": given.interpolation,
        "crop_pct": given.crop,
        "crop_mode": "center",
        "mean": mean,
        "std": std,
        "num_classes": 0,
        "pool_size": None,
        "first_conv": known.first_conv if known else None,
        "classifier": known.classifier if known else None,
        "license": license,
    }
    config: dict[str, Any] = {
        "architecture": name.partition(".")[0],  # behind the point is the name of timm's weights
        "num_classes": 0,
        "num_features": encoder.network.num_features,
        "pretrained_cfg": own,
    }
    if own["fixed_input_size"]:
        config["model_args"] = {"img_size": given.size}
    write_folder(folder, state_of(encoder), {CONFIG: config})
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def to_transformers(encoder: Encoder, folder: Path) -> Features:
    """`ResNetModel`'s `config.json` and `model.safetensors`, and `preprocessor_config.json`.

    Our features are its `pooler_output`, flattened. The image processor resizes the shorter side
    and then crops; we crop and then resize, which is the same up to the rounding of sizes.
    """
    require("transformers")
    import transformers

    given, channels = encoder.input, encoder.metadata.get("channels", 3)
    layers = stages_of(encoder)
    basic = is_basic(encoder)
    config = {
        "architectures": ["ResNetModel"],
        "model_type": "resnet",
        "num_channels": channels,
        "embedding_size": encoder.network.conv1.out_channels,  # type: ignore[union-attr]
        "hidden_sizes": [len((x[-1].bn2 if basic else x[-1].bn3).weight) for x in layers],
        "depths": [len(stage) for stage in layers],
        "layer_type": "basic" if basic else "bottleneck",
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,  # as in torchvision, the 3x3 convolution strides
    }
    mean, std = mean_and_std(given, channels)
    processor = {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": channels == 3,
        "do_resize": True,
        "size": {"shortest_edge": round(given.size / given.crop)},
        "resample": PIL_FILTERS[given.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": given.size, "width": given.size},
        "crop_pct": given.crop,  # not read by this processor; exact, where the size is rounded
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": is_normalised(given),
        "image_mean": mean,
        "image_std": std,
    }
    state = {transformers_key(key): value for key, value in state_of(encoder).items()}
    write_folder(folder, state, {CONFIG: config, PROCESSOR: processor})
    transformers.utils.logging.disable_progress_bar()
    load: Any = transformers.ResNetModel.from_pretrained
    model, found = load(folder, output_loading_info=True)
    if problems := {kind: keys for kind, keys in found.items() if keys}:
        raise UserError(f"transformers does not take all of {folder}: {problems!s:.200}")
    model.eval()
    return lambda images: model(images).pooler_output.flatten(1)


def to_detectron2(encoder: Encoder, folder: Path, final: Path) -> Features:
    """`NAME.pkl` for detectron2 and, for networks of bottlenecks, the config of MoCo's detection.

    detectron2 has no need to be there; so the features are those of the network with the file's
    tensors under the names that they had before.
    """
    name = encoder.metadata["encoder"]
    model = {detectron2_key(k): v.numpy() for k, v in state_of(encoder).items()}
    content = {"model": model, "__author__": "ssl-reference", "matching_heuristics": True}
    atomic_write_bytes(folder / f"{name}.pkl", dumps(content, protocol=2))
    if not is_basic(encoder):
        text = detectron2_config(encoder, final.absolute() / f"{name}.pkl")
        atomic_write_bytes(folder / f"{name}.yaml", text.encode(errors="shown"))
    again = judged.build(encoder.metadata, encoder.input)
    keys = again.state_dict()
    again.load_state_dict({key: torch.from_numpy(model[detectron2_key(key)]) for key in keys})
    return again.eval()


def write_folder(folder: Path, state: dict[str, Tensor], texts: Mapping[str, Any]) -> None:
    with atomic_write(folder / WEIGHTS) as aside:
        save_file(state, aside, {"format": "pt"})  # transformers refuses a file without it
    for name, content in texts.items():
        atomic_write_bytes(folder / name, json.dumps(content, indent=2).encode() + b"\n")


def state_of(encoder: Encoder) -> dict[str, Tensor]:
    return {k: v.detach().cpu().contiguous() for k, v in encoder.network.state_dict().items()}


def stages_of(encoder: Encoder) -> list[Any]:
    return [getattr(encoder.network, f"layer{i}") for i in (1, 2, 3, 4)]


def arch_of(encoder: Encoder) -> str:
    """The name in torchvision of the ResNet, whatever its width."""
    resnet = encoders.parse(encoder.metadata["encoder"])
    assert resnet  # or it was refused
    return resnet.arch


def is_basic(encoder: Encoder) -> bool:
    return encoders.BLOCKS.get(arch_of(encoder), (Bottleneck,))[0] is BasicBlock


def plain_resnet(arch: str) -> nn.Module:
    """torchvision's own network, as its user makes it."""
    import torchvision

    model = getattr(torchvision.models, arch)()
    model.fc = nn.Identity()
    return model


def is_normalised(preprocess: Preprocess) -> bool:
    return preprocess.mean is not None and preprocess.std is not None


def mean_and_std(preprocess: Preprocess, channels: int) -> tuple[list[float], list[float]]:
    """Of each channel; 0 and 1 where values are left in [0, 1]."""
    if preprocess.mean is None or preprocess.std is None:
        return [0.0] * channels, [1.0] * channels
    return list(preprocess.mean), list(preprocess.std)


# ---- the names of tensors ------------------------------------------------------------------------


def transformers_key(key: str) -> str:
    """layer1.0.bn2.bias to encoder.stages.0.layers.0.layer.1.normalization.bias, and so on."""

    def in_block(found: re.Match[str]) -> str:
        stage, block, kind, number = found.groups()
        layer = f"encoder.stages.{int(stage) - 1}.layers.{block}"
        if kind == "downsample.":
            return f"{layer}.shortcut.{('convolution', 'normalization')[int(number)]}"
        what = {"conv": "convolution", "bn": "normalization"}[kind]
        return f"{layer}.layer.{int(number) - 1}.{what}"

    key = re.sub(r"^layer(\d)\.(\d+)\.(conv|bn|downsample\.)(\d)", in_block, key)
    key = re.sub(r"^conv1\b", "embedder.embedder.convolution", key)
    return re.sub(r"^bn1\b", "embedder.embedder.normalization", key)


def detectron2_key(key: str) -> str:
    """layer1.0.bn2.bias to res2.0.conv2.norm.bias, bn1.bias to stem.conv1.norm.bias, and so on.

    The names are those to which MoCo's detection/convert-pretrain-to-detectron2.py:14-31 maps.
    """
    key = re.sub(r"^layer(\d)", lambda found: f"res{int(found[1]) + 1}", key)
    key = key if key.startswith("res") else f"stem.{key}"
    key = re.sub(r"\bbn(\d)", r"conv\1.norm", key)
    return key.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")


# ---- detectron2's config -------------------------------------------------------------------------


def detectron2_config(encoder: Encoder, weights: Path) -> str:
    """MoCo's protocol on Pascal VOC: Faster R-CNN, C4, on VOC 2007 + 2012 trainval.

    The numbers are those of facebookresearch/moco, detection/configs; the network's are read off
    it, and the normalisation is the encoder's.
    """
    network: Any = encoder.network
    block = network.layer1[0]
    mean, std = (numbers(255 * x for x in values) for values in mean_and_std(encoder.input, 3))
    depth = re.search(r"\d+", arch_of(encoder))
    assert depth
    return f"""\
# MoCo's detection protocol on Pascal VOC: 24k iterations; report the mean of 5 runs.
# Sources: facebookresearch/moco, detection/configs/Base-RCNN-C4-BN.yaml [B],
# pascal_voc_R_50_C4_24k.yaml [V], pascal_voc_R_50_C4_24k_moco.yaml [M]; the encoder itself [E].
MODEL:
  META_ARCHITECTURE: GeneralizedRCNN  # [B]
  WEIGHTS: {json.dumps(str(weights))}
  MASK_ON: False  # [V]
  PIXEL_MEAN: {mean}  # [E], of values from 0 to 255
  PIXEL_STD: {std}  # [E]
  BACKBONE:
    FREEZE_AT: 0  # [B]: all layers are tuned
  RESNETS:
    DEPTH: {depth[0]}  # [E], as the four below
    STEM_OUT_CHANNELS: {network.conv1.out_channels}
    RES2_OUT_CHANNELS: {block.conv3.out_channels}
    NUM_GROUPS: {block.conv2.groups}
    WIDTH_PER_GROUP: {block.conv2.out_channels // block.conv2.groups}
    STRIDE_IN_1X1: False  # [M]: the 3x3 convolution strides
    NORM: SyncBN  # the paper, arXiv 1911.05722 Sec. 4.2; [B] has naiveSyncBN today
  RPN:
    PRE_NMS_TOPK_TEST: 6000  # [B]
    POST_NMS_TOPK_TEST: 1000  # [B]
  ROI_HEADS:
    NAME: Res5ROIHeadsExtraNorm  # [B]: BatchNorm after res5; it is in MoCo's detection/train_net.py
    NUM_CLASSES: 20  # [V]
INPUT:
  FORMAT: RGB  # [M]
  MIN_SIZE_TRAIN: (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)  # [V]
  MIN_SIZE_TEST: 800  # [V]
DATASETS:
  TRAIN: ("voc_2007_trainval", "voc_2012_trainval")  # [V]
  TEST: ("voc_2007_test",)  # [V]
SOLVER:
  IMS_PER_BATCH: 16  # [B]
  BASE_LR: 0.02  # [B]
  STEPS: (18000, 22000)  # [V]
  MAX_ITER: 24000  # [V]
  WARMUP_ITERS: 100  # [V]
TEST:
  PRECISE_BN:
    ENABLED: True  # [B]
"""


def numbers(values: Any) -> str:
    return "[" + ", ".join(f"{x:.6g}" for x in values) + "]"


# ---- in ------------------------------------------------------------------------------------------

Read = tuple[nn.Module, Preprocess, dict[str, Any]]
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


def from_hub(name: str) -> Read:
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


def from_hub_folder(folder: Path) -> Read:
    """A network in evaluation mode, its preprocessing and its metadata, from a folder of files.

    Raises:
        UserError: the folder is none that can be read, or its files contradict each other.
    """
    if (folder / OURS).is_file():
        ours = judged.load_encoder(folder)
        return ours.network, ours.input, ours.metadata
    try:
        metadata, preprocess, rename, others = described(folder)
        network = filled(folder / WEIGHTS, metadata, preprocess, rename, others)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UserError(f"{folder}: cannot be read ({first_line(error)})") from error
    return network.eval(), preprocess, metadata


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
        judged.check_metadata(*found[:2])
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
) -> nn.Module:
    """The network of the metadata with a file's tensors, whose names and shapes are checked first.

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
        expected = judged.build(metadata, preprocess).state_dict()
    with safe_open(utf8_name(path), framework="pt") as file:
        keys = {key.removeprefix("resnet."): key for key in file.keys()}  # noqa: SIM118
        tensors = {}
        for key, ours in expected.items():
            theirs = keys.pop(rename(key), "")
            if not theirs and key.endswith("num_batches_tracked"):
                continue  # it has no part in evaluation, and some files lack it
            if not theirs:
                raise UserError(f"{path.name}: of another network; {rename(key)} is missing")
            shape = tuple(file.get_slice(theirs).get_shape())
            if shape != tuple(ours.shape):
                raise UserError(f"{path.name}: {theirs} is {shape}, not {tuple(ours.shape)}")
            tensors[key] = file.get_tensor(theirs)
            if tensors[key].is_floating_point() != ours.is_floating_point():
                raise UserError(f"{path.name}: {theirs} is {tensors[key].dtype}")
            if not tensors[key].isfinite().all():
                raise UserError(f"{path.name}: {theirs} is not finite")
    left_out = [key for key in keys if key.startswith(tuple(f"{name}." for name in others))]
    if more := keys.keys() - set(left_out):
        raise UserError(f"{path.name}: of another network; {min(more)} is left over")
    network = judged.build(metadata, preprocess)
    network.load_state_dict(tensors)
    if left_out and is_first():
        print(f"{path}: {len(left_out)} tensors of the classifier left out", file=sys.stderr)
    return network
