"""MoCo's settings: one frozen dataclass and one recipe for each experiment that we reproduce.

Papers: v1 "Momentum Contrast for Unsupervised Visual Representation Learning", arXiv 1911.05722 v3;
v2 "Improved Baselines with Momentum Contrastive Learning", arXiv 2003.04297 v1.
CODE is facebookresearch/moco at f736491, README its README, notebook its
colab/moco_cifar10_demo.ipynb.
"""

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Config:
    """Pretrain MoCo v1 or v2 (arXiv 1911.05722, 2003.04297) on any images.

    The defaults are v1's ImageNet setting, 200 epochs.
    """

    # the run
    data: str = "ILSVRC/imagenet-1k"  # images: demo, a folder, parquet files or a Hub id (Sec. 4)
    split: str = "train"  # which split of the data to train on (ours)
    image_column: str | None = None  # where the images are, if a table has several (ours)
    label_column: str | None = None  # where the labels are, for the kNN monitor only (ours)
    out: str = "runs/moco"  # the folder of this run; given again, it goes on (ours)
    seed: int = 1  # of initial weights, order, views and shuffles (ours)
    # Sec. 3.3: the query network; the key network is its copy
    arch: Literal["demo", "resnet18", "resnet50"] = "resnet50"  # encoder (Sec. 3.3)
    stem: Literal["imagenet", "cifar"] = "imagenet"  # cifar: 3x3 stride 1, no max-pool (notebook)
    head: Literal["linear", "mlp"] = "linear"  # v1: linear (Sec. 3.3); v2: mlp (2003.04297 Sec. 3)
    dim: int = 128  # D of queries and keys (Sec. 3.3)
    # Sec. 3.3: the views
    views: Literal["v1", "v2", "notebook"] = "v1"  # whose distribution (Sec. 3.3; see augment.py)
    image_size: int = 224  # pixels, height and width of a view (Sec. 3.3)
    test_size: int = 0  # pixels of an image when judged, 0: image_size (ours)
    crop_min_area: float = 0.2  # smallest share of the image that a crop keeps (CODE main_moco.py)
    # Sec. 3.1 to 3.3: loss, queue, key network
    temperature: float = 0.07  # tau of Eq. 1 (Sec. 3.3)
    queue_size: int = 65536  # K keys to contrast with (Sec. 4.1; CODE moco_k)
    key_momentum: float = 0.999  # m of Eq. 2 (Sec. 3.2)
    symmetric: bool = False  # both views as queries, the two losses added (notebook)
    bn_splits: int = 8  # BatchNorm groups of the global batch: 8 GPUs (Sec. 4), 8 in the notebook
    # Sec. 4, "Training": the optimiser
    batch_size: int = 256  # N images over all processes (Sec. 4)
    epochs: float = 200  # (Sec. 4)
    base_lr: float = 0.03  # at batch 256 (Sec. 4), linear in N (README, lr 0.015 at 128)
    schedule: Literal["step", "cosine", "notebook"] = "step"  # v1: step (Sec. 4); see optim.py
    milestones: tuple[int, ...] = (120, 160)  # epochs at which "step" falls tenfold (Sec. 4)
    weight_decay: float = 1e-4  # on all parameters (Sec. 4; CODE main_moco.py)
    momentum: float = 0.9  # of SGD (Sec. 4)
    # how to run it
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"  # of the two networks (ours)
    compile: bool = False  # torch.compile the encoders: a minute, for 3 % on a CPU (ours)
    estimate: bool = False  # say what the run would take; train and write nothing (ours)
    profile: bool = False  # write RUN/trace.json.gz, of three steps, for ui.perfetto.dev (ours)
    processes: int = 0  # refuse to start unless so many were launched; 0: any number (ours)
    workers: int = 8  # decoding processes, where the images do not fit in memory (ours)
    memory_gb: float = 4.0  # decode once and keep the pixels if they need less than this (ours)
    log_every: int = 20  # steps (ours)
    save_every: float = 1  # epochs between checkpoints (ours)
    knn_every: float = 10  # epochs between kNN measurements, 0: never (ours)
    published: str = "moco-v1-r50-200"  # the row of eval/published.py to hold the result against


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
    out="runs/moco-demo",
    arch="demo",  # ours
    head="linear",  # Sec. 3.3; ours: in so short a run the MLP learns less
    dim=64,  # ours: half the features
    image_size=24,  # ours: crops of 32 px images, at half the cost of 32 px views
    test_size=32,  # ours: patterns then appear about as large as in the crops
    crop_min_area=0.35,  # ours: smaller crops hold less than a period of the patterns
    temperature=0.1,  # notebook moco_t
    queue_size=2048,  # ours
    bn_splits=4,  # ours: groups of 16
    batch_size=64,  # ours
    epochs=30,  # ours: 153,600 pairs
    base_lr=0.03,  # Sec. 4; ours: half of it and twice learn less
    schedule="cosine",  # 2003.04297 Sec. 3
    weight_decay=1e-4,  # Sec. 4
    save_every=5,  # ours
    published="",  # ours: nothing was published on it
)

RECIPES = {
    "demo": DEMO,
    "cifar10": CIFAR10,
    "cifar10-symmetric": CIFAR10_SYMMETRIC,
    "imagenet-v1": MOCO_V1,
    "imagenet": MOCO_V2,
    "imagenet-800ep": MOCO_V2_800,
}
