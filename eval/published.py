"""Published figures, each with its source: the only place in the repository that holds one.

A recipe names its row by key (`Config.published`); `eval/compare.py` sets a measurement beside it.
Top-1 and Top-5 in percent. All figures were read in the source that is named.

P-Sim = arXiv 2002.05709 v3; P-SimSiam = arXiv 2011.10566; P-MoCo = arXiv 1911.05722; P-MoCo2 =
arXiv 2003.04297; P-BYOL = arXiv 2006.07733; README-S = google-research/simclr at 383d414; README-M
= facebookresearch/moco at f736491, notebook = its colab/moco_cifar10_demo.ipynb; README-B =
deepmind-research/byol at f5de0ed.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One published result and the setting it holds for."""

    method: str
    network: str
    epochs: int | None  # None: not stated
    batch_size: int
    data: str  # imagenet, imagenette or cifar10
    protocol: str  # as eval/ names it
    top1: float
    top5: float | None
    source: str
    note: str = ""


R50, R18 = "ResNet-50", "ResNet-18"

PUBLISHED = {
    "simclr-v1-r50-100": Row(
        "SimCLR v1", R50, 100, 4096, "imagenet", "linear-simclr", 64.5, None,
        "P-Sim Table 1", "App. B.1 has 64.6 with linear and 64.5 with square-root scaling",
    ),
    "simclr-v1-r50-1000": Row(
        "SimCLR v1", R50, 1000, 4096, "imagenet", "linear-simclr", 69.3, 89.0,
        "P-Sim Table 6", "the released checkpoint has 69.1 (README-S)",
    ),
    "simclr-v2-r50-800": Row(
        "SimCLR v2", R50, 800, 4096, "imagenet", "linear-simclr", 71.7, None,
        "README-S", "trained with a memory that was never released",
    ),
    "simclr-cifar10-r18-1000": Row(
        "SimCLR", R18, 1000, 512, "cifar10", "linear-simclr", 91.0, None,
        "README-S", 'said as "around 91"',
    ),
    "simclr-cifar10-r50": Row(
        "SimCLR v1", R50, None, 1024, "cifar10", "linear-simclr", 94.0, None,
        "P-Sim App. B.9", "best of a grid; its learning rate and epochs are not stated",
    ),
    "moco-v1-r50-200": Row(
        "MoCo v1", R50, 200, 256, "imagenet", "linear-moco", 60.6, None,
        "P-MoCo Sec. 4.1", "60.8 ± 0.2 over five runs (README-M)",
    ),
    "moco-v2-r50-200": Row(
        "MoCo v2", R50, 200, 256, "imagenet", "linear-moco", 67.5, None,
        "P-MoCo2; README-M", "five runs, ± 0.1; the released checkpoint has 67.7",
    ),
    "moco-v2-r50-800": Row(
        "MoCo v2", R50, 800, 256, "imagenet", "linear-moco", 71.1, None, "P-MoCo2; README-M",
    ),
    "moco-cifar10-asym-200": Row(
        "MoCo, asymmetric", R18, 200, 512, "cifar10", "knn200-output", 82.6, None,
        "notebook", "kNN on the 128-d output",
    ),
    "moco-cifar10-sym-200": Row(
        "MoCo, symmetric", R18, 200, 512, "cifar10", "knn200-output", 85.3, None,
        "notebook", "kNN on the 128-d output",
    ),
    "byol-r50-100": Row(
        "BYOL", R50, 100, 4096, "imagenet", "linear-byol", 66.5, None,
        "P-SimSiam Table 4", "a reproduction: BYOL's paper has no figure at 100 epochs",
    ),
    "byol-r50-300": Row(
        "BYOL", R50, 300, 4096, "imagenet", "linear-byol", 72.5, 90.8, "P-BYOL Tables 5, 16",
    ),
    "byol-r50-1000": Row(
        "BYOL", R50, 1000, 4096, "imagenet", "linear-byol", 74.3, 91.6,
        "P-BYOL Table 1", "74.0 to 74.5 in README-B",
    ),
    "byol-r50-1000-b512": Row(
        "BYOL", R50, 1000, 512, "imagenet", "linear-byol", 73.7, None, "P-BYOL App. G",
    ),
    "byol-gnws-r50-1000": Row(
        "BYOL, GN + WS", R50, 1000, 4096, "imagenet", "linear-byol", 73.9, None,
        "arXiv 2010.10241, abstract",
        "often quoted the wrong way round: 73.9 is GN + WS, 74.3 is BatchNorm; epochs and batch "
        "are not verified",
    ),
    "byol-imagenette-r18-1000": Row(
        "BYOL", R18, 1000, 256, "imagenette", "linear-online", 92.3, None,
        "README-B", "a classifier trained during pretraining, not afterwards",
    ),
}  # fmt: skip
