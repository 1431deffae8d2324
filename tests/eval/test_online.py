"""The classifier of `--online-linear`: what it sees, that nothing else changes, that it goes on."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from torch import nn

from common import encoders
from common.run import Run
from common.views import ViewPairs
from eval import online
from tests.eval.harness import record_of
from tests.helpers import (
    METHODS,
    assert_same_run,
    checkpoints,
    ended,
    exported,
    forked,
    pretrain,
    rows,
)

COUNT, BATCH, EPOCHS = 50, 16, 4
NEW = {"online_linear", "online_linear_train"}
VARIANTS = [
    ("simclr", ()), ("simclr", ("--grad-cache-chunk", 8)), ("moco", ()), ("moco", ("--symmetric",)),
    ("byol", ()), ("byol", ("--accumulate", 2)),
]  # fmt: skip


def a_folder(root, splits):
    """Noise of three colours in class folders; one training image cannot be decoded."""
    draw = np.random.default_rng(0)
    for split, count in splits.items():
        for i in range(count):
            path = root / split / "rgb"[i % 3] / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = draw.integers(0, 180, (20, 20, 3))
            pixels[..., i % 3] += 70
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    sorted(root.glob("**/007.png"))[-1].write_bytes(b"")
    return root


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return a_folder(tmp_path_factory.mktemp("source"), {"train": COUNT, "test": 13})


def flags(source, out, *more):
    given = {
        "data": source, "out": out, "image-size": 16, "eval-size": 16, "batch-size": BATCH,
        "epochs": EPOCHS, "log-every": 1, "knn-every": 2, "save-every": 2, "workers": 0,
    }  # fmt: skip
    pairs = [(f"--{name}", value) for name, value in given.items()]
    return ["demo", *(word for pair in pairs for word in pair), *more]


# ---- what it learns from -------------------------------------------------------------------------


class Mean(nn.Module):
    """The mean of an image, twice: as it is, and times a weight."""

    num_features = 2

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, images):
        mean = images.mean((1, 2, 3))
        return torch.stack([mean, self.weight * mean], dim=1)


@pytest.mark.parametrize("method, more", VARIANTS)
def test_it_gets_each_image_of_view_1_with_its_label(method, more, source, tmp_path, monkeypatch):
    """View 1 says which image it is; view 2 says nothing, and neither do keys and targets."""
    seen = []

    def pair(pairs, first, i, images):
        places = pairs.images.replaced(pairs.indices(first + i))
        view = places.float()[:, None, None, None].expand(-1, 3, 4, 4)
        return view, torch.full_like(view, -1)

    def update(linear, optimizer, features, labels, accelerator):
        seen.append((features, labels))
        return torch.zeros(())

    monkeypatch.setattr(encoders, "build", lambda *args, **more: Mean())
    monkeypatch.setattr(ViewPairs, "pair", pair)
    monkeypatch.setattr(online, "update", update)
    argv = flags(source, tmp_path / "run", "--knn-every", 0, "--online-linear", *more)
    pretrain(method, *argv)
    every = torch.cat([features[:, 0] for features, _ in seen]).round().long()
    labels = torch.cat([labels for _, labels in seen])
    assert len(seen) == len(rows(tmp_path / "run")) and not seen[0][0].requires_grad
    assert {len(features) for features, _ in seen} == {BATCH}
    counts = [len(range(first, COUNT, 3)) for first in range(3)]  # sorted by class: b, g, r
    truth = torch.arange(3).repeat_interleave(torch.tensor([counts[2], counts[1], counts[0]]))
    assert torch.equal(labels, truth[every]) and len(every.unique()) == COUNT - 1


def test_a_step_is_one_of_sgd_on_the_mean_over_the_labels_that_it_may_see():
    torch.manual_seed(0)
    linear = nn.Linear(4, 3).double()
    features, labels = torch.randn(6, 4).double(), torch.tensor([0, 2, -1, 1, -1, 2])
    other = nn.Linear(4, 3).double()
    other.load_state_dict(linear.state_dict())
    F.cross_entropy(other(features[labels >= 0]), labels[labels >= 0]).backward()
    right = (other(features).argmax(1) == labels).sum()
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.5)
    top1 = online.update(linear, optimizer, features, labels, Accelerator(cpu=True))
    assert top1.item() == 100 * right / 4
    for p, q in zip(linear.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q - 0.5 * q.grad)
    before = linear.weight.clone()
    online.update(linear, optimizer, features, torch.full((6,), -1), Accelerator(cpu=True))
    assert torch.equal(linear.weight, before)


# ---- what it leaves as it is ---------------------------------------------------------------------


def without_it(run):
    return [{k: v for k, v in row.items() if k not in NEW} for row in rows(run)]


def assert_same_encoder(plain, run):
    """The same metrics but for the classifier's own, and the same encoder file and weights."""
    assert rows(plain) == without_it(run)
    ours, theirs = exported(run), exported(plain)
    assert ours[1] == theirs[1] and ours[0].keys() == theirs[0].keys()
    assert all(torch.equal(value, theirs[0][name]) for name, value in ours[0].items())


@pytest.mark.parametrize("method, more", VARIANTS)
def test_the_encoder_does_not_notice(method, more, source, tmp_path, monkeypatch):
    """Bit for bit. And the test images are measured when the kNN is, all of them at the end."""
    measured, extract = [], online.extract

    def counted(encoder, images, *args, **options):
        measured.append(len(images))
        return extract(encoder, images, *args, **options)

    monkeypatch.setattr(online, "extract", counted)
    monkeypatch.setattr(online.OnlineLinear, "SAMPLE", 5)
    pretrain(method, *flags(source, tmp_path / "plain", *more))
    pretrain(method, *flags(source, tmp_path / "run", "--online-linear", *more))
    assert_same_encoder(tmp_path / "plain", tmp_path / "run")
    found = rows(tmp_path / "run")
    assert all("online_linear_train" in row for row in found)
    assert [row["step"] for row in found if "online_linear" in row] == [
        row["step"] for row in found if "knn" in row
    ]
    assert measured == [5] * (len(measured) - 1) + [13] and len(measured) > 1
    end = list(checkpoints(tmp_path / "run").values())[-1]
    moved = end["online_linear_optimizer"]["state"]
    assert end["online_linear"]["weight"].shape == (3, 128) and len(moved) == 2
    assert not NEW & set().union(*rows(tmp_path / "plain"))
    row = record_of(tmp_path / "run" / "results")
    assert (row["task"], row["protocol"], row["method"]) == ("linear", "online", method)
    assert row["metrics"]["top1"] == pytest.approx(found[-1]["online_linear"], abs=1e-3)
    assert row["test_images"] == 13 and row["run"]["online_linear"]


# ---- processes and restarts ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def one(source, tmp_path_factory):
    """A run of BYOL in float64 on one process."""
    out = tmp_path_factory.mktemp("one") / "run"
    pretrain("byol", *flags(source, out, "--precision", "fp64", "--online-linear"))
    return out


@pytest.mark.slow
def test_two_processes_agree_with_one(one, source, tmp_path):
    """And there, too, the encoder does not notice."""
    two, plain, log = tmp_path / "two", tmp_path / "plain", tmp_path / "log"
    argv = flags(source, two, "--precision", "fp64", "--online-linear")
    children = forked("byol", argv, log, 2)
    children += forked("byol", flags(source, plain, "--precision", "fp64"), log, 2)
    assert ended(children) == [0] * 4, log.read_text()
    ours, theirs = (list(checkpoints(run).values())[-1] for run in (two, one))
    for name, value in theirs["online_linear"].items():
        torch.testing.assert_close(ours["online_linear"][name], value, rtol=0, atol=1e-10)
    for a, b in zip(rows(one), rows(two), strict=True):
        assert all(a[name] == pytest.approx(b[name]) for name in NEW & a.keys())
    assert_same_encoder(plain, two)


class Stopped(Exception):
    pass


def test_interrupted_and_resumed_is_the_uninterrupted_run_bit_for_bit(
    one, source, tmp_path, monkeypatch, capsys
):
    end_step = Run.end_step

    def stopping(run, step, *args, **metrics):
        end_step(run, step, *args, **metrics)
        if step == 8:
            raise Stopped

    argv = flags(source, tmp_path / "run", "--precision", "fp64", "--online-linear")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Run, "end_step", stopping)
        pretrain("byol", *argv)
    pretrain("byol", *argv)
    assert "going on from step 7 of 12" in capsys.readouterr().err
    assert_same_run(one, tmp_path / "run")


# ---- labels --------------------------------------------------------------------------------------


def refused(capsys, method, *argv):
    with pytest.raises(SystemExit) as caught:
        pretrain(method, *argv)
    said = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code == 2
    return said[-1]


@pytest.mark.parametrize("method", METHODS)
def test_it_needs_labels(method, source, tmp_path, capsys):
    flat = a_folder(tmp_path / "flat", {"train": 20})
    for i, path in enumerate(sorted(flat.glob("train/*/*.png"))):
        path.rename(flat / "train" / f"{i}.png")
    line = refused(capsys, method, *flags(flat, tmp_path / "run", "--online-linear"))
    assert line.startswith("error: --online-linear: ") and "has no labels" in line
    assert not (tmp_path / "run").exists()


def test_without_a_test_split_it_does_not_see_the_labels_that_it_is_tested_on(
    tmp_path, monkeypatch, capsys
):
    source, seen = a_folder(tmp_path / "source", {".": 50}), []
    update = online.update

    def spy(linear, optimizer, features, labels, accelerator):
        seen.append(labels)
        return update(linear, optimizer, features, labels, accelerator)

    monkeypatch.setattr(online, "update", spy)
    pretrain("moco", *flags(source, tmp_path / "run", "--online-linear", "--knn-every", 0))
    assert "judged on 10 images of" in capsys.readouterr().err
    assert 0.1 < (torch.cat(seen) == online.HIDDEN).double().mean() < 0.3
    assert "online_linear" in rows(tmp_path / "run")[-1]  # at the end, without a kNN too


def test_it_is_on_from_the_beginning_or_not_at_all(source, tmp_path, capsys):
    short = ("--epochs", 1, "--knn-every", 0)
    pretrain("simclr", *flags(source, tmp_path / "run", *short))
    with_it = flags(source, tmp_path / "run", "--online-linear", *short)
    assert "made with online_linear False (now True)" in refused(capsys, "simclr", *with_it)
    path = tmp_path / "run" / "config.json"
    record = json.loads(path.read_text())
    del record["config"]["online_linear"]  # of before the setting existed
    path.write_text(json.dumps(record))
    assert "made with online_linear False (now True)" in refused(capsys, "simclr", *with_it)
    record["config"]["online_linear"] = True  # whatever the record says
    path.write_text(json.dumps(record))
    line = refused(capsys, "simclr", *with_it)
    assert "has no online_linear, online_linear_optimizer" in line and "another --out" in line
