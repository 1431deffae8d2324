"""Encoders from a file or by name: built as they were trained, or refused in one line."""

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from common import encoders
from common.data import Batch, ImageSplit, pad
from common.errors import UserError
from eval import encoder as module
from eval.encoder import Preprocess, build_seeded, load_encoder
from eval.features import extract, prepare
from tests.eval.harness import save_encoder

DEMO = build_seeded({"encoder": "demo"}, Preprocess.of(32))


@pytest.mark.parametrize(("name", "size"), [("demo", 32), ("resnet18-cifar", 32), ("resnet18", 64)])
@pytest.mark.parametrize("old", [False, True])
def test_an_exported_encoder_comes_back_bit_for_bit(tmp_path, name, size, old):
    """Also from an old file, whose metadata has the network's name and its stem apart."""
    torch.manual_seed(3)
    theirs = encoders.build(name, image_size=size)
    theirs(torch.rand(4, 3, size, size))  # running statistics of its own
    preprocess = Preprocess(size, crop=0.9, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0))
    arch, stem = name.removesuffix("-cifar"), "cifar" if "cifar" in name else "imagenet"
    changes = {"encoder": None, "channels": None, "norm": None, "arch": arch, "stem": stem}
    path = tmp_path / "encoder.safetensors"
    ours = load_encoder(save_encoder(path, theirs, name, preprocess, **(changes if old else {})))
    images = torch.rand(3, 3, size, size)
    with torch.no_grad():
        assert torch.equal(ours.network(images), theirs.eval()(images))
    assert ours.network.num_features == theirs.num_features == ours.network(images).shape[1]
    assert not ours.network.training and ours.name == "encoder"
    assert tuple(ours.input.mean) == preprocess.mean and ours.input.size == size
    assert ours.metadata["method"] == "simclr" and ours.metadata["published"] == "some-row"
    assert ours.metadata["encoder"] == name
    assert load_encoder(str(tmp_path)).metadata == ours.metadata  # by its folder


def test_stems():
    images = torch.rand(1, 3, 32, 32)
    for name, stride, side in (("resnet18-cifar", 1, 32), ("resnet18", 2, 8)):
        network = encoders.build(name)
        assert network.conv1.stride == (stride, stride)
        assert network.maxpool(network.conv1(images)).shape[-1] == side


def test_input_of_cifar_is_not_cropped():
    assert [Preprocess.of(size).crop for size in (24, 32, 33, 224)] == [1.0, 1.0, 0.875, 0.875]


def test_baselines_of_a_run(tmp_path):
    path = save_encoder(tmp_path / "encoder.safetensors", DEMO)
    random, pixels = load_encoder(path, "random"), load_encoder(path, "pixels")
    images = torch.rand(2, 3, 32, 32)
    assert random.name == "random" and pixels.name == "pixels"
    assert torch.equal(pixels.network(images), images.flatten(1))
    state = torch.random.get_rng_state()
    again = build_seeded({"encoder": "demo"}, Preprocess.of(32))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(random.network(images), again(images))
    assert random.input == pixels.input == load_encoder(path).input


def test_networks_by_name(monkeypatch):
    encoder = load_encoder("", "random:resnet18")
    assert encoder.input == Preprocess(
        224, interpolation="bilinear", mean=module.IMAGENET_MEAN, std=module.IMAGENET_STD
    )
    assert not encoder.network.training
    with pytest.raises(UserError, match="vgg16: no such network; there are demo, resnet101"):
        load_encoder("", "random:vgg16")
    with pytest.raises(UserError, match="no such torchvision ResNet"):
        load_encoder("", "torchvision:demo")

    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", no_network)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
    with pytest.raises(UserError, match=r"cannot be fetched \(OSError: no network\)"):
        load_encoder("", "torchvision:resnet18")


def test_what_is_no_encoder(tmp_path):
    with pytest.raises(UserError, match="say which RUN"):
        load_encoder("")
    with pytest.raises(UserError, match=r"encoder\.safetensors: no such file; a run writes it"):
        load_encoder(str(tmp_path))
    path = tmp_path / "encoder.safetensors"
    path.write_bytes(b"garbage")
    with pytest.raises(UserError, match="not an exported encoder"):
        load_encoder(str(path))
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(UserError, match="not an exported encoder"):
        load_encoder(str(path))
    broken = build_seeded({"encoder": "demo"}, Preprocess.of(24))
    broken.layers[1].running_var[3] = -1
    save_encoder(path, broken)
    with pytest.raises(UserError, match=r"layers\.1\.running_var has negative values"):
        load_encoder(str(path))
    save_encoder(path, DEMO, encoder="no_such_net")
    with pytest.raises(UserError, match="no_such_net"):
        load_encoder(str(path))
    save_encoder(path, DEMO)
    with pytest.raises(UserError, match="best: no such file, and not one of random, pixels"):
        load_encoder(str(path), "best")


# ---- features ------------------------------------------------------------------------------------


def test_prepare_is_the_central_crop_at_the_networks_size():
    images = torch.zeros(2, 3, 16, 24, dtype=torch.uint8)
    images[:, :, 1:15, 5:19] = 255  # 0.875 of the short side, in the middle
    batch = Batch(*pad(list(images)), torch.arange(2))
    shown = prepare(batch, Preprocess(14), "cpu")
    assert shown.shape == (2, 3, 14, 14) and shown.dtype == torch.float32
    assert torch.equal(shown, torch.ones_like(shown))
    whole = prepare(batch, Preprocess(16, crop=1.0), "cpu")
    assert torch.allclose(whole, images[:, :, :, 4:20] / 255, atol=1e-6)
    moved = prepare(batch, Preprocess(14, mean=(0.5, 0.25, 0.0), std=(0.5, 1.0, 2.0)), "cpu")
    assert torch.allclose(moved[0, :, 0, 0], torch.tensor([1.0, 0.75, 0.5]))


class Channels(nn.Module):
    def forward(self, images):
        return images.mean((2, 3))


def flat_images(count, bad=()):
    values = [torch.full((3, 8, 8), i, dtype=torch.uint8) for i in range(count)]
    encoded = [b"" if i in bad else value for i, value in enumerate(values)]
    return ImageSplit("flat", encoded, torch.arange(count), tuple(map(str, range(count))))


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_features_and_labels_are_in_the_order_of_the_images(batch_size):
    network, preprocess = Channels().eval(), Preprocess(8, crop=1.0)
    features, labels = extract(network, flat_images(40), preprocess, batch_size=batch_size)
    assert features.shape == (40, 3) and features.dtype == torch.float32
    assert torch.allclose(features * 255, torch.arange(40.0)[:, None].expand(40, 3), atol=1e-4)
    assert torch.equal(labels, torch.arange(40))


@pytest.mark.parametrize("memory_gb", [1.0, 0.0])
@pytest.mark.parametrize("batch_size", [5, 100])
def test_bad_images_are_left_out(memory_gb, batch_size):
    images = flat_images(60, bad=(4, 5, 30))
    features, labels = extract(
        Channels().eval(), images, Preprocess(8, crop=1.0),
        batch_size=batch_size, memory_gb=memory_gb, workers=0,
    )  # fmt: skip
    good = [i for i in range(60) if i not in (4, 5, 30)]
    assert labels.tolist() == good
    assert torch.allclose(features[:, 0] * 255, torch.tensor(good).float(), atol=1e-4)


def test_a_network_in_training_mode_is_refused():
    with pytest.raises(AssertionError):
        extract(Channels().train(), flat_images(4), Preprocess(8))


def test_torchvisions_weights_from_a_file(tmp_path):
    theirs = torchvision.models.resnet18(weights=None)
    path = tmp_path / "resnet18.pth"
    torch.save(theirs.state_dict(), path)
    ours = load_encoder("", f"torchvision:resnet18={path}")
    assert ours.name == f"torchvision:resnet18={path}" and torch.equal(
        ours.network.conv1.weight, theirs.conv1.weight
    )
    with pytest.raises(UserError, match="not a state dict of resnet34"):
        load_encoder("", f"torchvision:resnet34={path}")
    with pytest.raises(UserError, match="cannot be read"):
        load_encoder("", f"torchvision:resnet18={tmp_path / 'none.pth'}")


def test_a_layer_of_weights_without_a_head_is_refused():
    with pytest.raises(UserError, match="--layer 2: --weights random:resnet18 has no head"):
        load_encoder("", "random:resnet18", 2)
