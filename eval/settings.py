"""The settings of every evaluation, apart from what evaluates: nothing here imports torch.

A mistake in a command line is therefore reported at once, also where one process runs several
evaluations (`eval/__main__.py`). Ranges are checked in `__post_init__`.
"""

import math
import re
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from common.config import TINY, SourceConfig, check_ranges

Target = Annotated[str, tyro.conf.Positional]  # given without a flag


@dataclass(frozen=True)
class Judged(SourceConfig):
    """What every evaluation has; how images are read is the run's, where it is not said."""

    run: Target = ""  # a run's folder, an encoder.safetensors, or an official checkpoint
    weights: str = ""
    """judge these instead: random, pixels, random:NAME, torchvision:NAME[=FILE], timm:NAME,
    hf:owner/name (or hf:FOLDER), or a FILE"""
    data: str = ""  # images to judge on; default: those of the run
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"  # of the network; fp32 has TF32 on a GPU
    workers: int = 8  # decoding processes, where the images do not fit in memory
    check_content: bool = False  # tell images apart by all their bytes, not by names and sizes

    def check(self) -> None:
        """Check the ranges of what is the same for all."""
        super().check()
        check_ranges(self, workers=(0, 1_000))


@dataclass(frozen=True)
class Tested(Judged):
    """What those have that judge on a test split."""

    test_split: str = ""
    """split to judge on; none: training images are held out; default: test, else validation, else
    none"""


@dataclass(frozen=True)
class KNN(Tested):
    """Weighted kNN on frozen features, beside baselines if asked."""

    baselines: tuple[str, ...] = ()  # judge these as well: random, pixels
    layer: int = 0  # 0: representation h; k: the head's k-th hidden layer; -1: the head's output
    k: tuple[int, ...] = (20, 200)  # neighbours that vote; one result for each
    temperature: tuple[float, ...] = (0.1,)  # T of the votes' weights; one result for each

    def __post_init__(self) -> None:
        check_ranges(self, k=(1, math.inf), temperature=(TINY, math.inf), layer=(-1, math.inf))
        self.check()


@dataclass(frozen=True)
class Linear(Tested):
    """Train a linear classifier on a frozen encoder, beside baselines if asked."""

    baselines: tuple[str, ...] = ()  # judge these as well: random, pixels
    layer: int = 0  # 0: representation h; k: the head's k-th hidden layer; -1: the head's output
    protocol: Literal["", "simclr", "moco", "moco-v3", "byol", "features"] = ""
    """default: the method's"""
    epochs: int = 0  # default: the protocol's
    batch_size: int = 0  # default: the protocol's; the learning rate follows it
    seed: int = 1  # of order and crops

    def __post_init__(self) -> None:
        check_ranges(self, layer=(-1, math.inf), epochs=(0, 1_000_000), batch_size=(0, math.inf))
        check_ranges(self, seed=(0, 2**32 - 1))
        self.check()


@dataclass(frozen=True)
class Finetune(Tested):
    """Fine-tune an encoder with labels."""

    weights: str = ""
    """start from these instead: random (the supervised baseline), random:NAME,
    torchvision:NAME[=FILE], timm:NAME, hf:owner/name (or hf:FOLDER), or a FILE"""
    protocol: Literal["", "simclr", "simclr-v2", "byol"] = ""  # default: the method's
    layer: int | None = None  # 0: from the representation; k: from the head's k-th hidden layer
    label_fraction: float = 1.0  # of the training images, balanced over the classes
    subset: str = ""  # a file that names the images to train on, one a line, in place of a fraction
    freeze: int = 0  # first stages to leave as they are: 1 the stem, to 5 all of a ResNet
    epochs: int = 0  # default: the protocol's
    base_lr: float = 0.0  # default: the protocol's; scaled by the batch as there
    batch_size: int = 0  # default: the protocol's, of all images if they are fewer
    weight_decay: float = 0.0  # on all parameters, with SGD
    seed: int = 1  # of labels, order, crops and the classifier's initial weights

    def __post_init__(self) -> None:
        check_ranges(self, label_fraction=(TINY, 1), freeze=(0, 5), epochs=(0, 1_000_000))
        check_ranges(self, base_lr=(0, math.inf), batch_size=(0, math.inf), seed=(0, 2**32 - 1))
        check_ranges(self, weight_decay=(0, math.inf))
        self.check()


@dataclass(frozen=True)
class Transfer(Tested):
    """Logistic regression on frozen features of each source, beside baselines if asked."""

    baselines: tuple[str, ...] = ()  # judge these as well: random, pixels
    data: tuple[str, ...] = ("",)  # type: ignore[assignment]
    """sources to judge on; default: that of the run"""
    layer: int = 0  # 0: representation h; k: the head's k-th hidden layer; -1: the head's output
    metric: Literal["", "top1", "mean-per-class", "map11"] = ""
    """default: that of arXiv 2006.07733 App. D for the source's name; else top1, or map11 where
    images have several labels"""
    iterations: int = 200  # of L-BFGS, at most, for each value
    seed: int = 1  # of the images held out where the source has no validation split

    def __post_init__(self) -> None:
        check_ranges(self, layer=(-1, math.inf), iterations=(1, math.inf), seed=(0, 2**32 - 1))
        self.check()


@dataclass(frozen=True)
class Neighbours(Judged):
    """Draw images beside their nearest neighbours; labels are not needed."""

    baselines: tuple[str, ...] = ()  # draw these as well: random, pixels
    layer: int = 0  # 0: representation h; k: the head's k-th hidden layer; -1: the head's output
    rows: int = 10  # images, evenly spaced over the source
    k: int = 6  # neighbours of each
    out: str = ""  # the picture; default: neighbours.png in the run's folder

    def __post_init__(self) -> None:
        check_ranges(self, layer=(-1, math.inf), rows=(1, 100), k=(1, 50))
        self.check()


@dataclass(frozen=True)
class Import:
    """Write a checkpoint of the papers' authors as an encoder.safetensors."""

    run: Annotated[Target, tyro.conf.arg(metavar="FILE")] = ""
    """the checkpoint: a file, a folder, or one of the files of a TensorFlow checkpoint"""
    out: str = "encoder.safetensors"  # the file to write

    def __post_init__(self) -> None:
        if not self.run:
            raise ValueError("say which FILE to read; --help lists the kinds")
        if not self.out.endswith(".safetensors"):
            raise ValueError(f"--out {self.out}: give a file, such as DIR/encoder.safetensors")


@dataclass(frozen=True)
class Compare:
    """Set what was measured beside what was published."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional] = ()  # folders of runs
    out: str = ""  # folder for compare.md and compare.png; default: the first run's
    report: str = ""  # write a page on the runs, with curves and pictures, into this folder
    keep: str = ""  # copy the runs' results, with their cost, into this folder
    results: str = ""  # a folder of kept results: write RESULTS.md beside it, and nothing else


@dataclass(frozen=True)
class Export:
    """Write an encoder in the format of another library, and check that it reads it."""

    run: Target = ""  # a run's folder, an encoder.safetensors, or an official checkpoint
    to: Literal["", "torchvision", "timm", "transformers", "onnx", "pt2", "detectron2"] = ""
    """the format; docs/export.md says what each can hold"""
    out: str = ""  # folder to write into; an earlier export in the same format is replaced
    push: str = ""  # also upload to owner/name on the Hub; with --to timm or transformers
    license: str = "unknown"
    """of the weights, for the model card: an identifier of the Hub, such as mit or cc-by-4.0"""
    time: bool = False  # with onnx and pt2: print the median time of 20 runs on one image

    def __post_init__(self) -> None:
        if not self.run:
            raise ValueError("say which RUN to export: a run's folder or an encoder.safetensors")
        if not self.to:
            raise ValueError("--to which? torchvision, timm, transformers, onnx, pt2, detectron2")
        if not self.out.strip():
            raise ValueError("--out: say into which folder")
        if self.push and self.to not in ("timm", "transformers"):
            raise ValueError(f"--push: with --to timm or transformers, not {self.to}")
        if self.time and self.to not in ("onnx", "pt2"):
            raise ValueError(f"--time: with --to onnx or pt2, not {self.to}")
        if self.push and not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", self.push):
            raise ValueError(f"--push {self.push}: not of the form owner/name")
        if not re.fullmatch(r"[\w.+-]+", self.license):
            raise ValueError(f"--license {self.license}: no identifier of a licence")
