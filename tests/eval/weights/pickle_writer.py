"""Checkpoints like those of BYOL's official code, written by dill itself.

    write_byol(path, {"res_net50/~/initial_conv": {"w": array}}, {module: {"average": array}})

The official code calls `dill.dump(..., protocol=2)` on a dictionary of the state (a NamedTuple of
Haiku's dictionaries and of optax's NamedTuples), the step and the key of JAX's random numbers.
dill writes a NamedTuple's class by value, Haiku's classes by name, and bytes as text in latin-1.
"""

import contextlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import dill
import numpy as np

Tree = dict[str, dict[str, np.ndarray]]


def write_byol(
    path: Path,
    params: Tree,
    state: Tree,
    step: Any = 312_500,
    mapping: str = "FlatMapping",
    leaves: str = "numpy",
    core: str = "numpy.core",
    nested: bool = False,
) -> Path:
    """Write a checkpoint whose online network has `params` and `state`; other arrays are larger.

    Args:
        mapping: Haiku's class: "frozendict" until 2020-08-03, then "FlatMapping", and since
            2021-12-22 plain dictionaries, "dict"; or "script", a class of the script itself.
        leaves: arrays as "numpy"'s, which dill pickles in its own way; as those of "old jax", in
            NumPy's way; or as those of "jax" since 2021.
        core: the module that NumPy's functions are named after: "numpy._core" since NumPy 2.
        nested: whether the state's class was written inside another class.
    """

    def tree(modules: Tree, more: int = 0) -> Any:
        inner = {module: wrapped(leaves, arrays, more) for module, arrays in modules.items()}
        made = {module: haiku[mapping](arrays) for module, arrays in inner.items()}
        return haiku[mapping](made)

    with fake_modules() as haiku:
        optimizer = [AddWeightDecayState(), ScaleByLarsState(tree(params, 2)), ScaleState()]
        _ByolExperimentState.__qualname__ = "Run._ByolExperimentState" if nested else STATE
        experiment = _ByolExperimentState(
            tree(params), tree(params, 1), tree(state), tree(state, 1), optimizer
        )
        rng = wrapped(leaves, {"rng": np.array([0, 7], np.uint32)}, 0)["rng"]
        with open(path, "wb") as file:
            content = {"experiment_state": experiment, "step": step, "rng": rng}
            dill.dump(content, Renaming(file, core), protocol=2)
    return path


STATE = "_ByolExperimentState"


class _ByolExperimentState(NamedTuple):
    """Parameters and state of both networks, and the optimizer's."""

    online_params: Any
    target_params: Any
    online_state: Any
    target_state: Any
    opt_state: Any


class AddWeightDecayState(NamedTuple):
    """Of the official code's optimizer."""


class ScaleByLarsState(NamedTuple):
    mu: Any


class ScaleState(NamedTuple):
    """Of optax."""


class JaxArray:
    """An array that is pickled as one of JAX's."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __reduce__(self) -> Any:
        return reconstruct_device_array, (*self.array.__reduce__(), {"weak_type": False})


class OldJaxArray(JaxArray):
    """An array that is pickled as one of JAX's before 2021: as NumPy's."""

    def __reduce__(self) -> Any:
        return self.array.__reduce__()


def wrapped(leaves: str, arrays: Mapping[str, np.ndarray], more: int) -> dict[str, Any]:
    """The arrays, `more` added to each, as NumPy's or as something that is pickled otherwise."""
    kind = {"numpy": np.asarray, "jax": JaxArray, "old jax": OldJaxArray}[leaves]
    return {
        name: kind(np.asarray(array + array.dtype.type(more))) for name, array in arrays.items()
    }


class HaikuMapping:
    """A dictionary that is pickled as Haiku's are: by its class and a plain dictionary."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.content = content

    def __reduce__(self) -> Any:
        return type(self), (self.content,)


def reconstruct_device_array(*_: Any) -> None:
    """Stands for JAX's function of this name; pickled by its name alone."""


@contextlib.contextmanager
def fake_modules() -> Iterator[dict[str, Any]]:
    """Haiku's classes by name, while they and JAX's function can be found where they belong."""
    haiku, jax = "haiku._src.data_structures", "jax._src.device_array"
    classes: dict[str, Any] = {
        name: type(name, (HaikuMapping,), {"__module__": haiku, "__qualname__": name})
        for name in ("frozendict", "FlatMapping")
    }
    names = ("haiku", "haiku._src", haiku, "jax", "jax._src", jax)
    modules = {name: ModuleType(name) for name in names}
    for name in names:
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(modules[parent], last, modules[name])
    vars(modules[haiku]).update(classes)
    vars(modules[jax])["reconstruct_device_array"] = reconstruct_device_array
    with (
        mock.patch.dict(sys.modules, modules),
        mock.patch.object(reconstruct_device_array, "__module__", jax),
    ):
        script = type("Mapping", (dict,), {"__module__": "__main__", "__qualname__": "Run.Mapping"})
        yield classes | {"dict": dict, "script": script}


class Renaming:
    """A file to which dill writes, where NumPy's functions get the module `core`."""

    def __init__(self, file: Any, core: str) -> None:
        self.file, self.name = file, f"c{core}.multiarray\n".encode()

    def write(self, data: bytes) -> None:
        if data.startswith(b"cnumpy") and b".multiarray\n" in data:
            data = self.name + data.partition(b"\n")[2]
        self.file.write(data)
