"""Every setting names its source; recipes are the papers' and can be run, at full size."""

import ast
import dataclasses
import inspect
import math
import re
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

import simclr.config
from common import encoders
from common.augment import Batched
from eval.results.published import PUBLISHED
from simclr import augment
from simclr.config import CIFAR10, CIFAR10_R50, IMAGENET_100, IMAGENET_1000, RECIPES, Config
from simclr.model import SimCLR, init_weights
from simclr.optim import lars
from simclr.pretrain import train
from tests.helpers import ROOT, golden_json

# `from memory`: no original could be read, and the line says so
SOURCE = re.compile(
    r"App\. |Sec\. |Table |README|CODE|official code|arXiv|ours|from memory|step in"
)
NAMES = {"data", "published"}  # what a recipe is about: not settings
CONFIGS = {name: cfg for name, (cfg, _) in RECIPES.items()}


def comments(source):
    """{line number: its comment}"""
    lines = enumerate(source.splitlines(), 1)
    return {n: line.partition("#")[2] for n, line in lines}


def fields_without_source(source):
    """The fields of a class with no source, neither in a comment nor in the docstring below."""
    [kind], said = ast.parse(source).body, comments(source)
    missing, found = [], 0
    for node, following in zip(kind.body, [*kind.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign):
            text = " ".join(said[n] for n in range(node.lineno, node.end_lineno + 1))
            if isinstance(following, ast.Expr):
                text += following.value.value
            missing += [] if SOURCE.search(text) else [node.target.id]
            found += 1
    return missing, found


def test_every_field_cites_its_source():
    source = inspect.getsource(Config)
    assert fields_without_source(source) == ([], len(dataclasses.fields(Config)))


def test_every_line_of_a_recipe_cites_its_source():
    source = inspect.getsource(simclr.config)
    said, checked = comments(source), 0
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "replace":
            for keyword in node.keywords:
                if keyword.arg not in NAMES:
                    assert SOURCE.search(said[keyword.lineno]), keyword.arg
                    checked += 1
    assert checked >= 20


def test_the_check_of_sources_can_fail():
    lines = [
        "class C:",
        "    a: int = 1  # (Sec. 2)",
        "    b: int = 1",
        "    c: int = 1  # (guess)",
        '    """more (guess)"""',
        "    d: int = 1",
        '    """more (Table 2)"""',
    ]
    assert fields_without_source("\n".join(lines)) == (["b", "c"], 4)


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().batch_size = 2
    assert Config() == IMAGENET_100


# ---- what cannot be ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, flag",
    [
        ({"temperature": 0.0}, "--temperature 0.0"),
        ({"temperature": math.nan}, "--temperature nan"),
        ({"base_lr": math.inf}, "--base-lr inf"),
        ({"base_lr": -1.0}, "--base-lr -1.0"),
        ({"epochs": 0}, "--epochs 0"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"crop_min_area": 1.5}, "--crop-min-area 1.5"),
        ({"blur": 1.1}, "--blur 1.1"),
        ({"jitter": 2.6}, "--jitter 2.6"),
        ({"head_layers": 0}, "--head-layers 0"),
        ({"grad_cache_chunk": -1}, "--grad-cache-chunk -1"),
        ({"momentum": 2.0}, "--momentum 2.0"),
    ],
)
def test_values_out_of_range_are_refused_by_their_flag(change, flag):
    with pytest.raises(ValueError, match=f"^{re.escape(flag)}: must be a number from"):
        replace(CIFAR10, **change)


def test_batches_that_the_processes_cannot_share():
    cfg = replace(CIFAR10, batch_size=24, grad_cache_chunk=12)
    for world_size in (1, 2, 3, 4):
        cfg.check_world_size(world_size)
    with pytest.raises(ValueError, match="--batch-size 24: not divisible by 5 processes"):
        cfg.check_world_size(5)
    with pytest.raises(ValueError, match=r"--grad-cache-chunk 12: .* multiple of the 8 processes"):
        cfg.check_world_size(8)
    with pytest.raises(ValueError, match="--grad-cache-chunk 9: must divide --batch-size 24"):
        replace(cfg, grad_cache_chunk=9).check_world_size(1)


def test_a_run_that_is_all_warm_up_is_pointed_out():
    assert all(cfg.advice() == [] for cfg in CONFIGS.values())
    [line] = replace(CIFAR10, epochs=2, warmup_epochs=2).advice()
    assert line.startswith("the learning rate only rises: --warmup-epochs 2 of --epochs 2; try")


# ---- recipes -------------------------------------------------------------------------------------


def test_recipes_name_published_rows_of_their_own_setting():
    for name, cfg in CONFIGS.items():
        if name == "demo":
            assert cfg.published == ""  # on images of our own: nothing was published
            continue
        row = PUBLISHED[cfg.published]
        assert row.method.startswith("SimCLR"), name
        assert row.network.lower().replace("-", "") == cfg.arch, name
        assert row.batch_size == cfg.batch_size and row.epochs in (None, cfg.epochs), name
        assert row.data == ("cifar10" if "cifar10" in cfg.data else "imagenet"), name


def test_recipes_agree_with_the_official_defaults():
    """Flags of the official code; weight decay by the TF2 program, which kept version 1's."""
    flags = golden_json("defaults")["simclr_tf2_flags"]
    same = {
        "base_lr": "learning_rate",
        "lr_scaling": "learning_rate_scaling",
        "warmup_epochs": "warmup_epochs",
        "weight_decay": "weight_decay",
        "momentum": "momentum",
        "temperature": "temperature",
        "head_dim": "proj_out_dim",
        "image_size": "image_size",
        "jitter": "color_jitter_strength",
        "epochs": "train_epochs",
    }
    for ours, theirs in same.items():
        assert getattr(IMAGENET_100, ours) == flags[theirs], ours
    assert CONFIGS["imagenet-v2"].head_layers == CIFAR10.head_layers == flags["num_proj_layers"]
    decays = {golden_json("defaults")[f"simclr_tf{v}_flags"]["weight_decay"] for v in (1, 2)}
    assert decays == {1e-6, 1e-4} == {cfg.weight_decay for cfg in CONFIGS.values()}


def test_papers_settings():
    """The numbers that a reader would look up first."""
    assert (IMAGENET_1000.batch_size, IMAGENET_1000.epochs) == (4096, 1000)
    assert (CIFAR10.batch_size, CIFAR10.temperature, CIFAR10.jitter) == (512, 0.5, 0.5)
    assert (CIFAR10.arch, CIFAR10.stem, CIFAR10.blur, CIFAR10.image_size) == (
        "resnet18",
        "cifar",
        0.0,
        32,
    )
    assert (CIFAR10_R50.arch, CIFAR10_R50.batch_size, CIFAR10_R50.head_layers) == (
        "resnet50",
        1024,
        2,
    )


@pytest.mark.parametrize("recipe", ["imagenet-100ep", "imagenet", "imagenet-v2"])
def test_imagenet_recipes_take_a_step_at_full_size(recipe):
    """ResNet-50 at 224 pixels on four images, through the loop itself."""
    cfg = replace(CONFIGS[recipe], batch_size=4)
    assert (cfg.arch, cfg.image_size) == ("resnet50", 224)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 240, 256), dtype=torch.uint8, generator=generator)
    programs = [Batched(transform) for transform in augment.views(cfg)]
    views = [program(images, torch.rand(4, program.draws)) for program in programs]
    assert views[0].shape == (4, 3, 224, 224) and not torch.equal(*views)

    torch.manual_seed(0)
    model = SimCLR(encoders.build(cfg.arch), cfg.head_layers, cfg.head_dim)
    init_weights(model)
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    steps, seen = [(20, views)], []  # in the warm-up: the rate is not 0, as it is at step 0
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(model, lars(model, cfg))
    train(cfg, 100, accelerator, *prepared, steps, lambda *a, **metrics: seen.append(a))

    [(step, _, (z1, z2))] = seen
    assert step == 20 and z1.shape == z2.shape == (4, cfg.head_dim)
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        if parameter.ndim > 1 or name == "head.1.weight":  # all weights, and a gain of the head
            assert not torch.equal(parameter, before[name]), name


def test_readme_names_every_recipe():
    readme = (ROOT / "simclr" / "README.md").read_text()
    assert all(f"| `{name}` |" in readme for name in RECIPES)
