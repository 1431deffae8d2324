"""Two augmented views of every image of every batch, from any step of a run on."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from common.augment import Batched, ViewError, send
from common.data import ImageSplit, batch_indices, generator
from common.errors import UserError

TOGETHER = 2**26  # bytes of images, or of a view of each, that an accelerator makes at once


class ViewPairs:
    """The stream of view pairs of one run, the same for any number of processes.

    Indices and augmentation draws are functions of (seed, step) for the *global* batch of N images;
    each of R processes takes its slice of N / R. A run can therefore start at any step, and its
    pairs do not depend on R.

    Args:
        images: the training images; kept on an accelerator if they are few and of one size.
        transforms: the distributions of view 1 and of view 2 (the same object where a paper's are).
        batch_size: N.
        seed: of the order of the images and of the augmentations.
        device: where the views are delivered.
        dtype: of the views.
        rank, processes: which of the R processes this is, and R.
        workers: processes that decode images which are not in memory; on a CPU, or where a
            transform runs image by image, they make the views too.
        drop_last: end each epoch at its last whole batch.
    """

    def __init__(
        self,
        images: ImageSplit,
        transforms: tuple[Callable, Callable],
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
        self.augmentations = [Batched(transform, dtype=dtype) for transform in transforms]
        self.local_size = batch_size // processes
        self.local = slice(rank * self.local_size, (rank + 1) * self.local_size)
        # Decoding workers share what runs image by image, as in a `Dataset`; without them, for
        # images in memory, what has a batched form stays on the device.
        by_workers = bool(self.unbatched) and images.store is None
        self.augmentation_device = torch.device("cpu") if by_workers else self.device
        self.resident = resident(images, self.augmentation_device)

    @classmethod
    def of_run(
        cls,
        images: ImageSplit,
        transforms: tuple[Callable, Callable],
        *,
        batch_size: int,
        run: Any,
        accelerator: Accelerator,
        drop_last: bool = False,
    ) -> "ViewPairs":
        """The pairs of this process, by the `seed`, `workers` and `precision` of `run`.

        The views are float64 if the precision is "fp64", float32 otherwise.
        """
        return cls(
            images,
            transforms,
            batch_size=batch_size,
            seed=run.seed,
            workers=run.workers,
            device=accelerator.device,
            dtype=torch.float64 if run.precision == "fp64" else torch.float32,
            rank=accelerator.process_index,
            processes=accelerator.num_processes,
            drop_last=drop_last,
        )

    @property
    def unbatched(self) -> list[str]:
        """The names of the transforms that run image by image, without duplicates."""
        names = [name for augmentation in self.augmentations for name in augmentation.unbatched]
        return list(dict.fromkeys(names))

    def indices(self, step: int) -> Tensor:
        """(N / R,) this process's images at `step`."""
        order = batch_indices(
            step,
            batch_size=self.batch_size,
            count=len(self.images),
            seed=self.seed,
            drop_last=self.drop_last,
        )
        return order[self.local]

    def draws(self, step: int, view: int) -> Tensor:
        """(N / R, draws) uniforms behind this process's views: `view` is 0 or 1."""
        shape = (self.batch_size, self.augmentations[view].draws)
        stream = generator(self.seed, "views", step, view)
        return torch.rand(shape, generator=stream, dtype=torch.float64)[self.local]

    def __call__(self, first: int, last: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(view1, view2), each (N / R, 3, H, W) float on the device, for steps first..last-1.

        Raises:
            UserError: a transform's results cannot be stacked.
        """
        views = self.views(first, last)
        return ahead(views, self.device) if self.device.type == "cuda" else views

    def views(self, first: int, last: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The pairs, each made when it is asked for; by the decoding workers if made on CPUs.

        Threads would not help: each operation on a large image is short, and Python starts them one
        after the other.
        """
        orders = map(self.indices, range(first, last))
        make = partial(self.pair, first)
        if self.resident is not None:
            pairs = self.from_resident(range(first, last))
        elif self.augmentation_device.type == "cpu":
            pairs = self.images.batches(orders, self.workers, make)
        else:
            batches = enumerate(self.images.batches(orders, self.workers))
            pairs = (make(i, batch.images, batch.sizes) for i, batch in batches)
        for pair in pairs:
            if isinstance(pair, UserError):
                raise pair
            view1, view2 = (view.to(self.device, non_blocking=True) for view in pair)
            yield view1, view2

    def from_resident(self, steps: range) -> Iterator[tuple[Tensor, Tensor] | UserError]:
        """The pairs of images in the accelerator's memory, those of several steps made at once.

        Small images take less time than the calls of the 700 operations behind a pair (512 of 32 px
        on an H200: 1.7 ms and 18 ms), and these take no longer for many images than for few.
        """
        images = self.resident
        assert images is not None
        together = 1  # until the first step has shown how large images and views are
        while steps:
            some, steps = steps[:together], steps[together:]
            order = torch.cat([self.indices(step) for step in some])
            rows = images.index_select(0, send(order, images.device))
            pair = self.pair(some[0], 0, rows, steps=len(some))
            if isinstance(pair, UserError):
                yield pair
                return
            if not self.unbatched:  # what runs image by image gains nothing
                largest = max(part.nbytes for part in (rows, *pair)) // len(some)
                together = max(1, TOGETHER // largest)
            yield from zip(*(view.split(self.local_size) for view in pair), strict=True)

    def pair(
        self,
        first: int,
        i: int,
        images: Tensor | list[Tensor],
        sizes: Tensor | None = None,
        steps: int = 1,
    ) -> tuple[Tensor, Tensor] | UserError:
        """The views of the images of step `first + i`, on a canvas of which they fill `sizes`.

        Or of that many steps from it on, one after the other.

        An error is returned: one raised in a worker would arrive as a page of traceback.
        """
        if isinstance(images, Tensor):
            images = images.to(self.augmentation_device, non_blocking=True)
        try:
            view1, view2 = (
                augmentation(
                    images,
                    torch.cat([self.draws(first + i + k, view) for k in range(steps)]),
                    sizes,
                )
                for view, augmentation in enumerate(self.augmentations)
            )
        except ViewError as error:
            return UserError(str(error))
        return view1, view2


def resident(images: ImageSplit, device: torch.device) -> Tensor | None:
    """The decoded images on an accelerator, if they are one tensor in a tenth of its memory."""
    store = images.store
    if device.type != "cuda" or not isinstance(store, Tensor) or images.bad:
        return None
    budget = torch.cuda.get_device_properties(device).total_memory // 10
    return store.to(device) if store.nbytes <= budget else None


def ahead(
    pairs: Iterator[tuple[Tensor, Tensor]], device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """The same pairs, each made on a separate stream while the step before it computes.

    A CPU would gain nothing: its cores are busy with the step.
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
            view.record_stream(step)  # or its memory would be reused while the step reads it
        following = make()
        yield pair
