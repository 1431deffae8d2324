"""What the names of a source's folders and tables say: splits, configurations, what is no image.

A *split word* is train, training; test, testing; val, valid, validation, dev. It is looked for in
the names of tables, and of folders above the class folders, never of images:

    train, Train, train2017, training_set, test-images, birds_test    of that split
    train/ and test/, and nothing beside them with images             splits
    bus/ plane/ train/                                                refused: split or class?
    bottle/ steam_train/ test_tube/                                   classes
    extra, unlabeled, holdout, ... beside others                      refused without `--split`

Only names are looked at here; paths are relative to the source.
"""

import contextlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from common.errors import UserError, printable
from common.formats import SUFFIXES
from common.tables import is_table

SPLITS = {  # split words, by the split that they name
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("val", "valid", "validation", "dev"),
}
OTHER = {"extra", "unlabeled", "unlabelled", "unsupervised", "holdout", "heldout", "trainval"}
CANONICAL = {word: split for split, words in SPLITS.items() for word in words}
CANONICAL |= {word: word for word in OTHER}
AFFIXES = {"set", "images", "split"}
MASKS = {"masks", "labels", "annotations", "SegmentationClass", "SegmentationObject"}
PICTURES = {"images", "JPEGImages"}  # beside which MASKS are no images
SYSTEM = {"@eaDir", "@Recycle", "#recycle", "#snapshot", "__MACOSX", "Thumbs.db", "desktop.ini"}
SYSTEM |= {"$RECYCLE.BIN", "System Volume Information", "lost+found"}
METADATA = {"metadata.csv", "metadata.jsonl", "metadata.parquet"}


# ---- words ---------------------------------------------------------------------------------------


CUTS = re.compile(r"[-_.= ]+|(?<=\D)(?=\d)|(?<=[a-z])(?=[A-Z])")
TABLE = re.compile(r"\.(parquet|arrow)$", re.IGNORECASE)  # a folder may be named so as well
ONE_WORD = re.compile(rf"({'|'.join(CANONICAL)})({'|'.join(AFFIXES)})")  # trainset


def words_of(name: str) -> list[str]:
    """A name in lower case, cut at `-`, `_`, `.`, `=`, spaces, before digits and capitals."""
    found: list[str] = []
    for word in map(str.lower, CUTS.split(TABLE.sub("", name))):
        match = ONE_WORD.fullmatch(word)
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
    rest = [word for word in words_of(name) if word not in CANONICAL and word not in AFFIXES]
    return bool(splits_in(name)) and all(word.isdigit() for word in rest)


def listed(names: Sequence[str], most: int = 4) -> str:
    """Some names in a line, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return printable(", ".join(names[:most])) + more


def folders(names: Sequence[str], most: int = 4) -> str:
    return listed([f"{name}/" for name in names], most)


def counted(count: int, noun: str) -> str:
    plural = {"class": "classes"}.get(noun, f"{noun}s")
    return f"{count:,} {noun if count == 1 else plural}"


# ---- what there is -------------------------------------------------------------------------------


@dataclass
class Found:
    """What a walk through a folder has met; folders are relative to it, "" is itself."""

    images: dict[str, list[str]] = field(default_factory=dict)  # folder to names
    tables: list[str] = field(default_factory=list)
    metadata: list[str] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)  # folders written by `save_to_disk`
    passed_over: Counter[str] = field(default_factory=Counter)  # by kind
    unreadable: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)  # links to folders that are read anyway

    @cached_property
    def kids(self) -> dict[str, list[str]]:
        """The folders right below each one that hold images, at any depth."""
        kids: dict[str, set[str]] = {}
        for folder in self.images:
            while folder:
                above, name = os.path.split(folder)
                known = kids.setdefault(above, set())
                if name in known:
                    break
                known.add(name)
                folder = above
        return {folder: sorted(names) for folder, names in kids.items()}

    def below(self, folder: str) -> Iterator[str]:
        """`folder` and those below it that hold images themselves."""
        if folder in self.images:
            yield folder
        for kid in self.kids.get(folder, ()):
            yield from self.below(os.path.join(folder, kid))

    def count(self, folder: str = "") -> int:
        """The images below a folder."""
        return sum(len(self.images[each]) for each in self.below(folder))

    def pass_over(self, kind: str, count: int) -> None:
        if count:
            self.passed_over[kind] += count


def walk(root: str) -> Found:
    """Every file below `root`; links are followed, a loop once.

    Raises:
        OSError: `root` itself cannot be read.
    """
    found, seen = Found(), set[str]()

    def enter(folder: str, relative: str, above: frozenset[str], out: str) -> None:
        here = os.path.realpath(folder)
        if here in above:  # of the walk, which would not end
            found.passed_over["links to a folder above"] += 1
            return
        again, before = here in seen, len(found.images)
        if not out:
            seen.add(here)
        try:
            with os.scandir(folder) as entries:
                listing = list(entries)
        except OSError:
            if not relative:
                raise
            found.unreadable.append(relative)
            return
        names = []
        for entry in listing:
            name = entry.name
            kind = out or ("system" if name in SYSTEM else "hidden" * (name[0] == "."))
            if entry.is_dir():
                below = f"{relative}{os.sep}{name}" if relative else name
                enter(entry.path, below, above | {here}, kind)
            elif kind:
                found.passed_over[f"{kind} files"] += 1
            elif is_image(name):
                names.append(name)
            elif name in METADATA:
                found.metadata.append(os.path.join(relative, name))
            elif is_table(name) and entry.is_file():
                found.tables.append(os.path.join(relative, name))
            elif entry.is_symlink() and not os.path.exists(entry.path):
                found.passed_over["dead links"] += 1
            else:
                if name == "state.json":
                    found.saved.append(relative)
                suffix = os.path.splitext(name)[1].lower()
                found.passed_over[printable(suffix or "without a suffix")] += 1
        if names:
            found.images[relative] = names
        if again and len(found.images) > before:
            found.twice.append(relative)

    enter(root, "", frozenset(), "")
    return found


def may_hold_images(folder: str) -> bool:
    """Whether there is an image, a table or a link at any depth; the first one ends the search."""
    below = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_symlink() or is_image(entry.name) or is_table(entry.name):
                return True
            if entry.is_dir():
                below.append(entry.path)
    return any(map(may_hold_images, below))


def is_image(name: str) -> bool:
    return name[name.rfind(".") :].lower() in SUFFIXES  # `splitext` takes three times as long


# ---- tables --------------------------------------------------------------------------------------


def split_of_table(path: str) -> str:
    """The split that the name of a table says, or else the nearest folder above it; or "".

    Raises:
        UserError: it says several.
    """
    *above, name = path.split(os.sep)
    names = above[::-1] if name == "state.json" else [os.path.splitext(name)[0], *above[::-1]]
    for each in names:
        if found := splits_in(each):
            if len(found) > 1:
                raise UserError(
                    f"{path} names several splits, {listed(sorted(found))}; give it by its own "
                    "name to read all of it, or rename it"
                )
            return found.pop()
    return ""


def configuration_of(path: str) -> str:
    """What the folders and the name of a table say beside its split and its number in a row.

    full of full/train-0, data/en of data/en-train-0, cifar10 of cifar10_train; nothing of
    train-00000-of-00002-6b9da5db, 2024/part-7 or year=2024/a, which are parts of one table.
    """
    *above, name = path.split(os.sep)
    above = [TABLE.sub("", each) for each in above]
    kept = [each for each in above if not (is_whole(each) or each.isdigit() or "=" in each)]
    stem = "" if name == "state.json" else os.path.splitext(name)[0]
    if splits_in(stem):
        words = re.split(r"[-_. ]+", stem)
        first = next(i for i, word in enumerate(words) if splits_in(word))
        after = [word for word in words[first:] if rest_of(word) and word.isalpha()]
        kept += ["_".join([*words[:first], *after])]
    return "/".join(filter(None, kept))


# ---- folders of images ---------------------------------------------------------------------------


def folders_of_splits(found: Found, split: str, source: str) -> tuple[str, list[str], list[str]]:
    """The folder that holds the splits, their names, and what to say; no names without splits.

    Args:
        split: as asked for.
        source: to name it in errors.

    Raises:
        UserError: it is not clear whether a folder is a split or a class.
    """
    if split == "all":
        with contextlib.suppress(UserError):
            level, names, _ = folders_of_splits(found, "", source)
            if names:
                return level, names, []
        return "", [], ["--split all: no folder is taken as a split"]
    level = ""
    while len(kids := found.kids.get(level, [])) == 1 and level not in found.images:
        inner = os.path.join(level, kids[0])  # of a wrapping folder
        if splits_in(kids[0]) and not holds_splits(found, inner):
            return level, kids, []
        level = inner
    wholes = [kid for kid in kids if is_whole(kid)]
    worded = [kid for kid in kids if splits_in(kid)]
    rests = Counter(rest_of(kid) for kid in worded)
    each_one = bool(kids) and all(len(splits_in(kid)) == 1 for kid in kids)
    if each_one and (wholes or len(rests) == 1 or same_place(kids)):
        return level, kids, []
    # seg_train/ and seg_test/ beside seg_pred/ may be splits; steam_train/ beside bottle/ is none
    unclear = [kid for kid in worded if kid in wholes or rests[rest_of(kid)] > 1]
    if len(worded) == len(kids) > 1:  # steam_train/ and test_tube/ alone may be either
        unclear = worded
    unclear.sort(key=lambda kid: splits_in(kid) != {"train"})  # the first one is advised
    wanted = {CANONICAL.get(split.lower())}
    if split and any(kid == split or splits_in(kid) == wanted for kid in unclear):
        return level, kids, []
    if split and any(kid.lower() == split.lower() for kid in kids):
        return level, kids, []
    if unclear:
        beside = folders([kid for kid in kids if kid not in unclear]) or "one another"
        one = os.path.join(source, level, unclear[0])
        raise UserError(
            f"{source}: {folders(unclear)} may be splits, or classes beside {beside}; --split all "
            f"reads every folder as a class, --split {unclear[0]} (or --data {one}) that alone"
        )
    nested = [
        kid for kid in kids if any(map(is_whole, found.kids.get(os.path.join(level, kid), ())))
    ]
    if nested:
        name = os.path.join(level, nested[0])
        raise UserError(
            f"{source}: {folders(nested, 10)} each have splits of their own "
            f"({listed(found.kids[name])}); say one: --data {source}:{name}; or --split all for "
            "everything"
        )
    notes = [
        f"{folders(worded)} taken as {'a class' if len(worded) == 1 else 'classes'}, not splits"
    ]
    return "", [], notes if worded else []


def same_place(names: Sequence[str]) -> bool:
    """Whether the split word is at the same place in all, from the start or from the end."""
    places = []
    for name in names:
        words = words_of(name)
        first = next(i for i, word in enumerate(words) if word in CANONICAL)
        places.append((first, len(words) - first))
    return any(len(set(each)) == 1 for each in zip(*places, strict=True))


def holds_splits(found: Found, folder: str) -> bool:
    """Whether all that lies right below a folder are folders that name nothing but a split."""
    kids = found.kids.get(folder, [])
    return bool(kids) and folder not in found.images and all(map(is_whole, kids))


def drop_masks(found: Found) -> None:
    """Pass over folders of masks: named as such, beside a folder of images of the same names."""

    def stems(folder: str) -> set[str]:
        start = len(folder) + 1
        return {
            os.path.splitext(os.path.join(each, name)[start:])[0]
            for each in found.below(folder)
            for name in found.images[each]
        }

    for above, kids in found.kids.items():
        for mask in MASKS.intersection(kids):
            folder, pictures = os.path.join(above, mask), PICTURES.intersection(kids)
            mine = stems(folder)
            if any(2 * len(mine & stems(os.path.join(above, p))) > len(mine) for p in pictures):
                for each in list(found.below(folder)):
                    found.pass_over(f"masks in {mask}/", len(found.images.pop(each)))
    del found.kids  # they are counted anew
