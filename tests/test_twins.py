"""Twins: code that stands in two places on purpose is the same code.

A docstring says `Twin: path, path`; the functions and classes of that name in those files, and
every function, class and constant of their files that they use, have equal syntax trees without
docstrings.
"""

import ast
import re

import pytest

from tests.helpers import METHODS, ROOT

FOLDERS = ("common", "eval", *METHODS)
TWIN = re.compile(r"Twins?: ((?:[\w/]+\.py(?:, | and )?)+)")


def definitions(text):
    """{name: node} of the functions, classes and constants at the top level of a file."""
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = node
    return found


def declared():
    """(path, name, path of the twin) of every declaration."""
    for path in sorted(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py")):
        for name, node in definitions(path.read_text()).items():
            said = "" if isinstance(node, ast.Assign) else ast.get_docstring(node) or ""
            for group in TWIN.findall(said):
                for other in re.findall(r"[\w/]+\.py", group):
                    yield path.relative_to(ROOT).as_posix(), name, other


def bare(node):
    """The syntax tree without docstrings, as text."""
    node = ast.parse(ast.unparse(node)).body[0]
    for inner in ast.walk(node):
        kinds = ast.FunctionDef | ast.ClassDef
        if isinstance(inner, kinds) and ast.get_docstring(inner) is not None:
            inner.body = inner.body[1:] or [ast.Pass()]
    return ast.dump(node)


def used(name, nodes):
    """`name` and every top-level definition that it uses, however indirectly."""
    seen, queue = [], [name]
    while queue:
        current = queue.pop()
        if current in seen or current not in nodes:
            continue
        seen.append(current)
        queue += [n.id for n in ast.walk(nodes[current]) if isinstance(n, ast.Name)]
    return seen


def differences(name, one, other):
    """Names of definitions, `name` or used by it, that differ between two files' texts."""
    nodes, others = definitions(one), definitions(other)
    return [
        each
        for each in used(name, nodes)
        if each not in others or bare(nodes[each]) != bare(others[each])
    ]


DECLARED = sorted(set(declared()))


@pytest.mark.parametrize("path, name, other", DECLARED)
def test_twins_are_equal_and_name_each_other(path, name, other):
    one, two = (ROOT / path).read_text(), (ROOT / other).read_text()
    assert name in definitions(two), f"{other} has no {name}"
    assert differences(name, one, two) == []
    assert (other, name, path) in DECLARED, f"{other}: {name} does not say Twin: {path}"


def test_the_copies_that_are_known_say_so():
    expected = {("simclr/optim.py", "LARS", "eval/finetune.py")}
    expected |= {
        ("simclr/model.py", name, "byol/model.py") for name in ("globalize", "GlobalBatchNorm")
    }
    for name in (
        "group_norm_weight_standardised",
        "standardise",
        "StandardisedConv2d",
        "StandardisedLinear",
    ):
        expected.add(("byol/model.py", name, "common/encoders.py"))
    expected |= {(f"{method}/config.py", "check_ranges", "common/config.py") for method in METHODS}
    assert expected <= set(DECLARED)
    assert "_AllReduce" in used(
        "GlobalBatchNorm", definitions((ROOT / "simclr/model.py").read_text())
    )


def test_the_comparison_can_fail():
    one = 'def f(x):\n    """Doubles. Twin: b.py."""\n    return g(x)\n'
    one += "\n\ndef g(x):\n    return x * C\n\n\nC = 2\n"
    assert differences("f", one, one.replace("Doubles", "Twice")) == []
    assert differences("f", one, one.replace("x * C", "x + C")) == ["g"]
    assert differences("f", one, one.replace("C = 2", "C = 3")) == ["C"]
    assert differences("f", one, one.replace("def g", "def h")) == ["g"]
    assert differences("f", one, one.replace("g(x)\n\n", "g(x) + 1\n\n")) == ["f"]
