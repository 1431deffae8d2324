"""Long judgements that go on where they were stopped.

    RUN/results/unfinished/NAME.pt      the state of a judgement until its record is written

Given again, the command takes the state up and ends, on the same machine, with the same bits as if
it had never been stopped: batches and crops are functions of the step. A state of other settings,
another encoder or other images is not used, nor one that cannot be read.
"""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from common.run import written_aside

T = TypeVar("T")
PAUSE = 30.0  # seconds between states, so that keeping them costs nothing


class Unfinished:
    """The state of one judgement; without a folder nothing is kept.

    Args:
        key: of all that the judgement depends on.

    Attributes:
        state: what was kept last, empty at the beginning.
    """

    def __init__(self, folder: Path | None, name: str, key: str) -> None:
        self.path = folder / "unfinished" / f"{name}.pt" if folder else None
        self.key = key
        self.state = self._read()
        self.kept_at = time.monotonic()
        self.began = self.kept_at - self.state.pop("seconds", 0.0)

    def _read(self) -> dict[str, Any]:
        if self.path is None or not self.path.exists():
            return {}
        try:
            found = torch.load(self.path, map_location="cpu", weights_only=True)
            if found.pop("key") == self.key:
                print(f"goes on from {self.path}", file=sys.stderr)
                return found
        except Exception as error:  # torn, damaged or not ours
            print(f"{self.path}: cannot be read ({type(error).__name__})", file=sys.stderr)
        return {}

    def keep(self, **state: Any) -> None:
        """Replace the state by this one."""
        self.state, self.kept_at = state, time.monotonic()
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with written_aside(self.path) as aside:
                torch.save({"key": self.key, "seconds": self.seconds(), **state}, aside)

    def seconds(self) -> float:
        """What the judgement has taken so far, over all commands."""
        return time.monotonic() - self.began

    def steps(
        self,
        batches: Callable[[int], Iterator[T]],
        total: int,
        what: str,
        state: Callable[[], dict[str, Any]],
        first: int = 0,
    ) -> Iterator[tuple[int, T]]:
        """(step, batch) from step `first` to the last, under a bar.

        Args:
            batches: from a first step to the batches that follow.
            state: what to keep, each half minute, beside the `step` to go on from.
        """
        bar = tqdm(batches(first), what, total, initial=first, disable=None, leave=False)
        for step, batch in enumerate(bar, first):
            if step > first and time.monotonic() - self.kept_at >= PAUSE:
                self.keep(**state(), step=step)
                if bar.disable:  # nobody looks at a bar: a line instead
                    print(f"{what}: step {step:,} of {total:,}", file=sys.stderr, flush=True)
            yield step, batch

    def remove(self) -> None:
        """The record is written: the state has served."""
        if self.path:
            self.path.unlink(missing_ok=True)
            if self.path.parent.is_dir() and not any(self.path.parent.iterdir()):
                self.path.parent.rmdir()
