"""Features of a whole split: each image once, without augmentation, and cached on the disk."""

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from tqdm import tqdm

from common.augment import center_crop_boxes, normalize, resized_crop, to_float
from common.data import Batch, ImageSplit
from common.files import atomic_write, utf8_name
from eval.encoder import Preprocess
from eval.identity import fingerprint, identity_of
from eval.processes import all_agree, gather, place, share

MEMORY_GB = 4.0  # decode once and keep the pixels if they need less than this


def prepare(
    batch: Batch,
    preprocess: Preprocess,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(B, C, size, size): the central crop, resized and normalised as `preprocess` says."""
    boxes = center_crop_boxes(batch.sizes, preprocess.crop)
    mode = InterpolationMode(preprocess.interpolation)
    images = to_float(batch.images.to(device), dtype)
    images = resized_crop(images, boxes, (preprocess.size, preprocess.size), mode).clamp_(0, 1)
    return (
        normalize(images, preprocess.mean, preprocess.std)
        if preprocess.mean and preprocess.std
        else images
    )


def extract(
    network: nn.Module,
    images: ImageSplit,
    preprocess: Preprocess,
    device: torch.device | str = "cpu",
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """(N, F) features and (N,) labels of a labelled split, on the CPU; options as in `encode`."""
    assert images.labels is not None
    features, index = encode(network, images, preprocess, device, **options)
    return features, images.labels[index]


@torch.inference_mode()
def encode(
    network: nn.Module,
    images: ImageSplit,
    preprocess: Preprocess,
    device: torch.device | str = "cpu",
    *,
    index: Tensor | None = None,
    precision: str = "fp32",
    workers: int = 2,
    memory_gb: float = MEMORY_GB,
    dtype: torch.dtype | None = None,
    batch_size: int = 256,
    accelerator: Accelerator | None = None,
    progress: bool = True,
) -> tuple[Tensor, Tensor]:
    """(N, F) outputs and the (N,) indices of their images in the split, on the CPU.

    The network must be in evaluation mode. Undecodable images are left out. The outputs are
    float32, and float64 where the views are.

    Args:
        index: the images; default: all.
        precision: "bf16" is by autocast.
        dtype: of the views; default: the network's.
        batch_size: of one process.
        accelerator: the processes that share the work, each of which gets all features.
    """
    assert not network.training
    images.into_memory(memory_gb)
    index = torch.arange(len(images)) if index is None else index
    dtype = dtype or next((p.dtype for p in network.parameters()), torch.float32)
    rank, processes = place(accelerator)
    parts = index.split(batch_size * processes)
    shares = [part[share(len(part), rank, processes)] for part in parts]
    bar = tqdm(
        images.batches(shares, workers),
        total=len(parts),
        desc=f"features of {images.name}",
        disable=None if progress and rank == 0 else True,  # None: shown on a terminal only
        leave=False,
    )
    outputs, indices = [], []
    for part, batch in zip(parts, bar, strict=True):
        count = len(batch.indices)
        size = (1, batch.images.shape[1], preprocess.size, preprocess.size)
        views = (
            prepare(batch, preprocess, device, dtype)
            if count
            else torch.zeros(size, dtype=dtype, device=device)
        )
        with autocast(precision, device):
            output = network(views)[:count].to(torch.promote_types(dtype, torch.float32))
        outputs.append(gather(output, len(part), accelerator).cpu())
        indices.append(gather(batch.indices.to(device), len(part), accelerator).cpu())
    found = torch.cat(indices)
    features, decoded = torch.cat(outputs), found == index  # another image replaces a bad one
    return (features, found) if decoded.all() else (features[decoded], found[decoded])


def autocast(precision: str, device: torch.device | str) -> torch.autocast:
    """Convolutions and products in bfloat16 where that is the precision."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")


# ---- the cache on the disk -----------------------------------------------------------------------


def cached(
    folder: Path | None,
    key: str,
    compute: Callable[[], tuple[Tensor, Tensor]],
    accelerator: Accelerator | None = None,
) -> tuple[Tensor, Tensor]:
    """The (N, F) features and (N,) indices that `compute` returns, from `folder` if they are there.

    A damaged file is reported and computed again. Without a folder nothing is cached.
    """
    if folder is None:
        return compute()
    path, found = folder / f"{key}.safetensors", None
    if path.exists():
        try:
            found = load_checked(path)
        except Exception as error:  # cut short or damaged; computed again
            print(f"{path}: cannot be read ({type(error).__name__})", file=sys.stderr)
    if all_agree(found is not None, accelerator) and found:
        return found
    features, index = compute()
    if place(accelerator)[0] == 0:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as aside:
            tensors = {"features": features.contiguous(), "index": index.contiguous()}
            save_file(tensors, aside, metadata={"sha256": sha256_of(*tensors.values())})
    return features, index


def load_checked(path: Path) -> tuple[Tensor, Tensor]:
    """The features and indices in a file of the cache.

    Raises:
        Exception: of any kind, if it is damaged.
    """
    with safe_open(utf8_name(path), framework="pt") as file:
        features, index = file.get_tensor("features"), file.get_tensor("index")
        if file.metadata()["sha256"] != sha256_of(features, index):
            raise ValueError("other bytes than were written")
    return features, index


def sha256_of(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def digest_of(network: nn.Module, preprocess: Preprocess, images: ImageSplit, **how: bool) -> str:
    """A key of all that features depend on: weights, layers, preprocessing, images and how their
    pixels are read; but no name.

    Args:
        how: the images are told apart; see `identity_of`.
    """
    parts = (network, preprocess, fingerprint(network), identity_of(images, **how), images.reading)
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:32]
