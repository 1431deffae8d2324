"""When images are the same: by names and sizes in order, times for caches alone, bytes if asked."""

import os
import shutil

import pytest
import torch
from datasets import Dataset, Features, Image, Value
from torch import nn

from common.data import ImageSplit, open_images, subset
from eval import identity
from eval.encoder import Preprocess
from eval.features import digest_of
from eval.identity import content_of, identity_of

GIVEN = Preprocess(8)


def folder(path, contents, time=10**18):
    path.mkdir(parents=True)
    for name, content in contents.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(content)
        os.utime(path / name, ns=(0, time))
    return path


def table(path, cells):
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = Features({"image": Image(decode=False), "label": Value("int64")})
    rows = {"image": [{"bytes": cell, "path": None} for cell in cells], "label": [0] * len(cells)}
    Dataset.from_dict(rows, features=kinds).to_parquet(path)
    return path


def known(path, **how):
    return identity_of(open_images(str(path)), **how)


def test_a_folder_is_its_names_and_sizes_in_order(tmp_path):
    one = folder(tmp_path / "one", {"a/x.png": b"12", "b/y.png": b"345"})
    others = [
        folder(tmp_path / "renamed", {"a/x.png": b"12", "b/z.png": b"345"}),
        folder(tmp_path / "moved", {"a/x.png": b"12", "c/y.png": b"345"}),
        folder(tmp_path / "longer", {"a/x.png": b"123", "b/y.png": b"345"}),
        folder(tmp_path / "fewer", {"a/x.png": b"12"}),
    ]
    assert len({known(path) for path in (one, *others)}) == 5
    images = open_images(str(one))
    turned = ImageSplit("x", images.encoded[::-1])
    assert identity_of(turned) != identity_of(images)


def test_a_copy_elsewhere_at_another_time_is_the_same(tmp_path):
    one = folder(tmp_path / "one", {"a.png": b"12", "b.png": b"34"})
    before, with_times = known(one), known(one, times=True)
    copy = folder(tmp_path / "deep" / "copy", {"a.png": b"12", "b.png": b"34"}, time=10**17)
    assert known(copy) == before
    assert known(copy, times=True) != with_times  # what is cached is made again
    assert known(shutil.move(one, tmp_path / "moved"), times=True) == with_times


def test_a_rewritten_file_of_equal_size_and_time_shows_in_its_bytes_alone(tmp_path):
    one = folder(tmp_path / "one", {"a.png": b"12", "b.png": b"34"})
    other = folder(tmp_path / "other", {"a.png": b"12", "b.png": b"35"})
    assert known(one, times=True) == known(other, times=True)
    assert known(one, content=True) != known(other, content=True)


def test_a_table_is_the_end_of_its_file(tmp_path):
    one = table(tmp_path / "one" / "t.parquet", [b"12", b"34"])
    other = table(tmp_path / "other" / "t.parquet", [b"12", b"35"])
    copy = shutil.copy(one, tmp_path / "t.parquet")
    assert known(one) == known(copy) != known(other)
    assert known(one, content=True) == known(copy, content=True) != known(other, content=True)


def test_a_part_is_known_by_what_it_takes(tmp_path):
    paths = folder(tmp_path / "one", {f"{i}.png": b"1" for i in range(4)})
    images = open_images(str(paths))
    first, last = (subset(images, torch.tensor(k).bool(), "") for k in ([1, 0, 0, 0], [0, 0, 0, 1]))
    assert len({identity_of(part) for part in (images, first, last)}) == 3


def test_images_in_memory_are_known_by_their_pixels():
    pixels = torch.arange(12, dtype=torch.uint8)
    tensors = [pixels.view(1, 3, 2, 2), pixels.view(1, 3, 1, 4), pixels.flip(0).view(1, 3, 2, 2)]
    assert len({identity_of(ImageSplit("x", tensor)) for tensor in tensors}) == 3
    assert identity_of(ImageSplit("y", tensors[0].clone())) == identity_of(
        ImageSplit("x", tensors[0])
    )


def test_the_bytes_of_files_and_cells(tmp_path):
    path = folder(tmp_path / "one", {"a.png": b"12"}) / "a.png"
    cells = [path, str(path), {"bytes": None, "path": str(path)}, {"bytes": b"12", "path": None}]
    assert {content_of(cell) for cell in cells} == {b"12"}


@pytest.mark.parametrize("kind", ["missing", "folder", "fifo", "dead link", "empty cell"])
@pytest.mark.parametrize("content", [False, True])
def test_what_is_no_file_is_not_waited_for(tmp_path, kind, content):
    path = tmp_path / "a.png"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "dead link":
        path.symlink_to(tmp_path / "b.png")
    cell = {"bytes": None, "path": None} if kind == "empty cell" else str(path)
    assert identity_of(ImageSplit("x", [cell, cell]), content=content)
    assert content_of(cell) == b""


def test_only_what_is_asked_for_is_read_and_once(tmp_path, monkeypatch):
    images = open_images(str(folder(tmp_path / "one", {f"{i:04}.png": b"1" for i in range(2050)})))
    read = []
    monkeypatch.setattr(identity, "content_of", lambda image: read.append(image) or b"1")
    assert digest_of(nn.Identity(), GIVEN, images) == digest_of(nn.Identity(), GIVEN, images)
    assert read == []
    for _ in range(2):
        digest_of(nn.Identity(), GIVEN, images, content=True)
    assert sorted(read) == images.encoded
    assert digest_of(nn.Flatten(), GIVEN, images) != digest_of(nn.Identity(), GIVEN, images)
