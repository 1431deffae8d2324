"""Mistakes of a user and faults of the machine, each told in one line."""

import contextlib
import errno
import sys
from collections.abc import Iterator

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
LOST_WORKER = "DataLoader worker"  # the first words of a RuntimeError that may come at any moment
AGAIN = "the same command goes on from its last checkpoint"


class UserError(Exception):
    """A mistake that the user can mend: shown as one line, exit status 2, no traceback."""


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """A `ValueError` of the block as a `UserError`: it is what a user has asked for."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


def printable(text: str) -> str:
    """Without what would break the line or command the terminal: a file's name may hold both."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def first_line(error: BaseException) -> str:
    """The class of an error and the first line of its message."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def explain(error: BaseException) -> str | None:
    """A full disk, too little memory or a lost process in one line; None for any other error.

    If torch is not loaded, the error is not one of its own. Its bare RuntimeErrors are recognised
    by a few words of their messages.
    """
    torch = sys.modules.get("torch")
    words = str(error) if isinstance(error, RuntimeError) else ""
    if isinstance(error, OSError) and error.errno in FULL:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}cannot be written ({error.strerror}); {AGAIN}"
    out_of_memory = (MemoryError, torch.OutOfMemoryError) if torch else MemoryError
    no_fork = isinstance(error, OSError) and error.errno == errno.ENOMEM
    if isinstance(error, out_of_memory) or no_fork or "allocate memory" in words:  # on a CPU
        return (
            "out of memory; to pretrain, try a smaller --batch-size or --precision bf16, in "
            "another --out"
        )
    reset = isinstance(error, ConnectionResetError)  # it was just handing over a batch
    if words.startswith(LOST_WORKER) or reset:
        return (
            "a decoding worker was killed, usually for want of memory; to pretrain, fewer "
            f"--workers take less; {AGAIN}"
        )
    if torch and torch.distributed.is_available() and torch.distributed.is_initialized():
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        if isinstance(error, torch.distributed.DistError) or "gloo/transport" in words:
            return f"process {rank} of {world_size} lost another, which ended; {AGAIN}"
    return None
