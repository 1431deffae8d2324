"""Every setting names its source; recipes are the papers' and can be run, at full size."""

import ast
import dataclasses
import inspect
import re
from dataclasses import replace

import pytest
import torch

import moco.config
from common.augment import Batched
from common.cli import UserError
from eval.published import PUBLISHED
from moco import augment, pretrain
from moco.config import CIFAR10, CIFAR10_SYMMETRIC, MOCO_V1, MOCO_V2, RECIPES, Config
from moco.loss import info_nce
from moco.model import MoCo, own, split_batchnorm
from moco.optim import lr_at, sgd
from tests.helpers import ROOT, golden_json

SOURCE = re.compile(r"Sec\. |Table |README|CODE|notebook|ours|published.py")
NAMES = {"data", "out", "published"}  # what a recipe is about, not a setting


def comment_of(line):
    return line.partition("#")[2]


def test_every_field_cites_its_source():
    lines = [x for x in inspect.getsource(Config).splitlines() if re.match(r"    \w+: .+ = ", x)]
    assert len(lines) == len(dataclasses.fields(Config))
    assert [line for line in lines if not SOURCE.search(comment_of(line))] == []


def test_every_line_of_a_recipe_cites_its_source():
    source = inspect.getsource(moco.config)
    lines, checked = source.splitlines(), 0
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "replace":
            for keyword in node.keywords:
                if keyword.arg not in NAMES:
                    assert SOURCE.search(comment_of(lines[keyword.lineno - 1])), keyword.arg
                    checked += 1
    assert checked >= 25


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 2
    assert Config() == MOCO_V1


def test_recipes_name_published_rows_of_their_own_setting():
    for name, cfg in RECIPES.items():
        if name == "demo":
            assert cfg.published == ""
            continue
        row = PUBLISHED[cfg.published]
        assert row.method.startswith("MoCo"), name
        assert row.network.lower().replace("-", "") == cfg.arch, name
        assert (row.batch_size, row.epochs) == (cfg.batch_size, cfg.epochs), name
        assert row.data == ("cifar10" if "cifar10" in cfg.data else "imagenet"), name
    assert "v1" in PUBLISHED[RECIPES["imagenet-v1"].published].method
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


IMAGENET_RECIPES = [name for name in RECIPES if name.startswith("imagenet")]


@pytest.mark.parametrize("recipe", IMAGENET_RECIPES)
def test_imagenet_recipes_take_a_step_at_full_size(recipe):
    """ResNet-50 at 224 pixels on four images, with the functions that pretrain.py calls."""
    cfg = replace(RECIPES[recipe], batch_size=4, bn_splits=2, queue_size=6)
    assert (cfg.arch, cfg.image_size) == ("resnet50", 224)
    generator = torch.Generator().manual_seed(cfg.seed)
    images = torch.randint(0, 256, (4, 3, 240, 256), dtype=torch.uint8, generator=generator)
    programs = [Batched(transform) for transform in augment.views(cfg)]
    view1, view2 = (
        program(images, torch.rand(4, program.draws, generator=generator)) for program in programs
    )
    assert view1.shape == (4, 3, 224, 224) and not torch.equal(view1, view2)

    torch.manual_seed(cfg.seed)
    network = split_batchnorm(MoCo(cfg), cfg.bn_splits)
    optimizer = sgd(network.encoder_q, cfg)
    before = {k: p.detach().clone() for k, p in network.named_parameters()}
    for group in optimizer.param_groups:
        group["lr"] = lr_at(0, cfg, 100)
    (q,) = network.encoder_q(view1)
    network.update_key(cfg.key_momentum)
    k = network.keys(view2, pretrain.permutation(cfg, 0, 0))
    loss, logits = info_nce(q, own(k), network.queue, cfg.temperature)
    loss.backward()
    optimizer.step()
    network.enqueue(k)

    assert q.shape == k.shape == (4, cfg.dim) and logits.shape == (4, 7)
    assert loss.isfinite() and loss > 0 and network.queue_ptr == 4
    for name, parameter in network.named_parameters():
        assert parameter.isfinite().all(), name
        moved = not torch.equal(parameter, before[name])
        assert moved == name.startswith("encoder_q"), name  # the first key update is of a copy


def test_there_are_three_imagenet_recipes():
    assert IMAGENET_RECIPES == ["imagenet-v1", "imagenet", "imagenet-800ep"]


@pytest.mark.parametrize(
    "change, processes, said",
    [
        ({"bn_splits": 8}, 3, "--bn-splits 8: cannot be shared by 3 processes; try --bn-splits 9"),
        ({"bn_splits": 8}, 16, "try --bn-splits 16"),
        ({"bn_splits": 0}, 1, "try --bn-splits 1"),
        ({"batch_size": 8}, 1, "--batch-size 8: cannot be cut into 8"),
        ({"batch_size": 100}, 1, "--batch-size 100: cannot be cut into 8"),
        ({"image_size": 11}, 1, "--image-size 11: v2's blur needs 12 or more"),
    ],
)
def test_sizes_that_cannot_be(change, processes, said):
    with pytest.raises(UserError, match=re.escape(said)):
        pretrain.check_sizes(replace(MOCO_V2, **change), processes)


def test_sizes_of_the_recipes():
    for cfg in RECIPES.values():
        for processes in (1, 2, 4):
            pretrain.check_sizes(cfg, processes)


def test_readme_lists_every_recipe_and_disagreement():
    readme = (ROOT / "moco" / "README.md").read_text()
    for name in RECIPES:
        assert f"| `{name}` |" in readme, name
    tags = sum(path.read_text().count("PAPER/CODE:") for path in (ROOT / "moco").glob("*.py"))
    section = readme.split("## Where paper and official code disagree")[1].split("\n## ")[0]
    listed = [line for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(listed) == tags > 5
