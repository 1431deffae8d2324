"""Which file may import which: the arrows that let a method folder be taken away.

method/{config,augment,model,loss,optim}   torch, torchvision, the standard library, siblings
method/pretrain                            also accelerate, tyro, common, eval.{knn,health,encoder}
eval                                       common
common                                     neither a method nor eval
"""

import ast
import sys
from pathlib import Path

import pytest

from tests.helpers import METHODS, ROOT

FILES = {"__init__", "augment", "config", "loss", "model", "optim", "pretrain"}
LIBRARIES = {"torch", "torchvision"}
OURS = {"common", "eval", "tests", *METHODS}
METHODS_HERE = [name for name in METHODS if (ROOT / name / "__init__.py").exists()]


def sources(folder):
    return sorted((ROOT / folder).rglob("*.py"))


def module_of(path):
    """simclr/loss.py to simclr.loss."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package_of(path):
    return ".".join(path.relative_to(ROOT).parts[:-1])


def imports(text, package):
    """Dotted names of all that `text`, a file of `package`, imports, at any depth.

    `from a.b import c` counts as a.b.c where that is a file of ours, else as a.b.
    """
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                above = parts[: len(parts) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                inner = ROOT.joinpath(*base.split("."), f"{alias.name}.py")
                yield f"{base}.{alias.name}" if inner.exists() else base


def allowed(importer, name):
    """Whether the file `importer` may import `name`; both dotted."""
    folder, _, file = importer.partition(".")
    top = name.split(".")[0]
    if top == "tests":
        return False
    if folder in METHODS:
        if top == folder or top in sys.stdlib_module_names or top in LIBRARIES:
            return True
        if file != "pretrain":
            return False
        judges = ("eval.knn", "eval.health", "eval.encoder")
        return top in ("accelerate", "tyro", "common") or name in judges
    if folder == "eval":
        return top not in METHODS
    if folder == "common":
        return top not in METHODS and top != "eval"
    raise ValueError(importer)


def everything():
    for folder in ("common", "eval", *METHODS_HERE):
        for path in sources(folder):
            for name in imports(path.read_text(), package_of(path)):
                yield module_of(path), name


def test_arrows():
    found = list(everything())
    assert len(found) > 50
    assert [pair for pair in found if not allowed(*pair)] == []


def test_the_walk_sees_what_there_is():
    """Arrows that exist and must be found, or the walk is blind."""
    found = set(everything())
    for arrow in (
        ("simclr.pretrain", "common.views"),
        ("simclr.pretrain", "simclr.loss"),  # a relative import
        ("simclr.pretrain", "simclr.augment"),  # from . import augment
        ("simclr.model", "torchvision"),
        ("eval.knn", "common.cli"),
    ):
        assert arrow in found, arrow


@pytest.mark.parametrize(
    "importer, line",
    [
        ("simclr.loss", "from byol.loss import regression"),
        ("simclr.loss", "import numpy"),
        ("simclr.model", "from common import run"),
        ("byol.model", "from ..simclr import model"),
        ("simclr.pretrain", "from eval import linear"),
        ("simclr.pretrain", "def f():\n    from moco.model import MoCo"),
        ("common.data", "import simclr.config"),
        ("common.run", "from eval.knn import Monitor"),
        ("eval.encoder", "from simclr.model import build_encoder"),
        ("eval.knn", "from tests.helpers import golden"),
    ],
)
def test_forbidden_arrows_are_seen(importer, line):
    names = list(imports(line, importer.rpartition(".")[0]))
    assert names and not all(allowed(importer, name) for name in names)


def test_nothing_is_imported_by_a_string():
    for folder in ("common", "eval", *METHODS_HERE):
        for path in sources(folder):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    called = ast.unparse(node.func)
                    assert called.rpartition(".")[2] not in ("import_module", "__import__"), path


@pytest.mark.parametrize("method", METHODS_HERE)
def test_a_method_is_these_files(method):
    """No seventh file, no subpackage."""
    paths = sources(method)
    assert {path.stem for path in paths} == FILES
    assert all(path.parent == ROOT / method for path in paths)
    assert (ROOT / method / "__init__.py").read_text() == ""


@pytest.mark.parametrize("method", METHODS_HERE)
def test_the_loop_is_on_one_screen_and_holds_the_loss(method):
    tree = ast.parse((ROOT / method / "pretrain.py").read_text())
    loops = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.For) and ".backward(" in ast.unparse(node)
    ]
    assert len(loops) == 1
    loop = loops[0]
    assert loop.end_lineno - loop.lineno < 40
    assigned = [node for node in ast.walk(loop) if isinstance(node, ast.Assign)]
    assert any("loss" in ast.unparse(node.targets[0]) for node in assigned)


def test_no_file_is_called_utils():
    names = {path.name for folder in ("common", "eval", *METHODS_HERE) for path in sources(folder)}
    assert not names & {"utils.py", "util.py", "helpers.py", "misc.py", "base.py"}
    assert Path(ROOT / "tests" / "helpers.py").exists()
