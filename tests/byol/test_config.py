"""Every setting names its source; recipes are complete and can be run, at full size."""

import ast
import dataclasses
import inspect
import re
from dataclasses import replace

import pytest
import torch

import byol.config
from byol import augment
from byol.config import CIFAR10, DEMO, IMAGENET_100, IMAGENET_1000, IMAGENETTE, RECIPES, Config
from byol.loss import regression
from byol.model import Online, Target, ema_
from byol.optim import LARS, lr_at, parameter_groups, tau_at
from common.augment import Batched
from eval.published import PUBLISHED
from tests.helpers import ROOT, golden_json

SOURCE = re.compile(r"App\. |Sec\. |Table |README|CODE|arXiv|ours|likewise|published.py")
NAMES = {"data", "published"}  # what a recipe is about, not a setting: PUBLISHED has the source


def fields_without_source(source):
    """Names of annotated fields with no source, beside them or in the string below."""
    lines = source.splitlines()
    found = [i for i, line in enumerate(lines) if re.match(r"    \w+: .+ = ", line)]
    below = [lines[i + 1] if lines[i + 1 : i + 2] and '"""' in lines[i + 1] else "" for i in found]
    said = [lines[i].partition("#")[2] + more for i, more in zip(found, below, strict=True)]
    names = [lines[i].split(":")[0].strip() for i in found]
    return [n for n, s in zip(names, said, strict=True) if not SOURCE.search(s)], len(found)


def test_every_field_cites_its_source():
    missing, found = fields_without_source(inspect.getsource(Config))
    assert found == len(dataclasses.fields(Config))
    assert missing == []


def test_every_line_of_a_recipe_cites_its_source():
    source = inspect.getsource(byol.config)
    lines, checked = source.splitlines(), 0
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "replace":
            for keyword in node.keywords:
                if keyword.arg in NAMES | {"out"}:
                    continue
                said = lines[keyword.lineno - 1].partition("#")[2]
                assert SOURCE.search(said), keyword.arg
                checked += 1
    assert checked >= 30


def test_the_check_of_sources_can_fail():
    source = (
        'class C:\n    a: int = 1  # (Sec. 2)\n    b: int = 1\n    c: int = 1\n    """Guessed"""\n'
    )
    assert fields_without_source(source) == (["b", "c"], 3)


def test_config_is_frozen_and_flat():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 2
    for field in dataclasses.fields(Config):
        assert isinstance(field.default, bool | int | float | str | tuple | None), field.name
    assert Config() == IMAGENET_100


def test_recipes_name_published_rows_of_their_own_setting():
    named = {name: cfg.published for name, cfg in RECIPES.items() if cfg.published}
    assert named == {
        "imagenette": "byol-imagenette-r18-1000",
        "imagenet-100ep": "byol-r50-100",
        "imagenet-300ep": "byol-r50-300",
        "imagenet": "byol-r50-1000",
        "imagenet-b512": "byol-r50-1000-b512",
        "imagenet-gnws": "byol-gnws-r50-1000",
    }
    for name, key in named.items():
        row, cfg = PUBLISHED[key], RECIPES[name]
        assert row.method.startswith("BYOL") and ("GN" in row.method) == (cfg.norm == "gn+ws")
        assert row.network.lower().replace("-", "") == cfg.arch, name
        assert (row.batch_size, row.epochs) == (cfg.batch_size, cfg.epochs), name
        assert row.data == ("imagenette" if name == "imagenette" else "imagenet"), name


@pytest.mark.parametrize("epochs", [40, 100, 300, 1000])
def test_presets_are_the_official_ones(epochs):
    """The configuration that the official code makes for a length and a batch of 4096."""
    theirs = golden_json("defaults")["byol"][f"config_{epochs}_b4096"]
    cfg = RECIPES["imagenet" if epochs == 1000 else f"imagenet-{epochs}ep"]
    network, optimizer = theirs["network_config"], theirs["optimizer_config"]
    assert (cfg.epochs, cfg.batch_size) == (epochs, theirs["batch_size"])
    assert cfg.base_lr == theirs["lr_schedule_config"]["base_learning_rate"]
    assert cfg.tau_base == theirs["base_target_ema"]
    assert (cfg.weight_decay, cfg.momentum) == (optimizer["weight_decay"], optimizer["momentum"])
    assert cfg.hidden_dim == network["projector_hidden_size"] == network["predictor_hidden_size"]
    assert cfg.dim == network["projector_output_size"]
    assert cfg.arch == network["encoder_class"].lower() and cfg.norm == "bn"


def test_papers_settings():
    """The numbers that a reader would look up first."""
    one = IMAGENET_1000
    assert (one.batch_size, one.epochs, one.base_lr) == (4096, 1000, 0.2)
    assert (one.weight_decay, one.tau_base, one.hidden_dim, one.dim) == (1.5e-6, 0.996, 4096, 256)
    b512 = RECIPES["imagenet-b512"]
    assert (b512.batch_size, b512.base_lr, b512.tau_base) == (512, 0.4, 0.9995)
    assert b512 == replace(
        one, batch_size=512, base_lr=0.4, tau_base=0.9995, published=b512.published
    )
    gnws = RECIPES["imagenet-gnws"]
    assert gnws == replace(one, norm="gn+ws", published=gnws.published)
    quick = (IMAGENETTE.arch, IMAGENETTE.image_size, IMAGENETTE.batch_size, IMAGENETTE.epochs)
    assert quick == ("resnet18", 128, 256, 1000)
    assert (IMAGENETTE.base_lr, IMAGENETTE.weight_decay) == (2.0, 1e-6)
    assert (CIFAR10.arch, CIFAR10.stem, CIFAR10.image_size) == ("resnet18", "cifar", 32)
    assert DEMO.published == CIFAR10.published == ""


IMAGENET_RECIPES = [
    name for name in RECIPES if name.startswith("imagenet") and name != "imagenette"
]


@pytest.mark.slow
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
    online = Online(cfg)
    target = Target(online)
    optimizer = LARS(parameter_groups(online, cfg.weight_decay), cfg.momentum)
    before = {k: p.detach().clone() for k, p in online.named_parameters()}
    p1, p2 = online(view1, view2)
    with torch.no_grad():
        z1, z2 = target(view1, view2)
    loss = regression(p1, z2) + regression(p2, z1)
    loss.backward()
    for group in optimizer.param_groups:
        group["lr"] = lr_at(step, cfg, count)
    optimizer.step()
    tau = tau_at(step, cfg, count)
    ema_(target, online, tau)

    assert p1.shape == z1.shape == (4, cfg.dim)
    assert loss.isfinite() and 0 < loss < 8
    for name, parameter in online.named_parameters():
        assert parameter.isfinite().all(), name
        if parameter.ndim > 1:  # all weights
            assert not torch.equal(parameter, before[name]), name
    for name, parameter in target.named_parameters():
        expected = tau * before[name] + (1 - tau) * online.get_parameter(name)
        torch.testing.assert_close(parameter, expected.detach(), rtol=1e-5, atol=1e-7)


def test_there_are_six_imagenet_recipes():
    assert len(IMAGENET_RECIPES) == 6


def test_readme_lists_every_recipe_and_disagreement():
    readme = (ROOT / "byol" / "README.md").read_text()
    for name in RECIPES:
        assert f"| `{name}` |" in readme, name
    tags = sum(path.read_text().count("PAPER/CODE:") for path in (ROOT / "byol").glob("*.py"))
    section = readme.split("## Where paper and official code disagree")[1].split("\n## ")[0]
    listed = [line for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(listed) == tags > 3
