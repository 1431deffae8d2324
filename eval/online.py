"""A linear classifier that is trained during pretraining: `--online-linear` of every method.

At the end of each step it learns from the features h of view 1, as the step had them, and from the
labels of the batch. None of its gradients reaches the encoder, which is the same bit for bit
without it. BYOL's official code trains one with the optimiser and rate of the method, and its
Imagenette figure is that classifier's. MoCo's code has none. SimCLR's has one (tf2/run.py:596-605),
on both views and at LARS's rate. For these two the setting is ours: `sgd`, and a `cosine` from the
rate of the method's own linear evaluation.

    online_linear_train    Top-1 in percent on view 1 of a logged step's batch, before the update
    online_linear          Top-1 in percent on central crops of the test images, the encoder in
                           evaluation mode: every `--knn-every` epochs on at most 2,000 of them,
                           after the last step on all, which is also recorded in RUN/results/

This is no linear evaluation of the finished encoder: the views are pretraining's, and the features
move. Where the source has no test split, a fifth of the training images takes its place: the
classifier does not see their labels, but the encoder has been trained on their pixels.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from common.augment import send
from common.config import flat
from common.data import ImageSplit, generator, subset
from common.encoders import evaluation_mode
from common.errors import UserError
from common.launch import commit
from common.run import Run
from common.views import ViewPairs
from eval.encoder import Encoder, Preprocess
from eval.features import extract
from eval.results.record import confidence, record
from eval.splits import hold_out_fifth, open_labelled
from eval.subjects import Subject

HIDDEN = -1  # in place of a label that the classifier must not see


def online_linear(run: Run, *args: Any, **more: Any) -> "OnlineLinear | None":
    """The classifier of a run, if it is asked for; the arguments are those of `OnlineLinear`."""
    return OnlineLinear(run, *args, **more) if run.run_cfg.online_linear else None


def sgd(linear: nn.Linear) -> torch.optim.Optimizer:
    """Momentum 0.9 and no weight decay, as in SimCLR's and MoCo's linear evaluations."""
    return torch.optim.SGD(linear.parameters(), lr=0.0, momentum=0.9)


def cosine(run: Run, base_lr: float) -> Callable[[int], float]:
    """Step to learning rate: `base_lr` at a batch of 256, linear in the batch, to 0 at the end."""
    peak = base_lr * run.cfg.batch_size / 256
    return lambda step: peak * 0.5 * (1 + math.cos(math.pi * step / run.total_steps))


class OnlineLinear:
    """The classifier of one run; `Run` takes `state`, `measures` and `step` of it.

    Args:
        pairs: the views of the run, for the labels of each step.
        preprocess: of the test images.
        model: is called with view 1, or with both; its `encoder` hands the features to `head`.
        lr_at: the learning rate of the `step`-th update.
        optimizer: makes the optimiser.

    Raises:
        UserError: the images have no labels, or are not of the training split.
    """

    SAMPLE = 2_000  # test images of a measurement before the last

    def __init__(
        self,
        run: Run,
        pairs: ViewPairs,
        preprocess: Preprocess,
        model: Any,
        head: nn.Module,
        lr_at: Callable[[int], float],
        optimizer: Callable[[nn.Linear], torch.optim.Optimizer] = sgd,
    ) -> None:
        self.run, self.pairs, self.preprocess, self.lr_at = run, pairs, preprocess, lr_at
        self.accelerator, self.encoder = run.accelerator, model.encoder
        self.labels, self.test = labels_and_test(run)
        self.sample = self.share(self.SAMPLE)
        stream = generator(run.run_cfg.seed, "online linear")
        linear = initial(self.encoder.num_features, len(self.test.classes), stream)
        self.linear = linear.to(self.accelerator.device, run.dtype)
        self.optimizer = optimizer(self.linear)
        self.features = FirstView(model, head, len(pairs.indices(0)))
        self.state = {"online_linear": self.linear, "online_linear_optimizer": self.optimizer}
        self.measures = {"online_linear": self.measure}
        self.trained = 0  # steps

    def step(self, step: int) -> dict[str, Tensor]:
        """Learn from the features of `step`, which `model` has just been through; its metrics."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr_at(step)
        labels = self.labels[self.pairs.images.replaced(self.pairs.indices(step))]
        batch = self.features.take(), send(labels, self.accelerator.device)
        top1 = update(self.linear, self.optimizer, *batch, self.accelerator)
        self.trained = step + 1
        return {"online_linear_train": top1}

    @torch.no_grad()
    def measure(self) -> float:
        """Top-1 in percent on the test images, which the processes share."""
        finished = self.trained == self.run.total_steps
        mine = self.share(len(self.test)) if finished else self.sample
        counts = torch.zeros(2, dtype=torch.long)  # right, all
        if len(mine):
            with evaluation_mode(self.encoder):
                features, labels = extract(
                    self.encoder, mine, self.preprocess, self.accelerator.device, progress=False
                )
            logits = self.linear(features.to(self.linear.weight)).cpu()
            counts[0], counts[1] = (logits.argmax(1) == labels).sum(), len(labels)
        right, count = self.accelerator.reduce(counts.to(self.accelerator.device), "sum").tolist()
        if finished:
            self.record(100 * right / count, count)
        return 100 * right / count

    def record(self, top1: float, count: int) -> None:
        """Write the judgement, of `count` test images, as an evaluation does."""
        run = self.run
        known = {"method": run.method, "recipe": run.recipe, "commit": commit(), "finished": True}
        encoder = Encoder(self.encoder, self.preprocess, "encoder", {**run.metadata, **known})
        config = flat(run.cfg, run.run_cfg)
        folder = run.folder / "results"
        subject = Subject(
            encoder, config["data"], run.run_cfg, folder, config, self.accelerator, of_run=True
        )
        record(
            subject,
            task="linear",
            protocol="online",
            metrics={"top1": top1},
            counts=(int((self.labels != HIDDEN).sum()), count),
            interval=confidence(top1, count),
            settings={"batch_size": run.cfg.batch_size},
        )

    def share(self, most: int) -> ImageSplit:
        """This process's share of at most `most` test images, evenly spaced."""
        place, every = torch.arange(len(self.test)), -(-len(self.test) // most)
        turn = place // every % self.accelerator.num_processes == self.accelerator.process_index
        return subset(self.test, turn & (place % every == 0), "a share")


def labels_and_test(run: Run) -> tuple[Tensor, ImageSplit]:
    """(N,) labels of the run's images, `HIDDEN` where they are tested on, and the test images.

    Raises:
        UserError: as of `OnlineLinear`.
    """
    images = run.images
    assert images.plan
    try:
        train, test = open_labelled(images.plan)
        if images.labels is None or train.part is not images.part:
            raise UserError("the images that are trained on have no labels")
        labels = images.labels.clone()  # MISSING is HIDDEN as well
        if test is None:
            _, test = hold_out_fifth(train)
            held_out = torch.as_tensor(test.encoded.indices)
            if images.known is not None:
                held_out = images.known.nonzero()[:, 0][held_out]
            labels[held_out] = HIDDEN
    except UserError as error:
        raise UserError(f"--online-linear: {error}") from error
    run.print(f"online linear classifier: judged on {len(test):,} images of {test.name}")
    return labels, test


def initial(features: int, classes: int, stream: torch.Generator) -> nn.Linear:
    """Haiku's initial weights, which BYOL's code has: see `init_weights` in byol/model.py."""
    linear = nn.utils.skip_init(nn.Linear, features, classes)  # the global stream is not touched
    std = features**-0.5
    nn.init.trunc_normal_(linear.weight, std=std, a=-2 * std, b=2 * std, generator=stream)
    nn.init.zeros_(linear.bias)
    return linear


def update(
    linear: nn.Linear,
    optimizer: torch.optim.Optimizer,
    features: Tensor,
    labels: Tensor,
    accelerator: Accelerator,
) -> Tensor:
    """One step on the mean cross entropy of the labelled images of all processes.

    Args:
        features, labels: (B, F) and (B,) of this process; `HIDDEN` is no label.

    Returns:
        Top-1 in percent on all processes' labelled images, before the step; a scalar.
    """
    logits = linear(features.to(linear.weight.dtype))
    F.cross_entropy(logits, labels, ignore_index=HIDDEN, reduction="sum").backward()
    counts = torch.stack([(logits.argmax(1) == labels).sum(), (labels != HIDDEN).sum()])
    gradients = [parameter.grad for parameter in linear.parameters()]
    *sums, (right, count) = accelerator.reduce([*gradients, counts], "sum")
    for gradient, total in zip(gradients, sums, strict=True):
        torch.div(total, count.clamp(min=1), out=gradient)
    optimizer.step()
    optimizer.zero_grad()
    return 100 * right / count.clamp(min=1)


class FirstView:
    """The (B, F) features of view 1 of a step, without gradient, as `head` gets them.

    `model` is called with view 1 first, or alone. Whether the views pass `head` together or one
    after the other, the first rows are view 1's. A batch may come in K calls, each with every K-th
    image, and once more while gradients are computed, which is passed over.

    The hook is the head's, since one of the encoder would be compiled with it.
    """

    def __init__(self, model: nn.Module, head: nn.Module, batch_size: int) -> None:
        self.batch_size, self.parts = batch_size, list[Tensor]()
        self.awaited = 0  # rows of view 1 in the call under way that have not reached the head
        model.register_forward_pre_hook(self.begin)
        head.register_forward_pre_hook(self.catch)

    def begin(self, model: nn.Module, views: tuple[Tensor, ...]) -> None:
        complete = sum(len(part) for part in self.parts) == self.batch_size
        self.awaited = 0 if complete else len(views[0])

    def catch(self, head: nn.Module, inputs: tuple[Tensor]) -> None:
        if self.awaited:  # a copy, so that no more than view 1 stays in memory
            self.parts.append(inputs[0].detach()[: self.awaited].clone())
            self.awaited = 0

    def take(self) -> Tensor:
        parts, self.parts = self.parts, []
        return torch.stack(parts, dim=1).flatten(0, 1)
