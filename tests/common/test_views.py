"""The stream of view pairs: a function of (seed, step), for any process and any first step."""

import pickle
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchvision import transforms as v1
from torchvision.transforms import v2

import common.views
from common.cli import UserError
from common.data import ImageSplit, batch_indices
from common.views import ViewPairs

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


def darken(image):
    return image * (random.random() + np.random.rand()) / 2


UNBATCHED = v2.Compose(
    [
        v2.RandomRotation(30, expand=True),
        v2.RandomChoice([v2.RandomPerspective(), v1.RandomAffine(20)]),
        T,
        v2.RandomApply([v2.ElasticTransform(sigma=1.0)], p=0.5),
        darken,
        v2.RandomGrayscale(p=0.3),
        v1.RandomErasing(p=0.5),
    ]
)
NAMES = ["RandomRotation", "RandomChoice", "ElasticTransform", "darken", "RandomErasing"]


def some_images(sizes=None):
    draw = torch.Generator().manual_seed(0)
    sizes = sizes or [(16, 16)] * COUNT
    tensors = [torch.randint(256, (3, *s), generator=draw).byte() for s in sizes]
    return ImageSplit("random", tensors)


def pairs(images=None, transforms=(T, T), **other):
    settings = {"batch_size": BATCH, "seed": 1} | other
    return ViewPairs(images or some_images(), transforms, **settings)


def stacked(stream, first, last):
    views = [torch.stack(pair) for pair in stream(first, last)]
    assert len(views) == last - first
    return torch.stack(views)  # (steps, 2, B, 3, H, W)


def test_shapes_and_dtypes():
    for dtype in (torch.float32, torch.float64):
        view1, view2 = next(pairs(dtype=dtype)(0, 1))
        assert view1.shape == view2.shape == (BATCH, 3, SIZE, SIZE)
        assert view1.dtype == view2.dtype == dtype
    double = stacked(pairs(dtype=torch.float64), 0, 2)
    assert (double - stacked(pairs(), 0, 2)).abs().max() < 1e-5


def test_no_two_views_are_alike():
    same = ImageSplit("one image", [some_images().encoded[0]] * COUNT)
    views = stacked(pairs(same), 0, 3).flatten(0, 2).flatten(1)
    assert len(views) == 3 * 2 * BATCH
    apart = torch.cdist(views, views) + 1e3 * torch.eye(len(views))
    assert apart.min() > 1e-2
    assert not torch.equal(stacked(pairs(same, seed=2), 0, 3), stacked(pairs(same), 0, 3))


@pytest.mark.parametrize("transform", [T, UNBATCHED])
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_make_the_pairs_that_the_main_process_makes(workers, transform):
    images = some_images([(150 + 7 * i, 200 - 5 * i) for i in range(COUNT)])
    settings = {"transforms": (transform, transform)}
    expected = stacked(pairs(images, **settings), 2, 5)
    assert torch.equal(stacked(pairs(images, workers=workers, **settings), 2, 5), expected)
    images.load(1.0)
    assert images.store is not None
    assert torch.equal(stacked(pairs(images, workers=workers, **settings), 2, 5), expected)


def test_a_worker_can_be_sent_the_stream():
    copy = pickle.loads(pickle.dumps(pairs(transforms=(T, GRAY))))
    assert torch.equal(stacked(copy, 0, 3), stacked(pairs(transforms=(T, GRAY)), 0, 3))


def test_both_views_are_of_the_images_in_the_order():
    flat = [torch.full((3, 9, 9), 10 * i, dtype=torch.uint8) for i in range(COUNT)]
    crop = v2.Compose([*T.transforms[:4]])
    for step, views in enumerate(pairs(ImageSplit("flat", flat), (crop, crop))(0, 4)):
        order = batch_indices(step, batch_size=BATCH, count=COUNT, seed=1)
        for view in views:
            assert torch.allclose(view.mean((1, 2, 3)) * 255, order * 10.0, atol=1e-3)


def test_each_view_has_its_own_transform():
    view1, view2 = next(pairs(transforms=(T, GRAY))(0, 1))
    assert (view1[:, 0] - view1[:, 1]).abs().max() > 0.01
    assert torch.equal(view2[:, 0], view2[:, 1])


@pytest.mark.parametrize("transform", [T, UNBATCHED])
def test_a_restart_goes_on_with_the_same_pairs(transform):
    settings = {"transforms": (transform, GRAY)}
    whole = stacked(pairs(**settings), 0, 7)
    for first in (1, 2, 5):
        for seed in (torch.manual_seed, random.seed, np.random.seed):
            seed(first)  # no global generator has a part in it
        assert torch.equal(stacked(pairs(**settings), first, 7), whole[first:])


@pytest.mark.parametrize("transform", [T, UNBATCHED])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("processes", [2, 4, 8])
def test_the_pairs_of_all_processes_are_those_of_one(processes, drop_last, transform):
    for dtype in (torch.float32, torch.float64):
        settings = {"drop_last": drop_last, "dtype": dtype, "transforms": (T, transform)}
        whole = stacked(pairs(**settings), 0, 4)
        ranks = [
            stacked(pairs(rank=rank, processes=processes, **settings), 0, 4)
            for rank in range(processes)
        ]
        assert ranks[0].shape[2] == BATCH // processes
        assert torch.equal(torch.cat(ranks, dim=2), whole)


def test_images_of_many_sizes_do_not_depend_on_their_neighbours():
    """A process pads its images to the largest of them; the padding has no influence."""
    sizes = [(9 + i % 7, 30 - i) for i in range(COUNT)]
    whole = stacked(pairs(some_images(sizes), dtype=torch.float64), 0, 3)
    ranks = [
        stacked(pairs(some_images(sizes), dtype=torch.float64, rank=rank, processes=4), 0, 3)
        for rank in range(4)
    ]
    assert (torch.cat(ranks, dim=2) - whole).abs().max() < 1e-12


def test_what_runs_image_by_image_is_named_once():
    assert pairs().unbatched == []
    assert pairs(transforms=(T, UNBATCHED)).unbatched == NAMES
    assert pairs(transforms=(UNBATCHED, v2.Compose([darken, v1.Pad(2)]))).unbatched == [
        *NAMES,
        "Pad",
    ]


@pytest.mark.parametrize(("workers", "in_memory"), [(0, False), (1, False), (0, True)])
def test_views_that_cannot_be_stacked_end_the_run_in_one_line(workers, in_memory):
    images = some_images()
    images.load(in_memory)
    stream = pairs(images, (T, v2.RandomRotation(45, expand=True)), workers=workers)
    assert (images.store is not None) == in_memory
    with pytest.raises(UserError, match=r"^views of different sizes, .* cannot be stacked: .*$"):
        next(stream(0, 1))


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.float32), ("fp64", torch.float64)])
def test_of_run_takes_the_settings_of_a_run(precision, dtype):
    run = SimpleNamespace(seed=5, workers=1, precision=precision)
    accelerator = SimpleNamespace(device=torch.device("cpu"), process_index=1, num_processes=2)
    stream = ViewPairs.of_run(
        some_images(), (T, GRAY), batch_size=BATCH, run=run, accelerator=accelerator, drop_last=True
    )
    settings = {"seed": 5, "transforms": (T, GRAY), "drop_last": True, "dtype": dtype}
    expected = stacked(pairs(rank=1, processes=2, **settings), 1, 4)
    assert expected.dtype == dtype and stream.workers == 1
    assert torch.equal(stacked(stream, 1, 4), expected)


@pytest.mark.parametrize("transform", [T, v2.Compose([T, v2.RandomErasing(p=0.5)])])
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("together", [1, 2, 3, 100])
def test_pairs_of_several_steps_made_at_once_are_those_of_one_after_the_other(
    together, processes, transform, monkeypatch
):
    """As on an accelerator that holds the images."""
    images = some_images()
    assert images.into_memory(1.0)
    settings = {"transforms": (T, transform), "rank": processes - 1, "processes": processes}
    expected = stacked(pairs(images, **settings), 2, 9)
    made = []
    monkeypatch.setattr(common.views, "resident", lambda images, device: images.store)
    view_bytes = BATCH // processes * SIZE * SIZE * 3 * 4  # more than those of the images
    monkeypatch.setattr(common.views, "TOGETHER", together * view_bytes)
    stream = pairs(images, **settings)
    pair = stream.pair
    monkeypatch.setattr(stream, "pair", lambda *a, **k: made.append(k["steps"]) or pair(*a, **k))
    assert torch.equal(stacked(stream, 2, 9), expected)
    together = 1 if stream.unbatched else together
    assert made == {1: 7 * [1], 2: [1, 2, 2, 2], 3: [1, 3, 3], 100: [1, 6]}[together]
