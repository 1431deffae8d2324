"""Which file may import which: the arrows that let a method folder be taken away.

method without pretrain.py   torch, torchvision, the standard library, siblings
method/pretrain.py           also accelerate, common, eval.encoder, eval.knn, eval.online
eval                         common
common                       neither a method nor eval
"""

import ast
import re
import sys

import pytest

from tests.helpers import METHODS, ROOT

LIBRARIES = {"torch", "torchvision"}
FOLDERS = ("common", "eval", *METHODS)


def sources(*folders):
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def module_of(path):
    """simclr/loss.py to simclr.loss."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


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
        return file == "pretrain" and (
            top in ("accelerate", "common") or name in ("eval.encoder", "eval.knn", "eval.online")
        )
    return top not in METHODS and (folder == "eval" or top != "eval")


def everything():
    for path in sources(*FOLDERS):
        package = ".".join(path.relative_to(ROOT).parts[:-1])
        for name in imports(path.read_text(), package):
            yield module_of(path), name


def test_arrows():
    found = list(everything())
    for arrow in (  # that exist and must be found, or the walk is blind
        ("simclr.pretrain", "common.views"),
        ("simclr.pretrain", "simclr.loss"),  # a relative import
        ("simclr.pretrain", "simclr.augment"),  # from . import augment
        ("simclr.model", "torchvision"),
        ("eval.knn", "common.cli"),
    ):
        assert arrow in found, arrow
    assert [pair for pair in found if not allowed(*pair)] == []


@pytest.mark.parametrize(
    "importer, line",
    [
        ("simclr.loss", "from byol.loss import byol_loss"),
        ("simclr.loss", "import numpy"),
        ("simclr.grad_cache", "from common import run"),
        ("simclr.config", "import tyro"),
        ("byol.model", "from ..simclr import model"),
        ("simclr.pretrain", "from eval import linear"),
        ("simclr.pretrain", "def f():\n    from moco.model import MoCo"),
        ("common.data", "import simclr.config"),
        ("common.run", "from eval.knn import OnlineKNN"),
        ("eval.encoder", "from simclr.model import SimCLR"),
        ("eval.knn", "from tests.helpers import golden"),
    ],
)
def test_forbidden_arrows_are_seen(importer, line):
    names = list(imports(line, importer.rpartition(".")[0]))
    assert names and not all(allowed(importer, name) for name in names)


def test_nothing_is_imported_by_a_string():
    for path in sources(*FOLDERS):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called.rpartition(".")[2] not in ("import_module", "__import__"), path


def test_a_method_is_a_flat_folder_without_a_hierarchy_of_its_own():
    """No subpackage, and every class is derived from a library's alone; nothing is registered."""
    for method in METHODS:
        assert (ROOT / method / "__init__.py").read_text() == ""
        for path in sources(method):
            assert path.parent == ROOT / method
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef):
                    bases = {ast.unparse(base) for base in node.bases}
                    assert all(base.split(".")[0] in ("nn", "torch") for base in bases), path
                if isinstance(node, ast.ClassDef | ast.FunctionDef):
                    assert not any("register" in ast.unparse(d) for d in node.decorator_list)


@pytest.mark.parametrize("method", METHODS)
def test_the_loop_holds_loss_gradient_and_update(method):
    tree = ast.parse((ROOT / method / "pretrain.py").read_text())
    loops = [
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.For) and ast.unparse(node.iter) == "steps"
    ]
    assert loops
    for loop in loops:
        for words in (r"\bloss(, \w+)? = ", r"\.backward\(", r"optimizer\.step\(", r"end_step\("):
            assert re.search(words, loop), words


def test_no_file_is_called_utils():
    names = {path.name for path in sources(*FOLDERS)}
    assert names and not names & {"utils.py", "util.py", "helpers.py", "misc.py", "base.py"}
