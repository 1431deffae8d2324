"""Weighted k-nearest-neighbour classification of features, which needs no training or tuning.

    python -m eval.knn RUN
    python -m eval.knn RUN --baselines random pixels --k 20 200 --temperature 0.07 0.1

Protocol: cosine similarity s to every training image; the k nearest vote for their class with
weight exp(s / T). This is the monitor of MoCo's official notebook (k 200, T 0.1), after arXiv
1805.01978 Sec. 3.4, but on the representation h, before any head. SimCLR's and BYOL's papers report
no kNN. A source without a test split is judged on its training images, none of which is its own
neighbour.
"""

import itertools
import sys
import time
from collections.abc import Callable
from functools import partial

from common import cli
from eval.settings import KNN as Settings

if __name__ == "__main__":  # a mistake is reported before torch is imported
    arguments = cli.run(cli.parse_settings, Settings, sys.argv[1:], "python -m eval.knn", __doc__)

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.data import ImageSplit, subset
from common.encoders import evaluation_mode
from common.errors import UserError
from common.plan import Plan
from common.run import Run
from eval.encoder import Preprocess
from eval.features import extract
from eval.processes import gather, place, share
from eval.results.record import confidence, record, settings_of
from eval.splits import open_train_test
from eval.subjects import Subject, subjects


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
    """Classify `queries`, (Q, F), by the `k` nearest of `bank`, (N, F), with `labels`, (N,).

    Returns:
        The classes from most to least likely, and their shares of the votes, (Q, classes) each.
    """
    similarity, index = nearest(queries, bank, k, chunk=chunk)
    return vote(similarity, labels[index], classes, temperature)


def nearest(
    queries: Tensor,
    bank: Tensor,
    k: int,
    *,
    exclude_self: bool = False,
    first: int = 0,
    chunk: int = 1024,
    bank_chunk: int = 16_384,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """The `k` features of `bank`, (N, F), nearest to each of `queries`, (Q, F).

    Features are normalised here. Both are processed in chunks, so that at most chunk x bank_chunk
    similarities are in memory.

    Args:
        exclude_self: the queries are rows of the bank, and none is its own neighbour.
        first: the row of the first query.
        device: where to compute; default: where the queries are.

    Returns:
        Cosine similarities and indices into the bank, (Q, k) each, the nearest first, on the
        queries' device; k is at most the number of possible neighbours.
    """
    k, device = min(k, len(bank) - exclude_self), device or queries.device
    results = []
    for i, part in enumerate(queries.split(chunk)):
        start = i * chunk
        part = F.normalize(part.to(device), dim=1)
        best = (
            part.new_empty(len(part), 0),
            torch.empty(len(part), 0, dtype=torch.long, device=device),
        )
        for begin, rows in zip(
            range(0, len(bank), bank_chunk), bank.split(bank_chunk), strict=True
        ):
            similarity = part @ F.normalize(rows.to(part), dim=1).T
            if exclude_self:
                column = torch.arange(start, start + len(part), device=device) + first - begin
                inside = ((column >= 0) & (column < len(rows))).nonzero()[:, 0]
                similarity[inside, column[inside]] = -torch.inf
            value, index = similarity.topk(min(k, len(rows)), dim=1)
            value = torch.cat([best[0], value], dim=1)
            index = torch.cat([best[1], index + begin], dim=1)
            value, order = value.topk(min(k, value.shape[1]), dim=1)
            best = value, index.gather(1, order)
        results.append(tuple(x.to(queries.device) for x in best))
    similarities, indices = zip(*results, strict=True)
    return torch.cat(similarities), torch.cat(indices)


def vote(
    similarity: Tensor, labels: Tensor, classes: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """Classes ranked by their shares of the votes, and these shares, (Q, classes) each.

    In float64, and by softmax, so that no temperature overflows.

    Args:
        similarity, labels: (Q, k), of the neighbours.
    """
    votes = (similarity.double() / temperature).softmax(1)
    shares = votes.new_zeros(len(votes), classes).scatter_add_(1, labels, votes)
    return shares.argsort(dim=1, descending=True, stable=True), shares


def accuracy(ranking: Tensor, labels: Tensor, top: int = 1) -> float:
    """Share of rows, in percent, whose label is among the first `top` of the (Q, C) ranking."""
    return (ranking[:, :top] == labels[:, None]).any(1).double().mean().item() * 100


class OnlineKNN:
    """kNN Top-1 during pretraining, on at most 10,000 training and 2,000 test images.

    It shows whether anything is learned, and selects nothing. Where the source has no labels,
    `missing` says why, and the object must not be called.
    """

    K, BANK, QUERIES = 20, 10_000, 2_000

    def __init__(self, plan: Plan, preprocess: Preprocess) -> None:
        self.preprocess, self.missing = preprocess, ""
        self.splits: tuple[ImageSplit, ...] = ()
        try:
            train, test = open_train_test(plan)
            self.splits = subsample(train, self.BANK), subsample(test, self.QUERIES)
        except UserError as error:
            self.missing = str(error)

    def __call__(self, encoder: nn.Module, device: torch.device | str) -> float:
        """Top-1 in percent; the encoder's training mode is restored."""
        with evaluation_mode(encoder):
            (bank, labels), (queries, truth) = (
                extract(encoder, split, self.preprocess, device, progress=False)
                for split in self.splits
            )
        ranking, _ = predict(
            queries, bank, labels, classes=int(labels.max()) + 1, k=self.K, temperature=0.1
        )
        return accuracy(ranking, truth)


def online_knn(
    run: Run, preprocess: Preprocess, **networks: nn.Module
) -> dict[str, Callable[[], float]]:
    """The measurements of a run on its own source by name; none if unwanted or without labels."""
    if not run.run_cfg.knn_every:
        return {}
    assert run.images.plan
    knn = OnlineKNN(run.images.plan, preprocess)
    if knn.missing:
        run.print(f"no online kNN: {knn.missing}")
        return {}
    device = run.accelerator.device
    return {name: partial(knn, network, device) for name, network in networks.items()}


def subsample(images: ImageSplit, count: int) -> ImageSplit:
    """At most `count` images, evenly spaced."""
    step = -(-len(images) // count)
    return images if step == 1 else subset(images, torch.arange(len(images)) % step == 0, "thinned")


def judge(subject: Subject, settings: Settings) -> None:
    train, test = subject.labelled()
    start = time.perf_counter()
    bank, labels = subject.extract(train)
    queries, truth = (bank, labels) if test is None else subject.extract(test)
    mine = share(len(queries), *place(subject.accelerator))
    found = nearest(
        queries[mine],
        bank,
        max(settings.k),
        exclude_self=test is None,
        first=mine.start,
        device=subject.device,
    )
    similarity, index = (gather(rows, len(queries), subject.accelerator) for rows in found)
    for k, temperature in itertools.product(settings.k, settings.temperature):
        ranking, _ = vote(similarity[:, :k], labels[index[:, :k]], len(train.classes), temperature)
        top1 = accuracy(ranking, truth)
        top5 = accuracy(ranking, truth, 5) if len(train.classes) > 5 else None
        record(
            subject,
            task="knn",
            protocol="weighted",
            metrics={"top1": top1, "top5": top5},
            counts=(len(bank), len(truth)),  # without undecodable images
            interval=confidence(top1, len(truth)),
            settings=settings_of(settings, k=k, temperature=temperature, features=bank.shape[1]),
            deviations=["each training image left out in turn"] if test is None else [],
            seconds=time.perf_counter() - start,
        )


def main(settings: Settings) -> None:
    for subject in subjects(settings):
        judge(subject, settings)


if __name__ == "__main__":
    cli.run(main, arguments)
