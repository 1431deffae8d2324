"""Linear evaluation: a linear classifier on a frozen encoder.

    python -m eval.linear RUN                        # the protocol of the run's method
    python -m eval.linear RUN --protocol features    # one pass over the images, then seconds
    accelerate launch --num_processes 8 -m eval.linear RUN --precision bf16    # on eight GPUs

`simclr`, `moco`, `moco-v3` and `byol` are the papers' protocols: in every epoch the images go
through the network with crop and flip. `features` is ours: features are computed once, without
augmentation; it is quick, and is never compared with a paper's figure. Where a protocol sweeps
learning rates, all are trained at once and one is chosen on held-out training images.

Top-1 is that of the last epoch. The encoder is in evaluation mode, and checked to be unchanged.
A command that was stopped resumes when it is given again. The figures do not depend on the number
of processes.
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from common import cli
from eval.settings import Linear as Settings

if __name__ == "__main__":  # a mistake is reported before torch is imported
    arguments = cli.run(
        cli.parse_settings, Settings, sys.argv[1:], "python -m eval.linear", __doc__
    )

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from common.data import ImageSplit, among, generator, subset
from eval.identity import fingerprint
from eval.knn import accuracy
from eval.processes import place
from eval.results.record import Result, changed, confidence, record, record_name, settings_of
from eval.splits import to_choose_on
from eval.subjects import Subject, subjects
from eval.training import Order, Speed, train
from eval.unfinished import Unfinished


@dataclass(frozen=True)
class Protocol:
    """How a linear classifier is trained: SGD with momentum 0.9 and no weight decay."""

    name: str
    rates: tuple[float, ...]  # at batch 256; one of several is chosen on held-out images
    batch_size: int
    epochs: int
    scaled: bool = True  # the rates grow with the batch
    partial: bool = False  # an epoch ends with a smaller batch, which otherwise is left out
    nesterov: bool = True
    milestones: tuple[float, ...] = ()  # fractions of training at which the rate falls tenfold
    init_std: float = 0.0  # of the normal initial weights; the biases start at 0
    augment: bool = True  # crop and flip through the network; False: features computed once

    def peaks(self) -> list[float]:
        """The rates at this batch size."""
        return [rate * (self.batch_size / 256 if self.scaled else 1) for rate in self.rates]

    def decay_at(self, step: int, steps: int) -> float:
        """The factor of the rates at a step: tenfold steps down, else a cosine to 0."""
        if self.milestones:
            return 0.1 ** sum(step >= share * steps for share in self.milestones)
        return 0.5 * (1 + math.cos(math.pi * step / steps))


# In all protocols the last epoch is reported, and an epoch ends at its last whole batch, where
# SimCLR's and BYOL's code lets a batch span two epochs.

# arXiv 2002.05709 App. B.6. PAPER/CODE: no weight decay in the paper, 1e-6 in the README's command.
SIMCLR = Protocol("simclr", rates=(0.1,), batch_size=4096, epochs=90)
# google-research/simclr README, "Linear evaluation" on CIFAR-10
SIMCLR_CIFAR = replace(SIMCLR, batch_size=512, epochs=100)
# arXiv 1911.05722 Sec. 4.1; facebookresearch/moco main_lincls.py: tenfold down at epochs 60 and 80,
# the rate is absolute, the last batch is smaller. CODE: it also keeps the best epoch on validation.
MOCO = Protocol(
    "moco",
    rates=(30.0,),
    batch_size=256,
    epochs=100,
    scaled=False,
    partial=True,
    nesterov=False,
    milestones=(0.6, 0.8),
    init_std=0.01,
)
# facebookresearch/moco-v3 main_lincls.py, of its ResNet-50. CODE: its cosine moves once an epoch.
MOCO_V3 = replace(
    MOCO, name="moco-v3", rates=(0.1,), batch_size=1024, epochs=90, scaled=True, milestones=()
)
# arXiv 2006.07733 App. C.1. PAPER/CODE: five rates in the paper, 0.2 alone in the code; batch 1024
# in the paper, 4096 as the code's default; 10,009 random images to choose on in the paper, the
# first 10,000 in the code. It starts from Haiku's initial weights, here from a normal(0.01): the
# problem is convex, so the solution does not depend on them.
RATES = (0.4, 0.3, 0.2, 0.1, 0.05)
BYOL = Protocol("byol", rates=RATES, batch_size=1024, epochs=80, init_std=0.01)
# Ours, on standardised features
FEATURES = Protocol(
    "features", rates=(0.01, 0.03, 0.1, 0.3, 1.0), batch_size=512, epochs=100, augment=False
)
PROTOCOLS = {p.name: p for p in (SIMCLR, MOCO, MOCO_V3, BYOL, FEATURES)}


def protocol_of(subject: Subject, settings: Settings) -> Protocol:
    """The protocol asked for, or that of the run's method; `features` where it has none.

    Pixels have no network to go through, and are always `features`.
    """
    known = subject.encoder.metadata
    name = settings.protocol or known.get("linear_protocol") or known.get("method", "")
    pixels = subject.encoder.name == "pixels"
    paper = FEATURES if pixels else PROTOCOLS.get(name, FEATURES)
    if paper is SIMCLR and subject.encoder.input.size <= 32:
        paper = SIMCLR_CIFAR
    return replace(
        paper,
        epochs=settings.epochs or paper.epochs,
        batch_size=settings.batch_size or paper.batch_size,
    )


# ---- the classifier ------------------------------------------------------------------------------


class Probe(nn.Module):
    """R linear classifiers, one for each learning rate, trained at once on the same batches.

    A class's weights and its logits lie together in memory: products and softmax over few classes
    are several times as fast on a CPU so.

    Args:
        features, classes: F and C of the R weights, (F + 1, C) each, whose last row is the bias.
    """

    def __init__(self, features: int, classes: int, protocol: Protocol, seed: int = 1) -> None:
        super().__init__()
        stream = generator(seed, "probe")
        weight = torch.randn(features + 1, classes, generator=stream) * protocol.init_std
        weight[-1] = 0
        weight = weight.T.contiguous().T
        self.weights = nn.ParameterList(weight.clone() for _ in protocol.rates)

    def forward(self, features: Tensor) -> Tensor:
        """(B, F) to the logits (B, R, C), in the precision of the weights: bfloat16 would tie."""
        with torch.autocast(features.device.type, enabled=False):
            joined = torch.cat([weight.T for weight in self.weights])  # one product in place of R
            logits = torch.addmm(joined[:, -1:], joined[:, :-1], features.to(joined.dtype).T)
        return logits.unflatten(0, (len(self.weights), -1)).permute(2, 0, 1)


def optimizer_of(probe: Probe, protocol: Protocol) -> torch.optim.Optimizer:
    """SGD with a group for each classifier, whose rates are set before every step."""
    groups = [{"params": [weight]} for weight in probe.weights]
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=protocol.nesterov)


# ---- features computed once ----------------------------------------------------------------------


class Standardised:
    """Features of central crops, computed once, standardised by the training images' statistics."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        features, _ = subject.features(subject.splits()[0])
        self.mean, self.std = features.mean(0), features.std(0) + 1e-6

    def __call__(self, images: ImageSplit, index: Tensor) -> tuple[Tensor, Tensor]:
        """(N, F) features of those images at `index` that can be decoded, and their (N,) labels."""
        assert images.labels is not None
        features, found = self.subject.features(images)
        kept = torch.isin(found, index)
        return (features[kept] - self.mean) / self.std, images.labels[found[kept]]


def in_memory(
    features: Tensor, labels: Tensor, order: Order, accelerator: Accelerator, first: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's share of every step from `first` on, of (N, F) features and (N,) labels.

    A step is one part.
    """
    for step in range(first, order.steps):
        index = order.batch(step)[order.share(step, 0, *place(accelerator))]
        rows = features.index_select(0, index)  # a third of the time of features[index]
        yield rows.to(accelerator.device), labels[index].to(accelerator.device)


# ---- the command ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """What a linear evaluation found."""

    ranking: Tensor  # (N, C) classes of each test image, from most to least likely
    truth: Tensor  # (N,) their labels
    rate: float  # that was chosen
    speed: Speed


def train_and_test(
    subject: Subject,
    protocol: Protocol,
    training: Tensor,
    choice: tuple[ImageSplit, Tensor],
    settings: Settings,
    unfinished: Unfinished,
) -> Judged:
    """Train a classifier for each rate, choose one of several, and classify the test images.

    Args:
        training: (N,) training images.
        choice: images, with (M,) indices, to choose a rate on.
    """
    images, test = subject.splits()
    accelerator, network, seed = subject.accelerator, subject.network, settings.seed
    count, size = len(training), protocol.batch_size
    order = Order(count, size, protocol.epochs, seed, protocol.partial)
    if protocol.augment:  # a part of its own, or a held-out image might replace a damaged one
        frozen, width = network, int(network.num_features)  # type: ignore[arg-type]
        learned = subset(images, among(training, len(images)), "to train on")
        inputs: Any = subject.crops(learned, order, "linear")
    else:
        frozen, rows = None, Standardised(subject)
        bank, labels = rows(images, training)
        size = min(size, len(bank))  # undecodable images are left out
        order = replace(order, count=len(bank), batch_size=size, part=size)
        inputs, width = partial(in_memory, bank, labels, order, accelerator), bank.shape[1]
    probe = Probe(width, len(images.classes), protocol, seed).to(subject.device, subject.dtype)

    def logits(images: ImageSplit, index: Tensor) -> tuple[Tensor, Tensor]:
        """(N, R, C) of the images at `index` that can be decoded, and their (N,) labels."""
        if frozen is None:
            features, labels = rows(images, index)
            with torch.no_grad():
                return probe(features.to(subject.device)).cpu(), labels
        outputs, found = subject.encode(nn.Sequential(frozen, probe).eval(), images, index)
        return outputs, images.labels[found]  # type: ignore[index]

    speed = train(
        probe,
        optimizer_of(probe, protocol),
        inputs,
        order,
        lambda step: [rate * protocol.decay_at(step, order.steps) for rate in protocol.peaks()],
        unfinished,
        what=f"linear {protocol.name}",
        accelerator=accelerator,
        precision=subject.precision,
        frozen=frozen,
    )
    chosen = 0
    if len(protocol.rates) > 1:
        outputs, labels = logits(*choice)
        chosen = int((outputs.argmax(-1) == labels[:, None]).sum(0).argmax())
    outputs, truth = logits(test, torch.arange(len(test)))
    ranking = outputs[:, chosen].argsort(1, descending=True)
    return Judged(ranking, truth, protocol.peaks()[chosen], speed)


def judge(subject: Subject, settings: Settings) -> Result:
    """The record of the judgement, which is also printed and, for a run, written."""
    protocol = protocol_of(subject, settings)
    images, _ = subject.splits()
    training, choice, index = torch.arange(len(images)), images, torch.arange(0)
    if len(protocol.rates) > 1:
        training, choice, index = to_choose_on(images, subject.validation(), settings.seed)
    few = protocol.batch_size > len(training)
    protocol = replace(protocol, batch_size=min(protocol.batch_size, len(training)))  # rates follow
    before = fingerprint(subject.network)
    given = settings_of(settings, epochs=protocol.epochs, batch_size=protocol.batch_size)
    changes = changed(settings, "epochs", "batch_size")
    name = record_name(subject, "linear", protocol.name, given, changes)
    parts = (images, subset(choice, among(index, len(choice)), "")) if len(index) else (images,)
    known = [subject.digest(part) for part in parts]
    key = f"{known} {protocol} {settings.seed} {settings.precision}"
    unfinished = Unfinished(subject.folder, name, key, subject.accelerator)
    found = train_and_test(subject, protocol, training, (choice, index), settings, unfinished)
    if fingerprint(subject.network) != before:
        raise RuntimeError("the encoder changed under the classifier: not a linear evaluation")
    top1 = accuracy(found.ranking, found.truth)
    top5 = accuracy(found.ranking, found.truth, 5) if found.ranking.shape[1] > 5 else None
    result = record(
        subject,
        task="linear",
        protocol=protocol.name,
        metrics={"top1": top1, "top5": top5},
        counts=(len(images), len(found.truth)),  # tested: without undecodable images
        interval=confidence(top1, len(found.truth)),
        settings=given | {"lr": round(found.rate, 6), "chosen_of": len(protocol.rates)},
        changed=changes,
        deviations=[f"batches of all {len(training):,} images"] if few else [],
        seconds=unfinished.seconds(),
        speed=asdict(found.speed),
    )
    unfinished.remove()
    return result


def main(settings: Settings) -> None:
    for subject in subjects(settings):
        judge(subject, settings)


if __name__ == "__main__":
    cli.run(main, arguments)
