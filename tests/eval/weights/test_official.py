"""The authors' checkpoints, in their formats and under their names, against recorded features."""

import gzip
import re
import shutil
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import eval.weights.__main__
from common.encoders import build, parse
from common.errors import UserError
from eval.encoder import load_encoder
from eval.weights.official import (
    byol,
    creation_order,
    format_of,
    moco,
    read_official,
    simclr_resnet,
)
from tests.eval.weights.pickle_writer import write_byol
from tests.eval.weights.tf_writer import write_bundle, write_object_checkpoint
from tests.golden.det_formula import image, weight
from tests.helpers import evaluate, golden, golden_json, rel

KINDS = {
    "kernel": "kernel", "gamma": "gamma", "beta": "beta", "bias": "bias", "moving_mean": "mean",
    "moving_variance": "var", "w": "kernel", "scale": "gamma", "offset": "beta", "b": "bias",
}  # fmt: skip


def inputs(height, width):
    """The two images of the recordings, (2, 3, H, W)."""
    images = [image(f"resnet/in{i}/{height}x{width}", height, width) for i in range(2)]
    return torch.tensor(np.stack(images)).permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def features(encoder, height, width):
    return encoder.network(inputs(height, width))


# ---- SimCLR --------------------------------------------------------------------------------------


def variable(name, shape):
    """A variable at the recorded weights, which go by the last two parts of its name."""
    short = "/".join(name.split("/")[-2:]).replace("sync_", "")
    return weight(f"resnetw/{short}", shape, KINDS.get(name.split("/")[-1], "bias"))


def simclr_variables(case):
    """All variables by their official names, at the recorded weights."""
    names = golden_json("variable_names")["simclr"]
    return {
        name: variable(name, shape)
        for key in (case, f"{case}/non_trainable")
        for name, shape in names.get(key, ())
    }


def widened(case, width):
    """The variables of a network `width` times as wide."""
    names = golden_json("variable_names")["simclr"][case]
    return {
        name: variable(name, [n if n < 16 else n * width for n in shape]) for name, shape in names
    }


def as_recorded(encoder, case, size):
    """Whether features are the recorded ones.

    The mixing weights of selective kernels are a softmax of large scores, at random weights: there
    the recording, in float32, is 5e-4 from float64, and ours 2e-4.
    """
    recorded = golden("simclr_resnet")[f"{case}/features_eval"]
    ours = features(encoder, *size)
    if case != "r50_sk":
        return rel(ours, recorded) < 1e-5
    with torch.no_grad():
        exact = encoder.network.double()(inputs(*size).double())
    return rel(exact, recorded) < 5e-4 and rel(ours, exact) < 1e-3


@pytest.fixture(scope="module")
def simclr_v1(tmp_path_factory):
    """A checkpoint of TensorFlow 1 with every name of a ResNet-50's, its slots and classifier."""
    folder = tmp_path_factory.mktemp("ResNet50_1x")
    arrays = simclr_variables("tf1_model_r50_1x_simclrv1/pretrain")
    slots = {f"{k}/Momentum": np.zeros(2, np.float32) for k in arrays if k.endswith("kernel")}
    more = {"global_step": np.int64(225_206), "ema_model/base_model/conv2d/kernel": np.ones(3)}
    classifier = {"head_supervised/linear_layer/dense/kernel": np.ones((4, 3), np.float32)}
    write_bundle(folder / "model.ckpt-225206", {**arrays, **slots, **more, **classifier})
    return folder


@pytest.mark.parametrize("size, case", [((64, 64), "r50"), ((57, 71), "r50_odd")])
def test_simclr_of_tensorflow_1(simclr_v1, size, case):
    assert as_recorded(load_encoder(simclr_v1), case, size)


def test_what_a_checkpoint_holds_is_found_and_what_is_left_out_counted(simclr_v1, tmp_path, capsys):
    out = tmp_path / "new" / "encoder.safetensors"
    evaluate(eval.weights.__main__, str(simclr_v1 / "model.ckpt-225206"), "--out", str(out))
    told = capsys.readouterr().out
    assert "SimCLR v1, step 225,206: resnet50-simclr, 23.6 million values" in told
    assert "Linear, BatchNorm1d, ReLU, Linear, BatchNorm1d" in told
    assert re.search(r"left out, .*Momentum \(55\), ema_model \(1\), head_supervised \(1\)\n", told)
    assert f"python -m eval.linear {out.parent} --data ILSVRC/imagenet-1k" in told
    encoder = load_encoder(out)
    assert encoder.metadata["method"] == "simclr" and encoder.input.mean is None
    assert (encoder.input.size, encoder.input.crop) == (224, 0.875)
    assert encoder.input.interpolation == "bicubic"
    assert encoder.metadata["official"]["file"] == "model.ckpt-225206"
    assert "23.6 million values" in load_encoder(simclr_v1).notes[0]  # nor those of the head
    assert torch.equal(features(encoder, 57, 71), features(load_encoder(simclr_v1), 57, 71))
    hidden = load_encoder(out, layer=1)  # of the head, which comes along
    assert hidden.network.num_features == 2048 and load_encoder(out, layer=-1) is not None
    assert load_file(out)["head.4.bias"].eq(0).all()  # the last BatchNorm has no shift


@pytest.mark.parametrize("layout", ["checkpoint", "SavedModel"])
@pytest.mark.parametrize("case, size", [("r18", (64, 64)), ("r18_cifar", (32, 32))])
def test_simclr_of_tensorflow_2(tmp_path, layout, case, size):
    """Names come from the object graph; momentum is told apart by it."""
    arrays = simclr_variables(case)
    first = next(iter(arrays))
    path = tmp_path / ("saved" if layout == "SavedModel" else "ckpt-7")
    write_object_checkpoint(
        path,
        arrays,
        saved_model=layout == "SavedModel",
        slots={first: {"momentum": np.zeros_like(arrays[first])}},
    )
    assert format_of(path) == "tensorflow"
    official = read_official(path)
    assert official.network == f"resnet18-simclr{'-cifar' if 'cifar' in case else ''}"
    assert official.left_out["slots of the optimizer"] == 1
    encoder = load_encoder(path)
    assert encoder.input.size == (32 if "cifar" in case else 224)
    assert as_recorded(encoder, case, size)


@pytest.mark.parametrize(
    "case, size, name",
    [
        ("r50_cifar", (32, 32), "resnet50-simclr-cifar"),
        ("r50_sk", (64, 64), "resnet50-sk-simclr"),
        pytest.param("r50_2x", (48, 48), "resnet50x2-simclr", marks=pytest.mark.slow),
    ],
)
def test_simclr_of_other_networks(tmp_path, case, size, name):
    arrays = widened("tf1_r50", 2) if case == "r50_2x" else simclr_variables(f"tf1_{case}")
    write_bundle(tmp_path / "model.ckpt-1", arrays, shards=2)
    encoder = load_encoder(tmp_path / "model.ckpt-1.index")
    assert encoder.metadata["encoder"] == name
    assert as_recorded(encoder, case, size)


@pytest.mark.parametrize("name", ["resnet34-simclr", "resnet101-simclr", "resnet152-sk-simclr",
                                  "resnet152x3-sk-simclr", "resnet50x4-simclr"])  # fmt: skip
def test_the_official_order_of_other_depths_has_every_layer(name):
    """Each convolution and each BatchNorm once, and in a block the shortcut first."""
    with torch.device("meta"):
        network = build(name)
    order = list(creation_order(parse(name)))
    convolutions = {k for k, m in network.named_modules() if isinstance(m, torch.nn.Conv2d)}
    norms = {k for k, m in network.named_modules() if isinstance(m, torch.nn.BatchNorm2d)}
    assert {conv for conv, _ in order} == convolutions and len(order) == len(convolutions)
    assert {norm for _, norm in order if norm} == norms
    blocks = [conv for conv, _ in order if ".0." in conv and conv.startswith("layer")]
    assert blocks[0].startswith("layer1.0.downsample")


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda a: a.pop("base_model/batch_normalization_20/gamma"),
         r"resnet18-simclr: layer4.1.bn2.weight is missing"),
        (lambda a: a.pop("base_model/conv2d_20/kernel"), r"20 convolutions behind a stem of 64 "),
        (lambda a: a.update({"base_model/conv2d_3/kernel": np.ones((3, 3, 64, 65), np.float32)}),
         r"layer1.0.conv2.weight has the shape \(65, 64, 3, 3\)"),
        (lambda a: a.update({"base_model/batch_normalization_99/gamma": np.ones(3, np.float32)}),
         r"resnet18-simclr: base_model/batch_normalization_99/gamma is left over"),
        (lambda a: a.update({"other/conv2d_3/kernel": np.ones(3, np.float32)}),
         r"would be the same variable"),
        (lambda a: a["base_model/conv2d_7/kernel"].fill(np.nan), r"has values that are not finite"),
        (lambda a: a.clear(), r"no convolutions that are named conv2d"),
        (lambda a: a.update({k: v.astype(complex) for k, v in a.items()}),
         r"an array of complex128, where a network has floats"),
    ],
)  # fmt: skip
def test_a_network_that_is_not_simclrs_is_refused(tmp_path, change, said):
    arrays = {k: np.ascontiguousarray(v) for k, v in simclr_variables("tf1_r18").items()}
    change(arrays)
    write_bundle(tmp_path / "model.ckpt-1", arrays | {"global_step": np.int64(1)})
    with pytest.raises(UserError, match=said) as caught:
        load_encoder(tmp_path / "model.ckpt-1.index")
    assert str(caught.value).startswith(str(tmp_path)) and "\n" not in str(caught.value)


def test_a_stem_of_resnet_d_without_selective_kernels_is_refused():
    stem = [(3, 3, 3, 32), (3, 3, 32, 32), (3, 3, 32, 64)]
    with pytest.raises(UserError, match="55 convolutions behind a stem of 64 channels"):
        simclr_resnet(stem + 52 * [(1, 1, 64, 64)])  # as many as ResNet-50 has behind its stem


# ---- BYOL ----------------------------------------------------------------------------------------


def haiku_trees(width=1, key="full_pretrain_resnet50", resnet_only=False):
    """The parameters and states of a full file by module, at the recorded weights."""
    names = golden_json("variable_names")["byol"][key]
    trees = {}
    for part in ("params", "state"):
        tree = trees.setdefault(part, {})
        for name, shape in names[part]:
            if resnet_only and not name.startswith("res_net"):
                continue
            module, variable = name.rsplit("/", 1)
            if name.startswith("res_net"):
                shape = [n if n < 16 else n * width for n in shape]
            else:  # smaller heads
                shape = [n if n == 2048 else min(n, 32) for n in shape]
            if part == "params":
                value = weight(f"byol/resnetw/{module}/{variable}", shape, KINDS[variable])
            elif variable == "average":
                kind = "mean" if "mean_ema" in module else "var"
                value = weight(f"byol/resnetw/{module}/average", shape, kind)
            else:  # of which a wrong reader would take the place of the average
                value = np.full(shape, 7, np.int32 if variable == "counter" else np.float32)
            tree.setdefault(module, {})[variable] = value
    return trees["params"], trees["state"]


def test_byols_online_network_normalisation_and_head(tmp_path):
    params, state = haiku_trees()
    byol_file = write_byol(tmp_path / "pretrain_res50x1.pkl", params, state, step=312_500)
    encoder = load_encoder(byol_file, layer=-1)
    assert encoder.metadata["encoder"] == "resnet50-byol" and encoder.metadata["method"] == "byol"
    assert encoder.network.num_features == 32
    encoder.network = encoder.network.encoder
    for case, size in {"r50": (64, 64), "r50_odd": (57, 71), "r50_224": (224, 224)}.items():
        assert rel(features(encoder, *size), golden("byol_resnet")[f"{case}/features_eval"]) < 1e-5
    official = read_official(byol_file)
    assert official.kind == "BYOL" and official.facts == {"step": 312_500}
    assert official.input.mean == (0.485, 0.456, 0.406) and official.input.crop == 0.875
    assert official.head == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert {"predictor", "classifier", "target_params", "target_state"} <= official.left_out.keys()
    ours = official.head_tensors
    assert np.array_equal(ours["0.weight"].T, params["projector/linear"]["w"])
    assert np.array_equal(ours["3.weight"].T, params["projector/linear_1"]["w"])


@pytest.mark.parametrize(
    "case, size",
    [("r18", (64, 64)), ("r18_odd", (57, 71)), ("r18_imagenette128", (128, 128))],
)
def test_byols_resnet18(tmp_path, case, size):
    """Whose first shortcut is a convolution, as in each group."""
    path = write_byol(tmp_path / "a.pkl", *haiku_trees(key=case.removesuffix("_odd")))
    encoder = load_encoder(path)
    assert encoder.metadata["encoder"] == "resnet18-byol" and "head" in encoder.metadata
    assert rel(features(encoder, *size), golden("byol_resnet")[f"{case}/features_eval"]) < 1e-5


@pytest.mark.slow
def test_byol_of_twice_the_width(tmp_path):
    params, state = haiku_trees(width=2, resnet_only=True)
    encoder = load_encoder(write_byol(tmp_path / "res50x2.pkl", params, state))
    assert encoder.metadata["encoder"] == "resnet50x2-byol"
    recorded = golden("byol_resnet")["r50_2x/features_eval"]
    assert rel(features(encoder, 48, 48), recorded) < 1e-5


def test_a_byol_network_that_lacks_an_average_is_refused():
    params, state = haiku_trees(resnet_only=True)
    del state["res_net50/~/block_group_3/~/block_2/~/batchnorm_2/~/var_ema"]["average"]
    with pytest.raises(UserError, match=r"resnet50-byol: layer4.2.bn3.running_var is missing"):
        byol({"online_params": params, "online_state": state})


# ---- MoCo ----------------------------------------------------------------------------------------


def moco_state(version, network):
    """The state dict of an official checkpoint; its queries' network is `network`."""
    listed = golden_json("variable_names")["moco"][f"resnet50_{version}"]["state_dict"]
    draw = torch.Generator().manual_seed(0)
    state = {}
    for key, shape, dtype in listed:
        shape = [8, 16] if key == "module.queue" else shape
        state[key] = torch.rand(shape, generator=draw).to(getattr(torch, dtype.split(".")[1]))
        ours = key.removeprefix("module.encoder_q.")
        if ours in network:
            state[key] = network[ours]
    return state


@pytest.fixture(scope="module")
def resnet50():
    return with_statistics("resnet50")


@pytest.fixture(scope="module")
def resnet18():
    return with_statistics("resnet18")


def with_statistics(name):
    torch.manual_seed(0)
    network = build(name)
    with torch.no_grad():
        for key, tensor in network.state_dict().items():
            if "running" in key:
                tensor.uniform_(0.5, 1.5)
    return network.eval()


@pytest.mark.parametrize("version, head, old", [("v1", 1, True), ("v2", 3, False)])
def test_mocos_network_of_the_queries(tmp_path, resnet50, version, head, old):
    """Also in the format of torch.save of 2019, in which the published files are."""
    state = moco_state(version, resnet50.state_dict())
    content = {"epoch": 200, "arch": "resnet50", "state_dict": state, "optimizer": {"state": {}}}
    path = tmp_path / f"moco_{version}_200ep_pretrain.pth.tar"
    torch.save(content, path, _use_new_zipfile_serialization=not old)
    encoder, official = load_encoder(path, layer=-1), read_official(path)
    images = inputs(57, 71)
    with torch.no_grad():
        assert torch.equal(encoder.network.encoder(images), resnet50(images))
    assert official.kind == f"MoCo {version}" and official.facts == {"epoch": 200}
    assert len(official.head) == head and official.left_out["queue"] == 1
    assert official.left_out["encoder_k"] == sum("encoder_k" in key for key in state)
    assert encoder.input.interpolation == "bilinear" and encoder.input.mean is not None
    assert encoder.network.num_features == 128


@pytest.mark.parametrize("prefix", ["module.encoder_q.", "encoder_q.", "module.", ""])
def test_a_stripped_file_of_mocos(tmp_path, resnet18, prefix):
    """Without queue, keys' network and head; without prefixes nothing says whose it is."""
    state = {f"{prefix}{key}": value for key, value in resnet18.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "a.pth.tar")
    encoder = load_encoder("", str(tmp_path / "a.pth.tar"))  # as --weights
    assert torch.equal(encoder.network.layer4[1].conv2.weight, resnet18.layer4[1].conv2.weight)
    assert encoder.metadata["method"] == ("moco" if "encoder_q" in prefix else "")
    assert encoder.name == str(tmp_path / "a.pth.tar")


def test_moco_v3(tmp_path, resnet18):
    """Whose last BatchNorm has neither gain nor shift."""
    body = resnet18.state_dict()
    state = {f"module.base_encoder.{key}": value for key, value in body.items()}
    state |= {f"module.momentum_encoder.{key}": value + 1 for key, value in body.items()}
    bn = {"running_mean": torch.rand(6), "running_var": torch.rand(6) + 1}
    head = {"0.weight": torch.rand(6, 512), "3.weight": torch.rand(5, 6)}
    head |= {f"1.{k}": v for k, v in bn.items()} | {
        "1.weight": torch.rand(6),
        "1.bias": torch.ones(6),
    }
    head |= {f"4.{k}": v[:5] for k, v in bn.items()}
    state |= {f"module.base_encoder.fc.{key}": value for key, value in head.items()}
    state |= {"module.predictor.0.weight": torch.rand(3, 3)}
    torch.save({"epoch": 300, "state_dict": state}, tmp_path / "r-50-300ep.pth.tar")
    official = read_official(tmp_path / "r-50-300ep.pth.tar")
    assert official.kind == "MoCo v3" and official.network == "resnet18"
    assert official.metadata["method"] == "moco"
    assert official.metadata["linear_protocol"] == "moco-v3"
    assert official.head == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d"]
    assert official.left_out == {"momentum_encoder": len(body), "predictor": 1}
    with torch.no_grad():
        images = inputs(48, 48)
        encoder = load_encoder(tmp_path / "r-50-300ep.pth.tar", layer=-1)
        hidden = torch.relu(
            (resnet18(images) @ head["0.weight"].T - bn["running_mean"])
            / (bn["running_var"] + 1e-5).sqrt() * head["1.weight"] + 1
        )  # fmt: skip
        out = (hidden @ head["3.weight"].T - bn["running_mean"][:5]) / (
            bn["running_var"][:5] + 1e-5
        ).sqrt()
        assert rel(encoder.network(images), out) < 1e-5


@pytest.mark.parametrize("name", ["resnet18", "resnet18-cifar", "resnext50_32x4d", "resnet18x2"])
def test_a_plain_state_dict_is_recognised(name):
    network = build(name)
    official = moco(network.state_dict() | {"fc.weight": torch.ones(10, 4)}, size=2**30)
    assert official.network == name and official.left_out == {"fc": 1}
    assert f"assumed {official.input.size} pixels, bilinear" in official.lines()[1]
    broken = network.state_dict()
    del broken["layer4.1.bn2.bias"]
    with pytest.raises(UserError, match=rf"{name}: layer4.1.bn2.bias is missing$"):
        moco(broken, size=2**30)


def test_a_state_dict_of_another_memory_format_is_written(tmp_path, resnet18):
    """Safetensors hold no tensors that are not contiguous."""
    network = with_statistics("resnet18").to(memory_format=torch.channels_last)
    torch.save(network.state_dict(), tmp_path / "a.pth")
    out = tmp_path / "encoder.safetensors"
    evaluate(eval.weights.__main__, str(tmp_path / "a.pth"), "--out", str(out))
    assert torch.equal(load_encoder(out).network.conv1.weight, resnet18.conv1.weight)


# ---- what is none --------------------------------------------------------------------------------


class Command:
    def __reduce__(self):
        import os

        return os.system, ("touch executed",)


@pytest.mark.parametrize("old", [False, True])
def test_a_file_of_torch_that_runs_a_command_is_refused(tmp_path, monkeypatch, old):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Command()}, "a.pth", _use_new_zipfile_serialization=not old)
    with pytest.raises(UserError, match=r"^a\.pth: not weights of torch") as caught:
        load_encoder("a.pth")
    assert "\n" not in str(caught.value) and not (tmp_path / "executed").exists()
    torch.load("a.pth", weights_only=False)
    assert (tmp_path / "executed").exists()  # or the attack was none


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda t: t[:1].half().expand(10**5, -1, -1, -1),
            "its tensors claim to be larger than the file",
        ),
        (lambda t: t.to("meta"), "conv1.weight is not a plain tensor"),
        (lambda t: t.to_sparse(), "conv1.weight is not a plain tensor"),
        (lambda t: t.cfloat(), "conv1.weight is not a plain tensor .complex64"),
        (lambda t: t.int(), "conv1.weight is of torch.int32, not of floats"),
        (lambda t: t.fill_(torch.nan), "conv1.weight has values that are not finite"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, on sparse tensors
def test_tensors_that_lie_are_one_line(tmp_path, resnet18, change, said):
    state = resnet18.state_dict()
    state["conv1.weight"] = change(state["conv1.weight"].clone())
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(UserError, match=said) as caught:
        load_encoder(tmp_path / "a.pth")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\x03\x04" + b"\0" * 50, b"\x80\x02}q\x00.", b"plain text", b"\x80\x02", b"\x89PNG"],
)
def test_what_is_no_checkpoint_is_one_line(tmp_path, content):
    path = tmp_path / "a.bin"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_encoder(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    shutil.rmtree(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        load_encoder(path)


def test_an_archive_is_to_be_unpacked(tmp_path):
    """As SimCLR's zips, and a `.pth.tar` that is a tar indeed."""
    inside, paths = tmp_path / "model.ckpt-1.index", [tmp_path / f"a.{k}" for k in range(3)]
    inside.write_bytes(b"x" * 1000)
    with zipfile.ZipFile(paths[0], "w") as archive:
        archive.write(inside, "ResNet50_1x/model.ckpt-1.index")
    with tarfile.open(paths[1], "w") as archive:
        archive.add(inside, "model.ckpt-1.index")
    paths[2].write_bytes(gzip.compress(inside.read_bytes()))
    for path in paths:
        with pytest.raises(UserError, match=rf"^{path}: an archive; unpack it"):
            load_encoder(path)


def deflated(path):
    """The same file with its parts compressed."""
    with zipfile.ZipFile(path) as archive:
        parts = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts:
            archive.writestr(name, content)


def wide(dtype):
    """Hundreds of GB, of which one value is stored."""
    return torch.zeros(1, dtype=dtype).expand(10**6, 10**5)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"encoder_q.fc.weight": wide(torch.float32)}, "claim to be larger than the file$"),
        ({"encoder_q.fc.weight": wide(torch.float16)}, "claim to be larger than the file$"),
        ({"encoder_q.fc.weight": torch.zeros(3, 7)}, r"in its head it is \(3, 512\)"),
        ({"encoder_q.fc.0.x": torch.zeros(3)}, "its head: 0.weight is missing"),
        ({"encoder_q.conv1.num_batches_tracked": wide(torch.int64)},
         "claim to be larger than the file$"),
        ({"encoder_q.conv1.weight": torch.zeros(64, 3, 7, 7, device="meta")}, "not a plain tensor"),
        ({"encoder_q.bn1.bias": torch.zeros(64).to_sparse()}, r"not a plain tensor \(.*sparse"),
        ({"encoder_q.bn1.bias": torch.zeros(64).cfloat()}, r"not a plain tensor \(complex64"),
        ({"encoder_q.bn1.bias": torch.zeros(64).int()}, r"bias is of torch.int32, not of floats"),
        ({"module.encoder_q.bn1.bias": torch.zeros(64)}, "would be the same tensor"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Validating sparse")
def test_tensors_of_other_kinds_or_sizes_than_they_claim(tmp_path, change, said):
    state = {f"encoder_q.{key}": value for key, value in build("resnet18").state_dict().items()}
    torch.save({"state_dict": state | change}, tmp_path / "a.pth.tar")
    with pytest.raises(UserError, match=said) as caught:
        load_encoder(tmp_path / "a.pth.tar")
    assert "\n" not in str(caught.value)


def test_compressed_parts_are_not_unpacked(tmp_path):
    torch.save({"state_dict": {"conv1.weight": torch.zeros(10**6)}}, tmp_path / "a.pth")
    deflated(tmp_path / "a.pth")
    assert torch.load(tmp_path / "a.pth")  # or the attack was none
    for run, weights in ((tmp_path / "a.pth", ""), ("", f"torchvision:resnet18={tmp_path}/a.pth")):
        with pytest.raises(UserError, match="parts that claim to be larger than the file"):
            load_encoder(run, weights)


def test_what_a_file_asks_for_beyond_weights_is_named(tmp_path):
    torch.save({"state_dict": torch.nn.Linear(1, 1)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"asks for torch.nn.modules.linear.Linear, which is more"):
        load_encoder(tmp_path / "a.pth")


@pytest.mark.parametrize("content", [{"model": {}, "epoch": 1}, {"model": torch.ones(3)}])
def test_what_a_file_holds_instead_is_said(tmp_path, content):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"holds no .*\bmodel\b"):
        load_encoder(tmp_path / "a.pth")


@pytest.mark.parametrize(
    "change, said",
    [
        ({"global_step": np.complex64(1j)}, ""),
        ({"global_step": np.float32(np.nan)}, ""),
        ({"base_model/conv2d/kernel": np.ones((7, 7, 3, 64), np.complex64)}, "array of complex64"),
        ({"head_contrastive/nl_0/dense/kernel": np.ones((512, 7), np.float32)}, r"head it is \(7,"),
        ({"head_contrastive/nl_0/dense/kernel": np.float32(1)}, r"head it is \(0, 512\)"),
    ],
)  # fmt: skip
def test_variables_of_other_kinds_and_a_head_that_does_not_fit(tmp_path, change, said):
    arrays = {k: np.ascontiguousarray(v) for k, v in simclr_variables("tf1_r18").items()}
    parts = ("gamma", "beta", "moving_mean", "moving_variance")
    head = {f"head_contrastive/nl_0/batch_norm/{part}": np.ones(3, np.float32) for part in parts}
    head["head_contrastive/nl_0/dense/kernel"] = np.ones((512, 3), np.float32)
    write_bundle(tmp_path / "model.ckpt-1", {**arrays, **head, **change})
    if said:
        with pytest.raises(UserError, match=said):
            load_encoder(tmp_path)
    else:
        assert read_official(tmp_path).facts == {}


def test_a_name_asks_for_no_memory(tmp_path):
    """A file of a few bytes that claims to be a network of a billion values."""
    from safetensors.torch import save_file

    from common.files import to_json
    from eval.encoder import Preprocess, export_metadata

    with torch.device("meta"):
        metadata = export_metadata("resnet200x4-byol", build("demo"), Preprocess(32), "")
    metadata["encoder"] = "resnet200x4-byol"
    text = {key: to_json(value) for key, value in metadata.items()}
    save_file({"conv1.weight": torch.ones(1)}, tmp_path / "a.safetensors", metadata=text)
    with pytest.raises(UserError, match="not an exported encoder"):
        load_encoder(tmp_path / "a.safetensors")
