"""Transfer: logistic regression on frozen features, for one source after another.

    python -m eval.transfer RUN --data SOURCE [SOURCE ...]
    python -m eval.transfer RUN --data pets --metric mean-per-class

Protocol (arXiv 2002.05709 App. B.8, arXiv 2006.07733 App. D, after arXiv 1805.08974): there is no
augmentation; the short side is resized to the encoder's size, bicubic, and the centre is cut out.
The classifier is an L2-regularised multinomial logistic regression by L-BFGS. The regularisation is
one of 45 values, log-spaced in [1e-6, 1e5], chosen on the source's own validation images, or else
on a tenth of the training images; then the classifier is fitted again to both. The encoder is in
evaluation mode. A command that was stopped resumes when it is given again.

Where images have several labels (VOC 2007: a column of lists), each class has a binary classifier,
and the measure is the mean over classes of the 11-point average precision.

PAPER: BYOL holds out a tenth of Food-101, CIFAR-10, CIFAR-100 and Birdsnap, and a fifth of SUN397,
Cars, Pets and Caltech-101; here it is a tenth. SimCLR cuts out the centre, BYOL does not say so.

PAPER: neither paper says what the values multiply; here the objective is the summed cross entropy
plus value / 2 times the squared weights, without biases (scikit-learn's with C = 1 / value).
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

from common import cli
from eval.settings import Transfer as Settings

if __name__ == "__main__":  # a mistake is reported before torch is imported
    arguments = cli.run(
        cli.parse_settings, Settings, sys.argv[1:], "python -m eval.transfer", __doc__
    )

import torch
import torch.nn.functional as F
from torch import Tensor

from common.data import among, generator
from common.errors import UserError
from eval.identity import fingerprint
from eval.knn import accuracy
from eval.results import published
from eval.results.published import data_set
from eval.results.record import Result, confidence, record, record_name, settings_of
from eval.splits import hold_out
from eval.subjects import Subject, subjects
from eval.unfinished import Unfinished

VALUES = tuple(torch.logspace(-6, 5, 45, dtype=torch.float64).tolist())


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
        features: (N, F).
        labels: (N,), or (N, C) bool: whether an image is of a class, each class by itself.
        start: initial weights; default: zeros.
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
        logits = inputs @ weight
        loss = F.cross_entropy(logits, labels) if labels.ndim == 1 else each_class(logits, labels)
        loss = loss + penalty
        loss.backward()
        return loss

    optimizer.step(objective)
    return weight.detach()


def each_class(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross entropy of (N, C) logits and labels: the sum over classes, mean over images."""
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits), reduction="sum") / len(
        labels
    )


def path(
    features: Tensor,
    labels: Tensor,
    classes: int,
    iterations: int,
    first: int = 0,
    weight: Tensor | None = None,
) -> Iterator[tuple[float, Tensor]]:
    """(value, weights) from the strongest regularisation down, each fit starting at the last one's.

    Args:
        first, weight: the first value, counted from the strongest, and the weights before it.
    """
    for value in VALUES[::-1][first:]:
        weight = fit(features, labels, classes, value, start=weight, iterations=iterations)
        yield value, weight


def scores(features: Tensor, weight: Tensor) -> Tensor:
    """(N, F) features to (N, C) logits."""
    return F.pad(features, (0, 1), value=1.0) @ weight


# ---- measures: (N, C) scores and labels to percent -----------------------------------------------


def top1(scores: Tensor, labels: Tensor) -> float:
    return 100 * (scores.argmax(1) == labels).double().mean().item()


def mean_per_class(scores: Tensor, labels: Tensor) -> float:
    """The mean, over the classes that are present, of the share of correct predictions."""
    correct = scores.argmax(1) == labels
    shares = [correct[labels == c].double().mean().item() for c in labels.unique()]
    return 100 * sum(shares) / len(shares)


def map11(scores: Tensor, labels: Tensor) -> float:
    """The mean, over the classes that are present, of VOC 2007's average precision.

    A class's average precision is the mean, over the recalls 0, 0.1, ..., 1, of the best precision
    at that recall or a higher one. The result is 0 where no class is present, which can happen in
    a few images that are held out or drawn.

    Args:
        labels: (N, C) bool.
    """
    precisions = []
    for score, positive in zip(scores.T, labels.T, strict=True):
        if positive.any():
            hits = positive[score.argsort(descending=True, stable=True)].double().cumsum(0)
            precision = hits / torch.arange(1, len(hits) + 1).to(hits)
            reached = (10 * hits / hits[-1] + 1e-9).floor()  # recall in tenths: 3 of 10 reach 0.3
            best = [precision[reached >= tenth].max() for tenth in range(11)]
            precisions.append(torch.stack(best).mean().item())
    return 100 * sum(precisions) / max(1, len(precisions))


Measure = Callable[[Tensor, Tensor], float]
METRICS: dict[str, Measure] = {"top1": top1, "mean-per-class": mean_per_class, "map11": map11}


def interval(measure: Measure, scores: Tensor, labels: Tensor, draws: int = 200) -> float:
    """Half the width of the 95 % interval: Wilson's, or by resampling the images (bootstrap)."""
    if measure is top1:
        return confidence(top1(scores, labels), len(labels))
    values = []
    for i in range(draws):
        index = torch.randint(len(labels), (len(labels),), generator=generator("bootstrap", i))
        values.append(measure(scores[index], labels[index]))
    return 1.959964 * torch.tensor(values).std().item()


# ---- the command ---------------------------------------------------------------------------------


def metric_of(settings: Settings, source: str, labels: Tensor) -> str:
    """The measure asked for, or that of the data set.

    Raises:
        UserError: it needs one label for each image and there are several, or the reverse.
    """
    default = "map11" if labels.ndim == 2 else "top1"
    metric = settings.metric or published.METRICS.get(data_set(source), default).replace("_", "-")
    if (metric == "map11") != (labels.ndim == 2):
        labelled = "several labels" if labels.ndim == 2 else "one label"
        raise UserError(f"--metric {metric}: an image of {source} has {labelled}")
    return metric


def judge(subject: Subject, settings: Settings) -> Result:
    """The record of the judgement, which is also printed and, for a run, written."""
    before = fingerprint(subject.network)
    train, test = subject.splits()
    assert train.labels is not None
    metric = metric_of(settings, subject.source, train.labels)
    measure, classes, device = METRICS[metric], len(train.classes), subject.device
    given = settings_of(settings, chosen_by=metric)
    name = record_name(subject, "transfer", "logistic", given)
    preprocess = replace(subject.encoder.input, crop=1.0, interpolation="bicubic")
    here = replace(settings, run="", data=(), workers=0)  # without what makes no difference
    validation = subject.validation()
    parts = (train, test) if validation is None else (train, test, validation)
    key = f"{[subject.digest(part, preprocess) for part in parts]} {here}"
    unfinished = Unfinished(subject.folder, name, key, subject.accelerator)
    (bank, labels), (queries, truth) = (subject.extract(part, preprocess) for part in (train, test))
    if validation is None:
        held_out = hold_out(len(bank), settings.seed)
        order = torch.cat([torch.arange(len(bank))[~among(held_out, len(bank))], held_out])
        count, features, targets = len(bank) - len(held_out), bank[order], labels[order]
    else:
        more, more_labels = subject.extract(validation, preprocess)
        count, features = len(bank), torch.cat([bank, more])
        targets = torch.cat([labels, more_labels])
    if fingerprint(subject.network) != before:
        raise RuntimeError("the encoder changed: not a judgement of frozen features")
    features, targets = features.to(device), targets.to(device)

    state = unfinished.state or {"best": -1.0, "value": 0.0, "weight": None, "last": None}
    best, value, weight, last = (state[name] for name in ("best", "value", "weight", "last"))

    def fits(first: int) -> Iterator[tuple[float, Tensor]]:
        start = None if last is None else last.to(device)
        return path(features[:count], targets[:count], classes, settings.iterations, first, start)

    def progress() -> dict[str, object]:
        return {"best": best, "value": value, "weight": weight, "last": last}

    first = state.get("step", 0)
    fitted = fits(first)
    for _ in unfinished.steps(len(VALUES), "transfer", progress, first):
        this_value, last = next(fitted)
        score = measure(scores(features[count:], last).cpu(), targets[count:].cpu())
        if score > best:  # so that the strongest of equals is chosen
            best, value, weight = score, this_value, last
    start = weight.to(device)
    weight = fit(features, targets, classes, value, start=start, iterations=settings.iterations)
    logits = scores(queries.to(device), weight).cpu()
    multilabel = truth.ndim == 2
    figures = {metric.replace("-", "_"): measure(logits, truth)}
    if not multilabel:
        figures |= {"top1": top1(logits, truth), "mean_per_class": mean_per_class(logits, truth)}
    if not multilabel and classes > 5:
        figures["top5"] = accuracy(logits.argsort(1, descending=True), truth, 5)
    chosen_on = "a tenth of train" if validation is None else "validation"
    result = record(
        subject,
        task="transfer",
        protocol="logistic",
        metrics=figures,
        metric=metric.replace("-", "_"),
        counts=(len(features), len(truth)),
        interval=interval(measure, logits, truth),
        settings=given
        | {"regularisation": value, "chosen_on": chosen_on, "validation": round(best, 3)},
        seconds=unfinished.seconds(),
    )
    unfinished.remove()
    return result


def main(settings: Settings) -> None:
    for source in settings.data:
        for subject in subjects(settings, source=source, multilabel=True):
            judge(subject, settings)


if __name__ == "__main__":
    cli.run(main, arguments)
