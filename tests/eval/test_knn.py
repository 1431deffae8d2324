"""Weighted kNN against a slow loop and against the official notebook's function."""

import math

import pytest
import torch
import torch.nn.functional as F

from common.config import SourceConfig
from common.launch import launch
from eval import knn
from eval.encoder import Encoder, Preprocess
from eval.knn import OnlineKNN, Settings, accuracy, judge, nearest, predict, subsample, vote
from eval.results.record import confidence
from eval.subjects import Subject
from tests.eval.harness import Network, coloured, record_of
from tests.helpers import golden


def slow_shares(queries, bank, labels, classes, k, temperature):
    """The definition in Python floats: cosine, the k largest, exp(s / T) for their classes, as
    shares of the sum."""
    rows = []
    for query in queries.double().tolist():
        similarities = []
        for row in bank.double().tolist():
            dot = sum(a * b for a, b in zip(query, row, strict=True))
            similarities.append(dot / math.hypot(*query) / math.hypot(*row))
        nearest = sorted(range(len(similarities)), key=lambda i: -similarities[i])[:k]
        scores = [0.0] * classes
        for i in nearest:
            scores[labels[i]] += math.exp(similarities[i] / temperature)
        rows.append([score / sum(scores) for score in scores])
    return torch.tensor(rows, dtype=torch.float64)


def some(seed, count, width):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize(
    ("k", "temperature"), [(1, 0.1), (7, 0.07), (20, 1.0), (500, 0.1), (20, 0.01), (60, 0.003)]
)
def test_against_a_slow_loop(k, temperature):
    queries, bank = some(1, 9, 6) * 3, some(2, 60, 6)
    labels = torch.arange(60) % 5
    settings = {"classes": 5, "k": k, "temperature": temperature}
    ranking, shares = predict(queries, bank, labels, **settings)
    expected = slow_shares(queries, bank, labels.tolist(), 5, min(k, 60), temperature)
    assert torch.allclose(shares, expected, rtol=1e-11, atol=0)
    assert torch.equal(ranking[:, 0], expected.argmax(1))
    assert torch.equal(ranking.sort(1).values, torch.arange(5).expand(9, 5))
    in_order = shares.gather(1, ranking)
    assert (in_order[:, :-1] >= in_order[:, 1:]).all()


@pytest.mark.parametrize("temperature", [0.1, 0.01, 0.003, 1e-6])
def test_no_temperature_overflows(temperature):
    """exp(1 / 0.01) is beyond float32, in which the similarities are.

    Two near neighbours of class 2 outvote the nearest, of class 0, but not at the coldest, where
    nothing is left of the others' votes.
    """
    similarity = torch.tensor([[0.999, 0.998, 0.998, 0.3, -0.4, -0.5]])
    ranking, shares = vote(similarity, torch.tensor([[0, 2, 2, 1, 3, 4]]), 5, temperature)
    assert shares.sum().item() == pytest.approx(1)
    if temperature == 1e-6:
        assert ranking[0, 0] == 0
    else:
        assert ranking.tolist() == [[2, 0, 1, 3, 4]]


@pytest.mark.parametrize("chunk", [1, 4, 9, 1000])
def test_chunks_do_not_matter(chunk):
    queries, bank, labels = some(1, 9, 6), some(2, 60, 6), torch.arange(60) % 5
    settings = {"classes": 5, "k": 7, "temperature": 0.1}
    ranking, shares = predict(queries, bank, labels, **settings, chunk=chunk)
    expected_ranking, expected = predict(queries, bank, labels, **settings)
    assert torch.allclose(shares, expected, rtol=1e-12, atol=0)
    assert torch.equal(ranking, expected_ranking)


@pytest.mark.parametrize("bank_chunk", [1, 7, 60, 1000])
@pytest.mark.parametrize("chunk", [4, 1000])
def test_the_bank_may_be_taken_in_chunks(chunk, bank_chunk):
    queries, bank = some(1, 9, 6), some(2, 60, 6)
    cosine = F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T
    expected, where = cosine.topk(11)
    value, index = nearest(queries, bank, 11, chunk=chunk, bank_chunk=bank_chunk)
    assert torch.allclose(value, expected, rtol=1e-12, atol=0) and torch.equal(index, where)


@pytest.mark.parametrize(("chunk", "bank_chunk"), [(1000, 1000), (7, 13), (13, 7)])
def test_left_out_of_its_own_neighbours(chunk, bank_chunk):
    bank = some(2, 40, 6)
    unit = F.normalize(bank, dim=1)
    expected, where = (unit @ unit.T).fill_diagonal_(-2).topk(39)
    value, index = nearest(bank, bank, 100, exclude_self=True, chunk=chunk, bank_chunk=bank_chunk)
    assert torch.allclose(value, expected, rtol=1e-12, atol=1e-15) and torch.equal(index, where)


# ---- the screen: fewer bits, the same neighbours -------------------------------------------------


def features(kind, count, width=64, seed=0):
    """Features that are hard to tell apart, or to compute with few bits."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(count, width, generator=draw)
    centres = torch.randn(7, width, generator=torch.Generator().manual_seed(99))
    return {
        "noise": x,
        "positive": x.relu(),
        "classes in order": centres[torch.arange(count) * 7 // count] + 0.5 * x,
        "duplicates": x[torch.arange(count) // 4],
        "alike": centres[0] + 0.4 * x,
        "nearly equal": centres[0] + 0.05 * x,
        "all equal": centres[:1].expand(count, -1),
        "huge range": x * 10.0 ** (20 * torch.rand(count, width, generator=draw) - 15),
        "tiny": x * 1e-30,
        "three dimensions": x[:, :3] @ centres[:3],
        "some zero": x * (torch.arange(count) % 50 != 0)[:, None],
    }[kind]


TOLD_APART = ["noise", "positive", "classes in order", "alike", "huge range", "three dimensions"]
KINDS = [*TOLD_APART, "duplicates", "nearly equal", "all equal", "tiny", "some zero"]


@pytest.fixture
def screened(monkeypatch):
    """The neighbours of both paths, and how many queries the screen compared with all rows."""
    counts, topk = [], knn.topk

    def watched(similarity, *args):
        counts.append(len(similarity))
        return topk(similarity, *args)

    def both(*args, **kwargs):
        monkeypatch.setattr(knn, "fast_bfloat16", lambda: False)
        plain = nearest(*args, **kwargs)
        monkeypatch.setattr(knn, "fast_bfloat16", lambda: True)
        counts.clear()
        return nearest(*args, **kwargs), plain, sum(counts)

    monkeypatch.setattr(knn, "topk", watched)
    return both


@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_few_bits_find_the_same_neighbours(screened, kind, exclude_self):
    bank = features(kind, 3000)
    queries = bank[1000:1090] if exclude_self else features(kind, 90, seed=1)
    queries, first = queries.contiguous(), 1000 if exclude_self else 0
    how = {"exclude_self": exclude_self, "first": first, "chunk": 50}
    fast, plain, compared = screened(queries, bank, 9, **how)
    assert (compared == 0) == (kind in (*TOLD_APART, "duplicates")), compared
    cosine = F.normalize(queries.double(), dim=1) @ F.normalize(bank.double(), dim=1).T
    if exclude_self:
        cosine[torch.arange(90), torch.arange(90) + 1000] = -2
    expected = cosine.sort(dim=1, descending=True, stable=True)[0][:, :10]
    for value, index in (fast, plain):
        assert (value - expected[:, :9]).abs().max() < 1e-6
        assert (cosine.gather(1, index) - expected[:, :9]).abs().max() < 1e-6
        assert (index.sort(1)[0].diff() > 0).all()  # none twice
    apart = (expected[:, :-1] - expected[:, 1:] > 1e-6).all(1)  # the order is certain
    assert torch.equal(fast[1][apart], plain[1][apart])
    assert apart.sum() > 45 or kind not in TOLD_APART


@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_is_a_bound(kind):
    bank = F.normalize(features(kind, 2000).double(), dim=1).float()
    queries = F.normalize(features(kind, 50, seed=1).double(), dim=1).float()
    screen, rounded = knn.Screen(bank), queries.bfloat16()
    bound = screen.bound(queries, rounded)
    middle = bank.mean(0).double()
    product = rounded.double() @ screen.rounded.double().T
    exact = queries.double() @ (bank.double() - middle).T
    assert ((product - exact).abs() <= bound).all()
    assert bound.max() < 0.01  # nor is it useless: rounding costs 1/512 of each
    found = (rounded @ screen.rounded.T).double()
    assert ((found - exact).abs() <= bound + found.abs() / 256).all()


def test_the_bound_is_no_larger_than_it_must_be():
    """Errors all of one sign are the worst case, and nearly as large as the bound."""
    query = torch.full((1, 60), 60**-0.5)  # in the middle between two numbers of bfloat16
    opposite = torch.cat([query, -query])  # about a mean of zero
    screen, rounded = knn.Screen(opposite), query.bfloat16()
    wrong = rounded.double() @ screen.rounded.double().T - query.double() @ opposite.double().T
    bound = screen.bound(query, rounded)
    assert 0.9 * bound <= wrong.abs().max() <= bound


def test_screened_neighbours_depend_on_no_chunks(screened):
    """Bit for bit, the first of equals first."""
    queries, bank = features("noise", 40, seed=1), features("duplicates", 2000)
    (value, index), _, _ = screened(queries, bank, 8)
    assert (value[:, ::4] == value[:, 3::4]).all()  # duplicates, in their order in the bank
    assert (index.unflatten(1, (2, 4)).diff(dim=2) == 1).all()
    for chunk, bank_chunk in ((7, 2000), (40, 500), (16, 1001)):
        found, _, compared = screened(queries, bank, 8, chunk=chunk, bank_chunk=bank_chunk)
        assert compared == 0
        assert torch.equal(found[0], value) and torch.equal(found[1], index)


@pytest.mark.parametrize("k", [1, 187, 188, 1500, 2999, 5000])
def test_any_number_of_neighbours(screened, k):
    bank = features("noise", 3000)
    fast, plain, compared = screened(bank[:60], bank, k, exclude_self=True)
    assert fast[0].shape == plain[0].shape == (60, min(k, 2999)) and (compared == 0) == (k <= 50)
    assert (fast[0] - plain[0]).abs().max() < 1e-6
    assert not (fast[1] == torch.arange(60)[:, None]).any()


def test_what_is_not_a_number_harms_no_other_query(screened):
    queries, bank = features("noise", 30, seed=1), features("noise", 3000)
    expected, _, _ = screened(queries, bank, 5)
    spoilt = queries.clone()
    spoilt[3, 7] = torch.nan
    found, _, compared = screened(spoilt, bank, 5, chunk=9)
    others = torch.arange(30) != 3
    assert compared == 1
    assert torch.equal(found[0][others], expected[0][others])
    assert torch.equal(found[1][others], expected[1][others])
    assert found[0][3].isnan().all()  # as by a full product


def test_against_the_official_notebook():
    recorded = golden("moco_colab")
    cases = sorted({key.split("/")[1] for key in recorded if key.startswith("knn/")})
    for case in cases:
        inputs = {
            name: torch.tensor(recorded[f"knn/{case}/{name}"])
            for name in ("feature", "bank", "labels", "classes", "k", "t", "pred_labels")
        }
        ranking, shares = predict(
            inputs["feature"],
            inputs["bank"].T,
            inputs["labels"],
            classes=int(inputs["classes"]),
            k=int(inputs["k"]),
            temperature=float(inputs["t"]),
        )
        expected = torch.tensor(recorded[f"knn/{case}/scores_f64"])
        expected = expected / expected.sum(1, keepdim=True)  # the notebook's are sums of votes
        assert torch.allclose(shares, expected, rtol=1e-5, atol=0)
        in_order = expected.gather(1, inputs["pred_labels"])
        voted = in_order > 0  # the order of classes without a vote means nothing
        assert voted[:, 0].all()
        assert torch.equal(ranking[voted], inputs["pred_labels"][voted])
    assert len(cases) >= 3, cases


def test_accuracy():
    ranking = torch.tensor([[2, 0, 1], [0, 1, 2], [1, 2, 0], [0, 2, 1]])
    labels = torch.tensor([2, 1, 0, 0])
    assert [accuracy(ranking, labels, top) for top in (1, 2, 3)] == [50.0, 75.0, 100.0]


def test_the_online_knn_leaves_the_encoder_as_it_was(monkeypatch):
    monkeypatch.setattr("eval.knn.open_train_test", lambda plan: (coloured(90), coloured(30)))
    online, encoder = OnlineKNN("x", Preprocess(12)), Network().train()
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    assert online(encoder, "cpu") == 100.0
    assert encoder.training
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())


@pytest.mark.parametrize("left_out", [False, True])
def test_only_images_that_are_judged_are_counted(tmp_path, left_out):
    train, test = (coloured(count) for count in (90, 30))
    for images in (train, test):
        images.encoded, images.store = ["nowhere.png", *images.encoded[1:]], None
    encoder = Encoder(Network().eval(), Preprocess(12), "encoder")
    opened = {"labelled": (train, None if left_out else test)}
    config, accelerator = {"data": "x"}, launch("fp32")
    subject = Subject(
        encoder, "x", SourceConfig(), tmp_path, config, accelerator, of_run=True, opened=opened
    )
    judge(subject, Settings(k=(5,)))
    row = record_of(tmp_path)
    assert (row["train_images"], row["test_images"]) == (89, 89 if left_out else 29)
    assert len(row["deviations"]) == left_out
    assert row["metrics"]["top1"] == 100.0
    assert row["interval"] == confidence(100.0, row["test_images"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_features_of_any_precision_and_with_gradients(screened, dtype):
    bank = features("noise", 3000).to(dtype).requires_grad_()
    fast, plain, _ = screened(bank[:20], bank, 5)
    assert fast[0].dtype == dtype and torch.equal(fast[1], plain[1])


def test_one_image_alone_has_no_neighbour(screened):
    fast, plain, _ = screened(torch.rand(1, 8), torch.rand(1, 8), 5, exclude_self=True)
    assert [rows.shape for rows in (*fast, *plain)] == [(1, 0)] * 4


def test_a_process_without_queries():
    bank = torch.randn(5, 3)
    found = nearest(bank[:0], bank, 2)
    assert [rows.shape for rows in found] == [(0, 2), (0, 2)]


def test_a_subsample_keeps_images_and_labels_together():
    whole = coloured(100)
    part = subsample(whole, 30)
    assert len(part) == len(part.labels) == 25 and torch.equal(part.labels, whole.labels[::4])
    for i in (0, 7, 24):
        assert torch.equal(part.encoded[i], whole.encoded[4 * i])
    assert subsample(whole, 100) is whole
