"""The collapse panel: known values, slow loops, and when it speaks."""

import math

import pytest
import torch

from common.health import collapse_warning, embedding_metrics


def normal(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_panel(z1, z2):
    def unit(rows):
        return [[x / math.hypot(*row) for x in row] for row in rows.tolist()]

    def squared(a, b):
        return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))

    one, two = unit(z1), unit(z2)
    n, d, both = len(one), len(one[0]), one + two
    deviations = []
    for j in range(d):
        column = [row[j] for row in both]
        mean = sum(column) / len(column)
        deviations.append(math.sqrt(sum((x - mean) ** 2 for x in column) / (len(column) - 1)))
    gram = [[sum(a * b for a, b in zip(r, s, strict=True)) for s in both] for r in both]
    squares = torch.linalg.eigvalsh(torch.tensor(gram, dtype=torch.float64)).tolist()
    singular = [math.sqrt(max(square, 0.0)) for square in squares]
    share = [s / sum(singular) for s in singular]
    pairs = [(i, j) for i in range(n) for j in range(i)]
    potentials = [
        sum(math.exp(-2 * squared(rows[i], rows[j])) for i, j in pairs) / len(pairs)
        for rows in (one, two)
    ]
    return {
        "feature_std": sum(deviations) / d * math.sqrt(d),
        "effective_rank": math.exp(-sum(p * math.log(p) for p in share if p > 0)),
        "alignment": sum(squared(a, b) for a, b in zip(one, two, strict=True)) / n,
        "uniformity": math.log(sum(potentials) / 2),
    }


@pytest.mark.parametrize(("n", "d"), [(3, 2), (6, 4), (5, 12)])
def test_against_loops(n, d):
    z1 = normal(n, d, 1) * 3 + 0.5
    z2 = z1 + 0.3 * normal(n, d, 2)
    figures, expected = embedding_metrics(z1, z2), slow_panel(z1, z2)
    assert figures.keys() == expected.keys()
    for name, value in expected.items():
        tolerance = 1e-5 if name == "effective_rank" else 1e-10  # its singular values by a square
        assert figures[name] == pytest.approx(value, rel=tolerance, abs=1e-12), name


def test_one_point():
    figures = embedding_metrics(torch.ones(16, 8), 3 * torch.ones(16, 8))
    assert figures["feature_std"] == pytest.approx(0, abs=1e-12)
    assert figures["effective_rank"] == pytest.approx(1, abs=1e-6)
    assert figures["uniformity"] == pytest.approx(0, abs=1e-12)
    assert figures["alignment"] == pytest.approx(0, abs=1e-12)
    assert "nearly one point" in collapse_warning(figures)


def test_two_opposite_points_are_one_line():
    z = torch.ones(16, 8) * torch.tensor([1.0, -1.0]).repeat(8)[:, None]
    figures = embedding_metrics(z, z)
    assert figures["effective_rank"] == pytest.approx(1, abs=1e-6)
    assert "on one line" in collapse_warning(figures)


def test_spread_evenly_over_the_sphere():
    n, d = 1500, 24
    z = normal(n, d)
    figures = embedding_metrics(z, z + 0.01 * normal(n, d, 1))
    assert figures["feature_std"] == pytest.approx(1, abs=0.01)
    assert figures["effective_rank"] > 0.98 * d
    assert figures["alignment"] < 1e-3
    # the mean of exp(-2 |x - y|^2) = exp(-4 + 4 x.y), where x.y is nearly normal(0, 1 / d)
    assert figures["uniformity"] == pytest.approx(-4 + 8 / d, abs=0.03)
    assert collapse_warning(figures) is None
    assert embedding_metrics(z, -z)["alignment"] == pytest.approx(4)
    assert embedding_metrics(z, normal(n, d, 2))["alignment"] == pytest.approx(2, abs=0.1)


def test_length_does_not_matter_and_single_precision_is_welcome():
    z1, z2 = normal(20, 6), normal(20, 6, 1)
    lengths = 0.1 + torch.rand(20, 1)
    assert embedding_metrics(z1 * lengths, z2) == pytest.approx(embedding_metrics(z1, z2), rel=1e-9)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 5e-2)):
        assert embedding_metrics(z1.to(dtype), z2.to(dtype)) == pytest.approx(
            embedding_metrics(z1, z2), rel=tolerance
        )


class OnMps:
    """A tensor of a device without float64: all that can be done with it is to copy it."""

    device = torch.device("mps")

    def __init__(self, z):
        self.z = z

    def cpu(self):
        return self.z


def test_a_device_without_double_precision():
    z1, z2 = normal(6, 4).float(), normal(6, 4, 1).float()
    assert embedding_metrics(OnMps(z1), OnMps(z2)) == embedding_metrics(z1, z2)


def test_a_diagnosis_is_one_line_with_a_hint_and_only_where_there_is_one():
    well = {"feature_std": 0.9, "uniformity": -3.0, "effective_rank": 20.0, "alignment": 0.3}
    assert collapse_warning(well) is None
    for ill in ({"feature_std": 0.05}, {"uniformity": -0.01}, {"effective_rank": 1.2}):
        line = collapse_warning(well | ill)
        assert line.startswith("COLLAPSE") and "Usual causes" in line and "\n" not in line


def test_healthy_at_a_small_batch():
    for seed in range(20):
        z = normal(32, 64, seed)
        assert collapse_warning(embedding_metrics(z, z + 0.3 * normal(32, 64, 100 + seed))) is None
