"""Networks and transforms that no method knows, through the real commands.

The networks are timm's smallest transformer and convolutional network, and a module of one's own,
which is one more line in `encoders.build`; the transform is torchvision's RandomRotation.
"""

import functools
import importlib

import pytest
import torch
from torch import nn
from torchvision.transforms import v2

import eval.knn
import eval.linear
from common import encoders
from common.plan import plan_of
from common.run import Run
from eval.encoder import load_encoder
from eval.features import encode
from eval.knn import subsample
from eval.splits import open_labelled
from tests.eval.harness import records
from tests.helpers import METHODS, ended, evaluate, forked, pretrain, rows

BATCH, IMAGES, STEPS = 32, 5120, 4


def settings(method, arch, out, *more):
    """A few steps of the demo."""
    flags = {
        "arch": arch, "out": out, "image-size": 32, "eval-size": 32, "batch-size": BATCH,
        "log-every": 1, "knn-every": 0,
    }  # fmt: skip
    flags["epochs"] = (STEPS + (-0.5 if method == "simclr" else 0.5)) * BATCH / IMAGES  # rounded
    if method == "moco":
        flags |= {"bn-splits": 2, "queue-size": 64}
    return ["demo", *(word for flag, x in flags.items() for word in (f"--{flag}", x)), *more]


def losses(run):
    steps = torch.tensor([row["loss"] for row in rows(run)], dtype=torch.float64)
    assert len(steps) == len(steps.unique()) == STEPS
    return steps


# ---- networks ------------------------------------------------------------------------------------


class Own(nn.Module):
    """A network of one's own: it need only map images to vectors."""

    def __init__(self, channels):
        super().__init__()
        self.patches = nn.Conv2d(channels, 16, kernel_size=8, stride=8, bias=False)
        self.norm = nn.BatchNorm1d(16)
        self.mix = nn.Linear(16, 24)

    def forward(self, images):
        return self.mix(self.norm(self.patches(images).amax((2, 3))).relu())


def build_own(name, channels=3, image_size=None, *, build=encoders.build):
    if name != "own":
        return build(name, channels, image_size)
    network = Own(channels)
    network.num_features = encoders.output_width(network, channels, image_size, name)
    return network


WIDTHS = {"timm:test_vit": 64, "timm:test_convnext": 64, "own": 24}


@pytest.fixture(
    scope="module", params=[(m, arch) for m in METHODS for arch in WIDTHS], ids=" ".join
)
def trained(request, tmp_path_factory):
    """A run, the network that it trained, and that network's initial weights."""
    method, arch = request.param
    run, built = tmp_path_factory.mktemp("runs") / method, []

    def build(*args, **options):
        network = build_own(*args, **options)
        built.append((network, {k: v.clone() for k, v in network.state_dict().items()}))
        return network

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoders, "build", build)
        pretrain(method, *settings(method, arch, run))
        patch.setattr(encoders, "build", build_own)
        yield run, *built[0], method, arch


def test_the_reloaded_encoder_gives_the_same_features(trained):
    run, network, initial, _, arch = trained
    assert losses(run).isfinite().all()
    moved = [not torch.equal(v, initial[k]) for k, v in network.state_dict().items()]
    assert sum(moved) > 0.8 * len(moved)
    images, encoder = subsample(open_labelled(plan_of("demo"))[1], 100), load_encoder(str(run))
    network = network.eval().to(memory_format=torch.contiguous_format)  # as files have it
    ours, theirs = (
        encode(each, images, encoder.input, progress=False)[0]
        for each in (encoder.network, network)
    )
    assert torch.equal(ours, theirs)
    assert ours.shape == (len(images), WIDTHS[arch]) and ours.std(0).min() > 0


def test_the_encoder_is_judged(trained):
    run, _, _, method, arch = trained
    evaluate(eval.knn, run, "--k", "20")
    evaluate(eval.linear, run, "--protocol", "features", "--epochs", "2")
    names = {"knn-weighted-k20-encoder", "linear-features-encoder"}
    if (method, arch) == ("simclr", "timm:test_convnext"):
        evaluate(eval.knn, run, "--k", "20", "--layer", "-1")
        evaluate(eval.linear, run, "--epochs", "1")
        names |= {"knn-weighted-k20-output-encoder", "linear-simclr-encoder"}
    found = records(run)
    assert found.keys() == names
    assert found["knn-weighted-k20-encoder"]["settings"]["features"] == WIDTHS[arch]
    assert all(
        row["encoder"] == arch and 0 < row["metrics"]["top1"] <= 100 for row in found.values()
    )


# ---- transforms ----------------------------------------------------------------------------------


def rotate(method):
    """Rotate what a method's views are made of."""
    augment = importlib.import_module(f"{method}.augment")
    views = augment.views

    def rotated(cfg):
        return tuple(v2.Compose([v2.RandomRotation(30), view]) for view in views(cfg))

    augment.views = rotated


@pytest.mark.parametrize("method", METHODS)
def test_a_transform_without_a_batched_form_on_two_processes(method, tmp_path):
    runs = {"one": (1, rotate), "two": (2, rotate), "plain": (1, None)}
    children = []
    for name, (processes, change) in runs.items():
        argv = settings(method, "demo", tmp_path / name, "--precision", "fp64")
        before = functools.partial(change, method) if change else None
        children += forked(method, argv, tmp_path / f"{name}.log", processes, before)
    assert set(ended(children)) == {0}, [path.read_text() for path in tmp_path.glob("*.log")]
    one, two, plain = (losses(tmp_path / name) for name in runs)
    assert (one - two).abs().max() < 1e-10
    assert (one - plain).abs().min() > 1e-6


def test_a_network_that_draws_goes_on_as_if_it_had_not_stopped(tmp_path, monkeypatch):
    """Dropout's masks are a function of seed and step, not of what was drawn before."""

    def build(name, channels=3, image_size=None):
        network = nn.Sequential(Own(channels), nn.Dropout(0.5))
        network.num_features = 24
        return network

    class Stopped(Exception):
        pass

    def stopping(run, step, *args, **metrics):
        end_step(run, step, *args, **metrics)
        if step == 1:
            raise Stopped

    monkeypatch.setattr(encoders, "build", build)
    often = ("--save-every", BATCH / IMAGES)
    pretrain("simclr", *settings("simclr", "own", tmp_path / "whole", *often))
    end_step = Run.end_step
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Run, "end_step", stopping)
        pretrain("simclr", *settings("simclr", "own", tmp_path / "stopped", *often))
    pretrain("simclr", *settings("simclr", "own", tmp_path / "stopped", *often))
    assert torch.equal(losses(tmp_path / "whole"), losses(tmp_path / "stopped"))
