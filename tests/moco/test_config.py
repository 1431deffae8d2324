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

import moco.config
from common import encoders
from common.augment import Batched
from eval.results.published import PUBLISHED
from moco import augment
from moco.config import CIFAR10, CIFAR10_SYMMETRIC, MOCO_V1, MOCO_V2, RECIPES, Config
from moco.model import MoCo, split_batchnorm
from moco.optim import sgd
from moco.pretrain import permutation, train
from tests.helpers import ROOT, golden_json

SOURCE = re.compile(r"Sec\. |Table |README|CODE|official code|notebook|ours")
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
    source = inspect.getsource(moco.config)
    said, checked = comments(source), 0
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "replace":
            for keyword in node.keywords:
                if keyword.arg not in NAMES:
                    assert SOURCE.search(said[keyword.lineno]), keyword.arg
                    checked += 1
    assert checked >= 25


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().batch_size = 2
    assert Config() == MOCO_V1


def test_recipes_name_published_rows_of_their_own_setting():
    for name, cfg in CONFIGS.items():
        if name == "demo":
            assert cfg.published == ""
            continue
        row = PUBLISHED[cfg.published]
        assert row.method.startswith("MoCo"), name
        assert row.network.lower().replace("-", "") == cfg.arch, name
        assert (row.batch_size, row.epochs) == (cfg.batch_size, cfg.epochs), name
        assert row.data == ("cifar10" if "cifar10" in cfg.data else "imagenet"), name
    assert "v1" in PUBLISHED[CONFIGS["imagenet-v1"].published].method
    assert {"imagenet", "imagenet-800ep", "cifar10-symmetric"} < set(RECIPES)


def test_version_1_is_the_official_defaults():
    flags = golden_json("defaults")["moco_args"]
    same = {
        "arch": "arch",
        "epochs": "epochs",
        "batch_size": "batch_size",
        "base_lr": "lr",
        "momentum": "momentum",
        "weight_decay": "weight_decay",
        "dim": "moco_dim",
        "queue_size": "moco_k",
        "key_momentum": "moco_m",
        "temperature": "moco_t",
    }
    for ours, theirs in same.items():
        assert getattr(MOCO_V1, ours) == flags[theirs], ours
    assert list(MOCO_V1.milestones) == flags["schedule"]
    assert MOCO_V1.head == "linear" and MOCO_V1.schedule == "step"


def test_what_version_2_changes():
    changed = {
        f.name for f in dataclasses.fields(Config)
        if getattr(MOCO_V1, f.name) != getattr(MOCO_V2, f.name)
    }  # fmt: skip
    assert changed == {"head", "views", "temperature", "schedule", "published"}
    assert (MOCO_V2.head, MOCO_V2.temperature, MOCO_V2.schedule) == ("mlp", 0.2, "cosine")


def test_the_notebooks_settings():
    cfg = CIFAR10
    assert (cfg.batch_size, cfg.queue_size, cfg.key_momentum, cfg.temperature) == (
        512,
        4096,
        0.99,
        0.1,
    )
    assert (cfg.weight_decay, cfg.bn_splits, cfg.base_lr * 2, cfg.dim) == (5e-4, 8, 0.06, 128)
    assert not cfg.symmetric and CIFAR10_SYMMETRIC.symmetric


@pytest.mark.parametrize("recipe", ["imagenet-v1", "imagenet", "imagenet-800ep"])
def test_imagenet_recipes_take_a_step_at_full_size(recipe):
    """ResNet-50 at 224 pixels on four images, through the loop itself."""
    cfg = replace(CONFIGS[recipe], batch_size=4, bn_splits=2, queue_size=6)
    assert (cfg.arch, cfg.image_size) == ("resnet50", 224)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 240, 256), dtype=torch.uint8, generator=generator)
    programs = [Batched(transform) for transform in augment.views(cfg)]
    views = [program(images, torch.rand(4, program.draws)) for program in programs]
    assert views[0].shape == (4, 3, 224, 224) and not torch.equal(*views)

    torch.manual_seed(0)
    network = MoCo(lambda: encoders.build(cfg.arch), cfg.head, cfg.dim, cfg.queue_size)
    split_batchnorm(network, cfg.bn_splits)
    before = {k: p.detach().clone() for k, p in network.named_parameters()}
    seen, accelerator = [], Accelerator(cpu=True)
    query, optimizer = accelerator.prepare(network.encoder_q, sgd(network.encoder_q, cfg))
    train(
        cfg,
        100,
        accelerator,
        network,
        query,
        optimizer,
        lambda step, direction: permutation(1, 4, step, direction),
        [(0, views)],
        lambda step, views, embeddings, **metrics: seen.append(embeddings),
    )

    [(q, k)] = seen
    assert q.shape == k.shape == (4, cfg.dim) and network.queue_ptr == network.queue_fill == 4
    for name, parameter in network.named_parameters():
        assert parameter.isfinite().all(), name
        moved = not torch.equal(parameter, before[name])
        assert moved == name.startswith("encoder_q"), name  # the first key update is of a copy


# ---- what cannot be, and what is seldom meant ----------------------------------------------------


@pytest.mark.parametrize(
    "change, flag",
    [
        ({"image_size": 11}, "--image-size 11: must be a number from 12"),  # v2's blur
        ({"bn_splits": 0}, "--bn-splits 0"),
        ({"temperature": 0.0}, "--temperature 0.0"),
        ({"temperature": math.nan}, "--temperature nan"),
        ({"key_momentum": 1.5}, "--key-momentum 1.5"),
        ({"queue_size": 0}, "--queue-size 0"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"epochs": -1}, "--epochs -1"),
        ({"base_lr": math.inf}, "--base-lr inf"),
        ({"crop_min_area": 1.5}, "--crop-min-area 1.5"),
        ({"dim": 0}, "--dim 0"),
    ],
)
def test_values_out_of_range_are_refused_by_their_flag(change, flag):
    with pytest.raises(ValueError, match=f"^{re.escape(flag)}"):
        replace(MOCO_V2, **change)


@pytest.mark.parametrize(
    "change, processes, said",
    [
        ({}, 3, "--bn-splits 8: cannot be shared by 3 processes; try --bn-splits 9"),
        ({}, 16, "--bn-splits 8: cannot be shared by 16 processes; try --bn-splits 16"),
        ({"batch_size": 100}, 1, "--batch-size 100: cannot be cut into 8"),
        ({"batch_size": 4}, 1, "--batch-size 4: cannot be cut into 8"),
        ({"batch_size": 100}, 3, "--batch-size 100: not divisible by 3 processes"),
    ],
)
def test_groups_that_cannot_be(change, processes, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        replace(MOCO_V2, **({"batch_size": 48} | change)).check_world_size(processes)


def test_recipes_can_be_shared_and_mean_what_they_say():
    for cfg in CONFIGS.values():
        assert cfg.advice() == []
        for processes in (1, 2, 4):
            cfg.check_world_size(processes)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"epochs": 100}, "the learning rate stays as it is: --milestones 120 160 of --epochs 100"),
        ({"bn_splits": 1}, "--bn-splits 1: one BatchNorm group, in which shuffled keys hide"),
        ({"bn_splits": 256}, "--bn-splits 256: BatchNorm groups of one image"),
    ],
)
def test_what_is_seldom_meant_is_pointed_out(change, said):
    [line] = replace(MOCO_V1, **change).advice()
    assert line.startswith(said)


def test_readme_names_every_recipe():
    readme = (ROOT / "moco" / "README.md").read_text()
    assert all(f"| `{name}` |" in readme for name in RECIPES)
