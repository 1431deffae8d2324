"""Pretrain BYOL: Algorithm 1 of arXiv 2006.07733 v3.

python -m byol.pretrain                                              # the demo, on a laptop
python -m byol.pretrain cifar10 --data uoft-cs/cifar10 --out RUN     # one GPU
accelerate launch --num_processes 8 -m byol.pretrain imagenet --out RUN
"""

import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn

from common import cli
from common.data import open_images
from common.run import DTYPES, Run, launch
from common.views import Pairs
from eval import health
from eval.encoder import Input, metadata
from eval.knn import Monitor

from . import augment
from .config import RECIPES, Config
from .loss import chance_loss, regression
from .model import Online, Target, ema_, globalize
from .optim import LARS, lr_at, parameter_groups, tau_at, total_steps


def main() -> None:
    recipe, cfg = cli.parse(Config, RECIPES, sys.argv[1:], "python -m byol.pretrain")
    accelerator = launch(cfg.precision, cfg.processes)
    dtype = DTYPES.get(cfg.precision, torch.float32)
    columns = {"image_column": cfg.image_column, "label_column": cfg.label_column}

    # images in, view pairs out
    images = open_images(cfg.data, cfg.split, **columns)
    cli.check_batch(cfg.batch_size, len(images), accelerator.num_processes)
    check_sizes(cfg, accelerator.num_processes)
    run = Run(cfg, "byol", recipe, accelerator, len(images), total_steps(cfg, len(images)))
    if cfg.warmup_epochs >= cfg.epochs:
        given = f"--warmup-epochs {cfg.warmup_epochs:g} of --epochs {cfg.epochs:g}"
        run.say(f"the learning rate only rises: {given}; try --warmup-epochs {cfg.epochs / 10:g}")
    run.say(images.load(cfg.memory_gb))
    pairs = Pairs.of_run(images, augment.views(cfg), cfg, accelerator, dtype=dtype)

    # online and target, the optimiser, and what goes into a checkpoint
    set_seed(cfg.seed)
    network = globalize(Online(cfg)).to(dtype=dtype, memory_format=torch.channels_last)
    target = Target(network).to(accelerator.device)
    if cfg.compile:
        network.encoder.compile()
        target.encoder.compile()
    decay, adapt = cfg.weight_decay, cfg.optimizer == "lars"
    groups = parameter_groups(nn.ModuleList([network.encoder, network.projector]), decay, adapt)
    groups += parameter_groups(network.predictor, decay, adapt, times=cfg.predictor_lr)
    optimizer = LARS(groups, cfg.momentum)
    state = {"online": network, "target": target, "optimizer": optimizer}
    run.resume(state)
    online, optimizer = accelerator.prepare(network, optimizer)

    # how the online encoder is judged, now by the kNN monitor and later by eval/
    given = Input.of(cfg.test_size or cfg.image_size, mean=cfg.mean, std=cfg.std)
    about = metadata(cfg.arch, cfg.stem, given, cfg.published) | {"norm": cfg.norm}
    monitor = Monitor.of_run(run, given, columns)

    chance = chance_loss()
    run.say(f"loss at chance {chance:.3f} = 2 + 2; low is not good: see feature_std")
    losses: list[Tensor] = []
    for step, (view1, view2), last in micro_batches(run.steps(pairs), cfg.accumulate):
        with nullcontext() if last else accelerator.no_sync(online):
            p1, p2 = online(view1, view2)  # (B, D) each
            with torch.no_grad(), accelerator.autocast():
                z1, z2 = target(view1, view2)  # (B, D) each, no gradient
            loss = regression(p1, z2) + regression(p2, z1)  # Eq. 2, both ways
            accelerator.backward(loss / cfg.accumulate)
        losses.append(loss.detach())
        if not last:
            continue
        for group in optimizer.param_groups:
            group["lr"] = group["times"] * lr_at(step, cfg, len(images))
        optimizer.step()
        optimizer.zero_grad()
        if not optimizer.step_was_skipped:  # fp16: after an overflow nothing moves
            ema_(target, network, tau_at(step, cfg, len(images)))  # Eq. 1, with the new weights

        if step == run.first:
            run.log_views(step, view1, view2)
        if run.logs(step):
            figures = health.panel(*accelerator.gather((z1, z2)))
            run.warn_once(health.diagnosis(figures))
            run.log(step, loss=sum(losses) / cfg.accumulate, chance_loss=chance, **figures)
            run.log(step, lr=lr_at(step, cfg, len(images)), tau=tau_at(step, cfg, len(images)))
        if monitor and run.due(step, cfg.knn_every):
            run.log(step, knn=monitor(network.encoder, accelerator.device))
        if run.due(step, cfg.save_every):
            run.export(step + 1, network.encoder, network.projector, **about)
            run.save(step + 1, state)
        losses.clear()
    run.finish()


def micro_batches(
    steps: Iterable[tuple[int, tuple[Tensor, Tensor]]], parts: int
) -> Iterator[tuple[int, tuple[Tensor, Tensor], bool]]:
    """(step, part of the two views, whether it is the step's last) for equal parts of each step.

    A part takes every `parts`-th image, so that it holds the same images on any number of
    processes, and BatchNorm, which sees one part at a time, has the same statistics.
    """
    for step, (view1, view2) in steps:
        for i in range(parts):
            yield step, (view1[i::parts], view2[i::parts]), i + 1 == parts


def check_sizes(cfg: Config, processes: int) -> None:
    """Refuse parts of a batch that are unequal or too small to normalise, and impossible widths.

    Raises:
        UserError: with what to change.
    """
    if cfg.batch_size % (cfg.accumulate * processes):
        parts = f"{processes} processes times --accumulate {cfg.accumulate}"
        raise cli.UserError(f"--batch-size {cfg.batch_size}: not divisible by {parts}")
    if cfg.norm == "bn" and cfg.batch_size == cfg.accumulate:
        raise cli.UserError(
            f"--batch-size {cfg.batch_size}: BatchNorm needs two images or more in each of the "
            f"{cfg.accumulate} parts (--accumulate)"
        )
    if cfg.norm == "gn+ws" and cfg.hidden_dim % 16:
        raise cli.UserError(f"--hidden-dim {cfg.hidden_dim}: not divisible by 16 groups of gn+ws")
    if cfg.jitter[3] > 0.5:
        raise cli.UserError(f"--jitter ... {cfg.jitter[3]}: hue turns by at most 0.5 of the circle")


if __name__ == "__main__":
    cli.run(main)
