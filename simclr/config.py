"""SimCLR's settings: one frozen dataclass and one recipe for each experiment that we reproduce.

Papers: v1 "A Simple Framework for Contrastive Learning of Visual Representations", arXiv 2002.05709
v3; v2 "Big Self-Supervised Models are Strong Semi-Supervised Learners", arXiv 2006.10029 v2.
CODE is google-research/simclr at 383d414, README its README, S0 its first commit be133b3 (v1).
"""

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Config:
    """Pretrain SimCLR (arXiv 2002.05709) on any images.

    The defaults are the paper's ImageNet setting, 100 epochs.
    """

    # the run
    data: str = "ILSVRC/imagenet-1k"  # images: demo, a folder, parquet files or a Hub id (App. B)
    split: str = "train"  # which split of the data to train on (ours)
    image_column: str | None = None  # where the images are, if a table has several (ours)
    label_column: str | None = None  # where the labels are, for the kNN monitor only (ours)
    out: str = "runs/simclr"  # the folder of this run; given again, it goes on (ours)
    seed: int = 1  # of initial weights, order and views (ours)
    # Sec. 2.1: the network f and the projection head g
    arch: Literal["demo", "resnet18", "resnet50"] = "resnet50"  # encoder f (Sec. 2.1)
    stem: Literal["imagenet", "cifar"] = "imagenet"  # cifar: 3x3 stride 1, no max-pool (App. B.9)
    head_layers: int = 2  # v1: 2 (Sec. 2.1); v2: 3 (arXiv 2006.10029 Sec. 2)
    head_dim: int = 128  # dimension of z (Sec. 2.1)
    # Sec. 2.1 and App. A: the views
    image_size: int = 224  # pixels, height and width of a view (App. A)
    test_size: int = 0  # pixels of an image when judged, 0: image_size (ours)
    crop_min_area: float = 0.08  # smallest share of the image that a crop keeps (App. A)
    jitter: float = 1.0  # s, the strength of the colour distortion (App. A)
    blur: float = 0.5  # probability of the Gaussian blur (App. A)
    # Sec. 2.1: the loss, Eq. 1
    temperature: float = 0.1  # tau (Table 5)
    # Sec. 2.2, 2.3 and App. B.1: the optimiser
    batch_size: int = 4096  # N images over all processes, 2N views (Sec. 2.3)
    epochs: float = 100  # (Sec. 2.3)
    base_lr: float = 0.3  # at batch 256 (Sec. 2.3)
    lr_scaling: Literal["linear", "sqrt"] = "linear"  # B/256 or sqrt(B) times base_lr (App. B.1)
    warmup_epochs: float = 10  # of linear warm-up, then cosine to 0 (Sec. 2.3)
    weight_decay: float = 1e-6  # PAPER/CODE: paper 1e-6 (Sec. 2.3), README 1e-4: v1 is the paper's
    momentum: float = 0.9  # (CODE run.py)
    cache_chunk: int = 0  # images at a time, 0: N; BatchNorm sees these alone (arXiv 2101.06983)
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
    published: str = "simclr-v1-r50-100"  # the row of eval/published.py to hold the result against


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
    base_lr=0.1,  # times sqrt(4096) = 6.4; from a secondary source, not verified
    lr_scaling="sqrt",  # likewise
    warmup_epochs=40,  # 5 % of the epochs; likewise
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
    out="runs/simclr-demo",
    arch="demo",  # ours
    head_layers=2,  # Sec. 2.1
    head_dim=64,  # ours: half the features
    image_size=24,  # ours: crops of 32 px images, at half the cost of 32 px views
    test_size=32,  # ours: patterns then appear about as large as in the crops
    crop_min_area=0.35,  # ours: smaller crops hold less than a period of the patterns
    jitter=1.0,  # App. A; at 0.5 tint tells instances apart
    temperature=0.1,  # Table 5
    batch_size=256,  # ours
    epochs=39,  # ours: 199,680 pairs
    base_lr=8.0,  # ours: few steps and a small network ask for more than 1.0
    warmup_epochs=4,  # ours: a tenth of the run
    weight_decay=1e-6,  # Sec. 2.3
    save_every=5,  # ours
    published="",  # ours: nothing was published on it
)

RECIPES = {
    "demo": DEMO,
    "cifar10": CIFAR10,
    "cifar10-r50": CIFAR10_R50,
    "imagenet-100ep": IMAGENET_100,
    "imagenet": IMAGENET_1000,
    "imagenet-v2": IMAGENET_V2,
}
