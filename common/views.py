"""Two augmented views of every image of every batch, for the steps that a run still has to do."""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torchvision.transforms import v2

from common.augment import Batched, send
from common.data import Batch, Images, batch_indices, generator


class Pairs:
    """The stream of view pairs of one run, the same however many processes share it.

    Indices and augmentation draws are functions of (seed, step) for the *global* batch of N images;
    each of R processes takes its slice of N / R. A run can therefore start at any step, and its
    pairs do not depend on R.

    Args:
        images: the training images; kept on an accelerator where they are few and of one size.
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
        self.images, self.seed, self.workers = images, seed, workers
        self.device = torch.device(device)
        self.batch_size, self.drop_last = batch_size, drop_last
        self.programs = [Batched(transform, dtype=dtype) for transform in transforms]
        share = batch_size // processes
        self.mine = slice(rank * share, (rank + 1) * share)
        self.resident = resident(images, self.device)

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
        views = self.views(first, last)
        return ahead(views, self.device) if self.device.type == "cuda" else views

    def views(self, first: int, last: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The pairs, each made when it is asked for; by the decoding workers where all have CPUs.

        Threads would not do: each operation on a large image is short, and Python starts one after
        the other.
        """
        orders = map(self.indices, range(first, last))
        if self.device.type == "cpu":
            yield from self.images.batches(orders, self.workers, partial(self.pair, first))
            return
        for i, batch in enumerate(self.batches(orders)):
            yield self.pair(first, i, batch)

    def pair(self, first: int, i: int, batch: Batch) -> tuple[Tensor, Tensor]:
        """The views of the batch of step `first + i`."""
        images = batch.images.to(self.device, non_blocking=True)
        view1, view2 = (
            program(images, self.draws(first + i, view), batch.sizes)
            for view, program in enumerate(self.programs)
        )
        return view1, view2

    def batches(self, orders: Iterable[Tensor]) -> Iterator[Batch]:
        """The images, from the accelerator's own memory where they are resident."""
        if self.resident is None:
            yield from self.images.batches(orders, self.workers)
            return
        for order in orders:
            images = self.resident.index_select(0, send(order, self.device))
            yield Batch(images, torch.tensor(images.shape[2:]).expand(len(images), 2), order)


def resident(images: Images, device: torch.device) -> Tensor | None:
    """The decoded images on an accelerator, if they are one tensor of at most a tenth of it."""
    store = images.store
    if device.type != "cuda" or not isinstance(store, Tensor) or images.bad:
        return None
    room = torch.cuda.get_device_properties(device).total_memory // 10
    return store.to(device) if store.nbytes <= room else None


def ahead(
    pairs: Iterator[tuple[Tensor, Tensor]], device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """The same pairs, each made on a stream of its own while the step before it computes.

    A CPU has nothing to gain: its cores are busy with the step.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))  # for the resident images

    def make() -> tuple[Tensor, Tensor] | None:
        with torch.cuda.stream(stream):
            return next(pairs, None)

    following = make()
    while (pair := following) is not None:
        step = torch.cuda.current_stream(device)
        step.wait_stream(stream)
        for view in pair:
            view.record_stream(step)  # or its memory would be given away while the step reads it
        following = make()
        yield pair
