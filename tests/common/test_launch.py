"""Starting and stopping the processes of a run, and the commit that its record names."""

import contextlib
import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from common import launch
from common.data import epoch_order
from common.errors import UserError
from tests.helpers import (
    METHODS,
    ROOT,
    checkpoints,
    ended,
    forget_processes,
    forked,
    pretrain,
    rows,
)


def flags(out, *more):
    """60 steps at 8 px, with a checkpoint every 4."""
    return [
        "demo", "--out", out, "--batch-size", 16, "--image-size", 8, "--knn-every", 0,
        "--epochs", 60 * 16 / 5120, "--save-every", 4 * 16 / 5120, "--log-every", 1, *more,
    ]  # fmt: skip


def test_single_precision_is_full_but_in_convolutions():
    torch.backends.cuda.matmul.allow_tf32 = True
    assert launch.launch("fp32").num_processes == 1
    assert torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_small_network_computes_on_one_thread_unless_told_otherwise(monkeypatch):
    before = torch.get_num_threads()
    try:
        for given, one_thread, threads in ((False, False, 3), (True, True, 3), (False, True, 1)):
            torch.set_num_threads(3)
            monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
            if given:
                monkeypatch.setenv("OMP_NUM_THREADS", "3")
            launch.launch("fp32", one_thread)
            assert torch.get_num_threads() == threads
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        for device, threads in (("cuda", 1), ("cpu", 3)):  # a machine with a GPU, and --cpu there
            torch.set_num_threads(3)
            stand_in = SimpleNamespace(device=torch.device(device), num_processes=1)
            monkeypatch.setattr(launch, "Accelerator", lambda stand_in=stand_in, **_: stand_in)
            monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
            launch.launch("fp32")
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def record(network, views, allow_unused_input):
    """As `torch.cuda.make_graphed_callables`: one memory for the input, one for the output.

    The backward pass reads what the input's memory holds by then.
    """
    assert allow_unused_input and not torch.is_autocast_cache_enabled()
    forward, weights = network.forward, [p for p in network.parameters() if p.requires_grad]
    for _ in range(3):
        outputs = [z.detach().clone() for z in forward(*views)]

    class Recording(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *given):
            for kept, new in zip(views, given, strict=False):
                kept.copy_(new)
            for kept, new in zip(outputs, forward(*views), strict=True):
                kept.copy_(new)
            return tuple(z.detach() for z in outputs)

        @staticmethod
        def backward(ctx, *gradients):
            before = [buffer.clone() for buffer in network.buffers()]
            with torch.enable_grad():
                found = torch.autograd.grad(forward(*views), weights, gradients)
            for buffer, value in zip(network.buffers(), before, strict=True):
                buffer.copy_(value)
            return (*[None] * len(views), *found)

    network.forward = lambda *given: Recording.apply(*given, *weights)


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("method", METHODS)
def test_a_recorded_run_is_the_same_run(method, tmp_path, monkeypatch):
    """On a stand-in for a GPU, with the memory that a recording has."""
    small = ("--image-size", 16, "--batch-size", 16, "--epochs", 5 / 320, "--save-every", 0)
    more = ("--queue-size", 64) if method == "moco" else ("--warmup-epochs", 2 / 320)
    given = ("demo", *small, *more, "--log-every", 1, "--knn-every", 0)
    pretrain(method, *given, "--out", tmp_path / "plain")

    def on_a_stand_in(network, views, accelerator):
        network.to = lambda device: network
        gpu = SimpleNamespace(device=SimpleNamespace(type="cuda"), mixed_precision="no")
        launch.record_cuda_graphs(network, views, gpu)
        del network.to

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    module = importlib.import_module(f"{method}.pretrain")
    monkeypatch.setattr(module, "record_cuda_graphs", on_a_stand_in)
    pretrain(method, *given, "--out", tmp_path / "recorded", "--cuda-graphs")
    both = [rows(tmp_path / run) for run in ("recorded", "plain")]
    assert len(both[0]) >= 5
    for ours, theirs in zip(*both, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_a_network_that_cannot_be_recorded_is_one_line(monkeypatch):
    def refused(network, views, allow_unused_input):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", refused)
    gpu = SimpleNamespace(device=torch.device("cpu"), mixed_precision="no")
    with pytest.raises(UserError, match="--cuda-graphs: for one process on a CUDA device"):
        launch.record_cuda_graphs(torch.nn.Identity(), [torch.ones(1)], gpu)
    gpu.device = SimpleNamespace(type="cuda")
    network = torch.nn.Identity()
    network.to = lambda device: network
    with pytest.raises(UserError, match=r"cannot be recorded \(RuntimeError: .* capturing\)$"):
        launch.record_cuda_graphs(network, [torch.ones(1)], gpu)


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_graphs_are_not_recorded_where_they_would_be_wrong(tmp_path, monkeypatch, capsys):
    for method, flag, more in (
        ("simclr", "--grad-cache-chunk", ["32"]), ("byol", "--accumulate", ["2"]),
        ("moco", "--online-linear", []), ("simclr", "--compile", []),
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            pretrain(method, "demo", "--cuda-graphs", flag, *more, "--out", tmp_path / "run")
        assert f"--cuda-graphs: not with {flag}; choose one" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        pretrain("simclr", "demo", "--cuda-graphs", "--out", tmp_path / "run")
    assert "not with several processes" in capsys.readouterr().err


def gradient(accelerator):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = accelerator.prepare(torch.optim.SGD([weight], lr=1.0))
    accelerator.backward((weight * torch.arange(3)).sum())
    optimizer.step()
    return weight.grad, weight.detach()


@pytest.mark.parametrize("value", ["4", "many"])
def test_accumulation_that_the_environment_asks_for_changes_no_gradient(value, monkeypatch, capsys):
    forget_processes()
    plain = gradient(launch.launch("fp32"))
    assert capsys.readouterr().err == ""
    forget_processes()
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", value)
    accelerator = launch.launch("fp32")
    [line] = capsys.readouterr().err.splitlines()
    assert f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS={value} is not used" in line
    assert accelerator.gradient_accumulation_steps == accelerator.gradient_state.num_steps == 1
    assert accelerator.sync_gradients
    for ours, theirs in zip(gradient(accelerator), plain, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "name, value, flag",
    [("MIXED_PRECISION", "bf16", "--precision"), ("DYNAMO_BACKEND", "INDUCTOR", "--compile")],
)
def test_what_else_the_environment_asks_for_is_said(name, value, flag, monkeypatch, capsys):
    forget_processes()
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    accelerator = launch.launch("fp32")
    assert accelerator.mixed_precision == "no"
    assert accelerator.state.dynamo_plugin.backend.value == "NO"
    [line] = capsys.readouterr().err.splitlines()
    assert f"ACCELERATE_{name}={value} is not used" in line and flag in line
    forget_processes()
    monkeypatch.setenv(f"ACCELERATE_{name}", "no")  # what `accelerate launch` itself sets
    launch.launch("fp32")
    assert capsys.readouterr().err == ""


def test_networks_that_are_spread_over_processes_are_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="ACCELERATE_USE_FSDP: every process holds whole networks"):
        launch.launch("fp32")


# ---- the commit ----------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder in whose `common` launch.py stands."""
    for name in ("common/launch.py", "results/a.json"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("{}")
    monkeypatch.setattr(launch, "__file__", str(tmp_path / "common" / "launch.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("GIT_COMMIT", raising=False)
    return tmp_path


def git(folder, *args):
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(["git", "-C", folder, *who, *args], check=True, capture_output=True)
    return done.stdout.decode().strip()


def test_a_changed_file_marks_the_commit_and_a_changed_record_does_not(checkout, monkeypatch):
    for words in (("init",), ("add", "."), ("commit", "-m", "all")):
        git(checkout, *words)
    monkeypatch.setenv("GIT_COMMIT", "another")  # is not asked in a checkout
    head = git(checkout, "rev-parse", "HEAD")[:12]
    assert launch.commit() == head
    (checkout / "results" / "a.json").write_text("[]")
    (checkout / "notes").write_text("not ours")
    assert launch.commit() == head
    (checkout / "common" / "launch.py").write_text("")
    assert launch.commit() == f"{head}+"


def test_without_a_checkout_the_commit_is_that_of_the_environment(checkout, monkeypatch):
    assert launch.commit() == launch.provenance(1)["commit"] == "unknown"
    monkeypatch.setenv("GIT_COMMIT", "0123456789ab")
    assert launch.commit() == launch.provenance(1)["commit"] == "0123456789ab"
    monkeypatch.setenv("PATH", str(checkout))  # no git at all
    assert launch.commit() == "0123456789ab"


# ---- real runs, stopped --------------------------------------------------------------------------


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


@pytest.mark.slow
def test_a_process_that_dies_ends_the_other_with_one_line(tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    children = forked("simclr", flags(out), log, 2, die_at_step_9)
    children[1].join(120)
    died = time.monotonic()
    assert ended(children, 60) == [2, -signal.SIGKILL], log.read_text()
    assert time.monotonic() - died < 60 and "Traceback" not in log.read_text()
    [line] = [line for line in log.read_text().splitlines() if "error:" in line]
    assert "process 0 of 2 lost another, which ended; the same command goes on" in line
    assert "step-00000008.pt" in checkpoints(out)


def die_at_step_9():
    from common.run import Run

    end_step = Run.end_step

    def deadly(run, step, *args, **metrics):
        if step == 9 and run.accelerator.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        end_step(run, step, *args, **metrics)

    Run.end_step = deadly


# ---- with decoding workers -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for i in range(64):
        Image.new("RGB", (8, 8), (4 * i, 0, 0)).save(folder / f"{i:02}.png")
    return folder


def assert_nobody_is_left(group, patience):
    deadline = time.monotonic() + patience
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(group, 0)
            time.sleep(0.1)


@contextlib.contextmanager
def with_workers(files, out):
    """A command that leads a process group, with two workers, once it has logged a step."""
    argv = flags(out, "--data", files, "--epochs", 1000, "--memory-gb", 0, "--workers", 2)
    command = [sys.executable, "-m", "simclr.pretrain", *map(str, argv)]
    with (
        open(out.parent / "log", "w") as log,
        subprocess.Popen(command, cwd=ROOT, stderr=log, start_new_session=True) as process,
    ):
        while not (out / "metrics.jsonl").exists() and process.poll() is None:
            time.sleep(0.01)
        try:
            yield process
            assert_nobody_is_left(process.pid, 20)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_leaves_the_workers_to_the_parent(files, tmp_path, signum):
    log = tmp_path / "log"
    with with_workers(files, tmp_path / "run") as process:
        os.killpg(process.pid, signum)
        assert process.wait(60) == 128 + signum, log.read_text()
    assert f"stopped by {signum.name}" in log.read_text() and "Traceback" not in log.read_text()
    assert checkpoints(tmp_path / "run")


@pytest.mark.slow
def test_no_worker_outlives_its_parent(files, tmp_path):
    with with_workers(files, tmp_path / "run") as process:
        process.kill()
        assert process.wait(60) == -signal.SIGKILL


@pytest.mark.slow
def test_a_worker_that_is_killed_is_one_line(files, tmp_path):
    log = tmp_path / "log"
    with with_workers(files, tmp_path / "run") as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        os.kill(int(children.split()[-1]), signal.SIGKILL)
        assert process.wait(60) == 2, log.read_text()
    assert "error: a decoding worker was killed" in log.read_text()
    assert "Traceback" not in log.read_text()


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


@pytest.mark.parametrize(
    "left",
    [{"WORLD_SIZE": "4"}, {"LOCAL_RANK": "2"}, {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}],
)
def test_what_a_launcher_left_in_the_environment_is_one_line(left, tmp_path):
    words = f"demo --out {tmp_path}/run --epochs 0.1 --warmup-epochs 0 --batch-size 64"
    command = [sys.executable, "-m", "simclr.pretrain", *words.split()]
    known = {key: value for key, value in os.environ.items() if not key.startswith("MASTER_")}
    done = subprocess.run(
        command, cwd=ROOT, env=known | left, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "without a launcher's MASTER_ADDR" in done.stderr


def test_bfloat16_is_named_where_a_processor_computes_in_it(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(launch, "fast_bfloat16", lambda: True)
    [line] = launch.bfloat16_advice("fp32", cpu)
    assert "--precision bf16" in line
    assert launch.bfloat16_advice("bf16", cpu) == launch.bfloat16_advice("fp32", gpu) == []
    monkeypatch.setattr(launch, "fast_bfloat16", lambda: False)
    assert launch.bfloat16_advice("fp32", cpu) == []
