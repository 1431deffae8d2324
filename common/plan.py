"""What a SOURCE holds and how it is read, before an image is decoded: the plan of every command.

    demo                      embedded, drawn procedurally (common/demo.py)
    path/to/folder            images at any depth; class folders, if any, become labels
    path/to/tables            a .parquet or .arrow file, a folder of them, or `save_to_disk`'s
    owner/name                a data set on the Hugging Face Hub
    SOURCE:CONFIG             one configuration, where a source has several: a folder, or a name

Which split is read. A *split word* is train, training; test, testing; val, valid, validation, dev.
It is looked for in the names of tables, and of folders above the class folders, never of images:

    train, Train, train2017, training_set, test-images, birds_test      of that split
    train/ and test/, and nothing beside them with images               splits
    bus/ plane/ train/                                                  refused: split or class?
    bottle/ steam_train/ test_tube/                                     classes
    extra, unlabeled, holdout, ... beside others                        refused without `--split`

Nothing is left out in silence: what is passed over, left out or guessed is counted in `Plan.lines`,
and where two readings are possible the source is refused, with the flag that chooses.

Nothing here imports torch. Symbols: N images.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from common import tables
from common.cli import is_hub_id, split_source
from common.config import SourceConfig
from common.errors import UserError, printable, shown
from common.files import path_of
from common.formats import SUFFIXES, Look, Reading, look_at, settle
from common.tables import Table

SPLITS = {  # split words, by the split that they name
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("val", "valid", "validation", "dev"),
}
OTHER = {"extra", "unlabeled", "unlabelled", "unsupervised", "holdout", "heldout", "trainval"}
CANONICAL = {word: split for split, words in SPLITS.items() for word in words}
CANONICAL |= {word: word for word in OTHER}
AFFIXES = {"set", "images", "split"}
MASKS = {"masks", "labels", "annotations", "SegmentationClass"}  # beside PICTURES, not images
PICTURES = {"images", "JPEGImages"}
SYSTEM = {"@eaDir", "__MACOSX", "Thumbs.db", "desktop.ini", "$RECYCLE.BIN"}
METADATA = {"metadata.csv", "metadata.jsonl"}
DEMO = {"train": 5_120, "test": 2_000}
MAX_BAD = 0.05  # share of undecodable images beyond which a source is refused
MOST_NAME = 300  # characters of an image's name in a message
SAMPLE = 64  # images that are looked at for the rule by which pixels are read


class NoSplit(UserError):
    """The source exists, but not this split of it."""


# ---- names ---------------------------------------------------------------------------------------


def words_of(name: str) -> list[str]:
    """A name in lower case, cut at `-`, `_`, `.`, spaces and before digits; `trainset` in two."""
    found: list[str] = []
    for word in re.split(r"[-_. ]+|(?<=\D)(?=\d)", name.lower()):
        match = re.fullmatch(rf"({'|'.join(CANONICAL)})({'|'.join(AFFIXES)})", word)
        found += match.groups() if match else [word] if word else []
    return found


def splits_in(name: str) -> set[str]:
    """The splits that the words of a name name: one, as a rule, or none."""
    return {CANONICAL[word] for word in words_of(name) if word in CANONICAL}


def rest_of(name: str) -> tuple[str, ...]:
    """What a name says beside its split: ("birds",) of birds_train2017 and of birds-test-images."""
    kept = [word for word in words_of(name) if word not in CANONICAL and word not in AFFIXES]
    return tuple(word for word in kept if word.isalpha() and word != "of")


def is_whole(name: str) -> bool:
    """Whether a name says nothing but its split: train, val2017, training_set."""
    rest = [w for w in words_of(name) if w not in CANONICAL and w not in AFFIXES]
    return bool(splits_in(name)) and all(word.isdigit() for word in rest)


def listed(names: Sequence[str], most: int = 4) -> str:
    """Some names in a line, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return printable(", ".join(names[:most])) + more


def counted(count: int, noun: str) -> str:
    plural = {"class": "classes"}.get(noun, f"{noun}s")
    return f"{count:,} {noun if count == 1 else plural}"


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
        passed_over: what is not read, by kind, with counts: " 16 .xyz".
    """

    source: str
    kind: str
    how: SourceConfig
    parts: list[Part]
    root: str = ""
    passed_over: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    metadata: dict[str, dict[str, Any]] = field(default_factory=dict)  # rows by the image's path
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
        if split == "all":
            return self._joined()
        others = [part.name for part in named if part.split in OTHER]
        if not split and others:
            raise UserError(
                f"{self.source}: has {shown}, of which {listed(others)} may be to train on or not; "
                f"say --split train, --split {others[0]}, or --split all for everything"
            )
        wanted = split or "train"
        found = [part for part in named if part.name.lower() == wanted.lower()]
        found = found or [p for p in named if p.split == CANONICAL.get(wanted.lower(), wanted)]
        if len(found) == 1:
            return found[0]
        if found:
            names = listed([part.name for part in found])
            raise UserError(
                f"{self.source}: {names} each name {wanted}; --split {found[0].name} takes one"
            )
        if split in ("", "train"):
            raise NoTrain(
                f"{self.source}: no train among {shown}; --split NAME trains on one of them, "
                "--split all on everything"
            )
        has = f"it has {shown}" if named else "it has no splits"
        raise NoSplit(f"{self.source}: no split {split!r}; {has}")

    def _joined(self) -> Part:
        """Everything, as one part."""
        paths = sorted(path for part in self.parts for path in part.paths)
        counts = [part.count for part in self.parts]
        count = None if None in counts else sum(c for c in counts if c)
        table = None
        if self.kind != "folder":
            table = tables.joined([part.table for part in self.parts if part.table])
        base = os.path.commonpath([p.base for p in self.parts]) if self.kind == "folder" else ""
        return Part("all", "all", count, paths, table, base)

    # ---- labels ----

    def labels(self, part: Part) -> Labels:
        """The labels of a part, which of tables reads their column and no other.

        Raises:
            UserError: the column or the depth that was asked for is not there.
        """
        if part.name not in self._labels:
            read = self._labels_of_folder if self.kind == "folder" else self._labels_of_table
            self._labels[part.name] = read(part)
        return self._labels[part.name]

    def _labels_of_table(self, part: Part) -> Labels:
        assert part.table is not None
        column = tables.label_column(part.table, self.source, self.how.label_column)
        if column is None:
            return Labels(None, why="no usual column of labels; --label-column NAME takes one")
        values, names = part.table.labels(column)
        labels = Labels(values, f"column {column!r}", names=names)
        return without_unknown(labels, f"in {column!r}")

    def _labels_of_folder(self, part: Part) -> Labels:
        if self.metadata and self.how.label_depth is None:
            return self._labels_of_metadata(part)
        depth, base = self.how.label_depth, part.base
        folders = [os.path.dirname(p.removeprefix(base).lstrip(os.sep)) for p in part.paths]
        parts = [tuple(folder.split(os.sep)) if folder else () for folder in folders]
        flat = [path for path, above in zip(part.paths, parts, strict=True) if not above]
        if depth == 0:
            return Labels(None, why="--label-depth 0")
        if depth is not None:
            short = [p for p, above in zip(part.paths, parts, strict=True) if len(above) < depth]
            if short:
                shown = printable(os.path.relpath(short[0], base))
                raise UserError(
                    f"{self.source}: --label-depth {depth}: {counted(len(short), 'image')} with "
                    f"fewer folders above, e.g. {shown}"
                )
        elif len(flat) == len(parts):
            return Labels(None, why="no class folders, no metadata.csv")
        elif flat:
            classes = listed(sorted({above[0] + os.sep for above in parts if above}))
            names = listed([os.path.basename(path) for path in flat], 3)
            beside = f"{counted(len(flat), 'image')} beside the class folders {classes}: {names}"
            way_out = "move it away, or into a folder, for labels"
            return Labels(None, why=f"{beside}; {way_out}")
        values = [printable("/".join(above[: depth or 1])) for above in parts]
        leaves, taken = len(set(folders)), len(set(values))
        notes = []
        if depth is None and leaves > taken:
            deepest = max(map(len, parts))
            notes.append(
                f"{counted(leaves, 'folder')} of images lie below the {taken} that are taken as "
                f"classes; --label-depth 2{f' to {deepest}' if deepest > 2 else ''} takes those of "
                "a deeper level"
            )
        origin = "class folders" if depth is None else f"folders to depth {depth}"
        return Labels(values, origin, notes=notes)

    def _labels_of_metadata(self, part: Part) -> Labels:
        rows = [self.metadata.get(path) for path in part.paths]
        columns = list(dict.fromkeys(key for row in rows if row for key in row))
        columns = [name for name in columns if name != "file_name"]
        column = self.how.label_column
        if column is not None and column not in columns:
            raise UserError(
                f"{self.source}: no column {column!r} in its metadata; it has {', '.join(columns)}"
            )
        if column is None:
            column = columns[0] if len(columns) == 1 else "label"
        if column not in columns:
            several = f"its metadata has {', '.join(columns) or 'no column but file_name'}"
            return Labels(None, why=f"{several}; --label-column NAME chooses")
        values = [None if row is None else row.get(column) for row in rows]
        without = sum(row is None for row in rows)
        notes = [f"{counted(without, 'image')} without a row in the metadata"] if without else []
        if any(os.sep in p.removeprefix(part.base).lstrip(os.sep) for p in part.paths):
            notes.append("the metadata's labels, not the folders; --label-depth 1 takes these")
        labels = Labels(tables.tidy(values), f"column {column!r} of the metadata", notes=notes)
        return without_unknown(labels, f"in {column!r}")

    # ---- pixels ----

    @cached_property
    def reading(self) -> Reading:
        """The rule by which pixels are read, from a sample of the whole source.

        Raises:
            UserError: it is not decided.
        """
        given = Reading(self.how.alpha or "", self.how.value_range)
        for i, image in enumerate(self.sample()):
            try:
                self.looks.append(look_at(image))
            except Exception as error:  # a run meets it again, and counts it
                self.undecodable.append(undecodable(image, i, error))
        reading, lines = settle(self.looks, given, self.source)
        self.notes += lines
        return reading

    def sample(self) -> Iterator[Any]:
        """Encoded images, evenly spaced over the splits; none where they are not on this disk."""
        if self.kind == "folder":
            paths = sorted(path for part in self.parts for path in part.paths)
            yield from paths[:: max(1, -(-len(paths) // SAMPLE))]
        for part in self.parts if self.kind != "folder" else ():
            if part.table is not None and part.table.local:
                column = tables.image_column(part.table, self.source, self.how.image_column)
                yield from part.table.sample(column, -(-SAMPLE // len(self.parts)))

    # ---- in words ----

    def lines(self, *parts: Part) -> list[str]:
        """What a command says first: what is read, left out, passed over, converted and guessed."""
        self.reading  # noqa: B018  its notes are told as well
        lines = []
        if any(part.name for part in parts):
            rest = [p for p in self.parts if p not in parts and parts[0].name != "all"]
            out = f"; not read here: {numbers_of(rest)}" if rest else ""
            lines.append(f"split {numbers_of(parts)}{out}")
        for part in parts:
            if self.kind == "folder" or (part.table is not None and part.table.local):
                labels = self.labels(part)
                lines += labels.notes
                where = f" of {part.name}" if part.name else ""
                if labels.values is None:
                    lines.append(f"no labels{where}: {labels.why}")
                elif part is parts[0]:
                    several = any(value != labels.values[0] for value in labels.values)
                    one = f": of one class only, {labels.values[0]}" if not several else ""
                    lines.append(f"labels by {labels.origin}{one}")
        lines += self.notes
        if sample := self.sampled():
            count = len(self.looks) + len(self.undecodable)
            lines.append(f"a sample of {count}: {told(sample)}")
        if self.passed_over:
            files = counted(sum(self.passed_over.values()), "other file")
            lines.append(f"{files} passed over: {told(self.passed_over)}")
        first, *others = dict.fromkeys(lines) if lines else ["nothing to say"]
        return [printable(f"{self.source}: {first}"), *[printable(f"  {each}") for each in others]]

    def record(self, part: Part) -> dict[str, Any]:
        """The plan as JSON has it."""
        labels = self.labels(part) if self.kind not in ("hub", "demo") else Labels(None)
        counts = Counter(str(v) for v in labels.values or () if not isinstance(v, list))
        return {
            "source": printable(self.source),
            "root": printable(self.root),
            "kind": self.kind,
            "split": part.name,
            "images": part.count,
            "names": self.names_digest(part),
            "splits": {printable(p.name): p.count for p in self.parts},
            "labels": {"from": labels.origin, "why_not": labels.why, "missing": labels.missing},
            "classes": {printable(name): n for name, n in sorted(counts.items())},
            "read_as": {"alpha": self.reading.alpha, "value_range": self.reading.value_range},
            "sample": self.sampled(),
            "passed_over": self.passed_over,
            "lines": self.lines(part),
        }

    def names_digest(self, part: Part) -> str:
        """Of the names of a part's files below the source, by which a moved source is known."""
        digest = hashlib.sha256()
        for name in names_below(self, part):
            digest.update(os.fsencode(name) + b"\0")
        return digest.hexdigest()

    def sampled(self) -> dict[str, int]:
        """Kinds of the images looked at, most frequent first: "JPEG RGB 8 bits" to a count."""
        return dict(Counter(map(self.kind_of, self.looks)).most_common())

    @staticmethod
    def kind_of(look: Look) -> str:
        return f"{look.format} {look.mode} {look.kind}"


class NoTrain(UserError):
    """The source has splits, and none of them is to train on."""


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


def plan_of(source: str, how: SourceConfig | None = None) -> Plan:
    """Find out what a source holds.

    Raises:
        UserError: there is no such source, no image in it, or two ways to read it.
    """
    how = how or SourceConfig()
    if source == "demo":
        return Plan(source, "demo", how, [Part(name, name, n) for name, n in DEMO.items()])
    try:
        name, configuration = split_source(source)
        path = path_of(os.path.expanduser(name))
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
        parts = [Part(n, hub_split(n), t.rows, table=t) for n, t in found.items()]
        return Plan(source, "hub", how, parts, notes=notes)
    raise UserError(f"{source}: no such folder or file (nor a Hub id of the form owner/name)")


def hub_split(name: str) -> str:
    return next(iter(splits_in(name)), name)


def of_file(source: str, path: str, how: SourceConfig) -> Plan:
    """One table, given by its name: all of it is the training split."""
    if not tables.is_table(path):
        raise UserError(f"{source}: not a folder, a .parquet or an .arrow file")
    table = tables.opened([path], source)
    named = splits_in(Path(path).stem) - {"train"}
    notes = [f"one table, so all of it is read, though its name says {listed(sorted(named))}"]
    part = Part("", "", table.rows, [path], table)
    return Plan(
        source, "tables", how, [part], path, notes=[*(notes if named else ()), *table.notes]
    )


@dataclass
class Found:
    """What a walk through a folder has met; folders are relative to it, "" is itself."""

    images: dict[str, list[str]] = field(default_factory=dict)  # folder to names
    tables: list[str] = field(default_factory=list)
    metadata: list[str] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)  # folders written by `save_to_disk`
    passed_over: Counter = field(default_factory=Counter)
    unreadable: list[str] = field(default_factory=list)


def walk(root: str) -> Found:
    """Every file below `root`; links are followed, a loop once.

    Raises:
        OSError: `root` itself cannot be read.
    """
    found = Found()

    def enter(folder: str, relative: str, above: frozenset[str], hidden: str) -> None:
        here = os.path.realpath(folder)
        if here in above:  # a link to a folder that holds it
            return
        try:
            entries = os.scandir(folder)
        except OSError:
            if not relative:
                raise
            found.unreadable.append(relative)
            return
        names = []
        with entries:
            for entry in entries:
                name = entry.name
                out = hidden or ("system" if name in SYSTEM else "hidden" * (name[0] == "."))
                if entry.is_dir():
                    below = f"{relative}{os.sep}{name}" if relative else name
                    enter(entry.path, below, above | {here}, out)
                elif out:
                    found.passed_over[f"{out} files"] += 1
                elif os.path.splitext(name)[1].lower() in SUFFIXES:
                    names.append(name)
                elif tables.is_table(name):
                    found.tables.append(os.path.join(relative, name))
                elif name in METADATA:
                    found.metadata.append(os.path.join(relative, name))
                else:
                    if name == "state.json":
                        found.saved.append(relative)
                    suffix = os.path.splitext(name)[1].lower()
                    found.passed_over[printable(suffix or "without a suffix")] += 1
        if names:
            found.images[relative] = names

    enter(root, "", frozenset(), "")
    return found


def of_folder(source: str, root: str, configuration: str, how: SourceConfig) -> Plan:
    """A folder of images, or of tables.

    Raises:
        UserError: it holds neither, or both.
    """
    folder = os.path.join(root, configuration)
    if configuration and os.path.isdir(folder):
        root, configuration = folder, ""
    found = walk(root)
    if found.tables and found.images:
        count = sum(map(len, found.images.values()))
        where = [os.path.dirname(found.tables[0]), min(found.images)]
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
    ignored = [
        ("--label-column", how.label_column and not (found.tables or found.metadata)),
        ("--image-column", how.image_column and not found.tables),
        ("--label-depth", how.label_depth is not None and found.tables),
    ]
    for flag, is_ignored in ignored:
        if is_ignored:
            has = "tables, not class folders" if found.tables else "no table or metadata"
            plan.notes.append(
                f"{flag} makes no difference: there are {has}".replace("are no", "is no")
            )
    plan.passed_over = {kind: count for kind, count in found.passed_over.most_common() if count}
    if found.unreadable:
        names = listed(found.unreadable)
        plan.notes.append(f"{counted(len(found.unreadable), 'folder')} cannot be read: {names}")
    return plan


# ---- tables --------------------------------------------------------------------------------------


def of_tables(source: str, root: str, wanted: str, found: Found, how: SourceConfig) -> Plan:
    """The tables of a folder by split, of one configuration.

    Raises:
        UserError: several configurations, or tables that name no split beside others that do.
    """
    units = sorted(found.tables)
    inside = {os.path.dirname(file) for file in units} & set(found.saved)
    if inside:  # of `save_to_disk`, whose state.json lists them
        units = [os.path.join(folder, "state.json") for folder in sorted(inside)]
        others = [file for file in found.tables if os.path.dirname(file) not in inside]
        found.passed_over["other tables"] += len(others)
    splits = {unit: table_split(source, unit) for unit in units}
    named = [unit for unit in units if splits[unit]] or units
    unnamed = [unit for unit in units if unit not in named]
    configurations = sorted({configuration_of(unit) for unit in named})
    if wanted and wanted not in configurations:
        raise UserError(f"{source}: no configuration {wanted!r}; {listed(configurations)}")
    if len(configurations) > 1 and not wanted:
        names = listed([name or "(no name)" for name in configurations], 10)
        raise UserError(
            f"{source}: several configurations, {names}; say one: "
            f"--data {source}:{configurations[-1]}"
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
    for kind, count in (
        ("tables of other configurations", len(named) - len(kept)),
        ("tables that name no split", len(unnamed)),
    ):
        if count:
            found.passed_over[kind] += count
    parts, notes = [], list[str]()
    for split, files in sorted(mine.items()):
        paths = [os.path.join(root, file) for file in files]
        if len(files) > 1 and not split:
            notes.append(f"{len(files):,} tables are read as one: {listed(files)}")
        table = tables.opened(paths, source)
        notes += table.notes
        parts.append(Part(split, split, table.rows, paths, table))
    return Plan(source, "tables", how, parts, root, notes=list(dict.fromkeys(notes)))


def table_split(source: str, path: str) -> str:
    """The split that the name of a table says, or else the nearest folder above it; or "".

    Raises:
        UserError: it says several.
    """
    *folders, name = path.split(os.sep)
    names = folders[::-1] if name == "state.json" else [os.path.splitext(name)[0], *folders[::-1]]
    for each in names:
        if found := splits_in(each):
            if len(found) > 1:
                raise UserError(
                    f"{source}: {path} names several splits, {listed(sorted(found))}; give it by "
                    "its own name to read all of it, or rename it"
                )
            return found.pop()
    return ""


def configuration_of(path: str) -> str:
    """What the folders and the name of a table say beside its split and its number in a row.

    full of full/train-0, data/en of data/en-train-0, cifar10 of cifar10_train; nothing of
    train-00000-of-00002-6b9da5db, 2024/part-7 or year=2024/a, which are parts of one table.
    """
    *folders, name = path.split(os.sep)
    kept = [each for each in folders if not (is_whole(each) or each.isdigit() or "=" in each)]
    stem = "" if name == "state.json" else os.path.splitext(name)[0]
    if splits_in(stem):
        words = re.split(r"[-_. ]+", stem)
        first = next(i for i, word in enumerate(words) if splits_in(word))
        after = [word for word in words[first:] if rest_of(word) and word.isalpha()]
        kept += ["_".join([*words[:first], *after])]
    return "/".join(filter(None, kept))


# ---- folders of images ---------------------------------------------------------------------------


def of_images(source: str, root: str, found: Found, how: SourceConfig) -> Plan:
    """The images of a folder, by split.

    Raises:
        UserError: there is none, or a folder may be a split or a class.
    """
    drop_masks(found)
    if not found.images:
        kinds = " ".join(sorted(SUFFIXES))
        others = f"; passed over: {told(found.passed_over)}" if found.passed_over else ""
        raise UserError(f"{source}: no images in it, at any depth (looked for {kinds}){others}")
    level, names, notes = folders_of_splits(source, found.images, how.split)
    parts = []
    for name in names or [""]:
        base = os.path.join(root, level, name) if names else root
        below = os.path.join(level, name) if names else ""
        paths = [
            os.path.join(root, folder, image)
            for folder, images in found.images.items()
            if is_below(folder, below)
            for image in images
        ]
        split = next(iter(splits_in(name)), name.lower())
        parts.append(Part(name, split, len(paths), sorted(paths), base=base))
    outside = sum(map(len, found.images.values())) - sum(part.count or 0 for part in parts)
    if outside:
        inside = [os.path.join(level, name) for name in names]
        where = [f for f in found.images if not any(is_below(f, each) for each in inside)]
        example = os.path.join(where[0], found.images[where[0]][0])
        images = f"{counted(outside, 'image')} beside {listed([f'{n}/' for n in names])}"
        notes.append(f"{images} left out: {printable(example)}" + (", ..." if outside > 1 else ""))
    plan = Plan(source, "folder", how, parts, root, notes=notes)
    read_metadata(plan, found)
    return plan


def is_below(folder: str, base: str) -> bool:
    return not base or folder == base or folder.startswith(base + os.sep)


def kids_of(images: dict[str, list[str]], level: str) -> list[str]:
    """The folders right below `level` that hold images, at any depth."""
    start = len(level) + 1 if level else 0
    below = [folder[start:] for folder in images if folder != level and is_below(folder, level)]
    return sorted({folder.split(os.sep, 1)[0] for folder in below})


def folders_of_splits(
    source: str, images: dict[str, list[str]], split: str
) -> tuple[str, list[str], list[str]]:
    """The folder that holds the splits, their names, and what to say; no names without splits.

    Args:
        images: folder to names of images.
        split: as asked for.

    Raises:
        UserError: it is not clear whether a folder is a split or a class.
    """
    if split == "all":
        return "", [], ["--split all: no folder is taken as a split"]
    level = ""
    while len(kids := kids_of(images, level)) == 1 and level not in images:
        inner = os.path.join(level, kids[0])
        if splits_in(kids[0]) and not all(map(is_whole, kids_of(images, inner) or [""])):
            return level, kids, []
        level = inner
    wholes = [kid for kid in kids if is_whole(kid)]
    asked = [kid for kid in kids if split and kid.lower() == split.lower()]
    if kids and all(len(splits_in(kid)) == 1 for kid in kids):
        if wholes or len({rest_of(kid) for kid in kids}) == 1:
            return level, kids, []
        return "", [], [f"{listed(kids)} are taken as classes, not as splits"]
    if asked:
        return level, kids, []
    if wholes and split and any(splits_in(kid) == {CANONICAL.get(split)} for kid in wholes):
        return level, kids, []
    if wholes:
        beside = [f"{kid}/" for kid in kids if kid not in wholes]
        one = os.path.join(source, level, wholes[0])
        raise UserError(
            f"{source}: {listed([f'{kid}/' for kid in wholes])} may be a split, or a class beside "
            f"{listed(beside)}; --split all reads every folder as a class, --split {wholes[0]} (or "
            f"--data {one}) that folder alone"
        )
    if nested := [kid for kid in kids if holds_splits(images, os.path.join(level, kid))]:
        theirs = kids_of(images, os.path.join(level, nested[0]))
        prefix = f"{level}/" if level else ""
        raise UserError(
            f"{source}: {listed([f'{kid}/' for kid in nested], 10)} each have splits of their own "
            f"({listed(theirs)}); say one: --data {source}:{prefix}{nested[0]}; or --split all for "
            "everything"
        )
    return "", [], []


def holds_splits(images: dict[str, list[str]], folder: str) -> bool:
    kids = kids_of(images, folder)
    return bool(kids) and folder not in images and all(map(is_whole, kids))


def drop_masks(found: Found) -> None:
    """Pass over folders of masks: named as such, beside a folder of images of the same names."""

    def stems(folder: str) -> set[str]:
        return {
            os.path.splitext(os.path.join(each, name)[len(folder) + 1 :])[0]
            for each, names in found.images.items()
            if is_below(each, folder)
            for name in names
        }

    every = {
        folder[: m.end() - 1] for folder in found.images for m in re.finditer("$|/", folder + "/")
    }
    for folder in sorted(every):
        above, name = os.path.split(folder)
        if name not in MASKS or not any(is_below(each, folder) for each in found.images):
            continue
        pictures = [os.path.join(above, each) for each in PICTURES]
        mine = stems(folder)
        if mine and any(mine <= stems(picture) for picture in pictures):
            for each in [each for each in found.images if is_below(each, folder)]:
                found.passed_over[f"masks in {printable(name)}/"] += len(found.images.pop(each))


def parents(folder: str) -> list[str]:
    """The folders above a relative one, itself left out."""
    parts = folder.split(os.sep)
    return [os.sep.join(parts[:i]) for i in range(1, len(parts))]


def read_metadata(plan: Plan, found: Found) -> None:
    """The rows of `metadata.csv` and `metadata.jsonl`, as `datasets`' imagefolder has them."""
    known = {path for part in plan.parts for path in part.paths}
    for file in sorted(found.metadata):
        rows = tables.metadata_rows(os.path.join(plan.root, file))
        if rows is None:
            found.passed_over["metadata without file_name"] += 1
            continue
        folder = os.path.dirname(os.path.join(plan.root, file))
        lost = []
        for row in rows:
            path = os.path.normpath(os.path.join(folder, str(row["file_name"])))
            if path in known:
                plan.metadata[path] = row
            elif not os.path.exists(path):
                lost.append(str(row["file_name"]))
        if lost:
            rows_ = counted(len(lost), "row")
            plan.notes.append(f"{rows_} of {file} without a file: {listed(lost, 3)}")


# ---- what a run was trained on -------------------------------------------------------------------


def listing(plan: Plan, part: Part) -> list[tuple[str, int | None]]:
    """The files of a part, relative to the source, with their sizes in bytes; [] of the Hub."""
    sizes = [size for _, size in stats(part.paths, times=False)]
    return list(zip(map(shown, names_below(plan, part)), sizes, strict=True))


def names_below(plan: Plan, part: Part) -> list[str]:
    """The files of a part, relative to the source; of a single table its name."""
    root = plan.root if os.path.isdir(plan.root) else os.path.dirname(plan.root)
    return [path.removeprefix(root).lstrip(os.sep) for path in part.paths]


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

    groups = [paths[i : i + 1024] for i in range(0, len(paths), 1024)]
    with ThreadPoolExecutor(32) as pool:  # a network's file system answers each after a while
        for some, found in zip(groups, pool.map(about, groups), strict=True):
            yield from zip(some, found, strict=True)
