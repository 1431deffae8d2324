"""Measured beside published: a table in the terminal, as Markdown and as a picture.

    python -m eval.compare RUN [RUN ...]               # also RUN/compare.md and RUN/compare.png
    python -m eval.compare RUN --keep results          # add the run's rows to a folder of results
    python -m eval.compare --results results           # write RESULTS.md from that folder

A published figure stands only beside a measurement of the same protocol on the same data set; how
the run's setting differs from the paper's is said in the last column.
"""

import html
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Annotated, Any

import tyro

from common import cli
from common.run import read_json, write_atomically
from eval.published import PUBLISHED, Row

SUBJECTS = {"pixels": "raw pixels", "random": "random encoder", "encoder": ""}
PROTOCOLS = {
    "linear-simclr": "linear (SimCLR's protocol)",
    "linear-moco": "linear (MoCo's protocol)",
    "linear-byol": "linear (BYOL's protocol)",
    "linear-features": "linear (on features)",
    "finetune-100": "fine-tuned, all labels",
}
NETWORKS = {"resnet18": "ResNet-18", "resnet50": "ResNet-50", "demo": "small demo CNN"}
METHODS = {"simclr": "SimCLR", "moco": "MoCo", "byol": "BYOL"}


@dataclass(frozen=True)
class Settings:
    """Set what was measured beside what was published."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional] = ()  # folders of runs
    out: str = ""  # folder for compare.md and compare.png; default: the first run's
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
    path = run / "timings.jsonl"
    timings = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
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


def protocol_title(protocol: str) -> str:
    if knn := re.fullmatch(r"knn(\d+)(.*)", protocol):
        return f"kNN (k {knn[1]}){knn[2].replace('-', ' ')}"
    return PROTOCOLS.get(protocol, protocol)


def data_title(source: str) -> str:
    """A source without the folders above it: `../data/cifar10-jpeg` is cifar10-jpeg."""
    return source if re.fullmatch(r"[\w-]+/[\w.-]+", source) else Path(source).name


def published_for(row: dict[str, Any]) -> Row | None:
    """The published row that a measurement may be held against, if there is one."""
    known = PUBLISHED.get(row.get("published") or "")
    if known is None or row["subject"] != "encoder" or row["protocol"] != known.protocol:
        return None
    return known if known.data in data_title(row["data"]).replace("-1k", "") else None


def deviations(row: dict[str, Any], known: Row) -> str:
    """How the setting of a measurement differs from the published one."""
    said = []
    if known.epochs and abs(row["epochs"] - known.epochs) > 0.01 * known.epochs:
        said.append(f"{row['epochs']:.4g} epochs, not {known.epochs}")
    if row["batch_size"] != known.batch_size:
        said.append(f"batch {row['batch_size']}, not {known.batch_size}")
    if NETWORKS.get(row["arch"]) != known.network:
        said.append(f"{NETWORKS.get(row['arch'], row['arch'])}, not {known.network}")
    if known.data == "cifar10" and row["stem"] != "cifar":
        said.append("ImageNet stem")
    if "jpeg" in row["data"]:
        said.append("JPEG copy of the data")
    return "; ".join(said)


# ---- tables --------------------------------------------------------------------------------------


def measured(row: dict[str, Any]) -> str:
    return f"{row['top1']:.1f} ± {row['interval']:.1f}"


def order(row: dict[str, Any]) -> tuple:
    """Baselines first, then runs, then the supervised ceiling."""
    ranks = {"raw pixels": 0, "random encoder": 1, "supervised twin": 3}
    return ranks.get(title(row), 2), title(row)


def place(protocol: str) -> tuple:
    """A sorting key: kNN by k, then linear, then fine-tuned."""
    kinds = ("knn", "linear", "finetune")
    kind = next((i for i, kind in enumerate(kinds) if protocol.startswith(kind)), len(kinds))
    return kind, len(protocol), protocol


def overview(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Subjects down, protocols across: Top-1 in percent with its 95 % interval."""
    protocols = sorted({row["protocol"] for row in rows}, key=place)
    names = list(dict.fromkeys(title(row) for row in sorted(rows, key=order)))
    table = [["Top-1 (%)", *map(protocol_title, protocols)]]
    for name in names:
        cells = {row["protocol"]: measured(row) for row in rows if title(row) == name}
        table.append([name, *(cells.get(protocol, "") for protocol in protocols)])
    return table


def beside_published(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """One line for each measurement that has a published counterpart; only a head if none has."""
    head = ["", "protocol", "measured", "published", "difference", "source", "setting differs in"]
    table = [head]
    for row in sorted(rows, key=order):
        if known := published_for(row):
            table.append(
                [
                    title(row),
                    protocol_title(row["protocol"]),
                    measured(row),
                    f"{known.top1:.1f}",
                    f"{row['top1'] - known.top1:+.1f}",
                    known.source + (f" ({known.note})" if known.note else ""),
                    deviations(row, known) or "nothing",
                ]
            )
    return table


def as_text(table: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def as_markdown(table: Sequence[Sequence[str]]) -> str:
    head, *body = [[escaped(cell) for cell in row] for row in table]
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *body]) + "\n"


def escaped(cell: str) -> str:
    """Text for one cell of a Markdown table: names come from folders and files of anyone's."""
    return html.escape(" ".join(cell.split()), quote=False).replace("|", "\\|")


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Bars of every subject under every protocol; lines for the ceiling and published figures."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    ceiling = [row for row in rows if title(row) == "supervised twin"]
    rows = [row for row in rows if row not in ceiling] or ceiling
    protocols = sorted({row["protocol"] for row in rows}, key=place)
    names = list(dict.fromkeys(title(row) for row in sorted(rows, key=order)))
    width = 0.84 / len(names)
    size = (max(5.0, 1.5 + 0.55 * len(names) * len(protocols)), 4.4)
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    greys = {"raw pixels": "#d0d0d0", "random encoder": "#a0a0a0"}
    for i, name in enumerate(names):
        mine = [row for row in rows if title(row) == name]
        places = [protocols.index(row["protocol"]) + (i + 0.5) * width - 0.42 for row in mine]
        heights, spread = [row["top1"] for row in mine], [row["interval"] for row in mine]
        colour = greys.get(name, f"C{i % 10}")
        axis.bar(places, heights, width * 0.92, yerr=spread, label=name, color=colour, capsize=2)
        for x, row in zip(places, mine, strict=True):
            top = row["top1"] + row["interval"] + 1
            axis.text(x, top, f"{row['top1']:.1f}", ha="center", size=8)
            if known := published_for(row):
                ends = x - width / 2, x + width / 2
                axis.hlines(known.top1, *ends, colors="black", linestyles="dashed")
                axis.text(x, known.top1 + 1, f"published {known.top1:.1f}", ha="center", size=7)
    for row in ceiling:
        axis.axhline(row["top1"], color="#444444", linewidth=1, label="supervised twin")
    axis.set_xticks(range(len(protocols)), list(map(protocol_title, protocols)))
    axis.set(ylabel="Top-1 (%)", ylim=(0, 104), title=f"on {data_title(rows[0]['data'])}")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, ncols=2, fontsize=8, loc="outside lower center")
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ---- kept results and RESULTS.md -----------------------------------------------------------------


def keep(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """Copy judgements into a folder of results, one file each, named by what was measured."""
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        parts = [row["method"], row["recipe"], f"{row['epochs']:.4g}ep", f"seed{row['seed']}"]
        parts += [data_title(row["data"]), row["protocol"], row["subject"]]
        name = re.sub(r"[^\w.-]", "-", "-".join(map(str, parts)))
        text = json.dumps(public(row), indent=1) + "\n"
        write_atomically(folder / f"{name}.json", text.encode())


def public(value: Any) -> Any:
    """A row without the folders of the machine that it was measured on."""
    if isinstance(value, dict):
        return {key: public(item) for key, item in value.items()}
    if isinstance(value, list):
        return [public(item) for item in value]
    if isinstance(value, str):
        return " ".join(re.sub(r"^(\.{0,2}/)\S*/", "", word) for word in value.split(" "))
    return value


def over_seeds(rows: Sequence[dict[str, Any]]) -> str:
    """One measurement with its 95 % interval; of several seeds the mean, deviation and each."""
    if len(rows) == 1:
        return measured(rows[0])
    values = [row["top1"] for row in rows]
    each = ", ".join(f"{value:.1f}" for value in values)
    return f"{mean(values):.1f}, sd {stdev(values):.1f} over {len(rows)} seeds ({each})"


def results_page(rows: Sequence[dict[str, Any]]) -> str:
    """RESULTS.md: every measured row, grouped by data set, with what it took."""
    parts = [
        "# Results\n",
        "Generated by `python -m eval.compare --results results` from the records in `results/`; "
        "never typed.\n",
        "Top-1 in percent at the last epoch: one run with the 95 % Wilson interval over the test "
        "images, or the mean and standard deviation over seeds. A published figure stands only "
        "beside the same protocol on the same data set. Time is that of all pretraining steps at "
        "the median rate.\n",
    ]
    for data in sorted({data_title(row["data"]) for row in rows}):
        mine = [row for row in rows if data_title(row["data"]) == data]
        head = ["subject", "network", "protocol", "Top-1", "published", "setting differs in"]
        table = [[*head, "pretraining", "device", "commit"]]
        ranked = sorted(mine, key=lambda row: (place(row["protocol"]), order(row), row["seed"]))
        for key in dict.fromkeys(map(alike, ranked)):
            group = [row for row in ranked if alike(row) == key]
            row = group[0]
            known, trained = published_for(row), row["subject"] == "encoder"
            runs = [r["run"] for r in group]
            seconds = mean([run["seconds"] for run in runs])
            rate = mean([run["pairs_per_second"] for run in runs])
            network = f"{NETWORKS.get(row['arch'], row['arch'])}, {row['stem']} stem"
            table.append(
                [
                    title(row),
                    "none" if row["subject"] == "pixels" else network,
                    protocol_title(row["protocol"]),
                    over_seeds(group),
                    f"{known.top1:.1f} ({known.source})" if known else "",
                    deviations(row, known) if known else "",
                    f"{seconds / 60:.1f} min, {rate:,.0f} pairs/s" if trained else "",
                    row["judged"]["device"] if not trained else runs[0]["launches"][0]["device"],
                    ", ".join(dict.fromkeys(r["pretrained_at"] for r in group)),
                ]
            )
        commands = dict.fromkeys(r["run"]["launches"][0]["command"] for r in ranked)
        parts += [f"## {data}\n", as_markdown(table)]
        parts += ["```", *commands, "```", ""]
    return "\n".join(parts)


def alike(row: dict[str, Any]) -> tuple:
    """What rows must share to be seeds of one another."""
    keys = ("protocol", "arch", "stem", "batch_size", "data")
    return title(row), *(row[key] for key in keys)


# ---- the command ---------------------------------------------------------------------------------


def main() -> None:
    settings = tyro.cli(Settings, prog="python -m eval.compare", description=__doc__)
    if settings.results:
        folder = Path(settings.results)
        rows = [read_json(file) for file in sorted(folder.glob("*.json"))]
        if not rows:
            raise cli.UserError(f"--results {folder}: no results in it")
        target = folder.resolve().parent / "RESULTS.md"
        write_atomically(target, results_page(rows).encode())
        print(f"{target.name}: {len(rows)} rows")
        return
    if not settings.runs:
        raise cli.UserError("say which runs to compare, or --results FOLDER")
    rows = [row for run in settings.runs for row in rows_of(Path(run))]
    if settings.keep:
        keep(rows, Path(settings.keep))
    out = Path(settings.out or settings.runs[0])
    out.mkdir(parents=True, exist_ok=True)
    pages = []
    for data in dict.fromkeys(row["data"] for row in rows):
        mine = [row for row in rows if row["data"] == data]
        tables = [overview(mine), beside_published(mine)]
        tables = [table for table in tables if len(table) > 1]
        print(f"\nOn {data_title(data)}, {mine[0]['test_images']:,} test images:\n")
        print("\n\n".join(map(as_text, tables)))
        pages += [f"## {data_title(data)}\n", *map(as_markdown, tables)]
        suffix = "" if data == rows[0]["data"] else "-" + re.sub(r"\W", "-", data_title(data))
        draw(mine, out / f"compare{suffix}.png")
    write_atomically(out / "compare.md", "\n".join(pages).encode())
    print(f"\nwritten: {out / 'compare.md'}, {out / 'compare.png'}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
