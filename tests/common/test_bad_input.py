"""A folder as people have them: every odd kind of file among good images, trained on as it is."""

import json
import math
import os
import re
import socket
import struct
import subprocess
import sys
import time
import zlib
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image

from common import augment
from common.augment import Batched
from common.data import ImageSplit, decode, open_images, pad
from common.errors import UserError
from common.plan import plan_of
from simclr.augment import views
from simclr.config import CIFAR10

pytestmark = pytest.mark.filterwarnings("ignore:Image size")  # which commands silence
ROOT = Path(__file__).resolve().parents[2]
GOOD = 180
NAMES = [  # of files and one folder, in many scripts
    "naïve café.png", "猫の写真.png", "Ёж 1.png", "صورة.png", "תמונה.png", "ภาพ.png", "चित्र.png",
    "🐈.png", "a'b\"c;$(rm).png", "-rf.png", "%s%d.png", "two\nlines.png", "\x1b[31mred.png",
    "e\u0301.png", "UPPER.PNG", "x" * 240 + ".png", "folder.jpg/inside.png",
]  # fmt: skip
BAD = {  # file: what is said of it
    "truncated.jpg": "truncated",
    "empty.jpg": "cannot identify",
    "text.png": "cannot identify",
    "pipe.jpg": "not a file",
    "socket.jpg": "not a file",
    "dead link.jpg": "no such file",
    "144 megapixels.png": "144,000,000 pixels",
    "20000x20000.png": "exceeds limit",
}
UNREADABLE = Path("/proc/self/mem")  # not even by root, who may read what others may not
if UNREADABLE.exists():
    BAD["unreadable.jpg"] = "Input/output error"


def noise(seed, height=12, width=12, channels=3):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def png_of_size(width, height):
    """The head of a gray PNG that claims a size, and nothing behind it."""

    def chunk(name, content):
        crc = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + crc

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0"))


def odd_but_good(folder):
    """Kinds of images other than 8-bit RGB; how many."""
    exif, gray = Image.Exif(), Image.fromarray(noise(1, channels=1))
    exif[0x0112] = 6
    colour = Image.fromarray(noise(2))
    frames = [Image.fromarray(noise(i)) for i in range(3)]
    deep = Image.fromarray(noise(3, channels=1).astype(np.uint16) * 257)
    before = len(list(folder.iterdir()))
    colour.convert("CMYK").save(folder / "cmyk.jpg")
    deep.save(folder / "deep.png")
    deep.save(folder / "deep.tif")
    colour.quantize(9).save(folder / "palette.png")
    colour.quantize(9).save(folder / "clear palette.png", transparency=bytes(range(9)))
    gray.save(folder / "gray.jpg")
    Image.fromarray(noise(4, channels=1) > 99).save(folder / "bits.png")
    Image.fromarray(noise(5, channels=4)).save(folder / "alpha.png")
    gray.convert("LA").save(folder / "gray alpha.png")
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    frames[0].save(folder / "pages.tiff", save_all=True, append_images=frames[1:])
    frames[0].save(folder / "moving.webp", save_all=True, append_images=frames[1:])
    colour.save(folder / "turned.jpg", exif=exif)
    Image.new("L", (12_000, 12_000), 90).save(folder / "144 megapixels.jpg")
    for width, height in ((1, 1), (1, 100), (2000, 1)):
        Image.fromarray(noise(6, height, width)).save(folder / f"{width} by {height}.png")
    return len(list(folder.iterdir())) - before


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("found")
    for i in range(GOOD):
        Image.fromarray(noise(i)).save(folder / f"{i:03}.png")
    (folder / "folder.jpg").mkdir()
    for i, name in enumerate(NAMES):
        Image.fromarray(noise(i)).save(folder / name, "PNG")
    assert odd_but_good(folder) == 17
    (folder / "loop").symlink_to(folder)
    (folder / "folder.jpg" / "loop").symlink_to(folder / "folder.jpg")
    (folder / "link.png").symlink_to(folder / "000.png")

    (folder / "truncated.jpg").write_bytes((folder / "turned.jpg").read_bytes()[:-20])
    (folder / "empty.jpg").touch()
    (folder / "text.png").write_text("this is no image")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "dead link.jpg").symlink_to(folder / "gone")
    (folder / "144 megapixels.png").write_bytes(png_of_size(12_000, 12_000))
    (folder / "20000x20000.png").write_bytes(png_of_size(20_000, 20_000))
    if UNREADABLE.exists():
        (folder / "unreadable.jpg").symlink_to(UNREADABLE)
    listener, here = socket.socket(socket.AF_UNIX), Path.cwd()
    os.chdir(folder)  # the path of a socket may be no longer than 107 bytes
    listener.bind("socket.jpg")
    os.chdir(here)
    yield folder
    listener.close()


COUNT = GOOD + len(NAMES) + 17 + 1 + len(BAD)


def train(folder, out, *more):
    """The real command, a batch of 64 through every image; what it says on the console."""
    settings = {
        "data": folder, "out": out, "arch": "demo", "image-size": 24, "blur": 1.0, "batch-size": 64,
        "epochs": 1, "warmup-epochs": 0, "log-every": 1, "knn-every": 1,
    }  # fmt: skip
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "simclr.pretrain", "demo", *flags, *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_a_folder_of_everything_is_trained_on_in_memory_and_by_workers(folder, tmp_path):
    stored = train(folder, tmp_path / "stored")
    by_workers = train(folder, tmp_path / "workers", "--memory-gb", "0", "--workers", "2")
    count = f"{COUNT} images, no labels"
    skipped = f"{len(BAD)} undecodable images skipped: "
    assert f"{count}, in memory; {skipped}" in stored
    assert f"{count}, decoded by workers" in by_workers
    for said in (stored, by_workers):
        last = said[said.rindex(skipped) :].split("\n")[0]
        assert f"and {len(BAD) - 3} more" in last and "(" in last
        assert "no online kNN: " in said and "Warning" not in said
        assert not re.search("PIL|Warning|Traceback|exif", said), said
        assert len(said) < 4_000
    lines = (tmp_path / "stored" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == COUNT // 64 + 1 and all(math.isfinite(row["loss"]) for row in rows)
    metrics = [(tmp_path / run / "metrics.jsonl").read_bytes() for run in ("stored", "workers")]
    assert metrics[0] == metrics[1]


def test_every_bad_file_is_named_with_its_reason_and_nothing_else_is_bad(folder):
    images = open_images(str(folder))
    assert len(images) == COUNT
    began = time.perf_counter()
    images.into_memory(1.0)
    assert time.perf_counter() - began < 20  # nobody waits for a pipe
    said = {
        Path(images.encoded[i]).name: line.removeprefix(images.encoded[i])
        for i, line in images.bad.items()
    }
    assert said.keys() == BAD.keys()
    for name, reason in BAD.items():
        assert reason in said[name], (name, said[name])
        assert said[name].isprintable()


@pytest.mark.parametrize("kind", ["pipe.jpg", "socket.jpg", "dead link.jpg", "folder.jpg"])
def test_what_is_no_file_is_refused_at_once(folder, kind):
    for given in (folder / kind, str(folder / kind), {"bytes": None, "path": str(folder / kind)}):
        with pytest.raises(OSError, match=r"not a file|no such file"):
            decode(given)


def test_a_name_cannot_break_the_line_or_command_the_terminal(tmp_path):
    for i in range(40):
        Image.fromarray(noise(i)).save(tmp_path / f"{i:02}.png")
    (tmp_path / "a\nb\x1b[2J\u202egnp.png").touch()
    images = open_images(str(tmp_path))
    line = images.load(1.0)
    assert line.isprintable() and "; 1 undecodable image skipped: " in line
    assert "a\ufffdb\ufffd[2J\ufffd" in line


def test_a_jpeg_is_reduced_before_its_pixels_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700 * 700)
    Image.new("RGB", (950, 950), "red").save(tmp_path / "a.jpg")
    assert decode(tmp_path / "a.jpg", max_side=400).shape == (3, 400, 400)
    Image.new("RGB", (950, 950), "red").save(tmp_path / "a.png")
    with pytest.raises(OSError, match="902,500 pixels; reduce it first"):
        decode(tmp_path / "a.png", max_side=400)
    Image.new("RGB", (1000, 1000)).save(tmp_path / "b.jpg")  # twice the limit, for any kind
    with pytest.raises(Image.DecompressionBombError):
        decode(tmp_path / "b.jpg", max_side=400)


def test_an_image_that_cannot_be_fetched_is_a_bad_one():
    class Cells:
        def __len__(self):
            return 40

        def __getitem__(self, index):
            if index == 7:
                raise ValueError("damaged row")
            return torch.full((3, 2, 2), index, dtype=torch.uint8)

    images = ImageSplit("table", Cells())
    assert images.batch(torch.tensor([7])).indices.tolist() == [8]
    assert images.bad == {7: "image 7 (damaged row)"}


def test_images_of_one_pixel_go_through_every_view():
    sizes = [(1, 1), (1, 50), (50, 1), (2, 3)]
    canvas, sizes = pad([torch.full((3, *size), 200, dtype=torch.uint8) for size in sizes])
    for transform in views(replace(CIFAR10, blur=1.0, image_size=40)):
        program = Batched(transform)
        draws = torch.rand(4, program.draws, dtype=torch.float64)
        shown = program(canvas, draws, sizes)
        assert shown.shape == (4, 3, 40, 40) and shown.isfinite().all()
        assert (shown - shown[:, :, :1, :1]).abs().max() < 1e-5  # one colour stays one colour
    boxes = augment.center_crop_boxes(sizes, 0.875)
    assert (boxes[:, 2:] >= 1).all() and (boxes[:, :2] >= 0).all()


# ---- tables and the Hub --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        ([{"bytes": "words", "path": "a"}] * 3, r"2 of 3 images .* a \("),
        ([{"bytes": None, "path": "/dev/zero"}] * 3, r"2 of 3 images .* \(not a file\)"),
        ([{"bytes": None, "path": None}] * 3, r"2 of 3 images .* image 0 \(an empty cell\)"),
        ([None, {"bytes": b"", "path": ""}, None], r"2 of 3 images .* image 0 \(an empty cell\)"),
        ([{"bytes": 7, "path": None}] * 3, "2 of 3 images|holds no images"),
        ([[1, 2], [3], []], "no image column among image"),
        ([b"png"] * 3, "no image column among image"),
        (["a.png"] * 3, "no image column among image"),
    ],
)
def test_tables_of_another_schema_are_one_line(tmp_path, cells, said):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"image": cells}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=said) as caught:
        open_images(str(tmp_path / "a.parquet")).load(1.0)
    assert "\n" not in str(caught.value)


def test_a_hub_that_cannot_be_reached_is_said_at_once(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    began = time.perf_counter()
    with pytest.raises(UserError, match="nobody/nothing: not a local path, and the Hub cannot be"):
        plan_of("nobody/nothing")
    assert time.perf_counter() - began < 5


def test_a_hub_that_answers_is_left_to_say_what_is_wrong(monkeypatch):
    import datasets

    class Answered(huggingface_hub.errors.HfHubHTTPError):
        def __init__(self):
            Exception.__init__(self, "404")

    def dataset_info(*args, **kwargs):
        raise Answered

    def split_names(source):
        raise FileNotFoundError(f"{source} is not on the Hub")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(datasets, "get_dataset_config_names", split_names)
    with pytest.raises(UserError, match="nobody/nothing is not on the Hub"):
        plan_of("nobody/nothing")
