"""Measured figures beside published ones: a table in the terminal, as Markdown and as a picture.

    python -m eval.compare RUN [RUN ...]               # also RUN/compare.md and RUN/compare.png
    python -m eval.compare RUN [RUN ...] --report DIR  # also a page with curves and pictures
    python -m eval.compare RUN --keep results          # add the run's rows to a folder of results
    python -m eval.compare --results results           # write RESULTS.md from that folder

A published figure stands only beside a measurement of the same protocol on the same data set; the
last column says how the run's setting differs from the paper's.
"""

import hashlib
import itertools
import json
import re
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from common import cli
from eval.settings import Compare as Settings

if __name__ == "__main__":  # a mistake is reported before torch is imported
    arguments = cli.run(
        cli.parse_settings, Settings, sys.argv[1:], "python -m eval.compare", __doc__
    )

from common.config import RunConfig
from common.encoders import CIFAR, full_name
from common.errors import UserError
from common.files import atomic_write_bytes, read_json
from eval import report
from eval.published import DATA, PUBLISHED, R18, Row, data_set
from eval.report import as_markdown, rows_of_file
from eval.results import with_interval
from eval.training import PART

SUBJECTS = {"pixels": "raw pixels", "random": "random encoder", "encoder": ""}
PROTOCOLS = {
    "linear-simclr": "linear (SimCLR's protocol)",
    "linear-moco": "linear (MoCo's protocol)",
    "linear-byol": "linear (BYOL's protocol)",
    "linear-features": "linear (on features)",
    "linear-online": "linear (during pretraining)",
    "linear-simsiam": "linear (SimSiam's protocol)",
    "transfer-linear": "transfer (logistic regression)",
    "transfer-linear-mean-per-class": "transfer (logistic regression, mean per class)",
    "transfer-linear-map11": "transfer (logistic regression, 11-point mAP)",
}
FINE_TUNED = {
    "-simclr": " (SimCLR's protocol)",
    "-simclr-v2": " (SimCLR v2's protocol)",
    "-byol": " (BYOL's protocol)",
}
LAYERS = {"-output": " on the head's output"}
NETWORKS = {"resnet18": "ResNet-18", "resnet50": "ResNet-50", "demo": "small demo CNN"}
# IN_WORDS: what `differences` puts into words; FREE: what is no part of a run's setting
IN_WORDS = {"data", "split", "image_column", "label_column", "epochs", "batch_size", "arch", "stem"}
FREE = {field.name for field in fields(RunConfig) if "fixed" not in field.metadata}
FREE |= {"seed", "published", "estimate", "profile"}  # older records have the last two
RENAMED = {"test_size": "eval_size", "cache_chunk": "grad_cache_chunk"}  # keys of older records
OFFICIAL_LISTS = (12_811, 128_116)  # images of ImageNet's 1 % and 10 % (SimCLR's imagenet_subsets)
MEASUREMENT = {"title", "figures", "command", "device", "commit"}
GREYS = {"raw pixels": "#d5d5d5", "random encoder": "#a8a8a8", "supervised baseline": "#5f5f5f"}
METHODS = {"simclr": "SimCLR", "moco": "MoCo", "byol": "BYOL"}


# ---- rows ----------------------------------------------------------------------------------------


def rows_of(run: Path) -> list[dict[str, Any]]:
    """Every judgement of a run, with the cost of the run.

    Raises:
        UserError: there is none.
    """
    files = sorted((run / "results").glob("*.json"))
    if not files:
        raise UserError(f"{run}: no results yet; first: python -m eval.knn {run}")
    return [read_json(file) | {"run": cost(run)} for file in files]


def cost(run: Path) -> dict[str, Any]:
    """The cost of a run: its steps, the median pairs/s, and the time of the steps at that rate."""
    config = read_json(run / "config.json")
    timings = rows_of_file(run / "timings.jsonl")
    rate = median([row["pairs_per_second"] for row in timings]) if timings else None
    return {
        "steps": config["steps"],
        "pairs_per_second": rate,
        "seconds": config["steps"] * config["config"]["batch_size"] / rate if rate else None,
        "peak_memory_gb": max((row["peak_memory_gb"] for row in timings), default=None),
        "launches": config["launches"],
        "config": config["config"],
        "overridden": config.get("overridden"),
    }


def title(row: dict[str, Any]) -> str:
    """What was judged, in words."""
    if row["protocol"].startswith("finetune") and row["subject"] == "random":
        return "supervised baseline"
    if row["subject"] == "encoder":
        method = METHODS.get(row["method"], row["method"])
        return f"{method} {row['recipe']}, {row['epochs']:.3g} epochs"
    return SUBJECTS.get(row["subject"], row["subject"])


def encoder_of(row: dict[str, Any]) -> str:
    """The name of the network of a judgement; older records have the stem apart."""
    return row.get("encoder") or full_name(row["arch"], row["stem"])


def stem_apart(encoder: str) -> tuple[str, bool]:
    """The architecture of a network, and whether its stem is CIFAR's."""
    return encoder.removesuffix(CIFAR), encoder.endswith(CIFAR)


def setting_of(row: dict[str, Any]) -> dict[str, Any]:
    """What rows that differ in the seed alone share; for a baseline, this is the network alone."""
    if row["subject"] != "encoder":
        return {} if row["subject"] == "pixels" else {"encoder": encoder_of(row)}
    config = row["run"]["config"]
    return {RENAMED.get(key, key): value for key, value in config.items() if key not in FREE}


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The keys in which two settings differ; one that either lacks did not exist when it ran."""
    return [key for key, value in one.items() if other.get(key, value) != value]


def named(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, each with a `name`: its title, and where several settings share it, the setting."""
    settings: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        settings.setdefault(title(row), []).append(setting_of(row))
    results = []
    for row in rows:
        setting, others = setting_of(row), settings[title(row)]
        keys = {key for other in others for key in differing(setting, other)}
        words = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in setting.items() if k in keys)
        results.append(row | {"name": title(row) + (f" ({words})" if words else "")})
    return results


def by_input(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Named rows; a baseline is named by a method too, whose preprocessing changes its figure."""
    several = len({row["method"] for row in rows} - {None}) > 1
    return [
        row | {"name": f"{row['name']}, {METHODS.get(row['method'], row['method'])}'s input"}
        if several and row["method"] and row["subject"] != "encoder"
        else row
        for row in rows
    ]


def without_repeats(rows: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """Named rows with each baseline once, from the first run that has it, and a note on the others.

    Baselines of several runs are repeated measurements: they differ at most by the preprocessing
    that the run's method prescribes.
    """
    unique: dict[object, dict[str, Any]] = {}
    for i, row in enumerate(rows):
        key = (row["name"], row["protocol"], row["data"])
        unique.setdefault(i if row["subject"] == "encoder" else key, row)
    if len(unique) == len(rows):
        return list(rows), ""
    baselines = [row for row in unique.values() if row["subject"] != "encoder"]
    baselines = sorted(baselines, key=subject_order)
    names = dict.fromkeys(row["name"] for row in baselines)
    runs = dict.fromkeys(Path(row["run"]["config"]["out"]).name for row in baselines)
    note = f"{', '.join(names)}: as measured with {', '.join(runs)}"
    return list(unique.values()), f"{note}; the other runs' are left out"


def protocol_title(protocol: str) -> str:
    if knn := re.fullmatch(r"knn(\d+)(.*)", protocol):
        return f"kNN (k {knn[1]}){LAYERS.get(knn[2], knn[2].replace('-', ' '))}"
    if share := re.fullmatch(r"finetune-([\d.]+)(.*)", protocol):
        labels = "all labels" if share[1] == "100" else f"{share[1]} % of labels"
        return f"fine-tuned, {labels}{FINE_TUNED.get(share[2], share[2].replace('-', ' '))}"
    return PROTOCOLS.get(protocol, protocol)


def protocol_of(row: dict[str, Any]) -> str:
    """The protocol of a judgement in words, with what was changed in it."""
    return ", ".join([protocol_title(row["protocol"]), *changed(row)])


def changed(row: dict[str, Any]) -> list[str]:
    """The settings of a judgement that are not its protocol's own."""
    return [f"{key.replace('_', ' ')} {value:g}" for key, value in row.get("changed", {}).items()]


def data_title(source: str) -> str:
    """A source without the folders that contain it: `../data/cifar10-jpeg` is cifar10-jpeg."""
    return source if re.fullmatch(r"[\w-]+/[\w.-]+", source) else Path(source).name


# ---- published figures ---------------------------------------------------------------------------


def comparable(row: dict[str, Any], published: Row) -> bool:
    """Whether a published figure may stand beside a measurement at all.

    The method, the protocol, the data judged on (with the size of its test split), and the data
    pretrained on must be the same.
    """
    config = row["run"]["config"]
    return (
        row["subject"] == "encoder"
        and published.method.lower().replace(",", "").split()[0] == row["method"]
        and published.protocol == row["protocol"]
        and published.data == data_set(row["data"])
        and DATA[published.data][1] == row["test_images"]
        and (published.pretrained or published.data) == data_set(config["data"])
    )


def differences(row: dict[str, Any], published: Row) -> list[str]:
    """How the setting of a measurement differs from the published one."""
    config, lines = row["run"]["config"], []
    if published.epochs is None:
        lines.append("epochs are not published")
    elif abs(row["epochs"] - published.epochs) > 0.01 * published.epochs:
        lines.append(f"{row['epochs']:.4g} epochs, not {published.epochs}")
    if row["batch_size"] != published.batch_size:
        lines.append(f"batch {row['batch_size']}, not {published.batch_size}")
    arch, is_cifar = stem_apart(encoder_of(row))
    if NETWORKS.get(arch) != published.network:
        lines.append(f"{NETWORKS.get(arch, arch)}, not {published.network}")
    if published.data == "cifar10" and not published.pretrained and not is_cifar:
        lines.append("ImageNet stem")
    for key, value in published.variant.items():
        if config.get(key) != value:
            lines.append(f"{key.replace('_', ' ')} {config.get(key)}, not {value}")
    return lines


def flags(command: str) -> set[str]:
    """The fields of a config that a command set."""
    names = re.findall(r"(?<!\S)--([\w-]+)", command)
    return {name.replace("-", "_").removeprefix("no_") for name in names}


def notes(row: dict[str, Any], published: Row) -> list[str]:
    """What else differs from the published experiment, where the setting may be the same."""
    config = row["run"]["config"]
    command = row["run"]["launches"][0]["command"]  # where a record has no list
    listed = row["run"].get("overridden")
    overridden = set(flags(command) if listed is None else listed) & config.keys()
    overridden -= published.variant.keys() | FREE | IN_WORDS
    official = "subset" in row and row["train_images"] in OFFICIAL_LISTS
    in_parts = row["protocol"].startswith("finetune") and row.get("probe_batch_size", 0) > PART
    # SimCLR's and Haiku's ResNet-18 have one there (S resnet.py:516-520), torchvision's has none
    shortcut = published.network == R18 and published.source in ("README-S", "README-B")
    conditions = {
        "JPEG copy of the data": re.search(r"jpe?g", row["data"].lower()),
        "not the official list of labels": "labels" in row and not official,
        f"BatchNorm over parts of {PART}": in_parts,
        "no projection in the first shortcut": shortcut,
    }
    return [
        *(f"{key.replace('_', ' ')} {config[key]}" for key in sorted(overridden)),
        *(f"judged with {change}" for change in changed(row)),
        *(note for note, applies in conditions.items() if applies),
    ]


def published_for(row: dict[str, Any]) -> list[Row]:
    """The published rows that a measurement may be compared with, the nearest first.

    They are those of the same setting, or where there is none, the row that the recipe reproduces;
    never one of another protocol or data set.
    """
    candidates = [published for published in PUBLISHED.values() if comparable(row, published)]
    exact = [published for published in candidates if not differences(row, published)]
    of_recipe = PUBLISHED.get(row.get("published") or "")
    nearest = [of_recipe] if of_recipe in candidates else []
    return sorted(exact, key=lambda published: published is not of_recipe) or nearest


def unmatched(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each recipe whose published figure has no measurement beside it."""
    lines = []
    for key in dict.fromkeys(row.get("published") or "" for row in rows):
        of_recipe = [r for r in rows if r.get("published") == key and r["subject"] == "encoder"]
        published = PUBLISHED.get(key)
        if published is None or not of_recipe or any(comparable(r, published) for r in of_recipe):
            continue
        lines.append(
            f"not compared with {published.method}'s {published.top1:.1f} ({published.source}): "
            f"that is {protocol_title(published.protocol)} on {published.data}, "
            "which was not measured here"
        )
    return lines


# ---- tables --------------------------------------------------------------------------------------


def measured(row: dict[str, Any]) -> str:
    return with_interval(row["top1"], row["interval"], row["test_images"])


def subject_order(row: dict[str, Any]) -> int:
    """A sorting key: baselines, then runs, then the supervised baseline."""
    return {"raw pixels": 0, "random encoder": 1, "supervised baseline": 3}.get(title(row), 2)


def protocol_order(protocol: str) -> tuple:
    """A sorting key: kNN by k, then on the head's output, then linear, then fine-tuned."""
    kinds = ("knn", "linear", "finetune", "transfer")
    kind = next((i for i, kind in enumerate(kinds) if protocol.startswith(kind)), len(kinds))
    return kind, protocol.endswith("output"), len(protocol), protocol


def overview(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A row for each subject and a column for each protocol, with Top-1 in percent."""
    names = list(dict.fromkeys(row["name"] for row in sorted(rows, key=subject_order)))
    table = [["Top-1 (%)", *columns(rows)]]
    for name in names:
        cells = []
        for column in columns(rows):
            seeds = [r for r in rows if (r["name"], protocol_of(r)) == (name, column)]
            cells.append(over_seeds(seeds) if seeds else "")
        table.append([name, *cells])
    return table


def columns(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The protocols of the rows in words, in order."""
    ordered = sorted(rows, key=lambda row: protocol_order(row["protocol"]))
    return list(dict.fromkeys(map(protocol_of, ordered)))


def beside_published(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A line for each pair of a measured and a published figure; only a head if there is none."""
    head = ["", "protocol", "measured", "published", "difference", "source", "setting differs in"]
    table = [head]
    for row in sorted(rows, key=subject_order):
        for published in published_for(row):
            table.append(
                [
                    row["name"],
                    protocol_of(row),
                    measured(row),
                    f"{published.top1:.1f}",
                    f"{row['top1'] - published.top1:+.1f}",
                    published.source + (f" ({published.note})" if published.note else ""),
                    deviations(row, published),
                ]
            )
    return table


def deviations(row: dict[str, Any], published: Row) -> str:
    return "; ".join(differences(row, published) + notes(row, published)) or "nothing known"


def as_text(table: Sequence[Sequence[str]]) -> str:
    """A table for the terminal; long headings and long cells take several lines."""
    columns = list(zip(*table, strict=True))
    limits = [max(map(len, column[1:]), default=0) for column in columns]
    limits = [min(max(limit, 12), 40) for limit in limits]
    lines = []
    for row in table:
        cells = [textwrap.wrap(cell, limit) for cell, limit in zip(row, limits, strict=True)]
        lines.append([*itertools.zip_longest(*cells, fillvalue="")] or [("",) * len(row)])
    widths = [max(len(line[i]) for group in lines for line in group) for i in range(len(columns))]
    text = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for group in lines
        for line in group
    ]
    text.insert(len(lines[0]), "-" * (sum(widths) + 2 * len(widths) - 2))
    return "\n".join(text)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A panel for each protocol, with a bar for each subject and lines for published figures."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    supervised = [row for row in rows if title(row) == "supervised baseline"]
    protocols = columns(rows)
    names = list(dict.fromkeys(row["name"] for row in sorted(rows, key=subject_order)))
    trained = [name for name in names if name not in GREYS]
    colours = GREYS | {name: f"C{i % 10}" for i, name in enumerate(trained)}
    across = len(protocols) if len(protocols) < 5 else -(-len(protocols) // 2)
    down = -(-len(protocols) // across)
    size = 0.8 + 0.08 * max(map(len, names)) + 2.3 * across, down * (0.9 + 0.36 * len(names))
    figure, axes = plt.subplots(
        down, across, figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(protocols) :]:
        axis.set_axis_off()
    for axis, protocol in zip(axes.flat, protocols, strict=False):
        for i, name in enumerate(names):
            seeds = [r for r in rows if (r["name"], protocol_of(r)) == (name, protocol)]
            if not seeds:
                continue
            values = [r["top1"] for r in seeds]
            top1, spread = mean(values), stdev(values) if seeds[1:] else seeds[0]["interval"]
            axis.barh(i, top1, 0.72, xerr=spread, color=colours[name], ecolor="#333333")
            end, label = top1 + spread, f"{top1:.1f}"
            if nearest := published_for(seeds[0]):
                published = nearest[0].top1
                axis.vlines(published, i - 0.45, i + 0.45, colors="black", linewidth=2)
                end, label = max(end, published), f"{label} (published {published:.1f})"
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
            axis.text(end + 2, i, label, va="center", size=8, bbox=box)
        for row in (row for row in supervised if row["protocol"].startswith("finetune-100")):
            axis.axvline(row["top1"], color=GREYS["supervised baseline"], linewidth=1, zorder=0)
        axis.set_title("\n".join(textwrap.wrap(protocol, 22)), fontsize=9)
        axis.set(xlim=(0, 125), xticks=[0, 25, 50, 75, 100])
        axis.tick_params(axis="x", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.4, -0.6))
    figure.supxlabel(f"Top-1 (%) on {data_title(rows[0]['data'])}", fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ---- a folder of results, and RESULTS.md ---------------------------------------------------------


def save(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """Copy judgements into a folder of results, one file each, named by what was measured.

    What is measured again replaces its record, even if that was written when settings had other
    names and so has another hash.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        setting = public(setting_of(row))
        run = row["run"]["config"]
        epochs = run["epochs"] if row["epochs"] is None else row["epochs"]
        parts = [row["method"], row["recipe"], f"{epochs:.4g}ep", f"seed{row['seed']}"]
        parts = [part for part in parts if part is not None]
        parts += [data_title(row["data"]), row["protocol"], row["subject"]]
        name = re.sub(r"[^\w.-]", "-", "-".join(map(str, parts)))
        digest = hashlib.sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()
        path = folder / f"{name}-{digest[:6]}.json"  # runs of a recipe may differ in their flags
        for other in sorted(folder.glob(f"{name}-??????.json")):
            if setting_of(read_json(other)) == setting:
                path = other
        atomic_write_bytes(path, (json.dumps(public(row), indent=1) + "\n").encode())


def public(value: Any) -> Any:
    """A row without the folders of the machine that made it: paths are cut to their last part."""
    if isinstance(value, dict):
        return {key: public(item) for key, item in value.items()}
    if isinstance(value, list):
        return [public(item) for item in value]
    if isinstance(value, str):
        quoted = re.sub(r"'(?:~|\.{1,2})?/(?:[^']*/)?([^']*)'", r"'\1'", value)
        return re.sub(r"(?<![\w.~])(?:~\w*|\.{1,2})?/(?:[^\s'\"]*/)?", "", quoted)
    return value


def over_seeds(rows: Sequence[dict[str, Any]]) -> str:
    """A measurement with its 95 % interval; or the mean, deviation and values of several seeds."""
    if len(rows) == 1:
        return measured(rows[0])
    values = [row["top1"] for row in rows]
    listed = ", ".join(f"{value:.1f}" for value in values)
    return f"{mean(values):.1f}, sd {stdev(values):.1f} over {len(rows)} seeds ({listed})"


def results_page(records: Sequence[dict[str, Any]]) -> str:
    """RESULTS.md: every judgement, by data set, with its cost; then other measurements."""
    rows = [record for record in records if "protocol" in record]
    parts = [
        "# Results\n",
        "Generated by `python -m eval.compare --results results` from the records in `results/`; "
        "never typed.\n",
        "Top-1 in percent at the last epoch: one run with the 95 % Wilson interval over the test "
        "images, or the mean and standard deviation over seeds. A published figure stands only "
        "beside the same protocol on the same data set. The time of a pretraining is that of all "
        "steps at the median rate; the time of an evaluation includes features that no earlier "
        "evaluation had cached.\n",
    ]
    for data in sorted({data_title(row["data"]) for row in rows}):
        group = by_input(named([row for row in rows if data_title(row["data"]) == data]))
        group = sorted(without_repeats(group)[0], key=lambda row: (row["name"], row["seed"]))
        group.sort(key=lambda row: (protocol_order(row["protocol"]), subject_order(row)))
        parts += [f"## {data}\n", as_markdown(figures(group))]
        parts += ["What it took:\n", as_markdown(costs(group)), "```"]
        parts += [*dict.fromkeys(r["run"]["launches"][0]["command"] for r in group), "```\n"]
    if others := [record for record in records if "protocol" not in record]:
        parts += ["## Other measurements\n", as_markdown(measurements(others)), "```"]
        parts += [*dict.fromkeys(record["command"] for record in others), "```\n"]
    return "\n".join(parts)


def figures(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A line for each subject and protocol, seeds together, beside the nearest published figure."""
    head = ["subject", "network", "protocol", "Top-1", "published", "setting differs in"]
    table = [[*head, "judged in"]]
    for key in dict.fromkeys((row["name"], protocol_of(row)) for row in rows):
        group = [row for row in rows if (row["name"], protocol_of(row)) == key]
        row, nearest = group[0], published_for(group[0])
        arch, is_cifar = stem_apart(encoder_of(row))
        network = NETWORKS.get(arch, arch)
        if arch.startswith("resnet"):
            network += f", {'cifar' if is_cifar else 'imagenet'} stem"
        seconds = [r["seconds"] for r in group if r.get("seconds")]
        table.append(
            [
                row["name"],
                "none" if row["subject"] == "pixels" else network,
                protocol_of(row),
                over_seeds(group),
                with_source(nearest[0]) if nearest else "",
                deviations(row, nearest[0]) if nearest else "",
                duration(mean(seconds)) if seconds else "",
            ]
        )
    return table


def with_source(published: Row) -> str:
    """A published figure with its source and note."""
    return f"{published.top1:.1f} ({'; '.join(filter(None, [published.source, published.note]))})"


def costs(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A line for each pretraining run: time, rate, memory, machine and commit."""
    table = [["run", "seed", "pretraining", "pairs/s", "peak memory", "device", "commit"]]
    for row in rows:
        run, launch = row["run"], row["run"]["launches"][0]
        if row["subject"] != "encoder":
            continue
        processes = launch.get("processes", 1)
        line = [
            row["name"],
            str(row["seed"]),
            duration(run["seconds"]) if run["seconds"] else "",
            f"{run['pairs_per_second']:,.0f}" if run["pairs_per_second"] else "",
            f"{run['peak_memory_gb']:.1f} GB" if run["peak_memory_gb"] else "",
            launch["device"] + (f" x {processes}" if processes > 1 else ""),
            str(row["pretrained_at"]),
        ]
        if line not in table:
            table.append(line)
    return table


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def measurements(records: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Measurements that judge no encoder, such as throughput: each figure under its own name.

    A record has `title`, `figures` (a number or text by name), `command`, `device` and `commit`.
    """
    table = [["what", "measured", "device", "commit"]]
    for record in records:
        lines = [
            f"{name}: {value:,.4g}" if isinstance(value, int | float) else f"{name}: {value}"
            for name, value in record["figures"].items()
        ]
        table.append([record["title"], "; ".join(lines), record["device"], record["commit"]])
    return table


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Every record of a folder of results, in the order of the file names.

    Raises:
        UserError: there is none, or one is neither a judgement nor a measurement.
    """
    records = []
    for path in sorted(folder.glob("*.json")):
        record = read_json(path)
        required = {"run", "top1"} if "protocol" in record else MEASUREMENT
        if missing := required - record.keys():
            raise UserError(f"{path}: lacks {', '.join(sorted(missing))}")
        records.append(record)
    if not records:
        raise UserError(f"--results {folder}: no results in it")
    return records


# ---- the command ---------------------------------------------------------------------------------


def main(settings: Settings) -> None:
    if settings.results:
        folder = Path(settings.results)
        records = read_records(folder)
        target = folder.resolve().parent / "RESULTS.md"
        atomic_write_bytes(target, results_page(records).encode())
        print(f"{target.name}: {len(records)} records")
        return
    if not settings.runs:
        raise UserError("say which runs to compare, or --results FOLDER")
    rows = [row for run in settings.runs for row in rows_of(Path(run))]
    if settings.keep:
        save(rows, Path(settings.keep))
    out = Path(settings.out or settings.runs[0])
    out.mkdir(parents=True, exist_ok=True)
    if settings.report:
        Path(settings.report).mkdir(parents=True, exist_ok=True)
    pages, groups = [], []
    for data in dict.fromkeys(row["data"] for row in rows):
        group, note = without_repeats(named([row for row in rows if row["data"] == data]))
        tables = [overview(group), beside_published(group)]
        tables = [table for table in tables if len(table) > 1]
        remarks = [note, *unmatched(group)] if note else unmatched(group)
        print(f"\nOn {data_title(data)}, {group[0]['test_images']:,} test images:\n")
        print("\n\n".join([*map(as_text, tables), *(f"({line})" for line in remarks)]))
        suffix = "" if data == rows[0]["data"] else "-" + re.sub(r"\W", "-", data_title(data))
        picture = out / f"compare{suffix}.png"
        draw(group, picture)
        remarks = [f"{line[0].upper()}{line[1:]}." for line in remarks]
        pages += [f"## {data_title(data)}\n", *map(as_markdown, tables)]
        pages += [f"{remark}\n" for remark in remarks]
        groups.append((data_title(data), tables, remarks, picture.read_bytes()))
    atomic_write_bytes(out / "compare.md", "\n".join(pages).encode())
    print(f"\nwritten: {out / 'compare.md'}, {out / 'compare.png'}", file=sys.stderr)
    if settings.report:
        report.write(Path(settings.report), [Path(run) for run in settings.runs], groups)
        print(f"written: {Path(settings.report) / 'index.html'}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main, arguments)
