"""The published figures: each with its source and what reproduces it, none known to be wrong."""

import importlib
import re

import pytest

from eval import finetune, linear
from eval.results.published import DATA, PUBLISHED, SOURCES
from tests.helpers import METHODS

# the protocols that eval/ has; `online` is a classifier trained during pretraining
PROTOCOLS = {("knn", "weighted"), ("transfer", "logistic"), ("linear", "online")}
PROTOCOLS |= {("linear", name) for name in linear.PROTOCOLS}
PROTOCOLS |= {("finetune", name) for name in finetune.PROTOCOLS}
CONFIGS = {
    f"{method} {recipe}": config
    for method in METHODS
    for recipe, (config, _) in importlib.import_module(f"{method}.config").RECIPES.items()
}


def test_every_row_is_whole():
    assert len(PUBLISHED) > 180
    for key, row in PUBLISHED.items():
        assert re.fullmatch(r"[a-z0-9.-]+", key), key
        assert row.method and row.network and row.data in DATA, key
        assert 0 <= row.value < (row.top5 or 100) <= 100, key
        assert row.epochs is None or row.epochs in (100, 200, 300, 400, 800, 1000), key
        assert row.metric in ("top1", "mean_per_class", "map11"), key
        assert row.settings.keys() <= {"k", "temperature", "layer", "label_percent"}, key
        named = [name for name in SOURCES if re.search(rf"(?<!\S){name}(?![\w-])", row.source)]
        assert named or row.source.startswith("arXiv "), key


def test_every_row_has_a_recipe_that_exists_or_is_context():
    of_recipes = {config.published for config in CONFIGS.values()} - {""}
    assert of_recipes <= PUBLISHED.keys()
    for key, row in PUBLISHED.items():
        if row.recipe == "context":
            continue
        config = CONFIGS[row.recipe]
        assert (row.task, row.protocol) in PROTOCOLS, key
        assert row.method.lower().startswith(row.recipe.split()[0]), key
        assert row.network.lower().replace("-", "") == config.arch, key
        assert row.variant.keys() <= vars(config).keys(), key  # flags reach it from the recipe
        trained_on = row.pretrained or row.data
        assert trained_on.startswith("imagenet") == ("imagenet" in row.recipe), key
    for name, config in CONFIGS.items():
        row = PUBLISHED.get(config.published)
        assert row is None or row.recipe in (name, "context"), name
    matched = sum(row.recipe != "context" for row in PUBLISHED.values())
    assert matched == 119


@pytest.mark.parametrize(
    "key, value, top5",
    [
        ("simclr-v1-r50-1000", 69.3, 89.0),
        ("simclr-v1-r50-800-b4096-sqrt", 69.1, None),
        ("simclr-v2-r50-800", 71.7, None),
        ("moco-v1-r50-200", 60.6, None),
        ("moco-v1-mlp-r50-200-tau0.2", 66.2, None),
        ("moco-v2-r50-800", 71.1, None),
        ("moco-cifar10-sym-400", 88.5, None),
        ("byol-r50-1000", 74.3, 91.6),
        ("byol-r50-300-accumulate64", 59.7, 83.2),
        ("byol-gnws-r50-1000", 73.9, None),
        ("byol-r50-finetune-10", 68.8, 89.0),
        ("simclr-v2-r50-distilled-finetune-1", 73.9, None),
        ("simclr-transfer-finetune-flowers102", 97.0, None),
        ("byol-transfer-linear-food101", 75.3, None),
        ("byol-cifar10-r18-800-b512-lightly", 91.0, None),
        ("simclr-cifar10-r50-1000-linear-augmented-dkobak", 93.7, None),
    ],
)
def test_figures_of_the_sources(key, value, top5):
    assert (PUBLISHED[key].value, PUBLISHED[key].top5) == (value, top5)


def test_what_is_often_quoted_wrongly_is_said():
    assert "71.1" in PUBLISHED["simclr-v2-r50-800"].note
    assert "73.9 is GN + WS" in PUBLISHED["byol-gnws-r50-1000"].note
    chosen = [key for key, row in PUBLISHED.items() if row.source == "lightly"]
    assert len(chosen) == 9
    assert all("best epoch on test" in PUBLISHED[key].note for key in chosen)


def test_no_two_rows_are_of_one_setting():
    settings = [str(row).replace(f"value={row.value}", "") for row in PUBLISHED.values()]
    assert len(settings) == len(set(settings))
