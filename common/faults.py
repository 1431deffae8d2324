"""What ends a run before its time: signals, a process that dies, a machine that is full."""

import datetime
import errno
import multiprocessing
import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
CUT = ("closed by peer", "reset by peer", "Broken pipe", "timed out", "Timed out")  # gloo's words


class Stop:
    """While open, SIGTERM and SIGINT ask for a stop after the step under way, not at once.

    All processes must stop after the same step, so they put their heads together after each: one
    integer over gloo, by the CPU, so that no GPU is waited for; and a process that died is found
    out there even where NCCL would wait for it.
    """

    def __init__(self, processes: int) -> None:
        self.received = 0
        self.group: Any = dist.new_group(backend="gloo") if processes > 1 else None

    def __enter__(self) -> "Stop":
        self.before = {s: signal.signal(s, self._receive) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self.received = signum
        if self.group is None:  # the second one kills; a launcher repeats what a group has received
            for each in self.before:
                signal.signal(each, signal.SIG_DFL)

    def asked(self) -> int:
        """The signal that any process has received, or 0. All processes must call."""
        if self.group is None:
            return self.received
        signum = torch.tensor(self.received)
        dist.all_reduce(signum, dist.ReduceOp.MAX, group=self.group)
        return int(signum)


def leave_signals_to_the_parent(worker: int = 0) -> None:
    """In a decoding worker: SIGTERM and SIGINT, often sent to every process of a job at once, are
    no reason to end while the parent still needs batches for the step under way.

    The parent's own SIGTERM, with which it ends its workers, is obeyed: by a thread, since only
    who waits for a signal is told who sent it. Where the parent is killed, DataLoader's watchdog
    ends its workers.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is None or not hasattr(signal, "sigwaitinfo"):  # macOS
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_at_sigterm_of, args=(parent.pid,), daemon=True).start()


def _end_at_sigterm_of(sender: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != sender:
        pass
    os._exit(0)


def explained(error: BaseException) -> str | None:
    """A failure of the machine in one line that says what can be done; None for any other."""
    text = str(error)
    if isinstance(error, OSError) and error.errno in FULL:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}cannot be written ({error.strerror}); {AGAIN}"
    memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if memory or "can't allocate memory" in text or "Cannot allocate memory" in text:
        return (
            "out of memory: try a smaller --batch-size, if the command has it; pretraining also "
            "has --precision bf16, gradient caching (SimCLR: --cache-chunk) and parts of a batch "
            "(BYOL: --accumulate), and any change there needs another --out"
        )
    if "DataLoader worker" in text:
        return (
            "a decoding worker was killed, usually for want of memory: free some (in pretraining, "
            f"fewer --workers take less); {AGAIN}"
        )
    if isinstance(error, dist.DistBackendError) or (
        isinstance(error, RuntimeError) and any(words in text for words in CUT)
    ):
        return f"{_lost()}; {AGAIN}" if dist.is_initialized() else None
    return None


AGAIN = "the same command goes on from what it kept last"


def _lost(patience: float = 2) -> str:
    """Which processes are gone: those that do not answer a roll call at the launcher's store.

    Where that store went with a process, as on another machine, there is no telling.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # from the launcher, before there is an answer
    rank, world = dist.get_rank(), dist.get_world_size()
    try:
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            timeout=datetime.timedelta(seconds=5),
        )
        store.set(f"alive/{rank}", "")
        time.sleep(patience)
        gone = [str(r) for r in range(world) if not store.check([f"alive/{r}"])]
    except (RuntimeError, KeyError):
        gone = []
    who = f"process {' and '.join(gone)}" if gone else "another process"
    return f"process {rank} of {world} lost {who}, which ended or cannot be reached"
