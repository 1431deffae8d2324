"""Encoders in other libraries' formats and back: the same features, or a refusal in one line."""

import json
import pickle
import shutil
import struct
import subprocess
import sys

import pytest
import timm
import torch
import torchvision
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import eval.export
from common import encoders
from common.cli import parse_settings
from common.data import Batch
from common.errors import UserError
from eval.encoder import Encoder, Preprocess, load_encoder
from eval.features import prepare
from eval.settings import Export
from eval.weights import hub, targets
from tests.eval.harness import save_encoder, save_run
from tests.helpers import ROOT, evaluate, rel

NORMALISED = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}


def encoder_file(folder, name, size=64, channels=3, **preprocess):
    """An encoder whose weights and statistics are all its own."""
    torch.manual_seed(len(name))
    network = encoders.build(name, channels, size)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.running_var, module.weight.data):
                values.uniform_(0.5, 1.5)
            for values in (module.running_mean, module.bias.data):
                values.normal_(0, 0.2)
            module.num_batches_tracked += 7
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "encoder.safetensors"
    about = {"encoder": name, "channels": channels, "method": "simclr"}
    about |= {"input": vars(Preprocess(size, **preprocess))}
    tensors = dict(network.state_dict()) | {"projection_head.0.weight": torch.ones(2, 2)}
    about["head_prefix"] = "projection_head."  # timm's networks have a `head` of their own
    about["head"] = ["Linear"]
    save_file(tensors, path, {key: json.dumps(value) for key, value in about.items()})
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Of ResNet-18, with a normalisation, and ResNet-50, without one."""
    folder = tmp_path_factory.mktemp("encoders")
    return {
        "resnet18": encoder_file(folder / "18", "resnet18", **NORMALISED, interpolation="bilinear"),
        "resnet50": encoder_file(folder / "50", "resnet50", crop=0.9),
    }


def export(path, layout, out, *argv):
    evaluate(eval.export, path, "--to", layout, "--out", out, *argv)
    return out


def images_for(encoder, count=2):
    channels = encoder.metadata.get("channels", 3)
    return torch.randn(count, channels, encoder.input.size, encoder.input.size)


@torch.no_grad()
def assert_same(encoder, theirs):
    images = images_for(encoder)
    ours = encoder.network(images)
    assert rel(theirs(images), ours) < 1e-5 and ours.std() > 1e-3


def assert_back(folder, encoder):
    back = hub.from_hub_folder(folder)
    assert back.metadata["encoder"] == encoder.metadata["encoder"] and not back.network.training
    assert back.input == Preprocess(**vars(encoder.input) | tuples(encoder.input))
    assert_same(encoder, back.network)


def tuples(preprocess):  # as JSON has lists
    return {key: tuple(x) for key in ("mean", "std") if (x := getattr(preprocess, key))}


# ---- out and back --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvision(files, name, tmp_path, capsys):
    out, encoder = export(files[name], "torchvision", tmp_path / "out"), load_encoder(files[name])
    model = getattr(torchvision.models, name)()
    state = torch.load(out / f"{name}.pth", weights_only=True)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["fc.weight", "fc.bias"], [])
    model.fc = nn.Identity()
    assert_same(encoder, model.eval())
    said = capsys.readouterr().out
    assert "left out: the head, of 1 layer" in said and f"torchvision.models.{name}()" in said
    lines = said.split("to load it:\n")[1]
    namespace = {"torch": torch, "torchvision": torchvision}
    exec(lines, namespace)  # what is printed does it
    assert_same(encoder, namespace["model"].eval())
    assert [path.name for path in out.iterdir()] == [f"{name}.pth"]


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_timm(files, name, tmp_path, capsys):
    out, encoder = export(files[name], "timm", tmp_path / "out"), load_encoder(files[name])
    namespace = {"timm": timm}
    exec(capsys.readouterr().out.split("to load it:\n")[1], namespace)
    assert_same(encoder, namespace["model"])
    assert_prepared(encoder, lambda image: namespace["transform"](image)[None])
    assert_back(out, encoder)
    classifier = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=5)
    assert classifier.fc.out_features == 5
    assert torch.equal(classifier.conv1.weight, encoder.network.conv1.weight)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_transformers(files, name, tmp_path, capsys):
    import transformers

    out, encoder = export(files[name], "transformers", tmp_path / "out"), load_encoder(files[name])
    namespace = {"transformers": transformers}
    exec(capsys.readouterr().out.split("to load it:\n")[1], namespace)
    model, processor = namespace["model"], namespace["processor"]
    assert_same(encoder, lambda images: model(images).pooler_output.flatten(1))
    assert_prepared(encoder, lambda x: processor(x, return_tensors="pt")["pixel_values"])
    assert_back(out, encoder)


def assert_prepared(encoder, theirs):
    """An image of no square is prepared as here, up to the rounding of sizes."""
    columns, rows = torch.arange(120) * 2, torch.arange(100) * 2
    pixels = torch.stack([columns.repeat(100, 1), rows[:, None].repeat(1, 120)], 2)
    pixels = torch.cat([pixels, 255 - pixels[..., :1]], 2).byte()
    batch = Batch(pixels.permute(2, 0, 1)[None], torch.tensor([[100, 120]]), torch.tensor([0]))
    ours, found = prepare(batch, encoder.input, "cpu"), theirs(Image.fromarray(pixels.numpy()))
    step = 0.02 / min(encoder.input.std or (1,))  # 5 of 255 levels, normalised
    assert found.shape == ours.shape and (found - ours).abs().max() < step


@pytest.mark.parametrize("layout", ["timm", "transformers"])
def test_a_folder_whose_name_is_not_utf8(files, tmp_path, layout):
    out = export(files["resnet18"], layout, tmp_path / "caf\udce9")
    assert_back(out, load_encoder(files["resnet18"]))


@pytest.mark.parametrize(
    ("name", "channels"), [("timm:test_vit", 3), ("timm:test_vit", 2), ("timm:test_resnet", 3)]
)
def test_networks_of_timm_also_those_of_one_size(tmp_path, name, channels):
    """The smallest ones: a transformer made for 160 pixels, here for 64, and a ResNet-D."""
    path = encoder_file(tmp_path / "run", name, channels=channels)
    out, encoder = export(path, "timm", tmp_path / "out"), load_encoder(path)
    assert_same(encoder, timm.create_model(f"local-dir:{out}", pretrained=True).eval())
    assert_back(out, encoder)


def test_nothing_of_timms_own_weights_is_left(files, tmp_path):
    out = export(files["resnet50"], "timm", tmp_path / "out", "--license", "cc-by-4.0")
    found = timm.create_model(f"local-dir:{out}", pretrained=True).pretrained_cfg
    own = timm.get_pretrained_cfg("resnet50").to_dict()
    assert own["hf_hub_id"] and own["crop_pct"] == 0.95  # or it would be no test
    of_weights = {"url", "hf_hub_id", "license", "paper_ids", "paper_name", "origin_url", "tag"}
    of_weights |= {"test_input_size", "test_crop_pct", "notes", "description", "label_offset"}
    given = {key: found.get(key) for key in of_weights if found.get(key)}
    assert given == {"license": "cc-by-4.0"}
    assert (found["crop_pct"], found["input_size"], found["interpolation"]) == (
        0.9,
        [3, 64, 64],
        "bicubic",
    )
    assert list(found["mean"]) == [0, 0, 0] and list(found["std"]) == [1, 1, 1]


def test_a_width_that_transformers_can_hold_and_a_channel_that_timm_can(tmp_path):
    path = encoder_file(tmp_path / "wide", "resnet18x2")
    out = export(path, "transformers", tmp_path / "transformers")
    assert_back(out, load_encoder(path))
    config = json.loads((out / "config.json").read_text())
    assert config["embedding_size"] == 128 and config["hidden_sizes"] == [128, 256, 512, 1024]
    path = encoder_file(tmp_path / "grey", "resnet18", channels=1)
    assert_back(export(path, "timm", tmp_path / "timm"), load_encoder(path))


def test_detectron2(files, tmp_path, capsys):
    out, encoder = (
        export(files["resnet50"], "detectron2", tmp_path / "out"),
        load_encoder(files["resnet50"]),
    )
    content = pickle.loads((out / "resnet50.pkl").read_bytes())
    assert content["matching_heuristics"] is True and content["__author__"]
    ours, theirs = encoder.network.state_dict(), content["model"]
    assert len(theirs) == len(ours) == 318
    for key, name in {
        "conv1.weight": "stem.conv1.weight",
        "bn1.running_var": "stem.conv1.norm.running_var",
        "layer1.0.conv1.weight": "res2.0.conv1.weight",
        "layer4.2.bn3.bias": "res5.2.conv3.norm.bias",
        "layer2.0.downsample.0.weight": "res3.0.shortcut.weight",
        "layer2.0.downsample.1.running_mean": "res3.0.shortcut.norm.running_mean",
    }.items():
        assert torch.equal(torch.from_numpy(theirs[name]), ours[key])
    config = yaml.safe_load((out / "resnet50.yaml").read_text())
    model = config["MODEL"]
    assert model["PIXEL_MEAN"] == [0, 0, 0] and model["PIXEL_STD"] == [255, 255, 255]
    assert model["RESNETS"]["STRIDE_IN_1X1"] is False and model["BACKBONE"]["FREEZE_AT"] == 0
    assert model["WEIGHTS"] == str(out / "resnet50.pkl") and model["RESNETS"]["DEPTH"] == 50
    assert config["INPUT"]["FORMAT"] == "RGB" and config["SOLVER"]["MAX_ITER"] == 24_000
    export(files["resnet18"], "detectron2", tmp_path / "basic")
    assert [path.name for path in (tmp_path / "basic").iterdir()] == ["resnet18.pkl"]
    assert "no config" in capsys.readouterr().out


def test_the_config_has_the_normalisation_and_the_widths_of_the_encoder():
    with torch.device("meta"):
        network = encoders.build("resnet50x2")
    preprocess = Preprocess(224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    encoder = Encoder(network, preprocess, "encoder", {"encoder": "resnet50x2"})
    model = yaml.safe_load(targets.detectron2_config(encoder, ROOT / "x.pkl"))["MODEL"]
    assert model["PIXEL_MEAN"] == [123.675, 116.28, 103.53]  # as in MoCo's own config
    assert model["PIXEL_STD"] == [58.395, 57.12, 57.375]
    known = {"STEM_OUT_CHANNELS": 128, "RES2_OUT_CHANNELS": 512, "NUM_GROUPS": 1}
    known |= {"WIDTH_PER_GROUP": 128}
    assert {key: model["RESNETS"][key] for key in known} == known


# ---- refusals ------------------------------------------------------------------------------------

ALL = {"torchvision", "timm", "transformers", "detectron2"}


@pytest.mark.parametrize(
    ("metadata", "layouts", "reason"),
    [
        ({"encoder": "resnet50-byol"}, ALL, "SAME padding has"),
        ({"encoder": "resnet18-simclr"}, ALL, "SAME padding has"),
        ({"encoder": "resnet50-sk"}, ALL, "selective kernels have"),
        ({"encoder": "resnet18-cifar"}, ALL, "a CIFAR stem has"),
        ({"encoder": "resnet50", "norm": "gn+ws"}, ALL, r"GN \+ WS has"),
        ({"encoder": "timm:test_vit", "norm": "gn+ws"}, ALL, r"GN \+ WS has"),
        ({"encoder": "demo"}, ALL, "the demo network has"),
        ({"encoder": "timm:test_vit"}, ALL - {"timm"}, "a network of timm has"),
        (
            {"encoder": "resnet50x2"},
            {"torchvision", "timm"},
            "2 times as wide from its stem on has",
        ),
        ({"encoder": "resnet200"}, {"torchvision", "detectron2"}, "this depth has"),
        ({"encoder": "resnext50_32x4d"}, {"transformers"}, "bottlenecks with groups or of another"),
        ({"encoder": "wide_resnet50_2"}, {"transformers"}, "bottlenecks with groups or of another"),
        ({"encoder": "resnet50", "channels": 4}, {"torchvision", "detectron2"}, "an input of 4"),
        ({"encoder": "resnet50"}, set(), ""),
    ],
)
def test_what_a_layout_cannot_hold_is_refused(metadata, layouts, reason):
    encoder = Encoder(nn.Identity(), Preprocess(64), "encoder", metadata)
    for layout in ALL - layouts:
        targets.refuse(encoder, layout)
    for layout in layouts:
        with pytest.raises(UserError, match=rf"{reason}.* no counterpart in {layout}; --to .*onnx"):
            targets.refuse(encoder, layout)


def test_a_refusal_leaves_no_folder(tmp_path):
    path = encoder_file(tmp_path / "run", "resnet18-cifar", 32)
    with pytest.raises(SystemExit):
        export(path, "timm", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_features_are_never_written(files, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "resnet18.pth").write_text("of before")
    names = targets.to_torchvision

    def wrong(encoder, folder):
        theirs = names(encoder, folder)
        return lambda images: theirs(images) * (1 + 1e-4)

    monkeypatch.setattr(targets, "to_torchvision", wrong)
    with pytest.raises(SystemExit):
        export(files["resnet18"], "torchvision", out)
    assert "differ from ours by 1.0e-04 of the largest, more than 1e-05" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["resnet18.pth"]
    assert (out / "resnet18.pth").read_text() == "of before"


def test_weights_that_are_not_finite_are_not_written(tmp_path, capsys):
    network = encoders.build("resnet18", 3, 64)
    network.conv1.weight.data[0, 0, 0, 0] = torch.nan
    path = save_encoder(tmp_path / "x.safetensors", network, "resnet18", Preprocess(64))
    with pytest.raises(SystemExit):
        export(path, "torchvision", tmp_path / "out")
    assert "has values that are not finite" in capsys.readouterr().err


def test_a_folder_with_other_files_is_left_alone(files, tmp_path, capsys):
    """A run has a config.json of its own; and an earlier export is replaced."""
    run = save_run(tmp_path / "run")
    before = (run / "config.json").read_bytes()
    with pytest.raises(SystemExit):
        export(files["resnet18"], "timm", run)
    assert "holds other files" in capsys.readouterr().err
    assert (run / "config.json").read_bytes() == before
    for _ in range(2):
        (tmp_path / "out" / ".export-of-a-kill").mkdir(parents=True)
        export(files["resnet18"], "timm", tmp_path / "out")
        names = {path.name for path in (tmp_path / "out").iterdir()}
        assert names == {"README.md", "config.json", "model.safetensors"}


def test_features_that_are_all_zero_are_no_difference(tmp_path):
    """Of an encoder that has collapsed."""
    network = encoders.build("resnet18", 3, 64)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.zeros_(module.weight)
    path = save_encoder(tmp_path / "x.safetensors", network, "resnet18", Preprocess(64))
    export(path, "torchvision", tmp_path / "out")
    assert (tmp_path / "out" / "resnet18.pth").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "say which RUN to export"),
        ("RUN", "--to which\? torchvision, timm, transformers, onnx, pt2, detectron2"),
        ("RUN --to timm", "--out: say into which folder"),
        ("RUN --to onnx --out x --push a/b", "--push: with --to timm or transformers, not onnx"),
        ("RUN --to timm --out x --push name", "--push name: not of the form owner/name"),
        ("RUN --to timm --out x --push a/../b", "--push a/../b: not of the form owner/name"),
        ("RUN --to timm --out x --time", "--time: with --to onnx or pt2, not timm"),
        ("RUN --to timm --out x --license a\nb:", "no identifier of a licence"),
        ("nowhere --to timm --out x", "nowhere: no such file"),
    ],
)
def test_a_mistake_in_the_command_line_is_one_line(files, words, said):
    argv = [w.replace("RUN", files["resnet18"]) for w in words.split(" ") if w]
    with pytest.raises(UserError, match=said):
        parse_settings(Export, argv, "python -m eval.export", "")


def test_help_comes_without_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('imported')")
    command = [sys.executable, "-m", "eval.export", "--help"]
    done = subprocess.run(
        command, env={"PYTHONPATH": f"{tmp_path}:{ROOT}"}, capture_output=True, text=True
    )
    assert done.returncode == 0 and "--to transformers --out DIR" in done.stdout


# ---- folders of strangers ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("folders")
    return {
        layout: export(files["resnet18"], layout, folder / layout)
        for layout in ("timm", "transformers")
    }


def test_a_folder_of_ours(files, tmp_path):
    shutil.copy(files["resnet18"], tmp_path / "encoder.safetensors")
    encoder = hub.from_hub_folder(tmp_path)
    assert encoder.metadata["method"] == "simclr" and encoder.input.mean == [0.4, 0.5, 0.6]
    assert_same(load_encoder(files["resnet18"]), encoder.network)


def changed(path, **changes):
    """A JSON file with some of its values replaced."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("layout", "file", "changes", "said"),
    [
        ("timm", "config", {"architecture": "unknown"}, "timm has no network 'unknown'"),
        ("timm", "config", {"architecture": "hf-hub:a/b"}, "timm has no network 'hf-hub:a/b'"),
        ("timm", "config", {"architecture": "../x"}, "timm has no network"),
        ("timm", "config", {"architecture": ["resnet18"]}, "timm has no network"),
        (
            "timm",
            "config",
            {"architecture": "resnet50"},
            "resnet50: layer1.0.conv3.weight is missing, and 164 more",
        ),
        (
            "timm",
            "config",
            {"architecture": "vit_giant_patch14_dinov2"},
            "timm:vit_giant_patch14_dinov2: cls_token is missing",
        ),
        ("timm", "config", {"model_args": {"checkpoint_path": "/x"}}, "changed by checkpoint_path"),
        ("timm", "config", {"model_args": {"img_size": 10**9}}, "changed by img_size=1000000000"),
        ("timm", "config", {"pretrained_cfg": []}, "config.json"),
        ("timm", "config", {"pretrained_cfg": {"input_size": [3, 10**9, 10**9]}}, "config.json"),
        ("transformers", "config", {"model_type": "bert"}, "config.json is of 'bert'"),
        ("transformers", "config", {"model_type": {"a": 1}}, "config.json is of"),
        ("transformers", "config", {"embedding_size": 6400}, "no ResNet that is known"),
        ("transformers", "config", {"depths": [10**9] * 4}, "no ResNet that is known"),
        ("transformers", "config", {"layer_type": []}, "config.json"),
        ("transformers", "config", {"downsample_in_bottleneck": True}, "downsample_in_bottleneck"),
        ("transformers", "config", {"num_channels": 4}, "ValueError: mean"),
        ("transformers", "config", {"num_channels": "x"}, "channels 'x'"),
        ("transformers", "preprocessor_config", {"do_center_crop": False}, "does not crop"),
        ("transformers", "preprocessor_config", {"crop_pct": 0}, "ZeroDivision"),
        ("transformers", "preprocessor_config", {"crop_pct": 0.5}, "has crops of"),
        ("transformers", "preprocessor_config", {"resample": 0}, "neither bilinear nor bicubic"),
        ("transformers", "preprocessor_config", {"image_std": [0.2, 0.2, 0]}, "mean .* and std"),
        ("transformers", "preprocessor_config", {"image_mean": ["a"] * 3}, "TypeError"),
        ("transformers", "preprocessor_config", {"rescale_factor": 1}, "values to .0, 1."),
    ],
)
def test_a_config_that_lies_is_one_line(folders, tmp_path, layout, file, changes, said):
    folder = shutil.copytree(folders[layout], tmp_path / "x")
    changed(folder / f"{file}.json", **changes)
    with pytest.raises(UserError, match=said) as caught:
        hub.from_hub_folder(folder)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(folder))


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000, " " * 2**21 + "{}", "\udcff"])
def test_a_config_that_is_none(folders, tmp_path, content):
    folder = shutil.copytree(folders["timm"], tmp_path / "x")
    (folder / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"config\.json"):
        hub.from_hub_folder(folder)


class Payload:
    def __reduce__(self):
        return exec, ("raise SystemExit('it was run')",)


def test_a_pickle_is_not_read(folders, tmp_path):
    folder = shutil.copytree(folders["timm"], tmp_path / "x")
    (folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.pth"):
        torch.save({"x": Payload()}, folder / name)
    with pytest.raises(UserError, match=r"no model\.safetensors; other files of weights are not"):
        hub.from_hub_folder(folder)
    (folder / "pytorch_model.bin").rename(folder / "model.safetensors")
    with pytest.raises(UserError, match="cannot be read"):
        hub.from_hub_folder(folder)


def test_weights_that_lie_are_one_line(folders, tmp_path):
    folder = shutil.copytree(folders["transformers"], tmp_path / "x")
    path = folder / "model.safetensors"
    state = {key: value.clone() for key, value in load_file(path).items()}  # not of a mapped file
    whole = path.read_bytes()
    stem = "embedder.embedder.convolution.weight"

    def refused(said):
        with pytest.raises(UserError, match=said) as caught:
            hub.from_hub_folder(folder)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400 + len(str(folder))

    for tensors, said in (
        ({key: value for key, value in state.items() if key != stem}, f"{stem} is missing"),
        (state | {"more": torch.ones(1)}, "more is left over"),
        (
            state | {stem: torch.ones(64, 3, 3, 3)},
            "has the shape .64, 3, 3, 3., in resnet18 it is .64, 3, 7, 7.",
        ),
        (
            state | {stem: torch.ones(64, 3, 7, 7, dtype=torch.int8)},
            "conv1.weight is of torch.int8",
        ),
        (
            state | {stem: torch.full((64, 3, 7, 7), torch.nan)},
            "conv1.weight has values that are not finite",
        ),
    ):
        save_file(tensors, path)
        refused(said)
    header = {stem: {"dtype": "F32", "shape": [10**5, 10**5], "data_offsets": [0, 4 * 10**10]}}
    text = json.dumps(header).encode()
    for content in (whole[:-1000], struct.pack("<Q", len(text)) + text + bytes(900)):
        path.write_bytes(content)
        refused("cannot be read")


def test_where_timms_own_weights_are():
    assert hub.timm_repository("resnet50") == "timm/resnet50.a1_in1k"
    assert hub.timm_repository("resnet50.tv_in1k") == "timm/resnet50.tv_in1k"
    for name, said in (
        ("resnet5", "no such network"),
        ("hf-hub:a/b", "no such network"),
        ("resnet50.nobody", "no such network, or not of that tag"),
        ("resnet200", "no weights of it on the Hub"),
    ):
        with pytest.raises(UserError, match=said):
            hub.timm_repository(name)


def test_the_classifier_of_a_folder_is_left_out_and_counted(folders, tmp_path):
    for layout, prefix, classifier in (
        ("timm", "", "fc"),
        ("transformers", "resnet.", "classifier.1"),
    ):
        folder = shutil.copytree(folders[layout], tmp_path / layout)
        path = folder / "model.safetensors"
        state = {f"{prefix}{key}": value for key, value in load_file(path).items()}
        state |= {f"{classifier}.weight": torch.ones(10, 512), f"{classifier}.bias": torch.ones(10)}
        save_file(state, path)
        encoder = load_encoder("", f"hf:{folder}")
        assert encoder.notes == [f"{path}: 2 tensors of the classifier left out"]
        assert_same(hub.from_hub_folder(folders[layout]), encoder.network)


# ---- graphs --------------------------------------------------------------------------------------


def test_a_graph_holds_what_no_layout_can(tmp_path, capsys):
    path = encoder_file(tmp_path / "run", "demo", 32, **NORMALISED)
    out, encoder = export(path, "pt2", tmp_path / "out", "--time"), load_encoder(path)
    said = capsys.readouterr().out
    assert "not normalised, of any size" in said and "median of 20 runs on 1 thread" in said
    assert [path.name for path in out.iterdir()] == ["demo.pt2"]
    namespace = {"torch": torch, "images": torch.rand(3, 3, 40, 33)}
    with torch.no_grad():
        exec(said.split("to load it:\n")[1], namespace)
        mean, std = (torch.tensor(NORMALISED[key]).view(-1, 1, 1) for key in ("mean", "std"))
        ours = encoder.network((namespace["images"] - mean) / std)
    assert rel(namespace["features"], ours) < 1e-5
