"""Transfer: logistic regression on frozen features, over one source after another.

    python -m eval.transfer RUN --data SOURCE [SOURCE ...]
    python -m eval.transfer RUN --data pets --metric mean-per-class

Protocol (arXiv 2002.05709 App. B.8, arXiv 2006.07733 App. D, after arXiv 1805.08974): no
augmentation; the short side is resized to the encoder's size, bicubic, and the centre is cut out;
L2-regularised multinomial logistic regression by L-BFGS. The regularisation is one of 45 values,
log-spaced in [1e-6, 1e5], chosen on the source's own validation images, else on a fifth of the
training images; then the classifier is fitted again to both. The encoder is in evaluation mode.

PAPER: neither paper says what the values multiply; here the objective is the summed cross entropy
plus value / 2 times the squared weights, biases left out (scikit-learn's with C = 1 / value).
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from tqdm import tqdm

from common import cli
from common.data import generator, open_validation
from eval.features import fingerprint
from eval.knn import accuracy
from eval.results import Subject, confidence, record, subjects

VALUES = tuple(torch.logspace(-6, 5, 45, dtype=torch.float64).tolist())


@dataclass(frozen=True)
class Settings:
    """Logistic regression on frozen features of each source, beside baselines if asked."""

    run: Annotated[str, tyro.conf.Positional] = ""  # a run's folder or an encoder.safetensors
    weights: str = ""  # judge these instead: random, pixels, random:ARCH, torchvision:ARCH[=FILE]
    baselines: tuple[str, ...] = ()  # judge these as well: random, pixels
    data: tuple[str, ...] = ("",)  # sources to judge on; default: that of the run
    layer: int = 0  # 0: representation h; k: the head's k-th hidden layer; -1: the head's output
    metric: Literal["top1", "mean-per-class"] = "top1"  # the latter for Aircraft, Pets, Caltech-101
    # and Flowers (arXiv 2006.07733 App. D)
    iterations: int = 200  # of L-BFGS, at most, for each value
    seed: int = 1  # of the images held out where the source has no validation split


def fit(
    features: Tensor,
    labels: Tensor,
    classes: int,
    value: float,
    *,
    start: Tensor | None = None,
    iterations: int = 200,
) -> Tensor:
    """(F + 1, C) weights, the last row the bias, that minimise the objective at `value`.

    Args:
        features, labels: (N, F) and (N,).
        start: weights to begin at; default: zeros.
    """
    inputs = F.pad(features, (0, 1), value=1.0)
    weight = inputs.new_zeros(inputs.shape[1], classes) if start is None else start.clone()
    weight.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight],
        max_iter=iterations,
        tolerance_grad=1e-6,
        tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        penalty = 0.5 * value / len(inputs) * weight[:-1].square().sum()
        loss = F.cross_entropy(inputs @ weight, labels) + penalty
        loss.backward()
        return loss

    optimizer.step(objective)
    return weight.detach()


def path(
    features: Tensor, labels: Tensor, classes: int, iterations: int
) -> Iterator[tuple[float, Tensor]]:
    """(value, weights) from the strongest regularisation down, each begun at the one before."""
    weight = None
    for value in tqdm(VALUES[::-1], "transfer", leave=False, disable=None):
        weight = fit(features, labels, classes, value, start=weight, iterations=iterations)
        yield value, weight


def scores(features: Tensor, weight: Tensor) -> Tensor:
    """(N, F) features to (N, C) logits."""
    return F.pad(features, (0, 1), value=1.0) @ weight


def mean_per_class(ranking: Tensor, labels: Tensor) -> float:
    """The mean over the classes present of the share, in percent, that is right in each."""
    right = ranking[:, 0] == labels
    return (
        100
        * sum(right[labels == c].double().mean().item() for c in labels.unique())
        / len(labels.unique())
    )


METRICS = {"top1": accuracy, "mean-per-class": mean_per_class}


def judge(subject: Subject, settings: Settings) -> None:
    network = subject.encoder.network.to(subject.device)
    began, before = time.perf_counter(), fingerprint(network)
    train, test = subject.splits()
    given = replace(subject.encoder.input, crop=1.0, interpolation="bicubic")
    (bank, labels), (queries, truth) = (subject.extract(part, given) for part in (train, test))
    own = open_validation(subject.source, train.classes, **subject.columns)
    if own is None:
        order = torch.randperm(len(bank), generator=generator(settings.seed, "transfer"))
        held_out, kept = order[: len(bank) // 5], order[len(bank) // 5 :]
        fitted, known, chosen_on, chosen = (
            bank[kept],
            labels[kept],
            bank[held_out],
            labels[held_out],
        )
    else:
        fitted, known = bank, labels
        chosen_on, chosen = subject.extract(own, given)
    if fingerprint(network) != before:
        raise RuntimeError("the encoder changed: not a judgement of frozen features")
    metric, classes, device = METRICS[settings.metric], len(train.classes), subject.device
    both, names = torch.cat([fitted, chosen_on]).to(device), torch.cat([known, chosen]).to(device)
    fitted, known = both[: len(fitted)], names[: len(known)]
    best, value, weight = -1.0, 0.0, torch.empty(0)
    for tried, found in path(fitted, known, classes, settings.iterations):
        ranking = scores(both[len(fitted) :], found).argsort(1, descending=True)
        if (reached := metric(ranking, names[len(known) :])) > best:  # of equals the strongest
            best, value, weight = reached, tried, found
    weight = fit(both, names, classes, value, start=weight, iterations=settings.iterations)
    ranking = scores(queries.to(device), weight).argsort(1, descending=True).cpu()
    top1 = accuracy(ranking, truth)
    record(
        subject,
        f"transfer{subject.encoder.suffix}",
        top1=top1,
        counts=(len(both), len(truth)),
        top5=accuracy(ranking, truth, 5) if classes > 5 else None,
        interval=confidence(top1, len(truth)),
        mean_per_class=round(mean_per_class(ranking, truth), 3),
        metric=settings.metric,  # by which the value was chosen
        regularisation=value,
        chosen_on="a fifth of train" if own is None else "validation",
        validation=round(best, 3),
        probe_seed=settings.seed,
        seconds=time.perf_counter() - began,
    )


def main() -> None:
    settings = cli.check_ranges(
        tyro.cli(Settings, prog="python -m eval.transfer", description=__doc__)
    )
    s = settings
    for source in s.data:
        for subject in subjects(s.run, s.weights, s.baselines, source, s.layer):
            judge(subject, settings)


if __name__ == "__main__":
    cli.run(main)
