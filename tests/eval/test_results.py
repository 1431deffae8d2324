"""What is judged, and its record: written, named and read; the kNN command on a small run."""

import json
import math

import pytest
import torch
from PIL import Image
from torch import nn

import eval.knn
import eval.linear
import eval.subjects
from common.config import RunConfig
from common.data import ImageSplit
from common.errors import UserError
from eval.encoder import Preprocess
from eval.features import digest_of
from eval.identity import fingerprint
from eval.results import record
from eval.results.record import confidence, read, results_of, run_id, with_interval
from eval.settings import KNN
from eval.subjects import subjects
from tests.eval.harness import judged, records, save_images, save_run
from tests.helpers import evaluate


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with an exported encoder, on 30 labelled images and 12 to test."""
    folder = tmp_path_factory.mktemp("judged")
    source = save_images(folder / "source")
    return save_run(folder / "run", data=str(source))


@pytest.fixture
def command(capsys):
    def call(module, *argv):
        evaluate(module, *argv)
        return capsys.readouterr().out

    return call


def test_knn_of_a_run_and_its_baselines(run, command):
    shown = command(eval.knn, run, "--k", "5", "1000", "--baselines", "random", "pixels")
    found = records(run)
    subjects_of = ("encoder", "random", "pixels")
    assert found.keys() == {f"knn-weighted-k{k}-{name}" for k in (5, 1000) for name in subjects_of}
    assert len(shown.splitlines()) == 6 and shown.count("Top-1") == 6
    row = found["knn-weighted-k5-encoder"]
    assert row["version"] == 2 and row["metric"] == "top1"
    assert (row["task"], row["protocol"], row["subject"]) == ("knn", "weighted", "encoder")
    assert row["settings"] == {"k": 5, "temperature": 0.1, "features": 128, "precision": "fp32"}
    assert row["metrics"] == {"top1": 100.0}  # three classes: no Top-5
    assert found["knn-weighted-k5-pixels"]["metrics"] == {"top1": 100.0}
    assert row["train_images"] == 30 and row["test_images"] == 12
    assert row["method"] == "simclr" and row["recipe"] == "demo" and row["seed"] == 9
    assert row["epochs"] == 1.0 and row["encoder"] == "demo" and row["run"]["batch_size"] == 6
    assert row["published"] == "some-row" and row["pretrained_at"] and row["seconds"] > 0
    assert {"command", "commit", "device", "versions", "started"} <= row["judged"].keys()
    assert row["interval"] == pytest.approx(confidence(100.0, 12))
    # the random baseline has the very weights that were exported here
    assert found["knn-weighted-k5-random"]["metrics"] == row["metrics"]


def test_what_is_judged_otherwise_has_a_file_of_its_own_and_the_same_again_has_not(run, command):
    def files(*argv, module=eval.linear, flags=("--protocol", "features")):
        command(module, run, *flags, *argv)
        return {path.name for path in (run / "results").glob("*.json")}

    before = files("--epochs", "1")
    assert files("--epochs", "1") == before
    for argv in ("--epochs 2", "--epochs 1 --seed 2", "--epochs 1 --batch-size 7"):
        new = files(*argv.split())
        assert len(new) == len(before) + 1
        before = new
    for temperature in ("0.1", "0.07"):
        new = files(module=eval.knn, flags=("--k", "4", "--temperature", temperature))
        assert len(new) == len(before) + 1
        before = new
    source = run.parent / "source" / "train"
    new = files("--epochs", "1", "--data", source) - before
    [row] = [read(run / "results" / name) for name in new]
    assert row.data == str(source) and row.test_images == 6
    assert "linear-features-encoder-on-" in new.pop()


def test_a_source_without_a_test_split_is_a_deviation(run, command):
    command(eval.knn, run, "--k", "3", "--data", run.parent / "source" / "train")
    [row] = [
        row for row in results_of(run)[0] if row.settings.get("k") == 3 and row.test_images == 30
    ]
    assert row.deviations == ("each training image left out in turn",)


def test_settings_are_all_that_the_judge_was_told():
    told = record.settings_of(KNN(run="r", temperature=(0.2,)), k=3)
    assert told == {"k": 3, "temperature": [0.2], "precision": "fp32"}


def test_the_id_of_a_run_is_that_of_its_settings():
    settings = {f: getattr(RunConfig(), f) for f in RunConfig.__dataclass_fields__} | {"dim": 64}
    known = run_id("moco", settings)
    assert len(known) == 8 and int(known, 16) >= 0
    for free in ("out", "workers", "memory_gb", "log_every", "save_every", "trackers", "processes"):
        assert run_id("moco", settings | {free: "other"}) == known, free
    for change in ({"dim": 65}, {"seed": 2}, {"precision": "bf16"}):
        assert run_id("moco", settings | change) != known, change
    assert run_id("byol", settings) != known


def test_a_record_of_an_older_version_is_named_with_the_command_that_judges_again(tmp_path):
    run = save_run(tmp_path / "run")
    judged(run)
    command = "python -m eval.linear runs/x"
    old = {"protocol": "linear-simclr", "top1": 50.0, "judged": {"command": command}}
    path = run / "results" / "linear-simclr-encoder.json"
    path.write_text(json.dumps(old))
    found, older = results_of(run)
    assert len(found) == 1
    assert len(older) == 1 and path.name in older[0] and older[0].endswith(command)
    (run / "results" / "000.json").unlink()
    with pytest.raises(UserError, match=f"judge again: {command}"):
        results_of(run)
    path.unlink()
    with pytest.raises(UserError, match=r"first: python -m eval\.knn"):
        results_of(run)


def test_features_are_computed_once(run, command, monkeypatch, capsys):
    calls, encode = [], eval.subjects.encode
    monkeypatch.setattr(
        "eval.subjects.encode",
        lambda *args, **how: calls.append(args[1].name) or encode(*args, **how),
    )
    cache = run / "features"
    for path in cache.glob("*"):
        path.unlink()
    first = command(eval.knn, run, "--k", "3")
    assert len(calls) == 2 and len(list(cache.iterdir())) == 2
    assert command(eval.knn, run, "--k", "3") == first
    assert len(calls) == 2

    damaged = next(cache.iterdir())
    whole = damaged.read_bytes()
    middle = len(whole) // 2
    for i, cut in enumerate((whole[:-5], whole[:middle] + b"\xff" * 8 + whole[middle + 8 :])):
        damaged.write_bytes(cut)
        evaluate(eval.knn, run, "--k", "3")
        assert f"{damaged}: cannot be read" in capsys.readouterr().err
        assert len(calls) == 3 + i and damaged.read_bytes() == whole

    source = run.parent / "source"
    changed = source / "test" / "a" / "00.png"
    original = changed.read_bytes()
    Image.new("RGB", (16, 16), (200, 9, 9)).save(changed)
    command(eval.knn, run, "--k", "3")
    assert len(calls) == 5 and "test" in calls[-1]  # the training images are as they were
    changed.write_bytes(original)


@pytest.mark.parametrize("part", ["weight", "input", "layers"])
def test_a_key_sees_what_features_depend_on(part):
    images = ImageSplit("x", torch.zeros(2, 3, 4, 4, dtype=torch.uint8))
    network, preprocess = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU()), Preprocess(4)
    before = digest_of(network, preprocess, images)
    assert digest_of(network, preprocess, ImageSplit("y", images.encoded.clone())) == before
    assert digest_of(network, preprocess, ImageSplit("x", images.encoded[:1])) != before
    if part == "weight":
        with torch.no_grad():
            network[0].weight[0, 0] += 1
    elif part == "input":
        preprocess = Preprocess(4, crop=0.5)
    else:
        network[1] = nn.Tanh()
    assert digest_of(network, preprocess, images) != before


def test_a_file_without_its_run_needs_data(run, command, tmp_path):
    path = tmp_path / "alone.safetensors"
    path.write_bytes((run / "encoder.safetensors").read_bytes())
    shown = command(eval.knn, path, "--k", "3", "--data", run.parent / "source")
    assert "Top-1 100.0" in shown and list(tmp_path.iterdir()) == [path]
    with pytest.raises(UserError, match="--data SOURCE"):
        next(subjects(KNN(run=str(path))))


def test_subjects_share_their_images(run):
    first, second = (
        (subject, subject.splits())
        for subject in subjects(KNN(run=str(run), baselines=("random",)))
    )
    assert first[1] is second[1]
    assert [subject.encoder.name for subject, _ in (first, second)] == ["encoder", "random"]


def test_a_damaged_config_is_one_line(run, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"config": {}})[:-3])
    with pytest.raises(UserError, match=r"config\.json: cannot be read"):
        next(subjects(KNN(run=str(tmp_path))))


@pytest.mark.parametrize(("percent", "count"), [(0, 12), (50, 100), (91.3, 10_000), (100, 7)])
def test_the_interval_is_wilsons(percent, count):
    """Its ends are where a share p, with deviation sqrt(p (1 - p) / n), is 1.96 deviations off."""
    measured, z, ends = percent / 100, 1.959964, []
    for low, high in ((0.0, measured), (measured, 1.0)):
        inside, outside = (high, low) if high == measured else (low, high)
        for _ in range(200):
            middle = (inside + outside) / 2
            far = (measured - middle) ** 2 > z * z * middle * (1 - middle) / count
            inside, outside = (inside, middle) if far else (middle, outside)
        ends.append(inside)
    assert confidence(percent, count) == pytest.approx(50 * (ends[1] - ends[0]), rel=1e-6)


def test_the_interval_narrows_with_the_root_of_the_count():
    assert confidence(80, 40_000) == pytest.approx(confidence(80, 10_000) / 2, rel=1e-3)
    assert confidence(50, 10_000) == pytest.approx(100 * 1.96 * math.sqrt(0.25 / 10_000), rel=1e-3)


def test_a_fingerprint_sees_every_bit():
    network = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)).eval()
    before = fingerprint(network)
    network(torch.rand(2, 3, 4, 4))
    assert fingerprint(network) == before
    with torch.no_grad():
        weight = network[0].weight
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    after = fingerprint(network)
    assert after != before
    network.train()(torch.rand(2, 3, 4, 4))  # running statistics move
    assert fingerprint(network) != after


@pytest.mark.parametrize(
    "percent, count, said",
    [
        (50.0, 10_000, "50.0 ± 1.0"),
        (97.5, 2_000, "97.5 ± 0.7"),
        (100.0, 9, "100.0 (70.1 to 100.0)"),
        (0.0, 9, "0.0 (0.0 to 29.9)"),
    ],
)
def test_an_interval_that_is_not_centred_is_told_by_its_ends(percent, count, said):
    """Wilson (1927), eq. 1: for 9 of 9 the ends are 1 / (1 + z^2 / 9) and 1."""
    assert with_interval(percent, confidence(percent, count), count) == said
    resampled = confidence(percent, count) + 1  # of a measure that is no share: no such centre
    assert with_interval(percent, resampled, count) == f"{percent:.1f} ± {resampled:.1f}"
