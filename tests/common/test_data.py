"""Images in: every kind of source, every kind of file, bad files, and an order of one's own."""

import functools
import io
import os
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from common import data, formats
from common.config import SourceConfig
from common.data import (
    MAX_SIDE,
    ImageSplit,
    batch_indices,
    decode,
    epoch_order,
    generator,
    open_images,
)
from common.errors import UserError
from common.formats import plain_jpeg, read
from common.plan import plan_of
from eval import splits
from eval.splits import hold_out_fifth
from tests.helpers import IMAGES

REAL = IMAGES


def open_labelled(source, multilabel=False, **how):
    return splits.open_labelled(plan_of(source, SourceConfig(**how)), multilabel=multilabel)


def open_train_test(source, **how):
    return splits.open_train_test(plan_of(source, SourceConfig(**how)))


def open_validation(source, train):
    plan = plan_of(source)
    return splits.open_validation(plan, *splits.open_train_test(plan))


def pixels(seed, height=8, width=8):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write(path, seed=0, height=8, width=8):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(seed, height, width)).save(path)
    return path


def encoded(seed=0, kind="PNG", **size):
    file = io.BytesIO()
    Image.fromarray(pixels(seed, **size)).save(file, kind)
    return file.getvalue()


def said(caught):
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- folders -------------------------------------------------------------------------------------


def test_a_flat_folder_has_no_labels(tmp_path):
    for i, name in enumerate(
        ["b.png", "a.JPG", "c.webp", "d.jpeg", "e.bmp", "f.tiff", ".hidden.png"]
    ):
        write(tmp_path / name, i)
    (tmp_path / "notes.txt").write_text("not an image")
    images = open_images(str(tmp_path))
    assert [Path(p).name for p in images.encoded] == [
        "a.JPG", "b.png", "c.webp", "d.jpeg", "e.bmp", "f.tiff",
    ]  # fmt: skip
    assert images.labels is None and images.classes == ()
    assert torch.equal(
        images.batch(torch.tensor([1])).images[0], torch.tensor(pixels(0)).permute(2, 0, 1)
    )
    with pytest.raises(UserError, match="no labels"):
        open_train_test(str(tmp_path))


def test_class_folders_at_any_depth(tmp_path):
    write(tmp_path / "cat" / "1.png")
    write(tmp_path / "cat" / "deep" / "er" / "2.png")
    write(tmp_path / "ant" / "x" / "3.png")
    (tmp_path / "empty").mkdir()
    images = open_images(str(tmp_path))
    assert images.classes == ("ant", "cat") and images.labels.tolist() == [0, 1, 1]
    for spelt in (f"{tmp_path}/", f"{tmp_path}/../{tmp_path.name}"):
        assert open_images(spelt).labels.tolist() == [0, 1, 1]


def test_class_folders_of_the_working_directory(tmp_path, monkeypatch):
    write(tmp_path / "b" / "1.png")
    write(tmp_path / "a" / "2.png")
    monkeypatch.chdir(tmp_path)
    assert open_images(".").classes == ("a", "b")


def test_images_beside_class_folders_mean_no_labels(tmp_path):
    write(tmp_path / "cat" / "1.png")
    write(tmp_path / "loose.png")
    images = open_images(str(tmp_path))
    assert len(images) == 2 and images.labels is None


@pytest.mark.parametrize("train", ["train", "Training"])
@pytest.mark.parametrize("test", ["test", "testing", "validation", "Val", "valid"])
def test_split_folders(tmp_path, train, test):
    for name, count in ((train, 3), (test, 2)):
        for label in ("x", "y"):
            for i in range(count):
                write(tmp_path / name / label / f"{i}.png", i)
    first, second = open_train_test(str(tmp_path))
    assert (len(first), len(second)) == (6, 4)
    assert first.classes == second.classes == ("x", "y")
    assert len(open_images(str(tmp_path), test.lower())) == 4


def test_test_comes_before_validation(tmp_path):
    for name, count in (("train", 2), ("validation", 3), ("test", 4)):
        for i in range(count):
            write(tmp_path / name / "ab"[i % 2] / f"{i}.png")
    assert [len(part) for part in open_train_test(str(tmp_path))] == [2, 4]
    assert len(open_images(str(tmp_path), "validation")) == 3
    assert len(open_validation(str(tmp_path), open_images(str(tmp_path)))) == 3


@pytest.mark.parametrize("name", ["validation", "valid", "val"])
def test_validation_is_not_test_as_well(tmp_path, name):
    for split, count in (("train", 2), (name, 4)):
        for i in range(count):
            write(tmp_path / split / "ab"[i % 2] / f"{i}.png")
    train, test = open_train_test(str(tmp_path))
    assert len(test) == 4 and open_validation(str(tmp_path), train) is None
    write(tmp_path / "test" / "a" / "0.png")
    assert len(open_train_test(str(tmp_path))[1]) == 1
    assert len(open_validation(str(tmp_path), train)) == 4


def test_the_demo_has_no_validation_split():
    train, test = open_train_test("demo")
    assert (len(train), len(test)) == (5120, 2000)
    assert open_validation("demo", train) is None


def test_without_a_test_folder_every_fifth_image_is_held_out(tmp_path):
    for i in range(10):
        write(tmp_path / "ab"[i // 5] / f"{i}.png", i)
    train, test = open_train_test(str(tmp_path))
    assert [Path(p).stem for p in test.encoded] == ["4", "9"]
    assert [Path(p).stem for p in train.encoded] == list("01235678")
    assert test.labels.tolist() == [0, 1] and train.labels.tolist() == [0] * 4 + [1] * 4
    assert "1/5 of train" in test.name and "4/5 of train" in train.name


def labelled(labels):
    count, classes = len(labels), tuple("abcdefgh"[: max(labels) + 1])
    return ImageSplit("x", torch.arange(count), torch.tensor(labels), classes)


@pytest.mark.parametrize(
    ("labels", "held_out"),
    [
        ([i % 5 for i in range(25)], [20, 21, 22, 23, 24]),  # not all of class 4
        ([0, 1, 0, 0, 2, 0, 0], [6]),  # the fifth of class 0; 1 and 2 have one image each
        ([0, 1] * 5, [8, 9]),
        ([0, 0, 1], [1]),  # fewer than five
        ([0, 0, 1, 1, 2, 2, 3, 3], [4]),  # fewer than five of each class
    ],
)
def test_a_fifth_of_each_class_is_held_out(labels, held_out):
    train, test = hold_out_fifth(labelled(labels))
    assert [int(i) for i in test.encoded] == held_out
    assert len(train) + len(test) == len(labels)
    assert set(train.labels.tolist()) == set(labels)


def test_where_no_image_can_be_held_out():
    with pytest.raises(UserError, match="x: one image of each class"):
        hold_out_fifth(labelled([0, 1, 2]))
    with pytest.raises(UserError, match="none can be held out"):
        hold_out_fifth(ImageSplit("x", torch.arange(1), torch.ones(1, 2, dtype=torch.bool)))


def test_a_test_folder_without_a_train_folder_is_refused(tmp_path):
    write(tmp_path / "test" / "a" / "1.png")
    with pytest.raises(UserError, match="no train among test; --split NAME"):
        open_images(str(tmp_path))


def test_classes_are_numbered_by_the_training_split(tmp_path):
    for name in ("ant", "bee", "cow"):
        write(tmp_path / "train" / name / "1.png")
    write(tmp_path / "test" / "cow" / "1.png")
    write(tmp_path / "test" / "bee" / "1.png")
    train, test = open_train_test(str(tmp_path))
    assert train.classes == test.classes == ("ant", "bee", "cow")
    assert test.labels.tolist() == [1, 2]


def test_classes_that_train_lacks_are_named(tmp_path):
    for name in ("train/ant", "train/bee", "test/ant", "test/yak"):
        write(tmp_path / name / "1.png")
    with pytest.raises(UserError, match="not in train: yak"):
        open_train_test(str(tmp_path))


def test_one_class_only(tmp_path):
    write(tmp_path / "only" / "1.png")
    assert open_images(str(tmp_path)).classes == ("only",)
    with pytest.raises(UserError, match=r"one class only \(only\)"):
        open_train_test(str(tmp_path))


def test_no_images_and_no_such_path(tmp_path):
    (tmp_path / "empty" / "below").mkdir(parents=True)
    (tmp_path / "file.zip").write_bytes(b"")
    with pytest.raises(UserError, match="no images in it") as caught:
        open_images(str(tmp_path / "empty"))
    assert ".png" in said(caught)
    with pytest.raises(UserError, match="no such folder or file"):
        open_images(str(tmp_path / "missing"))
    with pytest.raises(UserError, match="no path"):
        open_images("~\0")
    with pytest.raises(UserError, match=r"not a folder, a \.parquet"):
        open_images(str(tmp_path / "file.zip"))


def test_links_are_followed_and_loops_do_not_hang(tmp_path):
    write(tmp_path / "elsewhere" / "1.png")
    write(tmp_path / "root" / "a" / "2.png")
    (tmp_path / "root" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "a" / "up").symlink_to(tmp_path / "root")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "root" / "a")
    names = {Path(p).name for p in open_images(str(tmp_path / "root")).encoded}
    assert names == {"1.png", "2.png"}


def scan_seconds(folder, count):
    for start in range(0, count, 1000):
        below = folder / f"{start // 1000:03}"
        below.mkdir()
        for i in range(start, start + 1000):
            os.close(os.open(below / f"{i}.jpg", os.O_CREAT))
    began = time.perf_counter()
    images = open_images(str(folder))
    seconds = time.perf_counter() - began
    assert len(images) == count and len(images.classes) == count // 1000
    print(f"{count:,} files scanned in {seconds:.2f} s")
    return seconds


def test_many_files_are_scanned_quickly(tmp_path):
    assert scan_seconds(tmp_path, 20_000) < 3


@pytest.mark.slow
def test_a_hundred_thousand_files_are_scanned_quickly(tmp_path):
    assert scan_seconds(tmp_path, 100_000) < 15


# ---- tables --------------------------------------------------------------------------------------

ENCODED = [{"bytes": encoded(i), "path": None} for i in range(6)]
LABELS = [2, 0, 1, 2, 0, 1]


def table(columns, **features):
    kinds = {"image": datasets.Image(), "label": datasets.Value("int64")} | features
    return datasets.Dataset.from_dict(
        columns, datasets.Features({name: kinds[name] for name in columns})
    )


def parquet(path, columns=None, **features):
    path.parent.mkdir(parents=True, exist_ok=True)
    table(columns or {"image": ENCODED, "label": LABELS}, **features).to_parquet(path)
    return str(path)


def same_pixels(images):
    shown = images.batch(torch.arange(len(images))).images
    expected = [torch.tensor(pixels(i)).permute(2, 0, 1) for i in range(len(images))]
    return torch.equal(shown, torch.stack(expected))


def test_parquet_with_an_image_feature(tmp_path):
    images = open_images(parquet(tmp_path / "any.parquet"))
    assert same_pixels(images)
    assert images.labels.tolist() == LABELS and images.classes == ("0", "1", "2")


@pytest.mark.parametrize("fields", [{"bytes", "path"}, {"bytes"}])
def test_parquet_with_a_plain_struct(tmp_path, fields):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{k: v for k, v in image.items() if k in fields} for image in ENCODED]
    kind = pa.struct(
        {"bytes": pa.binary(), "path": pa.string()} if "path" in fields else {"bytes": pa.binary()}
    )
    pq.write_table(pa.table({"img": pa.array(rows, kind), "label": LABELS}), tmp_path / "a.parquet")
    images = open_images(str(tmp_path / "a.parquet"))
    assert same_pixels(images) and images.labels.tolist() == LABELS


def test_parquet_with_plain_bytes_if_the_column_is_named(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = pa.array([image["bytes"] for image in ENCODED], pa.binary())
    pq.write_table(pa.table({"raw": rows}), tmp_path / "a.parquet")
    path = str(tmp_path / "a.parquet")
    assert same_pixels(open_images(path, image_column="raw"))
    with pytest.raises(UserError, match="no image column among raw; say --image-column"):
        open_images(path)


@pytest.mark.parametrize(
    ("values", "kind", "names", "numbers"),
    [
        ([10, 9, 10, 2, 9, 2], "int64", ("2", "9", "10"), [2, 1, 2, 0, 1, 0]),
        (["b", "a", "b", "c", "a", "c"], "string", ("a", "b", "c"), [1, 0, 1, 2, 0, 2]),
        ([True, False] * 3, "bool", ("False", "True"), [1, 0] * 3),
    ],
)
def test_labels_of_any_kind(tmp_path, values, kind, names, numbers):
    columns = {"image": ENCODED, "label": values}
    images = open_images(parquet(tmp_path / "a.parquet", columns, label=datasets.Value(kind)))
    assert images.classes == names and images.labels.tolist() == numbers


def test_class_labels_keep_their_names_and_order(tmp_path):
    kind = datasets.ClassLabel(names=["zebra", "ant", "yak", "unused"])
    columns = {"image": ENCODED, "kind": LABELS}
    images = open_images(parquet(tmp_path / "a.parquet", columns, kind=kind))
    assert images.classes == ("zebra", "ant", "yak", "unused")
    assert images.labels.tolist() == LABELS


def test_a_test_table_in_another_order_of_names_is_numbered_by_train(tmp_path):
    for split, names in (("train", ["b", "a", "c"]), ("test", ["a", "b", "c"])):
        kind = datasets.ClassLabel(names=names)
        parquet(tmp_path / f"{split}-0.parquet", label=kind)
    train, test = open_train_test(str(tmp_path))
    assert train.classes == test.classes == ("b", "a", "c")
    assert train.labels.tolist() == LABELS and test.labels.tolist() == [2, 1, 0, 2, 1, 0]


@pytest.mark.parametrize("hidden", [-1, None])
def test_a_test_split_without_labels_gives_way_to_validation(tmp_path, hidden):
    kind = datasets.ClassLabel(names=["a", "b", "c"])
    parquet(tmp_path / "data" / "train-0.parquet", label=kind)
    unknown = {"image": ENCODED, "label": [hidden] * 6}
    parquet(tmp_path / "data" / "test-0.parquet", unknown, label=kind)
    assert open_images(str(tmp_path), "test").labels is None
    with pytest.raises(UserError, match="test split has no labels"):
        open_train_test(str(tmp_path))
    four = {"image": ENCODED[:4], "label": LABELS[:4]}
    parquet(tmp_path / "data" / "validation-0.parquet", four, label=kind)
    train, test = open_train_test(str(tmp_path))
    assert (len(train), len(test)) == (6, 4)
    assert open_validation(str(tmp_path), train) is None  # it is the test split


def test_shards_and_splits_of_a_folder_of_tables(tmp_path):
    parquet(tmp_path / "data" / "train-00000-of-00002.parquet")
    parquet(tmp_path / "data" / "train-00001-of-00002.parquet")
    parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    parquet(tmp_path / ".cache" / "train-9.parquet")
    assert [len(part) for part in open_train_test(str(tmp_path))] == [12, 6]
    with pytest.raises(UserError, match="no split 'other'; it has train, test"):
        open_images(str(tmp_path), "other")


def test_train_and_test_are_never_the_same_table(tmp_path):
    inside = tmp_path / "test"
    one = parquet(inside / "test.parquet")
    held_out = open_train_test(one)  # a file given by name is the training split
    assert [len(part) for part in held_out] == [5, 1]
    with pytest.raises(UserError, match="no train among test; --split NAME"):
        open_images(str(tmp_path))
    parquet(tmp_path / "val" / "0.parquet")
    assert [len(part) for part in open_train_test(str(tmp_path / "val"))] == [5, 1]
    table({"image": ENCODED, "label": LABELS}).save_to_disk(tmp_path / "saved")
    assert [len(part) for part in open_train_test(str(tmp_path / "saved"))] == [5, 1]


def test_arrow_saved_to_disk(tmp_path):
    saved = table({"image": ENCODED, "label": LABELS})
    saved.save_to_disk(tmp_path / "one")
    images = open_images(str(tmp_path / "one"))
    assert same_pixels(images) and images.labels.tolist() == LABELS
    datasets.DatasetDict(train=saved, test=saved.select(range(4))).save_to_disk(tmp_path / "both")
    train, test = open_train_test(str(tmp_path / "both"))
    assert same_pixels(train) and same_pixels(test) and (len(train), len(test)) == (6, 4)


def test_several_image_columns_name_the_flag(tmp_path):
    columns = {"image": ENCODED, "depth": ENCODED, "label": LABELS}
    path = parquet(tmp_path / "a.parquet", columns, depth=datasets.Image())
    with pytest.raises(UserError, match=r"several image columns \(image, depth\)") as caught:
        open_images(path)
    assert "--image-column" in said(caught)
    assert same_pixels(open_images(path, image_column="depth"))


def test_columns_that_will_not_do(tmp_path):
    columns = {"image": ENCODED, "label": LABELS, "labels": [[1, 2]] * 6}
    multilabel = datasets.Sequence(datasets.Value("int64"))
    path = parquet(tmp_path / "a.parquet", columns, labels=multilabel)
    for names, line in (
        ({"image_column": "img"}, "no column 'img'; it has image, label, labels"),
        ({"label_column": "y"}, "no column 'y'; it has image, label, labels"),
        ({"image_column": "label"}, "'label' holds no images"),
        ({"label_column": "image"}, "'image' holds no labels"),
    ):
        with pytest.raises(UserError, match=line) as caught:
            open_images(path, **names)
        said(caught)


def test_several_labels_of_an_image(tmp_path):
    names = datasets.ClassLabel(names=["cat", "dog", "cow"])
    lists = [[0], [2, 0], [], [1], [1, 2], [0]]
    for name, kind, values in (
        ("a", names, lists),
        ("b", datasets.Value("string"), [[names.names[v] for v in own] for own in lists]),
    ):
        columns = {"image": ENCODED, "labels": values}
        path = parquet(tmp_path / f"{name}.parquet", columns, labels=datasets.Sequence(kind))
        images = open_images(path)
        assert images.labels.dtype == torch.bool and images.labels.shape == (6, 3)
        places = {c: i for i, c in enumerate(images.classes)}
        for own, row in zip(lists, images.labels, strict=True):
            assert {places[names.names[v]] for v in own} == set(row.nonzero()[:, 0].tolist())
        with pytest.raises(UserError, match="images have several labels"):
            open_labelled(path)
        train, test = open_labelled(path, multilabel=True)
        assert test is None and torch.equal(train.labels, images.labels)
        kept, held_out = hold_out_fifth(train)
        assert kept.labels.shape == (5, 3) and held_out.labels.tolist() == [
            images.labels[4].tolist()
        ]
    one = {"image": ENCODED, "label": LABELS, "labels": lists}
    path = parquet(tmp_path / "c.parquet", one, labels=datasets.Sequence(names))
    assert open_images(path).labels.ndim == 1  # one label an image is preferred
    none = {"image": ENCODED, "labels": [[]] * 6}
    path = parquet(tmp_path / "d.parquet", none, labels=datasets.Sequence(names))
    with pytest.raises(UserError, match="no image has a label"):
        open_labelled(path, multilabel=True)


def test_labels_may_be_missing_and_may_be_named(tmp_path):
    columns = {"image": ENCODED, "breed": ["x", "y"] * 3}
    path = parquet(tmp_path / "a.parquet", columns, breed=datasets.Value("string"))
    assert open_images(path).labels is None
    assert open_images(path, label_column="breed").labels.tolist() == [0, 1] * 3


def test_an_empty_and_a_broken_table(tmp_path):
    empty = parquet(tmp_path / "a.parquet", {"image": [], "label": []})
    with pytest.raises(UserError, match=r"no images|Error"):
        open_images(empty)
    (tmp_path / "b.parquet").write_bytes(b"not parquet")
    with pytest.raises(UserError, match=r"b.parquet: \w+") as caught:
        open_images(str(tmp_path / "b.parquet"))
    said(caught)


# ---- the Hub -------------------------------------------------------------------------------------


def test_a_hub_id_without_a_network_is_one_line():
    with pytest.raises(UserError, match="nobody/nothing: not a local path, and the Hub") as caught:
        open_images("nobody/nothing")
    said(caught)


def the_hub(monkeypatch, parts, configurations=("default",), default="default"):
    """A data set on the Hub, with the calls of `datasets` that ask for it; what was fetched."""
    fetched = []
    splits = {
        name: datasets.SplitInfo(name, num_examples=len(part)) for name, part in parts.items()
    }
    features = next(iter(parts.values())).features

    class Builder:
        info = datasets.DatasetInfo(features=features, splits=datasets.SplitDict(splits))

    def load_dataset(source, name=None, split=None):
        fetched.append((source, name, split))
        return parts[split]

    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda source: list(configurations))
    monkeypatch.setattr(datasets, "get_dataset_default_config_name", lambda source: default)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda source, name=None: Builder())
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return fetched


@pytest.mark.parametrize(("held", "second"), [(["train", "validation"], 4), (["train"], 1)])
def test_the_hub_path_on_local_files(monkeypatch, held, second):
    whole = table({"image": ENCODED, "label": LABELS})
    parts = {"train": whole, "validation": whole.select(range(4))}
    the_hub(monkeypatch, {name: parts[name] for name in held})
    train, test = open_train_test("owner/name")
    assert len(test) == second and len(train) + (second == 1) == 6
    assert open_validation("owner/name", train) is None
    with pytest.raises(UserError, match="no split 'extra'; it has train"):
        open_images("owner/name", "extra")


# ---- two decoders --------------------------------------------------------------------------------


def by_pillow(image, max_side=MAX_SIDE):
    return data.to_tensor(read(image, max_side=max_side))


def outcome(function, image, **how):
    """The pixels, or what is said of the image."""
    try:
        return function(image, **how)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def assert_same(images, least, **how):
    """Both ways agree on every image; torchvision decodes at least so many of them."""
    assert data.decoders_agree()
    for image in images:
        found, expected = outcome(decode, image, **how), outcome(by_pillow, image, **how)
        if isinstance(expected, str):
            assert found == expected
        else:
            assert torch.equal(found, expected) and found.stride() == expected.stride()
    sources = [image["bytes"] if isinstance(image, dict) else image for image in images]
    plain = [outcome(plain_jpeg, source, max_side=MAX_SIDE) for source in sources]
    assert sum(isinstance(each, bytes) for each in plain) >= least


def jpeg(height, width, seed=0, mode="RGB", exif=None, **options):
    """A smooth picture, so that what is coarse is felt."""
    coarse = Image.fromarray(pixels(seed, height // 4 + 2, width // 4 + 2))
    image = coarse.resize((width, height), Image.Resampling.BICUBIC).convert(mode)
    if exif is not None:
        turned = Image.Exif()
        turned[0x0112] = exif
        options["exif"] = turned
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


SIZES = [(1, 1), (1, 2), (2, 1), (3, 5), (7, 8), (8, 8), (9, 7), (15, 16), (16, 16), (17, 33)]
KINDS = [
    {}, {"progressive": True}, {"restart_marker_blocks": 1}, {"restart_marker_rows": 1},
    {"mode": "L"}, {"mode": "L", "progressive": True}, {"optimize": True},
    {"keep_rgb": True, "subsampling": 0}, {"icc_profile": bytes(70_000)}, {"comment": b"a comment"},
    {"exif": 1}, {"dpi": (72, 72)},
]  # fmt: skip


@pytest.mark.parametrize("sampling", ["4:4:4", "4:2:2", "4:2:0"])
def test_jpegs_are_the_same_by_both_decoders(sampling):
    qualities = [1, 10, 50, 75, 90, 100]
    images = [
        jpeg(*size, i * j, quality=qualities[(i + j) % 6], **{"subsampling": sampling} | kind)
        for i, size in enumerate(SIZES)
        for j, kind in enumerate(KINDS)
    ]
    assert_same(images, least=len(images))


def test_odd_jpegs_are_the_same_by_both_decoders(tmp_path):
    usual = jpeg(33, 40)
    without_jfif = usual[:2] + usual[20:]
    adobe = [b"\xff\xee\0\x0eAdobe\0\x64" + bytes(4) + bytes([t]) for t in range(3)]
    frame = usual.index(b"\xff\xc0")
    swapped = usual[:-2].replace(b"\xff\xda\0\x0c\3\1\0\2\x11", b"\xff\xda\0\x0c\3\2\0\1\x11")
    odd = [
        without_jfif,
        *(usual[:2] + each + usual[2:] for each in adobe),
        *(without_jfif[:2] + each + without_jfif[2:] for each in adobe),
        *(usual[: frame + 11] + bytes([hv]) + usual[frame + 12 :] for hv in (0x12, 0x41, 0x14, 0)),
        *(usual[: frame + 1] + bytes([code]) + usual[frame + 2 :] for code in range(0xC0, 0xD0)),
        usual[: frame + 4] + b"\x0c" + usual[frame + 5 :],  # 12 bits
        *(usual[: frame + 5] + size + usual[frame + 9 :] for size in (bytes(4), b"\xff" * 4)),
        *(jpeg(19, 30, exif=turn) for turn in (0, *range(2, 10))),
        jpeg(19, 30, mode="CMYK"),
        jpeg(19, 30, xmp=b'<x tiff:Orientation="6"/>'),
        *(usual[:2] + b"\xff\xe0\0" + jfif + usual[2:] for jfif in (b"\6JFIF", b"\7JFIF\0")),
        usual[:2] + b"\xff\xff" + usual[3:],
        *(usual + end for end in (b"\0", b"\xff\xd9", usual, bytes(5000))),
        *(usual[:-2], usual[:-1], usual[:-9] + b"\xff\xd9", usual[: frame + 20] + b"\xff\xd9"),
        usual[:2] + b"\xff\xe1\0\x20http://ns.adobe.com/xap/1.0/\0x" + usual[2:],
        usual[:2] + b"\xff\xed\0\x14Photoshop 3.0\0" + bytes(4) + usual[2:],
        *(usual[: frame + 2] + bytes([0, n]) + usual[frame + 4 :] for n in (0, 2, 7, 16)),
        *(swapped, b"", b"\xff\xd8\xff", b"\xff\xd8\xff\xd9", b"\xff\xd8" + usual),
        jpeg(MAX_SIDE, 9),
        *(jpeg(9, MAX_SIDE + 1), jpeg(2 * MAX_SIDE, 2 * MAX_SIDE + 3)),
    ]
    assert_same(odd, least=12)
    for i, content in enumerate(odd):
        (tmp_path / f"{i}.jpg").write_bytes(content)
    assert_same([tmp_path / f"{i}.jpg" for i in range(len(odd))], least=12)


@pytest.mark.parametrize("kind", KINDS[:5])
def test_damaged_jpegs_end_the_same_by_both_decoders(kind):
    whole, random = jpeg(20, 24, **kind), np.random.default_rng(0)
    damaged = [whole[:length] for length in range(len(whole) - 60, len(whole))]
    damaged += [whole[:length] + formats.EOI for length in range(len(whole) - 300, len(whole), 7)]
    for _ in range(150):
        each = bytearray(whole)
        for _ in range(random.choice([1, 1, 3])):
            each[random.integers(2, len(each))] = random.choice([0, 255, random.integers(256)])
        damaged.append(bytes(each))
    assert_same(damaged, least=50)


def test_a_progressive_jpeg_without_its_last_scans_is_left_to_pillow():
    whole = jpeg(40, 48, progressive=True)
    scans = [at for at in range(len(whole)) if whole.startswith(b"\xff\xda", at)]
    assert len(scans) > 5 and plain_jpeg(whole, MAX_SIDE) == whole
    for at in scans[1:]:
        assert plain_jpeg(whole[:at] + formats.EOI, MAX_SIDE) is None


def test_a_libjpeg_that_rounds_differently_is_not_used(monkeypatch):
    image = jpeg(33, 40)
    expected, rounded = by_pillow(image), lambda jpeg: by_pillow(jpeg) ^ 1
    for other in (rounded, lambda jpeg: torch.ops.image.there_is_no_such_operation(jpeg)):
        monkeypatch.setattr(
            data, "decoders_agree", functools.cache(data.decoders_agree.__wrapped__)
        )
        monkeypatch.setattr(data, "by_torchvision", other)
        assert not data.decoders_agree() and torch.equal(decode(image), expected)


def test_a_jpeg_of_many_bytes_is_not_read_whole(tmp_path, monkeypatch):
    (tmp_path / "a.jpg").write_bytes(jpeg(33, 40, comment=bytes(60_000)))
    assert plain_jpeg(tmp_path / "a.jpg", MAX_SIDE)
    monkeypatch.setattr(formats, "MOST_JPEG", 60_000)
    assert plain_jpeg(tmp_path / "a.jpg", MAX_SIDE) is None
    assert decode(tmp_path / "a.jpg").shape == (3, 33, 40)


def test_noise_is_seeded_as_torch_does_it():
    torch.manual_seed(generator("noise", 7).initial_seed())
    expected = torch.rand(3)
    data.seed_noise(torch.device("cpu"), "noise", 7)
    assert torch.equal(torch.rand(3), expected)


# ---- bad images ----------------------------------------------------------------------------------


def a_folder(root, count=40, bad=(), sizes=False):
    """PNGs of one size or of many, those in `bad` truncated, empty and text in turn."""
    for i in range(count):
        size = (5 + i % 4, 6 + i % 3) if sizes else (8, 8)
        path = write(root / f"{i:03}.jpg", i, *size)
        if i in bad:
            content = (path.read_bytes()[:-200], b"", b"this is no image")
            path.write_bytes(content[bad.index(i) % 3])
    return str(root)


def jpegs_truncated_by(path, count):
    path.write_bytes(path.read_bytes()[:-count])


def test_a_truncated_jpeg_is_not_half_an_image(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded(0, "JPEG", height=64, width=64))
    decode(path)
    jpegs_truncated_by(path, 500)
    with pytest.raises(OSError, match="truncated"):
        decode(path)


def test_bad_images_are_counted_named_and_replaced_by_the_next_good_one(tmp_path):
    source = a_folder(tmp_path, 60, bad=(10, 11, 59))
    images = open_images(source)
    line = images.load(1.0)
    assert sorted(images.bad) == [10, 11, 59]
    assert line.startswith(f"{source}: 60 images, no labels, in memory; 3 undecodable images")
    assert "010.jpg" in line and "011.jpg" in line and "059.jpg" in line and "\n" not in line
    batch = images.batch(torch.tensor([9, 10, 11, 12, 59]))
    assert batch.indices.tolist() == [9, 12, 12, 12, 0]
    good = open_images(source).batch(torch.tensor([9, 12, 12, 12, 0]))
    assert torch.equal(batch.images, good.images)


def test_a_report_names_three_and_counts_the_rest():
    images = ImageSplit("x", list(range(100)), bad={i: f"n{i}" for i in (5, 2, 9, 7, 30)})
    assert images.report_bad() == "5 undecodable images skipped: n2; n5; n7 and 2 more"


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_images_are_one_line_wherever_they_are_met(tmp_path, workers):
    bad = tuple(range(1, 38, 2))
    source = a_folder(tmp_path, 40, bad)
    with pytest.raises(UserError, match=r"cannot be decoded, e\.g\. .*at most 5% are") as caught:
        list(open_images(source).batches(torch.arange(40).split(8), workers))
    said(caught)
    with pytest.raises(UserError, match="cannot be decoded"):
        open_images(source).load(1.0)


def test_five_percent_are_skipped_and_more_are_not(tmp_path):
    assert len(open_images(a_folder(tmp_path / "a", 40, (3, 17))).load(1.0)) > 0
    with pytest.raises(UserError, match="3 of 40 images"):
        open_images(a_folder(tmp_path / "b", 40, (3, 17, 30))).load(1.0)


def test_a_missing_file_is_a_bad_image(tmp_path):
    source = a_folder(tmp_path, 40)
    images = open_images(source)
    os.unlink(images.encoded[7])
    assert images.batch(torch.tensor([7])).indices.tolist() == [8]
    assert "007.jpg" in images.report_bad()


@pytest.mark.parametrize("sizes", [False, True])
def test_memory_and_workers_give_the_same_bits(tmp_path, sizes):
    source = a_folder(tmp_path, 41, bad=(4, 5), sizes=sizes)
    orders = [batch_indices(s, batch_size=12, count=41, seed=1) for s in range(6)]
    assert any(4 in order for order in orders)
    stored = open_images(source)
    assert stored.into_memory(1.0) and isinstance(stored.store, list if sizes else torch.Tensor)
    expected = list(stored.batches(orders))
    for workers in (0, 2):
        images = open_images(source)
        assert not images.into_memory(0.0)
        before = torch.random.get_rng_state()
        found = list(images.batches(orders, workers))
        assert torch.equal(torch.random.get_rng_state(), before)
        assert sorted(images.bad) == [4, 5]
        assert len(found) == len(expected) == 6
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one.images, other.images) and one.images.dtype == torch.uint8
            assert torch.equal(one.sizes, other.sizes) and torch.equal(one.indices, other.indices)
        for order, batch in zip(orders, expected, strict=True):
            assert torch.equal(images.replaced(order), batch.indices)


def test_mixed_sizes_stand_at_the_top_left_of_a_zero_canvas():
    images = [torch.full((3, 2, 5), 9, dtype=torch.uint8), torch.full((3, 4, 3), 7).byte()]
    canvas, sizes = data.pad(images)
    assert canvas.shape == (2, 3, 4, 5) and sizes.tolist() == [[2, 5], [4, 3]]
    assert torch.equal(canvas[0, :, :2], images[0]) and not canvas[0, :, 2:].any()
    assert torch.equal(canvas[1, :, :, :3], images[1]) and not canvas[1, :, :, 3:].any()


def test_what_does_not_fit_is_not_kept(tmp_path):
    images = open_images(a_folder(tmp_path, 40))
    needed = 40 * 3 * 8 * 8 / 2**30
    assert not images.into_memory(needed * 0.99) and images.store is None
    assert "decoded by workers" in images.load(0.0)
    assert images.into_memory(needed * 1.01) and images.store.shape == (40, 3, 8, 8)


def test_an_image_of_another_size_than_all_tried_is_kept_as_it_is(tmp_path):
    source = a_folder(tmp_path, 64, bad=(9,))
    write(tmp_path / "033.jpg", 33, 5, 6)  # of 64 every second is tried
    images = open_images(source)
    assert images.into_memory(1.0) and isinstance(images.store, list)
    batch = images.batch(torch.arange(64))
    assert batch.sizes[33].tolist() == [5, 6] and batch.indices[9] == 10
    for i in (0, 8, 10, 33, 34, 63):
        height, width = batch.sizes[i]
        assert torch.equal(batch.images[i, :, :height, :width], decode(images.encoded[i]))


def test_images_are_decoded_into_memory_while_features_are_made(tmp_path):
    images = open_images(a_folder(tmp_path, 40))
    with torch.inference_mode():
        assert images.into_memory(1.0)
    assert torch.equal(images.batch(torch.tensor([5])).images[0], decode(images.encoded[5]))


def test_small_images_are_decoded_by_one_thread_and_large_ones_by_all(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16), raising=False)
    taken = [data.decoding_threads(seconds) for seconds in (0, 4e-5, 1e-4, 5e-4, 4e-3, 1.0)]
    assert taken == [1, 1, 3, 16, 16, 16]


# ---- order ---------------------------------------------------------------------------------------


def test_an_epochs_order_is_a_pure_permutation():
    orders = {(s, e): epoch_order(s, e, 101) for s in (1, 2) for e in (0, 1, 2)}
    for (seed, epoch), order in orders.items():
        assert torch.equal(order.sort().values, torch.arange(101))
        torch.manual_seed(seed + epoch)
        epoch_order.cache_clear()
        assert torch.equal(epoch_order(seed, epoch, 101), order)
    assert len({tuple(order.tolist()) for order in orders.values()}) == 6


def test_generators_depend_on_the_whole_key():
    keys = [(1, "views", 2), (1, "views", 3), (2, "views", 2), (1, "order", 2), (12,), (1, 2)]
    assert len({torch.rand(1, generator=generator(*key)).item() for key in keys}) == len(keys)
    again = torch.rand(5, generator=generator(1, "views", 2))
    assert torch.equal(again, torch.rand(5, generator=generator(1, "views", 2)))


@pytest.mark.parametrize(("count", "size"), [(10, 3), (7, 7), (5, 8), (12, 4), (3, 11)])
def test_the_stream_holds_every_image_once_an_epoch(count, size):
    steps = count * size  # `size` whole epochs
    batches = [batch_indices(s, batch_size=size, count=count, seed=3) for s in range(steps)]
    assert all(len(batch) == size for batch in batches)
    for epoch, part in enumerate(torch.cat(batches).split(count)):
        assert torch.equal(part, epoch_order(3, epoch, count))


def test_batches_span_epochs_only_in_the_stream():
    spanning = batch_indices(3, batch_size=3, count=10, seed=1)
    expected = torch.cat([epoch_order(1, 0, 10)[9:], epoch_order(1, 1, 10)[:2]])
    assert torch.equal(spanning, expected)
    for step in range(12):
        epoch, k = divmod(step, 3)
        batch = batch_indices(step, batch_size=3, count=10, seed=1, drop_last=True)
        assert torch.equal(batch, epoch_order(1, epoch, 10)[3 * k : 3 * k + 3])


# ---- real images, where they are -----------------------------------------------------------------


def real(name):
    if not (REAL / name).exists():
        pytest.skip(f"{REAL / name} is not there")
    return str(REAL / name)


def test_real_parquet():
    train, test = open_train_test(real("cifar10-jpeg"))
    assert (len(train), len(test)) == (50_000, 10_000)
    assert train.classes == test.classes and len(train.classes) == 10
    assert train.labels.bincount().tolist() == [5_000] * 10
    assert train.batch(torch.arange(8)).images.shape == (8, 3, 32, 32)


def test_real_photographs():
    train, test = open_train_test(real("clothing"))
    assert (len(train), len(test)) == (3_068, 372) and len(train.classes) == 10
    assert len(open_images(real("clothing"), "validation")) == 341
    batch = train.batch(torch.arange(4))
    assert batch.images.shape[2:] == tuple(batch.sizes.amax(0)) and batch.sizes.max() <= MAX_SIDE


def test_real_flat_folder():
    images = open_images(real("bccd"))
    assert len(images) == 364
    assert images.batch(torch.arange(3)).images.shape == (3, 3, 480, 640) and not images.bad


def test_real_jpegs_are_the_same_by_both_decoders():
    table = Path(real("cifar10-jpeg")) / "test-00000-of-00001.parquet"
    group = pyarrow.parquet.ParquetFile(table).read_row_group(0, columns=["img"])
    assert_same(group["img"].slice(0, 200).to_pylist(), least=200)
    for name, most in (("clothing", 100), ("camvid", 30), ("bccd", 30)):
        paths = sorted(map(str, Path(real(name)).rglob("*.jpg")))
        assert_same(paths[:: len(paths) // most], least=most // 2)
