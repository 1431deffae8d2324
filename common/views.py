"""Two augmented views of every image of every batch, for the steps that a run still has to do."""

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torchvision.transforms import v2

from common.augment import Batched
from common.data import Images, batch_indices, generator


class Pairs:
    """The stream of view pairs of one run, the same however many processes share it.

    Indices and augmentation draws are functions of (seed, step) for the *global* batch of N images;
    each of R processes takes its slice of N / R. A run can therefore start at any step, and its
    pairs do not depend on R.

    Args:
        images: the training images.
        transforms: the distributions of view 1 and of view 2 (the same object where a paper's are).
        batch_size: N.
    """

    def __init__(
        self,
        images: Images,
        transforms: tuple[v2.Transform, v2.Transform],
        *,
        batch_size: int,
        seed: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        rank: int = 0,
        processes: int = 1,
        workers: int = 0,
        drop_last: bool = False,
    ) -> None:
        self.images, self.seed, self.device, self.workers = images, seed, device, workers
        self.batch_size, self.drop_last = batch_size, drop_last
        self.programs = [Batched(transform, dtype=dtype) for transform in transforms]
        share = batch_size // processes
        self.mine = slice(rank * share, (rank + 1) * share)

    @classmethod
    def of_run(
        cls,
        images: Images,
        transforms: tuple[v2.Transform, v2.Transform],
        cfg: Any,
        accelerator: Accelerator,
        **other: Any,
    ) -> "Pairs":
        """The pairs of this process, by the `batch_size`, `seed` and `workers` of a config."""
        return cls(
            images,
            transforms,
            batch_size=cfg.batch_size,
            seed=cfg.seed,
            workers=cfg.workers,
            device=accelerator.device,
            rank=accelerator.process_index,
            processes=accelerator.num_processes,
            **other,
        )

    def indices(self, step: int) -> Tensor:
        """(N / R,) this process's images at `step`."""
        order = batch_indices(
            step,
            batch_size=self.batch_size,
            count=len(self.images),
            seed=self.seed,
            drop_last=self.drop_last,
        )
        return order[self.mine]

    def draws(self, step: int, view: int) -> Tensor:
        """(N / R, draws) uniforms behind this process's views: `view` is 0 or 1."""
        shape = (self.batch_size, self.programs[view].draws)
        stream = generator(self.seed, "views", step, view)
        return torch.rand(shape, generator=stream, dtype=torch.float64)[self.mine]

    def __call__(self, first: int, last: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(view1, view2), each (N / R, 3, H, W) float on the device, for steps first..last-1."""
        batches = self.images.batches(map(self.indices, range(first, last)), self.workers)
        for step, batch in enumerate(batches, start=first):
            images = batch.images.to(self.device, non_blocking=True)
            view1, view2 = (
                program(images, self.draws(step, view), batch.sizes)
                for view, program in enumerate(self.programs)
            )
            yield view1, view2
