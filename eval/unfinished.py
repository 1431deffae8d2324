"""Long judgements that resume where they were stopped.

    RUN/results/unfinished/NAME.pt      the state of a judgement until its record is written

The same command given again resumes from the state, and on the same machine ends with the same bits
as if it had never been stopped: batches and crops are functions of the step. A state of other
settings, another encoder or other images is not used, and neither is one that cannot be read.
"""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from common.files import atomic_write

T = TypeVar("T")
PAUSE = 30.0  # seconds between states, so that saving them costs nothing


class Unfinished:
    """The state of one judgement; without a folder nothing is saved.

    Args:
        key: names all that the judgement depends on.

    Attributes:
        state: what was saved last; empty at the beginning.
    """

    def __init__(self, folder: Path | None, name: str, key: str) -> None:
        self.path = folder / "unfinished" / f"{name}.pt" if folder else None
        self.key = key
        self.state = self._read()
        self.saved_at = time.monotonic()
        self.began = self.saved_at - self.state.pop("seconds", 0.0)

    def _read(self) -> dict[str, Any]:
        if self.path is None or not self.path.exists():
            return {}
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            if state.pop("key") == self.key:
                print(f"resuming from {self.path}", file=sys.stderr)
                return state
        except Exception as error:  # cut short, damaged, or no such state
            print(f"{self.path}: cannot be read ({type(error).__name__})", file=sys.stderr)
        return {}

    def save(self, **state: Any) -> None:
        """Replace the state by this one."""
        self.state, self.saved_at = state, time.monotonic()
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.path) as aside:
                torch.save({"key": self.key, "seconds": self.seconds(), **state}, aside)

    def seconds(self) -> float:
        """How long the judgement has taken so far, over all commands."""
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
            batches: maps a first step to the batches from there on.
            state: returns what to save, every half minute, beside the `step` to resume from.
        """
        bar = tqdm(batches(first), what, total, initial=first, disable=None, leave=False)
        for step, batch in enumerate(bar, first):
            if step > first and time.monotonic() - self.saved_at >= PAUSE:
                self.save(**state(), step=step)
                if bar.disable:  # no terminal, so a line in place of a bar
                    print(f"{what}: step {step:,} of {total:,}", file=sys.stderr, flush=True)
            yield step, batch

    def remove(self) -> None:
        """Delete the state, once the record is written."""
        if self.path:
            self.path.unlink(missing_ok=True)
            if self.path.parent.is_dir() and not any(self.path.parent.iterdir()):
                self.path.parent.rmdir()
