"""MoCo's view distributions: Sec. 3.3 of arXiv 1911.05722 v3, Sec. 3 of arXiv 2003.04297 v1.

Plain torchvision: usable as it stands in a data loader, one image at a time. The official code
composes torchvision's operations too, on 8-bit PIL images; here they run on float32 tensors, which
differs by the rounding of each operation to 8 bits, and in one operation:

- PAPER/CODE: the paper says Gaussian blur (2003.04297 Sec. 3), the code has PIL's, a threefold box
  filter of about that width. Here it is the Gaussian, 23 taps wide (5.5 deviations each side).
"""

import torch
from torchvision.transforms import v2

from .config import Config

Channels = dict[str, tuple[float, float, float]]
IMAGENET: Channels = {
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
}  # CODE main_moco.py
CIFAR10: Channels = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)}  # notebook
BLUR_TAPS = 23  # of an image of 12 pixels or more


def normalization(cfg: Config) -> Channels:
    """Mean and standard deviation that views, and later images to be judged, are normalised by."""
    return CIFAR10 if cfg.views == "notebook" else IMAGENET


def crop(cfg: Config) -> v2.Transform:
    """A random crop, resized as PIL does it: bilinear, with antialiasing."""
    return v2.RandomResizedCrop(
        cfg.image_size,
        scale=(cfg.crop_min_area, 1.0),
        ratio=(3 / 4, 4 / 3),
        interpolation=v2.InterpolationMode.BILINEAR,
        antialias=True,
    )


def moco_v1(cfg: Config) -> list[v2.Transform]:
    """v1 (Sec. 3.3): jitter of every image, with a wide hue.

    PAPER/CODE: the paper lists crop, jitter, flip, gray; the code turns gray first, so that colour
    is lost before the jitter. We follow the code.
    """
    return [
        crop(cfg),
        v2.RandomGrayscale(p=0.2),
        v2.ColorJitter(0.4, 0.4, 0.4, 0.4),
        v2.RandomHorizontalFlip(p=0.5),
    ]


def moco_v2(cfg: Config) -> list[v2.Transform]:
    """v2 (2003.04297 Sec. 3).

    PAPER/CODE: the paper says v1's with blur added. The code (main_moco.py, aug_plus) also jitters
    8 images in 10 only, with a narrower hue, and turns gray afterwards. We follow the code.
    """
    return [
        crop(cfg),
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        v2.RandomGrayscale(p=0.2),
        v2.RandomApply([v2.GaussianBlur(BLUR_TAPS, sigma=(0.1, 2.0))], p=0.5),
        v2.RandomHorizontalFlip(p=0.5),
    ]


def notebook(cfg: Config) -> list[v2.Transform]:
    """The CIFAR-10 notebook's: v2's without blur."""
    return [
        crop(cfg),
        v2.RandomHorizontalFlip(p=0.5),
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        v2.RandomGrayscale(p=0.2),
    ]


def views(cfg: Config) -> tuple[v2.Transform, v2.Transform]:
    """Query view and key view: the two share one distribution (Sec. 3.3).

    Each maps an image to a (3, cfg.image_size, cfg.image_size) float32 tensor, normalised.
    """
    distribution = {"v1": moco_v1, "v2": moco_v2, "notebook": notebook}[cfg.views]
    transform = v2.Compose(
        [
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            *distribution(cfg),
            v2.Normalize(**normalization(cfg)),
        ]
    )
    return transform, transform
