"""Telling whether two sets of images are the same without reading them.

A folder is its images' relative names and sizes, in order; a table the names and sizes of its files
and the last mebibyte of each, where Parquet keeps its footer. ImageNet's 1.28 million files take
seconds so, where reading 140 GB takes minutes.

A file that was rewritten with as many bytes under its name is therefore not noticed, unless its
time of change is asked for, or its bytes.
"""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset
from tqdm import tqdm

from common.data import Cells, ImageSplit
from common.plan import stats
from common.tables import tail


def identity_of(images: ImageSplit, *, times: bool = False, content: bool = False) -> str:
    """A digest of the images of a split, in order; equal for a copy elsewhere.

    Args:
        times: also of the files' times of change, which a copy may not keep.
        content: of all bytes instead, which are read, once.
    """
    key = "content" if content else f"times {times}"
    if key not in images.digests:
        parts = contents(images) if content else traits(images.encoded, times)
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part if isinstance(part, bytes) else repr(part).encode())
        images.digests[key] = digest.hexdigest()
    return images.digests[key]


def traits(encoded: Any, times: bool) -> Iterator[Any]:
    """What tells sets of encoded images apart at a glance."""
    if isinstance(encoded, Subset):
        yield from traits(encoded.dataset, times)
        yield torch.tensor(encoded.indices).numpy().tobytes()
    elif isinstance(encoded, Tensor):
        yield content_of(encoded)
    elif isinstance(encoded, Cells):
        yield encoded.column, len(encoded)
        for path, about in stats([str(file) for file in encoded.files], times):
            yield os.path.basename(path), about, tail(path)
    elif all(isinstance(path, str) for path in encoded):
        root = os.path.commonpath(encoded) if len(encoded) > 1 else os.path.dirname(encoded[0])
        start = os.path.join(root, "")
        for path, about in stats(encoded, times):
            below = path[len(start) :] if path.startswith(start) else os.path.relpath(path, root)
            yield below, about
    else:
        yield from map(content_of, encoded)


def contents(images: ImageSplit) -> Iterator[bytes]:
    """A digest of the encoded bytes of each image."""

    def digest_at(i: int) -> bytes:
        return hashlib.sha256(content_of(images.encoded[i])).digest()

    bar = tqdm(total=len(images), desc=f"reading {images.name}", disable=None, leave=False, delay=2)
    with bar, ThreadPoolExecutor(os.cpu_count()) as pool:
        for part in torch.arange(len(images)).split(1024):
            yield from pool.map(digest_at, part.tolist())
            bar.update(len(part))


def content_of(image: Any) -> bytes:
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
