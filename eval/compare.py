"""Measured beside published: a table in the terminal, as Markdown and as a picture.

    python -m eval.compare RUN [RUN ...]               # also RUN/compare.md and RUN/compare.png
    python -m eval.compare RUN [RUN ...] --report DIR  # also a page with curves and pictures
    python -m eval.compare RUN --keep results          # add the run's rows to a folder of results
    python -m eval.compare --results results           # write RESULTS.md from that folder

A published figure stands only beside a measurement of the same protocol on the same data set; how
the run's setting differs from the paper's is said in the last column.
"""

import hashlib
import itertools
import json
import re
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Annotated, Any

import tyro

from common import cli
from common.run import read_json, write_atomically
from eval import report
from eval.finetune import PART
from eval.published import DATA, PUBLISHED, R18, Row, data_set
from eval.report import as_markdown, rows_of_file
from eval.results import with_interval

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
# what a recipe may be run with and still be it; what `differences` says in words of its own
TOLD = {"data", "split", "image_column", "label_column", "epochs", "batch_size", "arch", "stem"}
TOLD |= {"compile", "estimate", "profile", "published"}
OFFICIAL_LISTS = (12_811, 128_116)  # images of ImageNet's 1 % and 10 % (SimCLR's imagenet_subsets)
APART = {"seed", "out", "workers", "memory_gb", "processes", "log_every", "save_every", "knn_every"}
MEASUREMENT = {"title", "figures", "command", "device", "commit"}
GREYS = {"raw pixels": "#d5d5d5", "random encoder": "#a8a8a8", "supervised twin": "#5f5f5f"}
METHODS = {"simclr": "SimCLR", "moco": "MoCo", "byol": "BYOL"}


@dataclass(frozen=True)
class Settings:
    """Set what was measured beside what was published."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional] = ()  # folders of runs
    out: str = ""  # folder for compare.md and compare.png; default: the first run's
    report: str = ""  # write a page on the runs, with curves and pictures, into this folder
    keep: str = ""  # copy the runs' results, with their cost, into this folder
    results: str = ""  # a folder of kept results: write RESULTS.md beside it, and nothing else


# ---- rows ----------------------------------------------------------------------------------------


def rows_of(run: Path) -> list[dict[str, Any]]:
    """Every judgement of a run, with what the run cost.

    Raises:
        UserError: nothing has been judged.
    """
    files = sorted((run / "results").glob("*.json"))
    if not files:
        raise cli.UserError(f"{run}: no results yet; first: python -m eval.knn {run}")
    return [read_json(file) | {"run": cost(run)} for file in files]


def cost(run: Path) -> dict[str, Any]:
    """What a run took: its steps, the median pairs/s, and their time at that rate."""
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
    }


def title(row: dict[str, Any]) -> str:
    """Who was judged, in words."""
    if row["protocol"].startswith("finetune") and row["subject"] == "random":
        return "supervised twin"
    if row["subject"] == "encoder":
        method = METHODS.get(row["method"], row["method"])
        return f"{method} {row['recipe']}, {row['epochs']:.3g} epochs"
    return SUBJECTS.get(row["subject"], row["subject"])


def setting_of(row: dict[str, Any]) -> dict[str, Any]:
    """What rows must share to be seeds of one another; of a baseline, the network alone."""
    if row["subject"] != "encoder":
        return {} if row["subject"] == "pixels" else {key: row[key] for key in ("arch", "stem")}
    return {key: value for key, value in row["run"]["config"].items() if key not in APART}


def named(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, each with a `name`: its title and, among several of that title, its setting."""
    settings: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        settings.setdefault(title(row), []).append(setting_of(row))
    told = []
    for row in rows:
        mine, all_of_title = setting_of(row), settings[title(row)]
        differ = [key for key in mine if any(other.get(key) != mine[key] for other in all_of_title)]
        said = ", ".join(f"{key.replace('_', ' ')} {mine[key]}" for key in differ)
        told.append(row | {"name": title(row) + (f" ({said})" if said else "")})
    return told


def by_input(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Named rows, baselines by the method whose input they have: it moves them by some points."""
    several = len({row["method"] for row in rows} - {None}) > 1
    return [
        row | {"name": f"{row['name']}, {METHODS.get(row['method'], row['method'])}'s input"}
        if several and row["method"] and row["subject"] != "encoder"
        else row
        for row in rows
    ]


def once(rows: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """Named rows with each baseline once, the first run's that has it, and a note if one went.

    Baselines of several runs are the same thing measured again: they differ at most by the input
    that the run's method prescribes.
    """
    kept: dict[object, dict[str, Any]] = {}
    for i, row in enumerate(rows):
        same = (row["name"], row["protocol"], row["data"])
        kept.setdefault(i if row["subject"] == "encoder" else same, row)
    if len(kept) == len(rows):
        return list(rows), ""
    found = sorted((row for row in kept.values() if row["subject"] != "encoder"), key=order)
    names = dict.fromkeys(row["name"] for row in found)
    sources = dict.fromkeys(Path(row["run"]["config"]["out"]).name for row in found)
    said = f"{', '.join(names)}: as measured with {', '.join(sources)}"
    return list(kept.values()), f"{said}; the other runs' are left out"


def protocol_title(protocol: str) -> str:
    if knn := re.fullmatch(r"knn(\d+)(.*)", protocol):
        return f"kNN (k {knn[1]}){LAYERS.get(knn[2], knn[2].replace('-', ' '))}"
    if share := re.fullmatch(r"finetune-([\d.]+)(.*)", protocol):
        labels = "all labels" if share[1] == "100" else f"{share[1]} % of labels"
        return f"fine-tuned, {labels}{FINE_TUNED.get(share[2], share[2].replace('-', ' '))}"
    return PROTOCOLS.get(protocol, protocol)


def called(row: dict[str, Any]) -> str:
    """A protocol in words, with what was changed in it."""
    return ", ".join([protocol_title(row["protocol"]), *changed(row)])


def changed(row: dict[str, Any]) -> list[str]:
    """The settings of a judgement that are not its protocol's own."""
    return [f"{key.replace('_', ' ')} {value:g}" for key, value in row.get("changed", {}).items()]


def data_title(source: str) -> str:
    """A source without the folders above it: `../data/cifar10-jpeg` is cifar10-jpeg."""
    return source if re.fullmatch(r"[\w-]+/[\w.-]+", source) else Path(source).name


# ---- beside what was published -------------------------------------------------------------------


def comparable(row: dict[str, Any], known: Row) -> bool:
    """Whether a figure may stand beside a measurement at all, deviations or not.

    The method, the protocol, the data judged on down to the size of its test split, and the data
    pretrained on must be the same.
    """
    config = row["run"]["config"]
    return (
        row["subject"] == "encoder"
        and known.method.lower().replace(",", "").split()[0] == row["method"]
        and known.protocol == row["protocol"]
        and known.data == data_set(row["data"])
        and DATA[known.data][1] == row["test_images"]
        and (known.pretrained or known.data) == data_set(config["data"])
    )


def differences(row: dict[str, Any], known: Row) -> list[str]:
    """How the setting of a measurement differs from the published one."""
    config, said = row["run"]["config"], []
    if known.epochs is None:
        said.append("epochs are not published")
    elif abs(row["epochs"] - known.epochs) > 0.01 * known.epochs:
        said.append(f"{row['epochs']:.4g} epochs, not {known.epochs}")
    if row["batch_size"] != known.batch_size:
        said.append(f"batch {row['batch_size']}, not {known.batch_size}")
    if NETWORKS.get(row["arch"]) != known.network:
        said.append(f"{NETWORKS.get(row['arch'], row['arch'])}, not {known.network}")
    if known.data == "cifar10" and not known.pretrained and row["stem"] != "cifar":
        said.append("ImageNet stem")
    for key, value in known.variant.items():
        if config.get(key) != value:
            said.append(f"{key.replace('_', ' ')} {config.get(key)}, not {value}")
    return said


def flags(command: str) -> set[str]:
    """The fields of a config that a command set: what its run changed in the recipe."""
    given = re.findall(r"(?<!\S)--([\w-]+)", command)
    return {flag.replace("-", "_").removeprefix("no_") for flag in given}


def notes(row: dict[str, Any], known: Row) -> list[str]:
    """What is not the published setting's own even where the setting is the same."""
    config = row["run"]["config"]
    given = flags(row["run"]["launches"][0]["command"]) & config.keys()
    given -= known.variant.keys() | APART | TOLD
    listed = "subset" in row and row["train_images"] in OFFICIAL_LISTS
    parts = row["protocol"].startswith("finetune") and row.get("probe_batch_size", 0) > PART
    # SimCLR's and Haiku's ResNet-18 have one there (S resnet.py:516-520), torchvision's has none
    shortcut = known.network == R18 and known.source in ("README-S", "README-B")
    said = {
        "JPEG copy of the data": re.search(r"jpe?g", row["data"].lower()),
        "not the official list of labels": "labels" in row and not listed,
        f"BatchNorm over parts of {PART}": parts,
        "no projection in the first shortcut": shortcut,
    }
    return [
        *(f"{key.replace('_', ' ')} {config[key]}" for key in sorted(given)),
        *(f"judged with {change}" for change in changed(row)),
        *(note for note, true in said.items() if true),
    ]


def published_for(row: dict[str, Any]) -> list[Row]:
    """The published rows that a measurement may be held against, the nearest first.

    Those of the same setting; where there is none, the row that the recipe reproduces. None of
    another protocol or data set.
    """
    found = [known for known in PUBLISHED.values() if comparable(row, known)]
    exact = [known for known in found if not differences(row, known)]
    recipes = PUBLISHED.get(row.get("published") or "")
    nearest = [recipes] if recipes in found else []
    return sorted(exact, key=lambda known: known is not recipes) or nearest


def unmatched(rows: Sequence[dict[str, Any]]) -> list[str]:
    """For each recipe whose published figure stands beside nothing: the figure, and why."""
    said = []
    for key in dict.fromkeys(row.get("published") or "" for row in rows):
        mine = [row for row in rows if row.get("published") == key and row["subject"] == "encoder"]
        known = PUBLISHED.get(key)
        if known is None or not mine or any(comparable(row, known) for row in mine):
            continue
        said.append(
            f"not held against {known.method}'s {known.top1:.1f} ({known.source}): that is "
            f"{protocol_title(known.protocol)} on {known.data}, which was not measured here"
        )
    return said


# ---- tables --------------------------------------------------------------------------------------


def measured(row: dict[str, Any]) -> str:
    return with_interval(row["top1"], row["interval"], row["test_images"])


def order(row: dict[str, Any]) -> int:
    """Baselines first, then runs, as they were named, then the supervised ceiling."""
    return {"raw pixels": 0, "random encoder": 1, "supervised twin": 3}.get(title(row), 2)


def place(protocol: str) -> tuple:
    """A sorting key: kNN by k, then on the head's output, then linear, then fine-tuned."""
    kinds = ("knn", "linear", "finetune", "transfer")
    kind = next((i for i, kind in enumerate(kinds) if protocol.startswith(kind)), len(kinds))
    return kind, protocol.endswith("output"), len(protocol), protocol


def overview(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Subjects down, protocols across: Top-1 in percent with its 95 % interval, or over seeds."""
    names = list(dict.fromkeys(row["name"] for row in sorted(rows, key=order)))
    table = [["Top-1 (%)", *columns(rows)]]
    for name in names:
        cells = []
        for column in columns(rows):
            mine = [r for r in rows if (r["name"], called(r)) == (name, column)]
            cells.append(over_seeds(mine) if mine else "")
        table.append([name, *cells])
    return table


def columns(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The protocols of the rows in words, in their order."""
    return list(dict.fromkeys(map(called, sorted(rows, key=lambda row: place(row["protocol"])))))


def beside_published(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """One line for each published counterpart of a measurement; only a head if there is none."""
    head = ["", "protocol", "measured", "published", "difference", "source", "setting differs in"]
    table = [head]
    for row in sorted(rows, key=order):
        for known in published_for(row):
            table.append(
                [
                    row["name"],
                    called(row),
                    measured(row),
                    f"{known.top1:.1f}",
                    f"{row['top1'] - known.top1:+.1f}",
                    known.source + (f" ({known.note})" if known.note else ""),
                    deviations(row, known),
                ]
            )
    return table


def deviations(row: dict[str, Any], known: Row) -> str:
    return "; ".join(differences(row, known) + notes(row, known)) or "nothing known"


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
    """A panel for each protocol with a bar for each subject; the ceiling and published figures."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    twins = [row for row in rows if title(row) == "supervised twin"]
    protocols = columns(rows)
    names = list(dict.fromkeys(row["name"] for row in sorted(rows, key=order)))
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
            mine = [r for r in rows if (r["name"], called(r)) == (name, protocol)]
            if not mine:
                continue
            values = [r["top1"] for r in mine]
            top1, spread = mean(values), stdev(values) if mine[1:] else mine[0]["interval"]
            axis.barh(i, top1, 0.72, xerr=spread, color=colours[name], ecolor="#333333")
            end, label = top1 + spread, f"{top1:.1f}"
            if found := published_for(mine[0]):
                known = found[0]
                axis.vlines(known.top1, i - 0.45, i + 0.45, colors="black", linewidth=2)
                end, label = max(end, known.top1), f"{label} (published {known.top1:.1f})"
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
            axis.text(end + 2, i, label, va="center", size=8, bbox=box)
        for row in (row for row in twins if row["protocol"].startswith("finetune-100")):
            axis.axvline(row["top1"], color=GREYS["supervised twin"], linewidth=1, zorder=0)
        axis.set_title("\n".join(textwrap.wrap(protocol, 22)), fontsize=9)
        axis.set(xlim=(0, 125), xticks=[0, 25, 50, 75, 100])
        axis.tick_params(axis="x", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.4, -0.6))
    figure.supxlabel(f"Top-1 (%) on {data_title(rows[0]['data'])}", fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ---- kept results and RESULTS.md -----------------------------------------------------------------


def keep(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """Copy judgements into a folder of results, one file each, named by what was measured."""
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        setting = json.dumps(public(setting_of(row)), sort_keys=True).encode()
        run = row["run"]["config"]
        epochs = run["epochs"] if row["epochs"] is None else row["epochs"]
        parts = [row["method"], row["recipe"], f"{epochs:.4g}ep", f"seed{row['seed']}"]
        parts = [part for part in parts if part is not None]
        parts += [data_title(row["data"]), row["protocol"], row["subject"]]
        parts += [hashlib.sha256(setting).hexdigest()[:6]]  # runs of a recipe with other flags
        name = re.sub(r"[^\w.-]", "-", "-".join(map(str, parts)))
        text = json.dumps(public(row), indent=1) + "\n"
        write_atomically(folder / f"{name}.json", text.encode())


def public(value: Any) -> Any:
    """A row without the folders of the machine that it was measured on: of paths, the last part."""
    if isinstance(value, dict):
        return {key: public(item) for key, item in value.items()}
    if isinstance(value, list):
        return [public(item) for item in value]
    if isinstance(value, str):
        quoted = re.sub(r"'(?:~|\.{1,2})?/(?:[^']*/)?([^']*)'", r"'\1'", value)
        return re.sub(r"(?<![\w.~])(?:~\w*|\.{1,2})?/(?:[^\s'\"]*/)?", "", quoted)
    return value


def over_seeds(rows: Sequence[dict[str, Any]]) -> str:
    """One measurement with its 95 % interval; of several seeds the mean, deviation and each."""
    if len(rows) == 1:
        return measured(rows[0])
    values = [row["top1"] for row in rows]
    each = ", ".join(f"{value:.1f}" for value in values)
    return f"{mean(values):.1f}, sd {stdev(values):.1f} over {len(rows)} seeds ({each})"


def results_page(records: Sequence[dict[str, Any]]) -> str:
    """RESULTS.md: every judgement, by data set, with what it took; then other measurements."""
    rows = [record for record in records if "protocol" in record]
    parts = [
        "# Results\n",
        "Generated by `python -m eval.compare --results results` from the records in `results/`; "
        "never typed.\n",
        "Top-1 in percent at the last epoch: one run with the 95 % Wilson interval over the test "
        "images, or the mean and standard deviation over seeds. A published figure stands only "
        "beside the same protocol on the same data set. Time is that of all pretraining steps at "
        "the median rate; an evaluation's is its own, with those features that no earlier one kept."
        "\n",
    ]
    for data in sorted({data_title(row["data"]) for row in rows}):
        mine = [row for row in rows if data_title(row["data"]) == data]
        mine = sorted(once(by_input(named(mine)))[0], key=lambda row: (row["name"], row["seed"]))
        mine = sorted(mine, key=lambda row: (place(row["protocol"]), order(row)))
        parts += [f"## {data}\n", as_markdown(figures(mine))]
        parts += ["What it took:\n", as_markdown(costs(mine)), "```"]
        parts += [*dict.fromkeys(r["run"]["launches"][0]["command"] for r in mine), "```\n"]
    if others := [record for record in records if "protocol" not in record]:
        parts += ["## Other measurements\n", as_markdown(measurements(others)), "```"]
        parts += [*dict.fromkeys(record["command"] for record in others), "```\n"]
    return "\n".join(parts)


def figures(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A line for each subject and protocol, seeds together, beside the nearest published figure."""
    head = ["subject", "network", "protocol", "Top-1", "published", "setting differs in"]
    table = [[*head, "judged in"]]
    for key in dict.fromkeys((row["name"], called(row)) for row in rows):
        group = [row for row in rows if (row["name"], called(row)) == key]
        row, found = group[0], published_for(group[0])
        network = NETWORKS.get(row["arch"], row["arch"])
        network += "" if row["arch"] == "demo" else f", {row['stem']} stem"
        seconds = [r["seconds"] for r in group if r.get("seconds")]
        table.append(
            [
                row["name"],
                "none" if row["subject"] == "pixels" else network,
                called(row),
                over_seeds(group),
                beside(found[0]) if found else "",
                deviations(row, found[0]) if found else "",
                duration(mean(seconds)) if seconds else "",
            ]
        )
    return table


def beside(known: Row) -> str:
    """A published figure with its source and what is to be known of it."""
    return f"{known.top1:.1f} ({'; '.join(filter(None, [known.source, known.note]))})"


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
    """What is no judgement of an encoder, such as throughput: each figure under its own name.

    A record has `title`, `figures` (a number or text by name), `command`, `device` and `commit`.
    """
    table = [["what", "measured", "device", "commit"]]
    for record in records:
        said = [
            f"{name}: {value:,.4g}" if isinstance(value, int | float) else f"{name}: {value}"
            for name, value in record["figures"].items()
        ]
        table.append([record["title"], "; ".join(said), record["device"], record["commit"]])
    return table


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Every record of a folder of results, in the order of their names.

    Raises:
        UserError: there is none, or one is neither a judgement nor a measurement.
    """
    records = []
    for path in sorted(folder.glob("*.json")):
        record = read_json(path)
        needed = {"run", "top1"} if "protocol" in record else MEASUREMENT
        if missing := needed - record.keys():
            raise cli.UserError(f"{path}: lacks {', '.join(sorted(missing))}")
        records.append(record)
    if not records:
        raise cli.UserError(f"--results {folder}: no results in it")
    return records


# ---- the command ---------------------------------------------------------------------------------


def main() -> None:
    settings = tyro.cli(Settings, prog="python -m eval.compare", description=__doc__)
    if settings.results:
        folder = Path(settings.results)
        records = read_records(folder)
        target = folder.resolve().parent / "RESULTS.md"
        write_atomically(target, results_page(records).encode())
        print(f"{target.name}: {len(records)} records")
        return
    if not settings.runs:
        raise cli.UserError("say which runs to compare, or --results FOLDER")
    rows = [row for run in settings.runs for row in rows_of(Path(run))]
    if settings.keep:
        keep(rows, Path(settings.keep))
    out = Path(settings.out or settings.runs[0])
    out.mkdir(parents=True, exist_ok=True)
    if settings.report:
        Path(settings.report).mkdir(parents=True, exist_ok=True)
    pages, groups = [], []
    for data in dict.fromkeys(row["data"] for row in rows):
        mine, note = once(named([row for row in rows if row["data"] == data]))
        tables = [overview(mine), beside_published(mine)]
        tables = [table for table in tables if len(table) > 1]
        remarks = [note, *unmatched(mine)] if note else unmatched(mine)
        print(f"\nOn {data_title(data)}, {mine[0]['test_images']:,} test images:\n")
        print("\n\n".join([*map(as_text, tables), *(f"({line})" for line in remarks)]))
        suffix = "" if data == rows[0]["data"] else "-" + re.sub(r"\W", "-", data_title(data))
        picture = out / f"compare{suffix}.png"
        draw(mine, picture)
        said = [f"{line[0].upper()}{line[1:]}." for line in remarks]
        pages += [f"## {data_title(data)}\n", *map(as_markdown, tables), *(f"{s}\n" for s in said)]
        groups.append((data_title(data), tables, said, picture.read_bytes()))
    write_atomically(out / "compare.md", "\n".join(pages).encode())
    print(f"\nwritten: {out / 'compare.md'}, {out / 'compare.png'}", file=sys.stderr)
    if settings.report:
        report.write(Path(settings.report), [Path(run) for run in settings.runs], groups)
        print(f"written: {Path(settings.report) / 'index.html'}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
