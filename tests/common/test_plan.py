"""The plan of a source: which split, which labels, and every file either used or counted."""

import gzip
import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from common import plan as planning
from common.config import SourceConfig
from common.errors import UserError
from common.layout import words_of
from common.plan import NoSplit, plan_of

ROOT = Path(__file__).resolve().parents[2]


def png(seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


PNG = png()


def put(root, *paths, content=PNG):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)


def classes(root, *names, count=2, suffix=".png"):
    put(root, *[f"{name}/{i}{suffix}" for name in names for i in range(count)])


def parquet(path, count=4, column="label", labels=None, kind=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [{"bytes": png(i), "path": None} for i in range(count)]
    values = list(range(count)) if labels is None else labels
    pq.write_table(pa.table({"image": cells, column: pa.array(values, kind)}), path)


def write_arrow(path, table):
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as out:
        out.write_table(table)


def plan(root, split="", **how):
    return plan_of(str(root), SourceConfig(split=split, **how))


def read(root, split="", **how):
    """What a run reads: the names below the source, the values of the labels, and the lines."""
    made = plan(root, split, **how)
    part = made.choose(split)
    return (
        planning.names_below(made, part.paths),
        made.labels(part).values,
        "\n".join(made.lines(part)),
    )


def refused(root, split="", kind=UserError, **how):
    with pytest.raises(kind) as caught:
        read(root, split, **how)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    return str(caught.value)


# ---- which split ---------------------------------------------------------------------------------


def test_names_are_cut_into_words():
    assert words_of("birds_Train-2017.part 3") == ["birds", "train", "2017", "part", "3"]
    assert words_of("trainset") == ["train", "set"] and words_of("train0001") == ["train", "0001"]
    assert words_of("strain") == ["strain"] and words_of("contest") == ["contest"]


@pytest.mark.parametrize(
    ("train", "test", "asked"),
    [
        ("training_set", "test_set", "test"), ("train_images", "test_images", "test"),
        ("train2017", "val2017", "validation"), ("Train", "Dev", "validation"),
        ("trainset", "testset", "test"), ("birds-train", "birds-test", "test"),
        ("pets/train", "pets/test", "test"), ("images/train", "images/val", "validation"),
        ("training split", "testing split", "test"),
        ("ISIC-2017_Training_Data", "ISIC-2017_Test_v2_Data", "test"), ("trainA", "testA", "test"),
        ("train_jpg", "test_png", "test"),
    ],
)  # fmt: skip
def test_folders_of_splits(tmp_path, train, test, asked):
    classes(tmp_path / train, "cat", "dog", count=3)
    classes(tmp_path / test, "cat", "dog", count=1)
    put(tmp_path, "README.md", "data.yaml")
    names, labels, lines = read(tmp_path)
    assert labels == ["cat"] * 3 + ["dog"] * 3 and all(name.startswith(train) for name in names)
    assert f"left out: {os.path.basename(test)} 2" in lines
    assert len(plan(tmp_path).choose(asked).paths) == 2
    assert set(read(tmp_path, "all")[1]) == {"cat", "dog"}
    assert len(read(tmp_path, "all")[0]) == 8


@pytest.mark.parametrize("beside", ["steam_train", "test_tube", "dev_board_v2"])
def test_a_folder_beside_classes_is_a_class_though_its_name_has_a_word(tmp_path, beside):
    classes(tmp_path, "bottle", beside)
    names, labels, _ = read(tmp_path)
    assert len(names) == 4 and set(labels) == {"bottle", beside}
    with pytest.raises(NoSplit):
        plan(tmp_path).choose("test")
    classes(tmp_path / "only two", "steam_train", "test_tube")
    said = refused(tmp_path / "only two")
    assert "steam_train/, test_tube/ may be splits, or classes beside one another" in said
    assert set(read(tmp_path / "only two", "all")[1]) == {"steam_train", "test_tube"}


@pytest.mark.parametrize("name", ["train", "Test", "val", "training_set", "valid2"])
def test_a_folder_that_may_be_a_split_or_a_class_is_refused(tmp_path, name):
    classes(tmp_path, "bus", name, "plane")
    said = refused(tmp_path)
    assert f"{name}/ may be splits, or classes beside bus/, plane/" in said
    assert len(read(tmp_path, "all")[0]) == 6 and set(read(tmp_path, "all")[1]) > {name}
    names, _, lines = read(tmp_path, name)
    assert len(names) == 2 and "left out: bus 2, plane 2" in lines


@pytest.mark.parametrize("name", ["extra", "unlabeled", "holdout_images"])
def test_words_of_other_splits_are_refused_unless_one_is_chosen(tmp_path, name):
    classes(tmp_path / "train", "a", "b")
    classes(tmp_path / "test", "a", "b")
    put(tmp_path, f"{name}/1.png")
    assert f"--split train, --split {name}" in refused(tmp_path)
    assert len(read(tmp_path, "train")[0]) == 4
    names, labels, _ = read(tmp_path, name)
    assert names == [f"{name}/1.png"] and labels is None
    for each in ("train", "test", name):
        parquet(tmp_path / "tables" / f"{each}-0.parquet")
    said = refused(tmp_path / "tables")
    assert "say --split train" in said
    assert len(read(tmp_path / "tables", "train")[1]) == 4


def test_folders_that_are_splits_but_for_one_are_refused(tmp_path):
    classes(tmp_path / "seg_train" / "seg_train", "sea", "street")
    classes(tmp_path / "seg_test" / "seg_test", "sea", "street", count=1)
    put(tmp_path, "seg_pred/seg_pred/1.png")
    assert "seg_train/, seg_test/ may be splits, or classes beside seg_pred/" in refused(tmp_path)
    names, labels, _ = read(tmp_path, "seg_train")
    assert len(names) == 4 and set(labels) == {"sea", "street"}  # not the one folder between
    assert len(plan(tmp_path, "seg_train").choose("test").paths) == 2
    classes(tmp_path / "mvtec" / "bottle", "train/good", "test/broken", "ground_truth/broken")
    classes(tmp_path / "mvtec" / "cable", "train/good", "test/broken", "ground_truth/broken")
    assert "bottle/, cable/ each have splits of their own" in refused(tmp_path / "mvtec")


def test_two_folders_of_one_split_are_refused(tmp_path):
    classes(tmp_path, "train2014/a", "train2017/a", "val2014/a")
    assert "train2014, train2017 each name train" in refused(tmp_path)
    assert len(read(tmp_path, "train2017")[0]) == 2
    everything = plan(tmp_path, "all")
    assert everything.choose("all") is everything.choose("all")


def test_splits_below_several_folders_are_configurations(tmp_path):
    for name in ("full", "mini"):
        classes(tmp_path / name, "train/a", "train/b", "test/a")
    said = refused(tmp_path)
    assert "full/, mini/ each have splits of their own (test, train)" in said
    assert f"--data {tmp_path}:full" in said
    names, labels, _ = read(f"{tmp_path}:mini")
    assert len(names) == 4 and set(labels) == {"a", "b"}
    assert "no folder 'none'" in refused(f"{tmp_path}:none")


def test_saved_data_sets_are_told_apart(tmp_path):
    listings = []
    for name, count in (("one", 4), ("two", 40)):
        rows = {"image": [{"bytes": PNG, "path": None}] * count, "label": list(range(count))}
        datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / name)
        made = plan(tmp_path / name)
        listings.append(planning.listing(made, made.choose()))
        assert made.choose().count == count
    assert [names for [(names, _)] in listings] == ["data-00000-of-00001.arrow"] * 2
    assert listings[0] != listings[1]


def test_a_name_of_two_splits_is_the_same_everywhere():
    assert planning.split_of("train_val") == "train_val"  # whatever the order of a set is
    assert planning.split_of("Validation_matched") == "validation"


def test_names_of_images_name_no_split(tmp_path):
    put(tmp_path, *[f"{split}_{i}.png" for split in ("train", "test") for i in range(3)])
    assert len(read(tmp_path)[0]) == 6


def test_images_beside_splits_are_counted(tmp_path):
    classes(tmp_path, "train/a", "train/b", "test/a")
    put(tmp_path, "montage.png")
    names, _, lines = read(tmp_path)
    assert len(names) == 4 and "1 image beside test/, train/ left out: montage.png" in lines


@pytest.mark.parametrize(
    "pattern",
    [
        "birds_{}.parquet",
        "birds-{}.arrow",
        "{}/0.parquet",
        "{}_set.PARQUET",
        "split={}/a.parquet",
        "{}.parquet/part-0.parquet",
    ],
)
def test_tables_of_splits(tmp_path, pattern):
    for split, count in (("train", 5), ("test", 3)):
        path = tmp_path / pattern.format(split)
        if path.suffix == ".arrow":
            rows = {"image": [{"bytes": png(i), "path": None} for i in range(count)]}
            table = pa.table(rows | {"label": list(range(count))})
            write_arrow(path, table)
        else:
            parquet(path, count)
    _, labels, lines = read(tmp_path)
    assert labels == [0, 1, 2, 3, 4] and "left out: test 3" in lines
    assert plan(tmp_path).choose("test").count == 3


def test_tables_that_name_no_split(tmp_path):
    parquet(tmp_path / "birds.parquet")
    parquet(tmp_path / "more" / "birds_test.parquet")
    os.rename(tmp_path / "more" / "birds_test.parquet", tmp_path / "birds_test.parquet")
    assert "birds.parquet names no split beside birds_test.parquet" in refused(tmp_path)
    parquet(tmp_path / "birds_train.parquet", 5)
    _, labels, lines = read(tmp_path)
    assert len(labels) == 5 and "tables that name no split 1" in lines
    parquet(tmp_path / "two" / "train_test.parquet")
    parquet(tmp_path / "two" / "other.parquet")
    assert "names several splits, test, train" in refused(tmp_path / "two")


@pytest.mark.parametrize(
    ("names", "configurations"),
    [
        (("full/train-0", "full/test-0", "mini/train-0"), ("full", "mini")),
        (("full-train-00000-of-00001", "mini-train-00000-of-00001"), ("full", "mini")),
        (("data/en/train", "data/de/train"), ("data/de", "data/en")),
        (("cifar10_train", "cifar100_train", "cifar100_test"), ("cifar10", "cifar100")),
        (("full/0", "mini/0"), ("full", "mini")),
        (("train_full", "train_mini"), ("full", "mini")),
    ],
)
def test_configurations_of_tables(tmp_path, names, configurations):
    for i, name in enumerate(names):
        parquet(tmp_path / f"{name}.parquet", 3 + i)
    said = refused(tmp_path)
    assert f"several configurations, {', '.join(configurations)}" in said
    _, labels, lines = read(f"{tmp_path}:{configurations[0]}")
    assert labels is not None
    assert (tmp_path / configurations[0]).is_dir() or "tables of other configurations" in lines
    assert "no configuration 'none'" in refused(f"{tmp_path}:none")


def test_shards_are_no_configurations(tmp_path):
    for name in ("train-00000-of-00002-6b9da5db9d0d2fd8", "train-00001-of-00002-0c1f"):
        parquet(tmp_path / "data" / f"{name}.parquet")
    assert len(read(tmp_path)[1]) == 8
    for name in ("part-00000-3f2a.snappy", "part-00001-77be.snappy"):
        parquet(tmp_path / "spark" / f"{name}.parquet")
    assert len(read(tmp_path / "spark")[1]) == 8
    for name in ("year=2023/a", "year=2024/b"):
        parquet(tmp_path / "hive" / f"{name}.parquet")
    _, labels, lines = read(tmp_path / "hive")
    assert len(labels) == 8 and "2 tables are read as one" in lines


def test_tables_beside_pictures_are_refused_with_what_to_name(tmp_path):
    parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    put(tmp_path, *[f"assets/{i}.png" for i in range(9)])
    said = refused(tmp_path)
    assert "1 table" in said and "9 images" in said
    assert f"--data {tmp_path}/data or --data {tmp_path}/assets" in said
    assert len(read(tmp_path / "data")[1]) == 4


def test_tables_of_other_columns_or_kinds_are_refused(tmp_path):
    parquet(tmp_path / "a.parquet")
    parquet(tmp_path / "b.parquet", column="other")
    assert "b.parquet has the columns image, other" in refused(tmp_path)
    os.rename(tmp_path / "b.parquet", tmp_path / "b.arrow")
    assert "several kinds, .arrow, .parquet" in refused(tmp_path)


def test_tables_that_cannot_be_read_are_named(tmp_path):
    put(tmp_path, "a.parquet", content=b"version https://git-lfs.github.com/spec/v1\noid sha256:0")
    assert "a.parquet is a pointer of git-lfs; git lfs pull" in refused(tmp_path)
    put(tmp_path, "a.parquet", content=b"no table")
    assert "a.parquet: Arrow" in refused(tmp_path)
    parquet(tmp_path / "empty" / "b.parquet", 0, labels=[], kind=pa.int64())
    assert "no images in b.parquet" in refused(tmp_path / "empty")
    assert "a file has no configurations" in refused(f"{tmp_path}/empty/b.parquet:full")
    os.mkfifo(tmp_path / "empty" / "pipe.parquet")
    assert "no images in b.parquet" in refused(tmp_path / "empty")  # nobody waits for a pipe
    table = pa.table({"image": [{"bytes": PNG, "path": None}] * 3, "label": [0, 1, 2]})
    with (
        pa.OSFile(str(tmp_path / "file.arrow"), "wb") as file,
        pa.ipc.new_file(file, table.schema) as out,
    ):
        out.write_table(table)
    assert read(tmp_path / "file.arrow")[1] == [0, 1, 2]  # not as a stream, but as a file
    put(tmp_path / "packed", "images.zip")
    assert ".zip 1; unpack archives first" in refused(tmp_path / "packed")


def test_one_table_is_read_whole_and_its_name_is_told(tmp_path):
    parquet(tmp_path / "birds_test.parquet")
    _, labels, lines = read(tmp_path / "birds_test.parquet")
    assert len(labels) == 4 and "though its name says test" in lines


def test_tables_that_differ_in_what_they_list_are_refused(tmp_path):
    for name, kinds in (("a", ["cat", "dog"]), ("b", ["bird", "fish"])):
        features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=kinds))
        rows = {"image": [{"bytes": PNG, "path": None}] * 2, "label": [0, 1]}
        table = datasets.Dataset.from_dict(rows, features)
        (tmp_path / "arrow").mkdir(exist_ok=True)
        (tmp_path / "parquet").mkdir(exist_ok=True)
        table.to_parquet(tmp_path / "parquet" / f"{name}.parquet")
        columns = ["image", "label"] if name == "a" else ["label", "image"]
        same = datasets.Dataset.from_dict(rows).select_columns(columns).with_format("arrow")[:]
        write_arrow(tmp_path / "arrow" / f"{name}.arrow", same)
    assert "list other classes for 'label'" in refused(tmp_path / "parquet")
    assert len(read(tmp_path / "arrow")[1]) == 4  # in another order, the columns are the same


def test_a_column_of_splits_is_not_mixed(tmp_path):
    parquet(tmp_path / "a.parquet", 4, "split", ["train", "train", "test", "train"])
    said = refused(tmp_path / "a.parquet")
    assert "its column 'split' names test, train, which is not read" in said
    assert plan(tmp_path / "a.parquet", "all").choose("all").count == 4
    classes(tmp_path / "d", "x", "y")
    write_metadata(tmp_path / "d" / "metadata.csv", [
        {"file_name": f"{c}/{i}.png", "label": i, "split": ("train", "val")[i]}
        for c in "xy" for i in range(2)
    ])  # fmt: skip
    assert "names train, val" in refused(tmp_path / "d")
    assert read(tmp_path / "d", "all")[1] == [0, 1, 0, 1]


# ---- what is passed over -------------------------------------------------------------------------


def test_what_is_not_read_is_counted_by_kind(tmp_path):
    put(tmp_path, *[f"a/{i}.jfif" for i in range(3)], "a/1.avif", "b/2.PGM", "b/3.jp2")
    put(tmp_path, *[f"a/{i}.xyz" for i in range(16)], "notes", "a/x.eps", ".DS_Store", "._a.png")
    put(tmp_path, "@eaDir/a.png", "__MACOSX/b/c.png", "Thumbs.db", ".git/objects/1", "a/x.heic")
    names, labels, lines = read(tmp_path)
    assert len(names) == 6 and labels == ["a"] * 4 + ["b"] * 2
    assert "25 other files passed over: .xyz 16, " in lines
    for told in ("hidden files 3", "system files 3", ".eps 1", ".heic 1", "without a suffix 1"):
        assert told in lines


@pytest.mark.parametrize("masks", ["masks", "labels", "annotations", "SegmentationClass"])
def test_masks_beside_images_are_passed_over(tmp_path, masks):
    for split in ("train", "val"):
        put(tmp_path / split, *[f"images/{i}.jpg" for i in range(3)])
        put(tmp_path / split, *[f"{masks}/{i}.png" for i in range(3)])
    names, _, lines = read(tmp_path)
    assert len(names) == 3 and f"masks in {masks}/ 6" in lines
    put(tmp_path / "other", *[f"images/{i}.jpg" for i in range(3)], f"{masks}/x.png")
    assert len(read(tmp_path / "other")[0]) == 4  # of other names, so they are no masks


def test_folders_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    classes(tmp_path, "a", "b", "lost+found")
    scandir = os.scandir

    def denied(path):
        if os.path.basename(path) == "lost+found":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    names, labels, lines = read(tmp_path)
    assert len(names) == 4 and set(labels) == {"a", "b"}
    assert "1 folder cannot be read: lost+found" in lines


NAMES = ["a", "b", "train", "test", "images", "masks", ".git", "extra", "steam_train"]
FILES = ["1.png", "2.jpg", "train_3.png", "notes.txt", ".hidden", "metadata.csv", "Thumbs.db"]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.lists(st.sampled_from(NAMES), max_size=3), st.sampled_from(FILES)),
             min_size=1, max_size=14)
)  # fmt: skip
def test_every_file_is_used_or_counted(tmp_path_factory, layout):
    root = tmp_path_factory.mktemp("layout")
    for folders, name in layout:
        put(root.joinpath(*folders), name, content=b"x")
    count = sum(len(files) for _, _, files in os.walk(root))
    try:
        made = plan(root)
        part = made.choose()
        lines = "\n".join(made.lines(part))
    except UserError as error:
        assert str(root) in str(error) and "\n" not in str(error)
        return
    told = [line.removeprefix(f"{root}: ").strip() for line in lines.split("\n")]
    numbers = {"read": part.count}
    for line in told:
        if match := re.match(r"split .*; left out: (.*)", line):
            numbers["splits"] = sum(int(n) for n in re.findall(r" (\d+)(?:,|$)", match[1]))
        if match := re.match(r"(\d+) images? beside .* left out", line):
            numbers["beside"] = int(match[1])
        if match := re.match(r"(\d+) other files? passed over", line):
            numbers["other"] = int(match[1])
    assert sum(numbers.values()) == count, (numbers, told)


# ---- labels --------------------------------------------------------------------------------------


def test_classes_below_the_first_level_are_told_and_chosen(tmp_path):
    classes(tmp_path, "Fruit/Apple", "Fruit/Pear", "Nut/Hazel/Red", "Nut/Wal")
    _, labels, lines = read(tmp_path)
    assert set(labels) == {"Fruit", "Nut"}
    assert (
        "4 folders of images lie below the 2 taken as classes; --label-depth 2 takes Fruit/A"
        in lines
    )
    assert set(read(tmp_path, label_depth=2)[1]) == {
        "Fruit/Apple", "Fruit/Pear", "Nut/Hazel", "Nut/Wal",
    }  # fmt: skip
    assert read(tmp_path, label_depth=0)[1] is None
    _, labels, lines = read(tmp_path, label_depth=3)
    assert labels == [None] * 4 + ["Nut/Hazel/Red"] * 2 + [None] * 2
    assert "6 images with fewer folders above have no label: Fruit/Apple/0.png" in lines
    assert "--label-depth 4: no image has so many folders" in refused(tmp_path, label_depth=4)


def test_what_spoils_the_labels_is_named(tmp_path):
    classes(tmp_path, "train/a", "train/b")
    put(tmp_path, "train/montage.png")
    _, labels, lines = read(tmp_path)
    assert labels is None
    assert "1 image beside the class folders a/, b/: montage.png; --label-depth 1" in lines
    assert read(tmp_path, label_depth=1)[1] == ["a", "a", "b", "b", None]


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([None, 0, 1, 2, 0], pa.int64(), [None, 0, 1, 2, 0]),
        ([float("nan"), 0.0, 1.0, 2.0, 0.0], pa.float64(), [None, 0, 1, 2, 0]),
        ([0.5, None, float("nan"), 1.0, 2.0], pa.float64(), [0.5, None, None, 1.0, 2.0]),
        (["", "a", "b", "a", None], pa.string(), [None, "a", "b", "a", None]),
    ],
)
def test_labels_that_are_missing(tmp_path, values, kind, expected):
    parquet(tmp_path / "a.parquet", 5, labels=values, kind=kind)
    _, labels, lines = read(tmp_path / "a.parquet")
    missing = expected.count(None)
    assert labels == expected
    assert f"{missing} of 5 labels {'is' if missing == 1 else 'are'} missing in 'label'" in lines
    parquet(tmp_path / "b.parquet", 2, labels=[None, None], kind=kind)
    _, labels, lines = read(tmp_path / "b.parquet")
    assert labels is None and "every label in 'label' is missing" in lines


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_labels_of_metadata(tmp_path, suffix):
    rows = [{"file_name": f"{i}.png", "kind": k} for i, k in enumerate(["ox", "yak", "ox"])]
    rows.append({"file_name": "gone.png", "kind": "ox"})
    put(tmp_path, *[f"{i}.png" for i in range(4)])
    write_metadata(tmp_path / f"metadata.{suffix}", rows)
    _, labels, lines = read(tmp_path)
    assert labels == ["ox", "yak", "ox", None]
    assert "1 image without a row in the metadata" in lines
    assert "1 row of metadata" in lines and "without an image: gone.png" in lines
    assert "1 of 4 labels is missing in 'kind'" in lines
    rows = [row | {"age": i, "label": 9 + i} for i, row in enumerate(rows)]
    write_metadata(tmp_path / f"metadata.{suffix}", rows)
    assert read(tmp_path)[1] == [9, 10, 11, None]
    assert read(tmp_path, label_column="kind")[1] == ["ox", "yak", "ox", None]
    assert "no column 'size'" in refused(tmp_path, label_column="size")
    write_metadata(tmp_path / f"metadata.{suffix}", [
        {key: row[key] for key in ("file_name", "kind", "age")} for row in rows
    ])  # fmt: skip
    assert "kind, age; --label-column NAME chooses" in read(tmp_path)[2]


def test_metadata_that_is_not_clear(tmp_path):
    put(tmp_path, "1.png", "2.png", "3.png")
    rows = [{"file_name": f"{i}.png", "label": label} for i, label in ((1, "007"), (2, "7"))]
    write_metadata(tmp_path / "metadata.csv", rows)
    assert read(tmp_path)[1] == ["007", "7", None]
    with open(tmp_path / "metadata.csv", "a") as file:
        file.write("\n\n,,\n3.png,9\n")
    assert read(tmp_path)[1] == ["007", "7", "9"]
    with open(tmp_path / "metadata.csv", "a") as file:
        file.write("3.png,8\n")
    assert "two rows differ on 3.png" in refused(tmp_path)
    (tmp_path / "metadata.csv").write_text("file_name,label\n1.png,a, b\n")
    assert "more fields than columns in the row of 1.png" in refused(tmp_path)


def write_metadata(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        lines = [",".join(rows[0]), *[",".join(map(str, row.values())) for row in rows]]
        path.write_text("\n".join(lines))


def test_metadata_of_other_kinds(tmp_path):
    put(tmp_path, "1.png", "2.png")
    rows = [{"file_name": f"{i}.png", "objects": {"bbox": [[1, 2, 3, 4]]}} for i in (1, 2)]
    write_metadata(tmp_path / "metadata.jsonl", rows)
    assert "'objects' of the metadata holds no labels" in read(tmp_path)[2]
    os.unlink(tmp_path / "metadata.jsonl")
    rows = {"file_name": ["1.png", "2.png"], "label": ["ox", "yak"]}
    pq.write_table(pa.table(rows), tmp_path / "metadata.parquet")
    assert read(tmp_path)[1] == ["ox", "yak"]
    put(tmp_path, "metadata.csv", content="file_name,label\n1.png,é\n".encode("latin-1"))
    assert "metadata.csv: not UTF-8" in refused(tmp_path)
    put(tmp_path, "metadata.csv", content=b"filename,label\n1.png,ox\n")
    os.unlink(tmp_path / "metadata.parquet")
    assert "no metadata.csv that describes them" in read(tmp_path)[2]


def test_metadata_of_splits_and_above_class_folders(tmp_path):
    for split in ("train", "test"):
        put(tmp_path, f"{split}/x/0.png", f"{split}/y/1.png")
        rows = [{"file_name": "x/0.png", "label": 1}, {"file_name": "y/1.png", "label": 0}]
        write_metadata(tmp_path / split / "metadata.csv", rows)
    _, labels, lines = read(tmp_path)
    assert labels == [1, 0] and "--label-depth 1 takes these" in lines
    assert read(tmp_path, label_depth=1)[1] == ["x", "y"]


def test_a_label_column_without_a_table_is_said(tmp_path):
    classes(tmp_path, "a", "b")
    assert "no table or metadata" in read(tmp_path, label_column="breed")[2]


def test_of_several_columns_of_labels_the_others_are_named(tmp_path):
    kinds = {name: datasets.ClassLabel(names=["x", "y"]) for name in ("domain", "label")}
    features = datasets.Features(image=datasets.Image(), **kinds)
    rows = {"image": [{"bytes": PNG, "path": None}] * 2, "domain": [0, 0], "label": [0, 1]}
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "a.parquet")
    _, labels, lines = read(tmp_path)
    assert labels == ["x", "y"] and "other columns of labels: domain" in lines


def test_lists_of_labels_that_are_not_known(tmp_path):
    values = [["a"], ["a", None], None, ["b", ""]]
    parquet(tmp_path / "a.parquet", 4, labels=values, kind=pa.list_(pa.string()))
    _, labels, lines = read(tmp_path)
    assert labels == [["a"], None, None, None] and "3 of 4 labels are missing" in lines


# ---- the Hub -------------------------------------------------------------------------------------


class Builder:
    info = datasets.DatasetInfo(
        features=datasets.Features(image=datasets.Image()),
        splits=datasets.SplitDict({"train": datasets.SplitInfo("train", num_examples=7)}),
    )


@pytest.mark.parametrize("default", [None, "mini"])
def test_configurations_of_the_hub(monkeypatch, default):
    asked = []
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda source: ["full", "mini"])
    monkeypatch.setattr(datasets, "get_dataset_default_config_name", lambda source: default)
    monkeypatch.setattr(
        datasets, "load_dataset_builder", lambda source, name=None: asked.append(name) or Builder()
    )
    made = plan_of("owner/name:full")
    assert made.choose().count == 7 and asked == ["full"]
    with pytest.raises(UserError, match="no configuration 'none'; full, mini"):
        plan_of("owner/name:none")
    if default is None:
        with pytest.raises(UserError, match="configurations, full, mini; say one: --data owner"):
            plan_of("owner/name")
    else:
        made = plan_of("owner/name")
        assert "configuration mini, its default; not read: full" in made.notes[0]


# ---- speed ---------------------------------------------------------------------------------------


def test_a_plan_needs_no_torch():
    code = (
        "import sys, common.plan, common.look; print({'torch', 'torchvision'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


def seconds_of_a_plan(root, **how):
    began = time.perf_counter()
    made = plan(root, **how)
    made.lines(made.choose())
    return time.perf_counter() - began, made


def test_many_folders_take_no_longer(tmp_path):
    for i in range(3000):
        put(tmp_path, f"{i}/a/1.jpg", f"{i}/b/2.jpg", content=b"")
    assert seconds_of_a_plan(tmp_path)[0] < 2  # in proportion to the folders, not to their square


@pytest.mark.slow
def test_a_hundred_thousand_files_are_planned_in_three_seconds(tmp_path):
    for start in range(0, 100_000, 1000):
        (tmp_path / f"{start}").mkdir()
        for i in range(1000):
            os.close(os.open(tmp_path / f"{start}" / f"{i}.jpg", os.O_CREAT))
    for path in list(tmp_path.glob("*/0.jpg")):
        path.write_bytes(PNG)
    seconds, made = seconds_of_a_plan(tmp_path)
    print(f"100,000 files planned in {seconds:.2f} s")
    assert made.choose().count == 100_000 and seconds < 3


@pytest.mark.slow
def test_a_million_rows_are_planned_without_their_images(tmp_path):
    cells = pa.array([{"bytes": PNG, "path": None}] * 1_000_000)
    labels = pa.array(range(1_000_000))
    pq.write_table(pa.table({"image": cells, "label": labels}), tmp_path / "a.parquet")
    seconds, made = seconds_of_a_plan(tmp_path)
    print(f"1,000,000 rows planned in {seconds:.2f} s")
    assert made.choose().count == 1_000_000 and seconds < 3


# ---- many files ----------------------------------------------------------------------------------


def test_a_record_of_files_is_json_and_the_same_files_are_no_difference(tmp_path):
    files = [("a/1.png", 7), ('quote".png', 0), ("猫 ], [.png", None), ("two\nlines.png", 10**12)]
    content = planning.record_of(files)
    assert content.decode() == "".join(json.dumps(file) + "\n" for file in files)
    record = tmp_path / "images.jsonl.gz"
    record.write_bytes(gzip.compress(content))
    assert planning.differences(record, files) == ""
    assert planning.differences(record, files[::-1]) == ""  # of names and sizes alone
    changed = [("a/1.png", 8), *files[1:]]
    assert "1 of 4 files differ in name or size" in planning.differences(record, changed)


@pytest.mark.parametrize("slow", [0, 1])
def test_sizes_and_times_are_the_same_of_quick_and_of_slow_disks(tmp_path, monkeypatch, slow):
    monkeypatch.setattr(planning, "SLOW", 0 if slow else 10)
    paths = [str(tmp_path / f"{i}.png") for i in range(100)]
    for i, path in enumerate(paths[:-1]):
        Path(path).write_bytes(bytes(i))
    sizes = [(path, i) for i, path in enumerate(paths[:-1])] + [(paths[-1], None)]
    assert list(planning.stats(paths, times=False)) == sizes
    found = dict(planning.stats(paths, times=True))
    assert found[paths[7]] == (7, os.stat(paths[7]).st_mtime_ns) and found[paths[-1]] is None
    assert list(planning.stats([], times=True)) == []
