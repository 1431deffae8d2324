"""Weighted k-nearest-neighbour classification of features: no training, so nothing to tune.

    python -m eval.knn RUN
    python -m eval.knn RUN --baselines random pixels --k 20 200 --temperature 0.07 0.1

Protocol: cosine similarity s to every training image; the k nearest vote for their class with
weight exp(s / T). This is the monitor of MoCo's official notebook (k 200, T 0.1), after arXiv
1805.01978 Sec. 3.4, but on the representation h, before any head. SimCLR's and BYOL's papers report
no kNN. A source without a test split is judged on its training images, each left out of its own
neighbours.
"""

import itertools
import time
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from common import cli
from common.data import Images, open_train_test, take
from common.run import Run
from eval.encoder import Input
from eval.features import extract
from eval.results import Subject, confidence, record, subjects


@dataclass(frozen=True)
class Settings:
    """Weighted kNN on frozen features, beside baselines if asked."""

    run: Annotated[str, tyro.conf.Positional] = ""  # a run's folder or an encoder.safetensors
    weights: str = ""  # judge these instead: random, pixels, random:ARCH, torchvision:ARCH
    baselines: tuple[str, ...] = ()  # judge these as well: random, pixels
    data: str = ""  # images to judge on; default: those of the run
    image_column: str | None = None  # of a table with several, if not the run's
    label_column: str | None = None  # likewise
    layer: int = 0  # 0: representation h; k: the head's k-th hidden layer; -1: the head's output
    k: tuple[int, ...] = (20, 200)  # neighbours that vote; one result for each
    temperature: tuple[float, ...] = (0.1,)  # T of the votes' weights; one result for each


def predict(
    queries: Tensor,
    bank: Tensor,
    labels: Tensor,
    *,
    classes: int,
    k: int,
    temperature: float,
    chunk: int = 1024,
) -> tuple[Tensor, Tensor]:
    """Classes of `queries`, (Q, F), by the `k` nearest of `bank`, (N, F), with `labels` (N,).

    Returns:
        (Q, classes) classes from most to least likely, and their (Q, classes) shares of the votes.
    """
    similarity, index = nearest(queries, bank, k, chunk=chunk)
    return vote(similarity, labels[index], classes, temperature)


def nearest(
    queries: Tensor,
    bank: Tensor,
    k: int,
    *,
    own: bool = False,
    chunk: int = 1024,
    bank_chunk: int = 16_384,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosine similarity to, and place of, the `k` nearest of `bank` (N, F) to `queries` (Q, F).

    Features are normalised here, and both are taken in chunks: beside them at most chunk x
    bank_chunk similarities are in memory.

    Args:
        own: the queries are the bank; none is its own neighbour.
        device: where to compute; default: where the queries are.

    Returns:
        Two (Q, k) tensors, where the queries are, the nearest first; k is at most that of the bank.
    """
    k, device = min(k, len(bank) - own), device or queries.device
    found = []
    for start, part in zip(range(0, len(queries), chunk), queries.split(chunk), strict=True):
        part = F.normalize(part.to(device), dim=1)
        best = (
            part.new_empty(len(part), 0),
            torch.empty(len(part), 0, dtype=torch.long, device=device),
        )
        for first, rows in zip(
            range(0, len(bank), bank_chunk), bank.split(bank_chunk), strict=True
        ):
            similarity = part @ F.normalize(rows.to(part), dim=1).T
            if own:
                place = torch.arange(start, start + len(part), device=device) - first
                here = ((place >= 0) & (place < len(rows))).nonzero()[:, 0]
                similarity[here, place[here]] = -torch.inf
            value, index = similarity.topk(min(k, len(rows)), dim=1)
            value = torch.cat([best[0], value], dim=1)
            index = torch.cat([best[1], index + first], dim=1)
            value, order = value.topk(min(k, value.shape[1]), dim=1)
            best = value, index.gather(1, order)
        found.append(tuple(x.to(queries.device) for x in best))
    similarities, indices = zip(*found, strict=True)
    return torch.cat(similarities), torch.cat(indices)


def vote(
    similarity: Tensor, labels: Tensor, classes: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """Ranking and shares of the votes, (Q, classes), from the neighbours' (Q, k) similarities and
    labels.

    In float64, and as shares, which no temperature makes overflow.
    """
    votes = (similarity.double() / temperature).softmax(1)
    shares = votes.new_zeros(len(votes), classes).scatter_add_(1, labels, votes)
    return shares.argsort(dim=1, descending=True, stable=True), shares


def accuracy(ranking: Tensor, labels: Tensor, top: int = 1) -> float:
    """Share of rows, in percent, whose label is among the first `top` of the (Q, C) ranking."""
    return (ranking[:, :top] == labels[:, None]).any(1).double().mean().item() * 100


class Monitor:
    """kNN Top-1 during pretraining, on at most 10,000 training and 2,000 test images.

    Watches whether anything is learned; selects nothing. Where the source has no labels,
    `missing` says why and there is nothing to call.
    """

    K, BANK, QUERIES = 20, 10_000, 2_000

    def __init__(self, source: str, given: Input, **columns: str | None) -> None:
        self.given, self.missing = given, ""
        self.splits: tuple[Images, ...] = ()
        try:
            train, test = open_train_test(source, **columns)
            self.splits = thin(train, self.BANK), thin(test, self.QUERIES)
        except cli.UserError as error:
            self.missing = str(error)

    @classmethod
    def of_run(cls, run: Run, given: Input, columns: dict[str, str | None]) -> "Monitor | None":
        """The monitor of a run on its own source; None if unwanted or without labels."""
        if not run.config.knn_every:
            return None
        monitor = cls(run.config.data, given, **columns)
        if monitor.missing:
            run.say(f"no kNN monitor: {monitor.missing}")
        return None if monitor.missing else monitor

    def __call__(self, encoder: nn.Module, device: torch.device | str) -> float:
        """Top-1 in percent; the encoder is left in the mode in which it was."""
        mode = encoder.training
        encoder.eval()
        try:
            (bank, labels), (queries, truth) = (
                extract(encoder, split, self.given, device, progress=False) for split in self.splits
            )
        finally:
            encoder.train(mode)
        ranking, _ = predict(
            queries, bank, labels, classes=int(labels.max()) + 1, k=self.K, temperature=0.1
        )
        return accuracy(ranking, truth)


def thin(images: Images, count: int) -> Images:
    """At most `count` images, evenly spaced."""
    step = -(-len(images) // count)
    return images if step == 1 else take(images, torch.arange(len(images)) % step == 0, "thinned")


def judge(subject: Subject, settings: Settings) -> None:
    train, test = subject.opened()
    began = time.perf_counter()
    bank, labels = subject.extract(train)
    queries, truth = (bank, labels) if test is None else subject.extract(test)
    similarity, index = nearest(
        queries, bank, max(settings.k), own=test is None, device=subject.device
    )
    for k, temperature in itertools.product(settings.k, settings.temperature):
        ranking, _ = vote(similarity[:, :k], labels[index[:, :k]], len(train.classes), temperature)
        top1 = accuracy(ranking, truth)
        other = "" if temperature == 0.1 else f"-T{temperature:g}"
        record(
            subject,
            f"knn{k}{other}{subject.encoder.suffix}",
            top1=top1,
            counts=(len(bank), len(truth)),  # without undecodable images
            top5=accuracy(ranking, truth, 5) if len(train.classes) > 5 else None,
            interval=confidence(top1, len(truth)),
            k=k,
            temperature=temperature,
            judged_on="train, leave-one-out" if test is None else None,
            features=bank.shape[1],
            seconds=time.perf_counter() - began,
        )


def main() -> None:
    settings = cli.check_ranges(tyro.cli(Settings, prog="python -m eval.knn", description=__doc__))
    s = settings
    columns = (s.image_column, s.label_column)
    for subject in subjects(s.run, s.weights, s.baselines, s.data, s.layer, columns=columns):
        judge(subject, settings)


if __name__ == "__main__":
    cli.run(main)
