"""Features of a whole split: each image once, without augmentation, and kept on the disk."""

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
from common.data import Batch, Images
from common.run import written_aside
from eval.encoder import Input


def prepare(batch: Batch, given: Input, device: torch.device | str) -> Tensor:
    """(B, 3, size, size) float32: the central crop, resized and normalised as `given` says."""
    boxes = center_crop_boxes(batch.sizes, given.crop)
    mode = InterpolationMode(given.interpolation)
    images = to_float(batch.images.to(device))
    images = resized_crop(images, boxes, (given.size, given.size), mode).clamp_(0, 1)
    return normalize(images, given.mean, given.std) if given.mean and given.std else images


def extract(
    network: nn.Module,
    images: Images,
    given: Input,
    device: torch.device | str = "cpu",
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """(N, F) features and (N,) labels of a labelled split, on the CPU; options as of `encode`."""
    assert images.labels is not None
    features, index = encode(network, images, given, device, **options)
    return features, images.labels[index]


@torch.inference_mode()
def encode(
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
    """(N, F) float32 features and (N,) places in the split that they are of, on the CPU.

    The network must be in evaluation mode. Undecodable images are left out.
    """
    assert not network.training
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
    return torch.cat(features)[own], index[own]


def chunks(count: int, size: int) -> Iterator[Tensor]:
    yield from torch.arange(count).split(size)


# ---- kept on the disk ----------------------------------------------------------------------------


def kept(
    folder: Path | None, key: str, compute: Callable[[], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """What `compute` gives, (N, F) features and (N,) places, read from `folder` if it is there.

    A damaged file is said and computed again. Without a folder nothing is kept.
    """
    if folder is None:
        return compute()
    path = folder / f"{key}.safetensors"
    if path.exists():
        try:
            tensors = load_file(path)
            return tensors["features"], tensors["index"]
        except Exception as error:  # torn or damaged
            print(f"{path}: cannot be read ({type(error).__name__}); again", file=sys.stderr)
    features, index = compute()
    folder.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside:
        save_file({"features": features.contiguous(), "index": index.contiguous()}, aside)
    return features, index


def digest_of(network: nn.Module, given: Input, images: Images) -> str:
    """A key of all that features depend on: tensors, layers, input and images, but no name."""
    parts = (network, given, fingerprint(network), content_of(images))
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:32]


def content_of(images: Images) -> str:
    """A digest of the encoded bytes of every image, in order; they are read once.

    Of ImageNet that is 140 GB, minutes from a good disk. A name, a size and a time of change are
    quicker to ask for, but other images may have the same ones, and images that moved have others.
    """
    if not images.digest:
        digest = hashlib.sha256()

        def of(i: int) -> bytes:
            return hashlib.sha256(content(images.encoded[i])).digest()

        bar = tqdm(
            total=len(images), desc=f"reading {images.name}", disable=None, leave=False, delay=2
        )
        with bar, ThreadPoolExecutor(os.cpu_count()) as pool:
            for part in chunks(len(images), 1024):
                for each in pool.map(of, part.tolist()):
                    digest.update(each)
                bar.update(len(part))
        images.digest = digest.hexdigest()
    return images.digest


def content(image: Any) -> bytes:
    """The bytes of an encoded image; none of what is no file and will be left out."""
    if isinstance(image, Tensor):
        return f"{tuple(image.shape)}".encode() + image.contiguous().numpy().tobytes()
    if isinstance(image, dict):
        if image.get("bytes"):
            return image["bytes"]
        image = image["path"]
    try:  # a FIFO would be waited for
        return Path(image).read_bytes() if image and os.path.isfile(image) else b""
    except OSError:
        return b""


def fingerprint(network: nn.Module) -> str:
    """A digest of every parameter and buffer: equal before and after, or the probe is not one."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
