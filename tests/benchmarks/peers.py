"""A whole SimCLR training as a user of lightly, or of torchvision alone, writes it; for job.py.

    python tests/benchmarks/peers.py lightly IMAGES OUT

From class folders of image files to an encoder in a file. It prints a line of JSON: steps, and
seconds from when the first batch is asked for to the last update. Nothing of the
project but `sides.py` is imported, and lightly by its side alone: no side waits for what it does
not use.
"""

import argparse
import json
import math
import time

import sides
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.models import resnet18
from torchvision.transforms import v2

SIZE = 32  # pixels
WORKERS = torch.get_num_threads()  # lightly's example has 8, slower than two on two cores


def lightly(o: argparse.Namespace) -> tuple[nn.Module, dict, int, float]:
    """The SimCLR example of lightly's documentation: its views, head, loss, optimiser and loop.

    It trains on a folder here, by `LightlyDataset`, where the example names both that and CIFAR-10.
    """
    from lightly.data import LightlyDataset
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    from lightly.transforms import SimCLRTransform
    from lightly.transforms.utils import IMAGENET_NORMALIZE

    encoder = sides.encoder(resnet18, cifar=False).to(sides.DEVICE)
    head = SimCLRProjectionHead(512, 512, 128).to(sides.DEVICE)
    transform = SimCLRTransform(input_size=SIZE, gaussian_blur=0.0)  # normalises as ImageNet's
    loader = DataLoader(
        LightlyDataset(o.images, transform=transform),
        batch_size=o.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=WORKERS,
    )
    criterion = NTXentLoss()  # temperature 0.5
    optimizer = torch.optim.SGD([*encoder.parameters(), *head.parameters()], lr=0.06)
    began = time.perf_counter()
    for _ in range(o.epochs):
        for (view1, view2), _, _ in loader:
            z1 = head(encoder(view1.to(sides.DEVICE)))
            z2 = head(encoder(view2.to(sides.DEVICE)))
            criterion(z1, z2).backward()
            optimizer.step()
            optimizer.zero_grad()
    seconds = time.perf_counter() - began
    return encoder, dict(IMAGENET_NORMALIZE), o.epochs * len(loader), seconds


def plain(o: argparse.Namespace) -> tuple[nn.Module, dict, int, float]:
    """What a careful user writes by hand: torchvision's transforms, and workers that live on.

    Settings of the paper's CIFAR-10 (App. B.9 of arXiv 2002.05709) but for the optimiser: SGD with
    a cosine, as in most implementations of one GPU.
    """
    to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    transform = v2.Compose([*sides.composition(SIZE, jitter=0.5, blur=0).transforms, *to_tensor])
    loader = DataLoader(
        ImageFolder(o.images, lambda image: (transform(image), transform(image))),
        batch_size=o.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=WORKERS,
        persistent_workers=True,
        pin_memory=sides.DEVICE == "cuda",
    )
    layers = [nn.Linear(512, 512, bias=False), nn.BatchNorm1d(512), nn.ReLU()]
    head = nn.Sequential(*layers, nn.Linear(512, 128, bias=False), nn.BatchNorm1d(128))
    model = sides.TwoViews(sides.encoder(resnet18, cifar=False), head).to(sides.DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    steps = o.epochs * len(loader)
    began = time.perf_counter()
    step = 0
    for _ in range(o.epochs):
        for (view1, view2), _ in loader:
            for group in optimizer.param_groups:
                group["lr"] = 0.05 * (1 + math.cos(math.pi * step / steps))
            nt_xent(*model(view1.to(sides.DEVICE), view2.to(sides.DEVICE))).backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    return model.encoder, {}, steps, time.perf_counter() - began


def nt_xent(z1: Tensor, z2: Tensor, temperature: float = 0.5) -> Tensor:
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    logits = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(z1)))


PEERS = {"lightly": lightly, "plain": plain}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("side", choices=PEERS)
    parser.add_argument("images", help="a folder with class folders of image files")
    parser.add_argument("out", help="file for the encoder, .safetensors")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    encoder, normalised, steps, seconds = PEERS[options.side](options)
    # what `load_encoder` of eval/encoder.py reads, so that all sides are judged by the same code
    about = {"encoder": "resnet18", "input": {"size": SIZE, "crop": 1.0, **normalised}}
    tensors = {key: value.cpu() for key, value in encoder.state_dict().items()}
    save_file(tensors, options.out, {key: json.dumps(value) for key, value in about.items()})
    print(json.dumps({"steps": steps, "seconds": seconds}))


if __name__ == "__main__":
    main()
