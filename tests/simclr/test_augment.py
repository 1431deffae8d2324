"""The views: the paper's probabilities and ranges, and how far torchvision is from TensorFlow."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from common import augment as batched
from simclr.augment import color_distortion, views
from simclr.config import CIFAR10, IMAGENET_100, IMAGENET_V2
from tests.helpers import golden

ARRAYS = golden("simclr_augment")


def chw(image):
    return torch.tensor(image).permute(2, 0, 1)


def flat(transform):
    """The leaves of a composition, in order, with the probability of being applied."""
    match transform:
        case v2.Compose():
            return [leaf for inner in transform.transforms for leaf in flat(inner)]
        case v2.RandomApply(transforms=inner, p=p):
            return [(leaf, p * q) for t in inner for leaf, q in flat(t)]
        case _:
            return [(transform, getattr(transform, "p", 1.0))]


# ---- the distribution ----------------------------------------------------------------------------


def leaves_of(cfg):
    first, second = views(cfg)
    assert first is second  # Algorithm 1: t and t' from the same T
    return {type(leaf): (leaf, p) for leaf, p in flat(first)}


@pytest.mark.parametrize("cfg, s", [(IMAGENET_100, 1.0), (IMAGENET_V2, 1.0), (CIFAR10, 0.5)])
def test_stated_probabilities_and_ranges(cfg, s):
    leaves = leaves_of(cfg)
    crop, _ = leaves[v2.RandomResizedCrop]
    assert tuple(crop.size) == (cfg.image_size, cfg.image_size)
    assert tuple(crop.scale) == (0.08, 1.0) and tuple(crop.ratio) == (3 / 4, 4 / 3)
    assert crop.interpolation == InterpolationMode.BICUBIC and crop.antialias
    assert leaves[v2.RandomHorizontalFlip][1] == 0.5
    jitter, p = leaves[v2.ColorJitter]
    assert p == 0.8
    for bounds in (jitter.brightness, jitter.contrast, jitter.saturation):
        assert tuple(bounds) == pytest.approx((1 - 0.8 * s, 1 + 0.8 * s))
    assert tuple(jitter.hue) == pytest.approx((-0.2 * s, 0.2 * s))
    assert leaves[v2.RandomGrayscale][1] == pytest.approx(0.2)
    if cfg.image_size == 224:
        blur, p = leaves[v2.GaussianBlur]
        assert p == 0.5 and tuple(blur.sigma) == (0.1, 2.0)
        assert tuple(blur.kernel_size) == (23, 23)  # CODE: 224 // 10 = 22, radius 11
    else:
        assert v2.GaussianBlur not in leaves
    assert v2.Normalize not in leaves  # CODE: none


def test_order_of_the_operations():
    kinds = [type(leaf).__name__ for leaf, _ in flat(views(IMAGENET_100)[0])]
    assert kinds == [
        "ToImage",
        "ToDtype",
        "RandomResizedCrop",
        "Lambda",
        "RandomHorizontalFlip",
        "ColorJitter",
        "RandomGrayscale",
        "GaussianBlur",
    ]


@pytest.mark.parametrize("change", [{"crop_min_area": 0.2}, {"jitter": 0.25}, {"blur": 0.1}])
def test_settings_reach_the_views(change):
    leaves = leaves_of(replace(IMAGENET_100, **change))
    found = {
        "crop_min_area": leaves[v2.RandomResizedCrop][0].scale[0],
        "jitter": leaves[v2.ColorJitter][0].brightness[1] / 0.8 - 1 / 0.8,
        "blur": leaves[v2.GaussianBlur][1],
    }
    for name, value in change.items():
        assert found[name] == pytest.approx(value)


def test_frequencies_of_what_runs():
    """Of the batched program: 4000 views of one image whose left half is red."""
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    image[0, :, :4], image[1, :, 4:] = 200, 60
    n = 4000
    cfg = replace(CIFAR10, image_size=8, crop_min_area=0.9)
    program = batched.Batched(views(cfg)[0])
    draws = torch.rand(n, program.draws, generator=torch.Generator().manual_seed(0))
    out = program(image.expand(n, -1, -1, -1), draws)
    gray = (out.amax(1) - out.amin(1)).amax((1, 2)) < 1e-6
    # jitter alone never makes an image gray here: its saturation factor is at least 0.6
    assert gray.float().mean().item() == pytest.approx(0.2, abs=0.02)
    luma = out[~gray].sum(1).mean(1)  # (n, W)
    mirrored = luma[:, :3].mean(1) < luma[:, -3:].mean(1)
    assert mirrored.float().mean().item() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("cfg", [IMAGENET_100, CIFAR10])
@pytest.mark.parametrize("size", [(50, 40), (300, 260)])
def test_runs_per_image_in_a_data_loader(cfg, size):
    """Plain torchvision on a PIL image, without any code of this project but `views`."""
    pixels = np.random.RandomState(0).randint(0, 256, (*size, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    torch.manual_seed(0)
    for transform in views(cfg):
        for _ in range(3):
            view = transform(picture)
            assert view.shape == (3, cfg.image_size, cfg.image_size)
            assert view.dtype == torch.float32
            assert view.min() >= 0 and view.max() <= 1 and view.std() > 0


def test_color_distortion_of_strength_zero_leaves_the_colours():
    image = chw(ARRAYS["img/i0"])
    torch.manual_seed(0)
    seen = [color_distortion(0.0)(image) for _ in range(40)]
    gray = F.rgb_to_grayscale(image, num_output_channels=3)
    for view in seen:
        assert min((view - image).abs().max(), (view - gray).abs().max()) < 1e-6
    assert 0 < sum(torch.equal(view, gray) for view in seen) < 20


# ---- beside the recorded TensorFlow operations ---------------------------------------------------


def recorded(operation):
    """(image, parameter, the official result clipped as the pipeline clips) of each recording."""
    for key, result in ARRAYS.items():
        kind, _, rest = key.partition("/")
        if kind == operation:
            image, _, value = rest.partition("/")
            yield chw(ARRAYS[f"img/{image}"]), float(value[1:] or 0), chw(result).clamp(0, 1)


def ours(name):
    """torchvision's operation, and the batched one that a run uses."""
    single = {
        "brightness": F.adjust_brightness,
        "contrast": F.adjust_contrast,
        "saturation": F.adjust_saturation,
        "hue": F.adjust_hue,
    }[name]

    def batch_of_one(image, value):
        return getattr(batched, name)(image[None].clone(), torch.tensor([value]))[0]

    return single, batch_of_one


@pytest.mark.parametrize("name, recording", [("brightness", "brightness_v2"), ("hue", "hue")])
def test_operations_that_are_tensorflows(name, recording):
    for operation in ours(name):
        ran = 0
        for image, value, theirs in recorded(recording):
            torch.testing.assert_close(operation(image, value), theirs, rtol=0, atol=5e-6)
            ran += 1
        assert ran >= 12


def test_gray_is_tensorflows():
    ran = 0
    for image, _, theirs in recorded("grayscale"):
        single = F.rgb_to_grayscale(image, num_output_channels=3)
        for result in (single, batched.grayscale(image[None])[0]):
            torch.testing.assert_close(result, theirs.expand(3, -1, -1), rtol=0, atol=5e-6)
        ran += 1
    assert ran >= 3


@pytest.mark.parametrize(
    "name, recording, at_least",
    [
        ("contrast", "contrast", 0.01),  # about each channel's mean there
        ("saturation", "saturation", 0.02),  # S of HSV there
        ("brightness", "brightness_v1", 0.02),  # version 1's is additive
    ],
)
def test_operations_that_differ_as_documented(name, recording, at_least):
    """A deviation that the module's docstring states: here is its size."""
    for operation in ours(name):
        worst = []
        for image, value, theirs in recorded(recording):
            factor = 1 + value if recording == "brightness_v1" else value
            worst.append((operation(image, factor) - theirs).abs().max().item())
        assert len(worst) >= 12
        assert min(worst) > at_least and max(worst) > 0.1, worst


def test_blur_differs_at_the_border_only():
    """Zeros beyond the border there, a reflection here; the same window inside."""
    image, ran = chw(ARRAYS["img/blur"]), 0
    for key, result in ARRAYS.items():
        if not key.startswith("blur/ks") or "sigma0.1" in key:  # 0.1: the window is one pixel
            continue
        size, sigma = key.removeprefix("blur/ks").split("_sigma")
        radius = int(size) // 2
        taps, theirs = 2 * radius + 1, chw(result)
        if radius >= min(image.shape[1:]):
            continue
        both = (
            F.gaussian_blur(image, [taps, taps], [float(sigma)] * 2),
            batched.gaussian_blur(image[None], (taps, taps), torch.tensor([float(sigma)]))[0],
        )
        for mine in both:
            if 2 * radius < min(image.shape[1:]):
                inner = (slice(None), slice(radius, -radius), slice(radius, -radius))
                torch.testing.assert_close(mine[inner], theirs[inner], rtol=0, atol=5e-6)
            assert (mine - theirs)[:, 0].mean() > 0.02, key  # theirs is darker there
        ran += 1
    assert ran >= 9


def test_crop_agrees_where_it_enlarges_and_differs_where_it_reduces():
    """Antialiasing acts on reductions alone; TensorFlow rounds offsets to 1/1024 of a pixel."""
    image, same, other = chw(ARRAYS["img/crop"]), 0, 0
    for i, box in enumerate(ARRAYS["crop/boxes_yxhw"]):
        top, left, height, width = map(int, box)
        for h, w in ARRAYS["crop/out_hw"].tolist():
            theirs = chw(ARRAYS[f"crop/box{i}_out{h}x{w}"])
            bicubic = InterpolationMode.BICUBIC
            single = F.resized_crop(image, top, left, height, width, [h, w], bicubic, True)
            several = batched.resized_crop(
                image[None], torch.tensor([[top, left, height, width]]), (h, w), bicubic
            )[0]
            for mine in (single, several):
                difference = (mine - theirs).abs().max().item()
                if height <= h and width <= w:
                    assert difference < 1e-3, (i, h, w)
                else:
                    assert difference > 1e-2, (i, h, w)
            same += height <= h and width <= w
            other += not (height <= h and width <= w)
    assert same >= 5 and other >= 5


def test_crop_law_differs_as_documented():
    """TensorFlow's areas: never below a tenth, mean 0.42; torchvision's: uniform from 0.08."""
    law = golden("simclr_crop_distribution")
    theirs = law["img224x224/area_frac/quantiles"]
    assert theirs[0] > 0.095
    assert law["img224x224/area_frac/mean_std"][0] == pytest.approx(0.42, abs=0.01)
    crop, _ = leaves_of(IMAGENET_100)[v2.RandomResizedCrop]
    uniforms = torch.rand(20_000, batched.BOX_DRAWS, generator=torch.Generator().manual_seed(0))
    sizes = torch.tensor([[224, 224]]).expand(len(uniforms), 2)
    boxes = batched.random_boxes(uniforms, sizes, crop.scale, crop.ratio)
    areas = boxes[:, 2] * boxes[:, 3] / 224**2
    assert 0.075 < areas.min() < 0.085
    assert areas.mean().item() == pytest.approx(0.48, abs=0.02)
