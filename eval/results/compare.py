"""Measured figures beside published ones: what matches, as tables and as a picture.

A published figure stands only beside a measurement of the same protocol on the same data set; how
the run's setting differs from the paper's is said below.
"""

import html
import itertools
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from common import encoders
from common.errors import printable
from common.layout import is_whole
from eval.results.published import DATA, PUBLISHED, SOURCES, Published, data_set
from eval.results.record import (
    FOLLOWING,
    FREE,
    METHODS,
    PROTOCOLS,
    Result,
    changed_words,
    measured,
    metric_title,
    plural,
    protocol_title,
    read_otherwise,
    words,
)

Table = list[list[str]]
FLOOR, CEILING = ("raw pixels", "random encoder"), "supervised baseline"
GREYS = {"raw pixels": "#d5d5d5", "random encoder": "#a8a8a8", CEILING: "#5f5f5f"}
TASKS = ("knn", "linear", "finetune", "transfer")
# settings that are no part of what tells runs apart, or are in words anyway
NO_SETTING = FREE | {"seed", "published"}
IN_WORDS = {"data", "split", "image_column", "label_column", "epochs", "batch_size", "arch", "stem"}
IN_TITLES = {"k", "label_percent", "label_fraction", "labels", "seed", "chosen_by"}
OFFICIAL_LISTS = (12_811, 128_116)  # images of ImageNet's 1 % and 10 % (SimCLR's imagenet_subsets)


# ---- short names ---------------------------------------------------------------------------------


class Line(NamedTuple):
    """A result with its place in a table."""

    name: str  # of what was judged; those of all seeds are equal
    column: str  # the protocol in words
    result: Result


def named(results: Sequence[Result]) -> list[Line]:
    """The results in order, named so that only those of several seeds share a line and a column."""
    titles = [title(r) for r in results]
    # a run has one name everywhere; a baseline is told apart from others on the same data
    alike = [(title(r), r.subject == "encoder" or r.data) for r in results]
    names = told_apart(titles, [setting_of(r) for r in results], alike)
    titles = [column_title(r) for r in results]
    columns = told_apart(titles, [judged_by(r) for r in results], titles)
    lines = [Line(*each) for each in zip(names, columns, results, strict=True)]
    return sorted(lines, key=lambda line: (order(line.result), line.name, line.result.seed or 0))


def title(result: Result) -> str:
    """What was judged, in words."""
    if result.task == "finetune" and result.subject == "random":
        return CEILING
    if result.subject == "encoder":
        name = [METHODS.get(result.method or "", result.method), result.recipe]
        epochs = "" if result.epochs is None else f", {plural(result.epochs, 'epoch')}"
        return " ".join(word for word in name if word) + epochs or "encoder"
    return {"pixels": "raw pixels", "random": "random encoder"}.get(result.subject, result.subject)


def column_title(result: Result) -> str:
    """The protocol in words, with what was changed in it and how else it departs from it."""
    seed = result.settings.get("seed", 1)  # the judge's own, which is not the run's
    others = [f"judged with seed {seed}"] if seed != 1 else []
    others += [words(key, value) for key, value in read_otherwise(result).items()]
    return ", ".join([protocol_title(result), *changed_words(result), *result.deviations, *others])


def setting_of(result: Result) -> dict[str, Any]:
    """What runs that differ in the seed alone share; of a baseline, the network alone."""
    if result.subject == "encoder":
        return {key: value for key, value in result.run.items() if key not in NO_SETTING}
    return {"network": result.encoder} if result.subject == "random" else {}


def judged_by(result: Result) -> dict[str, Any]:
    left_out = FOLLOWING | IN_TITLES | result.changed.keys()
    return {key: value for key, value in result.settings.items() if key not in left_out}


def told_apart(
    titles: Sequence[str], settings: Sequence[Mapping[str, Any]], alike: Sequence[Any]
) -> list[str]:
    """The titles; among those with equal keys in `alike`, with the settings that part them."""
    sharing: dict[Any, list[Mapping[str, Any]]] = {}
    for key, own in zip(alike, settings, strict=True):
        sharing.setdefault(key, []).append(own)
    parting = {key: fewest(group) for key, group in sharing.items()}
    return [
        ", ".join([title, *(words(name, own[name]) for name in parting[key] if name in own)])
        for title, own, key in zip(titles, settings, alike, strict=True)
    ]


def fewest(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Few keys that tell all of the settings apart: again and again the one that parts the most.

    A setting that one of them lacks did not exist when it ran, and parts nothing by that.
    """
    keys = dict.fromkeys(["batch_size", *(key for each in settings for key in each)])

    def kinds(keys: Sequence[str]) -> int:
        return len({tuple(repr(each.get(key)) for key in keys) for each in settings})

    differing = [k for k in keys if len({repr(s[k]) for s in settings if k in s}) > 1]
    chosen: list[str] = []
    while kinds(chosen) < kinds(differing):
        chosen.append(max(differing, key=lambda key: kinds([*chosen, key])))
    return chosen


def order(result: Result) -> tuple:
    """A sorting key: baselines, then runs by method and recipe, then the supervised baseline."""
    place = {name: i for i, name in enumerate(FLOOR)} | {CEILING: 9}
    methods = list(METHODS)
    method = methods.index(result.method) if result.method in methods else len(methods)
    return place.get(title(result), 5), method, result.recipe or ""


def columns(lines: Sequence[Line]) -> list[str]:
    """The protocols of the lines, in order: kNN by k, on the head, linear, fine-tuned, transfer."""

    def key(line: Line) -> tuple:
        r = line.result
        kind = TASKS.index(r.task) if r.task in TASKS else len(TASKS)
        sizes = r.settings.get("k") or 0, r.settings.get("label_percent") or 0
        return kind, r.layer != 0, sizes, line.column

    return list(dict.fromkeys(line.column for line in sorted(lines, key=key)))


def one_baseline(lines: Sequence[Line]) -> tuple[list[Line], str]:
    """The lines with each baseline once, by its best figure, and a note if any is left out.

    Baselines that several runs measured differ by the preprocessing of the runs' methods alone.
    """
    best: dict[object, Line] = {}
    several: dict[str, None] = {}
    for i, line in enumerate(lines):
        r = line.result
        key = i if r.subject == "encoder" else (line.name, line.column, r.data)
        if key in best:
            several[line.name] = None
        if key not in best or r.value > best[key].result.value:
            best[key] = line
    note = f"{', '.join(several)}: the best of what the runs' own preprocessing gives"
    return list(best.values()), note if several else ""


def data_title(source: str) -> str:
    """A source without the folders that contain it: `../data/cifar10-jpeg` is cifar10-jpeg."""
    on_the_hub = source.count("/") == 1 and not source.startswith((".", "/", "~"))
    path = Path(source)
    is_split = is_whole(path.name)  # clothing/train
    return source if on_the_hub else "/".join(path.parts[-2:]) if is_split else path.name


def network_title(encoder: str | None) -> str:
    """ResNet-18 with a CIFAR stem, small demo CNN, timm:NAME."""
    resnet = encoders.parse(encoder or "")
    if not resnet:
        return network_name(encoder)
    stem = f" with {'a CIFAR' if resnet.cifar else 'an ImageNet'} stem"
    padding = {"simclr": ", padded as SimCLR's", "byol": ", padded as BYOL's", "": ""}
    return network_name(encoder) + stem + padding[resnet.padding]


def network_name(encoder: str | None) -> str:
    """The same without stem and padding, as published rows name it: ResNet-152 (3x, SK)."""
    resnet = encoders.parse(encoder or "")
    if not resnet:
        return "small demo CNN" if encoder == "demo" else encoder or "none"
    more = ", ".join([f"{resnet.width}x"] * (resnet.width > 1) + ["SK"] * resnet.sk)
    arch = (
        resnet.arch.replace("resnet", "ResNet-") if resnet.arch in encoders.BLOCKS else resnet.arch
    )
    return arch + (f" ({more})" if more else "")


# ---- published figures ---------------------------------------------------------------------------


def comparable(result: Result, published: Published) -> bool:
    """Whether a published figure may stand beside a measurement at all.

    The method, the task with all its settings, the data judged on (with the size of its test
    split), and the data pretrained on must be the same.
    """
    judged = result.settings | {"layer": result.layer}
    asked = {"layer": 0} | published.settings
    return (
        result.subject == "encoder"
        and published.recipe.split()[0] == result.method
        and (published.task, published.protocol) == (result.task, result.protocol)
        and published.metric == result.metric
        and all(judged.get(key) == value for key, value in asked.items())
        and published.data == data_set(result.data)
        and DATA[published.data][1] == result.test_images
        and (published.pretrained or published.data) == data_set(result.run.get("data", ""))
    )


def differences(result: Result, published: Published) -> list[str]:
    """How the setting of a measurement differs from the published one."""
    run, epochs, lines = result.run, result.epochs or 0.0, []
    if published.epochs is None:
        lines.append("epochs are not published")
    elif abs(epochs - published.epochs) > 0.01 * published.epochs:
        lines.append(f"{plural(epochs, 'epoch')}, not {published.epochs}")
    if run.get("batch_size") != published.batch_size:
        lines.append(f"batch {run.get('batch_size')}, not {published.batch_size}")
    if network_name(result.encoder) != published.network:
        lines.append(f"{network_name(result.encoder)}, not {published.network}")
    resnet = encoders.parse(result.encoder or "")
    cifar = resnet.cifar if resnet else False
    if published.data == "cifar10" and not published.pretrained and not cifar:
        lines.append("ImageNet stem")
    for key, value in published.variant.items():
        if run.get(key) != value:
            lines.append(f"{key.replace('_', ' ')} {run.get(key)}, not {value}")
    return lines


def notes(result: Result, published: Published) -> list[str]:
    """What else differs from the published experiment, where the setting may be the same."""
    run, name = result.run, result.data.lower()
    overridden = set(result.pretraining.get("overridden", ())) & run.keys()
    overridden -= published.variant.keys() | NO_SETTING | IN_WORDS
    few = result.settings.get("label_percent", 100) < 100
    official = result.settings.get("subset") and result.train_images in OFFICIAL_LISTS
    # SimCLR's and Haiku's ResNet-18 have one there (S resnet.py:516-520), torchvision's has none
    resnet = encoders.parse(result.encoder or "")
    official_code = published.source in ("README-S", "README-B") and resnet and not resnet.padding
    shortcut = published.network == "ResNet-18" and official_code
    conditions = {
        "JPEG copy of the data": "jpeg" in name or "jpg" in name,
        "not the official list of labels": few and not official,
        "no projection in the first shortcut": shortcut,
    }
    return [
        *(words(key, run[key]) for key in sorted(overridden)),
        *(f"judged with {change}" for change in changed_words(result)),
        *result.deviations,
        *(note for note, applies in conditions.items() if applies),
    ]


def published_for(result: Result) -> list[Published]:
    """The published figures that a measurement may be compared with, the nearest first.

    They are those of the same setting, or where there is none, the one that the recipe reproduces;
    never one of another protocol or data set.
    """
    candidates = [row for row in PUBLISHED.values() if comparable(result, row)]
    exact = [row for row in candidates if not differences(result, row)]
    of_recipe = PUBLISHED.get(result.published or "")
    nearest = [of_recipe] if of_recipe in candidates else []
    return sorted(exact, key=lambda row: row is not of_recipe) or nearest


def unmatched(lines: Sequence[Line]) -> list[str]:
    """A remark for each recipe whose published figure has no measurement beside it."""
    remarks = []
    trained = [line.result for line in lines if line.result.subject == "encoder"]
    for key in dict.fromkeys(result.published or "" for result in trained):
        row, of_recipe = PUBLISHED.get(key), [r for r in trained if r.published == key]
        if row and not any(comparable(result, row) for result in of_recipe):
            protocol = PROTOCOLS.get(row.protocol, row.protocol)
            what = ", ".join([protocol, *(words(*each) for each in row.settings.items())])
            remarks.append(
                f"not compared with {row.method}'s {row.value:.1f} ({row.source}): that is "
                f"{row.task} ({what}) on {row.data}, which was not measured here"
            )
    return remarks


# ---- tables --------------------------------------------------------------------------------------


def over_seeds(results: Sequence[Result]) -> str:
    """A measurement with its 95 % interval; or mean, deviation and values of several seeds."""
    if len(results) == 1:
        return measured(results[0])
    values = [result.value for result in results]
    listed = ", ".join(f"{value:.1f}" for value in values)
    return f"{mean(values):.1f}, sd {stdev(values):.1f} ({listed})"


def groups(lines: Sequence[Line]) -> dict[tuple[str, str], list[Result]]:
    """(name, column) to the results of all seeds."""
    found: dict[tuple[str, str], list[Result]] = {}
    for line in lines:
        found.setdefault((line.name, line.column), []).append(line.result)
    return found


def unit(lines: Sequence[Line]) -> str:
    """The name of what the lines measure, where it is one."""
    metrics = {line.result.metric for line in lines}
    return f"{metric_title(metrics.pop())} (%)" if len(metrics) == 1 else "%"


def overview(lines: Sequence[Line]) -> Table:
    """A row for each name and a column for each protocol."""
    cells, across = groups(lines), columns(lines)
    table = [[unit(lines), *across]]
    for name in dict.fromkeys(line.name for line in lines):
        found = [cells.get((name, column), ()) for column in across]
        table.append([name, *(over_seeds(seeds) if seeds else "" for seeds in found)])
    return table


def beside_published(lines: Sequence[Line]) -> tuple[Table, list[str]]:
    """A row for each pair of a measured and a published figure, and remarks on how they differ."""
    table = [["run", "protocol", "measured", "published", "difference", "source"]]
    remarks, sources = [], []
    cells = groups(lines)
    for column in columns(lines):
        for (name, _), seeds in ((key, cells[key]) for key in cells if key[1] == column):
            for row in published_for(seeds[0]):
                apart = f"{mean(result.value for result in seeds) - row.value:+.1f}"
                figure = f"{row.value:.1f}"
                table.append([name, column, over_seeds(seeds), figure, apart, row.source])
                differs = differences(seeds[0], row) + notes(seeds[0], row)
                note = f" (the figure: {row.note})" if row.note else ""
                said = "; ".join(differs) or "nothing is known to differ"
                remarks.append(f"{name}, against {figure} ({row.source}): {said}{note}")
                sources.append(row.source)
    return table, [*dict.fromkeys(remarks), *explained(sources)]


def explained(sources: Sequence[str]) -> list[str]:
    """A remark that explains the abbreviations of sources."""
    said = {word for source in sources for word in source.replace(";", "").split()}
    known = [f"{name} is {what}" for name, what in SOURCES.items() if name in said]
    return ["; ".join(known)] if known else []


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


def as_markdown(table: Sequence[Sequence[str]]) -> str:
    """A table in Markdown: the first column to the left, the others to the right."""
    head, *body = [[escaped(cell) for cell in row] for row in table]
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *body]) + "\n"


def escaped(cell: str) -> str:
    """Text for one cell of a Markdown table: names come from anyone's folders and files."""
    return html.escape(" ".join(cell.split()), quote=False).replace("|", "\\|")


# ---- the picture ---------------------------------------------------------------------------------


def draw(lines: Sequence[Line], path: Path) -> None:
    """Bars on one axis, those of each protocol together, with ticks at published figures."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cells, names = groups(lines), list(dict.fromkeys(line.name for line in lines))
    trained = [name for name in names if name not in GREYS]
    colours = GREYS | {name: f"C{i % 10}" for i, name in enumerate(trained)}
    rows: list[tuple[str, list[Result]]] = []  # a protocol's title has no results
    for column in columns(lines):
        bars = [(name, cells[name, column]) for name in names if (name, column) in cells]
        rows += [(column, []), *bars]
    labels = [cut(name, 60) if seeds else "" for name, seeds in rows]
    size = 6.5 + 0.07 * max(map(len, labels)), 1.2 + 0.27 * len(rows)
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    for i, (name, seeds) in enumerate(rows):
        if not seeds:
            axis.text(1, i + 0.15, cut(name, 75), va="center", size=9, weight="bold")
            continue
        values = [result.value for result in seeds]
        value, spread = mean(values), stdev(values) if seeds[1:] else seeds[0].interval
        axis.barh(i, value, 0.74, xerr=spread, color=colours[name], ecolor="#333333")
        end, label = value + spread, f"{value:.1f}"
        if nearest := published_for(seeds[0]):
            published = nearest[0].value
            axis.vlines(published, i - 0.45, i + 0.45, colors="black", linewidth=2)
            end, label = max(end, published), f"{label} (published {published:.1f})"
        axis.text(end + 1.5, i, label, va="center", size=8, bbox=box)
    axis.set(xlim=(0, 118), xticks=range(0, 101, 20), ylim=(len(rows) - 0.4, -0.6))
    axis.set_yticks(range(len(rows)), labels, size=8)
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel(f"{unit(lines)} on {cut(data_title(lines[0].result.data), 60)}", fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def cut(text: str, most: int) -> str:
    text = printable(text)
    return text if len(text) <= most else f"{text[: most - 1]}…"
