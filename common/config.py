"""What every run has, whatever its method; and `config.json`, the record of all its settings."""

import dataclasses
import json
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from common.errors import UserError
from common.files import read_json, to_json

GONE = {"estimate", "profile"}  # settings of earlier versions that changed nothing about a run
TINY = 1e-6  # the least of what must be more than 0

C = TypeVar("C")
Recipe = tuple[C, dict[str, Any]]  # a method's config, and the run's settings that it needs changed


def fixed(default: Any, **about: Any) -> Any:
    """A setting that must stay what it was when a run goes on.

    Args:
        about: `means`, what "" or None stand for; `was`, a former name.
    """
    return dataclasses.field(default=default, metadata={"fixed": True, **about})


@dataclass(frozen=True)
class SourceConfig:
    """How images are read: the same flags in every command that takes a SOURCE.

    What is left open is found out (common/plan.py, common/formats.py), or is the run's.
    """

    split: str = fixed("", means="train")
    """training split: train, a name of the source's own, or all for everything; not set: train if
    it is clear what that is; of an evaluation the run's"""
    image_column: str | None = fixed(None)  # column of the images, where a table has several
    label_column: str | None = fixed(None)  # column of the labels, which are never needed to train
    label_depth: int | None = fixed(None)
    """folders that make up a label, from the top; 0: no labels; not set: the first; of an
    evaluation as in the run"""
    alpha: Literal["white", "drop"] | None = fixed(None)
    """fourth channel: white lays the image over white, drop ignores the channel; not set: white, if
    it is clear that the channel is one of opacity"""
    value_range: tuple[float, float] | None = fixed(None)
    """stored values that become black and white, of images of more than 8 bits, e.g. -160 240;
    those beyond are cut off; not set: found out; of an evaluation as in the run"""

    def check(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: a value makes no sense; the message names its flag.
        """
        if self.label_depth is not None:
            check_ranges(self, label_depth=(0, 100))
        if self.value_range is not None:
            check_ranges(self, value_range=(-math.inf, math.inf))
            if self.value_range[0] >= self.value_range[1]:
                low, high = self.value_range
                raise ValueError(f"--value-range {low:g} {high:g}: the first must be the lower")


@dataclass(frozen=True)
class RunConfig(SourceConfig):
    """How to run it: the same for every method."""

    out: str = "runs/run"  # folder of this run; the same command given again goes on there
    seed: int = fixed(1)  # seed of initial weights, order of the images and views
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = fixed("fp32")  # precision of the networks
    compile: bool = False
    """torch.compile the encoders: a minute, for 3 % on a CPU; small images lose by it on a GPU"""
    cuda_graphs: bool = False
    """on one GPU: record the networks' passes as CUDA graphs, for small networks and images"""
    processes: int = 0  # refuse to start unless so many were launched; 0: any number
    workers: int = 8  # decoding processes, where the images do not fit in memory
    memory_gb: float = 4.0  # decode once and keep the pixels if they need less than this
    log_every: int = 20  # steps between logged ones
    save_every: float = 1  # epochs between checkpoints; 0: at the end alone
    knn_every: float = 10  # epochs between measurements by the online kNN; 0: never
    online_linear: bool = fixed(False)
    """train a linear classifier beside, by labels, on features of view 1; the encoder does not
    notice; its test accuracy is measured as often as the kNN, and at the end (eval/online.py)"""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)  # where to log to

    def __post_init__(self) -> None:
        if not self.out.strip():
            raise ValueError("--out: an empty name, perhaps of a variable that is not set")
        check_ranges(
            self,
            seed=(0, 2**32 - 1),  # NumPy's bounds
            processes=(0, math.inf),
            workers=(0, 1_000),
            memory_gb=(0, math.inf),
            log_every=(1, math.inf),
            save_every=(0, math.inf),
            knn_every=(0, math.inf),
        )
        self.check()


SOURCE_FLAGS = tuple(f.name for f in dataclasses.fields(SourceConfig))


def source_config(settings: Mapping[str, Any]) -> SourceConfig:
    """How the images of a run's settings, or of a record's, are read."""
    known = {name: settings[name] for name in SOURCE_FLAGS if settings.get(name) is not None}
    try:
        if "value_range" in known:
            known["value_range"] = tuple(map(float, known["value_range"]))
        config = SourceConfig(**known)
        config.check()
    except (TypeError, ValueError) as error:
        raise UserError(f"a record of how images are read is damaged ({error})") from error
    return config


def read_as(config: SourceConfig) -> dict[str, Any]:
    """What is set of how images are read, as JSON has it."""
    known = json.loads(to_json({name: getattr(config, name) for name in SOURCE_FLAGS}))
    return {name: value for name, value in known.items() if value not in (None, "")}


def check_ranges(config: Any, **ranges: tuple[float, float]) -> None:
    """Check that each named field, or each number of it, is finite and from least to most.

    Twin: simclr/config.py, moco/config.py, byol/config.py.

    Raises:
        ValueError: one is not; the message names its flag.
    """
    for name, (least, most) in ranges.items():
        value = getattr(config, name)
        for number in value if isinstance(value, tuple) else (value,):
            if not (least <= number <= most and abs(number) != math.inf):
                bound = f"from {least:,}" + (f" to {most:,}" if most < math.inf else " upwards")
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} {number}: must be a number {bound}")


# ---- config.json ---------------------------------------------------------------------------------


def flat(cfg: Any, run_cfg: RunConfig) -> dict[str, Any]:
    """Both configs as one dictionary, as JSON has it."""
    return json.loads(to_json(dataclasses.asdict(cfg) | dataclasses.asdict(run_cfg)))


def old_names(kind: type) -> dict[str, str]:
    """The former names of fields, which say so: `field(default=0, metadata={"was": "chunk"})`."""
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    return {f.metadata["was"]: f.name for f in fields if "was" in f.metadata}


def overridden(cfg: Any, run_cfg: RunConfig, recipe: Recipe) -> list[str]:
    """The settings that are not their recipe's own."""
    own = flat(recipe[0], dataclasses.replace(RunConfig(out=run_cfg.out), **recipe[1]))
    return [key for key, value in flat(cfg, run_cfg).items() if own[key] != value]


def refuse_other(
    folder: Path,
    method: str,
    cfg: Any,
    run_cfg: Any,
    same_data: Callable[[str, str], bool] = operator.eq,
) -> None:
    """Refuse to go on in a folder that holds a run of other settings.

    A setting that an older run does not have, as it did not exist, had its field's default; one
    that was renamed is read under its former name.

    Args:
        same_data: whether two sources may be the same images; see `common.cli.may_be_same`.

    Raises:
        UserError: with what differs; or the folder's record is not one of a run, or has settings
            that are not known.
    """
    path = folder / "config.json"
    if not path.exists():
        return
    fields = {f.name: f for kind in (cfg, run_cfg) for f in dataclasses.fields(kind)}
    former = old_names(type(cfg)) | old_names(type(run_cfg))
    new = flat(cfg, run_cfg)
    try:
        record = read_json(path)
        theirs, recorded = record["method"], record["config"]
        if not isinstance(record.get("launches", []), list):
            raise TypeError
        renamed = {former[key]: value for key, value in recorded.items() if key in former}
        old = renamed | {key: value for key, value in recorded.items() if key not in former}
        if not isinstance(old.get("data", ""), str):
            raise TypeError
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not of a run; give another --out") from error
    differ = {"method": (theirs, method)} if theirs != method else {}
    if not differ and (unknown := [key for key in old if key not in fields and key not in GONE]):
        raise UserError(
            f"{path}: has {', '.join(unknown)}, which this version does not know; go on with the "
            "version that began the run, or give another --out"
        )
    free = {f.name for f in dataclasses.fields(run_cfg) if "fixed" not in f.metadata}
    for key in (key for key in fields if key not in free):
        was = old[key] if key in old else default_of(fields[key])
        values = meant(was, fields[key]), meant(new[key], fields[key])
        if not (same_data(*values) if key == "data" else values[0] == values[1]):
            differ[key] = was, new[key]
    if differ:
        what = ", ".join(f"{key} {was!r} (now {now!r})" for key, (was, now) in differ.items())
        raise UserError(
            f"--out {folder}: holds a run made with {what}; "
            "give the same settings to go on with it, or another folder"
        )


def data_of(folder: Path) -> Any:
    """The source of the run in a folder; None where there is none."""
    path = folder / "config.json"
    record = read_json(path) if path.exists() else None
    settings = record.get("config") if isinstance(record, dict) else None
    return settings.get("data") if isinstance(settings, dict) else None


def default_of(field: dataclasses.Field) -> Any:
    """The default of a field, as JSON has it; None where it has none."""
    made = field.default
    if made is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
        made = field.default_factory()
    return None if made is dataclasses.MISSING else json.loads(to_json(made))


def meant(value: Any, field: dataclasses.Field) -> Any:
    """What a value stands for: "" and None for what the field says that they mean."""
    return field.metadata.get("means", value) if value in ("", None) else value
