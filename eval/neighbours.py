"""A picture of what an encoder finds alike: images, each beside its nearest neighbours.

    python -m eval.neighbours RUN                      # RUN/neighbours.png
    python -m eval.neighbours RUN --baselines random   # beside an untrained network's
    python -m eval.neighbours RUN --data SOURCE --out pictures.png

Labels are not needed. Where there are some, a neighbour of the image's own class is framed green
and any other red, and the share of the green ones over the images searched is printed. Neighbours
have the highest cosine similarity of the representation; they are sought among the other training
images, at most 2,000 of them.
"""

import sys
from pathlib import Path

from common import cli
from eval.settings import Neighbours as Settings

if __name__ == "__main__":  # a mistake is reported before torch is imported
    arguments = cli.run(
        cli.parse_settings, Settings, sys.argv[1:], "python -m eval.neighbours", __doc__
    )

import io

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from common.data import ImageSplit, open_split
from common.errors import UserError, printable
from common.files import atomic_write_bytes, naming
from eval.knn import nearest, subsample
from eval.subjects import subjects

MOST = 2_000  # images to search, evenly spaced over the source, so that it takes seconds
SIDE, FRAME, GAP, HEAD = 64, 3, 14, 22  # pixels
WORDS = {"encoder": "the trained encoder", "random": "an untrained one", "pixels": "raw pixels"}
OWN, OTHER = "#2e9e5b", "#d0493e"  # the frames' colours


def main(settings: Settings) -> None:
    s = settings
    images, blocks = None, []
    for subject in subjects(settings):
        if images is None:
            whole = open_split(subject.plan, subject.how.split)
            subject.tell(whole)
            images, total = subsample(whole, MOST), len(whole)
        features, index = subject.features(images)
        if len(index) < 2:
            raise UserError(f"{images.name}: one image; neighbours need two or more")
        _, near = nearest(features, features, s.k, exclude_self=True, device=subject.device)
        blocks.append((subject.encoder.name, index, index[near]))
    assert images is not None
    if not subject.accelerator.is_main_process:
        return
    folder = Path(s.run) if Path(s.run).is_dir() else Path()
    path = Path(s.out) if s.out else folder / "neighbours.png"
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    draw(images, blocks, s.rows).save(buffer, "PNG")
    atomic_write_bytes(path, buffer.getvalue())
    if (labels := classes_of(images)) is not None:
        for name, index, near in blocks:
            own, chance = shares(labels, index, near)
            if own != own:  # of no two images are both labels known
                continue
            print(
                f"{name:<8}  {own:.1f} % of an image's {near.shape[1]} nearest are of its class "
                f"(at random: {chance:.1f} %)"
            )
    searched = f"{len(blocks[0][1]):,} of {total:,} images"
    spaced = ", evenly spaced" if total > len(images) else ""
    if images.bad:
        print(f"{images.name}: {images.report_bad()}", file=sys.stderr)
    print(f"{path}: nearest neighbours among {searched}{spaced}")


def classes_of(images: ImageSplit) -> Tensor | None:
    """(N,) labels; None where there are none, of one class alone, or several of an image."""
    labels = images.labels
    return labels if labels is not None and labels.ndim == 1 and len(images.classes) > 1 else None


def shares(labels: Tensor, index: Tensor, near: Tensor) -> tuple[float, float]:
    """Percent of the neighbours that are of their image's class; and of images drawn at random.

    Args:
        index, near: the places of N images, (N,), and of the neighbours of each, (N, k).
    """
    both = (labels[near] >= 0) & (labels[index] >= 0)[:, None]  # whose labels are not missing
    own = (labels[near] == labels[index][:, None]) & both
    counts = labels[index][labels[index] >= 0].bincount().double()
    total = counts.sum()
    chance = (counts * (counts - 1)).sum() / (total * (total - 1))
    return (own.sum() / both.sum()).item() * 100, chance.item() * 100


def draw(images: ImageSplit, blocks: list[tuple[str, Tensor, Tensor]], rows: int) -> Image.Image:
    """A row for each of `rows` images, evenly spaced; a block of columns for each encoder.

    Args:
        blocks: the encoder's name, the places of its N images, and of the k nearest of each.
    """
    _, index, near = blocks[0]
    labels = classes_of(images)
    step = SIDE + 2 * FRAME
    block = near.shape[1] * step + GAP
    chosen = torch.linspace(0, len(index) - 1, min(rows, len(index))).long().unique()
    sheet = Image.new("RGB", (step + GAP + block * len(blocks), HEAD + step * len(chosen)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for j, (name, _, _) in enumerate(blocks):
        said = f"nearest by {WORDS.get(name, printable(name))}"
        pen.text((step + GAP + j * block + FRAME, 3), said, fill="#333333", font=font)
    for y, row in zip(range(HEAD, sheet.height, step), chosen.tolist(), strict=True):
        place = int(index[row])
        paste(sheet, images, place, (0, y), "white")
        for j, (_, _, found) in enumerate(blocks):
            for i, other in enumerate(found[row].tolist()):
                frame = "white"
                if labels is not None and labels[other] >= 0 and labels[place] >= 0:
                    frame = OWN if labels[other] == labels[place] else OTHER
                paste(sheet, images, other, (step + GAP + j * block + i * step, y), frame)
    return sheet


def paste(
    sheet: Image.Image, images: ImageSplit, place: int, at: tuple[int, int], frame: str
) -> None:
    """The image at `place`, as a square of `SIDE` pixels inside a frame."""
    batch = images.batch(torch.tensor([place]))
    height, width = batch.sizes[0].tolist()
    pixels = batch.images[0, :, :height, :width].permute(1, 2, 0).contiguous().numpy()
    side, (x, y) = min(height, width), at
    left, top = (width - side) // 2, (height - side) // 2
    square = Image.fromarray(pixels).crop((left, top, left + side, top + side))
    sheet.paste(frame, (x, y, x + SIDE + 2 * FRAME, y + SIDE + 2 * FRAME))
    sheet.paste(square.resize((SIDE, SIDE)), (x + FRAME, y + FRAME))


if __name__ == "__main__":
    cli.run(main, arguments)
