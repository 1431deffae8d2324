"""Batched views against torchvision: equal pixels for equal parameters, equal distributions."""

import colorsys
import math
import random
from functools import partial
from itertools import permutations

import numpy as np
import PIL.Image
import pytest
import torch
from torchvision import transforms as v1
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from common import augment
from common.augment import Batched

BILINEAR, BICUBIC = InterpolationMode.BILINEAR, InterpolationMode.BICUBIC
CLAMP = v2.Lambda(partial(torch.clamp, min=0.0, max=1.0))
TO_FLOAT = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
SIMCLR = v2.Compose(
    [
        *TO_FLOAT,
        v2.RandomResizedCrop((24, 20), interpolation=BICUBIC),
        v2.RandomHorizontalFlip(),
        CLAMP,
        v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8),
        v2.RandomGrayscale(0.2),
        v2.RandomApply([v2.GaussianBlur(5, (0.1, 2.0))], p=0.5),
        v2.RandomSolarize(0.5, p=0.2),
        v2.Normalize((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)),
    ]
)
COLOUR = [  # ours, torchvision's, range of the factor, tolerance in float32 and in float64
    (augment.brightness, F.adjust_brightness, (0.0, 2.0), 1e-6, 1e-12),
    (augment.contrast, F.adjust_contrast, (0.0, 2.0), 1e-6, 1e-12),
    (augment.saturation, F.adjust_saturation, (0.0, 2.0), 1e-6, 1e-12),
    (augment.hue, F.adjust_hue, (-0.5, 0.5), 2e-6, 2e-6),  # torchvision's is float32 inside
]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def uniforms(images, draws):
    return torch.rand(images, draws, dtype=torch.float64)


def worst(ours, theirs):
    """The largest difference; torchvision's side is a list of images."""
    theirs = torch.stack(list(theirs))
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    return (ours - theirs).abs().max().item()


# Pixels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (7, 12), (32, 32), (33, 40)])
@pytest.mark.parametrize(("ours", "theirs", "bounds", "tol32", "tol64"), COLOUR)
def test_colour_operations_are_torchvisions(ours, theirs, bounds, tol32, tol64, shape, dtype):
    images = torch.rand(9, 3, *shape, dtype=dtype)
    images[1], images[2], images[3] = 0, 1, 0.3  # gray: no hue
    images[4] = images[4].round()  # ties between channels
    factors = torch.linspace(*bounds, 9, dtype=torch.float64)
    before = images.clone()
    result = ours(images, factors)
    expected = [theirs(image, factor.item()) for image, factor in zip(images, factors, strict=True)]
    assert worst(result, expected) < (tol32 if dtype == torch.float32 else tol64)
    assert torch.equal(images, before)


def test_hue_is_the_standard_librarys_in_float64():
    images = torch.rand(6, 3, 4, 5, dtype=torch.float64)
    turns = torch.tensor([-0.5, -0.2, 0.0, 0.1, 0.3, 0.5], dtype=torch.float64)
    result = augment.hue(images, turns)
    for image, turn, ours in zip(images, turns.tolist(), result, strict=True):
        for pixel, result in zip(image.flatten(1).T, ours.flatten(1).T, strict=True):
            h, s, v = colorsys.rgb_to_hsv(*pixel.tolist())
            expected = colorsys.hsv_to_rgb((h + turn) % 1, s, v)
            assert result.tolist() == pytest.approx(expected, 1e-12)


def test_fixed_operations_are_torchvisions():
    images = torch.rand(3, 3, 9, 14, dtype=torch.float64)
    images[0, :, 0, 0] = 0.7  # solarize inverts at the threshold
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    assert worst(augment.grayscale(images), [F.rgb_to_grayscale(x, 3) for x in images]) == 0
    assert worst(augment.solarize(images, 0.7), [F.solarize(x, 0.7) for x in images]) == 0
    assert (
        worst(augment.normalize(images, mean, std), [F.normalize(x, mean, std) for x in images])
        < 1e-12
    )
    single = images.float()
    assert (
        worst(augment.normalize(single, mean, std), [F.normalize(x, mean, std) for x in single])
        < 1e-6
    )
    assert augment.to_float(
        torch.tensor([0, 51, 255], dtype=torch.uint8)
    ).tolist() == pytest.approx([0, 0.2, 1])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 9), (23, 23)])
@pytest.mark.parametrize("shape", [(12, 12), (13, 31), (40, 33)])
def test_blur_is_torchvisions(shape, kernel, dtype, tolerance):
    images = torch.rand(4, 3, *shape, dtype=dtype)
    sigmas = torch.tensor([0.1, 0.5, 2.0, 10.0], dtype=torch.float64)
    ours = augment.gaussian_blur(images, kernel, sigmas)
    pairs = zip(images, sigmas.tolist(), strict=True)
    assert worst(ours, [F.gaussian_blur(x, list(kernel), [s, s]) for x, s in pairs]) < tolerance


def test_blur_refuses_images_that_cannot_be_reflected():
    with pytest.raises(ValueError, match="11 pixels cannot be blurred with 23 taps"):
        augment.gaussian_blur(torch.rand(1, 3, 11, 30), (23, 23), torch.ones(1))


@pytest.mark.parametrize(
    ("dtype", "interpolation", "tolerance"),
    [
        (torch.float32, BILINEAR, 1e-6),
        (torch.float32, BICUBIC, 2e-6),  # its values and its weights go beyond one
        (torch.float64, BILINEAR, 1e-12),
        (torch.float64, BICUBIC, 1e-12),
    ],
)
@pytest.mark.parametrize("shape", [(32, 32), (33, 47), (120, 85), (300, 260)])
@pytest.mark.parametrize("size", [(32, 32), (17, 40), (224, 192), (1, 2)])
def test_resized_crop_is_torchvisions(size, shape, interpolation, dtype, tolerance):
    h, w = shape
    images = torch.rand(8, 3, h, w, dtype=dtype)
    boxes = augment.random_boxes(uniforms(8, 22), torch.tensor([shape] * 8), (0.02, 1), (0.3, 3))
    corners = [[0, 0, h, w], [0, 0, 1, 1], [h - 1, w - 1, 1, 1], [2, 3, h - 2, 1]]
    boxes[:4] = torch.tensor(corners)
    flip = torch.arange(8) % 2 == 0
    ours = augment.resized_crop(images, boxes, size, interpolation, flip)
    straight = augment.resized_crop(images, boxes, size, interpolation)
    expected = [
        F.resized_crop(image, *box, list(size), interpolation, antialias=True)
        for image, box in zip(images, boxes.tolist(), strict=True)
    ]
    flipped = [x.flip(-1) if f else x for x, f in zip(expected, flip.tolist(), strict=True)]
    assert worst(straight, expected) < tolerance
    assert worst(ours, flipped) < tolerance


def test_a_whole_box_of_the_same_size_is_the_image():
    images = torch.rand(2, 3, 9, 7)
    boxes = torch.tensor([[0, 0, 9, 7]] * 2)
    for interpolation in (BILINEAR, BICUBIC):
        assert torch.equal(augment.resized_crop(images, boxes, (9, 7), interpolation), images)


@pytest.mark.parametrize("box", [[0, 0, 0, 3], [-1, 0, 3, 3], [0, 2, 3, 7], [7, 0, 3, 3]])
def test_boxes_outside_the_canvas_are_refused(box):
    with pytest.raises(ValueError, match=r"inside the \(9, 8\) canvas"):
        augment.resized_crop(torch.rand(1, 3, 9, 8), torch.tensor([box]), (4, 4), BILINEAR)


@pytest.mark.parametrize("transform", [SIMCLR, v2.ElasticTransform()])
def test_autocast_does_not_touch_the_pixels(transform):
    batched, images = Batched(transform), torch.rand(16, 3, 30, 30)
    u = uniforms(16, batched.draws)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        views = batched(images, u)
    assert torch.equal(views, batched(images, u))


def test_center_crop_boxes():
    sizes = torch.tensor([[32, 32], [256, 256], [300, 401], [7, 5]])
    assert augment.center_crop_boxes(sizes, 1.0).tolist()[:2] == [[0, 0, 32, 32], [0, 0, 256, 256]]
    boxes = augment.center_crop_boxes(sizes, 0.875)
    assert boxes.tolist() == [[2, 2, 28, 28], [16, 16, 224, 224], [19, 70, 262, 262], [2, 1, 4, 4]]


# A whole composition


def one_by_one(batched, images, u, size):
    """SIMCLR image by image with torchvision's functions and the parameters drawn from u."""
    views = []
    for image, row in zip(images, u.double(), strict=True):
        crop, flip, apply, order, factors, gray, blur, sigma, solarize = row.split(
            [22, 1, 1, 4, 4, 1, 1, 1, 1]
        )
        hw = torch.tensor([image.shape[-2:]])
        box = augment.random_boxes(crop[None], hw, (0.08, 1.0), (3 / 4, 4 / 3))[0].tolist()
        x = F.to_dtype(image, batched.dtype, scale=True)
        x = F.resized_crop(x, *box, list(size), BICUBIC, antialias=True)
        x = (F.horizontal_flip(x) if flip < 0.5 else x).clamp(0, 1)
        if apply < 0.8:
            operations = [
                lambda x, u: F.adjust_brightness(x, 0.2 + 1.6 * u),
                lambda x, u: F.adjust_contrast(x, 0.2 + 1.6 * u),
                lambda x, u: F.adjust_saturation(x, 0.2 + 1.6 * u),
                lambda x, u: F.adjust_hue(x, -0.2 + 0.4 * u),
            ]
            for i in sorted(range(4), key=order.tolist().__getitem__):
                x = operations[i](x, factors[i].item())
        x = F.rgb_to_grayscale(x, 3) if gray < 0.2 else x
        x = F.gaussian_blur(x, [5, 5], [0.1 + 1.9 * sigma.item()] * 2) if blur < 0.5 else x
        x = F.solarize(x, 0.5) if solarize < 0.2 else x
        views.append(F.normalize(x, [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]))
    return views


def solarize_is_decided(u, views):
    """Images without a pixel so near the threshold that rounding decides its inversion."""
    mean, std = (torch.tensor(t).view(3, 1, 1) for t in ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)))
    clear = torch.stack([((v * std + mean - 0.5).abs().min() > 1e-5) for v in views])
    return clear | (u[:, -1] >= 0.2)


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
def test_a_composition_is_torchvision_image_by_image(kind):
    batched = Batched(SIMCLR)
    assert batched.draws == 22 + 1 + (1 + 8) + 1 + (1 + 1) + 1
    images = torch.randint(0, 256, (96, 3, 31, 37), dtype=torch.uint8)
    images = images if kind == torch.uint8 else F.to_dtype(images, kind, scale=True)
    u, before = uniforms(96, batched.draws), images.clone()
    views = batched(images, u)
    expected = one_by_one(batched, images, u, (24, 20))
    decided = solarize_is_decided(u, expected)
    assert decided.sum() > 80 and (decided & (u[:, -1] < 0.2)).any()
    expected = [x for x, keep in zip(expected, decided, strict=True) if keep]
    # Rounding of 1e-6 is multiplied by at most 1.8 in each jitter and by 5 in the normalisation.
    assert worst(views[decided], expected) < 1e-4
    assert views.is_contiguous() and torch.equal(images, before)


def test_a_composition_without_hue_in_float64():
    batched = Batched(
        v2.Compose([v2.RandomResizedCrop(16), CLAMP, v2.ColorJitter(0.4, 0.4, 0.4)]), torch.float64
    )
    images, u = torch.rand(12, 3, 20, 30, dtype=torch.float64), uniforms(12, batched.draws)
    boxes = augment.random_boxes(
        u[:, :22], torch.tensor([[20, 30]] * 12), (0.08, 1), (3 / 4, 4 / 3)
    )
    expected = []
    for image, box, row in zip(images, boxes.tolist(), u[:, 22:].tolist(), strict=True):
        x = F.resized_crop(image, *box, [16, 16], BILINEAR, antialias=True)
        for i in sorted(range(4), key=row[:4].__getitem__):
            if i < 3:
                adjust = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)[i]
                x = adjust(x, 0.6 + 0.8 * row[4 + i])
        expected.append(x)
    assert worst(batched(images, u), expected) < 1e-12


def test_a_padded_canvas_is_the_image_alone():
    batched = Batched(v2.Compose([*TO_FLOAT, *SIMCLR.transforms[2:-2]]))  # solarize jumps
    sizes = torch.tensor([[20, 30], [31, 17], [32, 40], [1, 9], [12, 1]])
    canvas = torch.zeros(5, 3, 32, 40, dtype=torch.uint8)
    alone = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in sizes.tolist()]
    for place, image in zip(canvas, alone, strict=True):
        place[:, : image.shape[1], : image.shape[2]] = image
    u = uniforms(5, batched.draws)
    views = batched(canvas, u, sizes)
    assert (
        worst(views, [batched(x[None], row[None])[0] for x, row in zip(alone, u, strict=True)])
        < 2e-5
    )
    canvas[2, :, :, :] = 0
    assert torch.equal(batched(canvas, u, sizes)[[0, 1, 3, 4]], views[[0, 1, 3, 4]])
    garbage = canvas.clone()
    garbage[0, :, 20:], garbage[0, :, :, 30:] = 255, 255
    assert torch.equal(batched(garbage, u, sizes)[0], views[0])


def test_the_draws_decide():
    batched, images = Batched(SIMCLR), torch.rand(24, 3, 28, 28)
    u = uniforms(24, batched.draws)
    same = batched(images[:1].expand(24, -1, -1, -1), u)
    assert all(not torch.allclose(x, y) for i, x in enumerate(same) for y in same[:i])
    assert batched(images[:0], u[:0]).shape == (0, 3, 24, 20)


def test_single_precision_draws_are_enough():
    batched = Batched(v2.RandomResizedCrop(8))
    ones = torch.full((2, 22), 1 - 2**-24)  # the largest float32 below one
    assert batched(torch.rand(2, 3, 9, 9), ones).isfinite().all()
    double = torch.full((2, 22), 1 - 2**-53, dtype=torch.float64)
    assert batched(torch.rand(2, 3, 9, 9), double).isfinite().all()


def test_a_flip_is_the_same_right_after_the_crop_and_elsewhere():
    flip, crop = v2.RandomHorizontalFlip(0.5), v2.RandomResizedCrop(9)
    adjacent, apart = Batched(v2.Compose([crop, flip])), Batched(v2.Compose([crop, CLAMP, flip]))
    images, u = torch.rand(20, 3, 12, 12), uniforms(20, adjacent.draws)
    assert torch.allclose(adjacent(images, u), apart(images, u), rtol=0, atol=1e-6)
    mirrored = torch.where((u[:, -1] < 0.5).view(-1, 1, 1, 1), images.flip(-1), images)
    assert torch.equal(Batched(flip)(images, u[:, -1:]), mirrored)


def test_random_apply_draws_once_for_all_that_it_holds():
    batched = Batched(
        v2.RandomApply(
            [v2.RandomSolarize(0.5, p=1.0), v2.Compose([v2.RandomGrayscale(1.0)])], p=0.3
        )
    )
    images, u = torch.rand(50, 3, 4, 4), uniforms(50, batched.draws)
    assert batched.draws == 3
    both = augment.grayscale(augment.solarize(images, 0.5))
    expected = torch.where((u[:, 0] < 0.3).view(-1, 1, 1, 1), both, images)
    assert torch.allclose(batched(images, u), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_never_and_always(p):
    u, images = uniforms(8, 1), torch.rand(8, 3, 5, 5)
    gray = Batched(v2.Compose([v2.RandomGrayscale(p), CLAMP]))(images, u)
    assert torch.equal(gray, augment.grayscale(images) if p else images)


# Distributions


def within_four_sigma(count, n, p):
    return abs(count - n * p) < 4 * math.sqrt(n * p * (1 - p))


@pytest.mark.parametrize(
    ("transform", "p"),
    [
        (v2.RandomHorizontalFlip(0.5), 0.5),
        (v2.RandomGrayscale(0.2), 0.2),
        (v2.RandomSolarize(0.5, p=0.1), 0.1),
        (v2.RandomApply([v2.ColorJitter(0.8)], p=0.8), 0.8),
    ],
)
def test_probabilities(transform, p):
    n = 20_000
    batched = Batched(transform)
    image = torch.tensor([0.9, 0.6, 0.2, 0.1, 0.7, 0.4]).view(1, 3, 1, 2)
    changed = batched(image.expand(n, -1, -1, -1), uniforms(n, batched.draws)) != image
    assert within_four_sigma(changed.flatten(1).any(1).sum().item(), n, p)


def same_distribution(ours, theirs):
    """Two-sample Kolmogorov-Smirnov at 1e-4 (conservative with the ties of rounded boxes)."""
    values = torch.cat([ours, theirs]).unique()
    cdfs = [
        torch.searchsorted(x.sort().values, values, right=True) / len(x) for x in (ours, theirs)
    ]
    bound = math.sqrt(-math.log(1e-4 / 2) / 2 * (1 / len(ours) + 1 / len(theirs)))
    return (cdfs[0] - cdfs[1]).abs().max().item() < bound


@pytest.mark.parametrize(
    ("shape", "scale", "ratio"),
    [
        ((224, 224), (0.08, 1.0), (3 / 4, 4 / 3)),
        ((32, 32), (0.2, 1.0), (3 / 4, 4 / 3)),
        ((60, 400), (0.5, 1.0), (3 / 4, 4 / 3)),  # often and always the fallback
    ],
)
def test_boxes_follow_torchvisions_distribution(shape, scale, ratio):
    n, ours_n = 6_000, 40_000
    crop, image = v2.RandomResizedCrop(8, scale, ratio), torch.empty(3, *shape)
    drawn = [crop.make_params([image]) for _ in range(n)]
    theirs = torch.tensor([[d["top"], d["left"], d["height"], d["width"]] for d in drawn])
    ours = augment.random_boxes(
        uniforms(ours_n, 22), torch.tensor(shape).expand(ours_n, 2), scale, ratio
    )
    for statistic in (
        lambda b: b[:, 2] * b[:, 3],
        lambda b: b[:, 3] / b[:, 2],
        lambda b: b[:, 0],
        lambda b: b[:, 1],
        lambda b: b[:, 0] + b[:, 2],
    ):
        assert same_distribution(statistic(ours).double(), statistic(theirs).double())


@pytest.mark.parametrize("shape", [(20, 400), (400, 20), (30, 30), (3, 200), (1, 1)])
def test_the_fallback_is_torchvisions(shape):
    ratio = (3 / 4, 4 / 3)
    crop = v2.RandomResizedCrop(8, scale=(4.0, 5.0), ratio=ratio)  # nothing fits
    expected = crop.make_params([torch.empty(3, *shape)])
    box = augment.random_boxes(uniforms(1, 22), torch.tensor([shape]), (4.0, 5.0), ratio)[0]
    assert box.tolist() == [expected[k] for k in ("top", "left", "height", "width")]


def record(monkeypatch, name, n, transform):
    """The per-image parameters that a step gives to its operation, over n images."""
    calls = []
    real = getattr(augment, name)

    def spy(images, *parameters):
        calls.append(parameters[-1])
        return real(images, *parameters)

    monkeypatch.setattr(augment, name, spy)
    batched = Batched(transform)
    batched(torch.rand(1, 3, 4, 4).expand(n, -1, -1, -1), uniforms(n, batched.draws))
    return torch.cat(calls)


@pytest.mark.parametrize(
    ("name", "transform", "low", "high"),
    [
        ("gaussian_blur", v2.GaussianBlur(3, (0.1, 2.0)), 0.1, 2.0),
        ("brightness", v2.ColorJitter(brightness=0.4), 0.6, 1.4),
        ("contrast", v2.ColorJitter(contrast=1.5), 0.0, 2.5),
        ("saturation", v2.ColorJitter(saturation=(0.5, 3.0)), 0.5, 3.0),
        ("hue", v2.ColorJitter(hue=0.1), -0.1, 0.1),
    ],
)
def test_factors_are_uniform_in_their_range(monkeypatch, name, transform, low, high):
    values = record(monkeypatch, name, 5_000, transform)
    assert len(values) == 5_000
    assert same_distribution(values, low + (high - low) * torch.arange(50_000).double() / 50_000)


def test_all_24_orders_of_the_jitter_are_equally_likely():
    n, factor, turn = 24_000, 1.8, 0.2  # so strong that clipping tells all orders apart
    batched = Batched(v2.ColorJitter(*[(factor, factor)] * 3, (turn, turn)), torch.float64)
    image = torch.rand(3, 2, 3, dtype=torch.float64)
    adjust = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)
    orders = []
    for order in permutations(range(4)):
        x = image
        for i in order:
            x = augment.hue(x[None], torch.tensor([turn]))[0] if i == 3 else adjust[i](x, factor)
        orders.append(x.flatten())
    orders = torch.stack(orders)
    assert torch.cdist(orders, orders).add(torch.eye(24)).min() > 1e-3
    views = batched(image.expand(n, -1, -1, -1), uniforms(n, batched.draws)).flatten(1)
    distance, which = torch.cdist(views, orders).min(1)
    assert distance.max() < 1e-6
    assert all(within_four_sigma(count, n, 1 / 24) for count in which.bincount(minlength=24))


# Image by image


def noise(image):
    image[:, 0] = 0  # in place, as a function of a user's may
    scale = 0.5 + random.random() / 4 + torch.from_numpy(np.random.rand(*image.shape[1:])) / 4
    return (image * scale).to(image.dtype)


class Shift(v2.RandomHorizontalFlip):
    """Not a flip, whatever its base class."""

    def transform(self, inpt, params):
        return inpt.roll(int(torch.randint(1, 9, ())), -1)


UNBATCHED = [
    v2.RandomRotation(30),
    v2.RandomPerspective(p=1.0),
    v2.ElasticTransform(20.0, sigma=1.0),
    v2.RandomChoice([v2.RandomVerticalFlip(1.0), v2.RandomRotation((90, 90))]),
    v2.RandomResizedCrop(12, interpolation=InterpolationMode.NEAREST),
    v2.RandomResizedCrop(12, antialias=False),
    v2.Lambda(torch.sign),
    v1.RandomErasing(p=1.0),
    v1.RandomAffine(20),
    Shift(1.0),
    noise,
]
FLOAT64 = [v2.ToImage(), v2.ToDtype(torch.float64, scale=True)]
NORMALIZE = v2.Normalize((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
WHOLE = v2.RandomResizedCrop((10, 11), scale=(1, 1), ratio=(1, 1))  # of a square image
COMPOSITIONS = {  # each with one transform that draws from the global generators before any other
    "alone": lambda t: t,
    "first": lambda t: v2.Compose([t, *FLOAT64, WHOLE, v2.RandomGrayscale(1.0)]),
    "middle": lambda t: v2.Compose([v2.Compose([*FLOAT64, NORMALIZE]), t, WHOLE]),
    "last": lambda t: v1.Compose([*FLOAT64, NORMALIZE, t]),
}


def generator_states():
    name, keys, *rest = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), (name, keys.tolist(), *rest)


def seed_all(uniform):
    seed = int(uniform * 2**32)
    torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)


def image_by_image(composition, images, seeds):
    """What torchvision makes of each image under its seed, as float64."""
    for image, uniform in zip(images, seeds.tolist(), strict=True):
        seed_all(uniform)
        yield F.to_dtype(composition(image.clone()), torch.float64, scale=True)


def on_a_canvas(images):
    sizes = torch.tensor([image.shape[1:] for image in images])
    canvas = torch.full((len(images), 3, *sizes.amax(0).tolist()), 99, dtype=torch.uint8)
    for row, image in zip(canvas, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    return canvas, sizes


@pytest.mark.parametrize("place", COMPOSITIONS)
@pytest.mark.parametrize("transform", UNBATCHED, ids=lambda t: getattr(t, "__name__", str(t)))
def test_any_transform_is_torchvision_image_by_image(transform, place):
    composition = COMPOSITIONS[place](transform)
    sides = [14, 9, 20, 11] if place in ("first", "middle") else [15] * 4
    images = [torch.randint(0, 256, (3, s, s), dtype=torch.uint8) for s in sides]
    canvas, sizes = on_a_canvas(images)
    before, batched = canvas.clone(), Batched(composition, torch.float64)
    assert batched.unbatched == [getattr(transform, "__name__", type(transform).__name__)]
    u = uniforms(4, batched.draws)
    expected = list(image_by_image(composition, images, u[:, 0]))
    seed_all(0.5)
    states = generator_states()
    views = batched(canvas, u, sizes)
    assert generator_states() == states and torch.equal(canvas, before)
    assert worst(views, expected) < 1e-9 and views.is_contiguous()
    assert torch.equal(batched(canvas[1:3], u[1:3], sizes[1:3]), views[1:3])


def test_random_apply_runs_any_transform_on_the_chosen_images_only():
    rotation = v2.RandomRotation(30, expand=True)
    some = v2.RandomApply([rotation, noise, *FLOAT64], p=0.5)
    batched = Batched(v2.Compose([some, *FLOAT64, WHOLE]), torch.float64)
    assert batched.unbatched == ["RandomRotation", "noise"]
    crop = Batched(WHOLE, torch.float64)
    images = torch.randint(0, 256, (3, 3, 12, 12), dtype=torch.uint8)
    for chosen in ([], [1], [0, 1, 2]):
        u = uniforms(3, batched.draws) / 2
        u[:, 0] += torch.tensor([0.0 if i in chosen else 0.5 for i in range(3)])
        results = list(images)
        for i in chosen:
            seed_all(u[i, 1].item())
            results[i] = noise(rotation(images[i].clone()))
        expected = [crop(x[None], row[None])[0] for x, row in zip(results, u[:, 2:], strict=True)]
        assert worst(batched(images, u), expected) < 1e-12


RESIZE = v2.RandomResizedCrop(9)


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ([], torch.uint8),
        ([RESIZE, NORMALIZE], torch.float32),
        ([v2.ToImage(), v2.ToDtype(torch.uint8, scale=True), RESIZE], torch.uint8),
        ([RESIZE, v1.ToTensor(), RESIZE], torch.float32),
        ([v1.ConvertImageDtype(torch.float32)], torch.float32),
        ([v2.ToDtype(torch.float32)], torch.float32),
        ([*TO_FLOAT, v2.ToDtype(torch.uint8, scale=True), RESIZE], torch.uint8),
        ([v2.RandomApply([TO_FLOAT[1], noise], p=1.0), RESIZE], torch.float32),
        ([noise, v2.ToImage(), v1.ToTensor(), noise], torch.float32),
        ([RESIZE, v2.ToPILImage(), v2.RandomHorizontalFlip(), v1.RandomRotation(9)], "RGB"),
        ([RESIZE, v2.ToPILImage(), RESIZE, v1.PILToTensor(), v2.RandomGrayscale()], torch.uint8),
    ],
)
def test_a_transform_gets_the_type_that_torchvision_hands_it(before, expected):
    def record(image):
        types.append(image.mode if isinstance(image, PIL.Image.Image) else image.dtype)
        return image

    types: list = []
    batched = Batched(v2.Compose([*before, record]))
    images = torch.randint(0, 256, (2, 3, 9, 9), dtype=torch.uint8)
    views = batched(images, uniforms(2, batched.draws))
    assert types == [expected] * 2 and views.dtype == torch.float32
    assert types.clear() is None and Batched(record)(images.float() / 255, uniforms(2, 1)).sum()
    assert types == [torch.float32] * 2


@pytest.mark.parametrize(
    "convert",
    [F.to_pil_image, lambda x: x.permute(1, 2, 0).numpy(), lambda x: x.double() / 255, F.to_image],
)
def test_results_of_any_image_type_become_scaled_floats(convert):
    images = torch.randint(0, 256, (2, 3, 9, 8), dtype=torch.uint8)
    for dtype in (torch.float32, torch.float64):
        for after in ([], [CLAMP], TO_FLOAT):
            views = Batched(v2.Compose([convert, *after]), dtype)(images, uniforms(2, 1))
            assert type(views) is torch.Tensor
            assert (views - augment.to_float(images, dtype)).abs().max() < 1e-7
            assert views.dtype == dtype


def test_a_transform_before_the_conversion_is_on_the_scale_of_its_place():
    composition = v2.Compose([v2.RandomSolarize(128, p=1.0), *FLOAT64])
    images = torch.arange(120, 136, dtype=torch.uint8).expand(1, 3, 4, 16)
    u = uniforms(1, 1)
    assert worst(Batched(composition, torch.float64)(images, u), [composition(images[0])]) < 1e-12
    crop = v2.RandomResizedCrop(20, interpolation=BICUBIC)  # overshoots
    floats, integers = (
        Batched(v2.Compose([crop, *between, *FLOAT64]), torch.float64)
        for between in ([CLAMP], [lambda image: image])
    )
    images = torch.randint(0, 2, (4, 3, 9, 9), dtype=torch.uint8) * 255
    u = uniforms(4, integers.draws)
    assert (integers(images, u) - floats(images, u[:, :-1])).abs().max() < 0.5001 / 255


def test_images_of_many_sizes_go_alone_through_what_stands_before_the_crop():
    batched = Batched(v2.Compose([v2.ColorJitter(0.4, 0.4), v2.RandomResizedCrop(8)]))
    images = [torch.randint(0, 256, (3, *s), dtype=torch.uint8) for s in ((9, 20), (15, 7))]
    u = uniforms(2, batched.draws)
    alone = [batched(x[None], row[None])[0] for x, row in zip(images, u, strict=True)]
    canvas, sizes = on_a_canvas(images)
    assert worst(batched(canvas, u, sizes), alone) == 0 and batched.unbatched == []


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (v2.Identity(), "views of different sizes, 9x20 and 15x7, cannot be stacked: .*a resize"),
        (v2.RandomRotation((90, 90), expand=True), "sizes, 7x15 and 20x9, cannot be stacked"),
        (lambda x: x[: x.shape[1] // 7], "images of 1 and 2 channels cannot be stacked: "),
        (lambda x: x[None], r"<lambda> returns a tensor \(1, 3, 9, 20\), not one image"),
        (v2.FiveCrop(5), "FiveCrop returns a tuple, not an image"),
    ],
)
def test_results_that_cannot_be_stacked_are_refused_in_one_line(transform, message):
    canvas, sizes = on_a_canvas(
        [torch.zeros(3, *size, dtype=torch.uint8) for size in ((9, 20), (15, 7))]
    )
    batched = Batched(transform)
    u, states = uniforms(2, batched.draws), generator_states()
    with pytest.raises(ValueError, match=message) as caught:
        batched(canvas, u, sizes)
    assert "\n" not in str(caught.value) and generator_states() == states


def test_identities_and_nesting_vanish():
    batched = Batched(
        v2.Compose([v2.Compose([*TO_FLOAT, v2.Identity()]), v2.Compose([v2.Identity()])])
    )
    images = torch.randint(0, 256, (3, 4, 4, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    views = batched(images, uniforms(3, 0))
    assert torch.equal(views, augment.to_float(images)) and views.is_contiguous()


def test_wrong_uniforms_are_refused():
    with pytest.raises(ValueError, match=r"uniforms must be \(2, 1\)"):
        Batched(v2.RandomGrayscale())(torch.rand(2, 3, 4, 4), uniforms(2, 2))


# Several at a time


@pytest.mark.parametrize("size", [(20, 30), (180, 150)])  # many at a time, and one by one
def test_neither_threads_nor_neighbours_change_a_view(monkeypatch, size):
    """Bit for bit, however the images are divided among chunks and threads."""
    monkeypatch.setattr(augment, "CPU", 4 * 3 * 20 * 30 * 3)  # three small images at a time
    batched, images = Batched(SIMCLR), torch.randint(0, 256, (8, 3, *size), dtype=torch.uint8)
    u = uniforms(8, batched.draws)
    views = batched(images, u)
    torch.set_num_threads(3)
    assert torch.equal(batched(images, u), views) and torch.get_num_threads() == 3
    with torch.inference_mode():
        assert torch.equal(batched(images, u), views)
    torch.set_num_threads(1)
    assert torch.equal(batched(images[:1], u[:1]), views[:1])
    assert torch.equal(batched(images[5:], u[5:]), views[5:])


@pytest.mark.parametrize("sizes", [[(20, 30), (40, 20)], [(180, 150), (20, 30), (200, 260)]])
@pytest.mark.parametrize("transform", [SIMCLR, v2.Compose([v2.RandomGrayscale(), SIMCLR])])
def test_a_list_of_images_gives_the_views_of_their_canvas(sizes, transform):
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in sizes]
    batched, (canvas, known) = Batched(transform), on_a_canvas(images)
    u = uniforms(len(images), batched.draws)
    assert torch.equal(batched(images, u), batched(canvas, u, known))


def test_a_list_of_images_of_several_channels_is_refused():
    images = [torch.rand(3, 200, 200), torch.rand(1, 200, 200)]
    crop = Batched(v2.RandomResizedCrop(8, antialias=True))
    with pytest.raises(augment.ViewError, match="images of 1 and 3 channels"):
        crop(images, uniforms(2, crop.draws))


def test_how_far_others_are_reduced_changes_no_bit_of_a_view():
    """The number of taps is that of the image which is reduced most."""
    images = torch.randint(0, 256, (40, 3, 600, 500), dtype=torch.uint8)
    sizes = torch.randint(40, 500, (40, 2))
    batched = Batched(v2.RandomResizedCrop(24, antialias=True))
    u = uniforms(40, batched.draws)
    together = batched(images, u, sizes)
    for i in range(40):
        assert torch.equal(
            batched(images[i : i + 1], u[i : i + 1], sizes[i : i + 1])[0], together[i]
        )
