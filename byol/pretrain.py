"""Pretrain BYOL: Algorithm 1 of arXiv 2006.07733 v3.

python -m byol.pretrain                                              # the demo, on a laptop
python -m byol.pretrain cifar10 --data uoft-cs/cifar10 --out RUN     # one GPU
accelerate launch --num_processes 8 -m byol.pretrain imagenet --out RUN
"""

import sys
from collections.abc import Callable, Iterable

try:
    from common import cli
except ImportError as error:  # another `common` comes first on the path, or nothing is installed
    way_out = "activate .venv, or pass over the current folder: python -P -m ..."
    print(f"error: {error}; {way_out}", file=sys.stderr)
    sys.exit(2)
from common.config import RunConfig

from .config import RECIPES, Config

if __name__ == "__main__":  # a mistake is reported before torch is imported
    arguments = cli.run(cli.parse, "byol", Config, RECIPES, sys.argv[1:])

from contextlib import nullcontext
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from common import encoders
from common.data import open_split
from common.errors import one_line
from common.launch import launch, record_cuda_graphs
from common.plan import plan_of
from common.run import Run
from common.views import ViewPairs
from eval.encoder import Preprocess, export_metadata
from eval.knn import online_knn
from eval.online import online_linear

from . import augment
from .loss import byol_loss, chance_loss
from .model import (
    Online,
    Target,
    ema_,
    globalize,
    group_norm_weight_standardised,
    init_weights,
)
from .optim import LARS, lars, lr_at, parameter_groups, tau_at, total_steps

Step = tuple[int, tuple[Tensor, Tensor]]


def main(recipe: str, cfg: Config, run_cfg: RunConfig) -> None:
    """Open images and run, build the networks, and train what is left to train."""
    accelerator = launch(run_cfg.precision, one_thread=cfg.arch == "demo")
    images = open_split(plan_of(cfg.data, run_cfg), run_cfg.split)
    steps = total_steps(cfg, len(images))
    run = Run("byol", recipe, RECIPES[recipe], cfg, run_cfg, accelerator, images, steps)
    pairs = ViewPairs.of_run(
        images,
        augment.views(cfg),
        batch_size=cfg.batch_size,
        run=run_cfg,
        accelerator=accelerator,
    )

    # online and target, and the optimiser
    set_seed(run_cfg.seed)
    name = encoders.full_name(cfg.arch, cfg.stem)
    network = Online(encoders.build(name, image_size=cfg.image_size), cfg.hidden_dim, cfg.dim)
    with one_line():
        if cfg.norm == "gn+ws":
            group_norm_weight_standardised(network)
        if not encoders.keeps_its_weights(name):
            init_weights(network)
        globalize(network).to(dtype=run.dtype, memory_format=torch.channels_last)
    target = Target(network).to(accelerator.device)
    optimizer = lars(network, cfg)

    # a checkpoint's state, what is exported, and how it is measured
    preprocess = Preprocess.of(cfg.eval_size or cfg.image_size, mean=cfg.mean, std=cfg.std)
    run.open(
        state={"online": network, "target": target, "optimizer": optimizer},
        encoder=network.encoder,
        head=network.projector,
        metadata=export_metadata(name, network.encoder, preprocess, cfg.published, cfg.norm),
        measures=online_knn(run, preprocess, knn=network.encoder),
        classifier=online_linear(
            run,
            pairs,
            preprocess,
            network,
            network.projector,
            lr_at=partial(lr_at, cfg=cfg, count=len(images)),
            optimizer=partial(classifier_lars, cfg),
        ),
    )
    if run_cfg.compile:
        network.encoder.compile()
        target.encoder.compile()
    if run_cfg.cuda_graphs:
        views = next(pairs(0, 1))
        record_cuda_graphs(network, views, accelerator)
        record_cuda_graphs(target, views, accelerator)
    online, optimizer = accelerator.prepare(network, optimizer)
    run.print(f"loss at chance {chance_loss():.3f} = 2 + 2; low is not good: see feature_std")
    loop = train_in_parts if cfg.accumulate > 1 else train
    loop(cfg, len(images), accelerator, online, target, optimizer, run.steps(pairs), run.end_step)
    run.finish()


def train(
    cfg: Config,
    count: int,
    accelerator: Accelerator,
    online: nn.Module,
    target: Target,
    optimizer: torch.optim.Optimizer,
    steps: Iterable[Step],
    end_step: Callable[..., None],
) -> None:
    """Algorithm 1.

    Args:
        count: images in an epoch, by which learning rate and tau change.
        online, optimizer: as `accelerator.prepare` gives them. Under fp16 a step whose gradients
            overflow is skipped.
        steps: (step, (view1, view2)) for every step to do, (B, C, H, W) each, of this process.
        end_step: called after each step with its views, embeddings and metrics.
    """
    network = accelerator.unwrap_model(online)
    for step, (view1, view2) in steps:
        p1, p2 = online(view1, view2)  # (B, D) each
        with torch.no_grad(), accelerator.autocast():
            z1, z2 = target(view1, view2)  # (B, D) each, no gradient
        loss = byol_loss(p1, z2) + byol_loss(p2, z1)  # Eq. 2, both ways
        accelerator.backward(loss)
        lr, tau = lr_at(step, cfg, count), tau_at(step, cfg, count)
        for group in optimizer.param_groups:
            group["lr"] = group["lr_multiplier"] * lr
        optimizer.step()
        optimizer.zero_grad()
        if not optimizer.step_was_skipped:
            ema_(target, network, tau)  # Eq. 1, with the new weights
        metrics = {"loss": loss, "chance_loss": chance_loss(), "lr": lr, "tau": tau}
        end_step(step, (view1, view2), (z1, z2), **metrics)


def train_in_parts(
    cfg: Config,
    count: int,
    accelerator: Accelerator,
    online: nn.Module,
    target: Target,
    optimizer: torch.optim.Optimizer,
    steps: Iterable[Step],
    end_step: Callable[..., None],
) -> None:
    """Algorithm 1 with the batch of a step in `cfg.accumulate` equal parts (Sec. 5).

    Cousin of `train`: the gradients of the parts are added up before the one update. A part takes
    every `accumulate`-th image, so that it holds the same images on any number of processes, and
    BatchNorm, which sees one part at a time, has the same statistics. The embeddings that are
    looked at after a step are those of its last part.
    """
    network, parts = accelerator.unwrap_model(online), cfg.accumulate
    for step, (view1, view2) in steps:
        losses = []
        for i in range(parts):
            part1, part2 = view1[i::parts], view2[i::parts]
            with nullcontext() if i + 1 == parts else accelerator.no_sync(online):
                p1, p2 = online(part1, part2)
                with torch.no_grad(), accelerator.autocast():
                    z1, z2 = target(part1, part2)
                loss = byol_loss(p1, z2) + byol_loss(p2, z1)
                accelerator.backward(loss / parts)
            losses.append(loss.detach())
        lr, tau = lr_at(step, cfg, count), tau_at(step, cfg, count)
        for group in optimizer.param_groups:
            group["lr"] = group["lr_multiplier"] * lr
        optimizer.step()
        optimizer.zero_grad()
        if not optimizer.step_was_skipped:
            ema_(target, network, tau)
        mean = sum(losses) / parts
        metrics = {"loss": mean, "chance_loss": chance_loss(), "lr": lr, "tau": tau}
        end_step(step, (view1, view2), (z1, z2), **metrics)


def classifier_lars(cfg: Config, linear: nn.Linear) -> LARS:
    """The optimiser of `--online-linear`: that of the networks, at their rate and decay.

    CODE byol_experiment.py:256-276: one loss with BYOL's own. The paper has no such classifier.
    """
    adaptation = cfg.optimizer == "lars"
    return LARS(parameter_groups(linear, cfg.weight_decay, adaptation), cfg.momentum)


if __name__ == "__main__":
    cli.run(main, *arguments)
