"""What is timed, on three sides: ours, lightly's and a plain torchvision and DataLoader loop.

Each side is a function that returns its rows, name to a callable that does one round of `ROWS`'s
amount of work, and describes the view distribution that it runs. Only `ours` imports the project,
only `lightly` lightly. The plain loop is what a careful user writes by hand.
"""

from collections.abc import Callable, Iterable
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models import resnet18, resnet50
from torchvision.transforms import v2

SMALL, LARGE = "32 px: source to batch", "224 px, blur: JPEG to batch"
R18, R50 = "R18, 32 px: training step", "R50, 224 px, bf16: training step"
EMA, PROBE, KNN = "R18: momentum update", "linear probe, 512 features", "kNN, 10,000 features"
ROWS = {  # what a round does, counted in the unit of the row
    SMALL: (8192, "pairs"),
    LARGE: (1536, "pairs"),  # workers start with every round; in a run once
    R18: (128, "pairs"),
    R50: (256, "pairs"),
    EMA: (40, "updates"),
    PROBE: (400, "steps"),
    KNN: (2000, "queries"),
}
BATCH = {SMALL: 256, LARGE: 32, R18: 32, R50: 128}
WORKERS = 2
CLASSES, FEATURES, BANK, NEIGHBOURS, TEMPERATURE = 10, 512, 10_000, 200, 0.1
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Rows = dict[str, Callable[[], object]]
VIEWS = {  # of App. A of arXiv 2002.05709, bilinear as lightly has it
    SMALL: {"size": 32, "jitter": 0.5, "blur": 0.0},
    LARGE: {"size": 224, "jitter": 1.0, "blur": 0.5},
}


def description(size: int, jitter: float, blur: float) -> list:
    """The operations in order, with their probabilities and ranges."""
    strength = [0.8 * jitter, 0.8 * jitter, 0.8 * jitter, 0.2 * jitter]
    return [
        ["RandomResizedCrop", size, [0.08, 1.0], [3 / 4, 4 / 3], "bilinear"],
        ["RandomHorizontalFlip", 0.5],
        ["ColorJitter", 0.8, [[max(0, 1 - s), 1 + s] for s in strength[:3]], strength[3]],
        ["RandomGrayscale", 0.2],
        *([["GaussianBlur", blur, [0.1, 2.0]]] if blur else []),
    ]


def described(steps: Iterable) -> list:
    """The same list, read off a built composition of torchvision's or lightly's transforms."""
    found: list = []
    for step in steps:
        name, inner = type(step).__name__, getattr(step, "transforms", [None])[0]
        if name == "RandomResizedCrop":
            size = step.size[0] if isinstance(step.size, (tuple, list)) else step.size
            mode = v2.InterpolationMode(step.interpolation).value
            found.append([name, size, list(step.scale), list(step.ratio), mode])
        elif name == "RandomApply" and type(inner).__name__ == "ColorJitter":
            ranges = [list(r) for r in (inner.brightness, inner.contrast, inner.saturation)]
            found.append(["ColorJitter", step.p, ranges, inner.hue[1]])
        elif name == "RandomApply" and type(inner).__name__ == "GaussianBlur":
            found.append(["GaussianBlur", step.p, list(inner.sigma)])
        elif name == "GaussianBlur":  # lightly's own
            found += [[name, step.prob, list(step.sigmas)]] if step.prob else []
        elif name in ("RandomHorizontalFlip", "RandomGrayscale"):
            found.append([name, step.p])
        elif name not in ("ToTensor", "ToImage", "ToDtype") and chance(step):
            raise ValueError(f"{name} is no operation of the comparison")
    return found


def chance(step: object) -> float:
    """A probability of 0 switches an operation off; without one it is always done."""
    return getattr(step, "p", getattr(step, "prob", 1.0))


def composition(size: int, jitter: float, blur: float) -> v2.Compose:
    """The views as one composes them in torchvision; `to float` stands first or last."""
    colour = v2.ColorJitter(0.8 * jitter, 0.8 * jitter, 0.8 * jitter, 0.2 * jitter)
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([colour], p=0.8),
            v2.RandomGrayscale(0.2),
            *([v2.RandomApply([v2.GaussianBlur(23, (0.1, 2.0))], p=blur)] if blur else []),
        ]
    )


class Photographs(Dataset):
    """Arrays or paths of JPEG files, as PIL images to a transform: what torchvision's sets do."""

    def __init__(self, images: list, transform: Callable) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> object:
        image = self.images[index]
        if isinstance(image, str):
            return self.transform(Image.open(image).convert("RGB"))
        return self.transform(Image.fromarray(image))


def load(folder: Path) -> dict[str, list]:
    """The images of the two loading rows, as the benchmark has laid them down."""
    arrays = np.load(folder / "small.npy")  # (N, 32, 32, 3)
    return {SMALL: list(arrays), LARGE: (folder / "large.txt").read_text().split("\n")}


def loading(images: dict[str, list], transforms: dict[str, Callable]) -> Rows:
    """Rounds of a DataLoader whose workers live on from round to round."""
    rows: Rows = {}
    for row, transform in transforms.items():
        loader = DataLoader(
            Photographs(images[row], transform),
            batch_size=BATCH[row],
            shuffle=True,
            num_workers=WORKERS,
            persistent_workers=True,
            pin_memory=DEVICE == "cuda",
        )

        def one_pass(loader: DataLoader = loader) -> None:
            for views in loader:
                for view in views:
                    view.to(DEVICE, non_blocking=True)

        rows[row] = one_pass
    return rows


def encoder(arch: Callable, cifar: bool) -> nn.Module:
    network = arch()
    network.fc = nn.Identity()
    if cifar:
        network.conv1, network.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return network


def training(build: Callable[[str], tuple[nn.Module, Callable, torch.optim.Optimizer]]) -> Rows:
    """Forward, loss, backward and optimizer step on given views: `build` makes a row's parts."""
    rows: Rows = {}
    for row in (R18, R50) if DEVICE == "cuda" else (R18,):
        model, loss, optimizer = build(row)
        views = torch.rand(2, BATCH[row], 3, *[32 if row == R18 else 224] * 2, device=DEVICE)

        def steps(row=row, model=model, loss=loss, optimizer=optimizer, views=views) -> None:
            for _ in range(ROWS[row][0] // BATCH[row]):
                with torch.autocast(DEVICE, torch.bfloat16, enabled=row == R50):
                    outputs = model(*views)
                loss(*outputs).backward()
                optimizer.step()
                optimizer.zero_grad()

        rows[row] = steps
    return rows


def features(count: int) -> tuple[Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (count,), generator=drawn)
    return torch.randn(count, FEATURES, generator=drawn).to(DEVICE), labels.to(DEVICE)


def repeat(row: str, function: Callable[[], object]) -> Callable[[], None]:
    def rounds() -> None:
        for _ in range(ROWS[row][0]):
            function()

    return rounds


# ---- the sides -----------------------------------------------------------------------------------


def ours(folder: Path) -> tuple[dict[str, list], Rows]:
    from byol.model import Online, Target, ema_
    from common import encoders
    from common.data import ImageSplit
    from common.launch import launch
    from common.views import ViewPairs
    from eval.knn import predict
    from eval.linear import MOCO, Probe, optimizer_of
    from eval.training import total_loss
    from simclr.config import CIFAR10, IMAGENET_100
    from simclr.loss import nt_xent
    from simclr.model import SimCLR
    from simclr.optim import lars

    launch("fp32")  # as every command begins
    images = load(folder)
    arrays = torch.from_numpy(np.stack(images[SMALL])).permute(0, 3, 1, 2).contiguous()
    sources = {
        SMALL: ImageSplit("small", arrays, store=arrays),
        LARGE: ImageSplit("large", images[LARGE]),
    }
    rows: Rows = {}
    views = {}
    to_float = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    for row, settings in VIEWS.items():
        transform = v2.Compose([*to_float, *composition(**settings).transforms])
        views[row] = described(transform.transforms)
        pairs = ViewPairs(
            sources[row],
            (transform, transform),
            batch_size=BATCH[row],
            seed=1,
            device=DEVICE,
            workers=WORKERS,
        )
        rows[row] = lambda pairs=pairs, row=row: sum(
            1 for _ in pairs(0, ROWS[row][0] // BATCH[row])
        )

    def build(row: str) -> tuple:
        cfg = CIFAR10 if row == R18 else IMAGENET_100
        network = encoders.build(encoders.full_name(cfg.arch, cfg.stem))
        model = SimCLR(network, cfg.head_layers, cfg.head_dim)
        model.to(DEVICE, memory_format=torch.channels_last)
        return model, lambda z1, z2: nt_xent(z1, z2, cfg.temperature)[0], lars(model, cfg)

    rows |= training(build)
    online = Online(encoders.build("resnet18-cifar")).to(DEVICE)
    target = Target(online)
    rows[EMA] = repeat(EMA, lambda: ema_(target, online, 0.99))
    batch, labels = features(512)
    probe = Probe(FEATURES, CLASSES, MOCO).to(DEVICE)
    optimizer = optimizer_of(probe, MOCO)

    def probe_step() -> None:  # of eval.training's loop
        optimizer.zero_grad()
        (total_loss(probe(batch), labels) / len(batch)).backward()
        optimizer.step()

    rows[PROBE] = repeat(PROBE, probe_step)
    bank, bank_labels = features(BANK)
    queries = features(ROWS[KNN][0])[0]
    rows[KNN] = lambda: predict(
        queries, bank, bank_labels, classes=CLASSES, k=NEIGHBOURS, temperature=TEMPERATURE
    )
    return views, rows


class TwoViews(nn.Module):
    """An encoder and a head on both views at once, the SimCLR of the two peers."""

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, view1: Tensor, view2: Tensor) -> tuple[Tensor, ...]:
        return self.head(self.encoder(torch.cat([view1, view2]))).chunk(2)


def byol_pair() -> tuple[nn.Module, nn.Module]:
    """R18 and BYOL's projector (App. J: 4096 hidden, 256 out), and a copy to be moved."""
    head = nn.Sequential(
        nn.Linear(512, 4096), nn.BatchNorm1d(4096), nn.ReLU(), nn.Linear(4096, 256)
    )
    online = nn.Sequential(encoder(resnet18, cifar=True), head).to(DEVICE)
    return online, deepcopy(online)


def lightly(folder: Path) -> tuple[dict[str, list], Rows]:
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    from lightly.models.utils import update_momentum
    from lightly.transforms import SimCLRTransform
    from lightly.utils.benchmarking import LinearClassifier
    from lightly.utils.benchmarking.knn import knn_predict
    from lightly.utils.lars import LARS

    transforms = {
        row: SimCLRTransform(
            input_size=settings["size"],
            cj_strength=settings["jitter"],
            gaussian_blur=settings["blur"],
            normalize=None,
        )
        for row, settings in VIEWS.items()
    }
    views = {
        row: described(transform.transforms[0].transform.transforms)
        for row, transform in transforms.items()
    }
    rows = loading(load(folder), transforms)

    def build(row: str) -> tuple:
        arch, width = (resnet18, 512) if row == R18 else (resnet50, 2048)
        head = SimCLRProjectionHead(width, width, 128)
        model = TwoViews(encoder(arch, row == R18), head).to(DEVICE)
        optimizer = LARS(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
        return model, NTXentLoss(0.5), optimizer

    rows |= training(build)
    online, target = byol_pair()
    rows[EMA] = repeat(EMA, lambda: update_momentum(online, target, m=0.99))
    batch = features(512)
    linear = LinearClassifier(nn.Identity(), 512, feature_dim=FEATURES, num_classes=CLASSES).to(
        DEVICE
    )
    optimizer = torch.optim.SGD(linear.get_trainable_parameters(), lr=0.1, momentum=0.9)

    def probe() -> None:
        loss, _ = linear.shared_step(batch, 0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    rows[PROBE] = repeat(PROBE, probe)
    (bank, labels), (queries, _) = features(BANK), features(ROWS[KNN][0])
    bank, queries = F.normalize(bank, dim=1).T.contiguous(), F.normalize(queries, dim=1)
    rows[KNN] = lambda: knn_predict(queries, bank, labels, CLASSES, NEIGHBOURS, TEMPERATURE)
    return views, rows


def plain(folder: Path) -> tuple[dict[str, list], Rows]:
    to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    views, transforms = {}, {}
    for row, settings in VIEWS.items():
        transform = v2.Compose([*composition(**settings).transforms, *to_tensor])
        views[row] = described(transform.transforms)
        transforms[row] = lambda image, transform=transform: (transform(image), transform(image))
    rows = loading(load(folder), transforms)

    def loss(z1: Tensor, z2: Tensor) -> Tensor:
        z = F.normalize(torch.cat([z1, z2]).float(), dim=1)
        logits = (z @ z.T / 0.5).fill_diagonal_(-torch.inf)
        return F.cross_entropy(logits, torch.arange(len(z), device=DEVICE).roll(len(z1)))

    def build(row: str) -> tuple:
        arch, width = (resnet18, 512) if row == R18 else (resnet50, 2048)
        layers = [nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
        layers += [nn.Linear(width, 128, bias=False), nn.BatchNorm1d(128)]
        model = TwoViews(encoder(arch, row == R18), nn.Sequential(*layers)).to(DEVICE)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
        return model, loss, optimizer

    rows |= training(build)
    online, target = byol_pair()

    @torch.no_grad()
    def ema() -> None:
        for mine, new in zip(target.parameters(), online.parameters(), strict=True):
            mine.mul_(0.99).add_(new, alpha=0.01)

    rows[EMA] = repeat(EMA, ema)
    batch, labels = features(512)
    linear = nn.Linear(FEATURES, CLASSES, device=DEVICE)
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1, momentum=0.9)

    def probe() -> None:
        F.cross_entropy(linear(batch), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    rows[PROBE] = repeat(PROBE, probe)
    (bank, bank_labels), (queries, _) = features(BANK), features(ROWS[KNN][0])

    def knn() -> Tensor:
        near = (F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T).topk(NEIGHBOURS)
        votes = F.one_hot(bank_labels[near.indices], CLASSES) * near.values.div(
            TEMPERATURE
        ).exp().unsqueeze(2)
        return votes.sum(1).argsort(1, descending=True)

    rows[KNN] = knn
    return views, rows


SIDES = {"ours": ours, "lightly": lightly, "plain": plain}
