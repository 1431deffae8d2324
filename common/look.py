"""Look at a SOURCE as a run would read it, without training: its plan, and a sheet of images.

    python -m common.look SOURCE
    python -m common.look SOURCE --split val --out DIR        # DIR/plan.json and DIR/sheet.png

Prints the splits with their numbers of images and classes, what is passed over, left out or
guessed, and the kinds of a sample of 64 images. The status is 2 where a run would refuse.
"""

import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from PIL import Image, ImageDraw

from common import cli, formats
from common.config import SourceConfig
from common.errors import UserError, printable
from common.files import atomic_write, atomic_write_bytes, naming, to_json
from common.layout import counted
from common.plan import MAX_BAD, Labels, Part, Plan, plan_of, told, undecodable

SHOWN = 12  # classes in a line
TILE, CAPTION, ACROSS = 112, 14, 8  # pixels, pixels, tiles


@dataclass(frozen=True)
class Settings(SourceConfig):
    """What to look at."""

    data: Annotated[str, tyro.conf.Positional] = "demo"  # SOURCE: demo, a folder, tables, a Hub id
    out: str = ""  # folder for plan.json and sheet.png; default: nothing is written

    def __post_init__(self) -> None:
        self.check()


def main(settings: Settings) -> None:
    plan = plan_of(settings.data, settings)
    print(f"{printable(plan.source)}: {kind_of(plan)}")
    for part in plan.parts:
        print(line_of(plan, part))
    for kind, sizes in kinds_of(plan).items():
        print(f"  sample: {kind}, {sizes}")
    part = plan.choose(settings.split)
    images = "?" if part.count is None else counted(part.count, "image")
    print(f"a run trains on: {printable(part.name) or 'everything'}, {images}; it says:")
    print("\n".join(plan.lines(part)))
    tiles, bad = sample_of(plan, part)
    if settings.out:
        write(plan, part, tiles, Path(settings.out))
    if len(bad) > max(1, MAX_BAD * len(tiles)) or (tiles and len(bad) == len(tiles)):
        raise UserError(f"{len(bad)} of {len(tiles)} images tried cannot be decoded, e.g. {bad[0]}")


def kind_of(plan: Plan) -> str:
    counts = [part.count for part in plan.parts]
    images = "? images" if None in counts else counted(sum(n or 0 for n in counts), "image")
    kind = {"tables": "tables", "hub": "of the Hub, not fetched", "demo": "embedded"}
    return f"{kind.get(plan.kind, 'a folder')}, {images}"


def line_of(plan: Plan, part: Part) -> str:
    """A split: its images, and its classes with their counts."""
    count = "?" if part.count is None else f"{part.count:,}"
    line = f"  {printable(part.name) or 'all':<12} {count:>9} images  {classes_of(plan, part)}"
    return line.rstrip()


def classes_of(plan: Plan, part: Part) -> str:
    labels = labels_of(plan, part)
    if labels is None or labels.values is None:
        return "no labels" if labels else ""
    known = [v for value in labels.values for v in (value if isinstance(value, list) else [value])]
    counts = Counter(str(value) for value in known if value is not None)
    some = {printable(name): counts[name] for name in sorted(counts)[:SHOWN]}
    more = f", and {len(counts) - SHOWN:,} more" if len(counts) > SHOWN else ""
    missing = f"; missing {labels.missing:,}" if labels.missing else ""
    return f"{counted(len(counts), 'class')} by {labels.origin}: {told(some)}{more}{missing}"


def labels_of(plan: Plan, part: Part) -> Labels | None:
    """The labels of a split; None where they are not on this disk, or are the demo's."""
    return plan.labels(part) if part.local else None


def kinds_of(plan: Plan) -> dict[str, str]:
    """Kinds of the images of the sample, with the sizes of each."""
    plan.reading  # noqa: B018
    kinds: dict[str, str] = {}
    for kind, count in plan.sampled().items():
        sizes = [(x.width, x.height) for x in plan.looks if plan.kind_of(x) == kind]
        if not sizes:
            kinds[f"{count} {kind}"] = f"e.g. {plan.undecodable[0]}"
            continue
        sides = [f"{min(each)} to {max(each)}" for each in zip(*sizes, strict=True)]
        same = len(set(sizes)) == 1
        size = f"{sizes[0][0]} x {sizes[0][1]} px" if same else f"{sides[0]} x {sides[1]} px"
        kinds[f"{count} {kind}"] = size
    return kinds


Tile = tuple[str, Image.Image | None]  # a name, and the image as it is read if that can be


def sample_of(plan: Plan, part: Part) -> tuple[list[Tile], list[str]]:
    """Images of a split as they are read, and which of them cannot be decoded, and why."""
    if plan.kind == "demo":
        return [(f"image {i}", image) for i, image in enumerate(demo_sample())], []
    tiles: list[Tile] = []
    bad = []
    labels = labels_of(plan, part)
    known = labels.values if plan.kind == "folder" and labels else None
    names = dict(zip(part.paths, known or (), strict=False))
    for i, image in enumerate(plan.sample(part)):
        try:
            tile = formats.read(image, plan.reading, max_side=2 * TILE)
        except Exception as error:
            bad.append(undecodable(image, i, error))
            tile = None
        name = names.get(image) if isinstance(image, str) else None
        tiles.append((caption(image if name is None else str(name), i), tile))
    return tiles, bad


def write(plan: Plan, part: Part, tiles: Sequence[Tile], folder: Path) -> None:
    """Write plan.json and sheet.png."""
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
    content = to_json(plan.record(part), indent=1).encode() + b"\n"
    atomic_write_bytes(folder / "plan.json", content)
    with atomic_write(folder / "sheet.png") as aside:
        sheet(tiles).save(aside, "PNG")
    print(f"written: {printable(str(folder))}/plan.json, sheet.png (the sample as it is read)")


def sheet(tiles: Sequence[Tile]) -> Image.Image:
    """One picture of all images with their names; a cross for a bad one."""
    rows = max(1, -(-len(tiles) // ACROSS))
    page = Image.new("RGB", (ACROSS * (TILE + 4), rows * (TILE + CAPTION + 4)), "white")
    draw = ImageDraw.Draw(page)
    for i, (name, tile) in enumerate(tiles):
        x, y = i % ACROSS * (TILE + 4) + 2, i // ACROSS * (TILE + CAPTION + 4) + 2
        if tile is None:
            draw.line((x, y, x + TILE, y + TILE), "red", 2)
            draw.line((x, y + TILE, x + TILE, y), "red", 2)
        else:
            scale = TILE / max(tile.size)
            side = [max(1, round(scale * length)) for length in tile.size]
            page.paste(tile.resize((side[0], side[1])), (x, y))
        draw.text((x, y + TILE), name, "black")
    return page


def caption(image: Any, i: int) -> str:
    """A class, or else the name of an image's file, or its place; cut where there is no room."""
    path = image.get("path") if isinstance(image, dict) else image
    name = printable(Path(path).name if os.path.isabs(path) else path) if path else f"image {i}"
    name = name.encode("ascii", "replace").decode()
    return name if len(name) <= 18 else f"..{name[-16:]}"


def demo_sample() -> Sequence[Image.Image]:
    from common import demo  # which draws with torch

    pixels = demo.split("train")[0][::80]
    return [Image.fromarray(each.permute(1, 2, 0).numpy()) for each in pixels]


if __name__ == "__main__":
    arguments = cli.run(
        cli.parse_settings, Settings, sys.argv[1:], "python -m common.look", __doc__
    )
    cli.run(main, arguments)
