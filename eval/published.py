"""Published figures, each with its source: the only place in the repository that holds one.

A recipe names the row that it reproduces by key (`Config.published`); `eval/compare.py` finds the
rows that a measurement may be compared with. Top-1 and Top-5 are in percent. All figures were read
in the source that is named; a figure without a source that could be read is left out, or its note
says so. Two figures are often quoted wrongly: see the notes of `simclr-v2-r50-800` and
`byol-gnws-r50-1000`.

P-Sim = arXiv 2002.05709 v3; P-SimSiam = arXiv 2011.10566; P-MoCo = arXiv 1911.05722; P-MoCo2 =
arXiv 2003.04297; P-MoCo3 = arXiv 2104.02057; P-BYOL = arXiv 2006.07733; README-S =
google-research/simclr at 383d414; README-M = facebookresearch/moco at f736491, notebook = its
colab/moco_cifar10_demo.ipynb; README-M3 = facebookresearch/moco-v3 at c349e6e; README-B =
deepmind-research/byol at f5de0ed; lightly = the benchmarks page of lightly's documentation at
e8d317f; dkobak = the README of dkobak/simclr-cifar10; solo-learn = its README at 9187ea3.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """One published result and its setting."""

    method: str  # with its version; the first word is the name
    network: str
    epochs: int | None  # None: not stated
    batch_size: int | None
    data: str  # what was judged on, a key of DATA
    protocol: str  # as eval/ names it; eval/ does not have every published protocol
    top1: float  # Top-1, or the measure that the protocol's data set has in its place
    top5: float | None
    source: str
    note: str = ""
    variant: Mapping[str, Any] = field(default_factory=dict)
    """settings of the method's Config that tell this variant from others"""
    pretrained: str = ""  # what was pretrained on, where that is not `data`


# Names of data sets: a pattern of the last part of a SOURCE, and the images of the test split.
# Another split, or the same images at another size, is another data set.
DATA = {
    "imagenet": (r"imagenet(-?1k)?|ilsvrc(-?2012)?", 50_000),
    "imagenette": (r"imagenette2?-160", 3_925),
    "cifar10": (r"cifar-?10(-(jpe?g|png|parquet))?", 10_000),
    "cifar100": (r"cifar-?100", 10_000),
    # sizes of the splits for transfer: P-BYOL App. D
    "food101": (r"food-?101", 25_250),
    "birdsnap": (r"birdsnap", 2_443),
    "sun397": (r"sun-?397", 19_850),
    "cars": (r"(stanford-?)?cars", 8_041),
    "aircraft": (r"(fgvc-?)?aircraft", 3_333),
    "voc2007": (r"voc-?2007", 4_952),
    "dtd": (r"dtd", 1_880),
    "pets": (r"(oxford-?)?pets|oxford-iiit-pet", 3_669),
    "caltech101": (r"caltech-?101", 6_084),
    "flowers102": (r"(oxford-?)?flowers-?102", 6_149),
}

# What P-BYOL App. D measures where it is not Top-1, as eval/transfer.py names it.
MEASURES = {
    **dict.fromkeys(("aircraft", "pets", "caltech101", "flowers102"), "mean-per-class"),
    "voc2007": "map11",
}


def data_set(source: str) -> str:
    """The key of `DATA` that a SOURCE is by its name; empty if it is none of them."""
    name = Path(source).name.lower().replace("_", "-")
    return next((key for key, (names, _) in DATA.items() if re.fullmatch(names, name)), "")


R50, R18 = "ResNet-50", "ResNet-18"


def vary(row: Row, variant: Mapping[str, Any] | None = None, **fields: Any) -> Row:
    """The row with other fields, and with `variant` added to its own."""
    return replace(row, **fields, variant={**row.variant, **(variant or {})})


# fmt: off

# ---- SimCLR on ImageNet --------------------------------------------------------------------------

_simclr = Row(
    "SimCLR v1", R50, 100, 4096, "imagenet", "linear-simclr", 64.5, None, "P-Sim App. B.1",
    variant={"head_layers": 2, "temperature": 0.1, "lr_scaling": "linear", "blur": 0.5},
)
SIMCLR = {
    # Table 5 has 64.4 at the temperature 0.1 of all other rows
    "simclr-v1-r50-100": vary(
        _simclr, source="P-Sim Table 1",
        note="App. B.1 has 64.6 with linear and 64.5 with square-root scaling",
    ),
    "simclr-v1-r50-1000": vary(
        _simclr, epochs=1000, top1=69.3, top5=89.0, source="P-Sim Table 6",
        note="the released checkpoint has 69.1 (README-S)",
    ),
    "simclr-v1-r50x2-1000": vary(
        _simclr, network="ResNet-50 (2x)", epochs=1000, top1=74.2, top5=92.0,
        source="P-Sim Table 6", note="the released checkpoint has 74.2 (README-S)",
    ),
    "simclr-v1-r50x4-1000": vary(
        _simclr, network="ResNet-50 (4x)", epochs=1000, top1=76.5, top5=93.2,
        source="P-Sim Table 6", note="the released checkpoint has 76.6 (README-S)",
    ),
    "simclr-v1-r50-1000-broader": vary(
        _simclr, {"views": "broader"}, epochs=1000, top1=70.0, source="P-Sim App. B.2",
    ),
    **{
        f"simclr-v1-r50-{epochs}-b{batch}": vary(
            _simclr, epochs=epochs, batch_size=batch, top1=top1
        )
        for epochs, batch, top1 in (
            (100, 256, 57.5), (100, 512, 60.7), (100, 1024, 62.8), (100, 2048, 64.0),
            (100, 8192, 64.8), (200, 256, 61.9), (200, 4096, 66.5), (200, 8192, 66.6),
            (400, 256, 64.7), (400, 4096, 68.2), (800, 256, 66.6), (800, 4096, 68.9),
            (800, 8192, 69.0),
        )
    },
    **{
        f"simclr-v1-r50-{epochs}-b{batch}-sqrt": vary(
            _simclr, {"lr_scaling": "sqrt"}, epochs=epochs, batch_size=batch, top1=top1
        )
        for epochs, batch, top1 in (
            (100, 256, 62.8), (100, 512, 63.8), (100, 1024, 64.3), (100, 2048, 64.7),
            (100, 4096, 64.5), (100, 8192, 64.8), (200, 256, 64.3), (200, 4096, 66.8),
            (200, 8192, 67.0), (400, 256, 65.7), (400, 4096, 68.0), (800, 256, 66.5),
            (800, 4096, 69.1), (800, 8192, 69.1),
        )
    },
    **{
        f"simclr-v1-r50-100-tau{tau}": vary(
            _simclr, {"temperature": tau}, top1=top1, source="P-Sim Table 5"
        )
        for tau, top1 in ((0.05, 59.7), (0.5, 60.7), (1.0, 58.0))
    },
    "simclr-v1-r50-100-no-flip": vary(_simclr, {"flip": 0}, top1=63.4, source="P-Sim App. A"),
    "simclr-v1-r50-100-no-blur": vary(_simclr, {"blur": 0.0}, top1=63.2, source="P-Sim Table 1"),
    "simclr-v2-r50-800": Row(
        "SimCLR v2", R50, 800, 4096, "imagenet", "linear-simclr", 71.7, None, "README-S",
        "trained with a memory that was never released; the official notebook measures 71.7 too; "
        "the 71.1 often quoted for it is MoCo v2's after 800 epochs", {"head_layers": 3},
    ),
    **{
        f"simclr-v2-{key}-800": Row(
            "SimCLR v2", network, 800, 4096, "imagenet", "linear-simclr", top1, None, "README-S",
            "trained with a memory that was never released", {"head_layers": 3},
        )
        for key, network, top1 in (
            ("r50x2", "ResNet-50 (2x)", 75.6), ("r152x3-sk", "ResNet-152 (3x, SK)", 79.8),
        )
    },
    "simclr-r50-300-deepmind": Row(
        "SimCLR", R50, 300, 4096, "imagenet", "linear-byol", 67.9, 88.5, "P-BYOL Table 16",
        "a reproduction; 69.2 with a larger head and 2 tau times the loss (App. F.5)",
        {"temperature": 0.1},
    ),
    **{
        f"simclr-r50-{epochs}-simsiam": Row(
            "SimCLR", R50, epochs, 4096, "imagenet", "linear-simsiam", top1, None,
            "P-SimSiam Table 4", "a reproduction", {"head_layers": 3},
        )
        for epochs, top1 in ((100, 66.5), (200, 68.3), (400, 69.8), (800, 70.4))
    },
}

# ---- MoCo on ImageNet ----------------------------------------------------------------------------

_moco = Row(
    "MoCo v1", R50, 200, 256, "imagenet", "linear-moco", 60.6, None, "P-MoCo2 Sec. 3",
    variant={"head": "linear", "views": "v1", "temperature": 0.07, "schedule": "step"},
)
_mlp = vary(_moco, {"head": "mlp"}, method="MoCo v1, MLP")
_v2 = vary(
    _mlp, {"views": "v2", "temperature": 0.2, "schedule": "cosine"}, method="MoCo v2",
    source="P-MoCo2; README-M",
)
MOCO = {
    "moco-v1-r50-200": vary(
        _moco, source="P-MoCo Sec. 4.1", note="60.8 ± 0.2 over five runs (README-M)"
    ),
    "moco-v1-r50x4-200": vary(_moco, network="ResNet-50 (4x)", top1=68.6, source="P-MoCo"),
    **{
        f"moco-v1-r50-200-tau{tau}": vary(_moco, {"temperature": tau}, top1=top1)
        for tau, top1 in ((0.1, 60.7), (0.2, 59.0), (0.3, 58.2), (0.4, 57.2), (0.5, 56.4))
    },
    **{
        f"moco-v1-mlp-r50-200-tau{tau}": vary(_mlp, {"temperature": tau}, top1=top1)
        for tau, top1 in (
            (0.07, 62.9), (0.1, 64.9), (0.2, 66.2), (0.3, 65.7), (0.4, 65.0), (0.5, 64.3),
        )
    },
    "moco-v1-aug-r50-200": vary(
        _moco, {"views": "v2"}, method="MoCo v1, v2's views", top1=63.4, source="P-MoCo2"
    ),
    "moco-v1-mlp-aug-r50-200": vary(
        _v2, {"schedule": "step"}, method="MoCo v1, MLP, v2's views", top1=67.3, source="P-MoCo2"
    ),
    "moco-v2-r50-200": vary(
        _v2, top1=67.5, note="five runs, ± 0.1; the released checkpoint has 67.7"
    ),
    "moco-v2-r50-800": vary(_v2, epochs=800, top1=71.1),
    **{
        f"moco-v2-symmetric-r50-{epochs}-simsiam": vary(
            _v2, {"symmetric": True}, method="MoCo v2, symmetric", epochs=epochs, top1=top1,
            protocol="linear-simsiam", source="P-SimSiam Table 4", note="a reproduction",
        )
        for epochs, top1 in ((100, 67.4), (200, 69.9), (400, 71.0), (800, 72.2))
    },
    **{
        f"moco-v3-r50-{epochs}": Row(
            "MoCo v3", R50, epochs, 4096, "imagenet", "linear-moco-v3", top1, None, source,
            variant={"views": "v3"},
        )
        for epochs, top1, source in (
            (100, 68.9, "README-M3"), (300, 72.8, "README-M3"), (800, 73.8, "P-MoCo3"),
            (1000, 74.6, "README-M3"),
        )
    },
}

# ---- BYOL on ImageNet and Imagenette -------------------------------------------------------------

_byol = Row(
    "BYOL", R50, 300, 4096, "imagenet", "linear-byol", 72.5, 90.8, "P-BYOL Tables 5, 16",
    variant={"norm": "bn", "tau_base": 0.99, "accumulate": 1},
)
_byol_1000 = vary(_byol, {"tau_base": 0.996}, epochs=1000, source="P-BYOL Table 1")
BYOL = {
    "byol-r50-300": _byol,
    **{
        f"byol-r50-300-accumulate{parts}": vary(
            _byol, {"accumulate": parts}, top1=top1, top5=top5, source="P-BYOL Table 16",
            note=f"batches of {4096 // parts}, accumulated to 4096",
        )
        for parts, top1, top5 in (
            (2, 72.4, 90.7), (4, 72.2, 90.7), (8, 72.2, 90.8), (16, 71.8, 90.7), (32, 69.6, 89.6),
            (64, 59.7, 83.2),
        )
    },
    **{
        f"byol-r50-300-tau{tau}": vary(
            _byol, {"tau_base": tau}, top1=top1, top5=None, source="P-BYOL Table 5a"
        )
        for tau, top1 in ((0.999, 69.8), (0.9, 68.4), (1.0, 18.8), (0.0, 0.3))
    },
    "byol-r50-1000": vary(
        _byol_1000, top1=74.3, top5=91.6, note="74.0 to 74.5 in README-B; GN + WS has 73.9"
    ),
    **{
        f"byol-{key}-1000": vary(_byol_1000, network=network, top1=top1, top5=top5)
        for key, network, top1, top5 in (
            ("r50x2", "ResNet-50 (2x)", 77.4, 93.6), ("r50x4", "ResNet-50 (4x)", 78.6, 94.2),
            ("r200x2", "ResNet-200 (2x)", 79.6, 94.8),
        )
    },
    "byol-r50-1000-b512": vary(
        _byol_1000, {"tau_base": 0.9995}, batch_size=512, top1=73.7, top5=None,
        source="P-BYOL App. G",
    ),
    "byol-gnws-r50-1000": vary(
        _byol_1000, {"norm": "gn+ws"}, method="BYOL, GN + WS", top1=73.9, top5=None,
        source="arXiv 2010.10241, abstract",
        note="often quoted the wrong way round: 73.9 is GN + WS, 74.3 is BatchNorm; epochs and "
        "batch are not verified",
    ),
    "byol-r50-100": Row(
        "BYOL", R50, 100, 4096, "imagenet", "linear-simsiam", 66.5, None, "P-SimSiam Table 4",
        "a reproduction: BYOL's paper has no figure at 100 epochs", {"norm": "bn"},
    ),
    **{
        f"byol-r50-{epochs}-simsiam": Row(
            "BYOL", R50, epochs, 4096, "imagenet", "linear-simsiam", top1, None,
            "P-SimSiam Table 4", "a reproduction", {"norm": "bn"},
        )
        for epochs, top1 in ((200, 70.6), (400, 73.2), (800, 74.3))
    },
    "byol-imagenette-r18-1000": Row(
        "BYOL", R18, 1000, 256, "imagenette", "linear-online", 92.3, None, "README-B",
        "a classifier trained during pretraining, not afterwards", {"norm": "bn"},
    ),
}

# ---- CIFAR-10, with what users compare with ------------------------------------------------------

_notebook = Row(
    "MoCo, asymmetric", R18, 200, 512, "cifar10", "knn200-output", 82.6, None, "notebook",
    "kNN on the 128-d output", {"symmetric": False, "head": "linear", "views": "notebook"},
)
_symmetric = vary(_notebook, {"symmetric": True}, method="MoCo, symmetric")
CIFAR10 = {
    "simclr-cifar10-r18-1000": Row(
        "SimCLR", R18, 1000, 512, "cifar10", "linear-simclr", 91.0, None, "README-S",
        "said as 'around 91'",
    ),
    "simclr-cifar10-r50": Row(
        "SimCLR v1", R50, None, 1024, "cifar10", "linear-simclr", 94.0, None, "P-Sim App. B.9",
        "best of a grid; its learning rate and epochs are not stated; supervised 95.1",
        {"head_layers": 2},
    ),
    "simclr-cifar10-r18-800-simsiam": Row(
        "SimCLR", R18, 800, 512, "cifar10", "linear-simsiam", 91.1, None, "P-SimSiam App. D",
        "a reproduction, by SGD",
    ),
    **{f"moco-cifar10-asym-{epochs}": vary(_notebook, epochs=epochs, top1=top1)
       for epochs, top1 in ((200, 82.6), (400, 86.3), (800, 88.7))},
    **{f"moco-cifar10-sym-{epochs}": vary(_symmetric, epochs=epochs, top1=top1)
       for epochs, top1 in ((200, 85.3), (400, 88.5), (800, 89.7))},
    "moco-cifar10-sym-800-linear": vary(
        _symmetric, epochs=800, protocol="linear-notebook", top1=90.7,
        note="the notebook does not have its linear protocol",
    ),
    **{
        f"{method.lower()}-cifar10-r18-{epochs}-b{batch}-lightly": Row(
            method, R18, epochs, batch, "cifar10", "knn200", top1, None, "lightly",
            "another recipe; best epoch on test",
        )
        for method, epochs, batch, top1 in (
            ("SimCLR", 200, 128, 84.7), ("MoCo", 200, 128, 83.8), ("BYOL", 200, 128, 86.9),
            ("SimCLR", 200, 512, 84.8), ("MoCo", 200, 512, 84.7), ("BYOL", 200, 512, 86.8),
            ("SimCLR", 800, 512, 87.9), ("MoCo", 800, 512, 89.9), ("BYOL", 800, 512, 91.0),
        )
    },
    **{
        f"{key}-cifar10-r18-1000-solo": Row(
            method, R18, 1000, 256, "cifar10", "linear-online", top1, None, "solo-learn",
            "another recipe; a classifier trained during pretraining", variant,
        )
        for key, method, top1, variant in (
            ("simclr", "SimCLR", 90.74, {}), ("byol", "BYOL", 92.58, {}),
            ("moco-v2plus", "MoCo v2+", 92.94, {"views": "v2+"}),
            ("moco-v3", "MoCo v3", 93.10, {"views": "v3"}),
        )
    },
    **{
        f"simclr-cifar10-r{depth}-{epochs}-{protocol}-dkobak": Row(
            "SimCLR", f"ResNet-{depth}", epochs, 512, "cifar10", protocol, top1, None, "dkobak",
            "another recipe; three seeds",
        )
        for depth, epochs, figures in (
            (18, 100, (83.2, 85.6, 85.0)), (18, 1000, (91.4, 91.7, 91.9)),
            (34, 1000, (92.1, 92.1, 92.6)), (50, 1000, (92.6, 93.4, 93.7)),
        )
        for protocol, top1 in zip(
            ("knn10", "linear-precomputed", "linear-augmented"), figures, strict=True
        )
    },
}

# ---- fine-tuning with 1, 10 and 100 % of ImageNet's labels ---------------------------------------

FINE_TUNED = {
    f"{key}-finetune-{share}": Row(
        method, network, epochs, 4096 if epochs else None, "imagenet", f"finetune-{share}-{whose}",
        top1, top5, source, variant=variant,
    )
    for key, method, network, epochs, whose, source, variant, figures in (
        ("simclr-v1-r50", "SimCLR v1", R50, 1000, "simclr", "P-Sim Table 7, App. B.4",
         {"head_layers": 2}, ((1, 48.3, 75.5), (10, 65.6, 87.8))),
        ("simclr-v1-r50x2", "SimCLR v1", "ResNet-50 (2x)", 1000, "simclr", "P-Sim Table 7",
         {"head_layers": 2}, ((1, 58.5, 83.0), (10, 71.7, 91.2))),
        ("simclr-v1-r50x4", "SimCLR v1", "ResNet-50 (4x)", 1000, "simclr", "P-Sim Table 7",
         {"head_layers": 2}, ((1, 63.0, 85.8), (10, 74.4, 92.6))),
        ("simclr-v1-r50-broader", "SimCLR v1", R50, 1000, "simclr", "P-Sim App. B.2",
         {"views": "broader"}, ((1, 49.4, 76.6), (10, 66.1, 88.1), (100, 76.0, 93.1))),
        ("simclr-v2-r50", "SimCLR v2", R50, 800, "simclr-v2", "README-S",
         {"head_layers": 3}, ((1, 57.9, None), (10, 68.4, None), (100, 76.3, None))),
        ("simclr-v2-r50-distilled", "SimCLR v2", R50, None, "distilled",
         "arXiv 2006.10029, abstract", {"teacher": "larger"}, ((1, 73.9, None), (10, 77.5, None))),
        ("byol-r50", "BYOL", R50, 1000, "byol", "P-BYOL Tables 2, 8",
         {"norm": "bn"}, ((1, 53.2, 78.4), (10, 68.8, 89.0), (100, 77.7, 93.9))),
        ("supervised-r50", "supervised", R50, None, "supervised", "P-BYOL Table 2",
         {}, ((1, 25.4, 48.4), (10, 56.4, 80.4))),
    )
    for share, top1, top5 in figures
}

# ---- transfer ------------------------------------------------------------------------------------

# From ImageNet's ResNet-50 after 1000 epochs: Top-1, mean per class for aircraft, pets,
# caltech101 and flowers102, 11-point mAP for voc2007. P-BYOL Table 13 repeats its linear figures
# with 57.3 for birdsnap, 62.6 sun397, 67.2 cars, 76.5 dtd and 94.3 caltech101.
SETS = (
    "food101", "cifar10", "cifar100", "birdsnap", "sun397", "cars",
    "aircraft", "voc2007", "dtd", "pets", "caltech101", "flowers102",
)
TRANSFERRED = {
    ("BYOL", "transfer-linear", "P-BYOL Table 3"):
        (75.3, 91.3, 78.4, 57.2, 62.2, 67.8, 60.6, 82.5, 75.5, 90.4, 94.2, 96.1),
    ("BYOL", "transfer-finetune", "P-BYOL Table 3"):
        (88.5, 97.8, 86.1, 76.3, 63.7, 91.6, 88.1, 85.4, 76.2, 91.7, 93.8, 97.0),
    ("SimCLR v1", "transfer-linear", "P-Sim App. B.5"):
        (68.4, 90.6, 71.6, 37.4, 58.8, 50.3, 50.3, 80.5, 74.5, 83.6, 90.3, 91.2),
    ("SimCLR v1", "transfer-finetune", "P-Sim App. B.5"):
        (88.2, 97.7, 85.9, 75.9, 63.5, 91.3, 88.1, 84.1, 73.2, 89.2, 92.1, 97.0),
}
TRANSFER = {
    f"{method.split()[0].lower()}-{protocol}-{data}": Row(
        method, R50, 1000, 4096, data,
        f"{protocol}-{MEASURES[data]}" if data in MEASURES else protocol,
        top1, None, source, pretrained="imagenet",
    )
    for (method, protocol, source), figures in TRANSFERRED.items()
    for data, top1 in zip(SETS, figures, strict=True)
}

PUBLISHED: dict[str, Row] = {**SIMCLR, **MOCO, **BYOL, **CIFAR10, **FINE_TUNED, **TRANSFER}
# fmt: on
