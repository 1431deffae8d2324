"""Training with labels: the one loop of linear evaluation and of fine-tuning.

A batch of b images goes through the network in parts of at most `PART` images, whose gradients add
up to the batch's. Of each part of n images, process r of R has [r n // R, (r + 1) n // R), possibly
none. Its loss is the sum over them divided by b, times R for DDP's mean. Order, crops and noise are
functions of the step, so one process equals many, and a training that was stopped goes on exactly.
"""

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torchvision.transforms import v2

from common.augment import Batched, random_boxes, to_float
from common.data import ImageSplit, epoch_order, generator, seed_noise
from common.views import ahead
from eval.encoder import Preprocess
from eval.features import autocast
from eval.processes import place, share
from eval.unfinished import Unfinished

PART = 256  # images that go through a network at once, over all processes; BatchNorm sees them


@dataclass(frozen=True)
class Order:
    """Which of `count` training images each step takes.

    Args:
        partial: an epoch's last batch may be smaller, instead of being left out.
        part: see `PART`.
    """

    count: int
    batch_size: int
    epochs: int
    seed: int
    partial: bool = False
    part: int = PART

    @property
    def steps_per_epoch(self) -> int:
        whole, rest = divmod(self.count, self.batch_size)
        return whole + (self.partial and rest > 0)

    @property
    def steps(self) -> int:
        return self.steps_per_epoch * self.epochs

    @property
    def parts_per_step(self) -> int:
        return -(-self.batch_size // self.part)

    def batch(self, step: int) -> Tensor:
        """(B,) images of a step."""
        epoch, k = divmod(step, self.steps_per_epoch)
        order = epoch_order(self.seed, epoch, self.count)
        return order[k * self.batch_size : (k + 1) * self.batch_size]

    def share(self, step: int, part: int, rank: int, processes: int) -> slice:
        """The rows of a step's batch that are one process's share of one part of it."""
        whole = range(len(self.batch(step)))[part * self.part : (part + 1) * self.part]
        rows = share(len(whole), rank, processes)
        return slice(whole.start + rows.start, whole.start + rows.stop)


# ---- views ---------------------------------------------------------------------------------------

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # areas and aspect ratios of crops, in all papers


def train_views(preprocess: Preprocess) -> v2.Transform:
    """Crop and flip, as in pretraining but without colour operations (CODE data.py:164)."""
    size, mode = preprocess.size, v2.InterpolationMode(preprocess.interpolation)
    steps = [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.RandomResizedCrop(size, SCALE, RATIO, interpolation=mode, antialias=True),
        v2.Lambda(partial(torch.clamp, min=0.0, max=1.0)),  # bicubic overshoots
        v2.RandomHorizontalFlip(),
    ]
    if preprocess.mean and preprocess.std:
        steps.append(v2.Normalize(preprocess.mean, preprocess.std))
    return v2.Compose(steps)


@functools.lru_cache(maxsize=2)
def uniforms(seed: int, name: str, step: int, count: int, draws: int) -> Tensor:
    """(B, draws) uniforms behind the views of a step's whole batch."""
    stream = generator(seed, name, step)
    return torch.rand((count, draws), generator=stream, dtype=torch.float64)


@dataclass(frozen=True)
class Crops:
    """Random crops of labelled images with their labels, the same for any number of processes.

    Images in memory are cropped together, on the device. Those that workers decode are cropped by
    the workers, one by one and in 8 bits, as in most data loaders, so that far fewer bytes are
    handed over. Boxes and flips are the same; resampling rounds and clips after each direction.

    Args:
        name: of the random stream of the crops.
        place: this process's rank, and the number of processes.
        device, dtype: of the views.
        workers: processes that decode images which are not in memory.
    """

    images: ImageSplit
    order: Order
    preprocess: Preprocess
    name: str
    place: tuple[int, int] = (0, 1)
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32
    workers: int = 0

    def __call__(self, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """((n, C, H, W) views, (n,) labels) of this share of every part from step `first` on."""
        device = torch.device(self.device)
        return ahead(self.crops(first), device) if device.type == "cuda" else self.crops(first)

    def crops(self, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        assert self.images.labels is not None
        parts, augmentation = (
            self.order.parts_per_step,
            Batched(train_views(self.preprocess), self.dtype),
        )
        begin, end, size = first * parts, self.order.steps * parts, self.preprocess.size
        orders = (self.order.batch(i // parts)[self.rows(i)] for i in range(begin, end))
        in_memory = self.images.store is not None
        cut = partial(self.cut, begin)
        for i, batch in enumerate(self.images.batches(orders, self.workers, cut=cut), begin):
            labels = self.images.labels[batch.indices].to(self.device, non_blocking=True)
            images = batch.images.to(self.device, non_blocking=True)
            if not len(labels):
                views = torch.empty(
                    0, images.shape[1], size, size, dtype=self.dtype, device=self.device
                )
            elif in_memory:
                views = augmentation(images, self.uniforms(i, augmentation.draws), batch.sizes)
            else:
                views = to_float(images, self.dtype)
                mean, std = self.preprocess.mean, self.preprocess.std
                if mean and std:  # in place: on a CPU memory is what takes the time
                    shift, scale = (views.new_tensor(m).view(-1, 1, 1) for m in (mean, std))
                    views.sub_(shift).div_(scale)
            yield views, labels

    def rows(self, i: int) -> slice:
        """This process's rows, in its step's batch, of part `i`, counted over all steps."""
        return self.order.share(*divmod(i, self.order.parts_per_step), *self.place)

    def uniforms(self, i: int, draws: int) -> Tensor:
        step = i // self.order.parts_per_step
        count = len(self.order.batch(step))
        return uniforms(self.order.seed, self.name, step, count, draws)[self.rows(i)]

    def cut(self, begin: int, i: int, images: list[Tensor]) -> list[Tensor]:
        """What `train_views` makes of the decoded images of part `begin + i`, in 8 bits."""
        if not images:
            return images
        mode = v2.InterpolationMode(self.preprocess.interpolation)
        drawn = self.uniforms(begin + i, 23)  # 22 for a box and one for the flip
        sizes = torch.tensor([image.shape[1:] for image in images])
        boxes = random_boxes(drawn[:, :22], sizes, SCALE, RATIO).tolist()
        views = []
        for image, (top, left, height, width), u in zip(
            images, boxes, drawn[:, 22].tolist(), strict=True
        ):
            side = [self.preprocess.size] * 2
            box = image[:, top : top + height, left : left + width]
            view = v2.functional.resize(box, side, mode, antialias=True)
            views.append(view.flip(-1) if u < 0.5 else view)
        return views


# ---- the loop ------------------------------------------------------------------------------------


def total_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """The sum of the cross entropies of (n, C) outputs, or of (n, R, C) of R classifiers."""
    if outputs.ndim == 3:
        outputs = outputs.permute(1, 2, 0)  # images last, as a probe's lie in memory
        labels = labels.expand(len(outputs), -1)
    return F.cross_entropy(outputs, labels, reduction="sum")


@dataclass(frozen=True)
class Speed:
    """How fast a training went, since it was last resumed."""

    images_per_second: float
    data_wait: float  # share of the time that the loop waited for data


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: Callable[[int], Iterator[tuple[Tensor, Tensor]]],
    order: Order,
    rates_at: Callable[[int], Sequence[float]],
    unfinished: Unfinished,
    *,
    what: str,
    accelerator: Accelerator,
    precision: str = "fp32",
    frozen: nn.Module | None = None,
    progress: Mapping[str, Any] | None = None,
) -> Speed:
    """Train `model` for the steps of `order` that are still to do.

    Args:
        inputs: maps a first step to the (inputs, labels) of this process's share of every part from
            there on.
        rates_at: the learning rate of each of the optimizer's groups at a step.
        what: a name for the progress bar.
        precision: of the networks; "bf16" is by autocast.
        frozen: maps the inputs to the model's own, without a gradient.
        progress: saved beside the state of this training.
    """
    model.to(accelerator.device)
    first = unfinished.state.get("step", 0)
    if first:
        model.load_state_dict(unfinished.state["model"])
        optimizer.load_state_dict(unfinished.state["optimizer"])
    wrapped = accelerator.prepare(model)
    rank, processes = place(accelerator)

    def state() -> dict[str, Any]:
        learned = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        return {**(progress or {}), **learned}

    began, waited, trained, stream = time.perf_counter(), 0.0, 0, inputs(first)
    for step in unfinished.steps(order.steps, what, state, first):
        size, parts = len(order.batch(step)), order.parts_per_step
        seed_noise(accelerator.device, order.seed, "network", step, rank)
        for group, rate in zip(optimizer.param_groups, rates_at(step), strict=True):
            group["lr"] = rate
        optimizer.zero_grad()
        for part in range(parts):
            asked = time.perf_counter()
            views, labels = next(stream)
            waited += time.perf_counter() - asked
            if part * order.part >= size:  # of an epoch's last batch
                continue
            last = (part + 1) * order.part >= size
            with nullcontext() if last else accelerator.no_sync(wrapped):
                with autocast(precision, accelerator.device):
                    if frozen is not None:
                        with torch.no_grad():
                            views = frozen(views)
                    outputs = wrapped(views)
                loss = total_loss(
                    outputs.to(torch.promote_types(outputs.dtype, torch.float32)), labels
                )
                (loss * processes / size).backward()
        optimizer.step()
        trained += size
        spent = time.perf_counter() - began
        unfinished.show(images_per_second=trained / spent, data_wait=waited / spent)
    accelerator.free_memory()
    spent = time.perf_counter() - began
    return Speed(trained / spent, waited / spent)
