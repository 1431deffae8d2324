"""What ends a run before its time: told in one line, with the last checkpoint kept."""

import errno
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from common.errors import UserError, explain, first_line, one_line, printable, shown
from tests.common.test_launch import flags
from tests.helpers import ROOT, checkpoints, ended, forked, rows, run_processes

# ---- one line ------------------------------------------------------------------------------------


def test_too_little_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    no_fork = OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    for error in (
        caught.value,
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        no_fork,
    ):
        line = explain(error)
        assert line.startswith("out of memory") and "\n" not in line
        assert re.findall(r"--[a-z-]+", line) == ["--batch-size", "--precision", "--out"]


class Deadly(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker():
    with pytest.raises(RuntimeError) as caught:
        next(iter(DataLoader(Deadly(), num_workers=1)))
    line = explain(caught.value)
    assert line.startswith("a decoding worker was killed") and "--workers" in line


SHARED = [
    "Caught RuntimeError in DataLoader worker process 0.\nTraceback ...\nRuntimeError: unable to "
    "allocate shared memory(shm) for file </torch_7_8_9>: No space left on device (28)",
    "unable to write to file </torch_7_8_9>: No space left on device (28)",
    "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that ...",
]


@pytest.mark.parametrize("words", SHARED)
def test_too_little_shared_memory(words):
    line = explain(RuntimeError(words))
    assert line.startswith("too little shared memory (/dev/shm)") and "\n" not in line
    assert re.findall(r"--[a-z-]+", line) == ["--shm-size", "--ipc", "--workers"]


def test_a_full_disk_that_has_no_name_may_be_shared_memory(monkeypatch):
    for free, shared in ((0, True), (2**30, False)):
        monkeypatch.setattr(
            shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free)
        )
        full = OSError(errno.ENOSPC, "No space left on device")
        assert ("shared memory" in explain(full)) == shared
        full.filename = "events"
        assert "shared memory" not in explain(full)
        full.filename = "/dev/shm/torch_1"
        assert "shared memory" in explain(full)


def test_a_full_disk_and_what_is_no_fault_of_the_machine():
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "events")
    assert explain(full).startswith("events: cannot be written (No space left on device)")
    for error in (OSError(errno.ENOENT, "no"), ValueError("gloo/transport"), RuntimeError("gloo"),
                  RuntimeError("x"), KeyError("DataLoader worker")):  # fmt: skip
        assert explain(error) is None


def lost(rank, world):
    """What a process says that waits for one that has left, in three ways."""
    if rank:
        os._exit(0)
    waits = (
        lambda: torch.distributed.all_reduce(torch.ones(1)),
        lambda: torch.distributed.all_gather_object([None, None], 1),
        torch.distributed.barrier,
    )
    said = []
    for wait in waits:
        try:
            wait()
        except Exception as error:
            said.append(explain(error))
    raise RuntimeError(f"SAID {said}, of others {explain(RuntimeError('x'))}")


def test_a_lost_process():
    with pytest.raises(RuntimeError, match="SAID") as caught:
        run_processes(lost, 2)
    assert str(caught.value).count("process 0 of 2 lost another, which ended") == 3
    assert "of others None" in str(caught.value)


def test_the_first_line_of_an_error():
    assert first_line(ValueError("a\nb")) == "ValueError: a"
    with pytest.raises(UserError, match=r"^a$"), one_line():
        raise ValueError("a")
    with pytest.raises(KeyError), one_line():
        raise KeyError


def test_an_error_does_not_wait_for_workers(tmp_path):
    """Its traceback holds the stream, whose workers ignore SIGTERM and would wait for more."""
    for i in range(8):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    code = (
        "import sys, torch; from common.data import open_images\n"
        "def read(stream):\n"
        "    for batch in stream: 1 / 0\n"
        "read(open_images(sys.argv[1]).batches([torch.arange(4)] * 99, workers=2))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.count("Traceback") == 1
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")


BATCHES = (
    "import sys, torch; from common import cli; from common.data import open_images; "
    "cli.run(lambda: list(open_images(sys.argv[1]).batches(torch.arange(16).split(8), workers=2)))"
)


@pytest.mark.slow
@pytest.mark.parametrize("large", ["views", "images", "neither"])
def test_a_small_shared_memory_is_one_line(large, tmp_path):
    """Workers hand over views where they make them, and only else the decoded images."""
    side, size = (100, 400) if large == "views" else (600, 16)
    status = 0 if large == "neither" else 2
    for i in range(16):
        Image.new("RGB", (side, side), (9 * i, 0, 0)).save(tmp_path / f"{i:02}.png")
    words = f"-m simclr.pretrain demo --data {tmp_path} --out {tmp_path}/run --image-size {size} "
    words += "--batch-size 8 --epochs 1 --warmup-epochs 0 --knn-every 0 --memory-gb 0 --workers 2"
    words = f"-c {shlex.quote(BATCHES)} {tmp_path}" if large == "images" else words
    script = f"mount -t tmpfs -o size=4m none /dev/shm || exit 77; {sys.executable} {words}"
    command = ["unshare", "-m", "timeout", "-k", "5", "90", "bash", "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if "unshare" in done.stderr or done.returncode == 77:
        pytest.skip("a small /dev/shm cannot be mounted here")
    assert done.returncode == status and "Traceback" not in done.stderr, done.stderr
    assert ("error: too little shared memory (/dev/shm)" in done.stderr) == bool(status)


# ---- names that are not UTF-8 --------------------------------------------------------------------


def test_a_byte_that_is_not_utf_8_is_shown_and_what_commands_the_terminal_is_not():
    name = os.fsdecode(b"caf\xe9 \xc3\xa9")
    assert shown(name) == printable(name) == "caf\\xe9 \u00e9"
    assert printable("a\x1b[2J\n\u202e") == "a\ufffd[2J\ufffd\ufffd"
    assert printable(str(FileNotFoundError(2, "gone", name))) == "[Errno 2] gone: 'caf\\xe9 \u00e9'"


def test_what_an_encoding_lacks_is_shown_in_ascii():
    said = os.fsdecode(b"caf\xe9 ") + "\u00e9 50 \u00b1 2\u2026"
    assert said.encode("ascii", "shown") == rb"caf\xe9 \u00e9 50 +/- 2..."
    assert said.encode("utf-8", "shown").decode() == "caf\\xe9 \u00e9 50 \u00b1 2\u2026"
    with pytest.raises(UnicodeDecodeError):
        b"\xe9".decode("utf-8", "shown")


# ---- real runs -----------------------------------------------------------------------------------


def error_of(log):
    [line] = [line for line in log.read_text().splitlines() if "error:" in line]
    assert "Traceback" not in log.read_text()
    return line


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_keeps_the_last_checkpoint(small_disk, tmp_path):
    """Full within a checkpoint; and once there is room the same command goes on."""
    out, log = small_disk / "run", tmp_path / "log"
    assert ended(forked("simclr", flags(out), log, before=fill_at_the_third)) == [2]
    assert "cannot be written" in error_of(log) and str(out) in error_of(log)
    assert list(checkpoints(out)) == ["step-00000004.pt", "step-00000008.pt"]
    (small_disk / "filler").unlink()
    assert ended(forked("simclr", flags(out), log)) == [0], log.read_text()
    assert [row["step"] for row in rows(out)] == list(range(len(rows(out))))


def fill_at_the_third():
    from common.checkpoints import Checkpoints

    save, calls = Checkpoints.save, iter(range(100))

    def filling(kept, step):
        if next(calls) == 2:
            with open(kept.folder.parent.parent / "filler", "wb", buffering=0) as file:
                try:
                    while file.write(bytes(4096)):
                        pass
                except OSError:
                    pass
        save(kept, step)

    Checkpoints.save = filling


@pytest.mark.slow
def test_a_log_that_cannot_grow(tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    assert ended(forked("simclr", flags(out), log, before=limit_files)) == [2], log.read_text()
    assert "cannot be written" in error_of(log)


def limit_files():
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))  # of each file


@pytest.mark.slow
def test_a_folder_that_is_read_only(small_disk, tmp_path):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    log = tmp_path / "log"
    assert ended(forked("simclr", flags(small_disk / "run"), log)) == [2]
    assert "Read-only file system" in error_of(log)


@pytest.mark.slow
def test_a_loss_that_is_not_a_number(tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    argv = flags(out, "--base-lr", "1e30", "--warmup-epochs", 12 * 16 / 5120)
    assert ended(forked("simclr", argv, log)) == [2], log.read_text()
    assert "NaN or infinite at step" in error_of(log) and "--base-lr" in error_of(log)
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in rows(out))
    for state in checkpoints(out).values():
        assert all(value.isfinite().all() for value in state["model"].values())
