"""Files that a kill cannot tear: each is written aside, and then renamed."""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from common.errors import LOST_WORKER, UserError, shown

os.umask(UMASK := os.umask(0))  # there is no way to ask for it alone


@contextlib.contextmanager
def naming(target: Path) -> Iterator[None]:
    """An error of the block as one that names `target`.

    Raises:
        UserError: it cannot be written.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save raises a RuntimeError
        if str(error).startswith(LOST_WORKER):  # not of this write, which it happened to interrupt
            raise
        reason = str(error).partition("\n")[0][:200]
        if "inline_container" in reason:  # torch.save's words, which do not name the cause
            reason = "the disk is full, or gone"
        raise UserError(
            f"{target}: cannot be written ({reason}); once it can, give the same command again"
        ) from error


@contextlib.contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """A path beside `target` to write to, renamed to `target` once it is whole and on the disk.

    Raises:
        UserError: it cannot be written; what was there before stays.
    """
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with naming(target):
            yield aside
            aside.chmod(0o666 & ~UMASK)  # safetensors lets nobody else read what it writes
            with open(aside, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(aside, target)
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def atomic_write_bytes(target: Path, content: bytes) -> None:
    """`content` as the whole of `target`."""
    with atomic_write(target) as aside:
        aside.write_bytes(content)


def remove_leftovers(folder: Path) -> None:
    """Remove what a kill within `atomic_write` has left in `folder`."""
    for path in folder.glob(".*.[0-9]*"):
        if path.suffix[1:].isdigit() and path.is_file():
            path.unlink()


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add a line to a file of JSON lines."""
    with naming(path), open(path, "a") as file:
        file.write(to_json(row) + "\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines, without one that a kill has torn; none without a file."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def keep_rows_before(path: Path, step: int) -> None:
    """Keep the whole lines of steps before `step`: the others will be written again."""
    if not path.exists():
        return
    rows = []
    for line in path.read_bytes().splitlines(keepends=True):
        with contextlib.suppress(ValueError):  # a line torn by a kill
            if json.loads(line)["step"] < step and line.endswith(b"\n"):
                rows.append(line)
    atomic_write_bytes(path, b"".join(rows))


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


def to_json(value: Any, **options: Any) -> str:
    """JSON without the bytes of names that are not UTF-8, which no other program would read."""
    return json.dumps(all_shown(value), **options)


def all_shown(value: Any) -> Any:
    """A value of JSON with each text in it `shown`."""
    if isinstance(value, str):
        return shown(value)
    if isinstance(value, Mapping):
        return {all_shown(key): all_shown(item) for key, item in value.items()}
    return [all_shown(item) for item in value] if isinstance(value, list | tuple) else value


def path_of(text: str) -> str:
    r"""The path that a file of JSON shows: `caf\xe9` is the name with that byte, if it is there.

    Raises:
        UserError: a path that is written so is there as well.
    """
    byte = re.sub(r"\\x([89a-f][0-9a-f])", lambda found: chr(0xDC00 + int(found[1], 16)), text)
    if byte == text or not os.path.lexists(byte):
        return text
    if os.path.lexists(text):
        raise UserError(f"{text}: there are two, one with a byte in place of \\x..; rename one")
    return byte


def utf8_name(path: Path) -> str:
    """A name of an existing file or folder for a library that takes UTF-8 alone.

    Only on Linux can a name hold other bytes, and there an open file has another name, which is
    good until this process ends.
    """
    name = str(path)
    return name if shown(name) == name else f"/proc/self/fd/{os.open(path, os.O_RDONLY)}"
