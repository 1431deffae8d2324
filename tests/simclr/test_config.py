"""Every setting names its source; recipes are complete and can be run, at full size."""

import ast
import dataclasses
import inspect
import re
from dataclasses import replace

import pytest
import torch

import simclr.config
from common.augment import Batched
from eval.published import PUBLISHED
from simclr import augment
from simclr.config import CIFAR10, CIFAR10_R50, IMAGENET_100, IMAGENET_1000, RECIPES, Config
from simclr.loss import nt_xent
from simclr.model import SimCLR
from simclr.optim import LARS, lr_at, parameter_groups
from tests.helpers import ROOT, golden_json

# `likewise`: the source of the line before; `checkpoint`: the name of the released one;
# `secondary source`: no original could be read, and the line says so; `published.py`: its rows do.
SOURCE = re.compile(
    r"App\. |Sec\. |Table |README|CODE|arXiv|ours|likewise|checkpoint|secondary source|published.py"
)
NAMES = {"data", "out", "published"}  # what a recipe is about and where it goes: not settings


def comment_of(line):
    return line.partition("#")[2] if "#" in line else ""


def fields_without_source(source):
    """Names of annotated fields whose line ends in no comment, or one without a source."""
    lines = [line for line in source.splitlines() if re.match(r"    \w+: .+ = ", line)]
    return [
        line.split(":")[0].strip() for line in lines if not SOURCE.search(comment_of(line))
    ], len(lines)


def test_every_field_cites_its_source():
    missing, found = fields_without_source(inspect.getsource(Config))
    assert found == len(dataclasses.fields(Config))
    assert missing == []


def test_every_line_of_a_recipe_cites_its_source():
    source = inspect.getsource(simclr.config)
    lines, checked = source.splitlines(), 0
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "replace":
            for keyword in node.keywords:
                if keyword.arg in NAMES:
                    continue
                assert SOURCE.search(comment_of(lines[keyword.lineno - 1])), keyword.arg
                checked += 1
    assert checked >= 20


def test_the_check_of_sources_can_fail():
    lines = [
        "class C:",
        "    a: int = 1  # (Sec. 2)",
        "    b: int = 1",
        "    c: int = 1  # (guess)",
    ]
    assert fields_without_source("\n".join(lines)) == (["b", "c"], 3)


def test_config_is_frozen_and_flat():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 2
    for field in dataclasses.fields(Config):
        assert isinstance(field.default, bool | int | float | str | None), field.name
    assert Config() == IMAGENET_100


def test_recipes_name_published_rows_of_their_own_setting():
    for name, cfg in RECIPES.items():
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
    assert RECIPES["imagenet-v2"].head_layers == CIFAR10.head_layers == flags["num_proj_layers"]
    decays = {golden_json("defaults")[f"simclr_tf{v}_flags"]["weight_decay"] for v in (1, 2)}
    assert decays == {1e-6, 1e-4} == {cfg.weight_decay for cfg in RECIPES.values()}


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


IMAGENET_RECIPES = [name for name in RECIPES if name.startswith("imagenet")]


@pytest.mark.parametrize("recipe", IMAGENET_RECIPES)
def test_imagenet_recipes_take_a_step_at_full_size(recipe):
    """ResNet-50 at 224 pixels on four images, with the functions that pretrain.py calls."""
    cfg = replace(RECIPES[recipe], batch_size=4)
    assert (cfg.arch, cfg.image_size) == ("resnet50", 224)
    count, step = 100, 20  # in the warm-up: the rate is not 0, as it is at step 0
    generator = torch.Generator().manual_seed(cfg.seed)
    images = torch.randint(0, 256, (4, 3, 240, 256), dtype=torch.uint8, generator=generator)
    programs = [Batched(transform) for transform in augment.views(cfg)]
    view1, view2 = (
        program(images, torch.rand(4, program.draws, generator=generator)) for program in programs
    )
    assert view1.shape == (4, 3, 224, 224) and not torch.equal(view1, view2)

    torch.manual_seed(cfg.seed)
    model = SimCLR(cfg)
    optimizer = LARS(parameter_groups(model, cfg.weight_decay), cfg.momentum)
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    for group in optimizer.param_groups:
        group["lr"] = lr_at(step, cfg, count)
    z1, z2 = model(view1, view2)
    loss, logits = nt_xent(z1, z2, cfg.temperature)
    loss.backward()
    optimizer.step()

    assert z1.shape == (4, cfg.head_dim) and logits.shape == (4, 4)
    assert loss.isfinite() and loss > 0
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        if parameter.ndim > 1 or name == "head.1.weight":  # all weights, and a gain of the head
            assert not torch.equal(parameter, before[name]), name


def test_there_are_three_imagenet_recipes():
    assert IMAGENET_RECIPES == ["imagenet-100ep", "imagenet", "imagenet-v2"]


def test_readme_lists_every_recipe_and_disagreement():
    readme = (ROOT / "simclr" / "README.md").read_text()
    for name in RECIPES:
        assert f"| `{name}` |" in readme, name
    tags = sum(path.read_text().count("PAPER/CODE:") for path in (ROOT / "simclr").glob("*.py"))
    section = readme.split("## Where paper and official code disagree")[1].split("\n## ")[0]
    listed = [line for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(listed) == tags > 5
