"""Checkpoints: whole or not there, exact, the last two kept; nothing in them is run."""

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from common.errors import UserError
from common.files import atomic_write


class Checkpoints:
    """The state after some steps, in `folder/step-00000123.pt`.

    Args:
        parts: name to whatever has `state_dict` and `load_state_dict`. The loss scaler of fp16 is
            added to them.
    """

    def __init__(self, folder: Path, parts: Mapping[str, Any], accelerator: Accelerator) -> None:
        self.folder, self.accelerator = folder, accelerator
        self.parts = dict(parts)
        if accelerator.scaler is not None:
            self.parts["scaler"] = accelerator.scaler
        self.unreadable: list[str] = []  # files that `load` has passed over, and why

    def load(self) -> int:
        """Load the newest readable checkpoint into the parts; the number of its steps, else 0.

        The main process chooses, so that all load the same one.

        Raises:
            UserError: another process cannot read it, or a part is not in it.
        """
        main = self.accelerator.is_main_process
        state = self._newest() if main else None
        [step] = broadcast_object_list([state["step"] if state else 0])
        if step and not main:
            path = self._path(step)
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:
                raise UserError(f"{path}: machines must share --out to go on ({error})") from error
        if state is None:
            return 0
        if missing := self.parts.keys() - state.keys():
            raise UserError(
                f"{self._path(step)}: has no {', '.join(sorted(missing))}, so it is of a run with "
                "other settings; give another --out"
            )
        for name, part in self.parts.items():
            if isinstance(part, torch.optim.Optimizer):
                # the settings of its groups are the config's, under the names that they have today
                saved = state[name]
                saved["param_groups"] = [
                    {**now, "params": group["params"]}
                    for group, now in zip(saved["param_groups"], part.param_groups, strict=True)
                ]
            part.load_state_dict(state[name])
        return step

    def _newest(self) -> dict[str, Any] | None:
        for path in sorted(self.folder.glob("step-*.pt"), reverse=True):
            try:
                with zipfile.ZipFile(path) as file:  # torch.load does not look at the checksums
                    if file.testzip():
                        raise zipfile.BadZipFile
                return torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:  # torn or damaged: the one before it is kept for this
                self.unreadable.append(f"{path}: cannot be read ({type(error).__name__})")
        return None

    def save(self, step: int) -> None:
        """Write the state after `step` steps; keep the last two.

        Raises:
            UserError: a value in it is not finite (on all processes), or the disk is full.
        """
        state = {name: part.state_dict() for name, part in self.parts.items()}
        check_finite(step, state)
        if not self.accelerator.is_main_process:
            return
        with atomic_write(self._path(step)) as aside:
            torch.save({"step": step} | state, aside)
        for old in sorted(self.folder.glob("step-*.pt"))[:-2]:
            old.unlink()

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.pt"


def check_finite(step: int, values: Any) -> None:
    """Refuse to write a file of weights that are lost: the last one that was finite is kept.

    Raises:
        UserError: a tensor in `values`, a state dict of any depth, is not finite.
    """
    if not all(bool(tensor.isfinite().all()) for tensor in tensors_in(values)):
        raise UserError(
            f"the loss or a weight is NaN or infinite at step {step:,}; the last checkpoint "
            "is kept. Try a lower --base-lr or --precision fp32, in another --out"
        )


def tensors_in(values: Any) -> Iterator[Tensor]:
    """The tensors of a state dict, at any depth."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping | list | tuple):
        for value in values.values() if isinstance(values, Mapping) else values:
            yield from tensors_in(value)
