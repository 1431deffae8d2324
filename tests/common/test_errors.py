"""What ends a run before its time: told in one line, with the last checkpoint kept."""

import errno
import os
import re
import resource
import signal
import subprocess
import sys

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from common.errors import UserError, explain, first_line, one_line
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
