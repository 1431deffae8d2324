"""The stream of view pairs: drawn by (seed, step) alone, whoever asks and from where."""

import pickle

import pytest
import torch
from torchvision.transforms import v2

from common.data import Images, batch_indices
from common.views import Pairs

SIZE, COUNT, BATCH = 12, 20, 8
T = v2.Compose(
    [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.RandomResizedCrop(SIZE, antialias=True),
        v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        v2.RandomApply([v2.GaussianBlur(3)], p=0.5),
    ]
)
GRAY = v2.Compose([T, v2.RandomGrayscale(p=1.0)])


def some_images(sizes=None):
    draw = torch.Generator().manual_seed(0)
    sizes = sizes or [(16, 16)] * COUNT
    tensors = [torch.randint(256, (3, *s), generator=draw).byte() for s in sizes]
    return Images("random", tensors)


def pairs(images=None, transforms=(T, T), **other):
    settings = {"batch_size": BATCH, "seed": 1} | other
    return Pairs(images or some_images(), transforms, **settings)


def stacked(stream, first, last):
    found = [torch.stack(views) for views in stream(first, last)]
    assert len(found) == last - first
    return torch.stack(found)  # (steps, 2, B, 3, H, W)


def test_shapes_and_dtypes():
    for dtype in (torch.float32, torch.float64):
        view1, view2 = next(pairs(dtype=dtype)(0, 1))
        assert view1.shape == view2.shape == (BATCH, 3, SIZE, SIZE)
        assert view1.dtype == view2.dtype == dtype
    double = stacked(pairs(dtype=torch.float64), 0, 2)
    assert (double - stacked(pairs(), 0, 2)).abs().max() < 1e-5


def test_no_two_views_are_alike():
    same = Images("one image", [some_images().encoded[0]] * COUNT)
    views = stacked(pairs(same), 0, 3).flatten(0, 2).flatten(1)
    assert len(views) == 3 * 2 * BATCH
    apart = torch.cdist(views, views) + 1e3 * torch.eye(len(views))
    assert apart.min() > 1e-2
    assert not torch.equal(stacked(pairs(same, seed=2), 0, 3), stacked(pairs(same), 0, 3))


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_make_the_pairs_that_the_main_process_makes(workers):
    images = some_images([(150 + 7 * i, 200 - 5 * i) for i in range(COUNT)])
    expected = stacked(pairs(images), 2, 9)
    assert torch.equal(stacked(pairs(images, workers=workers), 2, 9), expected)
    images.load(1.0)
    assert images.store is not None
    assert torch.equal(stacked(pairs(images, workers=workers), 2, 9), expected)


def test_a_worker_can_be_sent_the_stream():
    copy = pickle.loads(pickle.dumps(pairs(transforms=(T, GRAY))))
    assert torch.equal(stacked(copy, 0, 3), stacked(pairs(transforms=(T, GRAY)), 0, 3))


def test_both_views_are_of_the_images_in_the_order():
    flat = [torch.full((3, 9, 9), 10 * i, dtype=torch.uint8) for i in range(COUNT)]
    crop = v2.Compose([*T.transforms[:4]])
    for step, views in enumerate(pairs(Images("flat", flat), (crop, crop))(0, 4)):
        order = batch_indices(step, batch_size=BATCH, count=COUNT, seed=1)
        for view in views:
            assert torch.allclose(view.mean((1, 2, 3)) * 255, order * 10.0, atol=1e-3)


def test_each_view_has_its_own_transform():
    view1, view2 = next(pairs(transforms=(T, GRAY))(0, 1))
    assert (view1[:, 0] - view1[:, 1]).abs().max() > 0.01
    assert torch.equal(view2[:, 0], view2[:, 1])


@pytest.mark.parametrize("first", [1, 2, 5])
def test_a_restart_goes_on_with_the_same_pairs(first):
    whole = stacked(pairs(), 0, 7)
    torch.manual_seed(first)  # the global random stream has no part in it
    assert torch.equal(stacked(pairs(), first, 7), whole[first:])


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("processes", [2, 4, 8])
def test_the_pairs_of_all_processes_are_those_of_one(processes, drop_last):
    for dtype in (torch.float32, torch.float64):
        settings = {"drop_last": drop_last, "dtype": dtype}
        whole = stacked(pairs(**settings), 0, 4)
        ranks = [
            stacked(pairs(rank=rank, processes=processes, **settings), 0, 4)
            for rank in range(processes)
        ]
        assert ranks[0].shape[2] == BATCH // processes
        assert torch.equal(torch.cat(ranks, dim=2), whole)


def test_slices_of_indices_make_the_global_batch():
    for drop_last in (False, True):
        for step in range(6):
            parts = [
                pairs(rank=rank, processes=4, drop_last=drop_last).indices(step)
                for rank in range(4)
            ]
            whole = batch_indices(step, batch_size=BATCH, count=COUNT, seed=1, drop_last=drop_last)
            assert torch.equal(torch.cat(parts), whole)


def test_images_of_many_sizes_do_not_depend_on_their_neighbours():
    """The canvas is that of a rank's own batch; the pixels outside an image have no influence."""
    sizes = [(9 + i % 7, 30 - i) for i in range(COUNT)]
    whole = stacked(pairs(some_images(sizes), dtype=torch.float64), 0, 3)
    ranks = [
        stacked(pairs(some_images(sizes), dtype=torch.float64, rank=rank, processes=4), 0, 3)
        for rank in range(4)
    ]
    assert (torch.cat(ranks, dim=2) - whole).abs().max() < 1e-12


def test_workers_give_the_same_pairs():
    here, there = pairs(workers=0), pairs(workers=2)
    assert torch.equal(stacked(here, 1, 4), stacked(there, 1, 4))
