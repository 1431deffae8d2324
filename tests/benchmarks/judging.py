"""How near the input of linear evaluation comes to decoding alone, and what ImageNet would take.

    python tests/benchmarks/judging.py --data path/to/photographs

The real loop of `eval.linear` runs on crops of 224 pixels with a network that costs nothing (the
mean colour of a view), beside workers that decode the same images and throw them away. Both have as
many workers as there are cores. The extrapolation is for machines where a GPU does all but what the
workers do: decode, crop, flip, and hand over 8 bits a value.
"""

import os
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro
from torch import nn

from common.data import ImageSplit, open_images
from common.launch import launch
from eval.encoder import Preprocess
from eval.linear import SIMCLR, Probe, optimizer_of
from eval.results.page import keep_measurement
from eval.training import Crops, Order, train
from eval.unfinished import Unfinished

IMAGENET, EPOCHS = 1_281_167, 90


@dataclass
class Settings:
    """Compare the input of linear evaluation with decoding alone."""

    data: str  # a source with labels, of photographs
    size: int = 224  # pixels of a crop
    batch: int = 512
    epochs: int = 2
    repeats: int = 3  # of which the fastest counts
    workers: int = os.cpu_count() or 1
    record: str = ""  # file to write the figures to


class MeanColour(nn.Module):
    def forward(self, views: torch.Tensor) -> torch.Tensor:
        return views.mean((2, 3))


def dropped(i: int, images: list[torch.Tensor]) -> list[torch.Tensor]:
    return []


def decoding(images: ImageSplit, order: Order, workers: int) -> None:
    parts = order.parts_per_step
    orders = (
        order.batch(i // parts)[order.share(*divmod(i, parts), 0, 1)]
        for i in range(order.steps * parts)
    )
    for _ in images.batches(orders, workers, cut=dropped):
        pass


def judging(images: ImageSplit, order: Order, size: int, workers: int) -> float:
    """The share of the time that the loop waited for data."""
    accelerator, probe = launch("fp32"), Probe(3, len(images.classes), SIMCLR)
    speed = train(
        probe,
        optimizer_of(probe, SIMCLR),
        Crops(images, order, Preprocess(size), "linear", workers=workers),
        order,
        lambda step: [0.1],
        Unfinished(None, "", ""),
        what="judging",
        accelerator=accelerator,
        frozen=MeanColour(),
    )
    return speed.data_wait


def fastest(function, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return min(times)


def main(s: Settings) -> None:
    torch.set_num_threads(1)
    images = open_images(s.data)
    order = Order(len(images), s.batch, s.epochs, seed=1)
    count = order.steps * s.batch
    decode = count / fastest(partial(decoding, images, order, s.workers), s.repeats)
    judge = count / fastest(partial(judging, images, order, s.size, s.workers), s.repeats)
    crops = Crops(images, order, Preprocess(s.size), "linear", workers=s.workers)

    def handing_over() -> None:
        parts = order.parts_per_step
        orders = (order.batch(i // parts)[crops.rows(i)] for i in range(order.steps * parts))
        for _ in images.batches(orders, s.workers, cut=partial(crops.cut, 0)):
            pass

    hand = count / fastest(handing_over, s.repeats)
    cores = os.cpu_count() or 1
    hours = {n: EPOCHS * IMAGENET / (hand / cores * n) / 3600 for n in (16, 96)}
    figures = {
        "decoding alone, images/s": round(decode),
        "decoded, cropped and handed over, images/s": round(hand),
        "share of decoding": f"{hand / decode:.0%}",
        "whole loop on these cores, images/s": round(judge),
        "share of decoding by the whole loop": f"{judge / decode:.0%}",
        "ImageNet, 90 epochs, 16 cores decode (extrapolated), hours": round(hours[16], 1),
        "ImageNet, 90 epochs, 96 cores decode (extrapolated), hours": round(hours[96], 1),
    }
    for name, figure in figures.items():
        print(f"{name:<60}{figure:>8}")
    if s.record:
        title = f"input of linear evaluation, {s.size} px, {s.workers} workers"
        command = f"python tests/benchmarks/judging.py --data {Path(s.data).name}"
        keep_measurement(Path(s.record), title, command, figures)


if __name__ == "__main__":
    main(tyro.cli(Settings))
