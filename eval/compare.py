"""Measured figures beside published ones: a table in the terminal, as Markdown and as a picture.

    python -m eval.compare RUN [RUN ...]               # also RUN/compare.md and RUN/compare.png
    python -m eval.compare RUN [RUN ...] --report DIR  # also a page with curves and pictures
    python -m eval.compare RUN --keep results          # add the run's rows to a folder of results
    python -m eval.compare --results results           # write RESULTS.md from that folder

A published figure stands only beside a measurement of the same protocol on the same data set; what
differs in the run's setting is said below the table.
"""

import re
import sys
import textwrap
from pathlib import Path

from common import cli
from eval.settings import Compare as Settings

if __name__ == "__main__":  # a mistake is reported before torch is imported
    arguments = cli.run(
        cli.parse_settings, Settings, sys.argv[1:], "python -m eval.compare", __doc__
    )

from common.errors import UserError
from common.files import atomic_write_bytes
from eval.results import page, report
from eval.results.compare import (
    as_markdown,
    as_text,
    beside_published,
    data_title,
    draw,
    named,
    one_baseline,
    overview,
    unmatched,
)
from eval.results.record import results_of


def main(settings: Settings) -> None:
    if settings.results:
        folder = Path(settings.results)
        records = [record for _, record in page.read_folder(folder)]
        if not records:
            raise UserError(f"--results {folder}: no results in it")
        target = folder.resolve().parent / "RESULTS.md"
        atomic_write_bytes(target, page.results_page(records).encode(errors="shown"))
        print(f"{target.name}: {len(records)} records")
        return
    if not settings.runs:
        raise UserError("say which runs to compare, or --results FOLDER")
    results = []
    folders = {Path(run).resolve(): Path(run) for run in settings.runs}  # each one once
    for run in folders.values():
        found, older = results_of(run)
        results += found
        for line in older:
            print(f"left out: {line}", file=sys.stderr)
        if settings.report and not (run / "config.json").exists():
            raise UserError(f"--report: {run} holds an encoder alone, and no training to draw")
    if settings.keep:
        page.keep(results, Path(settings.keep))
    out = Path(settings.out or settings.runs[0])
    out.mkdir(parents=True, exist_ok=True)
    if settings.report:
        Path(settings.report).mkdir(parents=True, exist_ok=True)
    texts, groups = [], []
    for data in dict.fromkeys(result.data for result in results):
        of_data = named([result for result in results if result.data == data])
        lines, note = one_baseline(of_data)
        beside, remarks = beside_published(lines)
        tables = [table for table in (overview(lines), beside) if len(table) > 1]
        remarks = [line for line in (note, *remarks, *unmatched(lines)) if line]
        heading = data_title(data)
        counts = sorted({line.result.test_images for line in lines})
        said = " or ".join(f"{count:,}" for count in counts)
        print(f"\nOn {heading}, {said} test images:\n")
        print("\n\n".join(map(as_text, tables)), end="\n\n" if remarks else "\n")
        print(*(textwrap.fill(line, 100, subsequent_indent="  ") for line in remarks), sep="\n")
        suffix = "" if data == results[0].data else "-" + re.sub(r"\W", "-", heading)
        picture = out / f"compare{suffix}.png"
        draw(lines, picture)
        remarks = [f"{line[0].upper()}{line[1:]}." for line in remarks]
        texts += [f"## {heading}\n", *map(as_markdown, tables)]
        texts += [*map(page.listed, remarks), ""]
        groups.append((heading, tables, remarks, picture.read_bytes()))
    atomic_write_bytes(out / "compare.md", "\n".join(texts).encode(errors="shown"))
    print(f"\nwritten: {out / 'compare.md'}, {out / 'compare.png'}", file=sys.stderr)
    if settings.report:
        report.write(Path(settings.report), [Path(run) for run in settings.runs], groups)
        print(f"written: {Path(settings.report) / 'index.html'}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main, arguments)
