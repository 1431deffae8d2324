"""Batched views against torchvision: the same pixels for the same parameters, the same laws."""

import colorsys
import math
from functools import partial
from itertools import permutations

import pytest
import torch
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
        for pixel, found in zip(image.flatten(1).T, ours.flatten(1).T, strict=True):
            h, s, v = colorsys.rgb_to_hsv(*pixel.tolist())
            assert found.tolist() == pytest.approx(colorsys.hsv_to_rgb((h + turn) % 1, s, v), 1e-12)


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


def test_autocast_does_not_touch_the_pixels():
    program, images = Batched(SIMCLR), torch.rand(16, 3, 30, 30)
    u = uniforms(16, program.draws)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(program(images, u), expected := Batched(SIMCLR)(images, u))
    assert torch.equal(program(images, u), expected)


def test_center_crop_boxes():
    sizes = torch.tensor([[32, 32], [256, 256], [300, 401], [7, 5]])
    assert augment.center_crop_boxes(sizes, 1.0).tolist()[:2] == [[0, 0, 32, 32], [0, 0, 256, 256]]
    boxes = augment.center_crop_boxes(sizes, 0.875)
    assert boxes.tolist() == [[2, 2, 28, 28], [16, 16, 224, 224], [19, 70, 262, 262], [2, 1, 4, 4]]


# A whole composition


def one_by_one(program, images, u, size):
    """SIMCLR image by image with torchvision's functions and the parameters drawn from u."""
    views = []
    for image, row in zip(images, u.double(), strict=True):
        crop, flip, apply, order, factors, gray, blur, sigma, solarize = row.split(
            [22, 1, 1, 4, 4, 1, 1, 1, 1]
        )
        hw = torch.tensor([image.shape[-2:]])
        box = augment.random_boxes(crop[None], hw, (0.08, 1.0), (3 / 4, 4 / 3))[0].tolist()
        x = F.to_dtype(image, program.dtype, scale=True)
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
    program = Batched(SIMCLR)
    assert program.draws == 22 + 1 + (1 + 8) + 1 + (1 + 1) + 1
    images = torch.randint(0, 256, (96, 3, 31, 37), dtype=torch.uint8)
    images = images if kind == torch.uint8 else F.to_dtype(images, kind, scale=True)
    u, before = uniforms(96, program.draws), images.clone()
    views = program(images, u)
    expected = one_by_one(program, images, u, (24, 20))
    decided = solarize_is_decided(u, expected)
    assert decided.sum() > 80 and (decided & (u[:, -1] < 0.2)).any()
    expected = [x for x, keep in zip(expected, decided, strict=True) if keep]
    # Rounding of 1e-6 is multiplied by at most 1.8 in each jitter and by 5 in the normalisation.
    assert worst(views[decided], expected) < 1e-4
    assert views.is_contiguous() and torch.equal(images, before)


def test_a_composition_without_hue_in_float64():
    program = Batched(
        v2.Compose([v2.RandomResizedCrop(16), CLAMP, v2.ColorJitter(0.4, 0.4, 0.4)]), torch.float64
    )
    images, u = torch.rand(12, 3, 20, 30, dtype=torch.float64), uniforms(12, program.draws)
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
    assert worst(program(images, u), expected) < 1e-12


def test_a_padded_canvas_is_the_image_alone():
    program = Batched(v2.Compose([*TO_FLOAT, *SIMCLR.transforms[2:-2]]))  # solarize jumps
    sizes = torch.tensor([[20, 30], [31, 17], [32, 40], [1, 9], [12, 1]])
    canvas = torch.zeros(5, 3, 32, 40, dtype=torch.uint8)
    alone = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in sizes.tolist()]
    for place, image in zip(canvas, alone, strict=True):
        place[:, : image.shape[1], : image.shape[2]] = image
    u = uniforms(5, program.draws)
    views = program(canvas, u, sizes)
    assert (
        worst(views, [program(x[None], row[None])[0] for x, row in zip(alone, u, strict=True)])
        < 2e-5
    )
    canvas[2, :, :, :] = 0
    assert torch.equal(program(canvas, u, sizes)[[0, 1, 3, 4]], views[[0, 1, 3, 4]])
    garbage = canvas.clone()
    garbage[0, :, 20:], garbage[0, :, :, 30:] = 255, 255
    assert torch.equal(program(garbage, u, sizes)[0], views[0])


def test_slices_are_slices_of_the_whole_and_draws_decide():
    program, images = Batched(SIMCLR, torch.float64), torch.rand(24, 3, 28, 28, dtype=torch.float64)
    u = uniforms(24, program.draws)
    views = program(images, u)
    assert torch.equal(views, program(images, u))
    for a, b in ((0, 1), (5, 13), (12, 24)):
        assert torch.allclose(program(images[a:b], u[a:b]), views[a:b], rtol=0, atol=1e-12)
    same = program(images[:1].expand(24, -1, -1, -1), u)
    assert all(not torch.allclose(x, y) for i, x in enumerate(same) for y in same[:i])
    assert program(images[:0], u[:0]).shape == (0, 3, 24, 20)


def test_single_precision_draws_are_enough():
    program = Batched(v2.RandomResizedCrop(8))
    ones = torch.full((2, 22), 1 - 2**-24)  # the largest float32 below one
    assert program(torch.rand(2, 3, 9, 9), ones).isfinite().all()
    double = torch.full((2, 22), 1 - 2**-53, dtype=torch.float64)
    assert program(torch.rand(2, 3, 9, 9), double).isfinite().all()


def test_crop_and_flip_are_one_step_and_a_flip_elsewhere_is_a_flip():
    flip = v2.RandomHorizontalFlip(0.5)
    crop = v2.RandomResizedCrop(9)
    folded, apart = Batched(v2.Compose([crop, flip])), Batched(v2.Compose([crop, CLAMP, flip]))
    assert len(folded.steps) == 1 and len(apart.steps) == 3 and folded.draws == apart.draws
    images, u = torch.rand(20, 3, 12, 12), uniforms(20, folded.draws)
    assert torch.allclose(folded(images, u), apart(images, u), rtol=0, atol=1e-6)
    mirrored = torch.where((u[:, -1] < 0.5).view(-1, 1, 1, 1), images.flip(-1), images)
    assert torch.equal(Batched(flip)(images, u[:, -1:]), mirrored)


def test_random_apply_draws_once_for_all_that_it_holds():
    program = Batched(
        v2.RandomApply(
            [v2.RandomSolarize(0.5, p=1.0), v2.Compose([v2.RandomGrayscale(1.0)])], p=0.3
        )
    )
    images, u = torch.rand(50, 3, 4, 4), uniforms(50, program.draws)
    assert program.draws == 3
    both = augment.grayscale(augment.solarize(images, 0.5))
    expected = torch.where((u[:, 0] < 0.3).view(-1, 1, 1, 1), both, images)
    assert torch.allclose(program(images, u), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_never_and_always(p):
    u, images = uniforms(8, 1), torch.rand(8, 3, 5, 5)
    gray = Batched(v2.Compose([v2.RandomGrayscale(p), CLAMP]))(images, u)
    assert torch.equal(gray, augment.grayscale(images) if p else images)


# Laws


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
    program = Batched(transform)
    image = torch.tensor([0.9, 0.6, 0.2, 0.1, 0.7, 0.4]).view(1, 3, 1, 2)
    changed = program(image.expand(n, -1, -1, -1), uniforms(n, program.draws)) != image
    assert within_four_sigma(changed.flatten(1).any(1).sum().item(), n, p)


def same_law(ours, theirs):
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
def test_boxes_follow_torchvisions_law(shape, scale, ratio):
    n, ours_n = 6_000, 40_000
    crop, image = v2.RandomResizedCrop(8, scale, ratio), torch.empty(3, *shape)
    drawn = [crop.make_params([image]) for _ in range(n)]
    theirs = torch.tensor([[d["top"], d["left"], d["height"], d["width"]] for d in drawn])
    ours = augment.random_boxes(
        uniforms(ours_n, 22), torch.tensor(shape).expand(ours_n, 2), scale, ratio
    )
    for law in (
        lambda b: b[:, 2] * b[:, 3],
        lambda b: b[:, 3] / b[:, 2],
        lambda b: b[:, 0],
        lambda b: b[:, 1],
        lambda b: b[:, 0] + b[:, 2],
    ):
        assert same_law(law(ours).double(), law(theirs).double())


@pytest.mark.parametrize("shape", [(20, 400), (400, 20), (30, 30), (3, 200), (1, 1)])
def test_the_fallback_is_torchvisions(shape):
    ratio = (3 / 4, 4 / 3)
    crop = v2.RandomResizedCrop(8, scale=(4.0, 5.0), ratio=ratio)  # nothing fits
    expected = crop.make_params([torch.empty(3, *shape)])
    box = augment.random_boxes(uniforms(1, 22), torch.tensor([shape]), (4.0, 5.0), ratio)[0]
    assert box.tolist() == [expected[k] for k in ("top", "left", "height", "width")]


def test_the_first_proposal_that_fits_is_taken():
    u = torch.full((1, 22), 0.5, dtype=torch.float64)
    u[0, :3] = torch.tensor([0.9, 0.25, 0.1])  # areas of 1.8, 0.5 and 0.2 times the image's
    box = augment.random_boxes(u, torch.tensor([[100, 100]]), (0.0, 2.0), (0.5, 2.0))[0]
    assert box.tolist() == [15, 15, 71, 71]


def record(monkeypatch, name, n, transform):
    """The per-image parameters that a step gives to its operation, over n images."""
    seen = []
    real = getattr(augment, name)

    def spy(images, *parameters):
        seen.append(parameters[-1])
        return real(images, *parameters)

    monkeypatch.setattr(augment, name, spy)
    program = Batched(transform)
    program(torch.rand(1, 3, 4, 4).expand(n, -1, -1, -1), uniforms(n, program.draws))
    return torch.cat(seen)


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
    assert same_law(values, low + (high - low) * torch.arange(50_000).double() / 50_000)


def test_all_24_orders_of_the_jitter_are_equally_likely():
    n, factor, turn = 24_000, 1.8, 0.2  # so strong that clipping tells all orders apart
    program = Batched(v2.ColorJitter(*[(factor, factor)] * 3, (turn, turn)), torch.float64)
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
    views = program(image.expand(n, -1, -1, -1), uniforms(n, program.draws)).flatten(1)
    distance, which = torch.cdist(views, orders).min(1)
    assert distance.max() < 1e-6
    assert all(within_four_sigma(count, n, 1 / 24) for count in which.bincount(minlength=24))


# What is refused


@pytest.mark.parametrize(
    ("transform", "named"),
    [
        (v2.RandomRotation(10), "RandomRotation"),
        (v2.Resize((8, 8)), "Resize"),
        (v2.Lambda(torch.sqrt), "Lambda"),
        (v2.Lambda(partial(torch.clamp, 0.0)), "Lambda"),
        (v2.RandomResizedCrop(8, interpolation=InterpolationMode.NEAREST), "RandomResizedCrop"),
        (v2.RandomResizedCrop(8, antialias=False), "RandomResizedCrop"),
        (v2.RandomApply([v2.RandomResizedCrop(8)]), "RandomApply"),
        (v2.RandomApply([v2.RandomErasing()]), "RandomErasing"),
        (v2.ToDtype(torch.float32), "ToDtype"),
        (v2.ToDtype(torch.uint8, scale=True), "ToDtype"),
        (v2.Compose([v2.RandomResizedCrop(8), *TO_FLOAT]), "ToImage"),
    ],
)
def test_other_transforms_are_refused_by_name_in_one_line(transform, named):
    with pytest.raises(ValueError, match=f"^{named}.* has no batched form: .*workers") as caught:
        Batched(
            v2.Compose([*TO_FLOAT, v2.RandomGrayscale(), transform])
            if named != "ToDtype"
            else transform
        )
    assert "\n" not in str(caught.value)


def test_identities_and_nesting_vanish():
    program = Batched(
        v2.Compose([v2.Compose([*TO_FLOAT, v2.Identity()]), v2.Compose([v2.Identity()])])
    )
    assert program.draws == 0 and program.steps == []
    images = torch.randint(0, 256, (3, 3, 4, 4), dtype=torch.uint8)
    assert torch.equal(program(images, uniforms(3, 0)), augment.to_float(images))


def test_wrong_uniforms_and_sizes_are_refused():
    program, images = Batched(v2.RandomGrayscale()), torch.rand(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"uniforms must be \(2, 1\)"):
        program(images, uniforms(2, 2))
    with pytest.raises(ValueError, match="begins with RandomResizedCrop"):
        program(images, uniforms(2, 1), torch.tensor([[4, 4], [4, 4]]))


# Several at a time


@pytest.mark.parametrize("size", [(20, 30), (180, 150)])  # many at a time, and one by one
def test_neither_threads_nor_neighbours_change_a_view(monkeypatch, size):
    """Bit for bit: how images are shared out among chunks and threads is nobody's business."""
    monkeypatch.setattr(augment, "CPU", 4 * 3 * 20 * 30 * 3)  # three small images at a time
    program, images = Batched(SIMCLR), torch.randint(0, 256, (8, 3, *size), dtype=torch.uint8)
    u = uniforms(8, program.draws)
    views = program(images, u)
    torch.set_num_threads(3)
    assert torch.equal(program(images, u), views) and torch.get_num_threads() == 3
    with torch.inference_mode():
        assert torch.equal(program(images, u), views)
    torch.set_num_threads(1)
    assert torch.equal(program(images[:1], u[:1]), views[:1])
    assert torch.equal(program(images[5:], u[5:]), views[5:])
