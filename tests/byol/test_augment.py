"""The views: the paper's probabilities and ranges, and how far torchvision is from the code."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from byol.augment import color_distortion, views
from byol.config import CIFAR10, DEMO, IMAGENET_100, IMAGENETTE
from common import augment as batched
from tests.helpers import golden, rel

ARRAYS = golden("byol_augment")


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


def leaves_of(cfg):
    return [{type(leaf): (leaf, p) for leaf, p in flat(transform)} for transform in views(cfg)]


# ---- the distributions ---------------------------------------------------------------------------


@pytest.mark.parametrize("cfg, taps", [(IMAGENET_100, 23), (IMAGENETTE, 13)])
def test_stated_probabilities_and_ranges(cfg, taps):
    """Table 6, column by column."""
    for leaves, blur_p, solarize_p in zip(leaves_of(cfg), (1.0, 0.1), (0.0, 0.2), strict=True):
        crop, _ = leaves[v2.RandomResizedCrop]
        assert tuple(crop.size) == (cfg.image_size, cfg.image_size)
        assert tuple(crop.scale) == (0.08, 1.0) and tuple(crop.ratio) == (3 / 4, 4 / 3)
        assert crop.interpolation == InterpolationMode.BICUBIC and crop.antialias
        assert leaves[v2.RandomHorizontalFlip][1] == 0.5
        jitter, p = leaves[v2.ColorJitter]
        assert p == 0.8
        assert tuple(jitter.brightness) == tuple(jitter.contrast) == pytest.approx((0.6, 1.4))
        assert tuple(jitter.saturation) == pytest.approx((0.8, 1.2))
        assert tuple(jitter.hue) == pytest.approx((-0.1, 0.1))
        assert leaves[v2.RandomGrayscale][1] == pytest.approx(0.2)
        blur, p = leaves[v2.GaussianBlur]
        assert p == blur_p and tuple(blur.sigma) == (0.1, 2.0)
        assert tuple(blur.kernel_size) == (taps, taps)
        if solarize_p:
            solarize, p = leaves[v2.RandomSolarize]
            assert p == solarize_p and solarize.threshold == 0.5
        else:
            assert v2.RandomSolarize not in leaves
        normalize, _ = leaves[v2.Normalize]
        assert tuple(normalize.mean) == (0.485, 0.456, 0.406)
        assert tuple(normalize.std) == (0.229, 0.224, 0.225)


def test_order_of_the_operations():
    t1, t2 = ([type(leaf).__name__ for leaf, _ in flat(t)] for t in views(IMAGENET_100))
    assert t2[:4] == ["ToImage", "ToDtype", "RandomResizedCrop", "Lambda"]
    assert t2[4:7] == ["RandomHorizontalFlip", "ColorJitter", "RandomGrayscale"]
    assert t2[7:] == ["GaussianBlur", "RandomSolarize", "Normalize"]
    assert t1 == [name for name in t2 if name != "RandomSolarize"]


def test_settings_reach_the_views():
    change = {"crop_min_area": 0.2, "jitter": (0.1, 0.2, 0.3, 0.05), "blur": (0.0, 0.7)}
    change |= {"solarize": (0.4, 0.0), "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    one, two = leaves_of(replace(IMAGENET_100, **change))
    for leaves in (one, two):
        assert leaves[v2.RandomResizedCrop][0].scale[0] == 0.2
        jitter, _ = leaves[v2.ColorJitter]
        highest = [
            jitter.brightness[1],
            jitter.contrast[1],
            jitter.saturation[1],
            1 + jitter.hue[1],
        ]
        assert highest == pytest.approx([1.1, 1.2, 1.3, 1.05])
        normalize, _ = leaves[v2.Normalize]
        assert (tuple(normalize.mean), tuple(normalize.std)) == (change["mean"], change["std"])
    assert v2.GaussianBlur not in one and two[v2.GaussianBlur][1] == 0.7
    assert one[v2.RandomSolarize][1] == 0.4 and v2.RandomSolarize not in two


def test_frequencies_of_what_runs():
    """Of the batched programs, 4000 views each: who changes where an operation is all but off."""
    n, cfg = 4000, replace(IMAGENET_100, image_size=20)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (1, 3, 24, 24), dtype=torch.uint8, generator=generator)

    def seen(cfg):
        for i, transform in enumerate(views(cfg)):
            program = batched.Batched(transform)
            draws = torch.Generator().manual_seed(i)
            yield program(
                noise.expand(n, -1, -1, -1), torch.rand(n, program.draws, generator=draws)
            )

    def changed(**off):
        both = zip(seen(cfg), seen(replace(cfg, **off)), strict=True)
        return [((a - b).abs().amax((1, 2, 3)) > 1e-4).float().mean().item() for a, b in both]

    blurred = changed(blur=(1e-9, 1e-9))  # a small sigma changes nothing
    assert 0.85 < blurred[0] <= 1 and blurred[1] == pytest.approx(0.1, abs=0.025)
    solarized = changed(solarize=(0.0, 1e-9))
    assert solarized[0] == 0 and solarized[1] == pytest.approx(0.2, abs=0.025)


@pytest.mark.parametrize("cfg", [IMAGENET_100, CIFAR10, DEMO])
@pytest.mark.parametrize("size", [(50, 40), (300, 260)])
def test_runs_per_image_in_a_data_loader(cfg, size):
    """Plain torchvision on a PIL image, without any code of this project but `views`."""
    pixels = np.random.RandomState(0).randint(0, 256, (*size, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    torch.manual_seed(0)
    lowest = -torch.tensor(cfg.mean) / torch.tensor(cfg.std)
    highest = (1 - torch.tensor(cfg.mean)) / torch.tensor(cfg.std)
    for transform in views(cfg):
        for _ in range(3):
            view = transform(picture)
            assert view.shape == (3, cfg.image_size, cfg.image_size)
            assert view.dtype == torch.float32 and view.std() > 0
            assert (view.amin((1, 2)) >= lowest - 1e-5).all()
            assert (view.amax((1, 2)) <= highest + 1e-5).all()


def test_color_distortion_of_strength_zero_leaves_the_colours():
    image = chw(ARRAYS["img/i0"])
    torch.manual_seed(0)
    seen = [color_distortion((0.0, 0.0, 0.0, 0.0))(image) for _ in range(40)]
    gray = F.rgb_to_grayscale(image, num_output_channels=3)
    for view in seen:
        assert min((view - image).abs().max(), (view - gray).abs().max()) < 1e-6
    assert 0 < sum(torch.equal(view, gray) for view in seen) < 20


# ---- beside the recorded operations --------------------------------------------------------------


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


def test_hue_is_the_official_one():
    for operation in ours("hue"):
        ran = 0
        for image, value, theirs in recorded("hue"):
            if abs(value) > 0.5:
                continue
            torch.testing.assert_close(operation(image, value), theirs, rtol=0, atol=5e-6)
            ran += 1
        assert ran >= 9


def test_gray_is_the_official_one():
    ran = 0
    for image, _, theirs in recorded("grayscale"):
        single = F.rgb_to_grayscale(image, num_output_channels=3)
        for result in (single, batched.grayscale(image[None])[0]):
            torch.testing.assert_close(result, theirs.expand(3, -1, -1), rtol=0, atol=5e-6)
        ran += 1
    assert ran >= 3


def test_solarize_is_the_official_one():
    ran = 0
    for image, threshold, theirs in recorded("solarize"):
        for result in (F.solarize(image, threshold), batched.solarize(image[None], threshold)[0]):
            torch.testing.assert_close(result, theirs, rtol=0, atol=5e-6)
        ran += 1
    assert ran >= 4


def test_flip_is_the_official_one():
    ran = 0
    for image, _, theirs in recorded("flip"):
        assert torch.equal(F.horizontal_flip(image), theirs)
        ran += 1
    assert ran >= 2


@pytest.mark.parametrize(
    "suffix, dtype, tolerance", [("", torch.float32, 5e-6), ("_f64", torch.float64, 1e-7)]
)
def test_normalisation_is_the_official_one(suffix, dtype, tolerance):
    data = golden("byol_basic")
    x = torch.tensor(data["norm/x"], dtype=dtype).permute(0, 3, 1, 2)
    normalize = views(IMAGENET_100)[0].transforms[-1]
    assert isinstance(normalize, v2.Normalize)
    for result in (normalize(x), batched.normalize(x, normalize.mean, normalize.std)):
        assert rel(result.permute(0, 2, 3, 1), data[f"norm/y{suffix}"]) < tolerance


@pytest.mark.parametrize(
    "name, at_least",
    [
        ("contrast", 0.002),  # about each channel's mean there
        ("saturation", 0.005),  # S of HSV there
        ("brightness", 0.02),  # additive there
    ],
)
def test_operations_that_differ_as_documented(name, at_least):
    """A deviation that the module's docstring states: here is its size."""
    for operation in ours(name):
        worst = []
        for image, value, theirs in recorded(name):
            factor = 1 + value if name == "brightness" else value
            worst.append((operation(image, factor) - theirs).abs().max().item())
        assert len(worst) >= 8
        assert min(worst) > at_least and max(worst) > 0.05, worst


def test_additive_brightness_is_what_is_recorded():
    """The recording is understood: image + delta, and nothing else."""
    ran = 0
    for image, delta, theirs in recorded("brightness"):
        torch.testing.assert_close((image + delta).clamp(0, 1), theirs, rtol=0, atol=5e-6)
        ran += 1
    assert ran >= 8


def test_blur_differs_at_the_border_only():
    """Zeros beyond the border there, a reflection here; the same window inside."""
    image, ran = chw(ARRAYS["img/blur"]), 0
    for key, result in ARRAYS.items():
        if not key.startswith("blur/ks") or "sigma0.1" in key:  # 0.1: the window is one pixel
            continue
        size, sigma = key.removeprefix("blur/ks").split("_sigma")
        radius = int(float(size) / 2)
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
    assert ran >= 7


@pytest.mark.parametrize("size", [(224, 224), (375, 500), (32, 32)])
def test_crops_differ_as_documented(size):
    """Torchvision draws again where a box does not fit, which makes its crops smaller."""
    name = f"cropdist/img{size[0]}x{size[1]}"
    if f"{name}/area_frac/mean_std" not in ARRAYS:
        pytest.skip("not among the recorded sizes")
    uniforms = torch.rand(
        50_000, batched.BOX_DRAWS, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    boxes = batched.random_boxes(
        uniforms, torch.tensor(size).expand(len(uniforms), 2), (0.08, 1.0), (3 / 4, 4 / 3)
    )
    area = boxes[:, 2:].prod(1) / (size[0] * size[1])
    theirs = ARRAYS[f"{name}/area_frac/mean_std"][0]
    assert theirs - area.mean() > 0.02
    whole = ARRAYS[f"{name}/h/quantiles"][-1]
    assert whole == size[0] and boxes[:, 2].max() == size[0]
