"""What is judged: a run's encoder or other weights, with the images to judge on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.data import ImageSplit, hold_out_fifth, open_labelled
from common.errors import UserError
from common.files import read_json
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
