"""What is judged, and the record of each judgement: one JSON file in RUN/results/."""

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

from common.cli import UserError
from common.data import Images, hold_out_fifth, open_labelled
from common.run import provenance, read_json, write_atomically
from eval.encoder import Encoder, Input, load
from eval.features import digest_of, encode, kept

COLUMNS = ("image_column", "label_column")


@dataclass
class Subject:
    """An encoder with the images it is judged on, and the folder for its results, if any."""

    encoder: Encoder
    source: str
    columns: dict[str, str | None]
    folder: Path | None
    config: dict[str, Any]  # the run's; empty without a run
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    _splits: tuple[Images, Images] | None = field(default=None, repr=False)
    _opened: tuple[Images, Images | None] | None = field(default=None, repr=False)
    cache: Path | None = None  # where features are kept
    several: bool = False  # whether an image may have several labels

    def opened(self) -> tuple[Images, Images | None]:
        """The labelled training split of the source and its test split, if it has one."""
        if self._opened is None:
            self._opened = self._splits or open_labelled(
                self.source, several=self.several, **self.columns
            )
        return self._opened

    def splits(self) -> tuple[Images, Images]:
        """The same; without a test split a fifth of the training images is held out for one."""
        if self._splits is None:
            train, test = self.opened()
            self._splits = hold_out_fifth(train) if test is None else (train, test)
        return self._splits

    def extract(self, images: Images, given: Input | None = None) -> tuple[Tensor, Tensor]:
        """(N, F) features and (N,) labels; `given` in place of the encoder's own input."""
        assert images.labels is not None
        features, index = self.features(images, given)
        return features, images.labels[index]

    def features(self, images: Images, given: Input | None = None) -> tuple[Tensor, Tensor]:
        """The same features, and the indices of their images: those that can be decoded."""
        network, given = self.encoder.network.to(self.device), given or self.encoder.input
        key = digest_of(network, given, images) if self.cache else ""
        return kept(self.cache, key, lambda: encode(network, images, given, self.device))


def subjects(
    run: str,
    weights: str,
    baselines: Sequence[str],
    data: str,
    layer: int = 0,
    several: bool = False,
    columns: Sequence[str | None] = (None, None),
) -> Iterator[Subject]:
    """What a command was asked to judge: the run (or `weights` in its place), then the baselines.

    Args:
        columns: `COLUMNS` of the source; None: the run's if the source is, else found by its type.

    Raises:
        UserError: no run and no weights; no data for weights without a run.
    """
    folder = Path(run) if run and Path(run).is_dir() else None
    config = config_of(folder) if folder else {}
    source = data or config.get("data", "")
    encoders = [load(run, weights, layer), *(load(run, name) for name in baselines)]
    if not source:
        raise UserError("say on which images to judge: --data SOURCE")
    same = source == config.get("data")
    named = {
        key: column or (config.get(key) if same else None)
        for key, column in zip(COLUMNS, columns, strict=True)
    }
    splits = opened = None
    for encoder in encoders:
        where = folder / "results" if folder else None
        subject = Subject(encoder, source, named, where, config, several=several)
        subject.cache = folder / "features" if folder else None
        subject._splits, subject._opened = splits, opened  # decoded once for all
        yield subject
        splits, opened = subject._splits, subject._opened


def config_of(run: Path) -> dict[str, Any]:
    """The settings that a run was made with.

    Raises:
        UserError: no such file, or not one that a run writes.
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
        counts: images trained and judged on; default: those of the splits.
    """
    trained, judged = counts or tuple(len(split) for split in subject.splits())
    about = subject.encoder.about
    row = {
        "protocol": protocol,
        "subject": subject.encoder.name,
        "top1": round(top1, 3),
        **{key: value for key, value in values.items() if value is not None},
        "data": subject.source,
        **{key: column for key, column in subject.columns.items() if column},
        "train_images": trained,
        "test_images": judged,
        "method": about.get("method"),
        "recipe": about.get("recipe"),
        "epochs": about.get("epochs"),
        "arch": about.get("arch"),
        "stem": about.get("stem"),
        "batch_size": subject.config.get("batch_size"),
        "seed": subject.config.get("seed"),
        "published": about.get("published"),
        "pretrained_at": about.get("commit"),
        "judged": provenance(1),
    }
    if subject.folder:
        subject.folder.mkdir(exist_ok=True)
        path = subject.folder / f"{name_of_record(subject, protocol)}.json"
        write_atomically(path, json.dumps(row, indent=2).encode() + b"\n")
    interval = values.get("interval")
    said = f"{top1:.1f}" if interval is None else with_interval(top1, interval, judged)
    who = f"{protocol:<16} {subject.encoder.name:<8}"
    print(f"{who}  {measure_of(protocol)} {said}  on {subject.source}", flush=True)
    return row


def changed(settings: Any, *names: str) -> dict[str, float] | None:
    """Those of a command's settings that were given in place of the protocol's own, if any."""
    return {name: value for name in names if (value := getattr(settings, name))} or None


def measure_of(protocol: str) -> str:
    """What a protocol's figure is."""
    others = {"-mean-per-class": "mean per class", "-map11": "11-point mAP"}
    return next((name for ending, name in others.items() if protocol.endswith(ending)), "Top-1")


def name_of_record(subject: Subject, protocol: str) -> str:
    """The name of a judgement's file, without its ending."""
    same = subject.source == subject.config.get("data")
    other = "" if same else f"-on-{subject.source}"
    for key, column in subject.columns.items():
        if column != (subject.config.get(key) if same else None):
            other += f"-{column}"  # other labels, or other images
    return file_name(f"{protocol}-{subject.encoder.name}{other}")


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
    """A figure and its 95 % interval: ±, or both ends where Wilson's are not equally far."""
    z2 = 1.959964**2
    centre = (percent + 50 * z2 / count) / (1 + z2 / count)  # Wilson's is drawn towards a half
    other = abs(interval - confidence(percent, count)) > 0.01  # resampled: of another measure
    if other or abs(centre - percent) < 0.25 * interval:
        return f"{percent:.1f} ± {interval:.1f}"
    return f"{percent:.1f} ({centre - interval:.1f} to {centre + interval:.1f})"
