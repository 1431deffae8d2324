"""The record of each judgement: one JSON file in RUN/results/."""

import hashlib
import json
import math
import re
from typing import Any

from common.files import atomic_write_bytes
from common.launch import provenance
from eval.subjects import Subject


def record(
    subject: Subject,
    protocol: str,
    *,
    top1: float,
    counts: tuple[int, int] | None = None,
    **values: Any,
) -> dict[str, Any]:
    """Print a judgement and, for a run, write RUN/results/PROTOCOL-NAME.json.

    Args:
        counts: numbers of training and test images; default: those of the splits.
    """
    train_count, test_count = counts or tuple(len(split) for split in subject.splits())
    metadata = subject.encoder.metadata
    row = {
        "protocol": protocol,
        "subject": subject.encoder.name,
        "top1": round(top1, 3),
        **{key: value for key, value in values.items() if value is not None},
        "data": subject.source,
        **{key: column for key, column in subject.columns.items() if column},
        "train_images": train_count,
        "test_images": test_count,
        "method": metadata.get("method"),
        "recipe": metadata.get("recipe"),
        "epochs": metadata.get("epochs"),
        "encoder": metadata.get("encoder"),
        "batch_size": subject.config.get("batch_size"),
        "seed": subject.config.get("seed"),
        "published": metadata.get("published"),
        "pretrained_at": metadata.get("commit"),
        "judged": provenance(subject.accelerator.num_processes),
    }
    if not subject.accelerator.is_main_process:
        return row
    if subject.folder:
        subject.folder.mkdir(exist_ok=True)
        path = subject.folder / f"{name_of_record(subject, protocol)}.json"
        atomic_write_bytes(path, json.dumps(row, indent=2).encode() + b"\n")
    interval = values.get("interval")
    figure = f"{top1:.1f}" if interval is None else with_interval(top1, interval, test_count)
    line = f"{protocol:<16} {subject.encoder.name:<8}  {measure_of(protocol)} {figure}"
    print(f"{line}  on {subject.source}", flush=True)
    return row


def changed(settings: Any, *names: str) -> dict[str, float] | None:
    """Those of the named settings that replace the protocol's own, if any."""
    return {name: value for name in names if (value := getattr(settings, name))} or None


def measure_of(protocol: str) -> str:
    """The name of the measure that a protocol reports."""
    others = {"-mean-per-class": "mean per class", "-map11": "11-point mAP"}
    return next((name for ending, name in others.items() if protocol.endswith(ending)), "Top-1")


def name_of_record(subject: Subject, protocol: str) -> str:
    """The name of a judgement's file, without its ending."""
    of_run = subject.source == subject.config.get("data")
    ending = "" if of_run else f"-on-{subject.source}"
    for key, column in subject.columns.items():
        if column != (subject.config.get(key) if of_run else None):
            ending += f"-{column}"  # other labels, or other images
    return file_name(f"{protocol}-{subject.encoder.name}{ending}")


def file_name(title: str) -> str:
    """Letters, digits, `-`, `_` and `.` alone; cut where a disk would refuse it."""
    name = re.sub(r"[^\w.]+", "-", title)
    if len(name.encode()) > 200:  # of the 255 bytes that file systems allow
        name = f"{name[:40]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name


def confidence(percent: float, count: int) -> float:
    """Half the width, in percent, of the 95 % Wilson interval of a share measured on `count`."""
    p, z = percent / 100, 1.959964
    return 100 * z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + (z / (2 * count)) ** 2)


def with_interval(percent: float, interval: float, count: int) -> str:
    """A figure and its 95 % interval: ±, or both ends where Wilson's interval is not centred."""
    z2 = 1.959964**2
    centre = (percent + 50 * z2 / count) / (1 + z2 / count)  # Wilson's lies nearer to 50 %
    resampled = abs(interval - confidence(percent, count)) > 0.01  # so it is not Wilson's
    if resampled or abs(centre - percent) < 0.25 * interval:
        return f"{percent:.1f} ± {interval:.1f}"
    return f"{percent:.1f} ({centre - interval:.1f} to {centre + interval:.1f})"
