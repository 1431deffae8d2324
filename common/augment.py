"""Batched views: a torchvision v2 composition, drawn per image and run on whole batches.

`Batched(transform)` compiles the composition of a method's `augment.py` into steps on batches, on
whatever device the images are. Every parameter is a pure function of uniforms that the caller draws
for the global batch and slices by rank, so that the views do not depend on the number of processes
or on what was drawn before. The pixels are torchvision's, to the rounding of the floats.

Whatever says what happens to an image (boxes, factors, choices) is worked out on the CPU and only
then sent to the images' device: nothing here waits for an accelerator.

B images, C = 3 channels, H x W the canvas, h x w the size after the crop.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

TRIES = 10  # boxes that torchvision's RandomResizedCrop proposes before it falls back
BOX_DRAWS = 2 * TRIES + 2  # their areas and aspect ratios, and one place


class Batched:
    """A torchvision v2 composition, drawn per image and run on whole batches.

    Args:
        transform: the composition, as one would give it to a dataset.
        dtype: of the arithmetic and of the views; float64 is for proofs.

    Attributes:
        draws: the number of uniforms that each image needs.

    Raises:
        ValueError: a transform has no batched form; the message names it and the way out.
    """

    def __init__(self, transform: v2.Transform, dtype: torch.dtype = torch.float32):
        transforms = _after_to_float(_flatten([transform]))
        self.crops_first = bool(transforms) and isinstance(transforms[0], v2.RandomResizedCrop)
        self.steps = _compile(transforms)
        self.draws = sum(step.draws for step in self.steps)
        self.dtype = dtype

    @torch.no_grad()
    def __call__(self, images: Tensor, uniforms: Tensor, sizes: Tensor | None = None) -> Tensor:
        """One view of each image: (B, C, h, w), contiguous, on the images' device.

        Args:
            images: (B, C, H, W), uint8, or floating point in [0, 1]; never written to.
            uniforms: (B, draws) in [0, 1), float32 or float64, on the CPU.
            sizes: (B, 2) integers on the CPU: the (height, width) in pixels of each image, at the
                top left of its canvas; None where all fill it. Needs a crop as the first step.

        Raises:
            ValueError: the uniforms or the sizes fit neither the images nor the composition.
        """
        if uniforms.shape != (len(images), self.draws) or uniforms.device.type != "cpu":
            raise ValueError(
                f"uniforms must be {(len(images), self.draws)} on the CPU, "
                f"not {tuple(uniforms.shape)} on {uniforms.device}"
            )
        if sizes is not None and not self.crops_first:
            raise ValueError("sizes need a composition that begins with RandomResizedCrop")
        images = to_float(images, self.dtype)  # ours from here on: steps may write to it
        return _run(images, uniforms.double(), self.steps, sizes).contiguous()


# From transforms to steps


class Step(NamedTuple):
    """A compiled transform: `run(images, uniforms, sizes)` with uniforms (B, draws), float64.

    It may write to the images, and is given sizes (or None) only as the first step.
    """

    draws: int
    run: Callable[[Tensor, Tensor, Tensor | None], Tensor]


def _run(
    images: Tensor, uniforms: Tensor, steps: Sequence[Step], sizes: Tensor | None = None
) -> Tensor:
    """The steps one after another, each on its own columns of the uniforms (B, draws)."""
    columns = uniforms.split([step.draws for step in steps], dim=1)
    for step, own in zip(steps, columns, strict=True):
        images, sizes = step.run(images, own, sizes), None
    return images


def _flatten(transforms: Sequence) -> list:
    """The transforms in order, without nesting and without identities."""
    flat = []
    for transform in transforms:
        match transform:
            case v2.Compose():
                flat += _flatten(transform.transforms)
            case v2.Identity():
                pass
            case _:
                flat.append(transform)
    return flat


def _after_to_float(transforms: list) -> list:
    """Without the conversions at the front, which are `Batched.__call__`'s own first act."""
    match transforms:
        case [v2.ToImage(), *rest]:
            return _after_to_float(rest)
        case [v2.ToDtype(dtype=torch.dtype(is_floating_point=True), scale=True), *rest]:
            return _after_to_float(rest)
        case _:
            return transforms


def _compile(transforms: Sequence) -> list[Step]:
    """The steps of flattened transforms; a flip right after a crop becomes part of the crop."""
    match transforms:
        case [v2.RandomResizedCrop() as crop, v2.RandomHorizontalFlip() as flip, *rest]:
            return [_crop_step(crop, flip), *_compile(rest)]
        case [transform, *rest]:
            return [_step(transform), *_compile(rest)]
        case _:
            return []


def _step(transform: v2.Transform) -> Step:
    match transform:
        case v2.RandomResizedCrop():
            return _crop_step(transform)
        case v2.RandomApply(transforms=inner, p=p):
            inner = _flatten(inner)
            if any(isinstance(t, v2.RandomResizedCrop) for t in inner):
                raise _refusal(transform, "a crop for some of the images only")
            return _chance(p, _compile(inner))
        case v2.RandomHorizontalFlip(p=p):
            return _chance(p, [Step(0, lambda images, *_: images.flip(-1))])
        case v2.RandomGrayscale(p=p):
            return _chance(p, [Step(0, lambda images, *_: grayscale(images))])
        case v2.RandomSolarize(p=p, threshold=threshold):
            return _chance(p, [Step(0, lambda images, *_: solarize(images, threshold))])
        case v2.ColorJitter():
            return _jitter_step(transform)
        case v2.GaussianBlur(kernel_size=kernel, sigma=(low, high)):
            return Step(1, lambda x, u, _: gaussian_blur(x, kernel, _between(u[:, 0], low, high)))
        case v2.Normalize(mean=mean, std=std):
            return Step(0, lambda images, *_: normalize(images, mean, std))
        case v2.Lambda(lambd=partial(func=torch.clamp, args=(), keywords=bounds)):
            return Step(0, lambda images, *_: images.clamp_(**bounds))
        case _:
            raise _refusal(transform)


def _chance(p: float, steps: Sequence[Step]) -> Step:
    """The steps for each image with probability p, and only for the images that are chosen."""

    def run(images: Tensor, uniforms: Tensor, _: Tensor | None) -> Tensor:
        return _where(uniforms[:, 0] < p, images, partial(_run, steps=steps), uniforms[:, 1:])

    return Step(1 + sum(step.draws for step in steps), run)


def _crop_step(crop: v2.RandomResizedCrop, flip: v2.RandomHorizontalFlip | None = None) -> Step:
    if crop.interpolation not in (*_KERNELS, "bilinear", "bicubic") or not crop.antialias:
        raise _refusal(crop, "other than bilinear or bicubic with antialias=True")

    def run(images: Tensor, uniforms: Tensor, sizes: Tensor | None) -> Tensor:
        if sizes is None:
            sizes = torch.tensor(images.shape[-2:]).expand(len(images), 2)
        boxes = random_boxes(uniforms[:, :BOX_DRAWS], sizes, crop.scale, crop.ratio)
        flipped = uniforms[:, -1] < flip.p if flip else None
        return resized_crop(images, boxes, crop.size, crop.interpolation, flipped)

    return Step(BOX_DRAWS + bool(flip), run)


def _jitter_step(jitter: v2.ColorJitter) -> Step:
    """Four uniforms whose ranks are the order of the operations, then one for each factor."""
    operations = (brightness, contrast, saturation, hue)
    ranges = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)

    def run(images: Tensor, uniforms: Tensor, _: Tensor | None) -> Tensor:
        order = uniforms[:, :4].argsort(dim=1)  # (B, position): which operation
        for position in range(4):
            for i, (operation, bounds) in enumerate(zip(operations, ranges, strict=True)):
                if bounds is not None:  # torchvision's None: switched off
                    factors = _between(uniforms[:, 4 + i], *bounds)
                    images = _where(order[:, position] == i, images, operation, factors)
        return images

    return Step(8, run)


def _refusal(transform: v2.Transform, what: str = "") -> ValueError:
    name = f"{type(transform).__name__} {what}".strip()
    return ValueError(
        f"{name} has no batched form: run the composition in the loader's workers, "
        "or give it a step in common/augment.py"
    )


# Draws: from uniforms to parameters, on the CPU


def _between(uniforms: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * uniforms


def random_boxes(
    uniforms: Tensor, sizes: Tensor, scale: Sequence[float], ratio: Sequence[float]
) -> Tensor:
    """RandomResizedCrop's law: the first of ten proposals that fits, else a central box.

    Args:
        uniforms: (B, 22), for ten areas (uniform, scale x the image's), ten aspect ratios
            width / height (log-uniform), and the place from the top and from the left.
        sizes: (B, 2) integers, (height, width) in pixels.

    Returns:
        (B, 4) int64: top, left, height, width.
    """
    areas, aspects, places = uniforms.double().split([TRIES, TRIES, 2], dim=1)
    areas = _between(areas, *scale) * sizes.prod(1, keepdim=True)
    aspects = _between(aspects, *map(math.log, ratio)).exp()
    tries = torch.stack([areas / aspects, areas * aspects], dim=2).sqrt().round()  # (B, TRIES, 2)
    fits = ((tries > 0) & (tries <= sizes.unsqueeze(1))).all(2)
    first = fits.int().argmax(1)  # the first where several fit

    height, width = sizes.double().unbind(1)
    most = torch.stack([width / ratio[0], height * ratio[1]], dim=1).round().clamp_min(1)
    found = fits.any(1, keepdim=True)
    extent = torch.where(found, tries[torch.arange(len(tries)), first], most.minimum(sizes))
    slack = sizes - extent
    corner = torch.where(found, places * (slack + 1), slack / 2).floor()
    return torch.cat([corner, extent], dim=1).long()


def center_crop_boxes(sizes: Tensor, fraction: float) -> Tensor:
    """Evaluation's square central boxes, of fraction x the short side: (B, 4) int64.

    sizes: (B, 2) integers, (height, width). The side is rounded down and the corner up, as in
    BYOL's official code; with fraction 1.0 the box is the whole of a square image.
    """
    side = (sizes.amin(1, keepdim=True) * fraction).long().clamp_min(1).expand(-1, 2)
    return torch.cat([(sizes - side + 1) // 2, side], dim=1)


# Pixels: (B, C, H, W) in, (B, C, h, w) out; what is per image is a (B, ...) tensor on the CPU


def to_float(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A copy in `dtype`; uint8 is scaled to [0, 1]."""
    floats = images.to(dtype, copy=True)
    return floats if images.is_floating_point() else floats.div_(torch.iinfo(images.dtype).max)


def brightness(images: Tensor, factors: Tensor) -> Tensor:
    """factor x image, clipped to [0, 1]; factors: (B,)."""
    return images.mul(_per_image(factors, images)).clamp_(0, 1)


def contrast(images: Tensor, factors: Tensor) -> Tensor:
    """Blend with the mean of the image's gray version, clipped to [0, 1]; factors: (B,)."""
    return _blend(images, _gray(images).mean((2, 3), keepdim=True), factors)


def saturation(images: Tensor, factors: Tensor) -> Tensor:
    """Blend with the image's gray version, clipped to [0, 1]; factors: (B,)."""
    return _blend(images, _gray(images), factors)


def hue(images: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue of images in [0, 1] by a fraction of the colour circle; turns: (B,).

    In HSV each channel is a trapezoid of its distance on the colour circle from the opposite hue
    (cyan, magenta, yellow: there the channel is at its minimum), between minimum and maximum.
    """
    red, green, blue = images.split(1, dim=1)
    high = red.maximum(green).maximum(blue)
    spread = high - red.minimum(green).minimum(blue)
    sixths = torch.where(high == green, 2 * spread + (blue - red), 4 * spread + (red - green))
    sixths = torch.where(high == red, green - blue, sixths)
    angle = sixths.div_(6 * spread.clamp_min(torch.finfo(images.dtype).tiny))
    angle += _per_image(turns, images)
    opposite = _like(torch.tensor([3, 5, 1]).view(3, 1, 1), images)
    distance = angle - opposite / 6
    distance = distance.sub_(distance.round()).abs_()  # in turns, at most a half
    return high - distance.mul_(-6).add_(2).clamp_(0, 1).mul_(spread)


def grayscale(images: Tensor) -> Tensor:
    """The gray version, in all channels."""
    return _gray(images).repeat(1, images.shape[1], 1, 1)


def solarize(images: Tensor, threshold: float) -> Tensor:
    """Invert the values at or above the threshold."""
    return torch.where(images >= threshold, 1 - images, images)


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(image - mean) / std, per channel."""
    shift, scale = (torch.tensor(m, dtype=images.dtype).view(-1, 1, 1) for m in (mean, std))
    return images.sub(_like(shift, images)).div_(_like(scale, images))


def gaussian_blur(images: Tensor, kernel_size: Sequence[int], sigmas: Tensor) -> Tensor:
    """Gaussian blur with reflected borders, of kernel_size (horizontal, vertical), odd taps.

    sigmas: (B,) in pixels. Raises ValueError where the images are too small to be reflected.
    """
    horizontal, vertical = kernel_size
    with _full_precision(images):
        rows = _blur_weights(images, sigmas, vertical, images.shape[2])
        columns = _blur_weights(images, sigmas, horizontal, images.shape[3])
        return _separable(images, rows, columns)


def resized_crop(
    images: Tensor,
    boxes: Tensor,
    size: Sequence[int],
    interpolation: InterpolationMode | str,
    flip: Tensor | None = None,
) -> Tensor:
    """Each image's own box, resized with antialiasing, and mirrored where flip says so.

    Pixels outside the boxes have no influence. Bicubic leaves [0, 1]; clamp it where that matters.

    Args:
        images: (B, C, H, W), floating point (see `to_float`).
        boxes: (B, 4) integers on the CPU: top, left, height, width in pixels.
        size: (h, w).
        interpolation: bilinear or bicubic.
        flip: (B,) bool on the CPU.

    Raises:
        ValueError: a box is empty or leaves the canvas.
    """
    corner, extent = boxes.split(2, dim=1)
    canvas = torch.tensor(images.shape[-2:])
    if bool((corner < 0).any() | (extent < 1).any() | (corner + extent > canvas).any()):
        raise ValueError(f"boxes must be non-empty and inside the {tuple(canvas.tolist())} canvas")
    top, left, height, width = boxes.unbind(1)
    with _full_precision(images):
        rows = _resize_weights(images, 2, top, height, size[0], interpolation)
        columns = _resize_weights(images, 3, left, width, size[1], interpolation, flip)
        return _separable(images, rows, columns)


def _gray(images: Tensor) -> Tensor:
    """Luma with torchvision's weights: (B, 1, H, W)."""
    red, green, blue = images.split(1, dim=1)
    return red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def _blend(images: Tensor, others: Tensor, factors: Tensor) -> Tensor:
    factors = _per_image(factors, images)
    return images.mul(factors).add_(others.mul_(1 - factors)).clamp_(0, 1)


# Crop and blur: two matrices per image


def _separable(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """rows @ image @ columns^T for every channel; rows: (B, h, H), columns: (B, w, W)."""
    channels, h = images.shape[1], rows.shape[1]
    # The channels stand between rows and columns, so that each product is one per image.
    tall = rows @ images.transpose(1, 2).flatten(2)  # (B, h, C W)
    small = tall.unflatten(2, (channels, -1)).flatten(1, 2) @ columns.mT  # (B, h C, w)
    return small.unflatten(1, (h, channels)).transpose(1, 2)


def _resize_weights(
    images: Tensor,
    dim: int,
    starts: Tensor,
    lengths: Tensor,
    size: int,
    interpolation: InterpolationMode | str,
    flip: Tensor | None = None,
) -> Tensor:
    """PyTorch's antialiased resize of [start, start + length) along dim: (B, size, images' dim).

    In the images' dtype and PyTorch's order of operations: in float32 the rounding of a centre
    moves pixels by 1e-5.
    """
    kernel, radius = _KERNELS[InterpolationMode(interpolation)]
    taps = 2 * math.ceil(radius * max([size, *lengths.tolist()]) / size) + 1
    starts, lengths = (_per_image(values, images)[:, 0] for values in (starts, lengths))
    outputs = torch.arange(size, device=images.device).view(1, -1, 1)
    if flip is not None:
        mirrored = _send(flip, images.device).view(-1, 1, 1)
        outputs = torch.where(mirrored, size - 1 - outputs, outputs)
    scale = lengths / size  # (B, 1, 1)
    stretch = scale.clamp_min(1)
    centers = scale * (outputs + 0.5)  # (B, size, 1)
    first = (centers - radius * stretch + 0.5).floor_().clamp_(min=0)
    inputs = first + torch.arange(taps, device=images.device)  # (B, size, taps)
    weights = kernel((inputs - centers).add_(0.5).mul_(1 / stretch).abs_())
    weights.masked_fill_(inputs >= lengths, 0)
    weights.div_(weights.sum(2, keepdim=True))
    # The taps past an image's end weigh nothing, and land on columns of their own.
    dense = images.new_zeros(len(images), size, images.shape[dim] + taps)
    return dense.scatter_(2, (inputs + starts).long(), weights)[:, :, : images.shape[dim]]


def _triangle(distances: Tensor) -> Tensor:
    return (1 - distances).clamp_(min=0)


def _cubic(distances: Tensor) -> Tensor:
    """Keys' cubic convolution with a = -1/2, as in PIL and in PyTorch's antialiased bicubic."""
    a, x = -0.5, distances
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1, near, far).masked_fill_(x >= 2, 0)


_KERNELS = {  # and how far they reach, in pixels of the coarser grid
    InterpolationMode.BILINEAR: (_triangle, 1),
    InterpolationMode.BICUBIC: (_cubic, 2),
}


def _blur_weights(images: Tensor, sigmas: Tensor, taps: int, size: int) -> Tensor:
    """Gaussian windows with reflected borders as matrices: (B, size, size)."""
    radius = taps // 2
    if size <= radius:
        raise ValueError(f"{size} pixels cannot be blurred with {taps} taps: reflection needs more")
    offsets = torch.arange(-radius, radius + 1)
    windows = (-0.5 * (offsets / sigmas.double().unsqueeze(1)) ** 2).softmax(1)  # (B, taps)
    pixels = torch.arange(size, device=images.device)
    sources = (pixels + _send(offsets, images.device).unsqueeze(1)).abs()  # (taps, size)
    sources = size - 1 - (size - 1 - sources).abs()
    reflect = (sources.unsqueeze(2) == pixels).to(images.dtype)  # (taps, size, size)
    return (_like(windows, images) @ reflect.flatten(1)).unflatten(1, (size, size))


# Which images, and where


def _where(chosen: Tensor, images: Tensor, operation: Callable, *per_image: Tensor) -> Tensor:
    """operation(images, *per_image) for the chosen images, in place; chosen: (B,) bool, CPU."""
    index = chosen.nonzero().squeeze(1)
    if len(index) == 0:
        return images
    if len(index) == len(images):
        return operation(images, *per_image)
    where = _send(index, images.device)
    part = operation(images.index_select(0, where), *(values[index] for values in per_image))
    return images.index_copy_(0, where, part)


def _per_image(values: Tensor, images: Tensor) -> Tensor:
    """(B,) on the CPU to (B, 1, 1, 1) beside the images."""
    return _like(values, images).view(-1, 1, 1, 1)


def _like(values: Tensor, images: Tensor) -> Tensor:
    return _send(values.to(images.dtype), images.device)


def _send(values: Tensor, device: torch.device) -> Tensor:
    """To the device without waiting for it, which takes pinned memory."""
    values = values.pin_memory() if device.type == "cuda" else values
    return values.to(device, non_blocking=True)


def _full_precision(images: Tensor) -> torch.autocast:
    """Autocast would round the weights and the pixels to half precision."""
    return torch.autocast(images.device.type, enabled=False)
