"""Linear evaluation: a linear classifier on a frozen encoder.

    python -m eval.linear RUN                        # the protocol of the run's method
    python -m eval.linear RUN --protocol features    # one pass over the images, then seconds

`simclr`, `moco` and `byol` are the papers' protocols: in every epoch the images go through the
network with crop and flip. `features` is ours: features are computed once, without augmentation; it
is quick, and is never compared with a paper's figure. Where a protocol sweeps learning rates, all
are trained at once and one is chosen on held-out training images.

Top-1 is that of the last epoch. The encoder is in evaluation mode, and checked to be unchanged.
A command that was stopped resumes when it is given again.
"""

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from common import cli
from eval.settings import Linear as Settings

if __name__ == "__main__":  # a mistake is reported before torch is imported
    arguments = cli.run(
        cli.parse_settings, Settings, sys.argv[1:], "python -m eval.linear", __doc__
    )

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

from common.augment import Batched
from common.data import ImageSplit, batch_indices, generator
from common.errors import UserError
from eval.encoder import Preprocess
from eval.features import digest_of, fingerprint, prepare
from eval.knn import accuracy
from eval.results.record import changed, confidence, record, record_name, settings_of
from eval.subjects import Subject, subjects
from eval.unfinished import Unfinished

MEMORY_GB = 4.0  # decode once and keep the pixels if they need less than this


@dataclass(frozen=True)
class Protocol:
    """How a linear classifier is trained: SGD with momentum 0.9 and no weight decay."""

    name: str
    rates: tuple[float, ...]  # at batch 256; one of several is chosen on held-out images
    batch_size: int
    epochs: int
    nesterov: bool = True
    milestones: tuple[float, ...] = ()  # fractions of training at which the rate falls tenfold
    init_std: float = 0.0  # of the normal initial weights; the biases start at 0
    augment: bool = True  # crop and flip through the network; False: features computed once

    def decay_at(self, step: int, steps: int) -> float:
        """The factor of the rates at a step: tenfold steps down, else a cosine to 0."""
        if self.milestones:
            return 0.1 ** sum(step >= share * steps for share in self.milestones)
        return 0.5 * (1 + math.cos(math.pi * step / steps))


# arXiv 2002.05709 App. B.6. PAPER/CODE: no weight decay in the paper, 1e-6 in the README's command.
SIMCLR = Protocol("simclr", rates=(0.1,), batch_size=4096, epochs=90)
# google-research/simclr README, "Linear evaluation" on CIFAR-10
SIMCLR_CIFAR = replace(SIMCLR, batch_size=512, epochs=100)
# arXiv 1911.05722 Sec. 4.1; facebookresearch/moco main_lincls.py: tenfold down at epochs 60 and 80
MOCO = Protocol(
    "moco",
    rates=(30.0,),
    batch_size=256,
    epochs=100,
    nesterov=False,
    milestones=(0.6, 0.8),
    init_std=0.01,
)
# arXiv 2006.07733 App. C.1. PAPER/CODE: five rates in the paper, 0.2 alone in the code; batch 1024
# in the paper, 4096 as the code's default. It starts from Haiku's initial weights, here from a
# normal(0.01): the problem is convex, so the solution does not depend on them.
RATES = (0.4, 0.3, 0.2, 0.1, 0.05)
BYOL = Protocol("byol", rates=RATES, batch_size=1024, epochs=80, init_std=0.01)
# Ours, on standardised features
FEATURES = Protocol(
    "features", rates=(0.01, 0.03, 0.1, 0.3, 1.0), batch_size=512, epochs=100, augment=False
)
PROTOCOLS = {"simclr": SIMCLR, "moco": MOCO, "byol": BYOL, "features": FEATURES}


def protocol_of(subject: Subject, settings: Settings) -> Protocol:
    """The protocol asked for, or that of the run's method; `features` where it has none.

    Pixels have no network to go through, and are always `features`.
    """
    name = settings.protocol or subject.encoder.metadata.get("method", "")
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


class Probe:
    """R linear classifiers, one for each learning rate, trained at once on the same batches.

    Args:
        features, classes: F and C of the (R, F + 1, C) weights, whose last row is the bias.
    """

    def __init__(
        self, features: int, classes: int, protocol: Protocol, device: str = "cpu", seed: int = 1
    ) -> None:
        self.protocol = protocol
        scale = protocol.batch_size / 256
        self.rates = torch.tensor(protocol.rates, device=device).view(-1, 1, 1) * scale
        shape = (len(protocol.rates), features + 1, classes)
        weight = torch.randn(shape[1:], generator=generator(seed, "probe")) * protocol.init_std
        weight[-1] = 0
        self.weight = weight.expand(shape).clone().to(device)
        self.velocity = torch.zeros_like(self.weight)

    def logits(self, features: Tensor) -> Tensor:
        """(B, F) to (R, B, C)."""
        joined = self.weight.permute(1, 0, 2).flatten(1)  # one product in place of R
        logits = torch.addmm(joined[-1], features, joined[:-1])
        return logits.unflatten(1, (len(self.weight), -1)).permute(1, 0, 2)

    def step(self, features: Tensor, labels: Tensor, decay: float) -> None:
        """One SGD step of every classifier on (B, F) features and (B,) labels."""
        error = self.logits(features).softmax(-1) - F.one_hot(labels, self.weight.shape[-1])
        error = error.permute(1, 0, 2).flatten(1) / len(features)  # of the mean cross entropy
        grad = torch.cat([features.T @ error, error.sum(0, keepdim=True)])
        grad = grad.unflatten(1, (len(self.weight), -1)).permute(1, 0, 2)  # (R, F + 1, C)
        self.velocity.mul_(0.9).add_(grad)
        update = grad.add_(self.velocity, alpha=0.9) if self.protocol.nesterov else self.velocity
        self.weight.sub_(update * self.rates * decay)

    def select(self, chosen: int) -> None:
        """Discard all classifiers but one."""
        self.weight, self.rates = self.weight[chosen, None], self.rates[chosen, None]


def hold_out(count: int, protocol: Protocol, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the images to train on, and of those to choose the rate on.

    The latter are a tenth, at most 10,000, if there is a choice, else none.

    Raises:
        UserError: there is a choice, and only one image.
    """
    if len(protocol.rates) == 1:
        return torch.arange(count), torch.arange(0)
    if count < 2:
        raise UserError("one training image: none is left to choose the learning rate on")
    order = torch.randperm(count, generator=generator(seed, "held out"))
    size = max(1, min(count // 10, 10_000))  # arXiv 2006.07733 App. C.1: 10,009 of ImageNet
    return order[size:].sort().values, order[:size].sort().values


def total_steps(count: int, protocol: Protocol) -> int:
    return count // min(protocol.batch_size, count) * protocol.epochs


def shuffled(index: Tensor, protocol: Protocol, seed: int, first: int = 0) -> Iterator[Tensor]:
    """(B,) of the (N,) indices for every step from `first` on."""
    size, count = min(protocol.batch_size, len(index)), len(index)
    for step in range(first, total_steps(count, protocol)):
        order = batch_indices(step, batch_size=size, count=count, seed=seed, drop_last=True)
        yield index[order]


def train(
    probe: Probe,
    batches: Callable[[int], Iterator[tuple[Tensor, Tensor]]],
    steps: int,
    unfinished: Unfinished,
) -> None:
    """Train for the remaining steps of a protocol.

    Args:
        batches: maps a first step to the (features, labels) of the steps from there on.
    """
    first = unfinished.state.get("step", 0)
    for name in ("weight", "velocity") if first else ():
        getattr(probe, name).copy_(unfinished.state[name])

    def state() -> dict[str, Tensor]:
        return {"weight": probe.weight, "velocity": probe.velocity}

    description = f"linear {probe.protocol.name}"
    for step, (features, labels) in unfinished.steps(batches, steps, description, state, first):
        probe.step(features, labels, probe.protocol.decay_at(step, steps))


# ---- through the network -------------------------------------------------------------------------


def train_views(preprocess: Preprocess) -> v2.Transform:
    """Crop and flip, as in pretraining but without colour operations (CODE data.py:164)."""
    mode = v2.InterpolationMode(preprocess.interpolation)
    steps = [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.RandomResizedCrop(
            preprocess.size, scale=(0.08, 1.0), interpolation=mode, antialias=True
        ),
        v2.RandomHorizontalFlip(),
    ]
    if preprocess.mean and preprocess.std:
        steps.append(v2.Normalize(preprocess.mean, preprocess.std))
    return v2.Compose(steps)


@torch.no_grad()
def augmented(
    network: nn.Module,
    images: ImageSplit,
    preprocess: Preprocess,
    index: Tensor,
    protocol: Protocol,
    device: str,
    seed: int,
    first: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(B, F) features of crops and (B,) labels, of images at `index`, for steps from `first` on."""
    assert images.labels is not None
    augmentation = Batched(train_views(preprocess))
    batches = images.batches(shuffled(index, protocol, seed, first), workers=2)
    for step, batch in enumerate(batches, first):
        shape = (len(batch.indices), augmentation.draws)
        stream = generator(seed, "linear", step)
        draws = torch.rand(shape, generator=stream, dtype=torch.float64)
        views = augmentation(batch.images.to(device), draws, batch.sizes)
        yield network(views).float(), images.labels[batch.indices].to(device)


@torch.inference_mode()
def predictions(
    network: nn.Module, images: ImageSplit, preprocess: Preprocess, index: Tensor, device: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """(B, F) outputs for central crops of the images at `index`, (M,), and their (B,) labels."""
    assert images.labels is not None
    parts = index.split(256)
    for part, batch in zip(parts, images.batches(parts, workers=2), strict=True):
        outputs = network(prepare(batch, preprocess, device)).float()
        decoded = batch.indices == part  # another image replaces one that cannot be decoded
        yield outputs[decoded.to(device)], images.labels[part[decoded]].to(device)


# ---- the command ---------------------------------------------------------------------------------


def run_probe(
    subject: Subject, protocol: Protocol, seed: int, unfinished: Unfinished
) -> tuple[Tensor, Tensor, float]:
    """(N, C) ranked classes of the test images, their (N,) labels, and the learning rate used."""
    images, test = subject.splits()
    assert images.labels is not None
    network, preprocess, device = subject.encoder.network, subject.encoder.input, subject.device
    training, held_out = hold_out(len(images), protocol, seed)
    if protocol.augment:
        images.into_memory(MEMORY_GB)
        test.into_memory(MEMORY_GB)

        def batches(first: int) -> Iterator[tuple[Tensor, Tensor]]:
            return augmented(network, images, preprocess, training, protocol, device, seed, first)

        validation = predictions(network, images, preprocess, held_out, device)
        testing = predictions(network, test, preprocess, torch.arange(len(test)), device)
        width = int(network.num_features)  # type: ignore[arg-type]
    else:
        bank, labels = subject.extract(images)
        queries, truth = subject.extract(test)
        mean, std = bank.mean(0), bank.std(0) + 1e-6
        bank, queries, device = (bank - mean) / std, (queries - mean) / std, "cpu"
        if len(bank) < len(images):  # undecodable images were left out
            training, held_out = hold_out(len(bank), protocol, seed)

        def batches(first: int) -> Iterator[tuple[Tensor, Tensor]]:
            return ((bank[i], labels[i]) for i in shuffled(training, protocol, seed, first))

        validation = iter([(bank[held_out], labels[held_out])])
        testing = iter([(queries, truth)])
        width = bank.shape[1]
    probe = Probe(width, len(images.classes), protocol, device, seed)
    train(probe, batches, total_steps(len(training), protocol), unfinished)
    if len(held_out):
        hits = torch.stack([(probe.logits(x).argmax(-1) == y).sum(1) for x, y in validation]).sum(0)
        probe.select(int(hits.argmax()))
    ranked = [(probe.logits(x)[0].argsort(1, descending=True).cpu(), y.cpu()) for x, y in testing]
    rankings, truths = zip(*ranked, strict=True)
    return torch.cat(rankings), torch.cat(truths), probe.rates.item()


def judge(subject: Subject, settings: Settings) -> None:
    network = subject.encoder.network.to(subject.device)
    protocol = protocol_of(subject, settings)
    training, _ = hold_out(len(subject.splits()[0]), protocol, settings.seed)
    protocol = replace(protocol, batch_size=min(protocol.batch_size, len(training)))  # rates follow
    before = fingerprint(network)
    given = settings_of(settings, epochs=protocol.epochs, batch_size=protocol.batch_size)
    changes = changed(settings, "epochs", "batch_size")
    name = record_name(subject, "linear", protocol.name, given, changes)
    digest = digest_of(network, subject.encoder.input, subject.splits()[0])
    key = f"{digest} {protocol} {settings.seed}"
    unfinished = Unfinished(subject.folder, name, key)
    ranking, truth, rate = run_probe(subject, protocol, settings.seed, unfinished)
    if fingerprint(network) != before:
        raise RuntimeError("the encoder changed under the classifier: not a linear evaluation")
    top1 = accuracy(ranking, truth)
    top5 = accuracy(ranking, truth, 5) if ranking.shape[1] > 5 else None
    record(
        subject,
        task="linear",
        protocol=protocol.name,
        metrics={"top1": top1, "top5": top5},
        counts=(len(subject.splits()[0]), len(truth)),  # tested: without undecodable images
        interval=confidence(top1, len(truth)),
        settings=given | {"lr": round(rate, 6), "chosen_of": len(protocol.rates)},
        changed=changes,
        seconds=unfinished.seconds(),
    )
    unfinished.remove()


def main(settings: Settings) -> None:
    s = settings
    columns = (s.image_column, s.label_column)
    for subject in subjects(s.run, s.weights, s.baselines, s.data, s.layer, columns=columns):
        judge(subject, settings)


if __name__ == "__main__":
    cli.run(main, arguments)
