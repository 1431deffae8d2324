"""Where a run logs to, by Accelerate's trackers: TensorBoard, and Weights & Biases (`.[wandb]`)."""

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker
from torch import Tensor

from common.errors import UserError, first_line, printable
from common.files import utf8_name


class Trackers:
    """The trackers of one run; opened again, they go on in the same places.

    TensorBoard's events are directly in `folder`, and those from `start_step` on are purged.
    W&B's run keeps its id in `folder/wandb.id`; it takes no step twice, so that steps since the
    last checkpoint stay as they were logged first.
    """

    def __init__(
        self, names: Sequence[str], folder: Path, start_step: int, settings: Mapping[str, Any]
    ) -> None:
        self.trackers: list[GeneralTracker] = []
        for name in names:
            if name == "tensorboard":
                tracker = TensorBoardTracker("", utf8_name(folder), purge_step=start_step)
            else:
                file = folder / "wandb.id"
                if not file.exists():
                    file.write_text(uuid.uuid4().hex)
                where = {"id": file.read_text(), "name": printable(folder.name), "dir": str(folder)}
                tracker = WandBTracker("ssl-reference", resume="allow", **where)
            try:
                tracker.start()
            except Exception as error:
                way_out = "; `wandb login`, or WANDB_MODE=offline" if name == "wandb" else ""
                raise UserError(f"--trackers {name}: {first_line(error)}{way_out}") from error
            if name == "wandb":  # TensorBoard would make a run of its own for them
                tracker.store_init_configuration(dict(settings))
            self.trackers.append(tracker)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Scalars of a step."""
        for tracker in self.trackers:
            tracker.log(dict(values), step=step)

    def log_image(self, step: int, name: str, image: Tensor) -> None:
        """A (3, H, W) picture in [0, 1]."""
        for tracker in self.trackers:
            tracker.log_images({name: image[None]}, step=step)

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.finish()
