"""Pairs per second of the batched views against torchvision's, image by image, on this machine.

    make bench

Both sides run the same composition on the same decoded images in one process with the same number
of threads, in alternating rounds; the figures are medians. It prints and judges nothing.
"""

import statistics
import time

import torch
import torchvision
from torchvision.transforms import v2

from common.augment import Batched
from simclr import augment
from simclr.config import CIFAR10, IMAGENET_100

ROUNDS = 5


def batched(program: Batched, images: torch.Tensor) -> None:
    for _ in range(2):
        program(images, torch.rand(len(images), program.draws, dtype=torch.float64))


def one_by_one(transform: v2.Transform, images: torch.Tensor) -> None:
    for _ in range(2):
        torch.stack([transform(image) for image in images])


def seconds(function, *args) -> float:
    began = time.perf_counter()
    function(*args)
    return time.perf_counter() - began


def main() -> None:
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, ", end="")
    print(f"{torch.get_num_threads()} threads, medians of {ROUNDS} alternating rounds\n")
    print(f"{'views of decoded images':<28}{'ours':>12}{'torchvision':>14}{'ratio':>8}")
    cases = (
        ("32 px, CIFAR-10", CIFAR10, (512, 3, 32, 32)),
        ("224 px with blur, 400x500", IMAGENET_100, (16, 3, 400, 500)),
    )
    for name, cfg, shape in cases:
        images = torch.randint(0, 256, shape, dtype=torch.uint8)
        transform, _ = augment.views(cfg)
        program = Batched(transform)
        batched(program, images)
        times = [
            (seconds(batched, program, images), seconds(one_by_one, transform, images))
            for _ in range(ROUNDS)
        ]
        ours, theirs = (
            len(images) / statistics.median(column) for column in zip(*times, strict=True)
        )
        print(f"{name:<28}{ours:>10,.0f}/s{theirs:>12,.0f}/s{ours / theirs:>8.1f}")


if __name__ == "__main__":
    main()
