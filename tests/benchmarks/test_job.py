"""The whole job at reduced size, without lightly, which comes from a registry."""

import io
import subprocess
import sys
from pathlib import Path

import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image
from torchvision.transforms.functional import to_pil_image

from common import cli, demo
from eval.results.page import read_folder
from tests.helpers import one_thread

sys.path.insert(0, str(Path(__file__).parent))  # as for a script, which imports its neighbours

import job
import throughput

SMALL = ["--images", "64", "--tests", "40", "--batch-size", "16"]
SMALL += ["--epochs", "1", "--rounds", "1", "--sides", "ours", "plain"]


@pytest.fixture
def source(tmp_path, monkeypatch):
    """Embedded images in the place of CIFAR-10, as JPEGs in a table, more of them than are used."""
    kinds = Features({"img": Image(), "label": ClassLabel(names=list(demo.CLASSES))})
    (tmp_path / "cifar10-jpeg").mkdir()
    for split, count in (("train", 100), ("test", 50)):
        pixels, labels = demo.split(split)
        cells = []
        for image in pixels[:count]:
            file = io.BytesIO()
            to_pil_image(image).save(file, "JPEG")
            cells.append({"bytes": file.getvalue(), "path": None})
        table = Dataset.from_dict({"img": cells, "label": labels[:count].tolist()}, kinds)
        table.to_parquet(tmp_path / "cifar10-jpeg" / f"{split}-00000-of-00001.parquet")
    monkeypatch.setattr(throughput, "DATA", tmp_path)
    return tmp_path


def test_the_sides_get_as_many_pairs_and_one_judge(source, monkeypatch, capsys):
    judged_on = []
    extract = job.extract

    def noted(network, split, preprocess, *args, **options):
        judged_on.append((split.name, len(split), preprocess.size, preprocess.crop))
        return extract(network, split, preprocess, *args, **options)

    monkeypatch.setattr(job, "extract", noted)
    out = source / "out"
    with one_thread():
        ours, plain = job.main([*SMALL, "--out", str(out), "--keep", str(source / "results")])
    assert (ours.side, plain.side) == ("ours", "plain")
    assert ours.pairs == plain.pairs == 64
    assert all(0 < each.training < each.wall for each in (ours, plain))
    assert all(0 <= each.knn <= 100 for each in (ours, plain))
    assert len(list((out / "images" / "train").rglob("*.jpg"))) == 64
    bank, queries = judged_on[:2]
    assert judged_on == [bank, queries] * 3  # of an untrained encoder, too
    assert (bank[1:], queries[1:]) == ((64, 32, 1.0), (40, 32, 1.0))
    said = capsys.readouterr().out
    assert "ours, 1 epoch " in said and "untrained: kNN " in said
    shown = matplotlib.image.imread(out.with_suffix(".png"))[..., :3]
    for side, there in (("ours", True), ("plain", True), ("lightly", False)):
        colour = matplotlib.colors.to_rgb(job.COLOURS[side])
        near = np.abs(shown - colour).max(axis=2) < 0.02
        assert (near.sum() > 50) == there, side  # of a marker and of the legend
    [(_, record)] = read_folder(source / "results")
    assert set(record["figures"]) == {"ours, 1 epoch", "plain, 1 epoch"}


def test_the_command_takes_as_many_steps_as_the_peers(monkeypatch, tmp_path):
    """Whose epochs leave out the part of a batch, where ours take one step more."""
    from simclr.config import RECIPES, Config
    from simclr.optim import total_steps

    asked = []

    def noted(command, **options):
        asked.append(command)
        return subprocess.CompletedProcess(command, 1, "")

    monkeypatch.setattr(job.subprocess, "run", noted)
    for count, epochs, batch in ((30, 1, 10), (39, 1, 10), (39, 2, 10), (35, 7, 16)):
        (tmp_path / f"{count}" / "train").mkdir(parents=True, exist_ok=True)
        for i in range(count):
            (tmp_path / f"{count}" / "train" / f"{i}.jpg").touch()
        with pytest.raises(job.UserError):
            job.run("ours", tmp_path / f"{count}", tmp_path / "run", epochs, batch, 1)
        words = [word for word in asked[-1][3:] if word != "cifar10"]
        assert words[:2] == ["--stem", "imagenet"]
        _, cfg, _ = cli.parse("simclr", Config, RECIPES, ["cifar10", "--data", "demo", *words])
        assert total_steps(cfg, count) == epochs * (count // batch)


def fails(capsys, *argv):
    """What it prints as its one line."""
    with pytest.raises(SystemExit) as error:
        cli.run(job.main, [*SMALL, *map(str, argv)])
    assert error.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    return line


def test_what_is_missing_is_one_line(source, monkeypatch, capsys):
    out = source / "out"
    few = fails(capsys, "--out", out, "--images", 101)
    assert few.endswith("train has 100 images, not 101")
    assert "--images 8: fewer than --batch-size 16" in fails(capsys, "--images", 8)
    with monkeypatch.context() as patch:
        patch.setattr(job, "HERE", source)
        said = fails(capsys, "--out", out, "--sides", "plain")
        assert f"the side plain failed; its words are in {out}/plain-1-1.log" in said
        assert "peers.py" in (out / "plain-1-1.log").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(throughput, "BUILD", throughput.ROOT / "build" / "nowhere")
        patch.setattr(throughput.subprocess, "run", no_registry)
        assert "lightly cannot be installed; try:" in fails(capsys, "--sides", "lightly")
    monkeypatch.setattr(throughput, "DATA", source / "elsewhere")
    assert "SSL_TEST_IMAGES names the folder of images" in fails(capsys)


def no_registry(*args, **options):
    raise subprocess.CalledProcessError(1, "pip")
