"""MoCo's settings: one frozen dataclass and one recipe for each experiment that we reproduce.

Papers: v1 "Momentum Contrast for Unsupervised Visual Representation Learning", arXiv 1911.05722 v3;
v2 "Improved Baselines with Momentum Contrastive Learning", arXiv 2003.04297 v1.
CODE is facebookresearch/moco at f736491, README its README, notebook its
colab/moco_cifar10_demo.ipynb.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal


@dataclass(frozen=True)
class Config:
    """Pretrain MoCo v1 or v2 (arXiv 1911.05722, 2003.04297) on any images.

    `Config()` is v1's ImageNet setting, 200 epochs; a recipe has its own defaults.
    """

    data: str = "ILSVRC/imagenet-1k"  # images: demo, a folder, parquet files or a Hub id (Sec. 4)
    # Sec. 3.3: the query network; the key network is its copy
    arch: str = "resnet50"  # encoder: demo, resnet18, ..., resnet18-cifar, timm:NAME (Sec. 3.3)
    stem: Literal["imagenet", "cifar"] = "imagenet"
    """first layers of a ResNet; cifar: a 3x3 convolution of stride 1, no max-pooling (notebook)"""
    head: Literal["linear", "mlp"] = "linear"
    """head: v1's is linear (Sec. 3.3), v2's an MLP of two layers (arXiv 2003.04297 Sec. 3)"""
    dim: int = 128  # dimension of queries and keys (Sec. 3.3)
    # Sec. 3.3: the views
    views: Literal["v1", "v2", "notebook"] = "v1"  # whose distribution of views (Sec. 3.3)
    image_size: int = 224  # pixels, height and width of a view (Sec. 3.3)
    eval_size: int = field(default=0, metadata={"was": "test_size"})
    """pixels of an image when the encoder is judged; 0: those of a view (ours)"""
    crop_min_area: float = 0.2
    """smallest share of the image that a crop keeps (official code, main_moco.py)"""
    # Sec. 3.1 to 3.3: loss, queue, key network
    temperature: float = 0.07  # temperature tau of Eq. 1 (Sec. 3.3)
    queue_size: int = 65536  # K keys in the queue (Sec. 4.1; official code, moco_k)
    key_momentum: float = 0.999  # momentum m of the key network, Eq. 2 (Sec. 3.2)
    symmetric: bool = False  # both views as queries, and the two losses added (notebook)
    bn_splits: int = 8  # BatchNorm groups of the global batch: the 8 GPUs (Sec. 4; notebook)
    # Sec. 4, "Training": the optimiser
    batch_size: int = 256  # N images of a step over all processes (Sec. 4)
    epochs: float = 200  # epochs, of whole batches each (Sec. 4)
    base_lr: float = 0.03  # learning rate at a batch of 256, linear in the batch (Sec. 4; README)
    schedule: Literal["step", "cosine", "notebook"] = "step"
    """learning rate by epochs: tenfold steps in v1 (Sec. 4), a cosine in v2; see optim.py"""
    milestones: tuple[int, ...] = (120, 160)
    """epochs at which the schedule "step" falls tenfold (Sec. 4)"""
    weight_decay: float = 1e-4  # weight decay of all parameters (Sec. 4; official main_moco.py)
    momentum: float = 0.9  # momentum of SGD (Sec. 4)
    published: str = "moco-v1-r50-200"
    """row of eval/results/published.csv to hold the result against (Sec. 4.1)"""

    def __post_init__(self) -> None:
        check_ranges(
            self,
            dim=(1, 1_000_000),
            image_size=(12 if self.views == "v2" else 1, 10_000),  # v2's blur reflects 11 pixels
            eval_size=(0, 10_000),
            crop_min_area=(0, 1),
            temperature=(1e-6, math.inf),
            queue_size=(1, 100_000_000),
            key_momentum=(0, 1),
            bn_splits=(1, math.inf),
            batch_size=(1, math.inf),
            epochs=(1e-6, 1_000_000),
            base_lr=(0, math.inf),
            weight_decay=(0, math.inf),
            momentum=(0, 1),
        )

    def check_world_size(self, world_size: int) -> None:
        """Refuse BatchNorm groups that the processes cannot share, or that are unequal.

        Raises:
            ValueError: with what to change.
        """
        if self.batch_size % world_size:
            raise ValueError(
                f"--batch-size {self.batch_size}: not divisible by {world_size} processes"
            )
        if self.bn_splits % world_size:
            near = world_size * max(1, round(self.bn_splits / world_size))
            raise ValueError(
                f"--bn-splits {self.bn_splits}: cannot be shared by {world_size} processes; "
                f"try --bn-splits {near}"
            )
        if self.batch_size % self.bn_splits:
            raise ValueError(
                f"--batch-size {self.batch_size}: cannot be cut into {self.bn_splits} equal "
                "BatchNorm groups (--bn-splits)"
            )

    def advice(self) -> list[str]:
        """What is allowed and seldom meant."""
        lines = []
        if self.schedule == "step" and min(self.milestones, default=self.epochs) >= self.epochs:
            milestones = " ".join(map(str, self.milestones))
            lines.append(
                f"the learning rate stays as it is: --milestones {milestones} of --epochs "
                f"{self.epochs:g}"
            )
        if self.bn_splits == 1:  # Sec. 3.3, "Shuffling BN"
            lines.append(
                "--bn-splits 1: one BatchNorm group, in which shuffled keys hide nothing; try 8"
            )
        if self.bn_splits == self.batch_size:  # as the notebook allows
            lines.append(
                f"--bn-splits {self.bn_splits}: BatchNorm groups of one image, whose statistics "
                "are those of its own pixels"
            )
        return lines


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


# Sec. 4.1: 60.6 linear Top-1 after 200 epochs (README: 60.8 over five runs).
MOCO_V1 = Config()

# 2003.04297 Table 1: 67.5 linear Top-1 after 200 epochs.
MOCO_V2 = replace(
    MOCO_V1,
    head="mlp",  # 2003.04297 Sec. 3
    views="v2",  # 2003.04297 Sec. 3
    temperature=0.2,  # 2003.04297 Sec. 3
    schedule="cosine",  # 2003.04297 Sec. 3
    published="moco-v2-r50-200",
)

# 2003.04297 Table 2: 71.1 linear Top-1.
MOCO_V2_800 = replace(
    MOCO_V2,
    epochs=800,  # 2003.04297 Table 2
    published="moco-v2-r50-800",
)

# Notebook: 82.6 Top-1 by kNN on the 128-d output after 200 epochs (400: 86.3, 800: 88.7).
CIFAR10 = replace(
    MOCO_V1,
    data="uoft-cs/cifar10",
    arch="resnet18",  # notebook
    stem="cifar",  # notebook
    views="notebook",  # notebook
    image_size=32,  # notebook
    crop_min_area=0.08,  # notebook: torchvision's default
    temperature=0.1,  # notebook moco_t
    queue_size=4096,  # notebook moco_k
    key_momentum=0.99,  # notebook moco_m
    batch_size=512,  # notebook
    base_lr=0.03,  # notebook: lr 0.06 at batch 512
    schedule="notebook",  # notebook cos
    weight_decay=5e-4,  # notebook wd
    published="moco-cifar10-asym-200",
)

# Notebook: 85.3 Top-1 by kNN on the 128-d output after 200 epochs (400: 88.5, 800: 89.7; after 800
# the linear Top-1 is 90.7).
CIFAR10_SYMMETRIC = replace(
    CIFAR10,
    symmetric=True,  # notebook symmetric
    published="moco-cifar10-sym-200",
)

# Ours: the embedded images and a small network, in minutes on two cores. Chosen by some twenty runs
# of a third of this length, one seed each, on an earlier version of the images and judged on others
# than those of the test split.
DEMO = replace(
    CIFAR10_SYMMETRIC,
    data="demo",
    arch="demo",  # ours
    head="linear",  # Sec. 3.3; ours: in so short a run the MLP learns less
    dim=64,  # ours: half the features
    image_size=24,  # ours: crops of 32 px images, at half the cost of 32 px views
    eval_size=32,  # ours: patterns then appear about as large as in the crops
    crop_min_area=0.35,  # ours: smaller crops hold less than a period of the patterns
    temperature=0.1,  # notebook moco_t
    queue_size=2048,  # ours
    bn_splits=4,  # ours: groups of 16
    batch_size=64,  # ours
    epochs=30,  # ours: 153,600 pairs
    base_lr=0.03,  # Sec. 4; ours: half of it and twice learn less
    schedule="cosine",  # 2003.04297 Sec. 3
    weight_decay=1e-4,  # Sec. 4
    published="",  # ours: nothing was published on it
)

RECIPES: dict[str, tuple[Config, dict[str, Any]]] = {  # and what the run needs changed
    "demo": (DEMO, {"save_every": 5}),
    "cifar10": (CIFAR10, {}),
    "cifar10-symmetric": (CIFAR10_SYMMETRIC, {}),
    "imagenet-v1": (MOCO_V1, {}),
    "imagenet": (MOCO_V2, {}),
    "imagenet-800ep": (MOCO_V2_800, {}),
}

PUBLISHED = {  # Top-1 in percent beside each recipe that has one
    "cifar10": "82.6, kNN on the output (notebook)",
    "cifar10-symmetric": "85.3, kNN on the output (notebook)",
    "imagenet-v1": "60.6 (Sec. 4.1)",
    "imagenet": "67.5 (arXiv 2003.04297 Table 1)",
    "imagenet-800ep": "71.1 (arXiv 2003.04297 Table 2)",
}
