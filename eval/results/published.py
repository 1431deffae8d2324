"""Published figures, each with its source: `published.csv` is the only place that holds one.

A recipe names the row that it reproduces by its key (`Config.published`). The column `recipe` names
what can be trained here to be held against a row, by its own epochs and batch where the row has
others (`simclr imagenet`); `context` stands where nothing here can: another method, a larger
network, or a protocol that `eval/` does not have. All figures, in percent, were read in the source
that is named; a figure without a source that could be read is left out, or its note says so.
"""

import csv
import importlib.resources
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOURCES = {
    "P-Sim": "arXiv 2002.05709 v3",
    "P-SimSiam": "arXiv 2011.10566",
    "P-MoCo": "arXiv 1911.05722",
    "P-MoCo2": "arXiv 2003.04297",
    "P-MoCo3": "arXiv 2104.02057",
    "P-BYOL": "arXiv 2006.07733",
    "README-S": "google-research/simclr at 383d414",
    "README-M": "facebookresearch/moco at f736491",
    "notebook": "colab/moco_cifar10_demo.ipynb of facebookresearch/moco at f736491",
    "README-M3": "facebookresearch/moco-v3 at c349e6e",
    "README-B": "deepmind-research/byol at f5de0ed",
    "lightly": "the benchmarks page of lightly's documentation at e8d317f",
    "dkobak": "the README of dkobak/simclr-cifar10",
    "solo-learn": "its README at 9187ea3",
}


@dataclass(frozen=True)
class Published:
    """One published figure and its setting."""

    method: str  # with its version
    network: str
    epochs: int | None  # None: not stated
    batch_size: int | None
    data: str  # what was judged on, a key of DATA
    task: str
    protocol: str  # as eval/ names it; eval/ does not have every published protocol
    settings: dict[str, Any]  # of the judge: k, temperature, layer, label_percent
    metric: str
    value: float
    top5: float | None
    pretrained: str  # what was pretrained on, where that is not `data`
    variant: dict[str, Any]  # settings of the method's Config that tell this variant from others
    recipe: str  # "simclr imagenet", or "context"
    source: str
    note: str


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

# What P-BYOL App. D measures where it is not Top-1.
METRICS = {
    **dict.fromkeys(("aircraft", "pets", "caltech101", "flowers102"), "mean_per_class"),
    "voc2007": "map11",
}


def data_set(source: str) -> str:
    """The key of `DATA` that a SOURCE is by its name; empty if it is none of them."""
    name = Path(source).name.lower().replace("_", "-")
    return next((key for key, (names, _) in DATA.items() if re.fullmatch(names, name)), "")


def _settings(text: str) -> dict[str, Any]:
    """`k=200;norm=bn` as a dictionary; values are JSON, or else text."""
    pairs = (pair.split("=", 1) for pair in text.split(";") if pair)
    return {key: _value(value) for key, value in pairs}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _read() -> dict[str, Published]:
    rows = {}
    text = importlib.resources.files("eval.results").joinpath("published.csv").read_text("utf-8")
    for row in csv.DictReader(text.splitlines()):
        parsed: dict[str, Any] = dict(row)
        for name in ("epochs", "batch_size"):
            parsed[name] = int(row[name]) if row[name] else None
        for name in ("settings", "variant"):
            parsed[name] = _settings(row[name])
        parsed["value"] = float(row["value"])
        parsed["top5"] = float(row["top5"]) if row["top5"] else None
        key = parsed.pop("key")
        rows[key] = Published(**parsed)
    return rows


PUBLISHED = _read()
