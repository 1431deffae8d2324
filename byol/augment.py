"""BYOL's view distributions T and T': Sec. 3.1 and App. B of arXiv 2006.07733 v3.

Plain torchvision: usable as it stands in a data loader, one image at a time. Torchvision's
operations differ from the official TensorFlow and JAX ones, which is the same for every PyTorch
port:

- A crop that does not fit is drawn again here (torchvision's law); the code draws one box and clips
  it to the image, which makes its crops larger and their shapes less varied.
- Bicubic is antialiased here, not there.
- Brightness is a factor here; there, as in the paper, a value added to all pixels.
- Contrast is about the mean of the gray image here, about each channel's mean there; saturation
  blends with the gray image here, scales S of HSV there.
- The blur's border is reflected here, black there.

PAPER/CODE: the paper normalises each view by mean and standard deviation as the last of its
operations; the official code does so inside the network. The numbers are the same; we follow the
paper.
"""

from functools import partial

import torch
from torchvision.transforms import v2

from .config import Config


def color_distortion(strengths: tuple[float, float, float, float]) -> v2.Transform:
    """Colour jitter of the strengths, probability 0.8, then gray, probability 0.2 (Table 6)."""
    jitter = v2.ColorJitter(*strengths)
    return v2.Compose([v2.RandomApply([jitter], p=0.8), v2.RandomGrayscale(p=0.2)])


def views(cfg: Config) -> tuple[v2.Transform, v2.Transform]:
    """t ~ T and t' ~ T': the two differ in how often they blur and solarise (Table 6).

    Each maps an image to a (3, cfg.image_size, cfg.image_size) float32 tensor, normalised.
    """
    # App. B: 23 taps at 224 pixels; CODE: 224 / 10 = 22.4, whose radius 11 makes 23 taps
    taps = cfg.image_size // 10 // 2 * 2 + 1
    gaussian = v2.GaussianBlur(taps, sigma=(0.1, 2.0))
    t1, t2 = (
        v2.Compose(
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
                *([v2.RandomApply([gaussian], p=blur)] if blur else []),
                *([v2.RandomSolarize(threshold=0.5, p=solarize)] if solarize else []),
                v2.Normalize(cfg.mean, cfg.std),
            ]
        )
        for blur, solarize in zip(cfg.blur, cfg.solarize, strict=True)
    )
    return t1, t2
