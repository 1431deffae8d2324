"""InfoNCE against the paper, over Python floats; what it must and must not depend on."""

import math

import pytest
import torch
import torch.nn.functional as F

from moco.loss import chance_loss, contrastive_top1, info_nce

DOUBLE = torch.float64


def draw(batch, dim, size, dtype=DOUBLE, seed=0):
    """Queries (B, D), keys (B, D) and a queue (D, K), all of unit length."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(2 * batch + size, dim, dtype=dtype, generator=generator)
    q, k, queue = F.normalize(rows, dim=1).split([batch, batch, size])
    return q, k, queue.T.contiguous()


def equation_1(queries, keys, queue, tau):
    """Eq. 1 of arXiv 1911.05722 v3 for each query, averaged; `queue` is a list of K keys."""

    def dot(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True))

    total = 0.0
    for q, positive in zip(queries, keys, strict=True):
        terms = [math.exp(dot(q, k) / tau) for k in [positive, *queue]]
        total -= math.log(terms[0] / sum(terms))
    return total / len(queries)


@pytest.mark.parametrize("tau", [0.07, 0.2, 1.0])
@pytest.mark.parametrize("batch, dim, size", [(1, 1, 1), (2, 3, 5), (5, 7, 12)])
def test_equals_the_equation(batch, dim, size, tau):
    q, k, queue = draw(batch, dim, size)
    loss, logits = info_nce(q, k, queue, tau)
    assert abs(loss.item() - equation_1(q.tolist(), k.tolist(), queue.T.tolist(), tau)) < 1e-12
    assert logits.shape == (batch, 1 + size)


def test_a_value_worked_out_by_hand():
    rows = torch.arange(4, dtype=DOUBLE)[:, None] * 3 + torch.arange(3, dtype=DOUBLE)
    q, k = F.normalize(torch.sin(1 + rows), dim=1), F.normalize(torch.cos(2 + rows), dim=1)
    i, j = torch.arange(6, dtype=DOUBLE)[:, None], torch.arange(3, dtype=DOUBLE)
    queue = F.normalize(torch.sin(0.5 * i + j**2), dim=1)
    loss, _ = info_nce(q, k, queue.T, 0.07)
    assert abs(loss.item() - 16.373055432) < 1e-9


def test_gradient():
    q, k, queue = draw(3, 4, 6)
    q.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: info_nce(x, k, queue, 0.2)[0], q)


def test_neither_key_nor_queue_gets_a_gradient():
    q, k, queue = (x.requires_grad_() for x in draw(3, 4, 6))
    info_nce(q, k, queue, 0.2)[0].backward()
    assert q.grad is not None and k.grad is None and queue.grad is None


def test_half_precision_is_widened():
    q, k, queue = draw(8, 16, 32, torch.float32)
    narrow = [x.bfloat16() for x in (q, k, queue)]
    loss, logits = info_nce(*narrow, 0.07)
    exact, _ = info_nce(*(x.double() for x in narrow), 0.07)
    assert loss.dtype == logits.dtype == torch.float32
    assert abs(loss.item() - exact.item()) < 1e-5


def test_large_similarities_stay_finite():
    q, _, queue = draw(4, 8, 16, torch.float32)
    loss, _ = info_nce(q, -q, torch.cat([q.T, queue], dim=1), 1e-3)
    assert torch.isfinite(loss)


def test_chance():
    same = torch.ones(5, 1, dtype=DOUBLE)
    loss, logits = info_nce(same, same, torch.ones(1, 7, dtype=DOUBLE), 0.07)
    assert abs(loss.item() - math.log(8)) < 1e-12
    assert chance_loss(7) == math.log(8) and abs(chance_loss(65536) - 11.09) < 5e-3
    assert contrastive_top1(logits) == 0  # a collapse is not a hit


def test_contrastive_top1():
    logits = torch.tensor([[2.0, 1.0, 0.0], [1.0, 3.0, 0.0], [0.0, -1.0, -2.0], [1.0, 1.0, 0.0]])
    assert contrastive_top1(logits) == 0.5
