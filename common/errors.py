"""Mistakes of a user and faults of the machine, each told in one line."""

import codecs
import contextlib
import errno
import io
import re
import shutil
import sys
from collections.abc import Iterator

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
LOST_WORKER = "DataLoader worker"  # the first words of a RuntimeError that may come at any moment
AGAIN = "the same command goes on from its last checkpoint"
SHARED_MEMORY = (  # words of torch's RuntimeErrors where /dev/shm is full, and of a worker's SIGBUS
    "unable to allocate shared memory",
    "unable to write to file </torch_",
    "Bus error",
)


class UserError(Exception):
    """A mistake that the user can mend: shown as one line, exit status 2, no traceback."""


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """A `ValueError` of the block as a `UserError`: it is what a user has asked for."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


def shown(text: str) -> str:
    r"""With each byte of a name that is not UTF-8 as in `caf\xe9`, which any file can hold.

    Python has such a byte as a lone surrogate, which cannot be written. `common.files.path_of` goes
    back to the name.
    """
    if text.isascii():
        return text
    return "".join(f"\\x{ord(c) - 0xDC00:02x}" if "\udc80" <= c <= "\udcff" else c for c in text)


def printable(text: str) -> str:
    """`shown`, without what would break the line or command the terminal: names may hold both."""
    text = re.sub(r"\\udc([89a-f][0-9a-f])", r"\\x\1", shown(text))  # of a name's `repr`
    kept = "\u200c\u200d\xa0"  # joiners of Persian, Hindi and emoji; a space that does not break
    return "".join(c if c.isprintable() or c in kept else "\N{REPLACEMENT CHARACTER}" for c in text)


def encodable(error: UnicodeError) -> tuple[str, int]:
    """A codec's error handler, named "shown": what an encoding lacks, in characters of ASCII."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = shown(error.object[error.start : error.end])
    return "".join(
        c if c.isascii() else ASCII.get(c, f"\\u{ord(c):04x}") for c in lacking
    ), error.end


ASCII = {"\N{PLUS-MINUS SIGN}": "+/-", "\N{HORIZONTAL ELLIPSIS}": "..."}  # what our lines hold
codecs.register_error("shown", encodable)


def make_console_lenient() -> None:
    """Have everything that is printed pass, whatever names and the console's encoding are."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="shown")


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
    if any(each in words for each in SHARED_MEMORY) or (
        isinstance(error, OSError) and error.errno == errno.ENOSPC and of_shared_memory(error)
    ):
        return (
            "too little shared memory (/dev/shm) for what decoding workers hand over; docker run "
            f"--shm-size=8g or --ipc=host gives more, and --workers 0 needs none; {AGAIN}"
        )
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


def of_shared_memory(error: OSError) -> bool:
    """Whether a full disk is /dev/shm: named, or full where none is, as of a lock of processes."""
    if error.filename:
        return str(error.filename).startswith("/dev/shm/")
    try:
        return shutil.disk_usage("/dev/shm").free < 2**20
    except OSError:  # Windows, macOS
        return False
