"""What a SOURCE holds and how it is read, before an image is decoded: the plan of every command.

    demo                      embedded, drawn procedurally (common/demo.py)
    path/to/folder            images at any depth; class folders, if any, become labels
    path/to/tables            a .parquet or .arrow file, a folder of them, or `save_to_disk`'s
    owner/name                a data set on the Hugging Face Hub
    SOURCE:CONFIG             one configuration, where a source has several: a folder, or a name

Nothing is left out in silence: what is passed over, left out or guessed is counted in `Plan.lines`,
and where two readings are possible the source is refused, with the flag that chooses.

Nothing here imports torch. Symbols: N images.
"""

import gzip
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from common import layout, tables
from common.cli import is_hub_id, split_source
from common.config import SourceConfig
from common.depth import settle
from common.errors import UserError, first_line, printable, shown
from common.files import path_of
from common.formats import SUFFIXES, Look, Reading, look_at
from common.layout import (
    CANONICAL,
    OTHER,
    SPLITS,
    Found,
    configuration_of,
    counted,
    listed,
    splits_in,
)
from common.tables import Table

DEMO = {"train": 5_120, "test": 2_000}
MAX_BAD = 0.05  # share of undecodable images beyond which a source is refused
MOST_NAME = 300  # characters of an image's name in a message
ARCHIVES = {".zip", ".tar", ".gz", ".tgz", ".7z", ".rar", ".xz", ".bz2", ".zst"}
PLAIN = "RGB 8-bit"  # what needs no word
SLOW = 20e-6  # seconds until the disk tells of a file: a local one takes 2e-6
SAMPLE = 64  # images that are looked at for the rule by which pixels are read


class NoSplit(UserError):
    """The source exists, but not this split of it."""


class Several(UserError):
    """Several splits of the source have the name."""


# ---- the plan ------------------------------------------------------------------------------------


@dataclass
class Part:
    """One split of a source, or all of it where it has none.

    Attributes:
        name: as the source has it, e.g. "train2017"; "" of a source without splits.
        split: "train", "test", "validation", another split word, or "".
        count: N; None where a data set of the Hub does not say.
        paths: of the images of a folder, in order; else of the tables.
        table: what the paths of tables hold.
    """

    name: str
    split: str
    count: int | None
    paths: list[str] = field(default_factory=list)
    table: Table | None = None
    base: str = ""  # the folder above the class folders
    joined: bool = False  # whether it is all splits together

    @property
    def local(self) -> bool:
        """Whether its images are files on this disk, and not drawn or still on the Hub."""
        return self.table.local if self.table else bool(self.paths)


@dataclass
class Labels:
    """The labels of a part: a value for each image, a list of values, or None where it is missing.

    `values` is None where there are none, and `why` says why.
    """

    values: list[Any] | None
    origin: str = ""
    why: str = ""
    names: tuple[str, ...] = ()  # of the classes, where the source lists them in an order
    notes: list[str] = field(default_factory=list)

    @property
    def missing(self) -> int:
        return sum(value is None for value in self.values or ())


@dataclass
class Plan:
    """A source, its splits, and what is passed over.

    Attributes:
        kind: "demo", "folder", "tables" or "hub".
        parts: the splits in the order of their names.
        passed_over: what is not read, by kind, with counts.
    """

    source: str
    kind: str
    how: SourceConfig
    parts: list[Part]
    root: str = ""
    clip: bool = True  # whether values beyond `how.value_range` are cut off, or undecodable
    passed_over: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    metadata: dict[str, dict[str, Any]] = field(default_factory=dict)  # rows by the image's path
    described: bool = False  # whether there is a file of metadata
    looks: list[Look] = field(default_factory=list)  # at the images of the sample
    undecodable: list[str] = field(default_factory=list)  # of them
    _labels: dict[str, Labels] = field(default_factory=dict, repr=False)

    def choose(self, split: str = "") -> Part:
        """The part that a split names; by default that to train on.

        Args:
            split: train, test or validation in any of their words, a name of the source's own,
                "all", or "": what is to be trained on.

        Raises:
            NoSplit: there is no such split.
            UserError: several are.
        """
        named = [part for part in self.parts if part.name]
        shown = listed([part.name for part in named])
        if not named and split in ("", "all", *SPLITS["train"]):
            return self.parts[0]
        own = [part for part in named if part.name == split]
        if split == "all" and not own:
            return self._joined
        others = [part.name for part in named if part.split in OTHER]
        if not split and others:
            train = [part.name for part in named if part.split == "train"]
            flags = ", ".join(f"--split {name}" for name in train + others)
            raise UserError(
                f"{self.source}: has {shown}, of which {listed(others)} may be to train on or not; "
                f"say {flags}, or --split all for everything"
            )
        wanted = split or "train"
        found = [part for part in named if part.name.lower() == wanted.lower()]
        found = found or [p for p in named if p.split == CANONICAL.get(wanted.lower(), wanted)]
        if len(found) == 1:
            return found[0]
        if found:
            names = listed([part.name for part in found])
            raise Several(
                f"{self.source}: {names} each name {wanted}; --split {found[0].name} takes one"
            )
        if split in ("", "train"):
            raise UserError(
                f"{self.source}: no train among {shown}; --split NAME trains on one of them, "
                "--split all on everything"
            )
        has = f"it has {shown}" if named else "it has no splits"
        raise NoSplit(f"{self.source}: no split {split!r}; {has}")

    @cached_property
    def _joined(self) -> Part:
        """Everything, as one part."""
        paths = sorted(path for part in self.parts for path in part.paths)
        counts = [part.count for part in self.parts]
        count = None if None in counts else sum(c for c in counts if c)
        table = None
        if self.kind != "folder":
            table = tables.joined([part.table for part in self.parts if part.table])
            self.notes += table.notes
        base = os.path.commonpath([p.base for p in self.parts]) if self.kind == "folder" else ""
        return Part("all", "all", count, paths, table, base, joined=True)

    # ---- labels ----

    def labels(self, part: Part) -> Labels:
        """The labels of a part, which of tables reads their column and no other.

        Raises:
            UserError: the column or the depth that was asked for is not there.
        """
        if self.kind == "demo":
            return Labels(None, "drawn")
        if part.name not in self._labels:
            of_folder = self._labels_of_all if part.joined else self._labels_of_folder
            read = of_folder if self.kind == "folder" else self._labels_of_table
            self._labels[part.name] = read(part)
        return self._labels[part.name]

    def _labels_of_table(self, part: Part) -> Labels:
        assert part.table is not None
        column = tables.label_column(part.table, self.source, self.how.label_column)
        if column is None:
            return Labels(None, why="no usual column of labels; --label-column NAME takes one")
        values, names = part.table.labels(column)
        labels = Labels(values, f"column {column!r}", names=names)
        others = tables.other_labels(part.table, column)
        if others and self.how.label_column is None:
            labels.notes.append(f"other columns of labels: {', '.join(others)}; --label-column")
        return without_unknown(labels, f"in {column!r}")

    def _labels_of_all(self, part: Part) -> Labels:
        """Those of each split, in the order of all images."""
        each = [self.labels(part) for part in self.parts]
        for labels, one in zip(each, self.parts, strict=True):
            if labels.values is None:
                return Labels(None, why=f"{one.name}: {labels.why}")
        pairs = zip(self.parts, each, strict=True)
        of = {
            p: v
            for one, labels in pairs
            for p, v in zip(one.paths, labels.values or (), strict=True)
        }
        notes = [
            f"{one.name}: {note}"
            for labels, one in zip(each, self.parts, strict=True)
            for note in labels.notes
        ]
        return Labels([of[path] for path in part.paths], each[0].origin, notes=notes)

    def _labels_of_folder(self, part: Part) -> Labels:
        has_rows = bool(self.metadata) and any(path in self.metadata for path in part.paths)
        if has_rows and self.how.label_depth is None:
            return self._labels_of_metadata(part)
        depth = self.how.label_depth
        if depth == 0:
            return Labels(None, why="--label-depth 0")
        start = len(part.base.rstrip(os.sep)) + 1
        above = [path[start:].rpartition(os.sep)[0] for path in part.paths]
        levels = {folder: folder.split(os.sep) if folder else [] for folder in set(above)}
        short = [path for path, folder in zip(part.paths, above, strict=True)
                 if len(levels[folder]) < (depth or 1)]  # fmt: skip
        if len(short) == len(above):
            if depth and part.split in ("", "train"):
                raise UserError(
                    f"{self.source}: --label-depth {depth}: no image has so many folders above; "
                    f"e.g. {short[0][start:]}"
                )
            described = " that describes them" if self.described else ""
            return Labels(None, why=f"no class folders, no metadata.csv{described}")
        if short and depth is None:
            classes = layout.folders(sorted({names[0] for names in levels.values() if names}))
            names = listed([os.path.basename(path) for path in short], 3)
            beside = f"{counted(len(short), 'image')} beside the class folders {classes}: {names}"
            way_out = (
                f"--label-depth 1 leaves {'it' if len(short) == 1 else 'them'} without a label"
            )
            return Labels(None, why=f"{beside}; {way_out}")
        first = wrappers(list(levels.values())) if depth is None else 0
        last = first + 1 if depth is None else depth
        named = {
            each: "/".join(names[first:last]) if len(names) >= last else None
            for each, names in levels.items()
        }
        values, taken = [named[folder] for folder in above], len(set(named.values()))
        notes = []
        if short:
            count = f"{counted(len(short), 'image')} with fewer folders above have no label"
            notes.append(f"{count}: {listed([path[start:] for path in short], 3)}")
        if depth is None and len(levels) > taken:
            notes.append(deeper(list(levels.values()), taken))
        origin = "class folders" if depth is None else f"folders to depth {depth}"
        return Labels(values, origin, notes=notes)

    def _labels_of_metadata(self, part: Part) -> Labels:
        rows = [self.metadata.get(path) for path in part.paths]
        columns = list(dict.fromkeys(key for row in rows if row for key in row))
        columns = [name for name in columns if name not in ("file_name", "split")]
        column = self.how.label_column
        if column is not None and column not in columns:
            raise UserError(
                f"{self.source}: no column {column!r} in the metadata"
                f"{f' of {part.name}' if part.name else ''}; it has {', '.join(columns)}"
            )
        if column is None:
            column = columns[0] if len(columns) == 1 else "label"
        if column not in columns:
            several = f"its metadata has {', '.join(columns) or 'no column but file_name'}"
            return Labels(None, why=f"{several}; --label-column NAME chooses")
        values = [None if row is None else row.get(column) for row in rows]
        if not all(is_label(value) for value in values):
            return Labels(None, why=f"{column!r} of the metadata holds no labels")
        without = sum(row is None for row in rows)
        notes = [f"{counted(without, 'image')} without a row in the metadata"] if without else []
        start = len(part.base.rstrip(os.sep)) + 1
        if (
            len({path[start:].split(os.sep)[0] for path in part.paths if os.sep in path[start:]})
            > 1
        ):
            notes.append("labels are the metadata's, not the folders'; --label-depth 1 takes these")
        labels = Labels(tables.tidy(values), f"column {column!r} of the metadata", notes=notes)
        return without_unknown(labels, f"in {column!r}")

    # ---- pixels ----

    @cached_property
    def reading(self) -> Reading:
        """The rule by which pixels are read, from a sample of the whole source.

        Raises:
            UserError: it is not decided.
        """
        given = Reading(self.how.alpha or "", self.how.value_range, self.clip)
        self.looks, self.undecodable = [], []
        for i, image in enumerate(self.sample()):
            try:
                self.looks.append(look_at(image))
            except Exception as error:  # a run meets it again, and counts it
                self.undecodable.append(undecodable(image, i, error))
        reading, lines = settle(self.looks, given, self.source)
        self.notes += lines
        return reading

    def sample(self, *parts: Part) -> Iterator[Any]:
        """Encoded images, evenly spaced over the splits; none where they are not on this disk."""
        parts = parts or tuple(self.parts)
        if self.kind == "folder":
            paths = sorted(path for part in parts for path in part.paths)
            yield from (paths[i] for i in evenly(len(paths), SAMPLE))
        for part in parts if self.kind != "folder" else ():
            if part.table is not None and part.local:
                column = tables.image_column(part.table, self.source, self.how.image_column)
                yield from part.table.sample(column, -(-SAMPLE // len(parts)))

    # ---- in words ----

    def lines(self, *parts: Part) -> list[str]:
        """What a command says first: what is read, left out, passed over, converted and guessed."""
        self.reading  # noqa: B018  its notes are told as well
        lines = []
        if any(part.name for part in parts):
            rest = [p for p in self.parts if p not in parts and not parts[0].joined]
            word = "left out" if len(parts) == 1 else "others"
            out = f"; {word}: {numbers_of(rest)}" if rest else ""
            lines.append(f"split {numbers_of(parts)}{out}")
        for part in parts:
            if part.local:
                labels = self.labels(part)
                several = len(parts) > 1
                lines += [f"{part.name}: {note}" if several else note for note in labels.notes]
                where = f" of {part.name}" if part.name else ""
                if labels.values is None:
                    lines.append(f"no labels{where}: {labels.why}")
                elif part is parts[0]:
                    differ = any(value != labels.values[0] for value in labels.values)
                    one = f"no labels to tell apart: all {labels.values[0]}, by {labels.origin}"
                    lines.append(f"labels by {labels.origin}" if differ else one)
        lines += self.notes
        sample = self.sampled()
        if not all(kind.endswith(PLAIN) for kind in sample):  # something is converted
            lines.append(f"a sample of {sum(sample.values())}: {told(sample)}")
        if self.passed_over:
            files = counted(sum(self.passed_over.values()), "other file")
            lines.append(f"{files} passed over: {told(self.passed_over)}")
        first, *others = dict.fromkeys(lines) if lines else ["nothing to say"]
        return [printable(f"{self.source}: {first}"), *[printable(f"  {each}") for each in others]]

    def record(self, part: Part) -> dict[str, Any]:
        """The plan as JSON has it."""
        labels = self.labels(part) if part.local else Labels(None)
        counts = Counter(str(v) for v in labels.values or () if not isinstance(v, list))
        return {
            "source": printable(self.source),
            "root": printable(self.root),
            "kind": self.kind,
            "split": part.name,
            "images": part.count,
            "splits": {printable(p.name): p.count for p in self.parts},
            "labels": {"from": labels.origin, "why_not": labels.why, "missing": labels.missing},
            "classes": {printable(name): n for name, n in sorted(counts.items())},
            "read_as": {"alpha": self.reading.alpha, "value_range": self.reading.value_range},
            "sample": self.sampled(),
            "passed_over": self.passed_over,
            "lines": self.lines(part),
        }

    def sampled(self) -> dict[str, int]:
        """Kinds of the images looked at, most frequent first: "JPEG RGB 8 bits" to a count."""
        kinds = dict(Counter(map(self.kind_of, self.looks)).most_common())
        return kinds | ({"undecodable": len(self.undecodable)} if self.undecodable else {})

    @staticmethod
    def kind_of(look: Look) -> str:
        return f"{look.format} {look.mode} {look.kind}"


def evenly(count: int, most: int) -> list[int]:
    """At most `most` places of `count`, evenly spaced, the first among them."""
    most = min(count, most)
    return [i * count // most for i in range(most)]


def numbers_of(parts: Sequence[Part]) -> str:
    """The names of some splits with their numbers of images."""
    return ", ".join(f"{p.name} {'?' if p.count is None else f'{p.count:,}'}" for p in parts)


def told(counts: dict[str, int]) -> str:
    return ", ".join(f"{kind} {count:,}" for kind, count in counts.items())


def name_of(image: Any, index: int) -> str:
    """The path of an image, if it has one."""
    path = image.get("path") if isinstance(image, dict) else image
    return str(path) if isinstance(path, str | Path) else f"image {index}"


def undecodable(image: Any, index: int, error: Exception) -> str:
    """Which image cannot be decoded and why; a cell that should be a path may be any long text."""
    name = name_of(image, index)
    name = name if len(name) <= MOST_NAME else f"{name[:40]}... ({len(name):,} characters)"
    reason = (str(error).splitlines() or [type(error).__name__])[0][:MOST_NAME]
    return printable(f"{name} ({reason})")


def wrappers(levels: Sequence[Sequence[str]]) -> int:
    """How many folders, from the top, hold nothing but one folder and so are no class."""
    depth = 0
    while len({names[depth] for names in levels}) == 1 and min(map(len, levels)) > depth + 1:
        depth += 1
    return depth


def deeper(levels: Sequence[Sequence[str]], taken: int) -> str:
    """What there is to say of folders below those that are taken as classes."""
    note = f"{counted(len(levels), 'folder')} of images lie below the {taken} taken as classes"
    possible = range(2, min(map(len, levels)) + 1)
    counts = [len({tuple(names[:depth]) for names in levels}) for depth in possible]
    if not counts:
        return f"{note}, and some images right in these"
    shown = [f"{depth}: {count:,}" for depth, count in zip(possible, counts, strict=True)]
    best = possible[counts.index(max(counts))]
    example = "/".join(min(map(tuple, levels))[:best])
    return (
        f"{note}; --label-depth {best} takes {example}, ... (classes by depth {', '.join(shown)})"
    )


def is_label(value: Any) -> bool:
    """Whether a value of JSON is a label, or a list of labels."""
    each = value if isinstance(value, list) else [value]
    return all(one is None or isinstance(one, str | int | float) for one in each)


def without_unknown(labels: Labels, where: str) -> Labels:
    """The same with a note on the labels that are missing; without labels where all are."""
    assert labels.values is not None
    if labels.missing == len(labels.values):
        return Labels(None, why=f"every label {where} is missing")
    if labels.missing:
        labels.notes.append(
            f"{labels.missing:,} of {len(labels.values):,} labels "
            f"{'is' if labels.missing == 1 else 'are'} missing {where}: an evaluation leaves "
            f"{'that image' if labels.missing == 1 else 'those images'} out"
        )
    return labels


# ---- making a plan -------------------------------------------------------------------------------


def plan_of(source: str, how: SourceConfig | None = None, clip: bool = True) -> Plan:
    """Find out what a source holds.

    Args:
        how: to read it, as far as that is said.
        clip: whether stored values beyond `how.value_range` are cut off, or undecodable.

    Raises:
        UserError: there is no such source, no image in it, or two ways to read it.
    """
    plan = planned(source, how or SourceConfig())
    plan.clip = clip
    plan.parts.sort(key=lambda part: part.split != "train")  # first what is trained on
    return plan


def planned(source: str, how: SourceConfig) -> Plan:
    if source == "demo":
        return Plan(source, "demo", how, [Part(name, name, n) for name, n in DEMO.items()])
    try:
        name, configuration = split_source(source)
        path = path_of(os.path.expanduser(name))
        if os.path.isfile(path) and configuration:
            raise UserError(f"{source}: a file has no configurations")
        if os.path.isfile(path):
            return of_file(source, path, how)
        if os.path.isdir(path):
            return of_folder(source, os.path.abspath(path), configuration, how)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{source}: no path ({error})") from error
    if is_hub_id(source):
        found, notes = tables.of_hub(name, configuration)
        parts = [Part(n, split_of(n), t.rows, table=t) for n, t in found.items()]
        return Plan(source, "hub", how, parts, notes=notes)
    raise UserError(f"{source}: no such folder or file (nor a Hub id of the form owner/name)")


def split_of(name: str) -> str:
    """The split that a name names, or the name itself."""
    found = splits_in(name)
    return found.pop() if len(found) == 1 else name.lower()


def of_file(source: str, path: str, how: SourceConfig) -> Plan:
    """One table, given by its name: all of it is the training split."""
    if not tables.is_table(path):
        raise UserError(f"{source}: not a folder, a .parquet or an .arrow file")
    table = opened([path], source, how)
    named = splits_in(Path(path).stem) - {"train"}
    notes = [f"one table, so all of it is read, though its name says {listed(sorted(named))}"]
    part = Part("", "", table.rows, [path], table)
    notes = [*(notes if named else ()), *table.notes, *without_effect(how, True, False)]
    return Plan(source, "tables", how, [part], path, notes=notes)


def without_effect(how: SourceConfig, has_tables: bool, has_metadata: bool) -> list[str]:
    """Lines on flags that were given and cannot apply to a source on this disk."""
    unused = [
        ("--label-column", how.label_column and not (has_tables or has_metadata)),
        ("--image-column", how.image_column and not has_tables),
        ("--label-depth", how.label_depth is not None and has_tables),
    ]
    why = "these are tables" if has_tables else "there is no table or metadata"
    return [f"{flag} makes no difference: {why}" for flag, is_unused in unused if is_unused]


def of_folder(source: str, root: str, configuration: str, how: SourceConfig) -> Plan:
    """A folder of images, or of tables.

    Raises:
        UserError: it holds neither, or both.
    """
    folder, found = os.path.join(root, path_of(configuration)), layout.walk(root)
    named = configuration in map(configuration_of, found.tables)
    if configuration and os.path.isdir(folder) and not named:
        root, configuration, found = folder, "", layout.walk(folder)
    if found.tables and found.images:
        count = found.count()
        where = [os.path.dirname(found.tables[0]), os.path.commonpath(found.images)]
        first = [os.path.join(source, folder) for folder in where]
        raise UserError(
            f"{source}: holds {counted(len(found.tables), 'table')} (e.g. {found.tables[0]}) and "
            f"{counted(count, 'image')} (e.g. in {where[1] or 'the folder itself'}); say which: "
            f"--data {first[0] if where[0] else os.path.join(source, found.tables[0])}"
            + (f" or --data {first[1]}" if where[1] else ", or move the tables away")
        )
    if found.tables:
        plan = of_tables(source, root, configuration, found, how)
    else:
        if configuration:
            raise UserError(f"{source}: no folder {configuration!r} in it")
        plan = of_images(source, root, found, how)
    plan.notes += without_effect(how, bool(found.tables), bool(found.metadata))
    plan.passed_over = dict(found.passed_over.most_common())
    if found.twice:
        links = counted(len(found.twice), "folder")
        plan.notes.append(f"{links} read twice, by a link: {listed(found.twice)}")
    if found.unreadable:
        names = listed(found.unreadable)
        plan.notes.append(f"{counted(len(found.unreadable), 'folder')} cannot be read: {names}")
    return plan


# ---- tables --------------------------------------------------------------------------------------


def opened(paths: Sequence[str], source: str, how: SourceConfig) -> Table:
    """The rows of some tables.

    Raises:
        UserError: they cannot be read as one, or a column mixes splits.
    """
    table = tables.opened(paths, source)
    if table.rows == 0:
        raise UserError(f"{source}: no images in {listed([os.path.basename(p) for p in paths])}")
    if "split" in table.features and how.label_column != "split":
        check_split_column(source, table.labels("split")[0], how)
    return table


def of_tables(source: str, root: str, wanted: str, found: Found, how: SourceConfig) -> Plan:
    """The tables of a folder by split, of one configuration.

    Raises:
        UserError: several configurations, or tables that name no split beside others that do.
    """
    units = sorted(found.tables)
    found.pass_over("metadata beside tables", len(found.metadata))
    inside = {os.path.dirname(file) for file in units} & set(found.saved)
    if inside:  # of `save_to_disk`, whose state.json lists them
        units = [os.path.join(folder, "state.json") for folder in sorted(inside)]
        own = sum(len(tables.saved_files(os.path.join(root, folder))) for folder in inside)
        found.pass_over("other tables", len(found.tables) - own)
    splits = {unit: layout.split_of_table(unit) for unit in units}
    named = [unit for unit in units if splits[unit]] or units
    unnamed = [unit for unit in units if unit not in named]
    configurations = sorted({configuration_of(unit) for unit in named})
    if wanted and wanted not in configurations:
        raise UserError(f"{source}: no configuration {wanted!r}; {listed(configurations)}")
    if len(configurations) > 1 and not wanted:
        names = listed([name or "(no name)" for name in configurations], 10)
        raise UserError(
            f"{source}: several configurations, {names}; say one: "
            f"--data {source}:{configurations[-1]}, or give one file"
        )
    kept = [unit for unit in named if configuration_of(unit) == (wanted or configurations[0])]
    mine: dict[str, list[str]] = {}
    for unit in kept:
        mine.setdefault(splits[unit], []).append(unit)
    if unnamed and "train" not in mine and how.split in ("", "train"):
        raise UserError(
            f"{source}: {listed(unnamed)} names no split beside {listed(kept)}; give one file, or "
            "--split NAME"
        )
    found.pass_over("tables of other configurations", len(named) - len(kept))
    found.pass_over("tables that name no split", len(unnamed))
    parts, notes = [], list[str]()
    for split, files in sorted(mine.items()):
        paths = [os.path.join(root, file) for file in files]
        if any("=" in folder for file in files for folder in file.split(os.sep)[:-1]):
            notes.append("folders named column=value give no column of labels")
        if len(files) > 1 and not split:
            notes.append(f"{len(files):,} tables are read as one: {listed(files)}")
        table = opened(paths, source, how)
        notes += table.notes
        parts.append(Part(split, split, table.rows, paths, table))
    return Plan(source, "tables", how, parts, root, notes=list(dict.fromkeys(notes)))


# ---- folders of images ---------------------------------------------------------------------------


def of_images(source: str, root: str, found: Found, how: SourceConfig) -> Plan:
    """The images of a folder, by split.

    Raises:
        UserError: there is none, or a folder may be a split or a class.
    """
    layout.drop_masks(found)
    if not found.images:
        kinds = " ".join(sorted(SUFFIXES))
        others = f"; passed over: {told(found.passed_over)}" if found.passed_over else ""
        archives = "; unpack archives first" if ARCHIVES & found.passed_over.keys() else ""
        looked = f"no images in it, at any depth (looked for {kinds})"
        raise UserError(f"{source}: {looked}{others}{archives}")
    level, names, notes = layout.folders_of_splits(found, how.split, source)
    parts = []
    for name in names or [""]:
        below = os.path.join(level, name) if names else ""
        base = os.path.join(root, below) if names else root
        paths = []
        for folder in found.below(below):
            start = os.path.join(root, folder, "")
            paths += [start + image for image in found.images[folder]]
        parts.append(Part(name, split_of(name), len(paths), sorted(paths), base=base))
    outside = found.count() - sum(part.count or 0 for part in parts)
    if outside:
        example = os.path.join(level, found.images[level][0])
        images = f"{counted(outside, 'image')} beside {layout.folders(names)}"
        notes.append(f"{images} left out: {printable(example)}" + (", ..." if outside > 1 else ""))
    plan = Plan(source, "folder", how, parts, root, notes=notes)
    plan.described = bool(found.metadata)
    read_metadata(plan, found)
    return plan


def read_metadata(plan: Plan, found: Found) -> None:
    """The rows of `metadata.csv` and `metadata.jsonl`, as `datasets`' imagefolder has them.

    Raises:
        UserError: rows differ on one file, or name splits.
    """
    if not found.metadata:
        return
    known = {path for part in plan.parts for path in part.paths}
    for file in sorted(found.metadata):
        rows = tables.metadata_rows(os.path.join(plan.root, file))
        if not rows:
            found.pass_over("metadata without file_name" if rows is None else "empty metadata", 1)
            continue
        check_split_column(f"{plan.source}: {file}", [row.get("split") for row in rows], plan.how)
        folder, lost = os.path.dirname(os.path.join(plan.root, file)), []
        for row in rows:
            name = str(row.get("file_name") or "(no name)")
            path = os.path.normpath(os.path.join(folder, name))
            if plan.metadata.get(path, row) != row:
                raise UserError(f"{plan.source}: {file}: two rows differ on {name}; keep one")
            if path in known:
                plan.metadata[path] = row
            else:
                lost.append(name)
        if lost:
            rows_ = counted(len(lost), "row")
            plan.notes.append(f"{rows_} of {file} without an image: {listed(lost, 3)}")


def check_split_column(where: str, values: Sequence[Any], how: SourceConfig) -> None:
    """Refuse a column `split` of several splits, which would be mixed; `--split all` wants that.

    Raises:
        UserError: with the splits.
    """
    names = sorted({str(value) for value in values if value})
    if len(names) > 1 and any(map(splits_in, names)) and how.split != "all":
        raise UserError(
            f"{where}: its column 'split' names {listed(names)}, which is not read: put each into "
            "a folder or table of that name; or --split all to train on all of it"
        )


# ---- what a run was trained on -------------------------------------------------------------------


def listing(plan: Plan, part: Part) -> list[tuple[str, int | None]]:
    """The files of a part, relative to the source, with their sizes in bytes; [] of the Hub."""
    paths = files_of(part)
    sizes = [size for _, size in stats(paths, times=False)]
    return list(zip(map(shown, names_below(plan, paths)), sizes, strict=True))


def record_of(files: Sequence[Sequence[Any]]) -> bytes:
    """The names and sizes of files as `differences` reads them: JSON, one file to a line."""
    encode, null = json.JSONEncoder().encode, "null"
    lines = [f"[{encode(name)}, {null if size is None else size}]\n" for name, size in files]
    return "".join(lines).encode()


def files_of(part: Part) -> list[str]:
    """The files of a part; of a folder of `save_to_disk` those that its state.json lists."""
    if part.table is None:
        return part.paths
    found = []
    for path in part.paths:
        folder, name = os.path.split(path)
        saved = tables.saved_files(folder) if name == "state.json" else [name]
        found += [os.path.join(folder, each) for each in saved]
    return found


def differences(record: Path, files: Sequence[Sequence[Any]]) -> str:
    """How files differ from those on record, in a few words; "" if they do not, or none are known.

    A record that cannot be read is a difference: one process looks, and all must hear of it.
    """
    if not record.exists():
        return ""
    try:
        content = gzip.decompress(record.read_bytes())
        if content == record_of(files):
            return ""
        before = {name: size for name, size in map(json.loads, content.decode().splitlines())}
    except (OSError, EOFError, ValueError, TypeError) as error:
        return f"images that are not known: {record} cannot be read ({first_line(error)})"
    now = {name: size for name, size in files}
    lost = [name for name in before if before[name] != now.get(name, 0)]
    new = [name for name in now if now[name] != before.get(name, 0)]
    if not lost and not new:
        return ""
    count, of = max(len(lost), len(new)), max(len(before), len(now))
    shown = f"e.g. {printable((lost + new)[0])}"
    return f"other images: {count:,} of {of:,} files differ in name or size, {shown}"


def names_below(plan: Plan, paths: Sequence[str]) -> list[str]:
    """Paths relative to the source; of a single table its name."""
    root = plan.root if os.path.isdir(plan.root) else os.path.dirname(plan.root)
    return [path.removeprefix(root).lstrip(os.sep) for path in paths]


def stats(paths: Sequence[str], times: bool) -> Iterator[tuple[str, Any]]:
    """Each path with its file's size (and time), or None where there is no file."""

    def about(some: Sequence[str]) -> list[Any]:
        found: list[Any] = []
        for path in some:
            try:
                stat = os.stat(path)
                found.append((stat.st_size, stat.st_mtime_ns) if times else stat.st_size)
            except (OSError, ValueError):
                found.append(None)
        return found

    sample = paths[:: len(paths) // SAMPLE + 1]  # listing them may have told of the first ones
    began = time.perf_counter()
    about(sample)
    slow = time.perf_counter() - began > len(sample) * SLOW
    groups = [paths[i : i + 1024] for i in range(0, len(paths), 1024)]
    # a network's file system answers each after a while; elsewhere threads wait for each other
    with ThreadPoolExecutor(32) as pool:
        for some, found in zip(groups, (pool.map if slow else map)(about, groups), strict=True):
            yield from zip(some, found, strict=True)
