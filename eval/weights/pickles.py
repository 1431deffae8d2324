"""The checkpoints of BYOL's official code (dill, pickle protocol 2), read without running them.

A pickle is a program: `pickle.load` and `dill.load` call whatever the file names. Here a file can
name what such a checkpoint is made of and nothing else, and each name means a function of this
module that keeps the file's arrays, texts and numbers: no class of the file comes into being, no
attribute is set, nothing is imported, and neither dill, JAX nor Haiku is needed.

What to expect was found out by writing such files with dill, and from the sources of dill, Haiku
and JAX of 2020. The published files themselves could not be opened here: they were written on
Python 3.6 or 3.7 by a dill 0.3. Names that those have besides are refused by name.
"""

import contextlib
import math
import os
import pickletools
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import IO, Any

import numpy as np

from common.errors import UserError, first_line, printable

OP = SimpleNamespace(**{op.name: op.code.encode("latin-1") for op in pickletools.opcodes})
TREES = ("online_params", "online_state", "target_params", "target_state")
MOST_READS = 3_000_000  # a ResNet-50 takes 80,000; without a limit, small steps would take hours
LONG_TEXT = 200  # characters; no name is longer


def read(path: Path) -> dict[str, Any]:
    """The networks of a BYOL checkpoint, without the optimizer's state and the random numbers' key.

    Returns:
        "online_params" and "online_state", "target_params" and "target_state" if they are there:
        dictionaries {module: {name: array}}, e.g. {"res_net50/~/initial_conv": {"w": array}}. The
        arrays are of little-endian integers or floats, and cannot be written to: their values are
        the bytes that were read. "step", a number, if it is there.

    Raises:
        UserError: the file cannot be read, is not such a checkpoint or not all of one, or asks for
            anything that such a checkpoint does not.
    """
    with reading(path), open(path, "rb") as file:
        source = Source(file)
        if source.read(min(2, source.left)) != b"\x80\x02":
            raise UserError("not a pickle of protocol 2, which a BYOL checkpoint is")
        content = Machine(source).run()
        if source.left:
            raise UserError(f"{source.left:,} bytes follow its end; it is not a BYOL checkpoint")
        return networks(content)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """An error of the block as a `UserError` that names the file."""
    try:
        yield
    except MemoryError:  # no claim of a file causes it: its own size does
        raise
    except UserError as error:
        raise UserError(f"{path}: {printable(str(error))}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    except Exception as error:
        reason = printable(first_line(error))
        raise UserError(f"{path}: not a BYOL checkpoint, or not all of one ({reason})") from error


def networks(content: Any) -> dict[str, Any]:
    """The trees of arrays and the step in what a file holds, which may be the state alone."""
    content = content if type(content) is dict else {}
    state = content.get("experiment_state", content)
    names = list(state) if type(state) is dict else []
    if not {"online_params", "online_state"} <= set(names):
        raise UserError(
            f"holds {', '.join(names)[:200] or 'nothing by a name'}, no online_params and "
            "online_state; a checkpoint of BYOL's pretraining has them"
        )
    result: dict[str, Any] = {name: tree(name, state[name]) for name in TREES if name in names}
    step = content.get("step")
    if step is not None:
        if type(step) is Array and step.value is not None and step.value.size == 1:
            step = step.value.item()
        if type(step) is not int or step < 0:
            raise UserError("its step is not a number of steps")
        result["step"] = step
    return result


def tree(name: str, content: Any) -> dict[str, dict[str, np.ndarray]]:
    """One of the four trees, checked."""
    if type(content) is not dict:
        raise UserError(f"its {name} is not a dictionary of modules")
    result: dict[str, dict[str, np.ndarray]] = {}
    for module, arrays in content.items():
        if type(arrays) is not dict:
            raise UserError(f"{module[:200]} of its {name} is not a dictionary of arrays")
        result[module] = {}
        for key, leaf in arrays.items():
            if type(leaf) is not Array or leaf.value is None:
                raise UserError(f"{module[:200]}, {key[:200]} of its {name} is not an array")
            result[module][key] = leaf.value
    return result


# ---- what a file's names mean here ---------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A class of the file, of which the names of its fields are kept. NumPy's `ndarray` too."""

    fields: tuple[str, ...] = ()


@dataclass
class Array:
    """An array, empty until its state comes."""

    value: np.ndarray | None = None

    def set(self, state: Any) -> None:
        """state: (1, shape, dtype, whether its order is Fortran's, bytes), as NumPy pickles it."""
        version, shape, dtype, is_fortran, data = state
        if type(shape) is not tuple or len(shape) > 8 or type(data) is not bytes:
            raise ValueError("an array without a shape or without bytes")
        if not all(type(size) is int and 0 <= size < 2**40 for size in shape):
            raise ValueError("an array of an impossible shape")
        if version != 1 or type(is_fortran) is not bool or type(dtype) is not DType:
            raise ValueError("an array of an unknown layout")
        if math.prod(shape) * dtype.dtype.itemsize != len(data):
            raise ValueError(f"an array of shape {shape} and {dtype.dtype} in {len(data):,} bytes")
        values = np.frombuffer(data, dtype.dtype)
        self.value = values.reshape(shape[::-1]).T if is_fortran else values.reshape(shape)


class DType:
    """A type of integers or of floats, little-endian as on every machine that JAX runs on."""

    def __init__(self, name: Any) -> None:
        if type(name) is not str or not re.fullmatch("[iu][1248]|f[248]", name):
            shown = repr(name) if type(name) is str else "unknown"  # others may be endless to show
            raise ValueError(f"arrays of type {shown:.40}, neither of integers nor of floats")
        self.dtype = np.dtype(f"<{name}")

    def set(self, state: Any) -> None:
        """state: (3, byte order, and what only other types have)."""
        if type(state) is not tuple or state[:5] not in ORDERS:
            raise ValueError("arrays of another byte order, or of a composed type")


ORDERS = [(3, order, None, None, None) for order in "<|"]


def reconstruct(kind: Any, shape: Any, code: Any) -> Array:
    """NumPy's: an array that is yet to be filled."""
    return Array()


def scalar(dtype: Any, data: Any) -> Array:
    """NumPy's: one number."""
    array = Array()
    array.set((1, (), dtype, False, data))
    return array


def create_array(function: Any, args: Any, state: Any, about: Any = None) -> Array:
    """dill's for a NumPy array, and JAX's for one of its own: an array and its state at once."""
    if function is not reconstruct:
        raise ValueError("an array that is not made by NumPy")
    array = Array()
    array.set(state)
    return array


def create_dtype(name: Any, align: Any, copy: Any) -> DType:
    return DType(name)


def encode(words: Any, encoding: Any) -> bytes:
    """The bytes of an array, which protocol 2 knows as a text alone; of a long one, see `text`."""
    if not isinstance(words, str | bytes) or encoding != "latin1":
        raise ValueError("an array's bytes in another form than a text in latin1")
    return words if isinstance(words, bytes) else words.encode("latin1")


def create_namedtuple(name: Any, fields: Any, module: Any, defaults: Any = None) -> Kind:
    """dill's: the class of a NamedTuple. At most 100 fields, as each of its objects repeats them"""
    if type(fields) is not tuple or len(fields) > 100 or not all(type(f) is str for f in fields):
        raise ValueError("a class with other fields than names")
    if len(set(fields)) < len(fields):
        raise ValueError("a class with two fields of one name")
    return Kind(fields)


def create_type(metaclass: Any, name: Any, bases: Any, namespace: Any) -> Kind:
    """dill's: another class of the script that wrote the file, without anything in it."""
    return Kind()


def load_type(name: Any) -> Kind:
    """dill's: a class of Python."""
    return Kind()


def set_attribute(kind: Any, name: Any, value: Any) -> None:
    """Of the file's classes, where dill sets their long names; nothing is set."""
    if type(kind) is not Kind:
        raise ValueError("an attribute is set of something that is not a class of the file")


def mapping(content: Any) -> dict[str, Any]:
    """Haiku's dictionaries that cannot be written to."""
    if type(content) is not dict:
        raise ValueError("a dictionary of Haiku's that is made from something else")
    return content


GLOBALS: dict[tuple[str, str], Any] = {
    ("dill._dill", "_create_array"): create_array,
    ("dill._dill", "_create_namedtuple"): create_namedtuple,
    ("dill._dill", "_create_type"): create_type,
    ("dill._dill", "_load_type"): load_type,
    ("__builtin__", "setattr"): set_attribute,
    ("builtins", "setattr"): set_attribute,
    ("_codecs", "encode"): encode,
    ("numpy", "ndarray"): Kind(),
    ("numpy", "dtype"): create_dtype,
    ("numpy.core.multiarray", "_reconstruct"): reconstruct,
    ("numpy.core.multiarray", "scalar"): scalar,
    ("numpy._core.multiarray", "_reconstruct"): reconstruct,  # since NumPy 2
    ("numpy._core.multiarray", "scalar"): scalar,
    ("haiku._src.data_structures", "frozendict"): mapping,  # until 2020-08-03
    ("haiku._src.data_structures", "FlatMapping"): mapping,
    ("jax._src.device_array", "reconstruct_device_array"): create_array,  # JAX of 2021 and 2022;
    ("jax._src.array", "_reconstruct_array"): create_array,  # since then; before, as NumPy's
}


# ---- the machine ---------------------------------------------------------------------------------


class Source:
    """A file whose claims are checked against what is left of it, before memory is taken."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.left, self.reads = file, os.fstat(file.fileno()).st_size, 0

    def read(self, count: int) -> bytes:
        if count > self.left:
            raise EOFError(f"{count:,} bytes are to come, of which {self.left:,} are there")
        return self.counted(self.file.read(count))

    def readline(self) -> str:
        """A part of a global's name."""
        line = self.counted(self.file.readline(100))
        if not line.endswith(b"\n"):
            raise EOFError("a name without an end")
        return line[:-1].decode()

    def counted(self, data: bytes) -> bytes:
        self.left -= len(data)
        self.reads += 1
        if self.reads > MOST_READS:
            raise ValueError("far more steps than a checkpoint takes")
        return data


class Machine:
    """The operations of pickle that such a file has, and none besides.

    They are those of `pickletools.opcodes`. A call, an object, a state and an item are of the
    functions and classes above and of the file's own dictionaries, or refused.
    """

    def __init__(self, source: Source) -> None:
        self.source, self.stack, self.marks = source, list[Any](), list[int]()
        self.memo: dict[int, Any] = {}  # what the file may refer to again

    def run(self) -> Any:
        """What the file holds."""
        stack, read = self.stack, self.source.read
        while True:
            match read(1):
                case OP.BINPUT:
                    self.memo[read(1)[0]] = stack[-1]
                case OP.LONG_BINPUT:
                    self.memo[number(read(4))] = stack[-1]
                case OP.BINGET:
                    stack.append(self.memo[read(1)[0]])
                case OP.LONG_BINGET:
                    stack.append(self.memo[number(read(4))])
                case OP.NONE:
                    stack.append(None)
                case OP.NEWTRUE:
                    stack.append(True)
                case OP.NEWFALSE:
                    stack.append(False)
                case OP.BININT1:
                    stack.append(read(1)[0])
                case OP.BININT2:
                    stack.append(number(read(2)))
                case OP.BININT:
                    stack.append(number(read(4), signed=True))
                case OP.LONG1:
                    stack.append(number(read(read(1)[0]), signed=True))
                case OP.BINFLOAT:
                    stack.append(struct.unpack(">d", read(8))[0])
                case OP.BINUNICODE:
                    stack.append(text(read(number(read(4)))))
                case OP.EMPTY_TUPLE:
                    stack.append(())
                case OP.TUPLE1:
                    stack.append((stack.pop(),))
                case OP.TUPLE2:
                    stack[-2:] = [(stack[-2], stack[-1])]
                case OP.TUPLE3:
                    stack[-3:] = [(stack[-3], stack[-2], stack[-1])]
                case OP.MARK:
                    self.marks.append(len(stack))
                case OP.TUPLE:
                    stack.append(tuple(self.since_mark()))
                case OP.EMPTY_LIST:
                    stack.append([])
                case OP.APPEND:
                    self.extend([stack.pop()])
                case OP.APPENDS:
                    self.extend(self.since_mark())
                case OP.EMPTY_DICT:
                    stack.append({})
                case OP.SETITEM:
                    value, key = stack.pop(), stack.pop()
                    self.update([key, value])
                case OP.SETITEMS:
                    self.update(self.since_mark())
                case OP.GLOBAL:
                    stack.append(meaning(self.source.readline(), self.source.readline()))
                case OP.REDUCE:
                    args, function = stack.pop(), stack.pop()
                    stack.append(self.call(function, args))
                case OP.NEWOBJ:
                    args, kind = stack.pop(), stack.pop()
                    stack.append(self.make_object(kind, args))
                case OP.BUILD:
                    self.set_state(stack.pop())
                case OP.POP:
                    stack.pop()
                case OP.STOP:
                    return stack.pop()
                case code:
                    raise ValueError(f"operation {code!r}, which it does not have")

    def since_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise ValueError("an item of something that is no list")
        target.extend(items)

    def update(self, items: list[Any]) -> None:
        """Texts alone are keys: to hash a tuple of a million levels would crash Python."""
        target = self.stack[-1]
        if type(target) is not dict:
            raise ValueError("an item of something that is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str or key in target:
                raise ValueError("a key of a dictionary that is no text, or is there twice")
            target[key] = value

    def call(self, function: Any, args: Any) -> Any:
        """The result of one of the functions above."""
        if type(function) is not FunctionType or type(args) is not tuple:
            raise ValueError("a call of something that is no function")
        return function(*args)

    def make_object(self, kind: Any, args: Any) -> dict[str, Any]:
        """An object of a class of the file: its values by the names of the fields."""
        if type(kind) is not Kind or type(args) is not tuple:
            raise ValueError("an object of something that is no class")
        return dict(zip(kind.fields, args, strict=True))

    def set_state(self, state: Any) -> None:
        target = self.stack[-1]
        if not isinstance(target, Array | DType):
            raise ValueError("a state of something that is no array")
        target.set(state)


def number(data: bytes, signed: bool = False) -> int:
    return int.from_bytes(data, "little", signed=signed)


def text(data: bytes) -> str | bytes:
    """A text; a long one, which is an array's, as the bytes that it stands for.

    Of the text and the bytes, one is kept: the file may refer to either again, so both would stay.
    """
    words = data.decode()
    return words if len(words) <= LONG_TEXT else words.encode("latin1")


def meaning(module: str, name: str) -> Any:
    """What a name stands for here."""
    if (module, name) not in GLOBALS:
        raise UserError(
            f"asks for {module}.{name}, which is not in a BYOL checkpoint; nothing was run"
        )
    return GLOBALS[module, name]
