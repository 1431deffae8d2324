"""The views: the official code's operations, their order, probabilities and ranges."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torchvision.transforms import InterpolationMode, v2

from common import augment as batched
from moco.augment import BLUR_TAPS, normalization, views
from moco.config import CIFAR10, CIFAR10_SYMMETRIC, DEMO, MOCO_V1, MOCO_V2, MOCO_V2_800

CROP, FLIP = ("RandomResizedCrop", 1.0), ("RandomHorizontalFlip", 0.5)
JITTER, GRAY, BLUR = ("ColorJitter", 0.8), ("RandomGrayscale", 0.2), ("GaussianBlur", 0.5)
ORDER = {
    "v1": [CROP, GRAY, ("ColorJitter", 1.0), FLIP],
    "v2": [CROP, JITTER, GRAY, BLUR, FLIP],
    "notebook": [CROP, FLIP, JITTER, GRAY],
}


def flat(transform, p=1.0):
    """(leaf, probability) of a composition, in order."""
    match transform:
        case v2.Compose():
            return [leaf for inner in transform.transforms for leaf in flat(inner, p)]
        case v2.RandomApply(transforms=inner):
            return [leaf for t in inner for leaf in flat(t, p * transform.p)]
        case _:
            return [(transform, p * getattr(transform, "p", 1.0))]


@pytest.mark.parametrize("cfg", [MOCO_V1, MOCO_V2, MOCO_V2_800, CIFAR10, CIFAR10_SYMMETRIC])
def test_operations_of_the_official_code(cfg):
    first, second = views(cfg)
    assert first is second
    leaves = flat(first)
    named = [(type(leaf).__name__, pytest.approx(p)) for leaf, p in leaves]
    ends = [("ToImage", 1.0), ("ToDtype", 1.0)], [("Normalize", 1.0)]
    assert named == ends[0] + ORDER[cfg.views] + ends[1]
    found = {type(leaf): leaf for leaf, _ in leaves}
    crop = found[v2.RandomResizedCrop]
    assert tuple(crop.size) == (cfg.image_size, cfg.image_size)
    assert tuple(crop.scale) == (0.08 if cfg.views == "notebook" else 0.2, 1.0)
    assert tuple(crop.ratio) == (3 / 4, 4 / 3)
    assert crop.interpolation == InterpolationMode.BILINEAR and crop.antialias
    jitter, hue = found[v2.ColorJitter], 0.4 if cfg.views == "v1" else 0.1
    for bounds in (jitter.brightness, jitter.contrast, jitter.saturation):
        assert tuple(bounds) == (0.6, 1.4)
    assert tuple(jitter.hue) == (-hue, hue)
    if cfg.views == "v2":
        assert tuple(found[v2.GaussianBlur].sigma) == (0.1, 2.0)
        assert tuple(found[v2.GaussianBlur].kernel_size) == (BLUR_TAPS, BLUR_TAPS)
    normal, given = found[v2.Normalize], normalization(cfg)
    assert (tuple(normal.mean), tuple(normal.std)) == (given["mean"], given["std"])
    assert given["mean"][0] == (0.4914 if cfg.views == "notebook" else 0.485)


@pytest.mark.parametrize("cfg", [MOCO_V1, MOCO_V2, CIFAR10, DEMO])
def test_a_data_loader_and_the_batched_program_both_take_them(cfg):
    pixels = np.random.RandomState(0).randint(0, 256, (50, 40, 3), dtype=np.uint8)
    transform, _ = views(cfg)
    torch.manual_seed(0)
    shape = (3, cfg.image_size, cfg.image_size)
    for _ in range(3):
        view = transform(Image.fromarray(pixels))
        assert view.shape == shape and view.dtype == torch.float32 and view.std() > 0
    program = batched.Batched(transform)
    images = torch.tensor(pixels).permute(2, 0, 1).expand(4, -1, -1, -1)
    out = program(images, torch.rand(4, program.draws, dtype=torch.float64))
    assert out.shape == (4, *shape) and not torch.equal(out[0], out[1])


def test_crop_setting_reaches_the_views():
    leaves = {type(leaf): leaf for leaf, _ in flat(views(replace(CIFAR10, crop_min_area=0.5))[0])}
    assert leaves[v2.RandomResizedCrop].scale[0] == 0.5


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
def test_blur_is_near_pils(sigma):
    """The deviation that augment.py states: PIL's boxes against the Gaussian, in steps of 1/255."""
    picture = Image.fromarray(np.random.RandomState(0).randint(0, 256, (64, 64, 3), dtype=np.uint8))
    theirs = v2.functional.pil_to_tensor(picture.filter(ImageFilter.GaussianBlur(sigma))).float()
    image = v2.functional.pil_to_tensor(picture).float()
    ours = v2.functional.gaussian_blur(image, [BLUR_TAPS] * 2, [sigma] * 2)
    inner = (slice(None), slice(8, -8), slice(8, -8))
    difference = (ours - theirs)[inner].abs()
    unblurred = (image - theirs)[inner].abs()
    assert 0.2 < difference.mean() < 5 and difference.mean() < unblurred.mean() / 10
