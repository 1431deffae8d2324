"""The encoders to judge, and the record of each judgement: one JSON file in RUN/results/."""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.data import ImageSplit, hold_out_fifth, open_labelled
from common.errors import UserError
from common.files import atomic_write_bytes, read_json
from common.launch import provenance
from eval.encoder import Encoder, Preprocess, load
from eval.features import cached, digest_of, encode

COLUMNS = ("image_column", "label_column")


@dataclass
class Subject:
    """An encoder with the images that it is judged on, and the folder for its results, if any."""

    encoder: Encoder
    source: str
    columns: dict[str, str | None]
    folder: Path | None
    config: dict[str, Any]  # the run's; empty without a run
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    _splits: tuple[ImageSplit, ImageSplit] | None = field(default=None, repr=False)
    _opened: tuple[ImageSplit, ImageSplit | None] | None = field(default=None, repr=False)
    cache: Path | None = None  # the folder of cached features
    multilabel: bool = False  # whether an image may have several labels

    def opened(self) -> tuple[ImageSplit, ImageSplit | None]:
        """The labelled training split of the source and its test split, if it has one."""
        if self._opened is None:
            self._opened = self._splits or open_labelled(
                self.source, multilabel=self.multilabel, **self.columns
            )
        return self._opened

    def splits(self) -> tuple[ImageSplit, ImageSplit]:
        """The same; without a test split, a fifth of the training images is held out as one."""
        if self._splits is None:
            train, test = self.opened()
            self._splits = hold_out_fifth(train) if test is None else (train, test)
        return self._splits

    def extract(
        self, images: ImageSplit, preprocess: Preprocess | None = None
    ) -> tuple[Tensor, Tensor]:
        """(N, F) features and (N,) labels; `preprocess` replaces the encoder's own."""
        assert images.labels is not None
        features, index = self.features(images, preprocess)
        return features, images.labels[index]

    def features(
        self, images: ImageSplit, preprocess: Preprocess | None = None
    ) -> tuple[Tensor, Tensor]:
        """The same features, and the (N,) indices of their images: those that can be decoded."""
        network, preprocess = self.encoder.network.to(self.device), preprocess or self.encoder.input
        key = digest_of(network, preprocess, images) if self.cache else ""
        return cached(self.cache, key, lambda: encode(network, images, preprocess, self.device))


def subjects(
    run: str,
    weights: str,
    baselines: Sequence[str],
    data: str,
    layer: int = 0,
    multilabel: bool = False,
    columns: Sequence[str | None] = (None, None),
) -> Iterator[Subject]:
    """What a command is to judge: the run (or `weights` instead of it), then the baselines.

    Args:
        columns: `COLUMNS` of the source; None: the run's if the source is the run's, else the
            column of that type.

    Raises:
        UserError: there is no run and no weights, or no data for weights without a run.
    """
    folder = Path(run) if run and Path(run).is_dir() else None
    config = config_of(folder) if folder else {}
    source = data or config.get("data", "")
    encoders = [load(run, weights, layer), *(load(run, name) for name in baselines)]
    if not source:
        raise UserError("say on which images to judge: --data SOURCE")
    of_run = source == config.get("data")
    source_columns = {
        key: column or (config.get(key) if of_run else None)
        for key, column in zip(COLUMNS, columns, strict=True)
    }
    splits = opened = None
    for encoder in encoders:
        results = folder / "results" if folder else None
        subject = Subject(encoder, source, source_columns, results, config, multilabel=multilabel)
        subject.cache = folder / "features" if folder else None
        subject._splits, subject._opened = splits, opened  # all share the decoded images
        yield subject
        splits, opened = subject._splits, subject._opened


def config_of(run: Path) -> dict[str, Any]:
    """The settings of a run.

    Raises:
        UserError: there is no such file, or it is not one that a run writes.
    """
    path = run / "config.json"
    record = read_json(path)
    config = record.get("config") if isinstance(record, dict) else None
    if isinstance(config, dict):
        texts = [config.get(key) for key in ("data", *COLUMNS)]
        if all(isinstance(text, str | None) for text in texts):
            return config
    raise UserError(f"{path}: not of a run")


def record(
    subject: Subject,
    protocol: str,
    *,
    top1: float,
    counts: tuple[int, int] | None = None,
    **values: Any,
) -> dict[str, Any]:
    """Print a judgement and, for a run, write RUN/results/PROTOCOL-NAME.json.

    Args:
        counts: numbers of training and test images; default: those of the splits.
    """
    train_count, test_count = counts or tuple(len(split) for split in subject.splits())
    metadata = subject.encoder.metadata
    row = {
        "protocol": protocol,
        "subject": subject.encoder.name,
        "top1": round(top1, 3),
        **{key: value for key, value in values.items() if value is not None},
        "data": subject.source,
        **{key: column for key, column in subject.columns.items() if column},
        "train_images": train_count,
        "test_images": test_count,
        "method": metadata.get("method"),
        "recipe": metadata.get("recipe"),
        "epochs": metadata.get("epochs"),
        "encoder": metadata.get("encoder"),
        "batch_size": subject.config.get("batch_size"),
        "seed": subject.config.get("seed"),
        "published": metadata.get("published"),
        "pretrained_at": metadata.get("commit"),
        "judged": provenance(1),
    }
    if subject.folder:
        subject.folder.mkdir(exist_ok=True)
        path = subject.folder / f"{name_of_record(subject, protocol)}.json"
        atomic_write_bytes(path, json.dumps(row, indent=2).encode() + b"\n")
    interval = values.get("interval")
    figure = f"{top1:.1f}" if interval is None else with_interval(top1, interval, test_count)
    line = f"{protocol:<16} {subject.encoder.name:<8}  {measure_of(protocol)} {figure}"
    print(f"{line}  on {subject.source}", flush=True)
    return row


def changed(settings: Any, *names: str) -> dict[str, float] | None:
    """Those of the named settings that replace the protocol's own, if any."""
    return {name: value for name in names if (value := getattr(settings, name))} or None


def measure_of(protocol: str) -> str:
    """The name of the measure that a protocol reports."""
    others = {"-mean-per-class": "mean per class", "-map11": "11-point mAP"}
    return next((name for ending, name in others.items() if protocol.endswith(ending)), "Top-1")


def name_of_record(subject: Subject, protocol: str) -> str:
    """The name of a judgement's file, without its ending."""
    of_run = subject.source == subject.config.get("data")
    ending = "" if of_run else f"-on-{subject.source}"
    for key, column in subject.columns.items():
        if column != (subject.config.get(key) if of_run else None):
            ending += f"-{column}"  # other labels, or other images
    return file_name(f"{protocol}-{subject.encoder.name}{ending}")


def file_name(title: str) -> str:
    """Letters, digits, `-`, `_` and `.` alone; cut where a disk would refuse it."""
    name = re.sub(r"[^\w.]+", "-", title)
    if len(name.encode()) > 200:  # of the 255 bytes that file systems allow
        name = f"{name[:40]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name


def confidence(percent: float, count: int) -> float:
    """Half the width, in percent, of the 95 % Wilson interval of a share measured on `count`."""
    p, z = percent / 100, 1.959964
    return 100 * z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + (z / (2 * count)) ** 2)


def with_interval(percent: float, interval: float, count: int) -> str:
    """A figure and its 95 % interval: ±, or both ends where Wilson's interval is not centred."""
    z2 = 1.959964**2
    centre = (percent + 50 * z2 / count) / (1 + z2 / count)  # Wilson's lies nearer to 50 %
    resampled = abs(interval - confidence(percent, count)) > 0.01  # so it is not Wilson's
    if resampled or abs(centre - percent) < 0.25 * interval:
        return f"{percent:.1f} ± {interval:.1f}"
    return f"{percent:.1f} ({centre - interval:.1f} to {centre + interval:.1f})"
