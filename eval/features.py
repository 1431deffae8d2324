"""Features of a whole split: each image once, without augmentation, and cached on the disk."""

import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from tqdm import tqdm

from common.augment import center_crop_boxes, normalize, resized_crop, to_float
from common.data import Batch, ImageSplit
from common.files import atomic_write
from eval.encoder import Preprocess


def prepare(batch: Batch, preprocess: Preprocess, device: torch.device | str) -> Tensor:
    """(B, 3, size, size) float32: the central crop, resized and normalised as `preprocess` says."""
    boxes = center_crop_boxes(batch.sizes, preprocess.crop)
    mode = InterpolationMode(preprocess.interpolation)
    images = to_float(batch.images.to(device))
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
    batch_size: int = 256,
    workers: int = 2,
    memory_gb: float = 4.0,
    progress: bool = True,
) -> tuple[Tensor, Tensor]:
    """(N, F) float32 features and the (N,) indices of their images in the split, on the CPU.

    The network must be in evaluation mode. Undecodable images are left out.
    """
    assert not network.training
    images.into_memory(memory_gb)
    dtype = next((p.dtype for p in network.parameters()), torch.float32)
    features, indices = [], []
    for batch in tqdm(
        images.batches(chunks(len(images), batch_size), workers),
        total=-(-len(images) // batch_size),
        desc=f"features of {images.name}",
        disable=None if progress else True,  # None: shown on a terminal only
        leave=False,
    ):
        views = prepare(batch, preprocess, device).to(dtype)
        features.append(network(views).float().cpu())
        indices.append(batch.indices)
    index = torch.cat(indices)
    decoded = index == torch.arange(len(index))  # another image replaces one that cannot be decoded
    return torch.cat(features)[decoded], index[decoded]


def chunks(count: int, size: int) -> Iterator[Tensor]:
    yield from torch.arange(count).split(size)


# ---- the cache on the disk -----------------------------------------------------------------------


def cached(
    folder: Path | None, key: str, compute: Callable[[], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """The (N, F) features and (N,) indices that `compute` returns, from `folder` if they are there.

    A damaged file is reported and computed again. Without a folder nothing is cached.
    """
    if folder is None:
        return compute()
    path = folder / f"{key}.safetensors"
    if path.exists():
        try:
            tensors = load_file(path)
            return tensors["features"], tensors["index"]
        except Exception as error:  # cut short or damaged; computed again
            print(f"{path}: cannot be read ({type(error).__name__})", file=sys.stderr)
    features, index = compute()
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as aside:
        save_file({"features": features.contiguous(), "index": index.contiguous()}, aside)
    return features, index


def digest_of(network: nn.Module, preprocess: Preprocess, images: ImageSplit) -> str:
    """A key of all that features depend on: weights, layers, preprocessing, images; but no name."""
    parts = (network, preprocess, fingerprint(network), content_of(images))
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:32]


def content_of(images: ImageSplit) -> str:
    """A digest of the encoded bytes of every image, in order; they are read once.

    For ImageNet that is 140 GB, which takes minutes from a good disk. A file's name, size and time
    would be quicker to read, but different images can share them, and a copy has another time.
    """
    if not images.digest:
        digest = hashlib.sha256()

        def digest_at(i: int) -> bytes:
            return hashlib.sha256(content(images.encoded[i])).digest()

        bar = tqdm(
            total=len(images), desc=f"reading {images.name}", disable=None, leave=False, delay=2
        )
        with bar, ThreadPoolExecutor(os.cpu_count()) as pool:
            for part in chunks(len(images), 1024):
                for of_image in pool.map(digest_at, part.tolist()):
                    digest.update(of_image)
                bar.update(len(part))
        images.digest = digest.hexdigest()
    return images.digest


def content(image: Any) -> bytes:
    """The bytes of an encoded image; empty where there is no such file, which is left out later."""
    if isinstance(image, Tensor):
        return f"{tuple(image.shape)}".encode() + image.contiguous().numpy().tobytes()
    if isinstance(image, dict):
        if image.get("bytes"):
            return image["bytes"]
        image = image["path"]
    try:  # reading a FIFO would wait forever
        return Path(image).read_bytes() if image and os.path.isfile(image) else b""
    except OSError:
        return b""


def fingerprint(network: nn.Module) -> str:
    """A digest of every parameter and buffer, which a frozen encoder must not change."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
