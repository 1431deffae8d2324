"""Images in: one SOURCE string, decoded uint8 batches out, in an order that survives a restart.

    demo                    embedded, drawn procedurally (common/demo.py)
    path/to/folder          images at any depth; class folders, if any, become labels
    path/to/parquet-or-arrow file, or a folder of them
    owner/name              a data set on the Hugging Face Hub

Labels are never needed to pretrain. Symbols: N images, B images in a batch.

What becomes of an odd image:

    CMYK, palette, gray, 1 bit        RGB
    16 bits                           8 bits
    transparent                       over white
    animated, several pages           the first frame
    turned by EXIF                    upright
    a side longer than MAX_SIDE       reduced to it; a JPEG while it is decoded
    1 x 1, 1 x 100                    as any other
    a folder named like an image      a folder
    links                             followed; a loop once

    truncated, empty, not an image    undecodable: named with the reason, counted, and the next
    a FIFO, a socket, a dead link     image takes its place, up to MAX_BAD of a source
    more than 89 megapixels (a JPEG: 179)
"""

import atexit
import contextlib
import functools
import hashlib
import io
import math
import multiprocessing
import os
import re
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, get_worker_info

from common import demo
from common.cli import is_hub_id
from common.errors import UserError, first_line, printable

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
TABLES = (".parquet", ".arrow")
SPLITS = {  # the names under which people keep a split
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("validation", "valid", "val"),
}
MAX_SIDE = 640  # pixels; a longer image is reduced when decoded, so that no batch is mostly padding
MAX_BAD = 0.05  # share of undecodable images beyond which a source is refused


# ---- order ---------------------------------------------------------------------------------------


def generator(*key: object) -> torch.Generator:
    """A CPU random stream that depends on `key` alone, e.g. (seed, "views", step)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


@functools.lru_cache(maxsize=2)  # a step needs one epoch's order, at an epoch's edge two
def epoch_order(seed: int, epoch: int, count: int) -> Tensor:
    """(N,) permutation of the images: a pure function, so a restart needs no saved state."""
    return torch.randperm(count, generator=generator(seed, "order", epoch))


def batch_indices(
    step: int, *, batch_size: int, count: int, seed: int, drop_last: bool = False
) -> Tensor:
    """(B,) images of the global batch at `step`.

    By default the epochs form one endless stream and a batch may span two of them, as in the
    official SimCLR and BYOL pipelines; `drop_last` ends each epoch at its last whole batch (MoCo).
    """
    if drop_last:
        epoch, k = divmod(step, count // batch_size)
        return epoch_order(seed, epoch, count)[k * batch_size : (k + 1) * batch_size]
    first, last = step * batch_size, (step + 1) * batch_size - 1
    epochs = range(first // count, last // count + 1)
    stream = torch.cat([epoch_order(seed, epoch, count) for epoch in epochs])
    return stream[first - epochs[0] * count :][:batch_size]


# ---- decoding ------------------------------------------------------------------------------------


def decode(image: Any, max_side: int = MAX_SIDE) -> Tensor:
    """One encoded image (`{"bytes": ..., "path": ...}`, a path or a tensor) to (3, H, W) uint8 RGB.

    Upright by its EXIF orientation; 16 bits reduced to 8; the first frame of an animation;
    transparency over white; longer side at most `max_side`.

    Raises:
        Exception: of nearly any kind, if the image is damaged, too large or not a file.
    """
    if isinstance(image, Tensor):
        return image
    if isinstance(image, dict):
        image = io.BytesIO(image["bytes"]) if image.get("bytes") else image["path"]
    if image is None:
        raise OSError("an empty cell")
    if isinstance(image, str | Path) and not os.path.isfile(image):
        raise OSError("no such file" if not os.path.exists(image) else "not a file")
    with Image.open(image) as picture:
        picture.draft("RGB", (max_side, max_side))  # JPEG: decode at a reduced scale where enough
        if math.prod(picture.size) > (Image.MAX_IMAGE_PIXELS or math.inf):
            raise OSError(f"{math.prod(picture.size):,} pixels; reduce it first")
        picture.load()
        upright: Image.Image = picture
        if picture.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # else it copies for nothing
            upright = ImageOps.exif_transpose(picture)
    if upright.mode.startswith("I"):  # 16 bits of grey
        upright.info.pop("transparency", None)  # a 16-bit value that 8 bits cannot hold
        upright = upright.convert("I").point(lambda value: value / 257).convert("L")
    if upright.has_transparency_data:
        upright = Image.alpha_composite(
            Image.new("RGBA", upright.size, "white"), upright.convert("RGBA")
        )
    if max(upright.size) > max_side:
        upright.thumbnail((max_side, max_side), Image.Resampling.LANCZOS, reducing_gap=3.0)
    upright = upright if upright.mode == "RGB" else upright.convert("RGB")
    pixels = torch.frombuffer(bytearray(upright.tobytes()), dtype=torch.uint8)
    return pixels.view(upright.height, upright.width, 3).permute(2, 0, 1)


def pad(images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Images of any sizes on one zero canvas: (B, 3, H, W) uint8, and their (B, 2) sizes.

    The colours of a pixel are neighbours in memory, as decoding leaves them.
    """
    sizes = torch.tensor([image.shape[1:] for image in images])
    shape = (len(images), *sizes.amax(0).tolist(), 3)
    canvas = torch.zeros(shape, dtype=torch.uint8) if get_worker_info() is None else shared(shape)
    canvas = canvas.permute(0, 3, 1, 2)
    for row, image in zip(canvas, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    return canvas, sizes


def shared(shape: tuple[int, ...]) -> Tensor:
    """Zeros in shared memory, which a worker process hands over without a copy."""
    storage = torch.UntypedStorage._new_shared(math.prod(shape), device="cpu")
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


# ---- a split of a source -------------------------------------------------------------------------


@dataclass
class Batch:
    """Decoded images on a canvas, with their places in the split."""

    images: Tensor  # (B, 3, H, W) uint8
    sizes: Tensor  # (B, 2) true height and width
    indices: Tensor  # (B,) which images these are


@dataclass
class ImageSplit:
    """One split of a source: `encoded[i]` can be decoded; labels where the source has them."""

    name: str
    encoded: Any  # with a length, and an encoded image at each index
    labels: Tensor | None = None  # (N,) int64; (N, C) bool where an image may have several
    classes: tuple[str, ...] = ()
    bad: dict[int, str] = field(default_factory=dict)  # undecodable so far: index to its name
    store: list[Tensor] | Tensor | None = None  # decoded, where that fits in memory
    digest: str = ""  # of the encoded bytes, once eval/features.py has read them all

    def __len__(self) -> int:
        return len(self.encoded)

    def load(self, memory_gb: float) -> str:
        """Decode into memory if that takes under `memory_gb`; one line to describe it all."""
        where = "in memory" if self.into_memory(memory_gb) else "decoded by workers"
        labels = f"{len(self.classes)} classes" if len(self.classes) > 1 else "no labels"
        line = f"{self.name}: {len(self):,} images, {labels}, {where}"
        return f"{line}; {self.report_bad()}" if self.bad else line

    def try_decode(self, index: int) -> Tensor | None:
        image = None
        try:
            image = self.encoded[index]
            return decode(image)
        except Exception as error:
            self.note_bad({index: printable(f"{name_of(image, index)} ({error})")})
            return None

    def note_bad(self, bad: dict[int, str]) -> None:
        """Remember undecodable images.

        Raises:
            UserError: they are more than `MAX_BAD` of the split.
        """
        self.bad.update(bad)
        if len(self.bad) > max(1, MAX_BAD * len(self)):
            raise UserError(
                f"{self.name}: {len(self.bad)} of {len(self)} images cannot be decoded, e.g. "
                f"{next(iter(self.bad.values()))}; at most {MAX_BAD:.0%} are skipped"
            )

    def decode_near(self, index: int) -> tuple[int, Tensor]:
        """The image at `index` or, where that cannot be decoded, the next that can.

        The place of a bad image in the order is kept, so that the batches do not depend on whether
        it was met by a decoding worker or while everything was decoded at the start.
        """
        for shift in range(len(self)):
            i = (index + shift) % len(self)
            image = self.store[i] if self.store is not None else None
            if i not in self.bad:
                image = image if image is not None else self.try_decode(i)
                if image is not None:
                    return i, image
        raise UserError(f"{self.name}: no image can be decoded")

    def into_memory(self, limit_gb: float) -> bool:
        """Decode everything once if the uint8 pixels fit into `limit_gb`; say whether they did."""
        if self.store is not None:
            return True
        probe = range(0, len(self), max(1, len(self) // 32))
        sizes = [image.numel() for i in probe if (image := self.try_decode(i)) is not None]
        if not sizes:
            raise UserError(f"{self.name}: none of {len(probe)} images tried can be decoded")
        if sum(sizes) / len(sizes) * len(self) > limit_gb * 2**30:
            return False
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes without the GIL
            decoded = list(pool.map(self.try_decode, range(len(self))))
        shapes = {image.shape for image in decoded if image is not None}
        if len(shapes) == 1:  # one tensor: a batch is a single gather
            blank = torch.zeros(next(iter(shapes)), dtype=torch.uint8)
            self.store = torch.stack([blank if image is None else image for image in decoded])
        else:
            self.store = [torch.empty(0) if image is None else image for image in decoded]
        return True

    def batch(self, indices: Tensor) -> Batch:
        """The images at `indices`, (B,), each bad one replaced by the next good one."""
        if isinstance(self.store, Tensor) and not self.bad:
            images = self.store[indices]
            return Batch(images, torch.tensor(images.shape[2:]).expand(len(images), 2), indices)
        places, decoded = zip(*map(self.decode_near, indices.tolist()), strict=True)
        return Batch(*pad(decoded), torch.tensor(places))

    def batches(
        self,
        orders: Iterable[Tensor],
        workers: int = 0,
        then: Callable[[int, Batch], Any] | None = None,
    ) -> Iterator[Any]:
        """A `Batch` for each (B,) index tensor: from memory, else from decoding workers.

        Args:
            then: what is made, by the workers, of the i-th batch and handed over in its place.
        """
        if self.store is not None:
            for i, batch in enumerate(map(self.batch, orders)):
                yield then(i, batch) if then else batch
            return
        loader = DataLoader(
            _Decoder(self, then),
            batch_size=None,
            sampler=enumerate(orders),  # each "sample" is a whole batch of indices
            num_workers=workers,
            worker_init_fn=begin_worker,
            pin_memory=torch.cuda.is_available(),
            generator=generator("workers"),  # else it draws from the global random stream
        )
        stream = iter(loader)
        atexit.unregister(end_workers)
        atexit.register(end_workers)  # before DataLoader's own, which waits for each of them
        for made, bad in stream:
            if isinstance(made, UserError):
                raise made
            self.note_bad(bad)
            yield made if then else Batch(*made)

    def report_bad(self) -> str:
        """Counts and names the images left out."""
        names = [self.bad[i] for i in sorted(self.bad)]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        images = "image" if len(names) == 1 else "images"
        return f"{len(names)} undecodable {images} skipped: {'; '.join(names[:3])}{more}"


def begin_worker(worker: int = 0) -> None:
    """Prepare a decoding worker, which ends when its parent has no more work for it.

    SIGTERM and SIGINT are often sent to every process of a job at once; the parent still needs
    batches for the step under way.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    warnings.filterwarnings("ignore", module=r"PIL\.")


def end_workers() -> None:
    """At exit, end the workers of a loader that still waits, as a traceback may hold it."""
    if hasattr(signal, "SIGCHLD"):  # on which DataLoader would raise
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


class _Decoder(Dataset):
    """What a worker process holds: indices in, a `Batch` in parts and the bad images out.

    Or what is to be made of the batch. A `UserError` is handed over, since one raised in a worker
    arrives as a page of traceback.
    """

    def __init__(self, images: ImageSplit, then: Callable[[int, Batch], Any] | None) -> None:
        self.images, self.then = images, then

    def __getitem__(self, item: tuple[int, Tensor]) -> tuple[Any, dict[int, str]]:
        i, indices = item
        try:
            batch = self.images.batch(indices)
        except UserError as error:
            return error, {}
        made = self.then(i, batch) if self.then else (batch.images, batch.sizes, batch.indices)
        return made, self.images.bad


def name_of(image: Any, index: int) -> str:
    path = image.get("path") if isinstance(image, dict) else image
    return str(path) if isinstance(path, (str, Path)) else f"image {index}"


# ---- opening a source ----------------------------------------------------------------------------


def open_images(
    source: str,
    split: str = "train",
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    classes: tuple[str, ...] | None = None,
) -> ImageSplit:
    """Open one split, "train", "test" or "validation" (or by its own name), of `source`.

    Args:
        classes: the class names that labels are to be numbered by (those of the training split).

    Raises:
        UserError: no such source, split or column; no images in it.
    """
    if source == "demo":
        if split not in ("train", "test"):
            raise _NoSplit(f"demo: no split {split!r}; it has train, test")
        pixels, labels = demo.split(split)
        return ImageSplit(f"demo {split}", pixels, labels, demo.CLASSES, store=pixels)
    try:
        path = Path(os.path.expanduser(source))
        pictures = path.is_dir() and next(scan(str(path)), None)
        tables = [] if pictures else find_tables(path)
        if path.is_dir() and not tables:
            return open_folder(path, split, classes)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{source}: no path ({error})") from error
    if tables:
        table = load_tables(path, tables, split)
        return open_table(table, source, image_column, label_column, classes)
    if path.is_file():
        raise UserError(f"{source}: not a folder, a .parquet or an .arrow file")
    if is_hub_id(source):
        return open_table(load_hub(source, split), source, image_column, label_column, classes)
    raise UserError(f"{source}: no such folder or file (nor a Hub id of the form owner/name)")


def open_train_test(source: str, **columns: Any) -> tuple[ImageSplit, ImageSplit]:
    """The two splits an evaluation needs, labelled alike.

    A labelled source without a test split has a fifth held out, and says so in its name.

    Raises:
        UserError: as `open_labelled`.
    """
    train, test = open_labelled(source, **columns)
    return hold_out_fifth(train) if test is None else (train, test)


def hold_out_fifth(train: ImageSplit) -> tuple[ImageSplit, ImageSplit]:
    """Every fifth image of the classes one after the other, so of each class about a fifth.

    No class is lost to training: the only image of one is kept. At least one image is held out.

    Raises:
        UserError: there is one image of each class.
    """
    assert train.labels is not None
    order = torch.arange(len(train))
    if train.labels.ndim == 1:  # of several labels there is no such order
        order = train.labels.argsort(stable=True)
        order = order[train.labels.bincount()[train.labels[order]] > 1]
    if len(order) < 2:
        raise UserError(f"{train.name}: one image of each class; none can be held out to test on")
    held_out = torch.zeros(len(train), dtype=torch.bool)
    held_out[order[4::5] if len(order) > 4 else order[-1:]] = True
    return subset(train, ~held_out, "4/5 of train"), subset(train, held_out, "1/5 of train")


def open_labelled(
    source: str, *, multilabel: bool = False, **columns: Any
) -> tuple[ImageSplit, ImageSplit | None]:
    """The training split and the test split, labelled alike; None where there is no test split.

    Validation is the test split of a source whose test split is missing or has no labels.

    Args:
        several: whether an image may have several labels.

    Raises:
        UserError: no labels, or several of an image, fewer than two classes, or classes in test
            that train lacks.
    """
    train = open_images(source, "train", **columns)
    if train.labels is None:
        raise UserError(
            f"{source}: has no labels; an evaluation needs them (class folders do, or a column of "
            "a table: --label-column NAME)"
        )
    if train.labels.ndim == 2 and not multilabel:
        raise UserError(
            f"{source}: its images have several labels, which eval.transfer alone judges; "
            "for the others name a column of one label an image (--label-column NAME)"
        )
    present = present_in(train.labels)
    if len(present) == 0:
        raise UserError(f"{source}: no image has a label")
    if len(present) < 2:
        only = train.classes[present[0]]
        raise UserError(f"{source}: one class only ({only}); nothing to tell apart")
    test = None
    for split in ("test", "validation"):  # ImageNet's test split has no labels
        with contextlib.suppress(_NoSplit):
            test = open_images(source, split, classes=train.classes, **columns)
            if test.labels is not None:
                break
    if test is None:
        return train, None
    if test.labels is None:
        raise UserError(f"{source}: the test split has no labels")
    trained = {train.classes[i] for i in present}
    if unknown := {test.classes[i] for i in present_in(test.labels)} - trained:
        raise UserError(f"{source}: classes in test but not in train: {', '.join(sorted(unknown))}")
    return train, test


def present_in(labels: Tensor) -> list[int]:
    """The classes that some image is of."""
    return (labels.unique() if labels.ndim == 1 else labels.any(0).nonzero()[:, 0]).tolist()


def open_validation(source: str, classes: tuple[str, ...], **columns: Any) -> ImageSplit | None:
    """The labelled validation split; None where `open_labelled` takes it for the test split."""
    try:
        test = open_images(source, "test", classes=classes, **columns)
        validation = open_images(source, "validation", classes=classes, **columns)
    except _NoSplit:
        return None
    return None if test.labels is None or validation.labels is None else validation


def subset(images: ImageSplit, keep: Tensor, what: str) -> ImageSplit:
    """The images where `keep`, (N,) bool, holds."""
    index = keep.nonzero()[:, 0]
    labels = None if images.labels is None else images.labels[index]
    encoded = Subset(images.encoded, index.tolist())
    return ImageSplit(f"{images.name} ({what})", encoded, labels, images.classes)


class _NoSplit(UserError):
    """The source exists, but not this split of it."""


def find_tables(path: Path) -> list[Path]:
    """The parquet and arrow files that `path` is or holds, hidden ones passed over."""
    if path.is_file():
        return [path] if path.suffix in TABLES else []
    tables = []
    for folder, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        tables += [Path(folder, n) for n in names if n.endswith(TABLES) and not n.startswith(".")]
    return sorted(tables)


def load_tables(path: Path, tables: list[Path], split: str) -> Any:
    """Local parquet or arrow files as a `datasets.Dataset`."""
    import datasets  # slow to import, and the demo does not need it

    datasets.disable_progress_bars()
    selected = of_split(path, tables, split)
    if not selected:
        shown = ", ".join(t.name for t in tables[:4])
        if split != "train":
            raise _NoSplit(f"{path}: no {split!r} among {shown}")
        if any(of_split(path, tables, other) for other in SPLITS):
            way_out = "give one file or, to pretrain, --split NAME"
            raise UserError(f"{path}: no train among {shown}; {way_out}")
    try:
        if (path / "state.json").exists():
            return datasets.load_from_disk(str(path))
        files = [str(t) for t in selected or tables]
        kind = "parquet" if files[0].endswith(".parquet") else "arrow"
        return datasets.load_dataset(kind, data_files=files, split="train")
    except Exception as error:
        raise UserError(f"{path}: {first_line(error)}") from error


def of_split(path: Path, tables: list[Path], split: str) -> list[Path]:
    """The tables below `path` of a split, as named by the file or a folder above it.

    E.g. `data/train-00000-of-00001.parquet` and `default/train/0000.parquet` are of `train`.
    """
    below = {t: t.relative_to(path).parts for t in tables}  # nothing where `path` is the file
    for name in SPLITS.get(split, (split,)):
        selected = [t for t in tables if any(first_word(part) == name for part in below[t])]
        if selected:
            return selected
    return []


def first_word(name: str) -> str:
    return re.split(r"[-_.]", name.lower())[0]


def load_hub(source: str, split: str) -> Any:
    import datasets
    import huggingface_hub

    try:  # what follows this would try again for half a minute
        if not huggingface_hub.constants.HF_HUB_OFFLINE:
            huggingface_hub.HfApi().dataset_info(source, timeout=10)
    except huggingface_hub.errors.HfHubHTTPError:
        pass  # the Hub answers; the call below has the better message
    except Exception as error:
        raise UserError(
            f"{source}: not a local path, and the Hub cannot be reached ({first_line(error)}); "
            "HF_HUB_OFFLINE=1 uses what is in its cache"
        ) from error
    try:
        names = datasets.get_dataset_split_names(source)
        wanted = next((n for n in SPLITS.get(split, (split,)) if n in names), None)
        if wanted is None:
            raise _NoSplit(f"{source}: no split {split!r}; it has {', '.join(names)}")
        return datasets.load_dataset(source, split=wanted)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{source}: not a local path, and the Hub said: {first_line(error)}"
        ) from error


def open_table(
    dataset: Any,
    source: str,
    image_column: str | None,
    label_column: str | None,
    classes: tuple[str, ...] | None,
) -> ImageSplit:
    """Find the image and label columns by their feature types, unless they are named."""
    import datasets

    columns = dataset.features
    for name in (image_column, label_column):
        if name is not None and name not in columns:
            raise UserError(f"{source}: no column {name!r}; it has {', '.join(columns)}")
    pictures = [name for name, kind in columns.items() if is_image(kind)]
    if image_column is None and len(pictures) != 1:
        problem = (
            f"several image columns ({', '.join(pictures)})" if pictures else "no image column"
        )
        raise UserError(f"{source}: {problem} among {', '.join(columns)}; say --image-column NAME")
    image_column = image_column or pictures[0]
    if len(dataset) == 0:
        raise UserError(f"{source}: no images")
    try:
        undecoded = dataset.cast_column(image_column, datasets.Image(decode=False))
    except Exception as error:
        raise UserError(f"{source}: {image_column!r} holds no images") from error
    single = [n for n, kind in columns.items() if isinstance(kind, datasets.Value)]
    if label_column is None:
        classed = [n for n, kind in columns.items() if isinstance(kind, datasets.ClassLabel)]
        usual = ("label", "labels", "fine_label", "class", "target")
        plain = [name for name in usual if name in single]
        lists = [name for name in (*usual, "classes") if list_element(columns.get(name))]
        label_column = next(iter(classed + plain + lists), None)
    elif label_column not in single and not (
        isinstance(columns[label_column], datasets.ClassLabel)
        or list_element(columns[label_column])
    ):
        raise UserError(f"{source}: {label_column!r} holds no labels, a value or a list of values")
    encoded = Cells(undecoded, image_column)
    values: Any = [None] if label_column is None else dataset[label_column][:]
    kind = columns.get(label_column)
    if (inner := list_element(kind)) and None not in values:
        if isinstance(inner, datasets.ClassLabel):
            values = [[inner.names[v] for v in value] for value in values]
            classes = classes or tuple(inner.names)
        return ImageSplit(source, encoded, *encode_multilabels(values, classes))
    if isinstance(kind, datasets.ClassLabel):
        values = [None if v in (None, -1) else kind.names[v] for v in values]  # -1: not known
        classes = classes or tuple(kind.names)
    if None in values:
        return ImageSplit(source, encoded)
    return ImageSplit(source, encoded, *encode_labels(values, classes))


class Cells:
    """One column of a table, read cell by cell, twenty times as fast as by `datasets` itself."""

    def __init__(self, dataset: Any, column: str) -> None:
        self.table, self.column = dataset.select_columns(column).with_format("arrow"), column

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Any:
        return self.table[index][self.column][0].as_py()


def list_element(kind: Any) -> Any:
    """What a column of lists holds lists of, if that can be labels, else None."""
    import datasets

    inner = getattr(kind, "feature", None)  # of List, and of Sequence in older versions
    return inner if isinstance(inner, datasets.Value | datasets.ClassLabel) else None


def is_image(kind: Any) -> bool:
    """An Image feature, or the struct of bytes and path that plain parquet files keep of one."""
    import datasets

    return isinstance(kind, datasets.Image) or (isinstance(kind, dict) and "bytes" in kind)


def open_folder(root: Path, split: str, classes: tuple[str, ...] | None) -> ImageSplit:
    """Images at any depth under the split's folder, or under `root` where there are no splits.

    Labels are the first-level folders when there are images in at least one of them and none
    beside them; otherwise the source is unlabelled.
    """
    folders = [p for p in sorted(root.iterdir()) if p.is_dir()]
    matching = [p for n in SPLITS.get(split, (split,)) for p in folders if p.name.lower() == n]
    is_split = {name for names in SPLITS.values() for name in names}
    if not matching and split != "train":
        raise _NoSplit(f"{root}: no {split!r} folder in it")
    if not matching and any(p.name.lower() in is_split for p in folders):
        raise UserError(f"{root}: it has {', '.join(p.name for p in folders)} but no train folder")
    base = matching[0] if matching else root
    paths = sorted(scan(str(base)))
    if not paths:
        kinds = " ".join(sorted(SUFFIXES))
        raise UserError(f"{base}: no images in it, at any depth (looked for {kinds})")
    parts = [path.removeprefix(str(base)).lstrip(os.sep).split(os.sep, 1) for path in paths]
    if any(len(below) == 1 for below in parts):
        return ImageSplit(str(base), paths)
    labels, names = encode_labels([below[0] for below in parts], classes)
    return ImageSplit(str(base), paths, labels, names)


def scan(folder: str, above: frozenset[str] = frozenset()) -> Iterator[str]:
    """Paths of the image files below `folder`; hidden ones are passed over, links are followed."""
    here = os.path.realpath(folder)
    if here in above:  # a link to a folder that holds it
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from scan(entry.path, above | {here})
            elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:
                yield entry.path


def encode_labels(
    values: Sequence[Any], classes: tuple[str, ...] | None
) -> tuple[Tensor, tuple[str, ...]]:
    """Label values of a kind to (N,) int64 and their names, in the order of `classes` if given."""
    present = sorted(set(values))
    names = [str(value) for value in present]
    order = list(classes or names)
    order += [name for name in names if name not in order]
    place = {value: order.index(name) for value, name in zip(present, names, strict=True)}
    return torch.tensor([place[value] for value in values]), tuple(order)


def encode_multilabels(
    values: Sequence[Sequence[Any]], classes: tuple[str, ...] | None
) -> tuple[Tensor, tuple[str, ...]]:
    """Lists of label values to (N, C) bool and the names of the C classes, ordered as `number`."""
    flat, names = encode_labels([value for labels in values for value in labels], classes)
    image = torch.arange(len(values)).repeat_interleave(torch.tensor([len(v) for v in values]))
    labels = torch.zeros(len(values), len(names), dtype=torch.bool)
    labels[image, flat.long()] = True
    return labels, names
