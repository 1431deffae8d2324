"""A folder of kept results, and RESULTS.md: one table a question, made from the records alone."""

import json
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from common.errors import UserError
from common.files import atomic_write_bytes, read_json
from common.launch import provenance
from eval.results.compare import (
    NO_SETTING,
    Line,
    Table,
    as_markdown,
    beside_published,
    columns,
    data_title,
    differences,
    escaped,
    groups,
    named,
    network_title,
    one_baseline,
    over_seeds,
    overview,
    unit,
)
from eval.results.published import PUBLISHED, data_set
from eval.results.record import (
    FOLLOWING,
    METHODS,
    Result,
    digest,
    file_name,
    plural,
    read,
    readable,
    words,
    write,
)

INTRODUCTION = """\
Every figure is of the last epoch. One run has its 95 % interval over the test images; several seeds
have their mean, standard deviation and values. kNN (k 20) is the vote of the 20 nearest training
images by the similarity of their features; a linear classifier is trained on features that stay as
they are; fine-tuning trains the whole network with labels. A random encoder is the same network
untrained, and raw pixels have none; the methods prepare images in their own ways, and of these
baselines the best is shown. The supervised baseline learned from all labels."""
IN_NAMES = {"data", "epochs"}  # settings that every name or heading has
NAMES = {"cifar10": "CIFAR-10", "imagenet": "ImageNet", "imagenette": "Imagenette"}
COMPARED = 200, 512  # epochs and batch at which every method has a published figure on CIFAR-10
RIGHT = "tests.benchmarks.right"  # checks, in the commands of their records
MEASUREMENT = {"title", "figures", "command", "device", "commit"}


# ---- a folder of results -------------------------------------------------------------------------


def keep(results: Sequence[Result], folder: Path) -> None:
    """Copy judgements into a folder of results, one file each, without folders of this machine.

    What is measured again replaces its record; so do baselines, which are those of any seed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    there = {path: content for path, content in read_folder(folder) if isinstance(content, Result)}
    for result in results:
        kept = Result(**public(vars(result)))
        for path in [path for path, other in there.items() if same(kept, other)]:
            path.unlink()
            del there[path]
        parts = [kept.method, kept.recipe, "" if kept.epochs is None else f"{kept.epochs:g}ep"]
        parts += ["" if seed_of(kept) is None else f"seed{kept.seed}", data_title(kept.data)]
        parts += readable(kept.task, kept.protocol, kept.settings, kept.layer, kept.subject)
        name = file_name("-".join(part for part in parts if part))
        path = folder / f"{name}-{digest([*identity(kept), *settings_of(kept)])}.json"
        write(kept, path)
        there[path] = kept


def identity(result: Result) -> list[Any]:
    """What tells a kept judgement from others, but for the settings."""
    names = "method", "recipe", "encoder", "task", "protocol", "metric", "subject", "layer", "data"
    named = [getattr(result, name) for name in names]
    return [*named, result.columns, result.changed, seed_of(result)]


def seed_of(result: Result) -> int | None:
    return result.seed if result.subject == "encoder" else None


def settings_of(result: Result) -> list[dict[str, Any]]:
    """The settings of the judge and of the run."""
    judge = {key: value for key, value in result.settings.items() if key not in FOLLOWING}
    return [judge, {key: value for key, value in result.run.items() if key not in NO_SETTING}]


def same(one: Result, other: Result) -> bool:
    """Whether two records are of one judgement; a setting that either lacks did not exist then."""
    return identity(one) == identity(other) and all(
        others.get(key, value) == value
        for own, others in zip(settings_of(one), settings_of(other), strict=True)
        for key, value in own.items()
    )


def public(value: Any) -> Any:
    """A value without the folders of the machine that made it: paths are cut to their last part."""
    if isinstance(value, dict):
        return {key: public(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(public(item) for item in value)
    if isinstance(value, str):
        quoted = re.sub(r"'(?:~|\.{1,2})?/(?:[^']*/)?([^']*)'", r"'\1'", value)
        return re.sub(r"(?<![\w.~])(?:~\w*|\.{1,2})?/(?:[^\s'\"]*/)?", "", quoted)
    return value


def read_folder(folder: Path) -> list[tuple[Path, Result | dict[str, Any]]]:
    """The records of a folder by file: judgements, and other measurements.

    A measurement, such as throughput, has a `title`, `figures` (by name, or by row and column), the
    `command` that measures them, `device` and `commit`.

    Raises:
        UserError: one is neither.
    """
    records: list[tuple[Path, Result | dict[str, Any]]] = []
    for path in sorted(folder.glob("*.json")):
        content = read_json(path)
        if not isinstance(content, dict) or content.get("kind") != "measurement":
            records.append((path, read(path)))
            continue
        if missing := MEASUREMENT - content.keys():
            raise UserError(f"{path}: lacks {', '.join(sorted(missing))}")
        records.append((path, content))
    return records


def keep_measurement(
    path: Path, title: str, command: str, figures: dict[str, Any], **more: Any
) -> None:
    """Write what a benchmark measured here as a record, of which RESULTS.md has the figures.

    Args:
        figures: name to number or text, or row to such.
        more: what else is to be kept, or `device`, under another name than the machine's.
    """
    here = provenance(1)
    record = {"kind": "measurement", "title": title, "command": command, "figures": figures}
    record |= {key: here[key] for key in ("device", "commit")} | more
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_bytes(path, (json.dumps(record, indent=1) + "\n").encode())


# ---- RESULTS.md ----------------------------------------------------------------------------------


def results_page(records: Sequence[Result | dict[str, Any]]) -> str:
    """RESULTS.md from all records of a folder."""
    results = named([record for record in records if isinstance(record, Result)])
    measurements = [record for record in records if isinstance(record, dict)]
    parts = [
        "# Results\n",
        "Generated by `make results` from the records in `results/`; never typed.\n",
        INTRODUCTION,
    ]
    questions: dict[str, list[Line]] = {}
    for line in results:
        questions.setdefault(question(line.result), []).append(line)
    for heading, lines in sorted(questions.items(), key=lambda x: (QUESTIONS.get(x[0], 1), x[0])):
        parts.append(f"\n## {heading}\n")
        for data in sorted({line.result.data for line in lines}):
            parts += answer([line for line in lines if line.result.data == data])
        if remark := not_measured(lines):
            parts.append(wrapped(remark))
    if results:
        parts += ["\n## What does it cost?\n", *costs(results)]
    checks = [each for each in measurements if RIGHT in each["command"]]
    speeds = [each for each in measurements if "pairs_per_second" in each["figures"]]
    if checks:
        parts += ["\n## Is it right?\n", *map(check_line, checks)]
    if speeds:
        parts += ["\n## How fast are the commands?\n", *speed_tables(speeds)]
    others = [each for each in measurements if each not in checks + speeds]
    if others:
        parts.append("\n## How fast beside others?")
    for each in others:
        about = f"`{each['command']}` on {made_on(each)}."
        parts += [f"\n### {headed(each)}\n", as_markdown(figures_of(each)), wrapped(about)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts)) + "\n"


DEMO, OTHERS = "What do the demos learn?", "And other images?"
QUESTIONS = {DEMO: 0, OTHERS: 2}  # their order; between them, how near is each published data set


def question(result: Result) -> str:
    if result.data == "demo":
        return DEMO
    data = data_set(result.data)
    return f"How near is {NAMES.get(data, data)}?" if data else OTHERS


def answer(every: Sequence[Line]) -> list[str]:
    """A table of the protocols that several were judged by, a list of the others, the settings."""
    lines, _ = one_baseline(every)
    cells = groups(lines)
    shared = {c for c in columns(lines) if len([key for key in cells if key[1] == c]) > 1}
    first = lines[0].result
    parts = [
        wrapped(
            f"On {data_title(first.data)}: {unit(lines)} of {first.test_images:,} test images."
        ),
        "",
    ]
    if shared:
        parts.append(as_markdown(overview([line for line in lines if line.column in shared])))
    alone = [
        f"- {name}, {column}: {over_seeds(cells[name, column])}"
        for column in columns(lines)
        for name, of in cells
        if of == column and column not in shared
    ]
    if alone:
        parts += ["Measured in one case each:\n", *alone, ""]
    table, remarks = beside_published(lines)
    if len(table) > 1:
        parts += ["Beside what was published:\n", as_markdown(table)]
        parts += [*(listed(f"{remark}.") for remark in remarks), ""]
    networks = dict.fromkeys(network_title(line.result.encoder) for line in lines)
    parts += ["Settings:\n", listed(f"network: {', '.join(networks)}")]
    for name in dict.fromkeys(line.name for line in lines if line.result.run):
        result = next(line.result for line in lines if line.name == name)
        changed = [k for k in result.pretraining.get("overridden", ()) if k in result.run]
        shown = [words(k, result.run[k]) for k in changed if k not in NO_SETTING | IN_NAMES]
        if shown and result.subject == "encoder":
            parts.append(listed(f"{name}: {', '.join(shown)}"))
    return [*parts, ""]


def not_measured(lines: Sequence[Line]) -> str:
    """A line that names the recipes without a run in a published setting of CIFAR-10."""
    results = [line.result for line in lines if line.result.subject == "encoder"]
    if data_set(lines[0].result.data) != "cifar10":
        return ""
    missing = {
        row.recipe
        for row in PUBLISHED.values()
        if (row.data, row.epochs, row.batch_size) == ("cifar10", *COMPARED)
        and row.recipe != "context"
        and not any(
            row.recipe == f"{r.method} {r.recipe}" and not differences(r, row) for r in results
        )
    }
    places = {method: place for place, method in enumerate(METHODS)}
    names = []
    for recipe in sorted(missing, key=lambda recipe: (places[recipe.split()[0]], recipe)):
        method, name = recipe.split()
        names.append(f"{METHODS[method]} {name}, {plural(COMPARED[0], 'epoch')}")
    return f"Not measured yet: {'; '.join(names)}." if names else ""


def costs(lines: Sequence[Line]) -> list[str]:
    """Tables of what pretraining and judging took, and the commands of the runs."""
    head = ["run", "seeds", "pretraining", "an epoch", "pairs/s", "waiting", "peak memory"]
    table = [[*head, "device", "commit"]]
    runs: dict[str, dict[str, Result]] = {}
    for line in lines:
        if line.result.subject == "encoder" and line.result.pretraining:
            runs.setdefault(line.name, {})[line.result.run_id] = line.result
    commands = []
    for name, seeds in runs.items():
        spent = [result.pretraining for result in seeds.values()]
        launch, known = spent[0]["launches"][0], {}
        for key in ("seconds", "pairs_per_second", "data_wait", "peak_memory_gb"):
            values = [each[key] for each in spent if each.get(key) is not None]
            known[key] = mean(values) if values else None
        epochs = next(iter(seeds.values())).epochs
        epoch = known["seconds"] / epochs if known["seconds"] and epochs else None
        processes = launch.get("processes", 1)
        device = launch["device"] + (f" x {processes}" if processes > 1 else "")
        numbers = ", ".join(str(result.seed) for result in seeds.values())
        row = [name, numbers, duration(known["seconds"]), duration(epoch)]
        waiting = "" if known["data_wait"] is None else f"{known['data_wait']:.1%}"
        memory = f"{known['peak_memory_gb']:.1f} GB" if known["peak_memory_gb"] else ""
        row += [number(known["pairs_per_second"]), waiting, memory, device]
        table.append([*row, str(next(iter(seeds.values())).pretrained_at)])
        commands.append(launch["command"])
    parts = [
        wrapped(
            "The time of a pretraining and of an epoch is that of the steps at their median rate; "
            "waiting is the share of it in which the network waited for data. Each is the mean "
            "over the seeds."
        ),
        "",
        as_markdown(table),
        "The command of each run, or of its first seed:\n",
        "```",
        *(command_lines(command) for command in dict.fromkeys(commands)),
        "```\n",
    ]
    data = sorted({line.result.data for line in lines})
    table = [["judging took", *(data_title(each) for each in data)]]
    for column in columns(lines):
        row = [column]
        for each in data:
            found = [x.result for x in lines if (x.column, x.result.data) == (column, each)]
            seconds = [r.seconds for r in found if r.subject == "encoder" and r.seconds]
            row.append(duration(mean(seconds)) if seconds else "")
        if any(row[1:]):
            table.append(row)
    said = "The mean over encoders; what an earlier judgement had computed was not computed again:"
    return [*parts, f"{said}\n", as_markdown(table)]


def figures_of(measurement: dict[str, Any]) -> Table:
    """The figures of a measurement as a table: two columns, or one for each name within a row."""
    rows = measurement["figures"]
    inner = dict.fromkeys(k for row in rows.values() if isinstance(row, dict) for k in row)
    if not inner:
        pairs = ([name.replace("_", " "), number(value)] for name, value in rows.items())
        return [["", "measured"], *pairs]
    table = [["", *inner]]
    for name, row in rows.items():
        cells = row if isinstance(row, dict) else {next(iter(inner)): row}
        table.append([name, *(number(cells.get(key)) for key in inner)])
    return table


def headed(measurement: dict[str, Any]) -> str:
    return measurement["title"][:1].upper() + measurement["title"][1:]


def made_on(measurement: dict[str, Any]) -> str:
    commit = measurement["commit"]
    return f"{measurement['device']}, commit {commit if len(commit) < 20 else commit[:12]}"


def check_line(measurement: dict[str, Any]) -> str:
    """A check and its figures, which are within the check's bounds, else there is no record."""
    of = measurement["figures"].items()
    figures = "; ".join(f"{name.replace('_', ' ')} {number(value)}" for name, value in of)
    return listed(f"{headed(measurement)}: {figures} ({made_on(measurement)})")


def speed_tables(measurements: Sequence[dict[str, Any]]) -> list[str]:
    """A table of those with the same figures, a row each; the commands below."""
    alike: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for each in measurements:
        alike.setdefault(tuple(each["figures"]), []).append(each)
    parts = []
    for names, rows in alike.items():
        table = [["medians of the steps", *(x.replace("_", " ") for x in names), "measured on"]]
        for each in rows:
            table.append([headed(each), *map(number, each["figures"].values()), made_on(each)])
        parts.append(as_markdown(table))
    return [*parts, "```", *(command_lines(each["command"]) for each in measurements), "```"]


def number(value: float | str | None) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def duration(seconds: float | None) -> str:
    if not seconds:
        return ""
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def wrapped(text: str) -> str:
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def listed(text: str) -> str:
    """An item of a Markdown list."""
    return textwrap.indent(wrapped(escaped(text)), "  ").replace("  ", "- ", 1)


def command_lines(command: str) -> str:
    """A command on as many lines as it needs, as a shell takes it."""
    lines = [""]
    for part in re.split(" (?=--)", command):  # a flag stays with its values
        longer = f"{lines[-1]} {part}".strip()
        lines = [*lines[:-1], longer] if len(longer) < 95 else [*lines, part]
    return " \\\n    ".join(lines)
