"""Batched views: a torchvision composition, drawn per image and run on whole batches.

`Batched(transform)` compiles the composition of a method's `augment.py` into steps on batches, on
whatever device the images are. Every parameter is a pure function of uniforms that the caller draws
for the global batch and slices by rank, so that the views do not depend on the number of processes
or on what was drawn before. The pixels are torchvision's, to the rounding of the floats.

A transform that has no step here runs image by image, as in a `Dataset`, with the global random
generators seeded by one of these uniforms. It is slower and gives the same guarantees.

Whatever says what happens to an image (boxes, factors, choices) is computed on the CPU, for the
whole batch, and then sent to the images' device: no batched step waits for an accelerator. The
pixels then go through all steps: small images many at a time, so that an operation takes long
compared with its call; on a processor large images one by one, while they are in its cache.

This file imports only the standard library, torch and torchvision, so it can be copied by itself.

B images, C = 3 channels, H x W the canvas, h x w the size after the crop.
"""

import contextlib
import math
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag
from torchvision import transforms as v1
from torchvision.transforms import InterpolationMode, v2

TRIES = 10  # boxes that torchvision's RandomResizedCrop proposes before it falls back
BOX_DRAWS = 2 * TRIES + 2  # their areas and aspect ratios, and one position
INTERPOLATIONS = (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC, "bilinear", "bicubic")
SMALL = 128  # pixels: a side up to which many images at a time are quickest on a processor
CPU, DEVICE = 2**22, 2**30  # bytes of pixels at a time, on a processor and on an accelerator


class ViewError(ValueError):
    """A transform's results cannot become a batch of views; the message is one line."""


class Batched:
    """A torchvision composition, drawn per image and run on whole batches.

    Any transform is accepted. One without a batched step (`RandomRotation`, a v1 transform, a plain
    function) runs image by image, in its place in the composition. It gets what torchvision would
    hand it there in a `Dataset`: a (C, H, W) CPU tensor of the image's own size, uint8 before the
    conversion to float and in [0, 1] after it (a PIL image after `ToPILImage`). The global CPU
    generators of torch, NumPy and Python are seeded for that image and restored afterwards.

    Args:
        transform: the composition, as one would give it to a dataset.
        dtype: of the arithmetic and of the views; float64 is for proofs.

    Attributes:
        draws: the number of uniforms that each image needs.
        unbatched: the names of the transforms that run image by image, without duplicates.
    """

    def __init__(self, transform: Callable, dtype: torch.dtype = torch.float32):
        self.transform, self.dtype = transform, dtype
        parts = _parts(_flatten([transform]), dtype)
        self.stages = _compile(parts, dtype)
        only_steps = bool(parts) and all(isinstance(part, Step) for part in parts)
        self.crop_and_on = parts if only_steps and parts[0].size else None
        self.draws = sum(stage.draws for stage in self.stages)
        self.unbatched = _unique(name for stage in self.stages for name in stage.unbatched)

    def __reduce__(self) -> tuple:  # the stages are closures, which cannot be pickled for a worker
        return Batched, (self.transform, self.dtype)

    @torch.no_grad()
    def __call__(
        self, images: Tensor | list[Tensor], uniforms: Tensor, sizes: Tensor | None = None
    ) -> Tensor:
        """One view of each image: (B, C, h, w), contiguous, on the images' device.

        Args:
            images: (B, C, H, W), uint8, or floating point in [0, 1]; never written to. Or a list of
                B of any sizes, (C, H, W) each.
            uniforms: (B, draws) in [0, 1), float32 or float64, on the CPU.
            sizes: (B, 2) integers on the CPU: the (height, width) in pixels of each image, at the
                top left of its canvas; None where all images fill it, or are a list.

        Raises:
            ValueError: the uniforms fit neither the images nor the composition.
            ViewError: a `ValueError`; the views differ in size, or a transform returns no image.
        """
        if uniforms.shape != (len(images), self.draws) or uniforms.device.type != "cpu":
            raise ValueError(
                f"uniforms must be {(len(images), self.draws)} on the CPU, "
                f"not {tuple(uniforms.shape)} on {uniforms.device}"
            )
        if isinstance(images, Tensor):
            sizes = _full_sizes(images) if sizes is None else sizes
            floating = torch.full((len(images),), images.is_floating_point())
            canvas = Canvas(images, sizes, floating)
        elif self.crop_and_on and any(map(_large, images)) and len(set(map(len, images))) == 1:
            sizes = torch.tensor([image.shape[1:] for image in images])
            return _run_steps(self.crop_and_on, images, uniforms.double(), sizes, self.dtype)
        else:
            floating = torch.tensor([image.is_floating_point() for image in images])
            canvas = _pad(images, floating, self.dtype)
        batch = _run_stages(self.stages, canvas, uniforms.double())
        if not batch.is_full():
            small, *_, large = batch.sizes.unique(dim=0).tolist()
            raise ViewError(
                f"views of different sizes, {small[0]}x{small[1]} and {large[0]}x{large[1]}, "
                "cannot be stacked: end the composition with a crop or a resize to one size"
            )
        if batch.images is images or batch.images.dtype != self.dtype:
            return to_float(batch.images, self.dtype).contiguous()
        return batch.images


# A composition is a sequence of stages; what passes from one to the next is a canvas


class Canvas(NamedTuple):
    """Images of any sizes, each at the top left of its row."""

    images: Tensor  # (B, C, H, W), uint8 or floating point
    sizes: Tensor  # (B, 2) int64 on the CPU: height and width
    floating: Tensor  # (B,) bool on the CPU: given as floats, or returned as such

    def is_full(self) -> bool:
        """All images fill the canvas."""
        return bool((self.sizes == _full_sizes(self.images)).all())

    def cut(self) -> list[Tensor]:
        """The images, each (C, h, w) of its own size; no copies."""
        sizes = self.sizes.tolist()
        return [image[:, :h, :w] for image, (h, w) in zip(self.images, sizes, strict=True)]


class Stage(NamedTuple):
    """A stretch of the composition.

    `run(canvas, uniforms)`: the canvas after it; uniforms: (B, draws).
    `unbatched`: the names of the transforms in it that run image by image.
    """

    draws: int
    run: Callable[[Canvas, Tensor], Canvas]
    unbatched: Sequence[str] = ()


class Step(NamedTuple):
    """A batched transform in two halves: drawing its parameters, and applying it.

    `draw(uniforms, sizes, device)`: (B, draws) and (B, 2) to parameters, tuples of (B, ...) tensors
    on the CPU, except for the `Taps` of a crop, which are on `device`.
    `run(images, *parameters)`: some of the images, which it may write to, and their parameters.
    `size`: (h, w) of the result of a crop; None where the size stays.
    """

    draws: int
    draw: Callable[[Tensor, Tensor, torch.device], tuple]
    run: Callable[..., Tensor]
    size: Sequence[int] | None = None


Format = Literal["uint8", "float", "PIL"]  # of an image, at some place in torchvision's composition


class Unbatched(NamedTuple):
    """A transform that runs image by image, and the format of the images that it gets."""

    transform: Callable
    format: Format
    name: str | None = None  # None: a conversion between two such transforms


def _run_stages(stages: Sequence[Stage], canvas: Canvas, uniforms: Tensor) -> Canvas:
    columns = uniforms.split([stage.draws for stage in stages], dim=1)
    for stage, stage_uniforms in zip(stages, columns, strict=True):
        canvas = stage.run(canvas, stage_uniforms)
    return canvas


def _full_sizes(images: Tensor) -> Tensor:
    return torch.tensor(images.shape[2:]).expand(len(images), 2)


def _pad(images: Sequence[Tensor], floating: Tensor, dtype: torch.dtype) -> Canvas:
    """The images, each (C, h, w) uint8 or floating point, on one canvas."""
    channels = sorted({len(image) for image in images})
    if len(channels) > 1:
        raise ViewError(
            f"images of {channels[0]} and {channels[-1]} channels cannot be stacked: "
            "add a conversion to RGB to the composition"
        )
    if len({image.dtype for image in images}) > 1:
        images = [to_float(image, dtype) for image in images]
    sizes = torch.tensor([image.shape[1:] for image in images])
    canvas = images[0].new_zeros(len(images), *channels, *sizes.amax(0).tolist())
    for row, image in zip(canvas, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    return Canvas(canvas, sizes, floating)


# From transforms to steps and stages


def _flatten(transforms: Sequence) -> list:
    """The transforms in order, without nesting and without identities."""
    flat = []
    for transform in transforms:
        if type(transform) in (v2.Compose, v1.Compose):
            flat += _flatten(transform.transforms)
        elif type(transform) is not v2.Identity:
            flat.append(transform)
    return flat


def _compile(parts: Sequence, dtype: torch.dtype, nested: bool = False) -> list[Stage]:
    """Stages, each of as many neighbouring parts as can run together."""
    stages: list[Stage] = []
    only_steps = not nested and all(isinstance(part, Step) for part in parts)
    for _, neighbours in groupby(parts, key=type):
        match list(neighbours):
            case [Step(), *_] as steps:
                stages.append(_batched_stage(steps, dtype, crops_together=only_steps))
            case [Unbatched(), *_] as unbatched:
                stages.append(_unbatched_stage(unbatched, dtype))
            case compiled:
                stages += compiled
    return stages


def _parts(
    transforms: Sequence[Callable], dtype: torch.dtype, image_format: Format = "uint8"
) -> list[Any]:
    """The parts (`Step`, `Stage` or `Unbatched`) of flattened transforms.

    Batched steps compute in floats wherever they stand, so a conversion is not a part. It decides
    the format that later unbatched transforms get; only between two of them is it carried out. A
    flip right after a crop becomes part of the crop.
    """
    parts: list[Any] = []
    previous = None
    for transform in transforms:
        if conversion := _conversion(transform, dtype, image_format):
            convert, image_format = conversion
            if parts and isinstance(parts[-1], Unbatched):
                parts.append(Unbatched(convert, image_format))
        else:
            pair = type(previous), type(transform)
            if pair == (v2.RandomResizedCrop, v2.RandomHorizontalFlip) and type(parts[-1]) is Step:
                parts[-1] = _crop_step(previous, transform, dtype)
            else:
                parts.append(_part(transform, dtype, image_format))
            match transform:
                case v2.Normalize():  # torchvision refuses it on uint8
                    image_format = "float"
                case v2.ToDtype(dtype=torch.uint8):
                    image_format = "uint8"
        previous = transform
    return parts


def _conversion(
    transform: Callable, dtype: torch.dtype, image_format: Format
) -> tuple[Callable, Format] | None:
    """For a conversion, a function that converts one image and the format after it; else None."""
    match transform:
        case v2.ToImage() | v2.ToPureTensor() | v2.PILToTensor() | v1.PILToTensor():
            return v2.ToImage(), "uint8" if image_format == "PIL" else image_format
        case (
            v2.ToDtype(dtype=torch.dtype(is_floating_point=True), scale=True)
            | v2.ConvertImageDtype(dtype=torch.dtype(is_floating_point=True))
            | v1.ConvertImageDtype(dtype=torch.dtype(is_floating_point=True))
            | v2.ToTensor()
            | v1.ToTensor()
        ):
            return v2.Compose([v2.ToImage(), v2.ToDtype(dtype, scale=True)]), "float"
        case v2.ToDtype(dtype=torch.uint8, scale=True) if image_format == "uint8":
            return transform, image_format
        case v2.ToPILImage(mode=None) | v1.ToPILImage(mode=None):
            return transform, "PIL"
        case _:
            return None


def _part(
    transform: Callable, dtype: torch.dtype, image_format: Format
) -> Step | Stage | Unbatched:
    if type(transform) is not getattr(v2, type(transform).__name__, None):
        return _unbatched(transform, image_format)  # a subclass of torchvision's may do anything
    match transform:
        case v2.RandomApply(transforms=inner, p=p):
            parts = _parts(_flatten(inner), dtype, image_format)
            steps = [part for part in parts if isinstance(part, Step) and not part.size]
            if len(steps) == len(parts):
                return _chance(p, steps)
            return _chance_stage(p, _compile(parts, dtype, nested=True), dtype)
        case v2.RandomHorizontalFlip(p=p):
            return _chance(p, [_fixed(lambda images: images.flip(-1))])
        case v2.RandomGrayscale(p=p):
            return _chance(p, [_fixed(grayscale)])
        case v2.RandomSolarize(p=p, threshold=threshold):
            if threshold > 1 and image_format != "float":  # a threshold for the integers 0..255
                threshold = (threshold - 0.5) / 255
            return _chance(p, [_fixed(partial(solarize, threshold=threshold))])
        case v2.RandomResizedCrop(antialias=True) if transform.interpolation in INTERPOLATIONS:
            return _crop_step(transform, None, dtype)
        case v2.ColorJitter():
            return _jitter_step(transform)
        case v2.GaussianBlur(kernel_size=kernel, sigma=(low, high)):
            return Step(
                1,
                lambda uniforms, *_: (_between(uniforms[:, 0], low, high),),
                lambda images, sigmas: gaussian_blur(images, kernel, sigmas),
            )
        case v2.Normalize(mean=mean, std=std):
            return _fixed(lambda images: normalize(images, mean, std))
        case v2.Lambda(lambd=partial(func=torch.clamp, args=(), keywords=bounds)):
            return _fixed(lambda images: images.clamp_(**bounds))
        case _:
            return _unbatched(transform, image_format)


def _unbatched(transform: Callable, image_format: Format) -> Unbatched:
    name = getattr(transform, "__name__", type(transform).__name__)
    return Unbatched(transform, image_format, name)


# Image by image


def _unbatched_stage(parts: Sequence[Unbatched], dtype: torch.dtype) -> Stage:
    """All the transforms on one image after the other; the one uniform is the image's seed."""
    names = _unique(part.name for part in parts if part.name)

    def run(canvas: Canvas, uniforms: Tensor) -> Canvas:
        if len(uniforms) == 0:
            return canvas
        seeds = (uniforms[:, 0] * 2**32).long().tolist()  # torch ignores higher bits
        images = canvas._replace(images=canvas.images.cpu()).cut()
        results = []
        with _restored_generators(), torch.autocast("cpu", enabled=False):
            for image, floating, seed in zip(images, canvas.floating, seeds, strict=True):
                _seed_generators(seed)
                result = _formatted(image, parts[0].format, bool(floating), dtype)
                for part in parts:
                    result = part.transform(result)
                results.append(_as_tensor(result, names[-1]))
        floating = torch.tensor([image.is_floating_point() for image in results])
        canvas_after = _pad(results, floating, dtype)
        return canvas_after._replace(images=send(canvas_after.images, canvas.images.device))

    return Stage(1, run, names)


@contextlib.contextmanager
def _restored_generators() -> Iterator[None]:
    """Leaves the global CPU generators of torch, Python and NumPy as they were."""
    numpy = sys.modules["numpy"]  # which torchvision has imported
    python_state, numpy_state = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=()):
        try:
            yield
        finally:
            random.setstate(python_state)
            numpy.random.set_state(numpy_state)


def _seed_generators(seed: int) -> None:
    torch.default_generator.manual_seed(seed)  # `torch.manual_seed` seeds the accelerators' too
    random.seed(seed)
    sys.modules["numpy"].random.seed(seed)


def _formatted(image: Tensor, image_format: Format, floating: bool, dtype: torch.dtype) -> Any:
    """A copy of the image, (C, h, w), in the format that a transform gets."""
    if image_format == "float" or (floating and image_format != "PIL"):
        return to_float(image, dtype).contiguous()
    if image.is_floating_point():  # a batched step's result, which torchvision would round too
        image = image.mul(255).round_().clamp_(0, 255).to(torch.uint8)
    image = image.clone(memory_format=torch.contiguous_format)
    return v2.functional.to_pil_image(image) if image_format == "PIL" else image


def _as_tensor(image: Any, name: str) -> Tensor:
    """A transform's result (a tensor, an array or a PIL image) as (C, h, w), uint8 or floats."""
    try:
        tensor = v2.functional.to_image(image).as_subclass(Tensor)
    except TypeError:
        raise ViewError(f"{name} returns a {type(image).__name__}, not an image") from None
    if tensor.dim() != 3:
        raise ViewError(f"{name} returns a tensor {tuple(tensor.shape)}, not one image (C, H, W)")
    if tensor.dtype == torch.uint8 or tensor.is_floating_point():
        return tensor
    return v2.functional.to_dtype(tensor, torch.float32, scale=True)


# In batches


def _batched_stage(steps: Sequence[Step], dtype: torch.dtype, crops_together: bool) -> Stage:
    """The steps on all images at once, if these have one size, or a crop comes first.

    A crop ignores the padding except for rounding in floats, which a later transform may amplify
    where it converts to uint8. `crops_together` says that none does.
    """

    def run(canvas: Canvas, uniforms: Tensor) -> Canvas:
        if (crops_together and steps[0].size) or canvas.is_full():
            views = _run_steps(steps, canvas.images, uniforms, canvas.sizes, dtype)
            return Canvas(views, _full_sizes(views), canvas.floating)
        alone = [
            _run_steps(steps, image[None], uniforms[i : i + 1], canvas.sizes[i : i + 1], dtype)[0]
            for i, image in enumerate(canvas.cut())
        ]
        return _pad(alone, canvas.floating, dtype)

    return Stage(sum(step.draws for step in steps), run)


def _run_steps(
    steps: Sequence[Step],
    images: Tensor | list[Tensor],
    uniforms: Tensor,
    sizes: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    like = images[0] if isinstance(images, list) else images
    parameters, size = _draw(steps, uniforms, sizes, like.device)
    shape = len(images), like.shape[-3], *(size or like.shape[-2:])
    views = like.new_empty(shape, dtype=dtype)
    with torch.inference_mode():  # cheaper calls; the views themselves may be trained on
        for part, chunk in _chunks(images, dtype):
            chunk = chunk if steps[0].size else to_float(chunk, dtype)  # a crop converts a part
            views[part] = _run(steps, chunk, _take(parameters, part))
    return views


def _draw(
    steps: Sequence[Step], uniforms: Tensor, sizes: Tensor, device: torch.device
) -> tuple[tuple, Any]:
    """The parameters of each step, from its columns of the uniforms, and the final size."""
    parameters, size = [], None
    columns = uniforms.split([step.draws for step in steps], dim=1)
    for step, step_uniforms in zip(steps, columns, strict=True):
        parameters.append(step.draw(step_uniforms, sizes, device))
        if step.size:
            size, sizes = step.size, torch.tensor(step.size).expand(len(sizes), 2)
    return tuple(parameters), size


def _run(steps: Sequence[Step], images: Tensor, parameters: tuple) -> Tensor:
    for step, step_parameters in zip(steps, parameters, strict=True):
        images = step.run(images, *step_parameters)
    return images


def _chunks(images: Tensor | list[Tensor], dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """As many images at a time as are quickest; on a processor large ones one by one."""
    if isinstance(images, list):
        yield from ((slice(i, i + 1), image[None]) for i, image in enumerate(images))
        return
    image_bytes = max(1, images[:1].numel() * dtype.itemsize)
    chunk_bytes = CPU if images.device.type == "cpu" else DEVICE
    count = 1 if chunk_bytes == CPU and _large(images) else max(1, chunk_bytes // image_bytes)
    for i in range(0, len(images), count):
        yield slice(i, i + count), images[i : i + count]


def _large(images: Tensor) -> bool:
    return images.shape[-2:].numel() > SMALL**2


def _take(parameters: Any, index: slice | Tensor) -> Any:
    """The parameters of some of the images."""
    if isinstance(parameters, Tensor):
        return parameters[index]
    if isinstance(parameters, Taps):
        return Taps(parameters.inputs[index], parameters.weights[index])
    return tuple(_take(parameter, index) for parameter in parameters)


def _fixed(run: Callable[[Tensor], Tensor]) -> Step:
    return Step(0, lambda *_: (), run)


def _chance(p: float, steps: Sequence[Step]) -> Step:
    """The steps for each image with probability p, and only for the images that are chosen."""

    def draw(uniforms: Tensor, sizes: Tensor, device: torch.device) -> tuple:
        return uniforms[:, 0] < p, _draw(steps, uniforms[:, 1:], sizes, device)[0]

    def run(images: Tensor, chosen: Tensor, parameters: tuple) -> Tensor:
        return _where(chosen, images, partial(_run, steps), parameters)

    return Step(1 + sum(step.draws for step in steps), draw, run)


def _chance_stage(p: float, stages: Sequence[Stage], dtype: torch.dtype) -> Stage:
    """As `_chance`, with stages, after which the chosen images may be of other sizes."""

    def run(canvas: Canvas, uniforms: Tensor) -> Canvas:
        chosen = (uniforms[:, 0] < p).nonzero().squeeze(1)
        if len(chosen) == 0:
            return canvas
        rows = canvas.images.index_select(0, send(chosen, canvas.images.device))
        part = Canvas(rows, canvas.sizes[chosen], canvas.floating[chosen])
        part = _run_stages(stages, part, uniforms[chosen, 1:])
        images, floating = canvas.cut(), canvas.floating.clone()
        floating[chosen] = part.floating
        for i, image in zip(chosen.tolist(), part.cut(), strict=True):
            images[i] = image
        return _pad(images, floating, dtype)

    unbatched = [name for stage in stages for name in stage.unbatched]
    return Stage(1 + sum(stage.draws for stage in stages), run, unbatched)


def _crop_step(
    crop: v2.RandomResizedCrop, flip: v2.RandomHorizontalFlip | None, dtype: torch.dtype
) -> Step:
    def draw(uniforms: Tensor, sizes: Tensor, device: torch.device) -> tuple:
        boxes = random_boxes(uniforms[:, :BOX_DRAWS], sizes, crop.scale, crop.ratio)
        flipped = uniforms[:, -1] < flip.p if flip else None
        return boxes, *_crop_taps(boxes, crop.size, crop.interpolation, flipped, dtype, device)

    def run(images: Tensor, boxes: Tensor, rows: Taps, columns: Taps) -> Tensor:
        return _resample(images, boxes, rows, columns, dtype)

    return Step(BOX_DRAWS + bool(flip), draw, run, crop.size)


def _jitter_step(jitter: v2.ColorJitter) -> Step:
    """Four uniforms whose ranks are the order of the operations, then one for each factor."""
    operations = (brightness, contrast, saturation, hue)
    ranges = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    used = [i for i, bounds in enumerate(ranges) if bounds is not None]  # None: switched off

    def draw(uniforms: Tensor, *_: Any) -> tuple:
        order = uniforms[:, :4].argsort(dim=1)  # (B, position): which operation
        return order, *(_between(uniforms[:, 4 + i], *ranges[i]) for i in used)

    def run(images: Tensor, order: Tensor, *factors: Tensor) -> Tensor:
        for operation in order.unbind(1):  # (B,)
            present = set(operation.tolist())
            for i, operation_factors in zip(used, factors, strict=True):
                if i in present:
                    images = _where(operation == i, images, operations[i], operation_factors)
        return images

    return Step(8, draw, run)


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


# From uniforms to parameters, on the CPU


def _between(uniforms: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * uniforms


def random_boxes(
    uniforms: Tensor, sizes: Tensor, scale: Sequence[float], ratio: Sequence[float]
) -> Tensor:
    """Boxes distributed as RandomResizedCrop's: the first of ten proposals that fits, else central.

    Args:
        uniforms: (B, 22), for ten areas (uniform, scale x the image's), ten aspect ratios
            width / height (log-uniform), and the position from the top and from the left.
        sizes: (B, 2) integers, (height, width) in pixels.

    Returns:
        (B, 4) int64: top, left, height, width.
    """
    areas, aspects, positions = uniforms.double().split([TRIES, TRIES, 2], dim=1)
    areas = _between(areas, *scale) * sizes.prod(1, keepdim=True)
    aspects = _between(aspects, *map(math.log, ratio)).exp()
    # (B, TRIES, 2) heights and widths
    proposals = torch.stack([areas / aspects, areas * aspects], dim=2).sqrt().round()
    fits = ((proposals > 0) & (proposals <= sizes.unsqueeze(1))).all(2)
    first = fits.int().argmax(1)  # the first where several fit

    height, width = sizes.double().unbind(1)
    largest = torch.stack([width / ratio[0], height * ratio[1]], dim=1).round().clamp_min(1)
    any_fits = fits.any(1, keepdim=True)
    proposal = proposals[torch.arange(len(proposals)), first]
    extent = torch.where(any_fits, proposal, largest.minimum(sizes))
    slack = sizes - extent
    corner = torch.where(any_fits, positions * (slack + 1), slack / 2).floor()
    return torch.cat([corner, extent], dim=1).long()


def center_crop_boxes(sizes: Tensor, fraction: float) -> Tensor:
    """Evaluation's square central boxes, of fraction x the short side: (B, 4) int64.

    sizes: (B, 2) integers, (height, width). The side is rounded down and the corner up, as in
    BYOL's official code; with fraction 1.0 the box is the whole of a square image.
    """
    side = (sizes.amin(1, keepdim=True) * fraction).long().clamp_min(1).expand(-1, 2)
    return torch.cat([(sizes - side + 1) // 2, side], dim=1)


# Pixels: (B, C, H, W) in, (B, C, h, w) out; the parameters are (B, ...) tensors on the CPU


def to_float(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A copy in `dtype`; uint8 is scaled to [0, 1]."""
    floats = images.to(dtype, copy=True)
    return floats if images.is_floating_point() else floats.div_(torch.iinfo(images.dtype).max)


def brightness(images: Tensor, factors: Tensor) -> Tensor:
    """factor x image, clipped to [0, 1]; factors: (B,)."""
    return images.mul(_per_image(factors, images)).clamp_(0, 1)


def contrast(images: Tensor, factors: Tensor) -> Tensor:
    """Blend with the mean of the image's gray version, clipped to [0, 1]; factors: (B,)."""
    factors = _per_image(factors, images)
    mean = _gray(images.mean((2, 3), keepdim=True))
    return images.mul(factors).add_(mean.mul_(1 - factors)).clamp_(0, 1)


def saturation(images: Tensor, factors: Tensor) -> Tensor:
    """Blend with the image's gray version, clipped to [0, 1]; factors: (B,)."""
    return torch.lerp(_gray(images), images, _per_image(factors, images)).clamp_(0, 1)


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
    # Masks of 0 and 1 choose exactly, and ten times as fast as `torch.where`.
    sixths = torch.lerp(green - blue, if_green.lerp_(if_blue, not_green), not_red)
    angle = sixths.div_(6 * spread.clamp_min(torch.finfo(images.dtype).tiny))
    angle += _per_image(turns, images)
    opposite = _like(torch.tensor([3, 5, 1]).view(3, 1, 1), images)
    distance = angle - opposite / 6
    distance = distance.sub_(distance.round()).abs_()  # in turns, at most a half
    return torch.addcmul(high, torch.rsub(distance, 2, alpha=6).clamp_(0, 1), spread, value=-1)


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
    """Gaussian blur with reflected borders.

    Args:
        images: (B, C, H, W), floating point.
        kernel_size: odd numbers of taps, (horizontal, vertical).
        sigmas: (B,) on the CPU, in pixels.

    Raises:
        ValueError: the images are too small to be reflected.
    """
    radii = [taps // 2 for taps in kernel_size]
    for size, radius, taps in zip(images.shape[:1:-1], radii, kernel_size, strict=True):
        if size <= radius:
            raise ViewError(
                f"{size} pixels cannot be blurred with {taps} taps: reflection needs more"
            )
    sizes = reversed(images.shape[2:])  # (W, H), as `kernel_size` has it
    columns, rows = (
        _blur_taps(sigmas, radius, size, images) for radius, size in zip(radii, sizes, strict=True)
    )
    return _separable(images, rows, columns)


def resized_crop(
    images: Tensor,
    boxes: Tensor,
    size: Sequence[int],
    interpolation: InterpolationMode | str,
    flip: Tensor | None = None,
) -> Tensor:
    """One box of each image, resized with antialiasing, and mirrored where `flip` is true.

    Pixels outside the boxes have no influence. Bicubic results may leave [0, 1]: clamp them where
    that matters.

    Args:
        images: (B, C, H, W), floating point (see `to_float`).
        boxes: (B, 4) integers on the CPU: top, left, height, width in pixels.
        size: (h, w).
        interpolation: bilinear or bicubic.
        flip: (B,) bool on the CPU; None mirrors no image.

    Returns:
        (B, C, h, w) in the images' dtype.

    Raises:
        ValueError: a box is empty or leaves the canvas.
    """
    corner, extent = boxes.split(2, dim=1)
    canvas = torch.tensor(images.shape[-2:])
    if bool((corner < 0).any() | (extent < 1).any() | (corner + extent > canvas).any()):
        raise ValueError(f"boxes must be non-empty and inside the {tuple(canvas.tolist())} canvas")
    taps = _crop_taps(boxes, size, interpolation, flip, images.dtype, images.device)
    result = images.new_empty(*images.shape[:2], *size)
    for part, chunk in _chunks(images, images.dtype):
        rows, columns = _take(taps, part)
        result[part] = _resample(chunk, boxes[part], rows, columns, images.dtype)
    return result


def _gray(images: Tensor) -> Tensor:
    """Luma with torchvision's weights: (B, 1, H, W)."""
    red, green, blue = images.split(1, dim=1)
    return red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)


# Crop and blur: weighted sums along the rows and along the columns


class Taps(NamedTuple):
    """The weighted input pixels that make each of `size` output pixels along one dimension."""

    inputs: Tensor  # (B, size, taps) int64, the places of the pixels
    weights: Tensor  # (B, size, taps), zero where a place only fills up


def _separable(images: Tensor, rows: Taps, columns: Taps) -> Tensor:
    """(B, C, H, W) to (B, C, h, w), contiguous: down the columns first, then along the rows."""
    pixels = images.permute(0, 2, 3, 1)
    if pixels.is_contiguous():  # as decoding leaves them
        lower = _weighted_sums(pixels.flatten(2).unsqueeze(1), rows)  # (B, 1, h, W C)
        lower = lower.unflatten(3, pixels.shape[2:]).squeeze(1).permute(0, 3, 2, 1)
    else:
        lower = _weighted_sums(images, rows).mT  # (B, C, W, h)
    return _weighted_sums(lower, columns).mT.contiguous()


def _weighted_sums(images: Tensor, taps: Taps) -> Tensor:
    """(B, C, H, N) to (B, C, h, N): each row of an output is a weighted sum of rows of its image.

    That is what an embedding bag does, with the rows of all images as its table: four times as fast
    as products with the mostly empty matrices of these weights.
    """
    batch, channels, height, _ = images.shape
    planes = torch.arange(batch * channels, device=images.device).view(batch, channels, 1, 1)
    index = taps.inputs.unsqueeze(1) + planes * height  # (B, C, h, taps)
    weights = taps.weights.unsqueeze(1).expand_as(index)
    sums = embedding_bag(
        index.flatten(0, 2),
        images.flatten(0, 2),
        mode="sum",
        per_sample_weights=weights.flatten(0, 2),
    )
    return sums.unflatten(0, (batch, channels, -1))


def _resample(
    images: Tensor, boxes: Tensor, rows: Taps, columns: Taps, dtype: torch.dtype
) -> Tensor:
    """Filter the images in `dtype`; of large ones only the pixels in a box are converted."""
    if not images.is_floating_point():  # scaled to [0, 1] by the weights, which are fewer
        rows = rows._replace(weights=rows.weights / torch.iinfo(images.dtype).max)
    if not _large(images):
        return _separable(images.to(dtype), rows, columns)
    top, left = boxes[:, :2].amin(0).tolist()
    bottom, right = (boxes[:, :2] + boxes[:, 2:]).amax(0).tolist()
    window = images[:, :, top:bottom, left:right].to(dtype)
    rows, columns = (
        taps._replace(inputs=taps.inputs - start) for taps, start in ((rows, top), (columns, left))
    )
    return _separable(window, rows, columns)


def _crop_taps(
    boxes: Tensor,
    size: Sequence[int],
    interpolation: InterpolationMode | str,
    flip: Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Taps, Taps]:
    """Of the rows and of the columns, on the device, from (B, 4) boxes on the CPU."""
    top, left, height, width = boxes.unbind(1)
    rows = _resize_taps(top, height, size[0], interpolation, None, dtype, device)
    columns = _resize_taps(left, width, size[1], interpolation, flip, dtype, device)
    return rows, columns


def _resize_taps(
    starts: Tensor,
    lengths: Tensor,
    size: int,
    interpolation: InterpolationMode | str,
    flip: Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Taps:
    """PyTorch's antialiased resize of [start, start + length) along one dimension.

    It computes in the images' dtype and in PyTorch's order of operations: in float32 the rounding
    of a centre moves pixels by 1e-5.
    """
    kernel, radius = _KERNELS[InterpolationMode(interpolation)]
    taps = 2 * math.ceil(radius * max([size, *lengths.tolist()]) / size) + 1
    lengths = lengths.to(dtype)
    scale = lengths / size  # here, as a GPU divides by a number less exactly
    starts, lengths, scale = (send(x, device).view(-1, 1, 1) for x in (starts, lengths, scale))
    outputs = torch.arange(size, device=device).view(1, -1, 1)
    if flip is not None:
        outputs = torch.where(send(flip, device).view(-1, 1, 1), size - 1 - outputs, outputs)
    stretch = scale.clamp_min(1)  # (B, 1, 1)
    centers = scale * (outputs + 0.5)  # (B, size, 1)
    first = (centers - radius * stretch + 0.5).floor_().clamp_(min=0)
    inputs = first + torch.arange(taps, device=device)  # (B, size, taps)
    weights = kernel((inputs - centers).add_(0.5).mul_(1 / stretch).abs_())
    weights.masked_fill_(inputs >= lengths, 0)
    # Summed in order: how many taps are zero, which the other images decide, then changes no bit.
    weights.div_(weights.cumsum(2)[..., -1:])
    return Taps(inputs.minimum(lengths - 1).long() + starts, weights)


def _triangle(distances: Tensor) -> Tensor:
    return (1 - distances).clamp_(min=0)


def _cubic(distances: Tensor) -> Tensor:
    """Keys' cubic convolution with a = -1/2, as in PIL and in PyTorch's antialiased bicubic."""
    a, x = -0.5, distances
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1, near, far).masked_fill_(x >= 2, 0)


_KERNELS = {  # each with its radius, in pixels of the coarser grid
    InterpolationMode.BILINEAR: (_triangle, 1),
    InterpolationMode.BICUBIC: (_cubic, 2),
}


def _blur_taps(sigmas: Tensor, radius: int, size: int, images: Tensor) -> Taps:
    """Gaussian windows, for images that are reflected at their borders."""
    offsets = torch.arange(-radius, radius + 1)
    windows = (-0.5 * (offsets / sigmas.double().unsqueeze(1)) ** 2).softmax(1)  # (B, taps)
    index = torch.arange(size, device=images.device).unsqueeze(1) + send(offsets, images.device)
    index = (size - 1) - ((size - 1) - index.abs_()).abs_()
    weights = _like(windows, images).unsqueeze(1)  # the same for all pixels
    shape = len(sigmas), size, len(offsets)
    return Taps(index.expand(shape), weights.expand(shape))


# Chosen images, and devices


def _where(chosen: Tensor, images: Tensor, operation: Callable, *parameters: Any) -> Tensor:
    """operation(images, *parameters) for the chosen images, in place; chosen: (B,) bool, CPU."""
    if len(chosen) == 1:  # sooner told
        return operation(images, *parameters) if chosen else images
    index = chosen.nonzero().squeeze(1)
    if len(index) == 0:
        return images
    if len(index) == len(images):
        return operation(images, *parameters)
    device_index = send(index, images.device)
    part = operation(images.index_select(0, device_index), *_take(parameters, index))
    return images.index_copy_(0, device_index, part)


def _per_image(values: Tensor, images: Tensor) -> Tensor:
    """(B,) on the CPU to (B, 1, 1, 1), in the images' dtype and on their device."""
    return _like(values, images).view(-1, 1, 1, 1)


def _like(values: Tensor, images: Tensor) -> Tensor:
    return send(values.to(images.dtype), images.device)


def send(values: Tensor, device: torch.device) -> Tensor:
    """Copy to the device without waiting for it, which requires pinned memory."""
    values = values.contiguous().pin_memory() if device.type == "cuda" else values
    return values.to(device, non_blocking=True)
