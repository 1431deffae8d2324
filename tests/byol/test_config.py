"""Every setting names its source; recipes are the papers' and can be run, at full size."""

import ast
import dataclasses
import inspect
import math
import re
from dataclasses import replace

import pytest
import torch

import byol.config
from byol import augment
from byol.config import CIFAR10, DEMO, IMAGENET_100, IMAGENET_1000, IMAGENETTE, RECIPES, Config
from byol.model import Online, group_norm_weight_standardised, init_weights
from byol.optim import tau_at
from common import encoders
from common.augment import Batched
from eval.results.published import PUBLISHED
from tests.byol.harness import play
from tests.helpers import ROOT, golden_json

# `likewise`: the source of the line before
SOURCE = re.compile(r"App\. |Sec\. |Table |README|CODE|official code|arXiv|ours|likewise")
NAMES = {"data", "published"}  # what a recipe is about, not a setting: PUBLISHED has the source
CONFIGS = {name: cfg for name, (cfg, _) in RECIPES.items()}


def fields_without_source(source):
    """The fields of a class with no source, neither in a comment nor in the string below."""
    lines, missing, found = source.splitlines(), [], 0
    [kind] = ast.parse(source).body
    for node, below in zip(kind.body, [*kind.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign):
            said = [line.partition("#")[2] for line in lines[node.lineno - 1 : node.end_lineno]]
            said += [below.value.value] if isinstance(below, ast.Expr) else []
            missing += [] if SOURCE.search(" ".join(said)) else [node.target.id]
            found += 1
    return missing, found


def test_every_field_cites_its_source():
    source = inspect.getsource(Config)
    assert fields_without_source(source) == ([], len(dataclasses.fields(Config)))


def test_every_line_of_a_recipe_cites_its_source():
    source = inspect.getsource(byol.config)
    lines, checked = source.splitlines(), 0
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "replace":
            for keyword in node.keywords:
                if keyword.arg in NAMES:
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


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().batch_size = 2
    assert Config() == IMAGENET_100


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"tau_base": 1.5}, "--tau-base 1.5: must be a number from 0 to 1"),
        ({"blur": (0.5, math.nan)}, "--blur nan: must be a number from 0 to 1"),
        ({"base_lr": math.inf}, "--base-lr inf: must be a number from 0 upwards"),
        ({"jitter": (0.4, 0.4, 0.2, 0.6)}, "hue turns by at most 0.5 of a circle"),
        ({"norm": "gn+ws", "hidden_dim": 40}, "--hidden-dim 40: not divisible by 16 groups"),
        ({"batch_size": 4, "accumulate": 4}, "BatchNorm needs two images or more"),
    ],
)
def test_what_cannot_be_is_refused(changed, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        replace(DEMO, **changed)


@pytest.mark.parametrize(
    ("accumulate", "processes", "said"),
    [(1, 3, "not divisible by 3 processes"), (4, 3, "not divisible by 3 processes"),
     (3, 1, "not divisible by 1 processes times --accumulate 3"), (4, 2, "")],
)  # fmt: skip
def test_a_batch_that_cannot_be_shared_is_refused(accumulate, processes, said):
    cfg = replace(DEMO, batch_size=64, accumulate=accumulate)
    if said:
        with pytest.raises(ValueError, match=said):
            cfg.check_world_size(processes)
    else:
        cfg.check_world_size(processes)


def test_a_run_that_is_all_warm_up_is_pointed_out():
    assert replace(DEMO, epochs=2, warmup_epochs=1).advice() == []
    [line] = replace(DEMO, epochs=2, warmup_epochs=2).advice()
    assert line.startswith("the learning rate only rises: --warmup-epochs 2 of --epochs 2; try")


def test_recipes_name_published_rows_of_their_own_setting():
    named = {name: cfg.published for name, cfg in CONFIGS.items() if cfg.published}
    assert named == {
        "imagenette": "byol-imagenette-r18-1000",
        "imagenet-100ep": "byol-r50-100",
        "imagenet-300ep": "byol-r50-300",
        "imagenet": "byol-r50-1000",
        "imagenet-b512": "byol-r50-1000-b512",
        "imagenet-gnws": "byol-gnws-r50-1000",
    }
    for name, key in named.items():
        row, cfg = PUBLISHED[key], CONFIGS[name]
        assert row.method.startswith("BYOL") and ("GN" in row.method) == (cfg.norm == "gn+ws")
        assert row.network.lower().replace("-", "") == cfg.arch, name
        assert (row.batch_size, row.epochs) == (cfg.batch_size, cfg.epochs), name
        assert row.data == ("imagenette" if name == "imagenette" else "imagenet"), name


@pytest.mark.parametrize("epochs", [40, 100, 300, 1000])
def test_presets_are_the_official_ones(epochs):
    """The configuration that the official code makes for a length and a batch of 4096."""
    theirs = golden_json("defaults")["byol"][f"config_{epochs}_b4096"]
    cfg = CONFIGS["imagenet" if epochs == 1000 else f"imagenet-{epochs}ep"]
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
    b512 = CONFIGS["imagenet-b512"]
    assert (b512.batch_size, b512.base_lr, b512.tau_base) == (512, 0.4, 0.9995)
    assert b512 == replace(
        one, batch_size=512, base_lr=0.4, tau_base=0.9995, published=b512.published
    )
    gnws = CONFIGS["imagenet-gnws"]
    assert gnws == replace(one, norm="gn+ws", published=gnws.published)
    quick = (IMAGENETTE.arch, IMAGENETTE.image_size, IMAGENETTE.batch_size, IMAGENETTE.epochs)
    assert quick == ("resnet18", 128, 256, 1000)
    assert (IMAGENETTE.base_lr, IMAGENETTE.weight_decay) == (2.0, 1e-6)
    assert (CIFAR10.arch, CIFAR10.stem, CIFAR10.image_size) == ("resnet18", "cifar", 32)
    assert DEMO.published == CIFAR10.published == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe", [name for name, cfg in CONFIGS.items() if cfg.data == Config().data]
)
def test_imagenet_recipes_take_a_step_at_full_size(recipe):
    """ResNet-50 at 224 pixels on four images, with the functions that pretrain.py calls."""
    cfg = replace(CONFIGS[recipe], batch_size=4)
    assert (cfg.arch, cfg.image_size) == ("resnet50", 224)
    count, step = 100, 20  # in the warm-up: the rate is not 0, as it is at step 0
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (4, 3, 240, 256), dtype=torch.uint8, generator=generator)
    augmentations = [Batched(transform) for transform in augment.views(cfg)]
    view1, view2 = (
        program(images, torch.rand(4, program.draws, generator=generator))
        for program in augmentations
    )
    assert view1.shape == (4, 3, 224, 224) and not torch.equal(view1, view2)

    torch.manual_seed(1)
    online = Online(encoders.build(cfg.arch), cfg.hidden_dim, cfg.dim)
    if cfg.norm == "gn+ws":
        group_norm_weight_standardised(online)
    init_weights(online)
    seen = []

    def observe(online, target, optimizer):
        for network in (online, target):
            seen.append({k: p.detach().clone() for k, p in network.named_parameters()})

    record = play(cfg, count, online, lambda *_: None, [(step, (view1, view2))], observe)
    before, _, after, target = seen
    assert 0 < record.losses[0] < 8
    for name, value in after.items():
        assert value.isfinite().all(), name
        if value.ndim > 1:  # all weights
            assert not torch.equal(value, before[name]), name
    tau = tau_at(step, cfg, count)
    for name, value in target.items():
        expected = tau * before[name] + (1 - tau) * after[name]
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)


def test_readme_lists_every_recipe():
    readme = (ROOT / "byol" / "README.md").read_text()
    for name in RECIPES:
        assert f"| `{name}` |" in readme, name
