"""The regression loss against the paper, against the official code, and its properties."""

import math

import pytest
import torch

from byol.loss import byol_loss, chance_loss
from tests.helpers import golden, rel

DOUBLE = torch.float64


def pair(n, d, dtype=DOUBLE, seed=0):
    """Random p, z of shape (n, d)."""
    return torch.randn(2, n, d, dtype=dtype, generator=torch.Generator().manual_seed(seed)).unbind()


# ---- the paper -----------------------------------------------------------------------------------


def equation_2(predictions, projections):
    """Eq. 2 of arXiv 2006.07733 v3, both of its forms, over Python floats."""
    distances, cosines = [], []
    for p, z in zip(predictions, projections, strict=True):
        a, b = math.hypot(*p), math.hypot(*z)
        distances.append(math.fsum((x / a - y / b) ** 2 for x, y in zip(p, z, strict=True)))
        cosines.append(math.fsum(x * y for x, y in zip(p, z, strict=True)) / (a * b))
    n = len(predictions)
    return math.fsum(distances) / n, math.fsum(2 - 2 * c for c in cosines) / n


@pytest.mark.parametrize("d", [1, 2, 7])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_is_equation_2(n, d):
    for seed in range(3):
        p, z = pair(n, d, seed=seed)
        for form in equation_2(p.tolist(), z.tolist()):
            assert byol_loss(p, z).item() == pytest.approx(form, rel=1e-12, abs=1e-12)


def test_stated_value():
    i, j = torch.arange(4.0, dtype=DOUBLE).view(4, 1), torch.arange(3.0, dtype=DOUBLE)
    a, b = torch.sin(1 + 3 * i + j), torch.cos(2 + 3 * i + j)
    assert (byol_loss(a, b) + byol_loss(b, a)).item() == pytest.approx(7.424893330, abs=1e-9)


# ---- closed forms and properties -----------------------------------------------------------------


def test_range():
    p, _ = pair(6, 5)
    assert byol_loss(p, 3 * p).item() == pytest.approx(0, abs=1e-12)
    assert byol_loss(p, -p).item() == pytest.approx(4, abs=1e-12)
    eye = torch.eye(4, dtype=DOUBLE)
    assert byol_loss(eye, eye.roll(1, 0)).item() == pytest.approx(2, abs=1e-12)


def test_loss_at_chance_is_that_of_unrelated_embeddings():
    p, z = pair(4096, 64)
    assert chance_loss() == 4.0
    both = byol_loss(p, z) + byol_loss(p.roll(1, 0), z)
    assert both.item() == pytest.approx(chance_loss(), abs=0.03)


def test_scale_of_each_embedding_has_no_influence():
    p, z = pair(6, 5)
    scales = torch.tensor([1e-3, 0.1, 1, 10, 1e3, 1e6], dtype=DOUBLE).unsqueeze(1)
    assert byol_loss(p * scales, z).item() == pytest.approx(byol_loss(p, z).item(), rel=1e-12)
    p.requires_grad_()
    byol_loss(p, z).backward()
    assert (p.grad * p).sum(1).abs().max() < 1e-12  # the gradient has no part along p


def test_is_the_mean_over_images():
    """Equal shares of a batch have its loss and its gradient as their mean."""
    p, z = (x.requires_grad_() for x in pair(8, 5))
    (whole,) = torch.autograd.grad(byol_loss(p, z), p)
    parts = [byol_loss(a, b) for a, b in zip(p.chunk(4), z.chunk(4), strict=True)]
    (shared,) = torch.autograd.grad(sum(parts) / 4, p)
    torch.testing.assert_close(shared, whole, rtol=0, atol=1e-14)


@pytest.mark.parametrize("n, d", [(2, 3), (4, 5)])
def test_gradcheck(n, d):
    p, z = (x.requires_grad_() for x in pair(n, d))
    torch.autograd.gradcheck(byol_loss, (p, z), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    narrow = [(30 * x).to(dtype).requires_grad_() for x in pair(8, 16, torch.float32)]
    wide = [x.detach().float().requires_grad_() for x in narrow]
    loss, expected = byol_loss(*narrow), byol_loss(*wide)
    assert loss.dtype == torch.float32 and loss.item() == expected.item()
    loss.backward()
    expected.backward()
    for ours, theirs in zip(narrow, wide, strict=True):
        assert torch.equal(ours.grad, theirs.grad.to(dtype))


def test_large_embeddings_are_finite():
    """6e4 squared overflows float16."""
    p, z = ((6e4 * x.sign()).half().requires_grad_() for x in pair(8, 32, torch.float32))
    loss = byol_loss(p, z)
    loss.backward()
    assert loss.isfinite() and p.grad.isfinite().all() and z.grad.isfinite().all()


# ---- the official code ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "suffix, dtype, tolerance", [("", torch.float32, 2e-6), ("_f64", DOUBLE, 1e-9)]
)
def test_golden(suffix, dtype, tolerance):
    """Every recorded case; `z` has rows of zeros, whose gradient the official code keeps finite."""
    data, ran = golden("byol_basic"), 0
    for key in data:
        case = key.removesuffix("/x")
        if not (key.startswith("loss/") and key.endswith("/x")):
            continue
        p = torch.tensor(data[f"{case}/x"], dtype=dtype, requires_grad=True)
        z = torch.tensor(data[f"{case}/y"], dtype=dtype)
        loss = byol_loss(p, z)
        loss.backward()
        assert rel(loss, data[f"{case}/mean{suffix}"]) < tolerance, case
        rows = [byol_loss(a, b) for a, b in zip(p.split(1), z.split(1), strict=True)]
        assert rel(torch.stack(rows), data[f"{case}/per_sample{suffix}"]) < tolerance, case
        assert rel(p.grad, data[f"{case}/grad_x_of_mean{suffix}"]) < tolerance, case
        ran += 1
    assert ran >= 4
