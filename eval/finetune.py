"""Fine-tuning: the whole network and a linear classifier, with labels.

    python -m eval.finetune RUN
    python -m eval.finetune RUN --label-fraction 0.01           # semi-supervised
    python -m eval.finetune RUN --subset 1percent.txt           # the same, on listed images
    python -m eval.finetune RUN --weights random --epochs 20    # the supervised twin

The supervised twin is what the same network, input and views reach when every label is known: the
ceiling for a method on that data. Optimiser: SGD with Nesterov momentum 0.9, no weight decay, no
warm-up, cosine to 0, base rate 0.05 at batch 256, crop and flip (arXiv 2002.05709 App. B.5).
60 epochs, but 30 on a fraction of the labels above 1 % (likewise). This is SimCLR's protocol, and
what is used for every method: MoCo's papers have none. BatchNorm is in training mode. Top-1 is that
of the last epoch.
"""

import copy
import hashlib
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from tqdm import tqdm

from common import cli
from common.augment import Batched
from common.data import Images, batch_indices, generator, name_of, take
from eval.encoder import Encoder
from eval.knn import accuracy
from eval.linear import MEMORY_GB, judged, train_views
from eval.results import Subject, confidence, record, subjects


@dataclass(frozen=True)
class Settings:
    """Fine-tune an encoder with all labels."""

    run: Annotated[str, tyro.conf.Positional] = ""  # a run's folder or an encoder.safetensors
    weights: str = ""  # start from these instead: random (the supervised twin), torchvision:ARCH
    data: str = ""  # images to train and judge on; default: those of the run
    layer: int = 0  # 0: from the representation; k: from the head's k-th hidden layer (v2: 1)
    label_fraction: float = 1.0  # of the training images, balanced over the classes
    subset: str = ""  # a file that names the images to train on, one a line, in place of a fraction
    epochs: int = 0  # default: 60, or 30 above 1 % of the labels (arXiv 2002.05709 App. B.5)
    base_lr: float = 0.05  # at batch 256 (likewise)
    batch_size: int = 256
    weight_decay: float = 0.0  # on all parameters (likewise)
    seed: int = 1  # of order, crops and the classifier's initial weights


def choose(images: Images, fraction: float, subset: str, seed: int) -> Tensor:
    """(N,) bool: the images to train on, named by the file `subset` or drawn for each class.

    Raises:
        UserError: the file is unreadable or names an image that is not there.
    """
    assert images.labels is not None
    keep = torch.zeros(len(images), dtype=torch.bool)
    if subset:
        try:
            wanted = {line.strip() for line in Path(subset).read_text().splitlines()} - {""}
        except (OSError, ValueError) as error:
            raise cli.UserError(f"--subset {subset}: cannot be read ({error})") from error
        names = [Path(name_of(images.encoded[i], i)).name for i in range(len(images))]
        if missing := sorted(wanted - set(names)):
            raise cli.UserError(f"--subset {subset}: {len(missing)} not there, e.g. {missing[0]}")
        return torch.tensor([name in wanted for name in names])
    for c in images.labels.unique().tolist():
        own = (images.labels == c).nonzero()[:, 0]
        order = torch.randperm(len(own), generator=generator(seed, "labels", c))
        keep[own[order[: max(1, round(fraction * len(own)))]]] = True
    return keep


def fine_tune(encoder: Encoder, images: Images, settings: Settings, device: str) -> nn.Sequential:
    """Encoder and classifier after the last epoch, in evaluation mode; `encoder` keeps its own."""
    assert images.labels is not None
    size = min(settings.batch_size, len(images))
    steps = len(images) // size * settings.epochs
    peak = settings.base_lr * size / 256
    network = copy.deepcopy(encoder.network)
    torch.manual_seed(settings.seed)
    width = int(network.num_features)  # type: ignore[arg-type]
    classifier = nn.Linear(width, len(images.classes))
    model = nn.Sequential(network, classifier).to(device).train()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=peak, momentum=0.9, nesterov=True, weight_decay=settings.weight_decay
    )
    program = Batched(train_views(encoder.input))
    orders = (
        batch_indices(step, batch_size=size, count=len(images), seed=settings.seed, drop_last=True)
        for step in range(steps)
    )
    batches = images.batches(orders, workers=2)
    for step, batch in enumerate(tqdm(batches, "finetune", steps, leave=False, disable=None)):
        stream = generator(settings.seed, "finetune", step)
        draws = torch.rand((size, program.draws), generator=stream, dtype=torch.float64)
        logits = model(program(batch.images.to(device), draws, batch.sizes))
        loss = F.cross_entropy(logits, images.labels[batch.indices].to(device))
        optimizer.param_groups[0]["lr"] = peak * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def judge(subject: Subject, settings: Settings) -> None:
    train, test = subject.splits()
    if subject.encoder.name == "pixels":
        raise cli.UserError("--weights pixels: there is nothing to fine-tune")
    began = time.perf_counter()
    keep = choose(train, settings.label_fraction, settings.subset, settings.seed)
    whole, classes = bool(keep.all()), len(train.classes)
    share = round(100 * keep.double().mean().item()) if settings.subset else None
    percent = 100 * settings.label_fraction if share is None else max(1, share)
    settings = replace(settings, epochs=settings.epochs or (30 if 1 < percent < 100 else 60))
    train = train if whole else take(train, keep, f"{percent:g} % of the labels")
    train.into_memory(MEMORY_GB)
    test.into_memory(MEMORY_GB)
    model = fine_tune(subject.encoder, train, settings, subject.device)
    every = torch.arange(len(test))
    judging = judged(model, test, subject.encoder.input, every, subject.device)
    rankings, truths = zip(*((x.argsort(1, descending=True), y) for x, y in judging), strict=True)
    ranking, truth = torch.cat(rankings), torch.cat(truths)
    top1 = accuracy(ranking, truth)
    record(
        subject,
        f"finetune-{percent:g}{subject.encoder.suffix}",  # percent of the labels
        top1=top1,
        top5=accuracy(ranking, truth, 5) if classes > 5 else None,
        counts=(len(train), len(test)),
        interval=confidence(top1, len(truth)),
        labels=None if whole else hashlib.sha256(keep.numpy().tobytes()).hexdigest(),
        subset=settings.subset or None,
        lr=settings.base_lr * min(settings.batch_size, len(train)) / 256,
        probe_epochs=settings.epochs,
        probe_batch_size=min(settings.batch_size, len(train)),
        probe_weight_decay=settings.weight_decay or None,
        probe_seed=settings.seed,
        seconds=time.perf_counter() - began,
    )


def main() -> None:
    settings = cli.check_ranges(
        tyro.cli(Settings, prog="python -m eval.finetune", description=__doc__)
    )
    for subject in subjects(settings.run, settings.weights, (), settings.data, settings.layer):
        judge(subject, settings)


if __name__ == "__main__":
    cli.run(main)
