"""Generated JPEGs of the sizes, and with the detail, of ImageNet's photographs."""

import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from common.errors import UserError


def make_folders(**folders: Path) -> None:
    """Make the folders of these flags; a UserError now, not after minutes."""
    for name, folder in folders.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} {folder}: cannot be made ({error.strerror})") from error


def jpegs(
    out: Path, files: int, images: int, workers: int, deadline: float = math.inf
) -> tuple[str, str]:
    """A folder of generated images in `out`, made once, and a line on what is in it.

    Args:
        images: of the files so many differ; the others are links to them, and decoded anew.
        deadline: a time of `time.monotonic`.

    Raises:
        TimeoutError: the deadline was before the end; what is there is not made again.
    """
    folder, count = out / f"jpegs-{images}", min(images, files)
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(workers) as pool:  # NumPy and Pillow compute without Python's lock
        sizes = list(pool.map(partial(generate, folder=folder, deadline=deadline), range(count)))
    for index in range(count, files):
        if not (path := folder / f"{index:06}.jpg").exists():
            os.link(folder / f"{index % count:06}.jpg", path)
    return str(folder), f"{count:,} generated JPEGs of {sum(sizes) / count / 1000:.0f} kB"


def draw_size(draw: np.random.Generator) -> tuple[int, int]:
    """Width and height: mostly 500 along the longer side, a few larger, 500 x 375 in the middle."""
    if draw.random() < 0.05:
        side = int(draw.uniform(600, 1200))
    else:
        side = 500 if draw.random() < 0.8 else int(draw.uniform(200, 500))
    other = round(side * draw.choice([0.667, 0.75, 0.75, 0.75, 0.8, 1.0]))
    return (side, other) if draw.random() < 0.75 else (other, side)


def generate(index: int, folder: Path, deadline: float = math.inf) -> int:
    """One JPEG whose detail falls with its scale as a photograph's; its bytes."""
    path = folder / f"{index:06}.jpg"
    if path.exists():
        return path.stat().st_size
    if time.monotonic() > deadline:
        raise TimeoutError
    draw = np.random.default_rng(index)
    width, height = draw_size(draw)
    picture = np.zeros((height, width, 3), np.float32)
    for cells, strength in ((4, 60), (16, 35), (64, 18), (width, 14)):
        rough = draw.normal(0, strength, (max(1, cells * height // width), cells, 3))
        for channel in range(3):
            layer = Image.fromarray(rough[..., channel].astype(np.float32))
            resized = layer.resize((width, height), Image.Resampling.BICUBIC)
            picture[..., channel] += np.asarray(resized)
    aside = path.with_suffix(".part")
    pixels = (picture + 128).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(aside, "JPEG", quality=92)
    return aside.replace(path).stat().st_size
