"""A run on images, in a folder and of classes whose names are not UTF-8, from views to the page."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import eval.compare
import eval.finetune
import eval.knn
import eval.neighbours
from common.data import open_images
from common.errors import UserError, printable
from common.files import utf8_name
from tests.helpers import evaluate, pretrain, rows

TINY = ("--image-size", 16, "--batch-size", 8, "--warmup-epochs", 0, "--knn-every", 0)


def named(folder, name):
    return folder / os.fsdecode(name)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = named(tmp_path_factory.mktemp("source"), b"d\xe8")
    for c, name in enumerate((b"caf\xe9", b"th\xe9")):
        named(folder, name).mkdir(parents=True)
        for i in range(12):
            picture = Image.new("RGB", (16, 16), (20 * i, 200 * c, 0))
            picture.save(named(folder, name) / f"{i}.png")
    return folder


def test_a_run_goes_on_and_is_judged_and_every_file_shows_the_name(
    source, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    run, page = named(Path(), b"o\xe9"), named(Path(), b"r\xe9")
    for _ in range(2):
        pretrain("simclr", "demo", "--data", source, "--out", run, "--epochs", 1, *TINY)
    said = capfd.readouterr().err
    assert r"d\xe8: 24 images, 2 classes" in said and r"done: o\xe9; next" in said
    assert "going on from step" in said and len(rows(run)) == 2
    assert json.loads((run / "config.json").read_text())["config"]["data"].endswith(r"/d\xe8")
    assert EventAccumulator(utf8_name(run)).Reload().Tags()["scalars"]

    subset = tmp_path / "subset"
    subset.write_bytes(b"caf\xe9/1.png\nth\xe9/2.png\n")
    evaluate(eval.knn, run, "--k", 5)
    evaluate(eval.knn, r"o\xe9", "--k", 5, "--data", printable(str(source)))  # as it is shown
    evaluate(eval.finetune, run, "--epochs", 1, "--subset", subset)
    evaluate(eval.neighbours, run)
    evaluate(eval.compare, run, "--report", page, "--keep", named(Path(), b"k\xe9"))
    assert len(list((run / "results").glob("*.json"))) == 2  # of the same images each time
    assert capfd.readouterr().out.count(r"d\xe8") >= 3
    html = (page / "index.html").read_text("utf-8")
    assert r"caf\xe9" in html and r"th\xe9" in html and r"o\xe9" in html
    for path in tmp_path.rglob("*"):
        if path.suffix in (".json", ".html", ".md", ".tsv"):
            assert r"\udc" not in path.read_bytes().decode("utf-8"), path
    assert (run / "neighbours.png").exists() and (run / "compare.png").exists()


def test_classes_are_shown_and_those_that_would_look_alike_are_refused(source):
    assert open_images(str(source)).classes == (r"caf\xe9", r"th\xe9")
    other = source.parent / "alike"
    for name in (b"caf\xe9", rb"caf\xe9"):
        named(other, name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(named(other, name) / "1.png")
    with pytest.raises(UserError, match=r"look alike: 'caf\\\\xe9' and 'caf\\udce9'; rename"):
        open_images(str(other))
