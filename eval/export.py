"""Take an encoder elsewhere: the format of another library, checked by that library.

    python -m eval.export RUN --to torchvision --out DIR      # a state dict with torchvision's keys
    python -m eval.export RUN --to timm --out DIR             # a folder for timm.create_model
    python -m eval.export RUN --to transformers --out DIR     # a folder for AutoModel
    python -m eval.export RUN --to onnx --out DIR             # a graph of any network
    python -m eval.export RUN --to pt2 --out DIR              # a graph for torch.export.load
    python -m eval.export RUN --to detectron2 --out DIR       # weights and MoCo's config
    python -m eval.export RUN --to timm --out DIR --push owner/name       # and up to the Hub

RUN is a run's folder, an encoder.safetensors, or a checkpoint of the papers' authors.

What is written is the representation, without the head. It is loaded back by its own library, and
its features must be ours to 1e-5 of the largest; until then nothing in DIR is replaced. What a
format cannot hold is refused, never approximated: docs/export.md has the list. Folders of timm and
of transformers get a README.md, the model card, with every result in RUN/results.
"""

import sys

from common import cli
from eval.settings import Export as Settings

if __name__ == "__main__":  # a mistake is reported before torch is imported
    arguments = cli.run(
        cli.parse_settings, Settings, sys.argv[1:], "python -m eval.export", __doc__
    )

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from common.augment import normalize
from common.errors import UserError
from common.files import atomic_write_bytes, naming
from eval.encoder import Encoder, load_encoder
from eval.results.record import plural
from eval.weights import card, targets

ASIDE = ".export-"  # the first letters of the folder that is written to
TOLERANCE = 1e-5  # of the largest feature
LOADING = {  # lines that load the files again
    "torchvision": """\
import torch, torchvision
model = torchvision.models.{arch}(); model.fc = torch.nn.Identity()
model.load_state_dict(torch.load({file!r}, weights_only=True)); model.eval()""",
    "timm": """\
import timm
model = timm.create_model({model!r}, pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))""",
    "transformers": """\
import transformers
model = transformers.AutoModel.from_pretrained({out!r}).eval()
processor = transformers.AutoImageProcessor.from_pretrained({out!r})
# features = model(**processor(image, return_tensors="pt")).pooler_output.flatten(1)""",
    "detectron2": """\
model = detectron2.modeling.build_model(cfg)  # with DEPTH and RES2_OUT_CHANNELS of the network
detectron2.checkpoint.DetectionCheckpointer(model).load({file!r})""",
    "detectron2-config": """\
git clone https://github.com/facebookresearch/moco && cd moco/detection
python train_net.py --num-gpus 8 --config-file {config!r}""",
    "onnx": """\
import onnxruntime
session = onnxruntime.InferenceSession({file!r})
(features,) = session.run(None, {{"images": images}})  # of NumPy""",
    "pt2": """\
import torch
model = torch.export.load({file!r}).module()
with torch.inference_mode():
    features = model(images)""",
}


def main(settings: Settings) -> None:
    s = settings
    encoder, out = load_encoder(s.run), Path(s.out)
    for line in encoder.notes:
        print(line)
    if s.to in targets.LAYOUTS:
        targets.refuse(encoder, s.to)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: a file; give a folder")
    with naming(out):
        out.mkdir(parents=True, exist_ok=True)
        for left in out.glob(f"{ASIDE}*"):  # by a kill
            shutil.rmtree(left)
        if s.to in card.SNIPPETS and (there := in_the_way(out, s.to)):
            raise UserError(f"--out {out}: holds {there}; give a folder of its own")
        holder = tempfile.TemporaryDirectory(prefix=ASIDE, dir=out)
    with holder as name:
        try:
            lines = write(encoder, settings, Path(name), out)
        except UserError as error:
            raise UserError(str(error).replace(name, str(out))) from error
        files = sorted(path.name for path in Path(name).iterdir())
        with naming(out):
            for file in files:
                os.replace(Path(name) / file, out / file)
    print(f"{out}: {', '.join(files)}")
    print(*lines, sep="\n")
    if head := encoder.metadata.get("head"):
        layers = plural(len(head), "layer")
        print(f"left out: the head, of {layers}, which is no part of the representation")
    print(f"to load it:\n{loading(encoder, s.to, out, files)}")
    if s.push:
        print(card.push(out, s.push, files))


def in_the_way(folder: Path, layout: str) -> str:
    """What in a folder is not of an earlier export in the same layout; "" where nothing is."""
    if not any(folder.iterdir()):
        return ""
    known = {"timm": '"architecture"', "transformers": '"model_type"'}
    config = folder / targets.CONFIG
    text = config.read_text(errors="replace") if config.is_file() else ""
    if (folder / targets.WEIGHTS).exists() and known[layout] in text:
        return ""
    others = [name for name, key in known.items() if key in text]
    return f"an export for {others[0]}" if others else "other files"


def write(encoder: Encoder, settings: Settings, aside: Path, out: Path) -> list[str]:
    """Write into the folder `aside` and check it there; lines on what was found.

    Raises:
        UserError: the features of what was written are not ours.
    """
    layout = settings.to
    if layout in ("onnx", "pt2"):
        return write_graph(encoder, settings, aside)
    lines = []
    if layout == "torchvision":
        features = targets.to_torchvision(encoder, aside)
    elif layout == "timm":
        features = targets.to_timm(encoder, aside, settings.license)
    elif layout == "transformers":
        features = targets.to_transformers(encoder, aside)
    else:
        features = targets.to_detectron2(encoder, aside, out)
        if targets.is_basic(encoder):
            lines.append(
                "no config: MoCo's network is a C4, of which detectron2 makes the last stage of "
                "bottlenecks"
            )
    off = difference(encoder, features)
    if not off <= TOLERANCE:  # nor NaN
        raise UserError(
            f"--to {layout}: its features differ from ours by {off:.1e} of the largest, more than "
            f"{TOLERANCE:.0e}; {out} is as before"
        )
    reader = "with the names mapped back" if layout == "detectron2" else f"loaded by {layout}"
    lines.append(f"{reader}, its features differ from ours by {off:.1e} of the largest")
    if layout in card.SNIPPETS:
        text = card.card(encoder, Path(settings.run), layout, settings.license, settings.push)
        atomic_write_bytes(aside / "README.md", text.encode(errors="shown"))
    return lines


def write_graph(encoder: Encoder, settings: Settings, aside: Path) -> list[str]:
    """The same of a graph, which takes pixels from 0 to 1 and normalises them itself."""
    from eval.weights import graphs

    name = encoder.metadata["encoder"].replace(":", "-")
    path = aside / f"{name}.{settings.to}"
    found = (graphs.to_onnx if settings.to == "onnx" else graphs.to_pt2)(encoder, path)
    size, channels = encoder.input.size, encoder.metadata.get("channels", 3)
    sizes = "any size" if found.any_size else f"{size} x {size} pixels alone"
    runtime = "onnxruntime" if settings.to == "onnx" else "torch"
    lines = [
        f"run by {runtime}, its features differ from ours by {found.difference:.1e} of the largest",
        f"images: (B, {channels}, H, W), float32 from 0 to 1, not normalised, of {sizes}",
    ]
    if settings.time:
        times = graphs.milliseconds(encoder, path)
        lines.append(
            f"one image, median of 20 runs on {plural(times.threads, 'thread')}: "
            f"{times.file:.2f} ms, our network {times.network:.2f} ms"
        )
    return lines


@torch.inference_mode()
def difference(encoder: Encoder, features: Callable[[Tensor], Tensor]) -> float:
    """max |theirs - ours| / max |ours| over two random images of the encoder's size."""
    channels, size = encoder.metadata.get("channels", 3), encoder.input.size
    images = torch.rand(2, channels, size, size, generator=torch.Generator().manual_seed(1))
    images = normalize(images, *targets.mean_and_std(encoder.input, channels))
    ours, theirs = encoder.network(images), features(images)
    if ours.shape != theirs.shape:
        return torch.inf
    return ((theirs - ours).abs().max() / ours.abs().max().clamp_min(1e-30)).item()


def loading(encoder: Encoder, layout: str, out: Path, files: list[str]) -> str:
    """Code that loads the files."""
    named = {Path(file).suffix: str(out.absolute() / file) for file in files}
    arch = targets.arch_of(encoder) if layout == "torchvision" else ""
    if layout == "detectron2" and ".yaml" in named:
        layout = "detectron2-config"
    suffix = {"torchvision": ".pth", "detectron2": ".pkl", "onnx": ".onnx", "pt2": ".pt2"}
    return LOADING[layout].format(
        arch=arch,
        file=named.get(suffix.get(layout, "")),
        config=named.get(".yaml"),
        out=str(out),
        model=f"local-dir:{out}",
    )


if __name__ == "__main__":
    cli.run(main, arguments)
