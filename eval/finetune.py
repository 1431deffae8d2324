"""Fine-tuning: the whole network and a linear classifier, with labels.

    python -m eval.finetune RUN                                  # the protocol of the run's method
    python -m eval.finetune RUN --label-fraction 0.01            # semi-supervised
    python -m eval.finetune RUN --subset 1percent.txt            # the same, on listed images
    python -m eval.finetune RUN --weights random --epochs 20     # the supervised baseline
    python -m eval.finetune RUN --freeze 5                       # the classifier and the head alone
    accelerate launch --num_processes 8 -m eval.finetune RUN --precision bf16      # on eight GPUs

`simclr`, `simclr-v2` and `byol` are the papers' protocols; MoCo's papers have none, so SimCLR's is
used. All have crop and flip, no weight decay, no warm-up, and a cosine to 0 per step. Where a
protocol has several rates and lengths, all are run, and one is chosen on other labelled images: the
source's validation split, or else training images outside the fraction or the list, or, with all
labels, a tenth that is held out.

BatchNorm is in training mode, except in frozen layers. A batch of more than 256 images is processed
in parts, whose gradients add up to the batch's; BatchNorm sees a part over all processes
(PAPER/CODE: SimCLR v2's sees the whole batch). The supervised baseline is what the same network,
input and views reach when every label is known: the ceiling for a method on that data. Top-1 is
that of the last epoch. A command that was stopped resumes when it is given again.
"""

import copy
import hashlib
import itertools
import math
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from common import cli
from eval.settings import Finetune as Settings

if __name__ == "__main__":  # a mistake is reported before torch is imported
    arguments = cli.run(
        cli.parse_settings, Settings, sys.argv[1:], "python -m eval.finetune", __doc__
    )

import torch
from torch import Tensor, nn

from common.data import ImageSplit, among, generator, subset
from common.errors import UserError
from common.plan import name_of
from eval.batch_norm import globalize
from eval.encoder import Cut, Encoder, load_encoder
from eval.knn import accuracy
from eval.results.record import Result, changed, confidence, record, record_name, settings_of
from eval.splits import to_choose_on
from eval.subjects import Subject, subjects
from eval.training import PART, Order, Speed, train
from eval.unfinished import Unfinished

FEW = 256  # the batch size where images are small or few
ETA = 0.001  # trust coefficient of LARS (arXiv 1708.03888)


@dataclass(frozen=True)
class Protocol:
    """How a network is fine-tuned: SGD with Nesterov momentum 0.9, or LARS."""

    name: str
    rates: tuple[float, ...]  # at batch 256, or at batch 1 with square-root scaling
    epochs: tuple[int, ...]
    batch_size: int
    square_root: bool = False  # the rate grows with the root of the batch, not with the batch
    lars: bool = False
    zero_init: bool = False  # the classifier starts at zeros

    def peak(self, rate: float, size: int) -> float:
        return rate * (math.sqrt(size) if self.square_root else size / 256)


# arXiv 2002.05709 App. B.5; 30 epochs above 1 % of the labels (likewise; of all labels: ours). The
# paper resizes an image to 256 x 256 and cuts out 224 x 224; here 7/8 of the shorter side is cut
# out and resized, as in the official code's `center_crop`.
SIMCLR = Protocol("simclr", rates=(0.05,), epochs=(60, 30), batch_size=4096)
# google-research/simclr README, "Semi-supervised learning and fine-tuning". CODE: the layer of the
# head that is kept is frozen in TF1 and trained in TF2; here it is trained.
SIMCLR_V2 = Protocol(
    "simclr-v2", (0.005,), epochs=(60, 30), batch_size=1024,
    square_root=True, lars=True, zero_init=True,
)  # fmt: skip
# arXiv 2006.07733 App. C.1, which does not say whether the rates follow the batch; CODE's do. Rate
# and length are chosen on other training images than those that are trained on, as there, and what
# was chosen is not trained again.
BYOL = Protocol("byol", (0.01, 0.02, 0.05, 0.1, 0.005), epochs=(30, 50), batch_size=1024)
PROTOCOLS = {"simclr": SIMCLR, "simclr-v2": SIMCLR_V2, "byol": BYOL, "moco": SIMCLR}


def protocol_of(encoder: Encoder, settings: Settings, percent: float) -> Protocol:
    """The protocol asked for, or that of the run's method, with `percent` of the labels.

    The supervised baseline has SimCLR's, whatever the run's method is.
    """
    name = settings.protocol
    if not name and encoder.name == "encoder":
        name = encoder.metadata.get("method", "simclr")
        if name == "simclr" and encoder.metadata.get("head", []).count("Linear") == 3:
            name = "simclr-v2"
    paper = PROTOCOLS.get(name, SIMCLR)
    if paper is not BYOL:
        paper = replace(paper, epochs=paper.epochs[:1] if percent <= 1 else paper.epochs[1:])
    return replace(
        paper,
        rates=(settings.base_lr,) if settings.base_lr else paper.rates,
        epochs=(settings.epochs,) if settings.epochs else paper.epochs,
        batch_size=settings.batch_size or paper.batch_size,
    )


def batch_of(protocol: Protocol, settings: Settings, count: int, size: int) -> int:
    """The batch size for `count` images of `size` pixels; FEW where nothing is published.

    1 % of ImageNet is 12,811 images, three batches of 4096.
    """
    few_or_small = count < 10_000 or size <= 32
    return min(FEW if few_or_small and not settings.batch_size else protocol.batch_size, count)


def layer_of(encoder: Encoder, settings: Settings) -> int:
    """SimCLR v2 starts at the head's first hidden layer, but with all labels at h (README)."""
    is_v2 = protocol_of(encoder, settings, 100).name == "simclr-v2"
    few_labels = settings.label_fraction < 1 or bool(settings.subset)
    return settings.layer if settings.layer is not None else int(is_v2 and few_labels)


# ---- which images, which layers ------------------------------------------------------------------


def choose(images: ImageSplit, fraction: float, subset: str, seed: int) -> Tensor:
    """(N,) bool: the images to train on, named by the file `subset` or drawn from each class.

    Raises:
        UserError: the file cannot be read, or names an image that does not exist.
    """
    assert images.labels is not None
    selected = torch.zeros(len(images), dtype=torch.bool)
    if subset:
        try:
            lines = os.fsdecode(Path(subset).read_bytes()).splitlines()  # names, as paths are
            names = {Path(line.strip()).as_posix() for line in lines if line.strip()}
        except (OSError, ValueError) as error:
            raise UserError(f"--subset {subset}: cannot be read ({error})") from error
        indices = by_name(images, {len(Path(name).parts) for name in names})
        if missing := sorted(names - indices.keys()):
            raise UserError(f"--subset {subset}: {len(missing)} not there, e.g. {missing[0]}")
        if not names:
            raise UserError(f"--subset {subset}: names no image")
        for name in sorted(names):
            if len(indices[name]) > 1:
                raise UserError(
                    f"--subset {subset}: {len(indices[name])} images are called {name}; "
                    "give FOLDER/NAME"
                )
            selected[indices[name]] = True
        return selected
    for c in images.labels.unique().tolist():
        of_class = (images.labels == c).nonzero()[:, 0]
        order = torch.randperm(len(of_class), generator=generator(seed, "labels", c))
        selected[of_class[order[: max(1, round(fraction * len(of_class)))]]] = True
    return selected


def by_name(images: ImageSplit, depths: Iterable[int]) -> dict[str, list[int]]:
    """Indices of the images of each name: the last parts of a path, as many as `depths` contains.

    The official lists have n01440764_10026.JPEG for what the Hub's ImageNet calls
    n01440764_10026_n01440764.JPEG.
    """
    indices: dict[str, list[int]] = {}
    for i in range(len(images)):
        parts = Path(re.sub(r"_n\d{8}(?=\.JPEG$)", "", name_of(images.encoded[i], i))).parts
        for depth in depths:
            indices.setdefault("/".join(parts[-depth:]), []).append(i)
    return indices


def stages(network: nn.Module) -> list[list[nn.Module]]:
    """The layers of an encoder, from the input on: of a ResNet the stem and the four groups."""
    if isinstance(network, Cut):
        return stages(network.encoder)
    if layers := getattr(network, "layers", None):  # the demo's: convolution, BatchNorm, ReLU
        return [list(layers[i : i + 3]) for i in range(0, 12, 3)]
    parts = dict(network.named_children())
    if "layer4" not in parts:
        raise UserError("--freeze: only a ResNet and the demo network have stages")
    return [[parts["conv1"], parts["bn1"]], *([parts[f"layer{i}"]] for i in range(1, 5))]


def freeze(network: nn.Module, count: int) -> None:
    """Freeze the first `count` stages: no gradient, and BatchNorm in evaluation mode.

    Raises:
        UserError: the encoder has fewer.
    """
    if count == 0:
        return
    layers = stages(network)
    if count > len(layers):
        raise UserError(f"--freeze {count}: the encoder has {len(layers)} stages")
    for module in itertools.chain(*layers[:count]):
        module.requires_grad_(False).eval()


# ---- optimiser -----------------------------------------------------------------------------------


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling, as SimCLR v2 fine-tunes. Twin: simclr/optim.py."""

    def __init__(
        self, params: Iterable[Tensor] | Iterable[dict], momentum: float = 0.9, eta: float = ETA
    ) -> None:
        settings = {
            "lr": 0.0,
            "weight_decay": 0.0,
            "lars_adaptation": True,
            "momentum": momentum,
            "eta": eta,
        }
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update. A closure has no use here and is not supported."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if "v" not in self.state[p]:
                    self.state[p]["v"] = torch.zeros_like(p)
            buffers = [self.state[p]["v"] for p in params]
            grads = torch._foreach_add(
                [p.grad for p in params], params, alpha=group["weight_decay"]
            )
            rates = [group["lr"]] * len(params)
            if group["lars_adaptation"]:
                trust = torch.stack(torch._foreach_norm(params)) * group["eta"]
                trust /= torch.stack(torch._foreach_norm(grads))
                trust = torch.where((trust > 0) & trust.isfinite(), trust, 1.0)
                rates = list((trust * group["lr"]).unbind())
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, torch._foreach_mul(grads, rates))
            torch._foreach_sub_(params, buffers)


def optimizer_of(
    model: nn.Sequential, protocol: Protocol, weight_decay: float
) -> torch.optim.Optimizer:
    """The protocol's optimizer; its learning rate is set before every step."""
    params = [p for p in model.parameters() if p.requires_grad]
    if not protocol.lars:
        return torch.optim.SGD(
            params, lr=0.0, momentum=0.9, nesterov=True, weight_decay=weight_decay
        )
    # CODE model_util.py:95-100: neither biases, nor normalisation, nor the classifier are adapted
    unadapted = {id(p) for p in params if p.ndim <= 1} | {id(p) for p in model[1].parameters()}
    groups = [
        {"params": [p for p in params if id(p) not in unadapted], "lars_adaptation": True},
        {"params": [p for p in params if id(p) in unadapted], "lars_adaptation": False},
    ]
    return LARS(groups, momentum=0.9)


# ---- training ------------------------------------------------------------------------------------


def initial(
    encoder: Encoder, classes: int, protocol: Protocol, settings: Settings
) -> nn.Sequential:
    """A copy of the encoder and a new classifier, in training mode but for frozen layers.

    Raises:
        UserError: a BatchNorm cannot share its statistics among processes; or see `freeze`.
    """
    network = copy.deepcopy(encoder.network).train()
    freeze(network, settings.freeze)
    torch.manual_seed(settings.seed)
    classifier = nn.Linear(int(network.num_features), classes)  # type: ignore[arg-type]
    if protocol.zero_init:
        nn.init.zeros_(classifier.weight)
        nn.init.zeros_(classifier.bias)
    model = nn.Sequential(network, classifier.to(next(network.parameters())))
    try:
        globalize(model)
    except ValueError as error:
        raise UserError(f"on several processes: {error}") from error
    return model


def fine_tune(
    subject: Subject,
    images: ImageSplit,
    protocol: Protocol,
    settings: Settings,
    unfinished: Unfinished,
    progress: dict[str, Any],
) -> tuple[nn.Sequential, Speed]:
    """Encoder and classifier after the last epoch, in evaluation mode; `subject` is not changed.

    Args:
        protocol: with one rate and one length.
        progress: is saved beside the state of this training.
    """
    (rate,), (epochs,) = protocol.rates, protocol.epochs
    model = initial(subject.encoder, len(images.classes), protocol, settings)
    size = min(protocol.batch_size, len(images))
    order, peak = Order(len(images), size, epochs, settings.seed), protocol.peak(rate, size)
    optimizer = optimizer_of(model, protocol, settings.weight_decay)
    speed = train(
        model,
        optimizer,
        subject.crops(images, order, "finetune"),
        order,
        lambda step: [cosine(peak, step, order.steps)] * len(optimizer.param_groups),
        unfinished,
        what=f"finetune {protocol.name}, rate {rate:g}, {epochs} epochs",
        accelerator=subject.accelerator,
        precision=subject.precision,
        progress=progress,
    )
    return model.eval(), speed


def cosine(peak: float, step: int, steps: int) -> float:
    return peak * 0.5 * (1 + math.cos(math.pi * step / steps))


def best_of(
    subject: Subject,
    images: ImageSplit,
    choice: ImageSplit,
    protocol: Protocol,
    settings: Settings,
    unfinished: Unfinished,
) -> tuple[nn.Sequential, Protocol, Speed]:
    """The network and the protocol of the rate and length that are best on the images to choose on.

    Args:
        images, choice: to train on and to choose on.
    """
    options = [
        replace(protocol, rates=(rate,), epochs=(epochs,))
        for rate, epochs in itertools.product(protocol.rates, protocol.epochs)
    ]
    if len(options) == 1:
        model, speed = fine_tune(subject, images, options[0], settings, unfinished, {})
        return model, options[0], speed
    done = {k: unfinished.state.get(k, v) for k, v in (("option", 0), ("most", -1), ("best", -1))}
    weights: Any = unfinished.state.get("weights")
    speed = Speed(0.0, 0.0)
    for i in range(done["option"], len(options)):
        progress = {**done, "option": i, "weights": weights}
        model, speed = fine_tune(subject, images, options[i], settings, unfinished, progress)
        outputs, labels = predictions(subject, model, choice)
        correct = int((outputs.argmax(1) == labels).sum())
        if correct > done["most"]:
            done |= {"most": correct, "best": i}
            weights = copy.deepcopy(model.state_dict())
        done["option"] = i + 1
        unfinished.save(**done, weights=weights, step=0)
    model = initial(subject.encoder, len(images.classes), protocol, settings)
    model.load_state_dict(weights)
    return model.eval(), options[done["best"]], speed


def predictions(subject: Subject, model: nn.Module, images: ImageSplit) -> tuple[Tensor, Tensor]:
    """(N, C) logits of the images that can be decoded, and their (N,) labels."""
    assert images.labels is not None
    outputs, found = subject.encode(model.to(subject.device), images)
    return outputs, images.labels[found]


def judge(subject: Subject, settings: Settings) -> Result:
    """The record of the judgement, which is also printed and, for a run, written."""
    images, test = subject.splits()
    if subject.encoder.name == "pixels":
        raise UserError("--weights pixels: there is nothing to fine-tune")
    selected = choose(images, settings.label_fraction, settings.subset, settings.seed)
    all_labels, classes = bool(selected.all()), len(images.classes)
    listed = round(100 * selected.double().mean().item()) if settings.subset else None
    percent = 100 * settings.label_fraction if listed is None else max(1, listed)
    protocol = protocol_of(subject.encoder, settings, percent)
    if protocol.lars and settings.weight_decay:
        raise UserError("--weight-decay: not with LARS, whose protocol has none")
    training, choice, choices = selected, images, len(protocol.rates) * len(protocol.epochs)
    if choices > 1:
        # As BYOL's local validation: other images than the few that are trained on, where there are
        pool = None if all_labels else (~selected).nonzero()[:, 0]
        rest, choice, index = to_choose_on(images, subject.validation(), settings.seed, pool)
        training = selected & among(rest, len(images))
        choice = subset(choice, among(index, len(choice)), "to choose on")
    train_images = subset(images, training, f"{percent:g} % of the labels")
    size = batch_of(protocol, settings, len(train_images), subject.encoder.input.size)
    protocol = replace(protocol, batch_size=size)
    labels = None if all_labels else hashlib.sha256(selected.numpy().tobytes()).hexdigest()
    given = settings_of(settings, label_percent=percent, labels=labels, batch_size=size)
    changes = changed(settings, "epochs", "base_lr", "batch_size", "weight_decay", "freeze")
    name = record_name(subject, "finetune", protocol.name, given, changes)
    here = replace(settings, run="", data="", workers=0)  # without what makes no difference
    key = f"{subject.digest(train_images)} {subject.digest(choice)} {protocol} {here}"
    unfinished = Unfinished(subject.folder, name, key, subject.accelerator)
    model, chosen, speed = best_of(subject, train_images, choice, protocol, settings, unfinished)
    outputs, truth = predictions(subject, model, test)
    ranking = outputs.argsort(1, descending=True)
    top1 = accuracy(ranking, truth)
    lr = round(chosen.peak(chosen.rates[0], size), 6)
    found: dict[str, Any] = {"lr": lr, "epochs": chosen.epochs[0]}
    found |= {"chosen_of": choices, "chosen_on": choice.name if choices > 1 else None}
    result = record(
        subject,
        task="finetune",
        protocol=protocol.name,
        metrics={"top1": top1, "top5": accuracy(ranking, truth, 5) if classes > 5 else None},
        counts=(int(selected.sum()), len(truth)),
        interval=confidence(top1, len(truth)),
        settings=given | found,
        changed=changes,
        deviations=[f"BatchNorm over parts of {PART}"] if size > PART else [],
        seconds=unfinished.seconds(),
        speed=asdict(speed),
    )
    unfinished.remove()
    return result


def main(settings: Settings) -> None:
    layer = layer_of(load_encoder(settings.run, settings.weights), settings)
    for subject in subjects(settings, layer=layer):
        judge(subject, settings)


if __name__ == "__main__":
    cli.run(main, arguments)
