"""Logistic regression against scikit-learn's, and the choice of its regularisation."""

import pytest
import torch
from torch import nn

from common.data import Images
from common.run import read_json
from eval import transfer
from eval.encoder import Encoder, Input
from eval.results import Subject
from eval.transfer import Settings, fit, mean_per_class, scores


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
    ranking, labels = torch.tensor([[0, 1], [0, 1], [0, 1], [0, 1]]), torch.tensor([0, 0, 0, 1])
    assert mean_per_class(ranking, labels) == 50.0


class Mean(nn.Module):
    def forward(self, images):
        return images.mean((2, 3))


def coloured(count):
    labels = torch.arange(count) % 3
    pixels = torch.randint(60, (count, 3, 12, 12), generator=torch.Generator().manual_seed(count))
    pixels[torch.arange(count), labels] += 150
    return Images("coloured", pixels.byte(), labels, ("r", "g", "b"), store=pixels.byte())


@pytest.mark.parametrize("own", [True, False])
def test_a_judgement(tmp_path, monkeypatch, own):
    validation = coloured(24) if own else None
    monkeypatch.setattr(transfer, "open_validation", lambda source, classes: validation)
    config = {"data": "x", "batch_size": 8, "seed": 1}
    encoder = Encoder(Mean().eval(), Input(12), "encoder", {"method": "simclr"})
    splits = (coloured(60), coloured(30))
    transfer.judge(Subject(encoder, "x", {}, tmp_path, config, "cpu", splits), Settings())
    row = read_json(tmp_path / "transfer-encoder.json")
    assert row["top1"] == row["mean_per_class"] == row["validation"] == 100.0
    assert row["train_images"] == (84 if own else 60) and row["test_images"] == 30
    assert row["chosen_on"] == ("validation" if own else "a fifth of train")
    assert row["regularisation"] in transfer.VALUES
