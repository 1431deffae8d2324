"""What an evaluation takes from the run's way to read its images, and what it is told otherwise."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import eval.knn
import eval.linear
import eval.neighbours
from common.errors import UserError
from common.files import read_json
from eval.encoder import load_encoder
from eval.settings import KNN
from eval.subjects import subjects
from tests.common.test_plan import classes, parquet, png, put
from tests.eval.harness import save_run
from tests.helpers import evaluate, pretrain


@pytest.fixture
def judged(tmp_path, capsys):
    """kNN on a run of the given settings: its record, and what was printed."""

    def call(data, *argv, **config):
        run = tmp_path / "run"
        if not run.exists():
            save_run(run, data=str(data), **config)
        evaluate(eval.knn, run, "--k", "3", *argv)
        [row] = [read_json(path) for path in (run / "results").iterdir()]
        shutil.rmtree(run / "results")
        (run / "results").mkdir()
        return row, capsys.readouterr().err

    return call


def refused(judged, capsys, *args, **config):
    with pytest.raises(SystemExit) as caught:
        judged(*args, **config)
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_labels_that_are_missing_are_left_out_and_counted(tmp_path, judged):
    parquet(tmp_path / "a_train.parquet", 9, labels=[0, 1, None, 1, 0, 1, 0, None, 1])
    parquet(tmp_path / "a_test.parquet", 4, labels=[0, None, 1, 0])
    row, said = judged(tmp_path)
    assert (row["train_images"], row["test_images"]) == (7, 3)
    assert "2 of 9 labels are missing in 'label'" in said
    assert "1 of 4 labels is missing in 'label'" in said
    assert "split train 9, test 4" in said


def test_a_test_split_without_labels_names_the_flag_that_helps(tmp_path, judged, capsys):
    classes(tmp_path / "d" / "train", "cat", "dog", count=6)
    put(tmp_path / "d", *[f"test/{i}.png" for i in range(4)])
    said = refused(judged, capsys, tmp_path / "d")
    assert "the test split has no labels (test: no class folders" in said
    assert "--test-split none" in said
    row, _ = judged(tmp_path / "d", "--test-split", "none")
    assert (row["train_images"], row["test_images"]) == (12, 12)  # each left out in turn
    assert row["columns"] == {"test_split": "none"}
    classes(tmp_path / "d" / "holdout", "cat", "dog", count=2)
    row, said = judged(tmp_path / "d", "--split", "train", "--test-split", "holdout")
    assert (row["train_images"], row["test_images"]) == (12, 4)
    assert "split train 12, holdout 4; others: test 4" in said
    assert "is what is trained on" in refused(
        judged, capsys, tmp_path / "d", "--split", "train", "--test-split", "train"
    )


def test_the_runs_label_depth_and_split_are_taken(tmp_path, judged):
    data = tmp_path / "d"
    classes(data, "train2014/a/x", "train2014/a/y", "train2017/a/x", "train2017/b/x", count=3)
    config = {"split": "train2017", "label_depth": 2}
    row, _ = judged(data, **config)
    assert row["train_images"] == 6 and row["columns"] == config
    row, _ = judged(data, "--split", "train2014")
    assert row["columns"]["split"] == "train2014"


def test_a_split_without_labels_gives_way_to_train(tmp_path, judged):
    put(tmp_path / "d", *[f"unlabeled/{i}.png" for i in range(3)])
    classes(tmp_path / "d", "train/a", "train/b", count=3)
    classes(tmp_path / "d", "test/a", "test/b", count=1)
    row, said = judged(tmp_path / "d", split="unlabeled")
    assert (row["train_images"], row["test_images"]) == (6, 2)
    assert "unlabeled has no labels: train is judged with in its place" in said


def test_a_relative_source_is_found_from_another_folder_and_never_asked_of_the_hub(
    tmp_path, monkeypatch
):
    def asked(*args, **more):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr("common.tables.of_hub", asked)
    classes(tmp_path / "pics" / "birds", "a", "b", count=6)  # of the form of an id of the Hub
    monkeypatch.chdir(tmp_path)
    words = "demo --data pics/birds --out run --image-size 16 --batch-size 6 --epochs 1"
    pretrain("simclr", *words.split(), *["--warmup-epochs", "0", "--knn-every", "0"])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    evaluate(eval.knn, "../run", "--k", "3")
    [path] = (tmp_path / "run" / "results").iterdir()
    assert read_json(path)["train_images"] == 12
    shutil.rmtree(tmp_path / "pics")
    with pytest.raises(SystemExit):
        evaluate(eval.knn, "../run", "--k", "3")


def test_features_are_those_of_the_rule_by_which_pixels_are_read(tmp_path, judged):
    for i in range(16):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 4), dtype=np.uint8)
        pixels[:, i % 2 * 8 :, 3] = 255 * (i % 2)
        pixels[:8, :, 3] = 255
        (tmp_path / "d" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "d" / "ab"[i % 2] / f"{i}.png")
    run = save_run(tmp_path / "run", data=str(tmp_path / "d"))
    keys = set()
    for alpha in ("white", "drop"):
        [subject] = subjects(KNN(run=str(run), alpha=alpha))
        subject.features(subject.splits()[0])
        keys |= {path.name for path in (run / "features").iterdir()}
        assert len(keys) == (1 if alpha == "white" else 2)


def test_another_source_of_the_same_names_is_not_the_runs(tmp_path):
    classes(tmp_path / "one", "a", "b", count=6)
    classes(tmp_path / "two", "a", "b", count=6)
    put(tmp_path / "two", "a/0.png", content=png(5) + b"another size")
    words = f"demo --data {tmp_path}/one --out {tmp_path}/run --image-size 16 --batch-size 6"
    pretrain(
        "simclr", *words.split(), *["--epochs", "1", "--warmup-epochs", "0", "--knn-every", "0"]
    )
    for data in ("one", "two"):
        evaluate(eval.knn, tmp_path / "run", "--data", tmp_path / data, "--k", "3")
    names = sorted(path.name for path in (tmp_path / "run" / "results").iterdir())
    assert len(names) == 2 and ["-on-" in name for name in names].count(True) == 1


def test_all_splits_leave_none_to_test_on(tmp_path, judged, capsys):
    classes(tmp_path / "d", "train/a", "train/b", "test/a", "test/b", count=3)
    row, _ = judged(tmp_path / "d", split="all")
    assert row["train_images"] == 12 and row["deviations"] == [
        "each training image left out in turn"
    ]
    said = refused(judged, capsys, tmp_path / "d", "--test-split", "test")
    assert "--split all trains on it too" in said


def test_images_that_were_moved_are_the_runs(tmp_path, capsys):
    classes(tmp_path / "one", "Fruit/Apple", "Fruit/Pear", "Nut/Wal", count=4)
    words = f"demo --data {tmp_path}/one --out {tmp_path}/run --image-size 16 --batch-size 6"
    words += " --epochs 1 --warmup-epochs 0 --knn-every 0 --label-depth 2"
    pretrain("simclr", *words.split())
    shutil.move(tmp_path / "one", tmp_path / "two")
    with pytest.raises(SystemExit):
        evaluate(eval.knn, tmp_path / "run")
    assert "the run's images are not there any more; say where: --data" in capsys.readouterr().err
    evaluate(eval.linear, tmp_path / "run", "--data", tmp_path / "two", "--protocol", "features")
    [path] = (tmp_path / "run" / "results").iterdir()
    assert read_json(path)["columns"] == {"label_depth": 2} and "-on-" not in path.name
    (tmp_path / "two" / "Nut" / "Wal" / "0.png").unlink()  # no longer those of the run
    evaluate(eval.knn, tmp_path / "run", "--data", tmp_path / "two", "--k", "3")
    other = [read_json(p) for p in (tmp_path / "run" / "results").iterdir() if p != path]
    assert other[0]["columns"] == {} and other[0]["train_images"] == 11


def test_labels_by_another_column_are_refused(tmp_path, judged, capsys):
    parquet(tmp_path / "train.parquet", 6, "label", [0, 1] * 3)
    parquet(tmp_path / "test.parquet", 4, "target", [0, 1] * 2)
    said = refused(judged, capsys, tmp_path)
    assert "labels of train are by column 'label', those of test by column 'target'" in said


def test_the_range_of_values_is_the_encoders(tmp_path, capsys):
    def deep(folder, scale):
        for i in range(12):
            values = np.random.default_rng(i).integers(0, scale, (16, 16), dtype=np.uint16)
            (tmp_path / folder / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(tmp_path / folder / "ab"[i % 2] / f"{i}.png")

    deep("bright", 4096)
    deep("dim", 800)
    deep("beyond", 9000)
    words = f"demo --data {tmp_path}/bright --out {tmp_path}/run --image-size 16 --batch-size 6"
    pretrain(
        "simclr", *words.split(), *["--epochs", "1", "--warmup-epochs", "0", "--knn-every", "0"]
    )
    assert "read as 12 bits" in capsys.readouterr().err
    assert load_encoder(str(tmp_path / "run")).metadata["value_range"] == [0, 4095]

    def subject_on(folder, **more):
        [subject] = subjects(KNN(run=str(tmp_path / "run"), data=str(tmp_path / folder), **more))
        return subject

    image = next((tmp_path / "dim").rglob("*.png"))
    train = subject_on("dim").labelled()[0]
    assert "looked at: read as 0 to 4,095" in capsys.readouterr().err
    with Image.open(image) as picture:
        brightest = np.asarray(picture).max()
    shown = train.try_decode(train.encoded.index(str(image)))
    assert int(shown.max()) == int(
        int(brightest) * 255 / 4095
    )  # and not the 255 of its own 10 bits
    assert subject_on("dim", value_range=(0.0, 800.0)).how.value_range == (0.0, 800.0)
    with pytest.raises(UserError, match="cannot be decoded"):  # not cut off, as nobody said so
        subject_on("beyond").labelled()[0].load(1.0)


def test_the_online_classifier_does_not_see_missing_labels(tmp_path, monkeypatch):
    from eval import online

    parquet(tmp_path / "train.parquet", 12, labels=[None, None, 1, 0] * 3)
    parquet(tmp_path / "test.parquet", 4, labels=[0, 1, 0, None])
    seen, update = [], online.update

    def spy(linear, optimizer, features, labels, accelerator):
        seen.append(labels)
        return update(linear, optimizer, features, labels, accelerator)

    monkeypatch.setattr(online, "update", spy)
    words = f"demo --data {tmp_path} --out {tmp_path}/run --image-size 16 --batch-size 6 --epochs 4"
    pretrain("simclr", *words.split(), *["--warmup-epochs", "0", "--online-linear"])
    labels = torch.cat(seen)
    assert (labels == online.HIDDEN).double().mean() == 0.5
    [path] = (tmp_path / "run" / "results").iterdir()
    row = read_json(path)
    assert (row["train_images"], row["test_images"]) == (6, 3)
