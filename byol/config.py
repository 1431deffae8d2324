"""BYOL's settings: one frozen dataclass and one recipe for each experiment that we reproduce.

Papers: "Bootstrap Your Own Latent", arXiv 2006.07733 v3; GN + WS: "BYOL works even without batch
statistics", arXiv 2010.10241. CODE is deepmind-research/byol at f5de0ed, README its README.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal


@dataclass(frozen=True)
class Config:
    """Pretrain BYOL (arXiv 2006.07733) on any images.

    `Config()` is the official ImageNet setting, 100 epochs; a recipe has its own defaults.
    """

    data: str = "ILSVRC/imagenet-1k"  # images: demo, a folder, parquet files or a Hub id (Sec. 3.3)
    # Sec. 3.3: the encoder f, the projector g and the predictor q
    arch: str = "resnet50"  # encoder f: demo, resnet18, ..., resnet18-cifar, timm:NAME (Sec. 3.3)
    stem: Literal["imagenet", "cifar"] = "imagenet"
    """first layers of a ResNet; cifar: a 3x3 convolution of stride 1, no max-pooling (ours)"""
    hidden_dim: int = 4096  # width of the hidden layers of g and q (Sec. 3.3)
    dim: int = 256  # dimension of projections and predictions (Sec. 3.3)
    norm: Literal["bn", "gn+ws"] = "bn"
    """normalisation; gn+ws: GroupNorm and weight standardisation, so that no batch statistics are
    used anywhere (arXiv 2010.10241)"""
    # App. B: the views t ~ T and t' ~ T'
    image_size: int = 224  # pixels, height and width of a view (App. B)
    eval_size: int = field(default=0, metadata={"was": "test_size"})
    """pixels of an image when the encoder is judged; 0: those of a view (ours)"""
    crop_min_area: float = 0.08  # smallest share of the image that a crop keeps (App. B)
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    """strengths of brightness, contrast, saturation and hue (App. B, Table 6)"""
    blur: tuple[float, float] = (1.0, 0.1)
    """probability of the Gaussian blur in T and in T' (App. B, Table 6)"""
    solarize: tuple[float, float] = (0.0, 0.2)
    """probability of solarisation in T and in T' (App. B, Table 6)"""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """mean of each channel, which views are normalised by (App. B; official code)"""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """standard deviation of each channel (App. B; official code)"""
    # Sec. 3.3: the optimiser and the target
    optimizer: Literal["lars", "sgd"] = "lars"
    """lars (Sec. 3.3), or sgd: LARS without its layer-wise adaptation (ours)"""
    predictor_lr: float = 1.0  # q's learning rate in multiples of the others' (Sec. 5, App. I)
    batch_size: int = 4096  # N images of a step over all processes (Sec. 3.3)
    accumulate: int = 1
    """equal parts of the batch, one after the other; BatchNorm sees one part (Sec. 5)"""
    epochs: float = 100  # epochs, of which the last may be a part (official code, configs/byol.py)
    base_lr: float = 0.45
    """learning rate at a batch of 256, linear in the batch (official code, configs/byol.py)"""
    warmup_epochs: float = 10  # epochs of linear warm-up, before a cosine to 0 (Sec. 3.3)
    weight_decay: float = 1e-6
    """weight decay of the weights, not of gains and biases (official code, configs/byol.py)"""
    momentum: float = 0.9  # momentum of LARS (official code, configs/byol.py)
    tau_base: float = 0.99
    """decay of the target's moving average at first; it rises to 1 (official code,
    configs/byol.py)"""
    published: str = "byol-r50-100"
    """row of eval/results/published.csv to hold the result against (arXiv 2011.10566)"""

    def __post_init__(self) -> None:
        check_ranges(
            self,
            hidden_dim=(1, 1_000_000),
            dim=(1, 1_000_000),
            image_size=(1, 10_000),
            eval_size=(0, 10_000),
            crop_min_area=(0, 1),
            jitter=(0, math.inf),
            blur=(0, 1),
            solarize=(0, 1),
            std=(1e-6, math.inf),
            predictor_lr=(0, math.inf),
            batch_size=(1, math.inf),
            accumulate=(1, math.inf),
            epochs=(1e-6, 1_000_000),
            base_lr=(0, math.inf),
            warmup_epochs=(0, 1_000_000),
            weight_decay=(0, math.inf),
            momentum=(0, 1),
            tau_base=(0, 1),
        )
        if self.jitter[3] > 0.5:
            raise ValueError(f"--jitter ... {self.jitter[3]}: hue turns by at most 0.5 of a circle")
        if self.norm == "gn+ws" and self.hidden_dim % 16:
            raise ValueError(f"--hidden-dim {self.hidden_dim}: not divisible by 16 groups of gn+ws")
        if self.norm == "bn" and self.batch_size == self.accumulate:
            raise ValueError(
                f"--batch-size {self.batch_size}: BatchNorm needs two images or more in each of "
                f"the {self.accumulate} parts (--accumulate)"
            )

    def check_world_size(self, world_size: int) -> None:
        """Refuse a batch that the processes cannot share in equal parts.

        Raises:
            ValueError: with what to change.
        """
        if self.batch_size % world_size:
            raise ValueError(
                f"--batch-size {self.batch_size}: not divisible by {world_size} processes"
            )
        if self.batch_size % (self.accumulate * world_size):
            parts = f"{world_size} processes times --accumulate {self.accumulate}"
            raise ValueError(f"--batch-size {self.batch_size}: not divisible by {parts}")

    def advice(self) -> list[str]:
        """What is allowed and seldom meant."""
        if self.warmup_epochs < self.epochs:
            return []
        return [
            f"the learning rate only rises: --warmup-epochs {self.warmup_epochs:g} of --epochs "
            f"{self.epochs:g}; try --warmup-epochs {self.epochs / 10:g}"
        ]


def check_ranges(config: Any, **ranges: tuple[float, float]) -> None:
    """Check that each named field, or each number of it, is finite and from least to most.

    Twin: common/config.py.

    Raises:
        ValueError: one is not; the message names its flag.
    """
    for name, (least, most) in ranges.items():
        value = getattr(config, name)
        for number in value if isinstance(value, tuple) else (value,):
            if not (least <= number <= most and abs(number) != math.inf):
                bound = f"from {least:,}" + (f" to {most:,}" if most < math.inf else " upwards")
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} {number}: must be a number {bound}")


# No figure in the paper; a reproduction by others has 66.5 linear Top-1 (arXiv 2011.10566 Table 4).
IMAGENET_100 = Config()

# The shortest of the official presets; no figure.
IMAGENET_40 = replace(
    IMAGENET_100,
    epochs=40,  # CODE configs/byol.py
    tau_base=0.97,  # likewise
    published="",
)

# Tables 5 and 16: 72.5 linear Top-1. The setting of the paper's ablations.
IMAGENET_300 = replace(
    IMAGENET_100,
    epochs=300,  # Sec. 5
    base_lr=0.3,  # App. F; CODE configs/byol.py
    published="byol-r50-300",
)

# Table 1: 74.3 linear Top-1. The headline of the paper.
IMAGENET_1000 = replace(
    IMAGENET_100,
    epochs=1000,  # Sec. 3.3
    base_lr=0.2,  # Sec. 3.3
    weight_decay=1.5e-6,  # Sec. 3.3
    tau_base=0.996,  # Sec. 3.3
    published="byol-r50-1000",
)

# App. G: 73.7 linear Top-1 at an eighth of the batch, which fits 8 GPUs.
IMAGENET_B512 = replace(
    IMAGENET_1000,
    batch_size=512,  # App. G
    base_lr=0.4,  # App. G
    tau_base=0.9995,  # App. G
    published="byol-r50-1000-b512",
)

# arXiv 2010.10241, abstract: 73.9 linear Top-1, where BatchNorm has 74.3. Only the abstract was
# verified: 16 groups, and that nothing else changes (epochs, batch, rates), are from memory.
IMAGENET_GNWS = replace(
    IMAGENET_1000,
    norm="gn+ws",  # arXiv 2010.10241
    published="byol-gnws-r50-1000",
)

# README, "Imagenette": about 92.3 Top-1 of a classifier trained during pretraining.
IMAGENETTE = replace(
    IMAGENET_1000,
    data="imagenette2-160",  # the folder in fast.ai's archive of that name (ours)
    arch="resnet18",  # README
    image_size=128,  # README
    batch_size=256,  # README
    base_lr=2.0,  # README
    weight_decay=1e-6,  # README
    published="byol-imagenette-r18-1000",  # 1000 epochs as well; tau_base is that preset's
)

# Ours: there is no official BYOL on CIFAR-10. Optimiser as in Imagenette's recipe, the nearest
# official one; no blur, as in SimCLR's recipe for these images. Chosen by reasoning, for long runs.
# Ten epochs on a CPU are too short for it and end below a random encoder (RESULTS.md); README,
# "CIFAR-10 on two cores", has what was tried for those, and what helped.
CIFAR10 = replace(
    IMAGENETTE,
    data="uoft-cs/cifar10",
    stem="cifar",  # ours
    image_size=32,  # ours
    blur=(0.0, 0.0),  # ours
    mean=(0.4914, 0.4822, 0.4465),  # of CIFAR-10's training images (ours)
    std=(0.2470, 0.2435, 0.2616),  # likewise
    tau_base=0.99,  # ours: CODE's preset of 100 epochs, for shorter runs than the 1000 of 0.996
    published="",
)

# Ours: the embedded images and a small network, in minutes on two cores. Chosen by kNN on images
# that are neither trained on nor tested on: results/byol-demo-trials.md has all that was tried.
DEMO = replace(
    CIFAR10,
    data="demo",
    arch="demo",  # ours
    hidden_dim=512,  # ours
    dim=64,  # ours
    image_size=24,  # ours: crops of 32 px images, at half the cost of 32 px views
    eval_size=32,  # ours: patterns then appear about as large as in the crops
    crop_min_area=0.35,  # ours: smaller crops hold less than a period of the patterns
    jitter=(1.0, 1.0, 1.0, 0.5),  # ours: any hue, else tint tells instances apart
    solarize=(0.0, 0.0),  # ours
    mean=(0.5, 0.5, 0.5),  # ours
    std=(0.25, 0.25, 0.25),  # ours
    optimizer="sgd",  # ours: steps shrink with gradients, as those of LARS do not
    predictor_lr=40.0,  # ours, after Sec. 5 and App. I: the predictor keeps up with the encoder
    batch_size=64,  # ours
    epochs=30,  # ours: 153,600 pairs
    base_lr=0.2,  # ours: half of it and twice learn less
    warmup_epochs=3,  # ours: a tenth of the run
    weight_decay=5e-4,  # ours: tried with SGD only
    tau_base=0.9,  # ours: in so short a run the target must follow quickly
)

RECIPES: dict[str, tuple[Config, dict[str, Any]]] = {  # and what the run needs changed
    "demo": (DEMO, {"save_every": 5}),
    "cifar10": (CIFAR10, {}),
    "imagenette": (IMAGENETTE, {}),
    "imagenet-40ep": (IMAGENET_40, {}),
    "imagenet-100ep": (IMAGENET_100, {}),
    "imagenet-300ep": (IMAGENET_300, {}),
    "imagenet": (IMAGENET_1000, {}),
    "imagenet-b512": (IMAGENET_B512, {}),
    "imagenet-gnws": (IMAGENET_GNWS, {}),
}

PUBLISHED = {  # Top-1 in percent, linear, beside each recipe that has one
    "imagenette": "92.3, a classifier trained during pretraining (official README)",
    "imagenet-100ep": "none of its own; 66.5 by others (arXiv 2011.10566 Table 4)",
    "imagenet-300ep": "72.5 (Table 5)",
    "imagenet": "74.3 (Table 1)",
    "imagenet-b512": "73.7 (App. G)",
    "imagenet-gnws": "73.9 (arXiv 2010.10241, abstract)",
}
