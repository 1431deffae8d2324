"""What ends a run before its time: told in one line, with the last checkpoint kept."""

import errno
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from common import faults
from common.data import epoch_order
from tests.helpers import ROOT, checkpoints, ended, forked, rows


def flags(out, *more):
    """60 steps at 8 px, with a checkpoint every 4."""
    return [
        "demo", "--out", out, "--batch-size", 16, "--image-size", 8, "--knn-every", 0,
        "--epochs", 60 * 16 / 5120, "--save-every", 4 * 16 / 5120, "--log-every", 1, *more,
    ]  # fmt: skip


def error_of(log):
    [line] = [line for line in log.read_text().splitlines() if "error:" in line]
    assert "Traceback" not in log.read_text()
    return line


def flags_in(line):
    return re.findall(r"--[a-z-]+", line)


# ---- one line ------------------------------------------------------------------------------------


def test_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    for error in (caught.value, MemoryError(), torch.OutOfMemoryError("CUDA out of memory")):
        line = faults.explained(error)
        assert line and "\n" not in line
        everywhere, pretraining = line.split("pretraining also has")
        assert flags_in(everywhere) == ["--batch-size"]
        assert flags_in(pretraining) == [
            "--precision", "--cache-chunk", "--accumulate", "--out",
        ]  # fmt: skip


class Deadly(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker():
    with pytest.raises(RuntimeError) as caught:
        next(iter(DataLoader(Deadly(), num_workers=1)))
    line = faults.explained(caught.value)
    assert "a decoding worker was killed" in line and flags_in(line) == ["--workers"]
    assert "in pretraining, fewer --workers" in line  # no evaluation has it


def test_a_full_disk_and_what_is_no_fault():
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "events")
    assert faults.explained(full).startswith("events: cannot be written (No space left on device)")
    for error in (OSError(errno.ENOENT, "no"), ValueError("x"), RuntimeError("Timed out")):
        assert faults.explained(error) is None  # the last of one process, that lost no other


# ---- real runs -----------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True
    )
    if done.returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_keeps_the_last_checkpoint(small_disk, tmp_path):
    """Full within a checkpoint; and once there is room the same command goes on."""
    out, log = small_disk / "run", tmp_path / "log"
    assert ended(forked("simclr", flags(out), log, before=fill_at_the_third)) == [2]
    print(error_of(log))
    assert "cannot be written" in error_of(log) and str(out) in error_of(log)
    assert list(checkpoints(out)) == ["step-00000004.pt", "step-00000008.pt"]
    (small_disk / "filler").unlink()
    assert ended(forked("simclr", flags(out), log)) == [0], log.read_text()
    assert [row["step"] for row in rows(out)] == list(range(len(rows(out))))


def fill_at_the_third():
    from common.run import Run

    save, calls = Run.save, iter(range(100))

    def filling(run, step, parts):
        if next(calls) == 2:
            with open(run.folder.parent / "filler", "wb", buffering=0) as file:
                try:
                    while file.write(bytes(4096)):
                        pass
                except OSError:
                    pass
        save(run, step, parts)

    Run.save = filling


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
    line = error_of(log)
    assert "NaN or infinite at step" in line and "--base-lr" in line
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in rows(out))
    for state in checkpoints(out).values():
        assert all(value.isfinite().all() for value in state["model"].values())


@pytest.mark.slow
def test_a_process_that_dies_is_named(tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    children = forked("simclr", flags(out), log, 2, die_at_step_9)
    children[1].join(120)
    died = time.monotonic()
    assert ended(children, 60) == [2, -signal.SIGKILL], log.read_text()
    assert time.monotonic() - died < 60
    assert "process 0 of 2 lost process 1" in error_of(log)
    assert "step-00000008.pt" in checkpoints(out)


def die_at_step_9():
    from common.run import Run

    log = Run.log

    def deadly(run, step, **values):
        log(run, step, **values)
        if step == 9 and run.accelerator.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    Run.log = deadly


@pytest.mark.slow
@pytest.mark.parametrize("signum, processes", [(signal.SIGTERM, 2), (signal.SIGINT, 1)])
def test_a_signal_stops_after_a_step(tmp_path, signum, processes):
    """One of the processes gets it; all stop after the same step, and the run goes on there."""
    out, log = tmp_path / "run", tmp_path / "log"
    children = forked("byol", flags(out, "--epochs", 1), log, processes)
    while not (out / "metrics.jsonl").exists() and children[0].is_alive():
        time.sleep(0.01)
    os.kill(children[-1].pid, signum)
    assert ended(children) == [128 + signum] * processes, log.read_text()
    step = len(rows(out))
    assert f"stopped by {signum.name} after step {step:,}; the same command" in log.read_text()
    assert f"step-{step:08d}.pt" in checkpoints(out)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for i in range(64):
        Image.new("RGB", (8, 8), (4 * i, 0, 0)).save(folder / f"{i:02}.png")
    return folder


def with_workers(files, out):
    """The leader of a process group of its own, once it has logged a step."""
    argv = flags(out, "--data", files, "--epochs", 1000, "--memory-gb", 0, "--workers", 2)
    [child] = forked("simclr", argv, out.parent / "log", before=os.setpgrp)
    while not (out / "metrics.jsonl").exists() and child.is_alive():
        time.sleep(0.01)
    return child


def assert_nobody_is_left(group, patience):
    deadline = time.monotonic() + patience
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(group, 0)
            time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_leaves_the_workers_to_the_parent(files, tmp_path, signum):
    child = with_workers(files, tmp_path / "run")
    os.killpg(child.pid, signum)
    log = tmp_path / "log"
    assert ended([child], 60) == [128 + signum], log.read_text()
    assert f"stopped by {signum.name}" in log.read_text() and "Traceback" not in log.read_text()
    assert checkpoints(tmp_path / "run")
    assert_nobody_is_left(child.pid, 10)


@pytest.mark.slow
def test_images_that_any_process_skipped_are_named(files, tmp_path):
    """One epoch of four batches: one bad image is met by process 0 alone, the other by 1 alone."""
    source = shutil.copytree(files, tmp_path / "source")
    halves = epoch_order(0, 0, 64).view(4, 2, 8).unbind(1)
    bad = [f"{half[half % 2 == 1][0]:02}.png" for half in halves]  # the even ones are tried first
    for name in bad:
        (source / name).write_bytes(b"no image")
    log = tmp_path / "log"
    argv = flags(tmp_path / "run", "--data", source, "--epochs", 1, "--memory-gb", 0, "--seed", 0)
    assert ended(forked("simclr", argv, log, 2)) == [0, 0], log.read_text()
    [line] = [line for line in log.read_text().splitlines() if "skipped" in line]
    assert "2 undecodable images" in line and all(name in line for name in bad)


@pytest.mark.slow
def test_no_worker_outlives_its_parent(files, tmp_path):
    child = with_workers(files, tmp_path / "run")
    child.kill()
    assert ended([child]) == [-signal.SIGKILL]
    assert_nobody_is_left(child.pid, 20)


def test_an_error_does_not_wait_for_workers(files):
    """Its traceback holds the loader, whose workers then end by the parent's SIGTERM alone."""
    code = (
        "import sys, torch; from common.data import open_images\n"
        "for batch in open_images(sys.argv[1]).batches([torch.arange(4)] * 99, workers=2): 1 / 0"
    )
    command = [sys.executable, "-c", code, str(files)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr
