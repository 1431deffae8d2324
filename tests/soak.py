"""Long checks of what must not wear out: `make soak`.

    python tests/soak.py kills --method simclr --kills 20
    python tests/soak.py steps --record results/soak-simclr.json

kills: SIGKILL at random moments and within checkpoint writes, each followed by the same command;
what is left must be what the uninterrupted run leaves, bit for bit.
steps: 20,000 small steps; memory must stay flat, files bounded and throughput steady.
"""

import argparse
import functools
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from eval.results.page import keep_measurement  # noqa: E402
from tests.helpers import METHODS, assert_same_run, checkpoints, ended, forked, rows  # noqa: E402

BATCH, IMAGES = 16, 5120


def small(out: Path, steps: int, save_every: int, *more: Any) -> list[Any]:
    """The demo recipe at 8 px and batch 16, for so many steps."""
    epochs, every = (round(n * BATCH / IMAGES, 6) for n in (steps, save_every))
    return [
        "demo", "--out", out, "--batch-size", BATCH, "--image-size", 8, "--knn-every", 0,
        "--epochs", epochs, "--save-every", every, *more,
    ]  # fmt: skip


# ---- kills ---------------------------------------------------------------------------------------


def die_writing(nth: int) -> None:
    """SIGKILL in the middle of this process's `nth` checkpoint."""
    import torch

    save, calls = torch.save, iter(range(1, nth + 1))

    def torn(state: Any, path: Path) -> None:
        save(state, path)
        if next(calls) == nth:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = torn


def kills(method: str, count: int, seed: int, folder: Path, log_every: int = 1) -> None:
    """Raises AssertionError where the run killed `count` times is not the one never killed.

    Every fourth is killed within a checkpoint, the others anywhere, while they start as well.
    """
    draw, log = random.Random(seed), folder / "log"
    steps, save_every = 6 * count, 4
    argv = [steps, save_every, "--log-every", log_every]

    def start(out: Path, before: Callable[[], None] | None = None) -> Any:
        [child] = forked(method, small(out, *argv), log, before=before)
        return child

    assert ended([start(folder / "whole")]) == [0], log.read_text()
    out, gone_on = folder / "killed", 0
    for kill in range(count):
        said = log.stat().st_size
        within = kill % 4 == 3
        child = start(out, functools.partial(die_writing, draw.choice((1, 2))) if within else None)
        if not within:
            if further := draw.randrange(12):
                wait_for_steps(out, further, log, said, child)
                time.sleep(draw.uniform(0, 0.05))
            else:
                time.sleep(draw.uniform(0, 1))  # while it starts
            child.kill()
        assert ended([child]) == [-signal.SIGKILL], log.read_text()
        done = [path.name for path in sorted((out / "checkpoints").glob("step-*.pt"))]
        gone_on += bool(done)
        where = "within a checkpoint" if within else "anywhere"
        print(f"{method}: kill {kill + 1}, {where}; left: {', '.join(done)}", flush=True)
    assert gone_on >= count // 2  # else most were killed before there was anything to lose
    assert ended([start(out)]) == [0], log.read_text()
    written = [row["step"] for row in rows(out)]
    assert written == list(range(0, len(written), log_every)), "a step twice, or missing"
    assert_same_run(folder / "whole", out)
    print(f"{method}: {count} kills, the same bits", flush=True)


def wait_for_steps(out: Path, further: int, log: Path, said: int, child: Any) -> None:
    """Until so many steps are logged after the one from which it goes on."""
    while child.is_alive() and b"at chance" not in log.read_bytes()[said:]:
        time.sleep(0.005)
    first = len(lines(out))
    while child.is_alive() and len(lines(out)) < first + further:
        time.sleep(0.005)


def lines(out: Path) -> list[str]:
    path = out / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


# ---- steps ---------------------------------------------------------------------------------------


def steps(method: str, count: int, folder: Path) -> dict[str, float]:
    """Figures of one long run.

    Raises:
        AssertionError: memory grew by 5 %, a file is out of bounds, or the last tenth of the run
            is a quarter slower than the median.
    """
    out, log = folder / "run", folder / "log"
    argv = small(out, count, count // 100, "--log-every", 100)
    began = time.monotonic()
    [child] = forked(method, argv, log)
    memory = []
    while child.is_alive():
        memory += resident(child.pid)
        child.join(1)
    assert ended([child]) == [0], log.read_text()
    wall = time.monotonic() - began
    timings = [json.loads(line) for line in (out / "timings.jsonl").read_text().splitlines()]
    rates = sorted(row["pairs_per_second"] for row in timings[1:])
    median = rates[len(rates) // 2]
    tenth = len(timings) // 10
    late = sorted(row["pairs_per_second"] for row in timings[-tenth:])[tenth // 2]
    settled = memory[len(memory) // 10 :]
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    figures = {
        "steps": rows(out)[-1]["step"] + 1,
        "seconds": round(wall, 1),
        "resident_mb_after_a_tenth": round(settled[0], 1),
        "resident_mb_at_the_end": round(settled[-1], 1),
        "resident_mb_growth": round(settled[-1] - settled[0], 1),
        "pairs_per_second_median": round(median, 1),
        "pairs_per_second_last_tenth": round(late, 1),
        "pairs_per_second_slowest_hundred_steps": round(rates[0], 1),
        "files": sum(path.is_file() for path in out.rglob("*")),
        "folder_mb": round(size / 2**20, 2),
        "checkpoints": len(checkpoints(out)),
    }
    print(json.dumps(figures, indent=2), flush=True)
    assert figures["resident_mb_growth"] < 0.05 * settled[0]
    assert figures["checkpoints"] == 2 and figures["files"] < 12 and size < 50 * 2**20
    assert late > 0.75 * median
    return figures


def resident(pid: int) -> list[float]:
    """[MB of memory], or nothing once the process is gone. Linux."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return []
    return [pages * resource.getpagesize() / 2**20] if pages else []


def main() -> None:
    parser = argparse.ArgumentParser(description="\n".join((__doc__ or "").splitlines()[:1]))
    parser.add_argument("what", choices=["kills", "steps"])
    parser.add_argument("--method", choices=METHODS, default="simclr")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--count", type=int, default=20_000, help="steps")
    parser.add_argument("--seed", type=int, default=1, help="of the moments of the kills")
    parser.add_argument("--record", type=Path, help="where to write the figures of `steps`")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        if args.what == "kills":
            kills(args.method, args.kills, args.seed, Path(name))
            return
        figures = steps(args.method, args.count, Path(name))
    if args.record:
        title = f"{figures['steps']:,} small steps of {args.method}"
        command = f"python tests/soak.py steps --method {args.method} --count {figures['steps']}"
        keep_measurement(args.record, title, command, figures)


if __name__ == "__main__":
    main()
