"""What the Markdown files and the lists promise is there: links, commands, recipes, their cost."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import byol.config
import moco.config
import simclr.config
from common import encoders
from tests.helpers import METHODS, ROOT, exported, pretrain
from tests.test_tour import draw

PAGES = [
    *ROOT.glob("*.md"),
    *(
        p
        for folder in (*METHODS, "common", "eval", "docs", "tests")
        for p in ROOT.glob(f"{folder}/**/*.md")
    ),
]
RECIPES = {
    "SimCLR": (simclr.config.RECIPES, simclr.config.PUBLISHED),
    "MoCo": (moco.config.RECIPES, moco.config.PUBLISHED),
    "BYOL": (byol.config.RECIPES, byol.config.PUBLISHED),
}

# ---- links and commands --------------------------------------------------------------------------


def targets(text):
    """Relative links, modules after `-m` and paths that a page names, as paths from the root."""
    yield from re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    own = "|".join((*METHODS, "common", "eval", "tests", "docs"))
    for module in re.findall(rf"-m ((?:{own})(?:\.\w+)*)(?![\w/])", text):
        yield f"/{module.replace('.', '/')}"
    yield from (
        f"/{path}" for path in re.findall(rf"(?<![\w./])((?:{own})/[\w./]+\.(?:py|sh|md))\b", text)
    )


def is_there(page, target):
    path = ROOT / target[1:] if target.startswith("/") else page.parent / target
    return path.exists() or path.with_suffix(".py").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_is_there(page):
    assert [target for target in targets(page.read_text()) if not is_there(page, target)] == []


def test_a_wrong_name_is_seen():
    text = "[a](no/such.md), `python -m eval.nothing RUN`, `simclr/none.py`, [b](https://x.org)"
    assert [*targets(text)] == ["no/such.md", "/eval/nothing", "/simclr/none.py"]
    assert not any(is_there(ROOT / "README.md", target) for target in targets(text))


# ---- the Python on the pages ---------------------------------------------------------------------

ENCODERS = {  # runs with torchvision's network, and with two others of the same names of tensors
    "torchvision": ("simclr", "cifar10", "--stem", "imagenet"),
    "cifar stem": ("simclr", "cifar10"),
    "GN + WS": ("byol", "imagenet-gnws", "--arch", "resnet18"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Each of `ENCODERS` after a step on images in a folder, which is the last."""
    folder = tmp_path_factory.mktemp("encoders")
    draw(folder / "images", 16)
    few = ("--image-size", 32, "--batch-size", 8, "--epochs", 0.5, "--warmup-epochs", 0)
    for name, (method, *argv) in ENCODERS.items():
        pretrain(
            method,
            *argv,
            *few,
            "--knn-every",
            0,
            "--data",
            folder / "images",
            "--out",
            folder / name,
        )
    return folder


def block_of(page, holding, run, images, **replaced):
    """The one Python block of a page with some text in it, for a run and a folder of images."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    [block] = [block for block in blocks if holding in block]
    for word, by in {"RUN": run, "path/to/images": images, **replaced}.items():
        block = block.replace(word, str(by))
    found = {}
    exec(block, found)
    return found


def test_every_python_block_of_the_front_door_is_run_here():
    for page, count in (("README.md", 1), ("docs/encoders.md", 1)):
        assert (ROOT / page).read_text().count("```python") == count


@pytest.mark.parametrize("name", ENCODERS)
def test_the_encoder_of_any_run_is_one_call(name, runs):
    """The tensors are the run's, each of them, and the features those of an evaluation."""
    found = block_of("README.md", "prepare(", runs / name, runs / "images")
    network = found["encoder"].network
    tensors, about = exported(runs / name)
    state = network.state_dict()
    assert state.keys() == {key for key in tensors if not key.startswith("head.")}
    assert all(torch.equal(value, tensors[key]) for key, value in state.items())
    assert not network.training and found["images"].shape == (8, 3, 32, 32)
    assert (about["norm"] == '"gn+ws"') == any(
        isinstance(module, torch.nn.GroupNorm) for module in network.modules()
    )
    assert (network.conv1.kernel_size == (3, 3)) == (name == "cifar stem")
    judged = block_of("docs/encoders.md", "encode(", runs / name, runs / "images")
    assert judged["features"].shape == (16, 512) and len(judged["index"]) == 16
    assert torch.allclose(found["features"], judged["features"][:8], atol=1e-5)


# ---- the table of recipes ------------------------------------------------------------------------


def table():
    """{(method, recipe): the other cells} of README.md's table."""
    lines = (ROOT / "README.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {
        (row[0], row[1].strip("`")): row[2:] for row in rows if row[0] in RECIPES and len(row) == 6
    }


def hours(method, cfg):
    """README.md's estimate: images x epochs x operations, at the rate that is assumed there."""
    size = cfg.image_size
    network = encoders.build(encoders.full_name(cfg.arch, cfg.stem), image_size=size).to("meta")
    with FlopCounterMode(display=False) as counter:
        network.eval()(torch.empty(1, 3, size, size, device="meta"))
    forwards = {"SimCLR": 6, "MoCo": 8 if getattr(cfg, "symmetric", False) else 4, "BYOL": 8}
    images = 50_000 if "cifar" in cfg.data else 9_469 if "imagenette" in cfg.data else 1_281_167
    operations = images * cfg.epochs * forwards[method] * counter.get_total_flops()
    return operations / (50e12 if size == 224 else 25e12) / 3600


def test_the_table_has_exactly_the_recipes_that_there_are():
    assert [*table()] == [
        (method, name) for method, (found, _) in RECIPES.items() for name in found
    ]


@pytest.mark.parametrize("method", RECIPES)
def test_the_table_says_what_the_recipes_are(method):
    recipes, published = RECIPES[method]
    assert published.keys() <= recipes.keys()
    for name, (cfg, _) in recipes.items():
        network, size, cost, figure = table()[method, name]
        assert f"{cfg.image_size} px" in network and ("3x3 stem" in network) == (
            cfg.stem == "cifar" and cfg.arch != "demo"
        )
        assert size == f"{cfg.epochs:g}, {cfg.batch_size}"
        assert figure.split(":")[0] == published.get(name, "none")
        if name != "demo":
            number = re.fullmatch(r"([\d.]+) est\.", cost)
            assert number and float(number[1]) == float(f"{hours(method, cfg):.2g}"), name
        if number := re.search(r"\d\d\.\d", published.get(name, "")):  # as in the method's README
            page = (ROOT / method.lower() / "README.md").read_text()
            [row] = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
            assert number[0] in row


# ---- python -m simclr ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["", "borrowed"])
def test_a_method_lists_its_recipes_also_under_another_name(method, name, tmp_path):
    shutil.copytree(ROOT / method, tmp_path / (name or method))
    (tmp_path / "torch.py").write_text("raise SystemExit('imported')")
    command = [sys.executable, "-m", name or method]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    recipes, published = next(both for title, both in RECIPES.items() if title.lower() == method)
    for recipe, (cfg, _) in recipes.items():
        [line] = [x for x in done.stdout.splitlines() if re.match(rf"{recipe} ", x)]
        for cell in (
            cfg.arch,
            f"{cfg.epochs:g}",
            str(cfg.batch_size),
            published.get(recipe, "none"),
        ):
            assert f"  {cell}" in line
    assert f"python -m {name or method}.pretrain RECIPE" in done.stdout
    wrong = subprocess.run([*command, "demo"], cwd=tmp_path, capture_output=True, text=True)
    assert wrong.returncode == 2 and f"python -m {name or method}.pretrain demo" in wrong.stderr


# ---- a common or eval of the user's own ----------------------------------------------------------


@pytest.mark.parametrize(
    "file, module",
    [("eval.py", "moco.pretrain"), ("common.py", "byol.pretrain"), ("common.py", "eval.knn")],
)
def test_a_file_that_comes_first_on_the_path_is_named(file, module, tmp_path):
    (tmp_path / file).write_text("print('not ours')\n")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def run(*flags):
        command = [sys.executable, *flags, "-m", module, "nowhere"]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    done = run()
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert str(tmp_path / file) in done.stderr and "python -P -m" in done.stderr
    assert "nowhere" in run("-P").stderr  # our own message: no such recipe, no such file
