"""`python -m common.look`: the plan of a source without training, and what a run keeps of it."""

import gzip
import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from common import look
from common.cli import run as guarded
from common.files import read_json
from tests.common.test_plan import classes, parquet, png, put
from tests.helpers import pretrain


@pytest.fixture
def looked(capsys):
    """What the command prints: (status, output, errors)."""

    def call(*argv):
        status = 0
        try:
            arguments = guarded(
                look.cli.parse_settings, look.Settings, list(map(str, argv)), "", ""
            )
            guarded(look.main, arguments)
        except SystemExit as error:
            status = error.code
        return status, *capsys.readouterr()

    return call


def test_a_plan_is_printed_and_written(tmp_path, looked):
    classes(tmp_path / "d" / "train", "cat", "dog", count=3)
    classes(tmp_path / "d" / "val", "cat", "dog", count=1)
    put(tmp_path / "d", "train/a.xyz", "train/b.xyz", "notes.txt")
    (tmp_path / "d" / "val" / "cat" / "0.png").write_bytes(b"no image")
    status, said, error = looked(tmp_path / "d", "--out", tmp_path / "out")
    assert status == 0, error
    assert "train                6 images  2 classes by class folders: cat 3, dog 3" in said
    assert "val                  2 images  2 classes by class folders: cat 1, dog 1" in said
    assert (
        "7 PNG RGB 8-bit, 6 x 6 px" in said and "3 other files passed over: .xyz 2, .txt 1" in said
    )
    record = read_json(tmp_path / "out" / "plan.json")
    assert record["splits"] == {"train": 6, "val": 2} and record["split"] == "train"
    assert record["classes"] == {"cat": 3, "dog": 3} and record["labels"]["missing"] == 0
    looked(tmp_path / "d", "--split", "val", "--out", tmp_path / "out")
    with Image.open(tmp_path / "out" / "sheet.png") as sheet:
        colours = sheet.getcolors(2**20)
        assert sheet.width > 500 and len(colours) > 100
        assert any(colour == (255, 0, 0) for _, colour in colours)  # the cross of the bad one


def test_what_a_run_would_refuse_has_status_2(tmp_path, looked):
    classes(tmp_path / "classes", "bus", "train")
    assert looked(tmp_path / "classes")[0] == 2
    assert looked(tmp_path / "classes", "--split", "all")[0] == 0
    put(tmp_path / "bad", *[f"{i}.png" for i in range(9)], content=b"no image")
    status, _, error = looked(tmp_path / "bad")
    assert status == 2 and "9 of 9 images tried cannot be decoded" in error
    assert looked(tmp_path / "gone")[0] == 2
    for i in range(8):
        Image.new("I;16", (4, 4), i).save(tmp_path / "bad" / f"{i}.tif")
        Image.effect_noise((4, 4), 9).convert("I;16").save(tmp_path / "bad" / f"{i}.png")
    (tmp_path / "bad" / "8.png").unlink()
    status, _, error = looked(tmp_path / "bad", "--value-range", "5000", "6000")
    assert status == 2 and "8 of 16 images tried" in error and "--value-range" in error
    assert looked(tmp_path / "bad", "--value-range", "0", "255")[0] == 0


def test_a_table_and_the_demo(tmp_path, looked):
    parquet(tmp_path / "a_train.parquet", 6, labels=[0, 1, None, 1, 0, 1])
    parquet(tmp_path / "a_test.parquet", 3)
    _, said, _ = looked(tmp_path)
    assert "2 classes by column 'label': 0 2, 1 3; missing 1" in said
    assert "1 of 6 labels is missing" in said
    status, said, _ = looked("demo", "--out", tmp_path / "sheet")
    assert status == 0 and "5,120 images" in said and (tmp_path / "sheet" / "sheet.png").exists()


@pytest.mark.parametrize("texts", [["iVBORw0KGgo" * 700], ["images/0.png", "images/1.png"]])
def test_a_column_of_texts_is_one_short_line(tmp_path, looked, texts):
    pq.write_table(pa.table({"img": texts * 8}), tmp_path / "a.parquet")
    status, said, error = looked(tmp_path / "a.parquet", "--image-column", "img")
    assert status == 2 and len(error) < 300 and "cannot be decoded" in error
    assert len(said) < 1000


# ---- what a run keeps ----------------------------------------------------------------------------


def flags(source, out):
    words = f"demo --data {source} --out {out} --image-size 16 --batch-size 8 --epochs 1"
    return (words + " --warmup-epochs 0 --knn-every 0").split()


def test_a_run_prints_its_plan_and_keeps_it(tmp_path, capsys):
    classes(tmp_path / "d" / "train", "cat", "dog", count=8)
    classes(tmp_path / "d" / "test", "cat", "dog", count=2)
    pretrain("simclr", *flags(tmp_path / "d", tmp_path / "run"))
    said = capsys.readouterr().err
    assert "split train 16; left out: test 4" in said
    assert read_json(tmp_path / "run" / "plan.json")["split"] == "train"
    content = gzip.decompress((tmp_path / "run" / "images.jsonl.gz").read_bytes()).decode()
    files = [json.loads(line) for line in content.splitlines()]
    assert len(files) == 16 and files[0] == ["train/cat/0.png", len(png())]


def test_a_run_goes_on_where_its_images_are_and_nowhere_else(tmp_path, capsys, monkeypatch):
    classes(tmp_path / "one" / "d", "cat", "dog", count=8)
    monkeypatch.chdir(tmp_path)
    pretrain("simclr", *flags("one/d", "run"))
    for spelt in ("one/d/", "./one/d", tmp_path / "one" / "d"):
        pretrain("simclr", *flags(spelt, "run"))
    assert "now at" not in capsys.readouterr().err
    shutil.copytree("one", "two")
    pretrain("simclr", *flags("two/d", "run"))
    assert "the images of this run, now at" in capsys.readouterr().err
    shutil.move("two", "three")
    with pytest.raises(SystemExit):
        pretrain("simclr", *flags(tmp_path / "two" / "d", "run"))
    assert "--data NEW goes on where the images are now" in capsys.readouterr().err
    shutil.move("three", "two")
    put(tmp_path / "two" / "d", "cat/3.png", content=png(1) + b"more")
    (tmp_path / "two" / "d" / "dog" / "1.png").rename(tmp_path / "two" / "d" / "dog" / "x.png")
    with pytest.raises(SystemExit):
        pretrain("simclr", *flags("two/d", "run"))
    error = capsys.readouterr().err
    assert "other images: 2 of 16 files differ in name or size, e.g. cat/3.png" in error


def test_a_table_that_was_rewritten_is_read_afresh(tmp_path):
    import os

    from common.data import open_images

    parquet(tmp_path / "a.parquet", 4)
    before = os.stat(tmp_path / "a.parquet")
    assert len(open_images(str(tmp_path / "a.parquet"))) == 4
    parquet(tmp_path / "a.parquet", 6)
    os.utime(tmp_path / "a.parquet", ns=(before.st_atime_ns, before.st_mtime_ns))
    images = open_images(str(tmp_path / "a.parquet"))
    assert len(images) == 6
    assert images.try_decode(5) is not None and not images.bad
