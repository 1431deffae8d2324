"""Weighted k-nearest-neighbour classification of features: no training, so nothing to tune.

    python -m eval.knn RUN
    python -m eval.knn RUN --baselines random pixels --k 200 --temperature 0.1

Protocol: cosine similarity s to every training image; the k nearest vote for their class with
weight exp(s / T). This is the monitor of MoCo's official notebook (k 200, T 0.1), after arXiv
1805.01978 Sec. 3.4, but on the representation h, before any head. SimCLR's and BYOL's papers report
no kNN.
"""

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
    layer: int = 0  # 0: representation h; k: the head's k-th hidden layer; -1: the head's output
    k: tuple[int, ...] = (20, 200)  # neighbours that vote; one result for each
    temperature: float = 0.1  # T of the votes' weights


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

    Features are normalised here. The similarity matrix is never whole in memory.

    Returns:
        (Q, classes) classes from most to least likely, and the (Q, classes) scores.
    """
    bank, k = F.normalize(bank, dim=1), min(k, len(bank))
    parts = []
    for part in queries.split(chunk):
        similarity, index = (F.normalize(part, dim=1) @ bank.T).topk(k, dim=1)
        votes = torch.exp(similarity / temperature)
        score = votes.new_zeros(len(part), classes)
        parts.append(score.scatter_add_(1, labels[index], votes))
    scores = torch.cat(parts)
    return scores.argsort(dim=1, descending=True, stable=True), scores


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
    train, test = subject.splits()
    began = time.perf_counter()
    bank, labels = subject.extract(train)
    queries, truth = subject.extract(test)
    for k in settings.k:
        ranking, _ = predict(
            queries,
            bank,
            labels,
            classes=len(train.classes),
            k=k,
            temperature=settings.temperature,
        )
        top1 = accuracy(ranking, truth)
        record(
            subject,
            f"knn{k}{subject.encoder.suffix}",
            top1=top1,
            top5=accuracy(ranking, truth, 5) if len(train.classes) > 5 else None,
            interval=confidence(top1, len(truth)),
            k=k,
            temperature=settings.temperature,
            features=bank.shape[1],
            seconds=time.perf_counter() - began,
        )


def main() -> None:
    settings = cli.check_ranges(tyro.cli(Settings, prog="python -m eval.knn", description=__doc__))
    s = settings
    for subject in subjects(s.run, s.weights, s.baselines, s.data, s.layer):
        judge(subject, settings)


if __name__ == "__main__":
    cli.run(main)
