"""Logistic regression against scikit-learn's, and the choice of its regularisation."""

import pytest
import torch
from torch import nn

from common.errors import UserError
from eval import transfer
from eval.transfer import Settings, fit, map11, mean_per_class, metric_of, scores
from tests.eval.harness import again, assert_same_records, coloured, record_of, subject_of


def problem(count=200, width=5, classes=4):
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % classes
    centres = torch.randn(classes, width, generator=draw, dtype=torch.float64)
    noise = torch.randn(count, width, generator=draw, dtype=torch.float64)
    return centres[labels] + noise, labels


@pytest.mark.parametrize("value", [1e-3, 1.0, 1e3])
def test_against_scikit_learn(value):
    from sklearn.linear_model import LogisticRegression

    x, y = problem()
    theirs = LogisticRegression(C=1 / value, tol=1e-10, max_iter=10_000).fit(x.numpy(), y.numpy())
    expected = torch.from_numpy(theirs.predict_proba(x.numpy()))
    assert (scores(x, fit(x, y, 4, value)).softmax(1) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("value", [1e-2, 10.0])
def test_the_gradient_is_zero_where_it_stops(value):
    x, y = problem()
    weight = fit(x, y, 4, value).requires_grad_()
    loss = nn.functional.cross_entropy(scores(x, weight), y, reduction="sum")
    (gradient,) = torch.autograd.grad(loss + value / 2 * weight[:-1].square().sum(), weight)
    assert gradient.abs().max() < 1e-3  # of a sum over 200 images


def test_the_values_are_the_papers():
    assert len(transfer.VALUES) == 45
    assert transfer.VALUES[0] == pytest.approx(1e-6) and transfer.VALUES[-1] == pytest.approx(1e5)
    assert transfer.VALUES[4] / transfer.VALUES[3] == pytest.approx(10**0.25)


def test_each_class_counts_alike():
    found, labels = torch.tensor([[1.0, 0.0]] * 4), torch.tensor([0, 0, 0, 1])
    assert mean_per_class(found, labels) == 50.0 and transfer.top1(found, labels) == 75.0


@pytest.mark.parametrize(("counts", "several"), [((2, 1), 0), ((4, 3), 0), ((2, 1), 1)])
def test_a_few_images(tmp_path, counts, several):
    subject = subject_of(tmp_path, counts=counts)
    for images in subject.splits() if several else ():
        images.labels = torch.zeros(len(images), 3, dtype=torch.bool)
        images.labels[0, 0] = True
    transfer.judge(subject, Settings())
    row = record_of(tmp_path)
    assert 0 <= row["metrics"][row["metric"]] <= 100
    assert (row["train_images"], row["test_images"]) == counts


def test_one_image_is_too_few(tmp_path):
    subject = subject_of(tmp_path, counts=(1, 3))
    with pytest.raises(UserError, match="one training image: none is left"):
        transfer.judge(subject, Settings())


@pytest.mark.parametrize("own", [True, False])
def test_a_judgement(tmp_path, own):
    validation = coloured(24) if own else None
    subject = subject_of(tmp_path, counts=(60, 30))
    subject.opened["validation"] = validation
    transfer.judge(subject, Settings())
    row = record_of(tmp_path)
    assert row["metrics"] == {"top1": 100.0, "mean_per_class": 100.0}
    assert row["settings"]["validation"] == 100.0
    assert row["train_images"] == (84 if own else 60) and row["test_images"] == 30
    assert row["settings"]["chosen_on"] == ("validation" if own else "a tenth of train")
    assert row["settings"]["regularisation"] in transfer.VALUES


def test_stopped_and_started_again_it_ends_the_same(tmp_path, monkeypatch):

    def judge(folder):
        subject = subject_of(tmp_path / folder, counts=(60, 30))
        transfer.judge(subject, Settings(iterations=5))

    judge("whole")
    again(monkeypatch, {2, 20, 43}, lambda: judge("stopped"))
    assert_same_records(tmp_path / "whole", tmp_path / "stopped")


# ---- several labels an image ---------------------------------------------------------------------


def loops(scores, labels):
    """VOC 2007's measure, as its paper words it."""
    total, classes = 0.0, 0
    for c in range(scores.shape[1]):
        positives = int(labels[:, c].sum())
        if not positives:
            continue
        order = sorted(range(len(scores)), key=lambda i: -scores[i, c])
        points, hits = [], 0
        for rank, i in enumerate(order, 1):
            hits += bool(labels[i, c])
            points.append((hits, hits / rank))
        tenths = [max(p for h, p in points if 10 * h >= t * positives) for t in range(11)]
        total, classes = total + sum(tenths) / 11, classes + 1
    return 100 * total / classes


@pytest.mark.parametrize("seed", range(5))
def test_map11_against_loops(seed):
    draw = torch.Generator().manual_seed(seed)
    found = torch.randn(40, 6, generator=draw, dtype=torch.float64)
    labels = torch.rand(40, 6, generator=draw) < 0.25
    labels[:, 5] = False  # a class that is not there
    assert map11(found, labels) == pytest.approx(loops(found, labels))


def test_map11_by_hand():
    """Two of four, found first and third: precision 1 to recall 0.5, then 2/3."""
    found = torch.tensor([[4.0], [3.0], [2.0], [1.0]])
    labels = torch.tensor([[True], [False], [True], [False]])
    assert map11(found, labels) == pytest.approx(100 * (6 * 1 + 5 * 2 / 3) / 11)
    assert map11(-found, ~labels) == map11(found, labels)
    assert map11(found, torch.tensor([[True], [True], [False], [False]])) == 100.0


@pytest.mark.parametrize("value", [1e-2, 10.0])
def test_binary_classifiers_against_scikit_learn(value):
    from sklearn.linear_model import LogisticRegression

    x, y = problem()
    labels = torch.stack([y == 0, (y == 1) | (y == 2), x[:, 0] > 0.5], dim=1)
    weight = fit(x, labels, 3, value)
    for c in range(3):
        theirs = LogisticRegression(C=1 / value, tol=1e-10, max_iter=10_000)
        theirs.fit(x.numpy(), labels[:, c].numpy())
        expected = torch.from_numpy(theirs.decision_function(x.numpy()))
        assert (
            scores(x, weight)[:, c] - expected
        ).abs().max() < 1e-2  # of up to 60, where they are separable


def test_a_judgement_of_several_labels(tmp_path):
    subject = subject_of(tmp_path, counts=(60, 30))
    for images in subject.splits():
        labels = images.labels
        images.labels = torch.stack([labels == 0, labels == 1, labels == 2, labels != 1], dim=1)
        images.classes = (*images.classes, "not g")
    transfer.judge(subject, Settings(iterations=50))
    row = record_of(tmp_path)
    assert row["metric"] == "map11" and row["metrics"] == {"map11": pytest.approx(100.0)}
    assert row["interval"] >= 0


@pytest.mark.parametrize(
    ("asked", "source", "several", "metric"),
    [
        ("", "cifar10", False, "top1"), ("", "oxford-iiit-pet", False, "mean-per-class"),
        ("", "data/voc2007", True, "map11"), ("", "mine", True, "map11"),
        ("mean-per-class", "cifar10", False, "mean-per-class"),
    ],
)  # fmt: skip
def test_the_measure_of_a_data_set(asked, source, several, metric):
    labels = torch.zeros(4, 3, dtype=torch.bool) if several else torch.zeros(4)
    assert metric_of(Settings(metric=asked), source, labels) == metric


def test_a_measure_that_the_labels_have_not():
    with pytest.raises(UserError, match="--metric top1: an image of x has several labels"):
        metric_of(Settings(metric="top1"), "x", torch.zeros(4, 3, dtype=torch.bool))
    with pytest.raises(UserError, match="--metric map11: an image of voc2007 has one label"):
        metric_of(Settings(), "voc2007", torch.zeros(4))
