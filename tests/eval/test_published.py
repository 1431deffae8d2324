"""The published figures: each with its source, and none that is known to be wrong."""

import re

import pytest

from eval.published import DATA, PUBLISHED


def test_every_row_is_whole():
    assert len(PUBLISHED) > 180
    for key, row in PUBLISHED.items():
        assert re.fullmatch(r"[a-z0-9.-]+", key), key
        assert row.method and row.network and row.source and row.data in DATA, key
        assert 0 <= row.top1 < (row.top5 or 100) <= 100, key
        assert row.epochs is None or row.epochs in (100, 200, 300, 400, 800, 1000), key
        kinds = r"(linear|finetune-(1|10|100))-[\w-]+|knn\d+(-output)?"
        kinds += r"|transfer-(linear|finetune)(-mean-per-class|-map11)?"
        assert re.fullmatch(kinds, row.protocol), key


@pytest.mark.parametrize(
    "key, top1, top5",
    [
        ("simclr-v1-r50-1000", 69.3, 89.0),
        ("simclr-v1-r50-800-b4096-sqrt", 69.1, None),
        ("simclr-v2-r50-800", 71.7, None),
        ("moco-v1-r50-200", 60.6, None),
        ("moco-v1-mlp-r50-200-tau0.2", 66.2, None),
        ("moco-v2-r50-800", 71.1, None),
        ("moco-cifar10-sym-400", 88.5, None),
        ("byol-r50-1000", 74.3, 91.6),
        ("byol-r50-300-accumulate64", 59.7, 83.2),
        ("byol-gnws-r50-1000", 73.9, None),
        ("byol-r50-finetune-10", 68.8, 89.0),
        ("simclr-v2-r50-distilled-finetune-1", 73.9, None),
        ("simclr-transfer-finetune-flowers102", 97.0, None),
        ("byol-transfer-linear-food101", 75.3, None),
        ("byol-cifar10-r18-800-b512-lightly", 91.0, None),
        ("simclr-cifar10-r50-1000-linear-augmented-dkobak", 93.7, None),
    ],
)
def test_figures_of_the_sources(key, top1, top5):
    assert (PUBLISHED[key].top1, PUBLISHED[key].top5) == (top1, top5)


def test_what_is_often_quoted_wrongly_is_said():
    assert "71.1" in PUBLISHED["simclr-v2-r50-800"].note
    assert "73.9 is GN + WS" in PUBLISHED["byol-gnws-r50-1000"].note
    chosen = [key for key, row in PUBLISHED.items() if row.source == "lightly"]
    assert len(chosen) == 9
    assert all("best epoch on test" in PUBLISHED[key].note for key in chosen)


def test_no_two_rows_of_one_setting_differ():
    """Rows that a run could be held against at once come from different sources."""
    settings = [
        (r.method, r.network, r.epochs, r.batch_size, r.data, r.protocol, r.source, r.note)
        for r in PUBLISHED.values()
        if not r.variant
    ]
    variants = [str(r) for r in PUBLISHED.values() if r.variant]
    assert len(settings) == len(set(settings)) and len(variants) == len(set(variants))
