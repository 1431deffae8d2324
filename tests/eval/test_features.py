"""What a key of kept features depends on: the bytes of the images, and nothing else of them."""

import os
import shutil

import pytest
import torch
from torch import nn

from common.data import ImageSplit, open_images
from eval import features
from eval.encoder import Preprocess
from eval.features import content_of, digest_of

GIVEN = Preprocess(8)


def folder(path, contents):
    path.mkdir(parents=True)
    for name, content in contents.items():
        (path / name).write_bytes(content)
        os.utime(path / name, ns=(0, 10**18))
    return path


def digest(path):
    return digest_of(nn.Identity(), GIVEN, open_images(str(path)))


def test_other_bytes_of_the_same_name_size_and_time_are_other_images(tmp_path):
    one = folder(tmp_path / "one" / "x", {"a.png": b"12", "b.png": b"34"})
    other = folder(tmp_path / "other" / "x", {"a.png": b"12", "b.png": b"35"})
    turned = folder(tmp_path / "turned" / "x", {"a.png": b"34", "b.png": b"12"})
    assert len({digest(path) for path in (one, other, turned)}) == 3


def test_the_same_bytes_elsewhere_at_another_time_are_the_same_images(tmp_path):
    one = folder(tmp_path / "one", {"a.png": b"12", "b.png": b"34"})
    before = digest(one)
    (one / "a.png").touch()
    assert digest(one) == before
    assert digest(shutil.move(one, tmp_path / "moved")) == before
    renamed = folder(tmp_path / "renamed", {"y.jpg": b"12", "z.jpg": b"34"})
    assert digest(renamed) == before


def test_images_in_files_in_cells_and_as_tensors(tmp_path):
    path = folder(tmp_path / "one", {"a.png": b"12"}) / "a.png"
    cells = [path, str(path), {"bytes": None, "path": str(path)}, {"bytes": b"12", "path": None}]
    assert len({content_of(ImageSplit("x", [cell])) for cell in cells}) == 1
    pixels = torch.arange(12, dtype=torch.uint8)
    tensors = [pixels.view(1, 3, 2, 2), pixels.view(1, 3, 1, 4), pixels.flip(0).view(1, 3, 2, 2)]
    assert len({content_of(ImageSplit("x", tensor)) for tensor in tensors}) == 3


@pytest.mark.parametrize("kind", ["missing", "folder", "fifo", "dead link", "empty cell"])
def test_what_is_no_file_is_not_waited_for(tmp_path, kind):
    path = tmp_path / "a.png"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "dead link":
        path.symlink_to(tmp_path / "b.png")
    cell = {"bytes": None, "path": None} if kind == "empty cell" else str(path)
    assert content_of(ImageSplit("x", [cell, cell])) == content_of(ImageSplit("x", [tmp_path] * 2))


def test_images_are_read_once(tmp_path, monkeypatch):
    images = open_images(str(folder(tmp_path / "one", {f"{i:04}.png": b"1" for i in range(2050)})))
    read, content = [], features.content
    monkeypatch.setattr(features, "content", lambda image: read.append(image) or content(image))
    assert digest_of(nn.Identity(), GIVEN, images) == digest_of(nn.Identity(), GIVEN, images)
    assert sorted(read) == images.encoded
    assert digest_of(nn.Flatten(), GIVEN, images) != digest_of(nn.Identity(), GIVEN, images)
