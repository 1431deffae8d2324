"""Networks by name: what is built, at which width, and what is refused."""

import pytest
import timm
import torch
import torchvision
from torch import nn

from common import encoders
from common.encoders import build, full_name, output_width
from common.errors import UserError


def features(network, channels=3, size=32):
    with torch.no_grad():
        draw = torch.Generator().manual_seed(0)
        return network.eval()(torch.rand(2, channels, size, size, generator=draw))


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize(
    ("name", "width"),
    [("demo", 128), ("resnet18", 512), ("resnet18-cifar", 512), ("timm:resnet10t", 512)],
)
def test_images_of_any_channels_to_features(name, width, channels):
    network = build(name, channels, image_size=32)
    assert network.training and network.num_features == width
    assert features(network, channels).shape == (2, width)


def test_a_resnet_is_torchvisions_without_its_last_layer():
    torch.manual_seed(0)
    network = build("resnet18")
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(weights=None)
    theirs.fc = nn.Identity()
    assert network.state_dict().keys() == theirs.state_dict().keys()
    assert torch.equal(features(network), features(theirs))


def test_the_stem_of_cifar_is_part_of_the_name():
    assert full_name("resnet18", "cifar") == "resnet18-cifar"
    assert full_name("resnet18", "imagenet") == full_name("resnet18") == "resnet18"
    assert full_name("demo", "cifar") == "demo" and full_name("timm:a", "cifar") == "timm:a"
    network = build("resnet18-cifar", image_size=32)
    assert network.conv1.weight.shape == (64, 3, 3, 3) and network.conv1.stride == (1, 1)
    assert isinstance(network.maxpool, nn.Identity)
    with torch.no_grad():
        assert network.layer1(network.conv1(torch.rand(1, 3, 32, 32))).shape[2:] == (32, 32)


def test_the_width_is_that_of_the_output_whatever_the_network_says():
    assert timm.create_model("mobilenetv3_small_100", num_classes=0).num_features == 576
    network = build("timm:mobilenetv3_small_100", image_size=32)
    assert network.num_features == features(network).shape[1] == 1024


def test_measuring_the_width_leaves_the_network_as_it_was():
    network = build("demo")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    for mode in (True, False):
        assert output_width(network.train(mode).double(), 3, 24) == 128
        assert network.training == mode
    assert all(torch.equal(v, before[k].to(v)) for k, v in network.state_dict().items())


def test_a_transformer_is_made_for_the_size_of_the_images():
    name = "timm:vit_tiny_patch16_224"
    network = build(name, image_size=32)
    assert features(network).shape == (2, 192)
    with pytest.raises(UserError, match=r"the encoder: cannot take images of 40 x 40 pixels ") as e:
        output_width(network, 3, 40)
    assert "\n" not in str(e.value).strip()
    assert features(build(name, image_size=48), size=48).shape == (2, 192)


def test_images_that_are_too_small_and_outputs_that_are_no_vectors():
    with pytest.raises(UserError, match=r"timm:inception_v3: cannot take images of 32 x 32"):
        build("timm:inception_v3", image_size=32)
    with pytest.raises(UserError, match=r"gives \(1, 3, 8, 8\), not one vector for each image"):
        output_width(nn.Identity(), 3, 8)


@pytest.mark.parametrize(
    "name", ["", "resnet19", "vgg11", "Demo", "demo-cifar", "resnet18-cifar100"]
)
def test_an_unknown_name_lists_what_there_is(name):
    with pytest.raises(
        UserError, match=r"no such network; there are demo, resnet101, .*resnet18.* timm:NAME$"
    ):
        build(name)


@pytest.fixture
def no_download(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a download was tried")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("timm.create_model", refuse)


@pytest.mark.parametrize(
    "name",
    ["hf-hub:owner/name", "hf_hub:owner/name", "local-dir:/tmp", "/tmp/x", "../x", "", "resnet18 ",
     "http://host/x", "resnet18=/tmp/x"],
)  # fmt: skip
def test_a_name_of_timm_is_neither_a_path_nor_of_a_hub(no_download, name):
    with pytest.raises(UserError, match="no such network"):
        build(f"timm:{name}")


def test_a_misspelt_name_of_timm_names_some_near_ones():
    with pytest.raises(UserError, match=r"did you mean \w*resnet\w*, .*\?"):
        build("timm:resnet")
    with pytest.raises(UserError, match=r"no such network$"):
        build("timm:qqqqqq")


def test_which_networks_keep_weights_of_their_own_design():
    kept = [
        encoders.keeps_its_weights(n)
        for n in ("timm:resnet10t", "my-own", "resnet18-cifar", "demo")
    ]
    assert kept == [True, True, False, False]
