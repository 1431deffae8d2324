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
import warnings
from collections.abc import Callable
from functools import partial

from common import cli
from eval.settings import KNN as Settings

if __name__ == "__main__":  # a mistake is reported before torch is imported
    arguments = cli.run(cli.parse_settings, Settings, sys.argv[1:], "python -m eval.knn", __doc__)

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.data import ImageSplit, subset
from common.encoders import evaluation_mode
from common.errors import UserError
from common.launch import fast_bfloat16
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
    chunk: int = 512,
) -> tuple[Tensor, Tensor]:
    """Classify `queries`, (Q, F), by the `k` nearest of `bank`, (N, F), with `labels`, (N,).

    Returns:
        The classes from most to least likely, and their shares of the votes, (Q, classes) each.
    """
    similarity, index = nearest(queries, bank, k, chunk=chunk)
    return vote(similarity, labels[index], classes, temperature)


@torch.no_grad()
def nearest(
    queries: Tensor,
    bank: Tensor,
    k: int,
    *,
    exclude_self: bool = False,
    first: int = 0,
    chunk: int = 512,
    bank_chunk: int = 65_536,
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
    k, device = min(k, len(bank) - exclude_self), torch.device(device or queries.device)
    none = (
        queries.new_empty(0, k, device=device),
        torch.empty(0, k, dtype=torch.long, device=device),
    )
    best: dict[int, tuple[Tensor, Tensor]] = {}  # of each chunk of queries
    for begin in range(0, len(bank), bank_chunk):
        rows = F.normalize(bank[begin : begin + bank_chunk].to(device, queries.dtype), dim=1)
        fits = device.type == "cpu" and rows.dtype in (torch.float32, torch.float64)
        screen = Screen(rows) if fits and fast_bfloat16() else None
        for start in range(0, len(queries), chunk):
            part = F.normalize(queries[start : start + chunk].to(device), dim=1)
            itself = torch.full((len(part),), -1, device=device)  # none
            if exclude_self:
                itself = torch.arange(start, start + len(part), device=device) + first - begin
            if screen:
                value, index = screen.topk(part, k, itself)
            else:
                value, index = topk(part @ rows.T, k, itself)
            found = value, index + begin
            if start in best:
                value, index = (torch.cat(both, 1) for both in zip(best[start], found, strict=True))
                found = largest(value, index, k)
            best[start] = found
    values, indices = zip(none, *best.values(), strict=True)
    return torch.cat(values).to(queries.device), torch.cat(indices).to(queries.device)


def topk(similarity: Tensor, k: int, itself: Tensor) -> tuple[Tensor, Tensor]:
    """The k largest of each row of (Q, N), the largest first, or all N, and their columns.

    Args:
        itself: (Q,) columns to leave out; those below 0 or from N on are none.
    """
    leave_out(similarity, itself)
    return similarity.topk(min(k, similarity.shape[1]))


def largest(value: Tensor, index: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, the largest first and the first of equals, with their indices."""
    value, order = value.sort(dim=1, descending=True, stable=True)
    return value[:, :k], index.gather(1, order[:, :k])


def leave_out(similarity: Tensor, itself: Tensor) -> None:
    """Set the columns `itself` to -inf, in place."""
    inside = ((itself >= 0) & (itself < similarity.shape[1])).nonzero()[:, 0]
    similarity[inside, itself[inside]] = -torch.inf


class Screen:
    """Finds neighbours on a CPU by a product in bfloat16, and compares only these in full.

    Where the CPU has instructions for it, the product takes a fifth of a float32 one's time. Every
    row is kept that may be among the k nearest whatever was rounded, which is bounded, and the
    similarities to these are computed in full precision, each by itself: the result is that of a
    full product, and does not depend on the chunks. A query that keeps too many rows, as where all
    are alike, is compared with all of them.

    With u a query, b a row, m the rows' mean and c = b - m, the order of u.b over the rows is that
    of u.c, and c is shorter. With u' and c' the rounded ones, by Cauchy and Schwarz

        |u.c - u'.c'| <= |u - u'| |c'| + |u| |c - c'|,

    where the norms of these errors are computed, not estimated. Sums of F terms add F eps at most,
    in the product and in the full similarity, and the product is rounded once more.

    Args:
        rows: (N, F) of the bank, of unit length.
    """

    MOST = 1 / 16  # of the rows that a query may keep: with more of them a full product is faster

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self.rounded = torch.empty_like(rows, dtype=torch.bfloat16)
        self.length, self.error, mean = 0.0, 0.0, rows.mean(0)
        for some, rounded in zip(rows.split(512), self.rounded.split(512), strict=True):  # in cache
            centred = some - mean
            rounded.copy_(centred)
            self.length = max(self.length, longest(rounded))
            self.error = max(self.error, longest(centred - rounded))

    def bound(self, queries: Tensor, rounded: Tensor) -> Tensor:
        """(Q, 1): the most that u'.c', not yet rounded, and u.b, as computed, differ but for u.m.

        Args:
            queries, rounded: (Q, F), u of unit length and u'.
        """
        sums = (2 + queries.shape[1]) * (
            torch.finfo(torch.float32).eps + torch.finfo(queries.dtype).eps
        )
        error = (queries - rounded).norm(dim=1, keepdim=True) * self.length
        return 1.01 * (error + self.error + sums)  # the norms are rounded, too

    def topk(self, queries: Tensor, k: int, itself: Tensor) -> tuple[Tensor, Tensor]:
        """As `topk` of the similarities to (Q, F) unit queries."""
        count, most = len(self.rows), int(self.MOST * len(self.rows))
        if not 0 < k <= most:
            return topk(queries @ self.rows.T, k, itself)
        rounded = queries.bfloat16()
        product = rounded @ self.rounded.T
        leave_out(product, itself)
        # The k-th largest of the maxima of groups: so many columns or more are as large. A group's
        # columns lie far apart, so that neighbours, often of one class, are in different groups.
        groups = count // max(1, count // (4 * k))
        maxima = product[:, : count // groups * groups].unflatten(1, (-1, groups)).amax(1)
        kth = groups - k  # NumPy's partition takes a tenth of the time of torch's kthvalue
        least = torch.from_numpy(np.partition(maxima.float().numpy(), kth)[:, kth, None])
        # What is nearer than the k-th of them in full, after twice the bound and two roundings
        eps = torch.finfo(torch.bfloat16).eps / 2  # it rounds to the nearest
        least = least - eps * least.abs() - 2 * self.bound(queries, rounded)
        least = least - eps * least.abs()
        near = product >= least.bfloat16()
        counts = near.sum(1)
        odd = (counts < k) | (counts > most)  # a query is NaN, or has many rows alike
        near[odd], counts[odd] = False, 0
        row, column = near.nonzero(as_tuple=True)
        place = torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]
        value = queries.new_full((len(queries), max(k, int(counts.max()))), -torch.inf)
        index = column.new_zeros(value.shape)
        value[row, place] = similarities(queries, self.rows, counts, column)
        index[row, place] = column
        value, index = largest(value, index, k)
        if odd.any():
            value[odd], index[odd] = topk(queries[odd] @ self.rows.T, k, itself[odd])
        return value, index


def similarities(queries: Tensor, rows: Tensor, counts: Tensor, column: Tensor) -> Tensor:
    """(n,) products of queries, (Q, F), with rows, (N, F), each computed by itself.

    Args:
        counts: (Q,), with the sum n, of the `column`s, (n,), that belong to each query.
    """
    ends = F.pad(counts.cumsum(0), (1, 0))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse")  # that it is in beta
        wanted = torch.sparse_csr_tensor(
            ends, column, queries.new_zeros(len(column)), (len(queries), len(rows))
        )
        return torch.sparse.sampled_addmm(wanted, queries, rows.T, beta=0.0).values()


def longest(rows: Tensor) -> float:
    """The largest norm of the rows."""
    return rows.float().norm(dim=1).max().item()


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
