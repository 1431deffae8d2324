"""What several test files need: recorded outputs of the official code, and real processes.

golden("simclr_lars")                    the arrays of tests/golden/simclr_lars.npz
run_processes(function, 2, x)            [function(0, 2, x), function(1, 2, x)] over gloo
forked("moco", argv, log, 2)             `python -m moco.pretrain ARGV` on two processes, at once
forked("eval.knn", argv, log, 2)         `python -m eval.knn ARGV` likewise
pretrain("moco", *argv)                  the same in this process
evaluate(eval.knn, *argv)                `python -m eval.knn ARGV` in this process
"""

import contextlib
import functools
import gzip
import importlib.util
import inspect
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from safetensors import safe_open

from common import cli

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
METHODS = ("simclr", "moco", "byol")
IMAGES = Path(os.environ.get("SSL_TEST_IMAGES") or ROOT.parent / "shared" / "data")


def real_images(name: str) -> Path:
    """The folder or file `name` of real images in SSL_TEST_IMAGES; a test without it is skipped."""
    if not (IMAGES / name).exists():
        pytest.skip(f"{name}: not there; SSL_TEST_IMAGES names the folder of real images")
    return IMAGES / name


# ---- recorded outputs ----------------------------------------------------------------------------


@functools.cache
def golden(name: str) -> dict[str, np.ndarray]:
    """Every array of tests/golden/NAME.npz by key; do not write to them."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


@functools.cache
def golden_json(name: str) -> Any:
    """tests/golden/NAME.json or NAME.json.gz."""
    path = GOLDEN / f"{name}.json"
    if path.exists():
        return json.loads(path.read_text())
    return json.loads(gzip.decompress((GOLDEN / f"{name}.json.gz").read_bytes()))


def rel(ours: Any, theirs: Any) -> float:
    """max|ours - theirs| / max|theirs|, the measure of tests/golden/README.md."""
    ours, theirs = _array(ours), _array(theirs)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    assert np.isfinite(ours).all()
    return float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-30))


def _array(values: Any) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=np.float64)


# ---- real processes ------------------------------------------------------------------------------


def run_processes(
    function: Callable[..., Any], world: int, *args: Any, timeout: float = 240
) -> list[Any]:
    """[function(rank, world, *args) for each rank], each in a fresh process, linked by gloo on CPU.

    `function` stands at the top level of its file. Arguments and results go through `torch.save`.
    An exception in any process ends all and is raised here with its traceback.
    """
    source = Path(inspect.getsourcefile(function) or "").resolve()
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(world),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save(args, folder / "args.pt")
        command = [sys.executable, __file__, str(source), function.__qualname__, str(folder)]
        logs = [folder / f"log-{rank}" for rank in range(world)]
        children = []
        for rank, log in enumerate(logs):
            with open(log, "wb") as file:
                children.append(
                    subprocess.Popen(
                        command,
                        env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        cwd=ROOT,
                    )
                )
        try:
            _wait(children, logs, time.monotonic() + timeout)
        finally:
            for child in children:
                child.kill()
                child.wait()
        results = [folder / f"result-{rank}.pt" for rank in range(world)]
        return [torch.load(path, weights_only=False) for path in results]


def _wait(children: list[subprocess.Popen], logs: list[Path], deadline: float) -> None:
    while any(child.poll() is None for child in children):
        failed = [child.returncode not in (None, 0) for child in children]
        if any(failed):
            time.sleep(0.5)  # a process that lost its peer fails too: let the first one finish
            break
        if time.monotonic() > deadline:
            raise TimeoutError("\n".join(log.read_text()[-2000:] for log in logs))
        time.sleep(0.05)
    bad = [rank for rank, child in enumerate(children) if child.poll() not in (None, 0)]
    if bad:
        said = "\n".join(f"rank {rank}:\n{logs[rank].read_text()[-4000:]}" for rank in bad)
        raise RuntimeError(said)


def _child(source: str, name: str, folder: Path) -> None:
    spec = importlib.util.spec_from_file_location("of_this_process", source)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    args = torch.load(folder / "args.pt", weights_only=False)
    result = getattr(module, name)(rank, world, *args)
    torch.save(result, folder / f"result-{rank}.pt")
    dist.barrier()  # nobody leaves while another still waits for it
    dist.destroy_process_group()


# ---- real commands, without the seconds of their imports -----------------------------------------


def forked(
    command: str,
    argv: list[Any],
    log: Path,
    processes: int = 1,
    before: Callable[[], None] | None = None,
) -> list[Any]:
    """A command on as many processes, each of them forked from a server that has imported
    everything, with what `accelerate launch` would put in its environment.

    Args:
        log: where their stdout and stderr are appended.
        before: called in each process first, e.g. to have it killed at some moment.

    Returns:
        `multiprocessing.Process` objects, started.
    """
    forks = multiprocessing.get_context("forkserver")
    os.environ["PYTHONPATH"] = str(ROOT)  # of the server, which is started once
    modules = [*map(module_of, METHODS), "eval.knn", "eval.linear", "eval.finetune"]
    forks.set_forkserver_preload(["torch.utils.tensorboard", "tests.helpers", *modules])
    linked = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
    linked |= {"MASTER_PORT": str(free_port()), "ACCELERATE_USE_CPU": "true"}
    children = []
    for rank in range(processes):
        named = {"RANK": str(rank), "LOCAL_RANK": str(rank)} | linked if processes > 1 else {}
        work = (command, [str(word) for word in argv], log, named, before)
        children.append(forks.Process(target=_command, args=work))
        children[-1].start()
    return children


def _command(
    command: str,
    argv: list[str],
    log: Path,
    environment: dict[str, str],
    before: Callable[[], None] | None,
) -> None:
    os.environ |= environment | {"CUDA_VISIBLE_DEVICES": ""}
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    multiprocessing.set_start_method(None, force=True)  # of workers; as in a command of its own
    torch.set_num_threads(1)
    sys.argv = [module_of(command), *argv]
    if before:
        before()
    _run(command, argv)


def module_of(command: str) -> str:
    return f"{command}.pretrain" if command in METHODS else command


def _run(command: str, argv: list[str]) -> None:
    """What stands at the end of the file of a command."""
    module = importlib.import_module(module_of(command))
    if command in METHODS:
        cli.run(module.main, *cli.run(cli.parse, command, module.Config, module.RECIPES, argv))
    else:
        about = (f"python -m {command}", module.__doc__)
        cli.run(module.main, cli.run(cli.parse_settings, module.Settings, argv, *about))


def ended(children: list[Any], timeout: float = 300) -> list[int | None]:
    """The exit statuses of `forked` processes; whoever is late is killed."""
    deadline = time.monotonic() + timeout
    for child in children:
        child.join(max(0, deadline - time.monotonic()))
        child.kill()
        child.join()
    return [child.exitcode for child in children]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


# ---- commands in this process --------------------------------------------------------------------


def pretrain(method: str, *argv: Any) -> None:
    """`python -m METHOD.pretrain ARGV` in this process, on one thread; a mistake: SystemExit."""
    forget_processes()
    with one_thread():
        _run(method, [str(word) for word in argv])


def evaluate(module: Any, *argv: Any) -> None:
    """`python -m eval.NAME ARGV` in this process, on one thread; `module` is eval.NAME."""
    forget_processes()
    with one_thread():
        _run(module.__name__, [str(word) for word in argv])


def forget_processes() -> None:
    """Forget what an earlier command has set up of Accelerate."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# ---- what a run left -----------------------------------------------------------------------------


def rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def exported(run: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors of encoder.safetensors, and its metadata but for the commit."""
    with safe_open(run / "encoder.safetensors", framework="pt") as file:
        about = {key: value for key, value in file.metadata().items() if key != "commit"}
        return {key: file.get_tensor(key) for key in file.keys()}, about  # noqa: SIM118


def checkpoints(run: Path) -> dict[str, dict[str, Any]]:
    return {path.name: torch.load(path) for path in sorted((run / "checkpoints").iterdir())}


def leaves(values: Any, name: str = "") -> dict[str, Any]:
    """Everything in a state dict by its path."""
    if isinstance(values, dict | list | tuple):
        pairs = values.items() if isinstance(values, dict) else enumerate(values)
        return {k: v for key, value in pairs for k, v in leaves(value, f"{name}/{key}").items()}
    return {name: values}


def assert_same_run(one: Path, other: Path) -> None:
    """Metrics, encoder file and checkpoints are equal bit for bit."""
    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    files = [leaves([*exported(run), checkpoints(run)]) for run in (one, other)]
    assert files[0].keys() == files[1].keys() and len(files[0]) > 50
    for name, value in files[0].items():
        theirs = files[1][name]
        if isinstance(value, torch.Tensor):
            assert value.dtype == theirs.dtype and torch.equal(value, theirs), name
        else:
            assert value == theirs, name


if __name__ == "__main__":
    torch.set_num_threads(1)
    _child(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
