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
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from common.files import atomic_write
from eval.processes import all_agree

PAUSE = 30.0  # seconds between states, so that saving them costs nothing


class Unfinished:
    """The state of one judgement; without a folder nothing is saved.

    Of several processes each reads the state, and the first one saves it.

    Args:
        key: names all that the judgement depends on.

    Attributes:
        state: what was saved last; empty at the beginning.
    """

    def __init__(
        self, folder: Path | None, name: str, key: str, accelerator: Accelerator | None = None
    ) -> None:
        self.path = folder / "unfinished" / f"{name}.pt" if folder else None
        self.key, self.main = key, accelerator is None or accelerator.is_main_process
        self.state = self._read()
        if not all_agree(bool(self.state), accelerator):
            self.state = {}
        if self.state and self.main:
            print(f"resuming from {self.path}", file=sys.stderr)
        self.saved_at = time.monotonic()
        self.began = self.saved_at - self.state.pop("seconds", 0.0)
        self.figures: dict[str, float] = {}  # shown beside the step

    def _read(self) -> dict[str, Any]:
        if self.path is None or not self.path.exists():
            return {}
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            if state.pop("key") == self.key:
                return state
        except Exception as error:  # cut short, damaged, or no such state
            print(f"{self.path}: cannot be read ({type(error).__name__})", file=sys.stderr)
        return {}

    def save(self, **state: Any) -> None:
        """Replace the state by this one."""
        self.state, self.saved_at = state, time.monotonic()
        if self.path and self.main:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.path) as aside:
                torch.save({"key": self.key, "seconds": self.seconds(), **state}, aside)

    def seconds(self) -> float:
        """How long the judgement has taken so far, over all commands."""
        return time.monotonic() - self.began

    def steps(
        self, total: int, what: str, state: Callable[[], dict[str, Any]], first: int = 0
    ) -> Iterator[int]:
        """Steps from `first` to the last, under a bar.

        Args:
            state: returns what to save, every half minute, beside the `step` to resume from.
        """
        quiet = None if self.main else True  # None: a bar on a terminal only
        self.bar = tqdm(range(first, total), what, total, initial=first, disable=quiet, leave=False)
        for step in self.bar:
            if step > first and time.monotonic() - self.saved_at >= PAUSE:
                self.save(**state(), step=step)
                if self.main and self.bar.disable:  # no terminal, so a line in place of a bar
                    print(f"{what}: {self._line(step, total)}", file=sys.stderr, flush=True)
            yield step

    def show(self, **figures: float) -> None:
        """Show figures on the bar."""
        self.figures = figures
        self.bar.set_postfix(
            {name: f"{value:.3g}" for name, value in figures.items()}, refresh=False
        )

    def _line(self, step: int, total: int) -> str:
        figures = [f"{name.replace('_', ' ')} {value:.3g}" for name, value in self.figures.items()]
        return ", ".join([f"step {step:,} of {total:,}", *figures])

    def remove(self) -> None:
        """Delete the state, once the record is written."""
        if self.path and self.main:
            self.path.unlink(missing_ok=True)
            if self.path.parent.is_dir() and not any(self.path.parent.iterdir()):
                self.path.parent.rmdir()
