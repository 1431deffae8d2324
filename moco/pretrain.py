"""Pretrain MoCo: Algorithm 1 of arXiv 1911.05722 v3, and v2, arXiv 2003.04297.

python -m moco.pretrain                                              # the demo, on a laptop
python -m moco.pretrain cifar10 --data uoft-cs/cifar10 --out RUN     # one GPU
accelerate launch --num_processes 8 -m moco.pretrain imagenet --out RUN
"""

import sys

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn

from common import cli
from common.data import generator, open_images
from common.run import DTYPES, Run, launch
from common.views import Pairs
from eval import health
from eval.encoder import Input, metadata
from eval.knn import Monitor

from . import augment
from .config import RECIPES, Config
from .loss import chance_loss, contrastive_top1, info_nce
from .model import MoCo, gather, own, split_batchnorm
from .optim import lr_at, sgd, total_steps


def main() -> None:
    recipe, cfg = cli.parse(Config, RECIPES, sys.argv[1:], "python -m moco.pretrain")
    accelerator = launch(cfg.precision, cfg.processes)
    dtype = DTYPES.get(cfg.precision, torch.float32)
    columns = {"image_column": cfg.image_column, "label_column": cfg.label_column}

    # images in, view pairs out
    images = open_images(cfg.data, cfg.split, **columns)
    cli.check_batch(cfg.batch_size, len(images), accelerator.num_processes)
    check_sizes(cfg, accelerator.num_processes)
    run = Run(cfg, "moco", recipe, accelerator, len(images), total_steps(cfg, len(images)))
    if cfg.schedule == "step" and min(cfg.milestones, default=cfg.epochs) >= cfg.epochs:
        given = f"--milestones {' '.join(map(str, cfg.milestones))} of --epochs {cfg.epochs:g}"
        run.say(f"the learning rate stays as it is: {given}")
    if cfg.bn_splits == 1:  # Sec. 3.3, "Shuffling BN"
        run.say("--bn-splits 1: one BatchNorm group, in which shuffled keys hide nothing; try 8")
    run.say(images.load(cfg.memory_gb))
    views = augment.views(cfg)
    pairs = Pairs.of_run(images, views, cfg, accelerator, dtype=dtype, drop_last=True)

    # query network, key network and queue, the optimiser, and what goes into a checkpoint
    set_seed(cfg.seed)
    network = split_batchnorm(MoCo(cfg), cfg.bn_splits // accelerator.num_processes)
    network.to(accelerator.device, dtype, memory_format=torch.channels_last)
    if cfg.compile:
        network.encoder_q.encoder.compile()
        network.encoder_k.encoder.compile()
    optimizer = sgd(network.encoder_q, cfg)
    state = {"model": network, "optimizer": optimizer}
    run.resume(state)
    query, optimizer = accelerator.prepare(network.encoder_q, optimizer)

    # how the encoder is judged, now by the kNN monitor and later by eval/
    size = cfg.test_size or cfg.image_size
    given = Input.of(size, interpolation="bilinear", **augment.normalization(cfg))
    about = metadata(cfg.arch, cfg.stem, given, cfg.published)
    monitor = Monitor.of_run(run, given, columns)
    encoder, head = network.encoder_q.encoder, network.encoder_q.head

    chance = chance_loss(cfg.queue_size) * (1 + cfg.symmetric)
    filled = -(-cfg.queue_size // (cfg.batch_size * (1 + cfg.symmetric)))
    run.say(
        f"loss at chance {chance:.3f} = {'2 ' * cfg.symmetric}log(1 + K); the loss RISES towards it"
        f" while keys take the place of noise in the queue, {filled} steps, and then falls"
    )
    for step, (view1, view2) in run.steps(pairs):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, cfg, len(images))
        ways = 1 + cfg.symmetric  # view 1 asks for view 2; and the other way round
        query_views, key_views = [view1, view2][:ways], [view2, view1][:ways]
        q = query(*query_views)  # (B, D) each
        # PAPER/CODE: the paper moves the key network at the end of a step (Algorithm 1), the code
        # here (builder.py:130): the same sequence, since the first move is that of a copy.
        if not optimizer.step_was_skipped:  # fp16: the query network is where it was
            network.update_key(cfg.key_momentum)  # Eq. 2
        with accelerator.autocast():
            shuffles = [permutation(cfg, step, i) for i in range(len(key_views))]
            k = list(map(network.keys, key_views, shuffles))  # (N, D) each, without gradient
        terms = [  # against the queue as it was: (loss, logits) for each direction
            info_nce(one, own(key), network.queue, cfg.temperature)  # Eq. 1
            for one, key in zip(q, k, strict=True)
        ]
        loss = sum(value for value, _ in terms)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if not optimizer.step_was_skipped:  # fp16: keys of an overflow may be infinite
            network.enqueue(torch.cat(k[::-1]))  # keys of view 1 first
        network.average_statistics()

        if step == run.first:
            run.log_views(step, view1, view2)
        if run.logs(step):
            figures = health.panel(gather(q[0].detach()), k[0])
            if step >= filled:  # at first all keys are nearly alike, as the weights are random
                run.warn_once(health.diagnosis(figures))
            top1, fill = contrastive_top1(terms[0][1]), network.queue_fill / cfg.queue_size
            run.log(step, loss=loss, chance_loss=chance, contrastive_top1=top1, queue_fill=fill)
            run.log(step, lr=lr_at(step, cfg, len(images)), **figures)
        if monitor and run.due(step, cfg.knn_every):
            run.log(step, knn=monitor(encoder, accelerator.device))
            run.log(step, knn_output=monitor(nn.Sequential(encoder, head), accelerator.device))
        if run.due(step, cfg.save_every):
            run.export(step + 1, encoder, head, **about)
            run.save(step + 1, state)
    run.finish()


def permutation(cfg: Config, step: int, direction: int) -> Tensor:
    """(N,) the shuffle of a step's keys, which every process draws alike (Sec. 3.3)."""
    stream = generator(cfg.seed, "shuffle", step, direction)
    return torch.randperm(cfg.batch_size, generator=stream)


def check_sizes(cfg: Config, processes: int) -> None:
    """Refuse BatchNorm groups that cannot be shared out or hold one image, and views too small.

    Raises:
        UserError: with what to change.
    """
    if cfg.views == "v2" and cfg.image_size <= augment.BLUR_TAPS // 2:
        least = augment.BLUR_TAPS // 2 + 1
        raise cli.UserError(f"--image-size {cfg.image_size}: v2's blur needs {least} or more")
    if cfg.bn_splits < 1 or cfg.bn_splits % processes:
        near = processes * max(1, round(cfg.bn_splits / processes))
        raise cli.UserError(
            f"--bn-splits {cfg.bn_splits}: cannot be shared by {processes} processes; "
            f"try --bn-splits {near}"
        )
    if cfg.batch_size % cfg.bn_splits or cfg.batch_size < 2 * cfg.bn_splits:
        raise cli.UserError(
            f"--batch-size {cfg.batch_size}: cannot be cut into {cfg.bn_splits} equal BatchNorm "
            "groups (--bn-splits) of two images or more"
        )


if __name__ == "__main__":
    cli.run(main)
