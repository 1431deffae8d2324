"""Pretrain MoCo: Algorithm 1 of arXiv 1911.05722 v3, and v2, arXiv 2003.04297.

python -m moco.pretrain                                              # the demo, on a laptop
python -m moco.pretrain cifar10 --data uoft-cs/cifar10 --out RUN     # one GPU
accelerate launch --num_processes 8 -m moco.pretrain imagenet --out RUN
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
    arguments = cli.run(cli.parse, "moco", Config, RECIPES, sys.argv[1:])

from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from common import encoders
from common.data import generator, open_split
from common.errors import one_line
from common.launch import launch, record_cuda_graphs
from common.plan import plan_of
from common.run import Run
from common.views import ViewPairs
from eval.encoder import Preprocess, export_metadata
from eval.knn import online_knn
from eval.online import cosine, online_linear

from . import augment
from .loss import chance_loss, contrastive_top1, info_nce
from .model import MoCo, local_shard, split_batchnorm
from .optim import lr_at, sgd, total_steps

Step = tuple[int, tuple[Tensor, Tensor]]


def main(recipe: str, cfg: Config, run_cfg: RunConfig) -> None:
    """Open images and run, build the networks, and train what is left to train."""
    accelerator = launch(run_cfg.precision, one_thread=cfg.arch == "demo")
    images = open_split(plan_of(cfg.data, run_cfg), run_cfg.split)
    steps = total_steps(cfg, len(images))
    run = Run("moco", recipe, RECIPES[recipe], cfg, run_cfg, accelerator, images, steps)
    pairs = ViewPairs.of_run(
        images,
        augment.views(cfg),
        batch_size=cfg.batch_size,
        run=run_cfg,
        accelerator=accelerator,
        drop_last=True,
    )

    # query network, key network and queue; the optimiser
    set_seed(run_cfg.seed)
    name = encoders.full_name(cfg.arch, cfg.stem)
    make_encoder = partial(encoders.build, name, image_size=cfg.image_size)
    network = MoCo(make_encoder, cfg.head, cfg.dim, cfg.queue_size)
    with one_line():
        split_batchnorm(network, cfg.bn_splits // accelerator.num_processes)
        if cfg.bn_splits == cfg.batch_size:
            check_groups_of_one(make_encoder(), cfg.image_size)
    network.to(accelerator.device, run.dtype, memory_format=torch.channels_last)
    encoder, head = network.encoder_q.encoder, network.encoder_q.head
    optimizer = sgd(network.encoder_q, cfg)

    # a checkpoint's state, what is exported, and how it is measured; a query begins by telling its
    # key from noise, and the embeddings of random weights are nearly alike
    size, channels = cfg.eval_size or cfg.image_size, augment.normalization(cfg)
    preprocess = Preprocess.of(size, interpolation="bilinear", **channels)
    keys = cfg.batch_size * (1 + cfg.symmetric)  # that a step puts into the queue
    filled = -(-cfg.queue_size // keys)
    run.open(
        state={"model": network, "optimizer": optimizer},
        encoder=encoder,
        head=head,
        metadata=export_metadata(name, encoder, preprocess, cfg.published),
        measures=online_knn(run, preprocess, knn=encoder, knn_output=nn.Sequential(encoder, head)),
        collapse_from=filled,
        classifier=online_linear(  # 30: Sec. 4.1
            run, pairs, preprocess, network.encoder_q, head, cosine(run, 30)
        ),
    )
    if run_cfg.compile:
        encoder.compile()
        network.encoder_k.encoder.compile()
    if run_cfg.cuda_graphs:
        views = next(pairs(0, 1))
        record_cuda_graphs(network.encoder_q, views[: 1 + cfg.symmetric], accelerator)
        record_cuda_graphs(network.encoder_k, views[:1], accelerator)
    query, optimizer = accelerator.prepare(network.encoder_q, optimizer)
    run.print(
        f"loss at chance {chance_loss(cfg.queue_size) * (1 + cfg.symmetric):.3f}; the loss RISES "
        f"towards it while keys take the place of noise in the queue, {filled} steps, then it falls"
    )
    loop = train_symmetric if cfg.symmetric else train
    shuffle = partial(permutation, run_cfg.seed, cfg.batch_size)
    loop(
        cfg,
        len(images),
        accelerator,
        network,
        query,
        optimizer,
        shuffle,
        run.steps(pairs),
        run.end_step,
    )
    run.finish()


def train(
    cfg: Config,
    count: int,
    accelerator: Accelerator,
    network: MoCo,
    query: nn.Module,
    optimizer: torch.optim.Optimizer,
    shuffle: Callable[[int, int], Tensor],
    steps: Iterable[Step],
    end_step: Callable[..., None],
) -> None:
    """Algorithm 1, with shuffling BatchNorm (Sec. 3.3).

    Args:
        count: images in an epoch, by which the learning rate changes.
        query, optimizer: `network.encoder_q` and its optimiser, as `accelerator.prepare` gives
            them. Under fp16 a step whose gradients overflow is skipped.
        shuffle: (step, direction), of which there is one here, to the (N,) permutation of the keys.
        steps: (step, (x_q, x_k)) for every step to do, (B, C, H, W) each, of this process.
        end_step: called after each step with its views, embeddings and metrics.
    """
    chance = chance_loss(cfg.queue_size)
    for step, (x_q, x_k) in steps:
        lr = lr_at(step, cfg, count)
        for group in optimizer.param_groups:
            group["lr"] = lr
        (q,) = query(x_q)  # queries: (B, D)
        # PAPER/CODE: the paper moves the key network at the end of a step (Algorithm 1), the code
        # here (builder.py:130): the same sequence, since the first move is that of a copy.
        if not optimizer.step_was_skipped:
            network.momentum_update(cfg.key_momentum)  # Eq. 2
        with accelerator.autocast():
            k = network.encode_keys(x_k, shuffle(step, 0))  # keys of all: (N, D), no gradient
        loss, logits = info_nce(q, local_shard(k), network.queue, cfg.temperature)  # Eq. 1
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if not optimizer.step_was_skipped:
            network.dequeue_and_enqueue(k)
        network.average_statistics()
        metrics = {
            "loss": loss,
            "chance_loss": chance,
            "contrastive_top1": contrastive_top1(logits),
        }
        metrics |= {"queue_fill": network.queue_fill / cfg.queue_size, "lr": lr}
        end_step(step, (x_q, x_k), (q, local_shard(k)), **metrics)


def train_symmetric(
    cfg: Config,
    count: int,
    accelerator: Accelerator,
    network: MoCo,
    query: nn.Module,
    optimizer: torch.optim.Optimizer,
    shuffle: Callable[[int, int], Tensor],
    steps: Iterable[Step],
    end_step: Callable[..., None],
) -> None:
    """The notebook's symmetric loss: each view asks for the other, and the two losses are added.

    Cousin of `train`: the queue of both directions is the same, as it was before the step, and
    gets the keys of both views, view 1's first.
    """
    chance = 2 * chance_loss(cfg.queue_size)
    for step, (view1, view2) in steps:
        lr = lr_at(step, cfg, count)
        for group in optimizer.param_groups:
            group["lr"] = lr
        q1, q2 = query(view1, view2)  # (B, D) each
        if not optimizer.step_was_skipped:
            network.momentum_update(cfg.key_momentum)  # Eq. 2
        with accelerator.autocast():
            k2 = network.encode_keys(view2, shuffle(step, 0))  # (N, D), without gradient
            k1 = network.encode_keys(view1, shuffle(step, 1))
        loss12, logits = info_nce(q1, local_shard(k2), network.queue, cfg.temperature)  # Eq. 1
        loss21, _ = info_nce(q2, local_shard(k1), network.queue, cfg.temperature)
        loss = loss12 + loss21
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if not optimizer.step_was_skipped:
            network.dequeue_and_enqueue(torch.cat([k1, k2]))
        network.average_statistics()
        metrics = {
            "loss": loss,
            "chance_loss": chance,
            "contrastive_top1": contrastive_top1(logits),
        }
        metrics |= {"queue_fill": network.queue_fill / cfg.queue_size, "lr": lr}
        end_step(step, (view1, view2), (q1, local_shard(k2)), **metrics)


def check_groups_of_one(encoder: nn.Module, image_size: int) -> None:
    """Refuse BatchNorm groups of one image where the encoder has a map of a single pixel.

    Raises:
        ValueError: there is nothing to take statistics of.
    """
    try:
        with torch.no_grad():
            encoder.train()(torch.zeros(1, 3, image_size, image_size))
    except ValueError as error:
        raise ValueError(
            "--bn-splits: groups of one image, and a map of one pixel, have no statistics; fewer "
            "groups, or a larger --image-size"
        ) from error


def permutation(seed: int, size: int, step: int, direction: int) -> Tensor:
    """(N,) the shuffle of a step's keys, which every process draws alike (Sec. 3.3)."""
    return torch.randperm(size, generator=generator(seed, "shuffle", step, direction))


if __name__ == "__main__":
    cli.run(main, *arguments)
