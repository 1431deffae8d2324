"""Batched views: a torchvision v2 composition, drawn per image and run on whole batches.

`Batched(transform)` compiles the composition of a method's `augment.py` into steps on batches, on
whatever device the images are. Every parameter is a pure function of uniforms that the caller draws
for the global batch and slices by rank, so that the views do not depend on the number of processes
or on what was drawn before. The pixels are torchvision's, to the rounding of the floats.

Whatever says what happens to an image (boxes, factors, choices) is worked out on the CPU, for the
whole batch, and only then sent to the images' device: nothing here waits for an accelerator. The
pixels then go through all steps: small images many at a time, so that an operation is long beside
the call of it; on a processor large ones one by one, while they are in its cache.

B images, C = 3 channels, H x W the canvas, h x w the size after the crop.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torchvision.transforms import InterpolationMode, v2

TRIES = 10  # boxes that torchvision's RandomResizedCrop proposes before it falls back
BOX_DRAWS = 2 * TRIES + 2  # their areas and aspect ratios, and one place
SMALL = 128  # pixels: a side up to which a resize is quickest as one product for many images
BLOCK = 32  # output pixels that a product makes at once where the image is larger
CPU, DEVICE = 2**22, 2**30  # bytes of pixels at a time, on a processor and on an accelerator

# Once 31 MiB are freed, glibc keeps twice as much, and does not fault in what it gave back a moment
# ago: views take half the time. Much of training frees as much anyway.
torch.empty(31 * 2**20, dtype=torch.uint8)


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
        self.transform, self.dtype = transform, dtype
        transforms = _after_to_float(_flatten([transform]))
        self.crops_first = bool(transforms) and isinstance(transforms[0], v2.RandomResizedCrop)
        self.steps = _compile(transforms, dtype)
        self.draws = sum(step.draws for step in self.steps)

    def __reduce__(self) -> tuple:  # the steps are closures, which a worker cannot be sent
        return Batched, (self.transform, self.dtype)

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
        canvas = torch.tensor(images.shape[-2:])
        sizes = canvas.expand(len(images), 2) if sizes is None else sizes
        parameters, size = _draw(self.steps, uniforms.double(), sizes)
        shape = (*images.shape[:2], *(size or images.shape[-2:]))
        views = images.new_empty(shape, dtype=self.dtype)

        with torch.inference_mode():  # cheaper calls; the views themselves may be trained on
            for part in _chunks(images, self.dtype):
                chunk = images[part] if self.crops_first else to_float(images[part], self.dtype)
                views[part] = _run(self.steps, chunk, _take(parameters, part))
        return views


# From transforms to steps


class Step(NamedTuple):
    """A compiled transform, in two halves: what happens to each image, and its happening.

    `draw(uniforms, sizes)`: (B, draws) and (B, 2) to parameters, tuples of (B, ...) tensors.
    `run(images, *parameters)`: some of the images, which it may write to, and their parameters.
    `size`: (h, w) of the result, where that is not the images' own.
    """

    draws: int
    draw: Callable[[Tensor, Tensor], tuple]
    run: Callable[..., Tensor]
    size: Sequence[int] | None = None


def _fixed(run: Callable[[Tensor], Tensor]) -> Step:
    return Step(0, lambda *_: (), run)


def _draw(steps: Sequence[Step], uniforms: Tensor, sizes: Tensor) -> tuple[tuple, Any]:
    """The parameters of each step, from its own columns of the uniforms, and the final size."""
    parameters, size = [], None
    columns = uniforms.split([step.draws for step in steps], dim=1)
    for step, own in zip(steps, columns, strict=True):
        parameters.append(step.draw(own, sizes))
        if step.size:
            size, sizes = step.size, torch.tensor(step.size).expand(len(sizes), 2)
    return tuple(parameters), size


def _run(steps: Sequence[Step], images: Tensor, parameters: tuple) -> Tensor:
    for step, own in zip(steps, parameters, strict=True):
        images = step.run(images, *own)
    return images


def _chunks(images: Tensor, dtype: torch.dtype) -> list[slice]:
    """As many images at a time as are quickest; on a processor large ones one by one."""
    each = max(1, images[:1].numel() * dtype.itemsize)
    room = CPU if images.device.type == "cpu" else DEVICE
    count = 1 if room == CPU and _large(images) else max(1, room // each)
    return [slice(i, i + count) for i in range(0, len(images), count)]


def _large(images: Tensor) -> bool:
    return images.shape[2:].numel() > SMALL**2


def _take(parameters: Any, index: slice | Tensor) -> Any:
    """The parameters of some of the images."""
    if isinstance(parameters, Tensor):
        return parameters[index]
    if isinstance(parameters, Taps):
        return Taps(parameters.first[index], parameters.weights[index])
    return tuple(_take(each, index) for each in parameters)


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


def _compile(transforms: Sequence, dtype: torch.dtype) -> list[Step]:
    """The steps of flattened transforms; a flip right after a crop becomes part of the crop."""
    match transforms:
        case [v2.RandomResizedCrop() as crop, v2.RandomHorizontalFlip() as flip, *rest]:
            return [_crop_step(crop, flip, dtype), *_compile(rest, dtype)]
        case [v2.RandomResizedCrop() as crop, *rest]:
            return [_crop_step(crop, None, dtype), *_compile(rest, dtype)]
        case [transform, *rest]:
            return [_step(transform, dtype), *_compile(rest, dtype)]
        case _:
            return []


def _step(transform: v2.Transform, dtype: torch.dtype) -> Step:
    match transform:
        case v2.RandomApply(transforms=inner, p=p):
            inner = _flatten(inner)
            if any(isinstance(t, v2.RandomResizedCrop) for t in inner):
                raise _refusal(transform, "a crop for some of the images only")
            return _chance(p, _compile(inner, dtype))
        case v2.RandomHorizontalFlip(p=p):
            return _chance(p, [_fixed(lambda images: images.flip(-1))])
        case v2.RandomGrayscale(p=p):
            return _chance(p, [_fixed(grayscale)])
        case v2.RandomSolarize(p=p, threshold=threshold):
            return _chance(p, [_fixed(partial(solarize, threshold=threshold))])
        case v2.ColorJitter():
            return _jitter_step(transform)
        case v2.GaussianBlur(kernel_size=kernel, sigma=(low, high)):
            return Step(
                1,
                lambda uniforms, _: (_between(uniforms[:, 0], low, high),),
                lambda images, sigmas: gaussian_blur(images, kernel, sigmas),
            )
        case v2.Normalize(mean=mean, std=std):
            return _fixed(lambda images: normalize(images, mean, std))
        case v2.Lambda(lambd=partial(func=torch.clamp, args=(), keywords=bounds)):
            return _fixed(lambda images: images.clamp_(**bounds))
        case _:
            raise _refusal(transform)


def _chance(p: float, steps: Sequence[Step]) -> Step:
    """The steps for each image with probability p, and only for the images that are chosen."""

    def draw(uniforms: Tensor, sizes: Tensor) -> tuple:
        return uniforms[:, 0] < p, _draw(steps, uniforms[:, 1:], sizes)[0]

    def run(images: Tensor, chosen: Tensor, parameters: tuple) -> Tensor:
        return _where(chosen, images, partial(_run, steps), parameters)

    return Step(1 + sum(step.draws for step in steps), draw, run)


def _crop_step(
    crop: v2.RandomResizedCrop, flip: v2.RandomHorizontalFlip | None, dtype: torch.dtype
) -> Step:
    if crop.interpolation not in (*_KERNELS, "bilinear", "bicubic") or not crop.antialias:
        raise _refusal(crop, "other than bilinear or bicubic with antialias=True")

    def draw(uniforms: Tensor, sizes: Tensor) -> tuple:
        boxes = random_boxes(uniforms[:, :BOX_DRAWS], sizes, crop.scale, crop.ratio)
        flipped = uniforms[:, -1] < flip.p if flip else None
        return _crop_taps(boxes, crop.size, crop.interpolation, flipped, dtype)

    def run(images: Tensor, rows: Taps, columns: Taps) -> Tensor:
        return _resample(images, rows, columns, dtype)

    return Step(BOX_DRAWS + bool(flip), draw, run, crop.size)


def _jitter_step(jitter: v2.ColorJitter) -> Step:
    """Four uniforms whose ranks are the order of the operations, then one for each factor."""
    operations = (brightness, contrast, saturation, hue)
    ranges = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    used = [i for i, bounds in enumerate(ranges) if bounds is not None]  # None: switched off

    def draw(uniforms: Tensor, _: Tensor) -> tuple:
        order = uniforms[:, :4].argsort(dim=1)  # (B, position): which operation
        return order, *(_between(uniforms[:, 4 + i], *ranges[i]) for i in used)

    def run(images: Tensor, order: Tensor, *factors: Tensor) -> Tensor:
        for which in order.unbind(1):
            present = set(which.tolist())
            for i, own in zip(used, factors, strict=True):
                if i in present:
                    images = _where(which == i, images, operations[i], own)
        return images

    return Step(8, draw, run)


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
    return _blend(images, _gray(images.mean((2, 3), keepdim=True)), factors)


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
    not_red, not_green = (high - red).sign_(), (high - green).sign_()  # 0 where it is the highest
    if_green, if_blue = (blue - red).add_(spread, alpha=2), (red - green).add_(spread, alpha=4)
    # Choices by masks of 0 and 1, which are exact and ten times as fast as `torch.where`.
    sixths = torch.lerp(green - blue, if_green.lerp_(if_blue, not_green), not_red)
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
    radii = [taps // 2 for taps in kernel_size]
    for size, radius, taps in zip(images.shape[:1:-1], radii, kernel_size, strict=True):
        if size <= radius:
            raise ValueError(
                f"{size} pixels cannot be blurred with {taps} taps: reflection needs more"
            )
    horizontal, vertical = radii
    padded = pad(images, [horizontal, horizontal, vertical, vertical], mode="reflect")
    columns = _blur_taps(sigmas, horizontal, images.shape[3], images.dtype)
    rows = _blur_taps(sigmas, vertical, images.shape[2], images.dtype)
    return _separable(padded, rows, columns)


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
    taps = _crop_taps(boxes, size, interpolation, flip, images.dtype)
    result = images.new_empty(*images.shape[:2], *size)
    for part in _chunks(images, images.dtype):
        rows, columns = _take(taps, part)
        result[part] = _resample(images[part], rows, columns, images.dtype)
    return result


def _gray(images: Tensor) -> Tensor:
    """Luma with torchvision's weights: (B, 1, H, W)."""
    red, green, blue = images.split(1, dim=1)
    return red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def _blend(images: Tensor, others: Tensor, factors: Tensor) -> Tensor:
    factors = _per_image(factors, images)
    return images.mul(factors).add_(others.mul_(1 - factors)).clamp_(0, 1)


# Crop and blur: weighted sums along the rows and along the columns


class Taps(NamedTuple):
    """How each of `size` output pixels is made, on the CPU: a window of weighted input pixels."""

    first: Tensor  # (B, size) int64, where the window begins
    weights: Tensor  # (B, size, taps); those past the images' end are zero


def _separable(images: Tensor, rows: Taps, columns: Taps) -> Tensor:
    """(B, C, H, W) to (B, C, h, w): along the columns' direction first, then along the rows'."""
    with torch.autocast(images.device.type, enabled=False):  # it would round to half precision
        narrow = _banded(images.flatten(1, 2).mT, columns).mT  # (B, C H, w)
        narrow = narrow.unflatten(1, images.shape[1:3])
        return _banded(narrow, rows)


def _banded(images: Tensor, rows: Taps) -> Tensor:
    """rows @ image, (B, ..., H, W) to (B, ..., h, W), without most of the zeros of that matrix.

    A block of output rows needs only the input rows under its windows; for a single image they are
    few, for many images of different boxes it is the union.
    """
    size, taps = rows.weights.shape[1:]
    index = rows.first.unsqueeze(2) + torch.arange(taps)
    matrix = images.new_zeros(len(images), size, images.shape[-2] + taps)
    matrix.scatter_(2, send(index, images.device), send(rows.weights, images.device))
    matrix = matrix.view(len(images), *[1] * (images.dim() - 3), *matrix.shape[1:])
    if images.shape[-2] <= SMALL:
        return matrix[..., : images.shape[-2]] @ images
    lows, highs = rows.first.amin(0).tolist(), rows.first.amax(0).tolist()
    blocks = []
    for start in range(0, size, BLOCK):
        block = slice(start, start + BLOCK)
        inputs = slice(min(lows[block]), min(max(highs[block]) + taps, images.shape[-2]))
        blocks.append(matrix[..., block, inputs] @ images[..., inputs, :])
    return torch.cat(blocks, dim=-2)


def _resample(images: Tensor, rows: Taps, columns: Taps, dtype: torch.dtype) -> Tensor:
    """Filter the images in `dtype`; of large ones, convert only what is under a window."""
    if not _large(images):
        return _separable(to_float(images, dtype), rows, columns)
    (top, bottom), (left, right) = (
        (int(taps.first.amin()), int(taps.first.amax()) + taps.weights.shape[2])
        for taps in (rows, columns)
    )
    window = to_float(images[:, :, top:bottom, left:right], dtype)
    rows, columns = (
        taps._replace(first=taps.first - start) for taps, start in ((rows, top), (columns, left))
    )
    return _separable(window, rows, columns)


def _crop_taps(
    boxes: Tensor,
    size: Sequence[int],
    interpolation: InterpolationMode | str,
    flip: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Taps, Taps]:
    top, left, height, width = boxes.unbind(1)
    rows = _resize_taps(top, height, size[0], interpolation, None, dtype)
    columns = _resize_taps(left, width, size[1], interpolation, flip, dtype)
    return rows, columns


def _resize_taps(
    starts: Tensor,
    lengths: Tensor,
    size: int,
    interpolation: InterpolationMode | str,
    flip: Tensor | None,
    dtype: torch.dtype,
) -> Taps:
    """PyTorch's antialiased resize of [start, start + length) along one dimension.

    In the images' dtype and PyTorch's order of operations: in float32 the rounding of a centre
    moves pixels by 1e-5.
    """
    kernel, radius = _KERNELS[InterpolationMode(interpolation)]
    taps = 2 * math.ceil(radius * max([size, *lengths.tolist()]) / size) + 1
    lengths = lengths.to(dtype).view(-1, 1, 1)
    outputs = torch.arange(size).view(1, -1, 1)
    if flip is not None:
        outputs = torch.where(flip.view(-1, 1, 1), size - 1 - outputs, outputs)
    scale = lengths / size  # (B, 1, 1)
    stretch = scale.clamp_min(1)
    centers = scale * (outputs + 0.5)  # (B, size, 1)
    first = (centers - radius * stretch + 0.5).floor_().clamp_(min=0)
    inputs = first + torch.arange(taps)  # (B, size, taps)
    weights = kernel((inputs - centers).add_(0.5).mul_(1 / stretch).abs_())
    weights.masked_fill_(inputs >= lengths, 0)
    weights.div_(weights.sum(2, keepdim=True))
    return Taps(first.squeeze(2).long() + starts.unsqueeze(1), weights)


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


def _blur_taps(sigmas: Tensor, radius: int, size: int, dtype: torch.dtype) -> Taps:
    """Gaussian windows over images that are padded by the radius."""
    offsets = torch.arange(-radius, radius + 1)
    windows = (-0.5 * (offsets / sigmas.double().unsqueeze(1)) ** 2).softmax(1)  # (B, taps)
    first = torch.arange(size).expand(len(sigmas), size)
    return Taps(first, windows.to(dtype).unsqueeze(1).expand(-1, size, -1))


# Which images, and where


def _where(chosen: Tensor, images: Tensor, operation: Callable, *parameters: Any) -> Tensor:
    """operation(images, *parameters) for the chosen images, in place; chosen: (B,) bool, CPU."""
    index = chosen.nonzero().squeeze(1)
    if len(index) == 0:
        return images
    if len(index) == len(images):
        return operation(images, *parameters)
    where = send(index, images.device)
    part = operation(images.index_select(0, where), *_take(parameters, index))
    return images.index_copy_(0, where, part)


def _per_image(values: Tensor, images: Tensor) -> Tensor:
    """(B,) on the CPU to (B, 1, 1, 1) beside the images."""
    return _like(values, images).view(-1, 1, 1, 1)


def _like(values: Tensor, images: Tensor) -> Tensor:
    return send(values.to(images.dtype), images.device)


def send(values: Tensor, device: torch.device) -> Tensor:
    """To the device without waiting for it, which takes pinned memory."""
    values = values.pin_memory() if device.type == "cuda" else values
    return values.to(device, non_blocking=True)
