"""Encoders as ONNX and .pt2: run by their own runtimes, they give the network's features."""

import json
from dataclasses import replace
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from common.errors import UserError
from eval.encoder import Cut, Encoder, Pixels, Preprocess, build_seeded
from eval.weights import graphs
from eval.weights.graphs import milliseconds, to_onnx, to_pt2

BOTH = pytest.mark.parametrize("to", [to_onnx, to_pt2])
SUFFIX = {to_onnx: ".onnx", to_pt2: ".pt2"}


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.forward = function


def mean_colours(images):
    return images.mean((2, 3))


def encoder_of(name="demo", channels=3, size=32, norm="bn", network=None):
    shift = 0.1 * torch.arange(1, channels + 1)
    preprocess = Preprocess(size, mean=tuple(shift.tolist()), std=tuple((0.2 + shift).tolist()))
    metadata = {"encoder": name, "channels": channels, "norm": norm, "commit": "abc"}
    network = network or build_seeded(metadata, preprocess)
    return Encoder(network.eval(), preprocess, "encoder", metadata)


def opened(path):
    """What a user of the file writes, without a line of ours."""
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda images: torch.from_numpy(
            session.run(["features"], {"images": images.numpy()})[0]
        )
    return torch.export.load(path).module()


@torch.no_grad()
def assert_same(path, encoder, *shapes):
    run = opened(path)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (encoder.input.mean, encoder.input.std))
    for shape in shapes:
        images = torch.rand(shape[0], encoder.metadata["channels"], *shape[1:])
        expected, found = encoder.network((images - mean) / std), run(images)
        assert found.shape == expected.shape
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max() + 1e-6, shape


@BOTH
def test_a_file_takes_any_batch_and_size_and_normalises_itself(tmp_path, capfd, to):
    encoder = encoder_of(channels=5)
    path = tmp_path / f"a b{SUFFIX[to]}"
    written = to(encoder, path)
    assert written.difference <= 1e-5 and written.any_size and written.float32 == 0
    assert [p.name for p in tmp_path.iterdir()] == [path.name]  # one file, whole
    assert capfd.readouterr() == ("", "")
    assert_same(path, encoder, (1, 32, 32), (3, 31, 45), (7, 9, 8), (1, 97, 33))
    times = milliseconds(encoder, path)
    assert 0 < times.network < 1000 and 0 < times.file < 1000
    assert times.threads == torch.get_num_threads()
    assert str(Path(torch.__file__).parents[1]).encode() not in path.read_bytes()


@BOTH
def test_a_file_says_how_to_feed_it(tmp_path, to):
    path = tmp_path / f"x{SUFFIX[to]}"
    to(encoder_of(network=Function(mean_colours)), path)
    if to is to_onnx:
        model = onnx.load(path)
        found = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
        of_input, of_output = model.graph.input[0], model.graph.output[0]
        assert (of_input.name, of_output.name) == ("images", "features")
        axes = [axis.dim_param or axis.dim_value for axis in of_input.type.tensor_type.shape.dim]
        assert axes == ["batch", 3, "height", "width"]
        assert of_output.type.tensor_type.shape.dim[0].dim_param == "batch"
        assert of_output.type.tensor_type.shape.dim[1].dim_value == 3
    else:
        extra = {"metadata.json": ""}
        torch.export.load(path, extra_files=extra)
        found = json.loads(extra["metadata.json"])
    expected = {"size": 32, "crop": 0.875, "interpolation": "bicubic"}
    assert expected.items() <= found["input"].items()
    assert found["input"]["mean"] == pytest.approx([0.1, 0.2, 0.3])
    assert found["input"]["std"] == pytest.approx([0.3, 0.4, 0.5])
    assert (found["commit"], found["weights"], found["layer"]) == ("abc", "encoder", 0)


class Same(nn.Module):
    """A strided convolution padded by amounts that depend on the size."""

    def __init__(self, form):
        super().__init__()
        self.conv, self.form = nn.Conv2d(3, 4, 3, 2), form

    def forward(self, images):
        height, width = ((self.form(side) - 1) * 2 + 3 - side for side in images.shape[2:])
        sides = (width // 2, width - width // 2, height // 2, height - height // 2)
        return self.conv(nn.functional.pad(images, sides)).mean((2, 3))


@BOTH
def test_padding_by_arithmetic_is_for_any_size(tmp_path, to):
    encoder = encoder_of(network=Same(lambda side: (side + 1) // 2))
    path = tmp_path / f"x{SUFFIX[to]}"
    assert to(encoder, path).any_size
    assert_same(path, encoder, (1, 32, 32), (2, 33, 31), (1, 30, 7))


def test_a_graph_that_is_right_at_one_size_alone_is_of_that_size(tmp_path):
    """ONNX divides integers towards zero, Python downwards; the graph is as if it were right."""
    encoder = encoder_of(network=Same(lambda side: -(-side // 2)))
    path = tmp_path / "x.onnx"
    assert not to_onnx(encoder, path).any_size
    assert_same(path, encoder, (1, 32, 32), (3, 32, 32))
    with pytest.raises(Exception, match="dimensions"):
        opened(path)(torch.rand(1, 3, 33, 33))


@BOTH
@pytest.mark.parametrize(
    "network",
    [
        Pixels(),  # longer vectors of larger images
        Function(lambda x: x.mean((2, 3)) * (2 if x.shape[2] == 32 else 3)),  # a branch
    ],
)
def test_a_network_of_one_size_is_free_in_the_batch_alone(tmp_path, to, network):
    encoder = encoder_of(network=network)
    path = tmp_path / f"x{SUFFIX[to]}"
    assert not to(encoder, path).any_size
    assert_same(path, encoder, (1, 32, 32), (4, 32, 32))
    with pytest.raises(Exception, match=r"(?i)dimensions|guard"):
        opened(path)(torch.rand(1, 3, 33, 33))


@BOTH
def test_a_network_without_a_graph_leaves_what_was_there(tmp_path, to, capfd):
    network = Function(lambda x: x.mean((2, 3)) * (2 if len(x) == 1 else 3))
    path = tmp_path / f"x{SUFFIX[to]}"
    path.write_bytes(b"before")
    with pytest.raises(UserError, match="the network cannot be written as a graph"):
        to(encoder_of(network=network), path)
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(UserError, match="features that are not finite"):
        to(encoder_of(network=Function(lambda x: x.mean((2, 3)).log() * torch.nan)), path)
    with pytest.raises(UserError, match=r"cannot be written .*No such file"):
        to(encoder_of(network=Function(mean_colours)), tmp_path / "none" / "x")
    assert capfd.readouterr() == ("", "")


def test_what_is_refused_before_the_work(tmp_path, monkeypatch):
    encoder = encoder_of()
    monkeypatch.setattr(graphs, "ONNX_BYTES", 10**6 * 0.9)
    with pytest.raises(UserError, match=r"holds 2 GB, and the network has 0\.0; \.pt2 holds it"):
        to_onnx(encoder, tmp_path / "x.onnx")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="onnx is not installed"):
        to_onnx(encoder, tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


def test_only_rounding_may_differ_by_more():
    """A network that amplifies rounding may differ more than another, but not by another cause."""

    def amplified(images):
        return (images.mean((2, 3)) - 0.5 + 1e4) - 1e4

    encoder = encoder_of(network=Function(amplified))
    encoder = replace(encoder, input=Preprocess(32))
    trials = graphs.trials(encoder, [(2, 32, 32)])

    def in_float64(images):
        return amplified(images.double()).float()

    difference, float32 = graphs.largest_difference(in_float64, encoder, trials)
    assert difference > 1e-5 and float32 == pytest.approx(difference, rel=0.02)
    with pytest.raises(ValueError, match="features of 32 x 32 images differ by"):
        graphs.largest_difference(lambda x: in_float64(x) * 1.5, encoder, trials)
    with pytest.raises(ValueError, match="differ by nan"):
        graphs.largest_difference(lambda x: in_float64(x) * torch.nan, encoder, trials)
    with pytest.raises(ValueError, match=r"features \(2, 2\), not \(2, 3\)"):
        graphs.largest_difference(lambda x: in_float64(x)[:, 1:], encoder, trials)


@BOTH
def test_a_layer_of_the_head(tmp_path, to):
    head = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    body = Function(mean_colours)
    for layer, width in ((1, 8), (-1, 4)):
        encoder = replace(encoder_of(network=Cut(body, head, layer)), layer=layer)
        path = tmp_path / f"{layer}{SUFFIX[to]}"
        assert to(encoder, path).any_size
        assert opened(path)(torch.rand(2, 3, 40, 33)).shape == (2, width)
        assert_same(path, encoder, (1, 32, 32), (2, 40, 33))


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize(
    ("name", "channels", "size", "norm"),
    [
        ("resnet18", 3, 32, "bn"),  # the last map is of one position
        ("resnet18-cifar", 1, 32, "bn"),
        ("resnet50", 3, 64, "bn"),
        ("resnet50-cifar", 5, 32, "bn"),
        ("resnet18", 3, 96, "gn+ws"),
        ("resnet18-byol", 3, 64, "bn"),
        ("resnet50-sk-simclr", 3, 63, "bn"),
        ("timm:convnext_atto", 3, 224, "bn"),
        ("timm:vit_tiny_patch16_224", 3, 224, "bn"),
    ],
)
def test_each_kind_of_network(tmp_path, to, name, channels, size, norm):
    encoder = encoder_of(name, channels, size, norm)
    path = tmp_path / f"x{SUFFIX[to]}"
    written = to(encoder, path)
    assert written.any_size == ("vit" not in name)
    assert written.difference <= max(1e-5, 3 * written.float32)
    if written.float32 == 0:
        own = [(count, size, size) for count in (1, 2, 5)]
        others = [(2, size + 3, size - 3), (1, size + 9, 2 * size + 1)]
        assert_same(path, encoder, *own, *(others if written.any_size else []))
