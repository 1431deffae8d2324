"""What methods and evaluations stand on; and Ctrl-C while a command is still being imported."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator


def stop(*_: object) -> None:
    """End at once, with one line and no traceback."""
    os.write(2, b"\nstopped by SIGINT\n")
    os._exit(130)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Within it Ctrl-C is a `KeyboardInterrupt` again."""
    if signal.getsignal(signal.SIGINT) is not stop:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, stop)


def is_command(words: list[str]) -> bool:
    """Whether Python was called as `python -m eval...`, `METHOD.pretrain` or `common.look`."""
    modules = [a[2:] or b for a, b in zip(words, [*words[1:], ""], strict=True) if a[:2] == "-m"]
    name = modules[0] if modules else ""
    return name.split(".")[0] == "eval" or name.endswith((".pretrain", "common.look"))


if is_command(sys.orig_argv) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, stop)  # until a command begins: most of its time goes to torch
