"""SimCLR's settings: one frozen dataclass and one recipe for each experiment that we reproduce.

Papers: v1 "A Simple Framework for Contrastive Learning of Visual Representations", arXiv 2002.05709
v3; v2 "Big Self-Supervised Models are Strong Semi-Supervised Learners", arXiv 2006.10029 v2.
CODE is google-research/simclr at 383d414, README its README, S0 its first commit be133b3 (v1).
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal


@dataclass(frozen=True)
class Config:
    """Pretrain SimCLR (arXiv 2002.05709) on any images.

    `Config()` is the paper's ImageNet setting, 100 epochs; a recipe has its own defaults.
    """

    data: str = "ILSVRC/imagenet-1k"  # images: demo, a folder, parquet files or a Hub id (App. B)
    # Sec. 2.1: the network f and the projection head g
    arch: str = "resnet50"  # encoder f: demo, resnet18, ..., resnet18-cifar, timm:NAME (Sec. 2.1)
    stem: Literal["imagenet", "cifar"] = "imagenet"
    """first layers of a ResNet; cifar: a 3x3 convolution of stride 1, no max-pooling (App. B.9)"""
    head_layers: int = 2  # layers of the head; v1 has 2 (Sec. 2.1), v2 3 (arXiv 2006.10029 Sec. 2)
    head_dim: int = 128  # dimension of z (Sec. 2.1)
    # Sec. 2.1 and App. A: the views
    image_size: int = 224  # pixels, height and width of a view (App. A)
    eval_size: int = field(default=0, metadata={"was": "test_size"})
    """pixels of an image when the encoder is judged; 0: those of a view (ours)"""
    crop_min_area: float = 0.08  # smallest share of the image that a crop keeps (App. A)
    jitter: float = 1.0  # strength s of the colour distortion (App. A)
    blur: float = 0.5  # probability of the Gaussian blur (App. A)
    # Sec. 2.1: the loss, Eq. 1
    temperature: float = 0.1  # temperature tau of the loss (Table 5)
    # Sec. 2.2, 2.3 and App. B.1: the optimiser
    batch_size: int = 4096  # N images of a step over all processes, 2N views (Sec. 2.3)
    epochs: float = 100  # epochs, of which the last may be a part (Sec. 2.3)
    base_lr: float = 0.3  # learning rate at a batch of 256 (Sec. 2.3)
    lr_scaling: Literal["linear", "sqrt"] = "linear"
    """how the learning rate follows the batch: B/256 or sqrt(B) times base_lr (App. B.1)"""
    warmup_epochs: float = 10  # epochs of linear warm-up, before a cosine to 0 (Sec. 2.3)
    weight_decay: float = 1e-6
    """weight decay of the weights, not of gains and biases (Sec. 2.3)"""
    # PAPER/CODE: the paper's 1e-6; the official README has 1e-4 by now, which v2's recipes follow
    momentum: float = 0.9  # momentum of LARS (official code, run.py)
    # arXiv 2101.06983: gradient caching, for a batch that does not fit
    grad_cache_chunk: int = field(default=0, metadata={"was": "cache_chunk"})
    """images that go through the networks at a time, which is what BatchNorm sees; 0: the whole
    batch (gradient caching, arXiv 2101.06983)"""
    published: str = "simclr-v1-r50-100"
    """row of eval/results/published.csv to hold the result against (App. B)"""

    def __post_init__(self) -> None:
        check_ranges(
            self,
            head_layers=(1, 100),
            head_dim=(1, 1_000_000),
            image_size=(1, 10_000),
            eval_size=(0, 10_000),
            crop_min_area=(0, 1),
            jitter=(0, 2.5),  # a fifth of it is the turn of the hue, at most a half
            blur=(0, 1),
            temperature=(1e-6, math.inf),
            batch_size=(1, math.inf),
            epochs=(1e-6, 1_000_000),
            base_lr=(0, math.inf),
            warmup_epochs=(0, 1_000_000),
            weight_decay=(0, math.inf),
            momentum=(0, 1),
            grad_cache_chunk=(0, math.inf),
        )

    def check_world_size(self, world_size: int) -> None:
        """Refuse a batch that the processes cannot share, or chunks that do not make it up.

        Raises:
            ValueError: with what to change.
        """
        if self.batch_size % world_size:
            raise ValueError(
                f"--batch-size {self.batch_size}: not divisible by {world_size} processes"
            )
        chunk = self.grad_cache_chunk
        if chunk and (chunk % world_size or self.batch_size % chunk):
            raise ValueError(
                f"--grad-cache-chunk {chunk}: must divide --batch-size {self.batch_size} and be a "
                f"multiple of the {world_size} processes; 0 for the whole batch at once"
            )

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


# Table 1 and App. B.1: 64.5 linear Top-1 after 100 epochs.
IMAGENET_100 = Config()

# Table 6: 69.3 linear Top-1. The headline of the paper.
IMAGENET_1000 = replace(
    IMAGENET_100,
    epochs=1000,  # Sec. 6
    published="simclr-v1-r50-1000",
)

# SimCLR v2, README: 71.7 linear Top-1. The published run also had a memory of 64K negatives with a
# moving-average network (EMA 0.999) whose code was never released: this recipe is without it.
IMAGENET_V2 = replace(
    IMAGENET_100,
    head_layers=3,  # CODE run.py num_proj_layers
    epochs=800,  # the step in the checkpoint's name: 250228 = 1281167 * 800 // 4096 + 1
    base_lr=0.1,  # times sqrt(4096) = 6.4: from memory, not verified
    lr_scaling="sqrt",  # from memory, not verified
    warmup_epochs=40,  # 5 % of the epochs: from memory, not verified
    weight_decay=1e-4,  # README
    published="simclr-v2-r50-800",
)

# README, "Pretraining on CIFAR-10": around 91 linear Top-1 with a ResNet-18.
CIFAR10 = replace(
    IMAGENET_100,
    data="uoft-cs/cifar10",
    arch="resnet18",  # README
    stem="cifar",  # App. B.9; CODE run.py, image_size <= 32
    head_layers=3,  # CODE run.py num_proj_layers, which the README's command leaves as it is
    image_size=32,  # README
    jitter=0.5,  # App. B.9; README color_jitter_strength
    blur=0.0,  # App. B.9; README use_blur=False
    temperature=0.5,  # App. B.9; README
    batch_size=512,  # README
    epochs=1000,  # README
    base_lr=1.0,  # README: times 512/256
    weight_decay=1e-4,  # README; S0's has 1e-6, and the 91 stands beside both
    published="simclr-cifar10-r18-1000",
)

# App. B.9: 94.0 linear Top-1 with a ResNet-50 at batch 1024. The paper says neither which learning
# rate of {0.5, 1.0, 1.5} nor how many epochs gave it.
CIFAR10_R50 = replace(
    CIFAR10,
    arch="resnet50",  # App. B.9
    head_layers=2,  # Sec. 2.1
    batch_size=1024,  # App. B.9
    base_lr=1.0,  # App. B.9, the middle of the three
    weight_decay=1e-6,  # Sec. 2.3
    published="simclr-cifar10-r50",
)

# Ours: the embedded images and a small network, in minutes on two cores. Tuned on an earlier
# version of the images, judged on others than those of the test split.
DEMO = replace(
    CIFAR10,
    data="demo",
    arch="demo",  # ours
    head_layers=2,  # Sec. 2.1
    head_dim=64,  # ours: half the features
    image_size=24,  # ours: crops of 32 px images, at half the cost of 32 px views
    eval_size=32,  # ours: patterns then appear about as large as in the crops
    crop_min_area=0.35,  # ours: smaller crops hold less than a period of the patterns
    jitter=1.0,  # App. A; at 0.5 tint tells instances apart
    temperature=0.1,  # Table 5
    batch_size=256,  # ours
    epochs=39,  # ours: 199,680 pairs
    base_lr=8.0,  # ours: few steps and a small network ask for more than 1.0
    warmup_epochs=4,  # ours: a tenth of the run
    weight_decay=1e-6,  # Sec. 2.3
    published="",  # ours: nothing was published on it
)

RECIPES: dict[str, tuple[Config, dict[str, Any]]] = {  # and what the run needs changed
    "demo": (DEMO, {"save_every": 5}),
    "cifar10": (CIFAR10, {}),
    "cifar10-r50": (CIFAR10_R50, {}),
    "imagenet-100ep": (IMAGENET_100, {}),
    "imagenet": (IMAGENET_1000, {}),
    "imagenet-v2": (IMAGENET_V2, {}),
}

PUBLISHED = {  # Top-1 in percent, linear, beside each recipe that has one
    "cifar10": "about 91 (official README)",
    "cifar10-r50": "94.0 (App. B.9; epochs not stated)",
    "imagenet-100ep": "64.5 (Table 1)",
    "imagenet": "69.3 (Table 6)",
    "imagenet-v2": "71.7 (official README; with a memory that was never released)",
}
