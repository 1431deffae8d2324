"""Pretrain SimCLR: Algorithm 1 of arXiv 2002.05709 v3.

python -m simclr.pretrain                                              # the demo, on a laptop
python -m simclr.pretrain cifar10 --data uoft-cs/cifar10 --out RUN     # one GPU
accelerate launch --num_processes 8 -m simclr.pretrain imagenet --out RUN
"""

import sys

import torch
from accelerate.utils import set_seed

from common import cli
from common.data import open_images
from common.run import DTYPES, Run, launch
from common.views import Pairs
from eval import health
from eval.encoder import Input, metadata
from eval.knn import Monitor

from . import augment
from .config import RECIPES, Config
from .loss import chance_loss, contrastive_top1, nt_xent
from .model import SimCLR, globalize
from .optim import LARS, lr_at, parameter_groups, total_steps


def main() -> None:
    recipe, cfg = cli.parse(Config, RECIPES, sys.argv[1:], "python -m simclr.pretrain")
    accelerator = launch(cfg.precision, cfg.processes)
    dtype = DTYPES.get(cfg.precision, torch.float32)
    columns = {"image_column": cfg.image_column, "label_column": cfg.label_column}

    # images in, view pairs out
    images = open_images(cfg.data, cfg.split, **columns)
    cli.check_batch(cfg.batch_size, len(images), accelerator.num_processes)
    check_chunk(cfg, accelerator.num_processes)
    run = Run(cfg, "simclr", recipe, accelerator, len(images), total_steps(cfg, len(images)))
    if cfg.warmup_epochs >= cfg.epochs:
        given = f"--warmup-epochs {cfg.warmup_epochs:g} of --epochs {cfg.epochs:g}"
        run.say(f"the learning rate only rises: {given}; try --warmup-epochs {cfg.epochs / 10:g}")
    run.say(images.load(cfg.memory_gb))
    pairs = Pairs.of_run(images, augment.views(cfg), cfg, accelerator, dtype=dtype)

    # f and g, their optimiser, and what goes into a checkpoint
    set_seed(cfg.seed)
    network = globalize(SimCLR(cfg)).to(dtype=dtype, memory_format=torch.channels_last)
    if cfg.compile:
        network.encoder.compile()
    optimizer = LARS(parameter_groups(network, cfg.weight_decay), cfg.momentum)
    state = {"model": network, "optimizer": optimizer}
    run.resume(state)
    model, optimizer = accelerator.prepare(network, optimizer)

    # how the encoder is judged, now by the kNN monitor and later by eval/
    given = Input.of(cfg.test_size or cfg.image_size)  # CODE: no mean and standard deviation
    about = metadata(cfg.arch, cfg.stem, given, cfg.published)
    monitor = Monitor.of_run(run, given, columns)

    chance = chance_loss(cfg.batch_size)
    run.say(f"loss at chance {chance:.3f} = 2 log(2N - 1); it falls from there")
    for step, (view1, view2) in run.steps(pairs):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, cfg, len(images))
        z1, z2 = model(view1, view2)  # (B, D) each
        loss, logits = nt_xent(z1, z2, cfg.temperature)  # Eq. 1
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

        if step == run.first:
            run.log_views(step, view1, view2)
        if run.logs(step):
            figures = health.panel(*accelerator.gather((z1, z2)))
            run.warn_once(health.diagnosis(figures))
            top1 = contrastive_top1(logits)
            run.log(step, loss=loss, chance_loss=chance, contrastive_top1=top1, **figures)
            run.log(step, lr=lr_at(step, cfg, len(images)))
        if monitor and run.due(step, cfg.knn_every):
            run.log(step, knn=monitor(network.encoder, accelerator.device))
        if run.due(step, cfg.save_every):
            run.export(step + 1, network.encoder, network.head, **about)
            run.save(step + 1, state)
    run.finish()


def check_chunk(cfg: Config, processes: int) -> None:
    """Refuse chunks that do not make up the batch or cannot be shared.

    Raises:
        UserError: with what to change.
    """
    chunk = cfg.cache_chunk
    if chunk and (chunk % processes or cfg.batch_size % chunk):
        raise cli.UserError(
            f"--cache-chunk {chunk}: must divide --batch-size {cfg.batch_size} and be a multiple "
            f"of the {processes} processes; 0 for the whole batch at once"
        )


if __name__ == "__main__":
    cli.run(main)
