"""The record of a judgement: one JSON file in RUN/results/, whose fields say all that it means.

Labels, tables and comparisons are made from the fields of `Result`; a file's name is for people.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import median
from types import UnionType
from typing import Any, get_args, get_origin

from common.config import SOURCE_FLAGS, RunConfig, read_as, source_config
from common.errors import UserError
from common.files import atomic_write_bytes, read_json, read_rows, to_json
from common.launch import provenance
from eval.subjects import Subject, config_of

VERSION = 2
METRICS = {"top1": "Top-1", "mean_per_class": "mean per class", "map11": "11-point mAP"}
METHODS = {"simclr": "SimCLR", "moco": "MoCo", "byol": "BYOL"}
PROTOCOLS = {
    "simclr": "SimCLR's protocol",
    "simclr-v2": "SimCLR v2's protocol",
    "moco": "MoCo's protocol",
    "moco-v3": "MoCo v3's protocol",
    "byol": "BYOL's protocol",
    "simsiam": "SimSiam's protocol",
    "features": "on features",
    "online": "during pretraining",
    "logistic": "logistic regression",
}
# Settings of a command that say what is judged and where it runs, not how it is judged.
PLACES = {"run", "weights", "baselines", "data", "layer", *SOURCE_FLAGS, "test_split"}
PLACES |= {"protocol", "metric", "out", "workers", "processes", "memory_gb", "check_content"}
EARLY = {"image_column", "label_column"}  # which the ids of the first runs have, though unset
# What follows from the protocol, the images and the encoder, and so tells no judgements apart.
FOLLOWING = {"lr", "epochs", "batch_size", "chosen_of", "chosen_on", "regularisation"}
FOLLOWING |= {"validation", "features"}
# Settings of a run that leave its result as it is: where it runs, what it logs and keeps.
FREE = {f.name for f in fields(RunConfig) if "fixed" not in f.metadata} | {"online_linear"}


@dataclass(frozen=True)
class Result:
    """One judgement of one encoder, with everything that it depends on."""

    task: str  # knn, linear, finetune, transfer
    protocol: str  # whose or which: simclr, moco, byol, features, weighted, logistic, ...
    subject: str  # encoder, random, pixels, or the value of --weights
    layer: int  # 0: representation h; k: the head's k-th hidden layer; -1: the head's output
    data: str  # the SOURCE judged on
    columns: dict[str, Any]  # how the images are read, as far as it was said
    metric: str  # the name of the headline metric
    metrics: dict[str, float]  # in percent, by name
    interval: float  # half the width, in percent, of the headline's 95 % interval
    train_images: int
    test_images: int
    settings: dict[str, Any]  # of the judge, with what it found for itself
    changed: dict[str, Any]  # settings that replace the protocol's own
    deviations: tuple[str, ...]  # how else this departs from the protocol
    method: str | None
    recipe: str | None
    epochs: float | None  # as set for the run; of a run that is not finished, as done
    encoder: str | None  # the network's name
    seed: int | None  # of the run
    published: str | None  # the key of the figure that the recipe reproduces
    run: dict[str, Any]  # every setting of the run
    run_id: str
    pretrained_at: str | None  # the commit
    judged: dict[str, Any]  # command, commit, versions, device, time
    seconds: float | None
    speed: dict[str, float] = field(default_factory=dict)
    """of a training: images a second, and the share of the time that it waited for data"""
    pretraining: dict[str, Any] = field(default_factory=dict)
    """what it took, by `cost`; known where a run is compared or kept"""

    @property
    def value(self) -> float:
        """The headline, in percent."""
        return self.metrics[self.metric]


# ---- writing -------------------------------------------------------------------------------------


def record(
    subject: Subject,
    *,
    task: str,
    protocol: str,
    metrics: Mapping[str, float | None],
    metric: str = "top1",
    interval: float,
    counts: tuple[int, int] | None = None,
    settings: Mapping[str, Any],
    changed: Mapping[str, Any] | None = None,
    deviations: Sequence[str] = (),
    seconds: float | None = None,
    speed: Mapping[str, float] | None = None,
) -> Result:
    """Print a judgement and, for a run, write it; the same judgement replaces its older record.

    Of several processes the first one does.

    Args:
        metrics: in percent, by name; one that is None does not apply.
        metric: the name of the headline.
        counts: numbers of training and test images; default: those of the splits.
        settings: `settings_of` the command.
        changed: those of them that replace the protocol's own.
        deviations: short texts on how else this departs from the protocol.
    """
    train_images, test_images = counts or tuple(len(split) for split in subject.splits())
    metadata = subject.encoder.metadata
    run = subject.config if metadata.get("method") else {}  # else: weights that are not the run's
    result = Result(
        task=task,
        protocol=protocol,
        subject=subject.encoder.name,
        layer=subject.encoder.layer,
        data=subject.source,
        columns=subject.columns,
        metric=metric,
        metrics={name: round(value, 3) for name, value in metrics.items() if value is not None},
        interval=interval,
        train_images=train_images,
        test_images=test_images,
        settings=dict(settings),
        changed=dict(changed or {}),
        deviations=tuple(deviations),
        method=metadata.get("method"),
        recipe=metadata.get("recipe"),
        epochs=run.get("epochs") if metadata.get("finished") and run else metadata.get("epochs"),
        encoder=metadata.get("encoder"),
        seed=run.get("seed"),
        published=metadata.get("published"),
        run=run,
        run_id=run_id(metadata["method"], run) if run else "",
        pretrained_at=metadata.get("commit"),
        judged=provenance(subject.accelerator.num_processes),
        seconds=seconds,
        speed={name: round(value, 3) for name, value in (speed or {}).items()},
    )
    subject.tell_bad()
    if not subject.accelerator.is_main_process:
        return result
    if subject.folder:
        subject.folder.mkdir(exist_ok=True)
        name = record_name(subject, task, protocol, settings, changed)
        write(result, subject.folder / f"{name}.json")
    read = [words(key, value) for key, value in read_otherwise(result).items()]
    judgement = ", ".join(
        [protocol_title(result), *changed_words(result), *result.deviations, *read]
    )
    figure = f"{metric_title(metric)} {measured(result)}  on {subject.source}"
    print(f"{result.subject:<8}  {judgement}: {figure}", flush=True)
    return result


def settings_of(settings: Any, **found: Any) -> dict[str, Any]:
    """All that a command was told on how to judge, and what it `found` in place of a default."""
    told = json.loads(to_json(dataclasses.asdict(settings)))
    return {key: value for key, value in told.items() if key not in PLACES} | found


def changed(settings: Any, *names: str) -> dict[str, Any]:
    """Those of the named settings that replace the protocol's own."""
    return {name: value for name in names if (value := getattr(settings, name))}


def write(result: Result, path: Path) -> None:
    content = {"version": VERSION} | dataclasses.asdict(result)
    atomic_write_bytes(path, to_json(content, indent=1).encode() + b"\n")


# ---- names of files, and ids ---------------------------------------------------------------------


def record_name(
    subject: Subject,
    task: str,
    protocol: str,
    settings: Mapping[str, Any],
    changed: Mapping[str, Any] | None = None,
) -> str:
    """The name of a judgement's file, and of its unfinished state, without the ending.

    It can be read, and no other judgement of the run has it. A setting that is not set (None, 0,
    "") is as one that does not exist: a new one leaves the names of older records as they are.
    """
    encoder, of_run = subject.encoder, subject.of_run
    parts = readable(task, protocol, settings, encoder.layer, encoder.name)
    if not of_run:
        parts.append(f"on-{subject.source}")
    columns = subject.columns
    if of_run:  # a run's own are not told
        own = read_as(source_config(subject.config))
        columns = {k: v for k, v in columns.items() if v != own.get(k)}
    given = {k: v for k, v in settings.items() if v and k not in FOLLOWING}
    where = "" if of_run else subject.source
    where = os.path.realpath(where) if os.path.exists(where) else where  # a folder of that name
    judgement = [task, protocol, encoder.name, encoder.layer, where, columns]
    return f"{file_name('-'.join(parts))}-{digest([*judgement, given, changed or {}])}"


def readable(
    task: str, protocol: str, settings: Mapping[str, Any], layer: int, subject: str
) -> list[str]:
    k, percent = settings.get("k"), settings.get("label_percent")
    parts = [task, protocol, f"k{k}" if k else "", f"{percent:g}" if percent else ""]
    return [part for part in [*parts, LAYERS.get(layer, f"head{layer}"), subject] if part]


def digest(value: Any) -> str:
    """The first 8 hex digits of the SHA-256 of a value as JSON with sorted keys."""
    text = to_json(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def run_id(method: str, settings: Mapping[str, Any]) -> str:
    """What names a run by its method and settings, its seed among them, and not by its folder."""
    kept = {key: value for key, value in settings.items() if key not in FREE}
    kept["split"] = kept.get("split") or "train"
    unset = {key for key in SOURCE_FLAGS if kept.get(key) in (None, "")} - EARLY
    kept = {key: value for key, value in kept.items() if key not in unset}
    return digest({"method": method, "settings": kept})


def file_name(title: str) -> str:
    """Letters, digits, `-`, `_` and `.` alone; cut where a disk would refuse it."""
    name = re.sub(r"[^\w.]+", "-", title)
    if len(name.encode()) > 200:  # of the 255 bytes that file systems allow
        name = f"{name[:40]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name


# ---- reading -------------------------------------------------------------------------------------


class Older(UserError):
    """A record of an earlier version.

    Args:
        command: that judges again.
    """

    def __init__(self, path: Path, command: str) -> None:
        super().__init__(f"{path}: of an older version; judge again: {command}")
        self.path, self.command = path, command


def read(path: Path) -> Result:
    """The record in a file.

    Raises:
        Older: it is of an earlier version.
        UserError: it is not the record of a judgement.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: not the record of a judgement")
    if content.get("version") != VERSION and "top1" in content:
        judged = content.get("judged")
        command = judged.get("command") if isinstance(judged, dict) else None
        again = " ".join(command.split()) if isinstance(command, str) else "its command"
        raise Older(path, again)
    if isinstance(content.get("deviations"), list):  # JSON has no tuples
        content["deviations"] = tuple(map(str, content["deviations"]))
    content.setdefault("speed", {})  # records have it since trainings are timed
    values: dict[str, Any] = {each.name: content.get(each.name) for each in fields(Result)}
    wrong = [each.name for each in fields(Result) if not is_a(values[each.name], each.type)]
    if not wrong and not is_a(content["metrics"].get(content["metric"]), float):
        wrong.append("metrics")
    if content.get("version") != VERSION or wrong:
        what = ", ".join(wrong) or "version"
        raise UserError(f"{path}: not the record of a judgement ({what})")
    return Result(**values)  # type: ignore[arg-type]


def is_a(value: Any, kind: Any) -> bool:
    """Whether a value of JSON is of an annotated type, without a look into its items."""
    kinds = get_args(kind) if isinstance(kind, UnionType) else (get_origin(kind) or kind,)
    return isinstance(value, kinds) or (float in kinds and isinstance(value, int))


def results_of(run: Path) -> tuple[list[Result], list[str]]:
    """Every judgement of a run, with the cost of the run, and a line on those that are too old.

    Raises:
        UserError: there is none.
    """
    results, older = [], list[Older]()
    for path in sorted((run / "results").glob("*.json")):
        try:
            results.append(read(path))
        except Older as error:
            older.append(error)
    if older and not results:
        raise older[0]
    if not results:
        look = f"(where images have no labels: python -m eval.neighbours {run})"
        raise UserError(f"{run}: no results yet; first: python -m eval.knn {run} {look}")
    alone = not (run / "config.json").exists()  # an encoder of the papers' authors
    spent = {} if alone else cost(run)
    lines = []
    for command in dict.fromkeys(error.command for error in older):
        names = ", ".join(error.path.name for error in older if error.command == command)
        lines.append(f"{run}: of an older version: {names}; judge again and delete them: {command}")
    return [dataclasses.replace(result, pretraining=spent) for result in results], lines


def cost(run: Path) -> dict[str, Any]:
    """What a run took: its steps, the median pairs/s, the time of the steps at that rate, and more.

    Raises:
        UserError: it has no config.
    """
    settings, record = config_of(run), read_json(run / "config.json")
    timings = read_rows(run / "timings.jsonl")
    rate = median([row["pairs_per_second"] for row in timings]) if timings else None
    return {
        "steps": record["steps"],
        "pairs_per_second": rate,
        "seconds": record["steps"] * settings["batch_size"] / rate if rate else None,
        "data_wait": median([row["data_wait"] for row in timings]) if timings else None,
        "peak_memory_gb": max((row["peak_memory_gb"] for row in timings), default=None),
        "launches": record["launches"],
        "overridden": record.get("overridden", []),
    }


# ---- in words ------------------------------------------------------------------------------------

LAYERS = {0: "", -1: "output"}
WORDS = {"batch_size": "batch", "crop_min_area": "crops from"}


def metric_title(metric: str) -> str:
    return METRICS.get(metric, metric.replace("_", " "))


def protocol_title(result: Result) -> str:
    """The task and protocol of a judgement, without what was changed in it."""
    settings, protocol = result.settings, PROTOCOLS.get(result.protocol, result.protocol)
    if result.task == "knn":
        title = f"kNN (k {settings.get('k')})"
        title += "" if result.protocol == "weighted" else f", {protocol}"
    elif result.task == "finetune":
        percent = settings.get("label_percent", 100)
        labels = "all labels" if percent == 100 else f"{percent:g} % of labels"
        title = f"fine-tuned, {labels} ({protocol})"
    else:
        title = f"{result.task} ({protocol})"
    if result.metric != "top1":
        title += f", {metric_title(result.metric)}"
    if result.layer:
        title += " on the head's " + ("output" if result.layer < 0 else f"layer {result.layer}")
    return title


def changed_words(result: Result) -> list[str]:
    return [words(key, value) for key, value in result.changed.items()]


def read_otherwise(result: Result) -> dict[str, Any]:
    """How the images are read, and which judge, where it is not as in the run."""
    return {key: value for key, value in result.columns.items() if result.run.get(key) != value}


def words(key: str, value: Any) -> str:
    """A setting in a few words: batch 512, jitter 0.4 0.4 0.2 0.1, not symmetric."""
    name = WORDS.get(key, key.replace("_", " "))
    if isinstance(value, bool):
        return name if value else f"not {name}"
    numbers = value if isinstance(value, list | tuple) else [value]
    text = " ".join(f"{x:g}" if isinstance(x, int | float) else str(x) for x in numbers)
    return plural(value, "epoch") if key == "epochs" else f"{name} {text}"


def plural(count: float, noun: str) -> str:
    return f"{count:.4g} {noun}{'' if count == 1 else 's'}"


# ---- intervals -----------------------------------------------------------------------------------


def confidence(percent: float, count: int) -> float:
    """Half the width, in percent, of the 95 % Wilson interval of a share measured on `count`."""
    p, z = percent / 100, 1.959964
    return 100 * z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + (z / (2 * count)) ** 2)


def measured(result: Result) -> str:
    """The headline and its 95 % interval."""
    return with_interval(result.value, result.interval, result.test_images)


def with_interval(percent: float, interval: float, count: int) -> str:
    """A figure and its 95 % interval: ±, or both ends where Wilson's interval is not centred."""
    z2 = 1.959964**2
    centre = (percent + 50 * z2 / count) / (1 + z2 / count)  # Wilson's lies nearer to 50 %
    resampled = abs(interval - confidence(percent, count)) > 0.01  # so it is not Wilson's
    if resampled or abs(centre - percent) < 0.25 * interval:
        return f"{percent:.1f} ± {interval:.1f}"
    return f"{percent:.1f} ({centre - interval:.1f} to {centre + interval:.1f})"
