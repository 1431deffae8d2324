"""SimCLR's view distribution T: Sec. 2.1 and App. A of arXiv 2002.05709 v3.

Plain torchvision: usable as it stands in a data loader, one image at a time. Torchvision's
operations differ from the official TensorFlow ones, which is the same for every PyTorch port:

- PAPER/CODE: the crop's area is uniform, as in the paper; TensorFlow's is not, and never below
  0.10.
- PAPER/CODE: brightness is multiplicative, as in the official v2; v1's is additive.
- PAPER/CODE: one blur sigma per image, as in the paper; the official code draws one per batch.
- Bicubic is antialiased here, not there.
- Contrast is about the mean of the gray image here, about each channel's mean there; saturation
  blends with the gray image here, scales S of HSV there.
- The blur's border is reflected here, black there.

Both repaint colours only: neither normalises by mean and standard deviation.
"""

from functools import partial

import torch
from torchvision.transforms import v2

from .config import Config


def color_distortion(s: float) -> v2.Transform:
    """Colour jitter of strength `s`, probability 0.8, then gray, probability 0.2 (App. A)."""
    jitter = v2.ColorJitter(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s)
    return v2.Compose([v2.RandomApply([jitter], p=0.8), v2.RandomGrayscale(p=0.2)])


def views(cfg: Config) -> tuple[v2.Transform, v2.Transform]:
    """t ~ T and t' ~ T: the two views share one distribution (Algorithm 1).

    Each maps an image to a (3, cfg.image_size, cfg.image_size) float32 tensor in [0, 1].
    """
    # App. A: the kernel is 10 % of the side; CODE: 224 // 10 = 22, whose radius 11 makes 23 taps
    taps = cfg.image_size // 10 // 2 * 2 + 1
    blur = v2.GaussianBlur(taps, sigma=(0.1, 2.0))
    transform = v2.Compose(
        [
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.RandomResizedCrop(
                cfg.image_size,
                scale=(cfg.crop_min_area, 1.0),
                ratio=(3 / 4, 4 / 3),
                interpolation=v2.InterpolationMode.BICUBIC,
                antialias=True,
            ),
            v2.Lambda(partial(torch.clamp, min=0.0, max=1.0)),  # bicubic overshoots
            v2.RandomHorizontalFlip(p=0.5),
            color_distortion(cfg.jitter),
            *([v2.RandomApply([blur], p=cfg.blur)] if cfg.blur else []),
        ]
    )
    return transform, transform
