"""Features of a whole split: each image once, without augmentation."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from tqdm import tqdm

from common.augment import center_crop_boxes, normalize, resized_crop, to_float
from common.data import Batch, Images
from eval.encoder import Input


def prepare(batch: Batch, given: Input, device: torch.device | str) -> Tensor:
    """(B, 3, size, size) float32: the central crop, resized and normalised as `given` says."""
    boxes = center_crop_boxes(batch.sizes, given.crop)
    mode = InterpolationMode(given.interpolation)
    images = to_float(batch.images.to(device))
    images = resized_crop(images, boxes, (given.size, given.size), mode).clamp_(0, 1)
    return normalize(images, given.mean, given.std) if given.mean and given.std else images


@torch.inference_mode()
def extract(
    network: nn.Module,
    images: Images,
    given: Input,
    device: torch.device | str = "cpu",
    *,
    batch_size: int = 256,
    workers: int = 2,
    memory_gb: float = 4.0,
    progress: bool = True,
) -> tuple[Tensor, Tensor]:
    """(N, F) float32 features and (N,) labels of a labelled split, on the CPU.

    The network must be in evaluation mode. Undecodable images are left out.
    """
    assert not network.training and images.labels is not None
    images.into_memory(memory_gb)
    dtype = next((p.dtype for p in network.parameters()), torch.float32)
    features, kept = [], []
    for batch in tqdm(
        images.batches(chunks(len(images), batch_size), workers),
        total=-(-len(images) // batch_size),
        desc=f"features of {images.name}",
        disable=None if progress else True,  # None: only where someone looks at a terminal
        leave=False,
    ):
        views = prepare(batch, given, device).to(dtype)
        features.append(network(views).float().cpu())
        kept.append(batch.indices)
    index = torch.cat(kept)
    own = index == torch.arange(len(index))  # a bad image's place was taken by another
    return torch.cat(features)[own], images.labels[own]


def chunks(count: int, size: int) -> Iterator[Tensor]:
    yield from torch.arange(count).split(size)
