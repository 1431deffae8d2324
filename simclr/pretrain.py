"""Pretrain SimCLR: Algorithm 1 of arXiv 2002.05709 v3.

python -m simclr.pretrain                                              # the demo, on a laptop
python -m simclr.pretrain cifar10 --data uoft-cs/cifar10 --out RUN     # one GPU
accelerate launch --num_processes 8 -m simclr.pretrain imagenet --out RUN
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
    arguments = cli.run(cli.parse, "simclr", Config, RECIPES, sys.argv[1:])

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
from eval.online import cosine, online_linear

from . import augment
from .grad_cache import GradCache
from .loss import chance_loss, contrastive_top1, nt_xent
from .model import SimCLR, globalize, init_weights
from .optim import lars, lr_at, total_steps


def main(recipe: str, cfg: Config, run_cfg: RunConfig) -> None:
    """Open images and run, build the networks, and train what is left to train."""
    accelerator = launch(run_cfg.precision, one_thread=cfg.arch == "demo")
    images = open_split(plan_of(cfg.data, run_cfg), run_cfg.split)
    steps = total_steps(cfg, len(images))
    run = Run("simclr", recipe, RECIPES[recipe], cfg, run_cfg, accelerator, images, steps)
    pairs = ViewPairs.of_run(
        images,
        augment.views(cfg),
        batch_size=cfg.batch_size,
        run=run_cfg,
        accelerator=accelerator,
    )

    # f and g and their optimiser
    set_seed(run_cfg.seed)
    name = encoders.full_name(cfg.arch, cfg.stem)
    network = SimCLR(encoders.build(name, image_size=cfg.image_size), cfg.head_layers, cfg.head_dim)
    if not encoders.keeps_its_weights(name):
        init_weights(network)
    with one_line():
        globalize(network).to(dtype=run.dtype, memory_format=torch.channels_last)
    optimizer = lars(network, cfg)

    # a checkpoint's state, what is exported, and how it is measured; the paper does not normalise
    preprocess = Preprocess.of(cfg.eval_size or cfg.image_size)
    run.open(
        state={"model": network, "optimizer": optimizer},
        encoder=network.encoder,
        head=network.head,
        metadata=export_metadata(name, network.encoder, preprocess, cfg.published),
        measures=online_knn(run, preprocess, knn=network.encoder),
        classifier=online_linear(  # 0.1: App. B.6
            run, pairs, preprocess, network, network.head, cosine(run, 0.1)
        ),
    )
    if run_cfg.compile:
        network.encoder.compile()
    if run_cfg.cuda_graphs:
        record_cuda_graphs(network, next(pairs(0, 1)), accelerator)
    chunks = cfg.batch_size // cfg.grad_cache_chunk if cfg.grad_cache_chunk else 1
    model, optimizer = accelerator.prepare(
        GradCache(network, chunks) if chunks > 1 else network, optimizer
    )
    run.print(f"loss at chance {chance_loss(cfg.batch_size):.3f} = 2 log(2N - 1); it falls")
    train(cfg, len(images), accelerator, model, optimizer, run.steps(pairs), run.end_step)
    run.finish()


def train(
    cfg: Config,
    count: int,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: Iterable[tuple[int, tuple[Tensor, Tensor]]],
    end_step: Callable[..., None],
) -> None:
    """Algorithm 1.

    Args:
        count: images in an epoch, by which the learning rate changes.
        model, optimizer: as `accelerator.prepare` gives them.
        steps: (step, (view1, view2)) for every step to do, (B, C, H, W) each, of this process.
        end_step: called after each step with its views, embeddings and metrics.
    """
    chance = chance_loss(cfg.batch_size)
    for step, (view1, view2) in steps:
        lr = lr_at(step, cfg, count)
        for group in optimizer.param_groups:
            group["lr"] = lr
        z1, z2 = model(view1, view2)  # (B, D) each
        loss, logits = nt_xent(z1, z2, cfg.temperature)  # Eq. 1
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        top1 = contrastive_top1(logits)
        metrics = {"loss": loss, "chance_loss": chance, "contrastive_top1": top1, "lr": lr}
        end_step(step, (view1, view2), (z1, z2), **metrics)


if __name__ == "__main__":
    cli.run(main, *arguments)
