"""Twins: code that stands in two places on purpose is the same code.

A docstring says `Twin: path, path`; the functions and classes of that name in those files, and
every function and class of their files that they use, have equal syntax trees without docstrings.
"""

import ast
import re

import pytest

from tests.helpers import METHODS, ROOT

FOLDERS = ("common", "eval", *METHODS)
TWIN = re.compile(r"Twins?: ((?:[\w/]+\.py(?:, | and )?)+)")


def definitions(text):
    """{name: node} of the functions and classes at the top level of a file."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name: node for node in ast.parse(text).body if isinstance(node, kinds)}


def declared():
    """(path, name, path of the twin) of every declaration; methods not written yet are left out."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for name, node in definitions(path.read_text()).items():
                for group in TWIN.findall(ast.get_docstring(node) or ""):
                    for other in re.findall(r"[\w/]+\.py", group):
                        if (ROOT / other).parent.joinpath("__init__.py").exists():
                            yield path.relative_to(ROOT).as_posix(), name, other


def bare(node):
    """The syntax tree without docstrings, as text."""
    node = ast.parse(ast.unparse(node)).body[0]
    for inner in ast.walk(node):
        if (
            isinstance(inner, ast.FunctionDef | ast.ClassDef)
            and ast.get_docstring(inner) is not None
        ):
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
def test_twins_are_equal(path, name, other):
    one, two = (ROOT / path).read_text(), (ROOT / other).read_text()
    assert name in definitions(two), f"{other} has no {name}"
    assert differences(name, one, two) == []


@pytest.mark.parametrize("path, name, other", DECLARED)
def test_twins_name_each_other(path, name, other):
    assert (other, name, path) in DECLARED, f"{other}: {name} does not say Twin: {path}"


def test_there_are_twins():
    assert ("simclr/model.py", "build_encoder", "eval/encoder.py") in DECLARED


def test_the_comparison_can_fail():
    one = 'def f(x):\n    """Doubles. Twin: b.py."""\n    return g(x)\n'
    one += "\n\ndef g(x):\n    return x * 2\n"
    assert differences("f", one, one.replace("Doubles", "Twice")) == []
    assert differences("f", one, one.replace("* 2", "* 3")) == ["g"]
    assert differences("f", one, one.replace("def g", "def h")) == ["g"]
    assert differences("f", one, one.replace("g(x)\n\n", "g(x) + 1\n\n")) == ["f"]
