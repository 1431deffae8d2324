"""Fine-tuning: the whole network and a linear classifier, with labels.

    python -m eval.finetune RUN
    python -m eval.finetune RUN --weights random --epochs 20    # the supervised twin

The supervised twin is what the same network, input and views reach when every label is known: the
ceiling for a method on that data. Optimiser: SGD with Nesterov momentum 0.9, no weight decay, no
warm-up, cosine to 0, base rate 0.05 at batch 256, crop and flip (arXiv 2002.05709 App. B.5).
BatchNorm is in training mode. Top-1 is that of the last epoch.
"""

import copy
import math
import time
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
import tyro
from torch import nn
from tqdm import tqdm

from common import cli
from common.augment import Batched
from common.data import Images, batch_indices, generator
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
    epochs: int = 60  # arXiv 2002.05709 App. B.5, on 1 % of ImageNet
    base_lr: float = 0.05  # at batch 256 (likewise)
    batch_size: int = 256
    weight_decay: float = 0.0  # on all parameters (likewise)
    seed: int = 1  # of order, crops and the classifier's initial weights


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
        "finetune-100",  # percent of the labels
        top1=top1,
        top5=accuracy(ranking, truth, 5) if len(train.classes) > 5 else None,
        interval=confidence(top1, len(truth)),
        lr=settings.base_lr * settings.batch_size / 256,
        probe_epochs=settings.epochs,
        probe_batch_size=settings.batch_size,
        probe_weight_decay=settings.weight_decay or None,
        probe_seed=settings.seed,
        seconds=time.perf_counter() - began,
    )


def main() -> None:
    settings = cli.check_ranges(
        tyro.cli(Settings, prog="python -m eval.finetune", description=__doc__)
    )
    for subject in subjects(settings.run, settings.weights, (), settings.data):
        judge(subject, settings)


if __name__ == "__main__":
    cli.run(main)
