"""An encoder in the layouts of torchvision, timm, transformers and detectron2.

`to_torchvision`, `to_timm`, `to_transformers` and `to_detectron2` write into a folder, load what
they wrote, and return it as a function from prepared images, (B, C, H, W), to features, (B, F).
`refuse` says first whether a layout can hold the encoder at all. Only the representation is
written, never a head. The way back is eval/weights/hub.py.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import dumps  # writes; nothing here reads a pickle
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from common import encoders
from common.cli import require
from common.errors import UserError
from common.files import atomic_write, atomic_write_bytes, utf8_name
from eval import encoder as judged
from eval.encoder import Encoder, Preprocess

Features = Callable[[Tensor], Tensor]
LAYOUTS = ("torchvision", "timm", "transformers", "detectron2")
WEIGHTS, CONFIG, PROCESSOR = "model.safetensors", "config.json", "preprocessor_config.json"
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
        # timm before 1.0.31 takes every named first layer for one of 3 channels
        "first_conv": known.first_conv if known and channels == 3 else None,
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
    return timm.create_model(f"local-dir:{utf8_name(folder)}", pretrained=True).eval()


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
    model, found = load(utf8_name(folder), output_loading_info=True)
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
