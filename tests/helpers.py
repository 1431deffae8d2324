"""What several test files need: recorded outputs of the official code, and real processes.

golden("simclr_lars")                    the arrays of tests/golden/simclr_lars.npz
run_processes(function, 2, x)            [function(0, 2, x), function(1, 2, x)] over gloo
"""

import functools
import gzip
import importlib.util
import inspect
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
METHODS = ("simclr", "moco", "byol")


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


if __name__ == "__main__":
    torch.set_num_threads(1)
    _child(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
