"""Files from strangers: none can run code, write outside its folder, or ask for the impossible."""

import ast
import contextlib
import json
import os
import pickle
import struct

import datasets
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import nn

from common import cli
from common.checkpoints import Checkpoints
from common.config import SourceConfig
from common.data import open_images
from common.errors import UserError
from common.launch import launch
from eval.encoder import Preprocess, build_seeded, export_metadata, load_encoder
from eval.results.compare import as_markdown
from eval.results.record import file_name, read, record
from eval.settings import KNN
from eval.subjects import Subject, subjects
from simclr.config import RECIPES, Config
from tests.eval.harness import judged, save_run
from tests.helpers import METHODS, ROOT

# ---- what the code may not say -------------------------------------------------------------------

MODULES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve", "yaml"}
CALLS = {"__import__", "compile", "eval", "exec", "os.popen", "os.system", "torch.hub.load"}
LOADERS = ("torch.load", "get_state_dict", "load_state_dict_from_url", "load_url")


def offences(text):
    """What in a file's text could run code that comes from data."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            if not {a.name for a in node.names} <= {"dump", "dumps"}:  # to write is no danger
                yield node.module
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            said = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if called in CALLS:
                yield called
            if called.endswith(LOADERS) and said.get("weights_only") != "True":
                yield f"{called} without weights_only=True"
            yield from said.keys() & {"trust_remote_code", "allow_pickle", "shell"}


def test_nothing_in_the_code_runs_what_it_reads():
    paths = [p for folder in ("common", "eval", *METHODS) for p in (ROOT / folder).rglob("*.py")]
    assert len(paths) > 25
    found = {str(path): list(offences(path.read_text())) for path in paths}
    assert {path: said for path, said in found.items() if said} == {}


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=trusted)",
        "models.ResNet18_Weights.DEFAULT.get_state_dict(progress=True)",
        "import pickle",
        "def f():\n    from yaml import load",
        "eval('1 + 1')",
        "datasets.load_dataset(name, trust_remote_code=True)",
        "numpy.load(path, allow_pickle=True)",
        "subprocess.run(command, shell=True)",
        "torch.hub.load('owner/name', 'model')",
    ],
)
def test_the_walk_sees_what_would_run_code(line):
    assert list(offences(line))


def test_the_walk_lets_the_rest_pass():
    for line in (
        "torch.load(p, weights_only=True)",
        "model.eval()",
        "re.compile('a')",
        "from pickle import dump",
    ):
        assert not list(offences(line))


# ---- pickles in the place of files ---------------------------------------------------------------


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture(params=["torch.save", "pickle.dump"])
def attack(request, tmp_path):
    """Writes a malicious file to a path; says afterwards whether it has run."""
    marker = tmp_path / "pwned"

    def write(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if request.param == "torch.save":
            torch.save({"step": 3, "model": Payload(marker)}, path)
        else:
            path.write_bytes(pickle.dumps(Payload(marker), protocol=2))
        return path

    yield write
    assert not marker.exists()
    with contextlib.suppress(RuntimeError):  # that a bare pickle is none comes late
        torch.load(write(tmp_path / "again"), weights_only=False)
    assert marker.exists()  # or the attack was none


def test_a_checkpoint(attack, tmp_path):
    attack(tmp_path / "step-00000003.pt")
    checkpoints = Checkpoints(tmp_path, {"model": nn.Linear(2, 2)}, Accelerator(cpu=True))
    assert checkpoints.load() == 0
    [said] = checkpoints.unreadable
    assert "step-00000003.pt: cannot be read" in said


def test_an_encoder(attack, tmp_path):
    for target, said in (
        ("run/encoder.safetensors", "not an exported encoder"),
        ("x.pt", r"not weights of torch|asks for posix\.mkdir, which is not in a BYOL checkpoint"),
    ):
        with pytest.raises(UserError, match=said):
            load_encoder(str(attack(tmp_path / target)))


def test_weights_in_torchs_cache(attack, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    attack(tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth")
    with pytest.raises(UserError, match="cannot be fetched"):
        load_encoder("", "torchvision:resnet18")


@pytest.mark.parametrize("name", ["a.png", "a.parquet", "a.arrow", "state.json"])
def test_images_and_tables(attack, tmp_path, name):
    attack(tmp_path / "source" / name)
    if name == "state.json":
        (tmp_path / "source" / "data.arrow").touch()
    with pytest.raises(UserError):
        open_images(str(tmp_path / "source")).load(1.0)


def test_a_script_beside_a_table_is_not_run(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    marker = tmp_path / "pwned"
    for name in ("source.py", "parquet.py", "dataset.py"):
        (folder / name).write_text(f"import os; os.mkdir({str(marker)!r})")
    image = {"bytes": b"", "path": None}
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": [image] * 4}, features).to_parquet(folder / "a.parquet")
    assert len(open_images(str(folder))) == 4
    assert not marker.exists()


# ---- an encoder's metadata -----------------------------------------------------------------------

PREPROCESS = {"size": 32, "crop": 1.0, "interpolation": "bicubic", "mean": None, "std": None}


def exported(path, tensors=(), without=(), **changes):
    network = build_seeded({"encoder": "demo"}, Preprocess.of(32))
    metadata = export_metadata("demo", network, Preprocess.of(32), "") | {"method": "simclr"}
    metadata = {key: value for key, value in (metadata | changes).items() if key not in without}
    body = dict(network.state_dict()) | dict(tensors)
    save_file(body, path, {key: json.dumps(value) for key, value in metadata.items()})
    return str(path)


def of_before(arch, stem):
    """Files used to have these two in place of a network's one name."""
    return {"without": ["encoder"], "arch": arch, "stem": stem}


@pytest.mark.parametrize(
    "changes",
    [
        {"encoder": "__import__('os').mkdir('pwned')"},
        {"encoder": "../../x"},
        {"encoder": "get_model"},  # functions that torchvision.models has as well
        {"encoder": "list_models-cifar"},
        {"encoder": "_api"},
        {"encoder": "vit_h_14"},  # 2.5 GB of weights at once
        {"encoder": "timm:hf-hub:owner/name"},
        {"encoder": "timm:../../x"},
        {"encoder": ["resnet18"]},
        {"encoder": {"a": 1}},
        {"encoder": None},
        {"without": ["encoder"]},
        of_before(["resnet18"], "cifar"),
        of_before("../x", "imagenet"),
        of_before("get_model", "cifar"),
        {"channels": 10**9},
        {"channels": 0},
        {"channels": True},
        {"norm": "eval"},
        {"method": ["a", "list"]},
        {"recipe": {"a": 1}},
        {"epochs": "many"},
        {"published": ["unhashable"]},
        {"head": 5},
        {"head": ["ReLU"] * 101},
        {"input": PREPROCESS | {"size": 10**9}},
        {"input": PREPROCESS | {"size": -1}},
        {"input": PREPROCESS | {"size": True}},
        {"input": PREPROCESS | {"size": 32.5}},
        {"input": PREPROCESS | {"size": [32, 10**9]}},
        {"input": PREPROCESS | {"crop": 1e9}},
        {"input": PREPROCESS | {"crop": float("nan")}},
        {"input": PREPROCESS | {"interpolation": "__class__"}},
        {"input": PREPROCESS | {"mean": [0.0] * 10**6}},
        {"input": PREPROCESS | {"mean": ["0", "0", "0"]}},
        {"input": PREPROCESS | {"std": [1.0, 0.0, 1.0]}},
        {"input": PREPROCESS | {"std": [1.0, float("inf"), 1.0]}},
        {"input": PREPROCESS | {"more": 1}},
        {"input": "x"},
        {"tensors": {"layers.99.weight": torch.ones(2)}},
        {"tensors": {"layers.0.weight": torch.ones(3, 3)}},
    ],
)
def test_metadata_that_no_method_writes(tmp_path, monkeypatch, changes):
    monkeypatch.chdir(tmp_path)
    path, built = exported(tmp_path / "encoder.safetensors", **changes), []
    make = nn.Conv2d.__init__
    monkeypatch.setattr(nn.Conv2d, "__init__", lambda *a, **k: built.append(a) or make(*a, **k))
    refused = r"encoder\.safetensors: not an exported encoder|no such network"
    with pytest.raises(UserError, match=refused) as caught:
        load_encoder(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400 + len(path)
    assert bool(built) == ("tensors" in changes)  # words are checked before they build anything
    assert [p.name for p in tmp_path.iterdir()] == ["encoder.safetensors"]


def test_a_file_of_before_is_read(tmp_path):
    path = exported(tmp_path / "encoder.safetensors", **of_before("demo", "imagenet"))
    assert load_encoder(path).metadata["encoder"] == "demo"


@pytest.mark.parametrize(
    ("head", "tensors"),
    [
        (["__import__"], {}),
        ([5], {"head.0.weight": torch.ones(2, 2)}),
        ("Linear", {"head.0.weight": torch.ones(2, 2)}),
        (["Linear"], {}),
        (["Linear"], {"head.0.weight": torch.ones(2)}),
        (["GroupNorm"], {"head.0.weight": torch.ones(5)}),
        (["Linear"], {"head.0.weight": torch.ones(2, 2), "head.7.weight": torch.ones(1)}),
        (None, {}),
    ],
)
def test_heads_that_no_method_writes(tmp_path, head, tensors):
    path = exported(tmp_path / "encoder.safetensors", head=head, tensors=tensors)
    with pytest.raises(UserError) as caught:
        load_encoder(path, layer=-1)
    assert "\n" not in str(caught.value)


def test_metadata_that_is_no_json_and_a_header_that_is_no_header(tmp_path):
    path = tmp_path / "encoder.safetensors"
    for bomb in ("[" * 100_000, "{", "NaN", "nonsense"):
        save_file({"x": torch.ones(1)}, path, {"encoder": bomb})
        with pytest.raises(UserError, match="not an exported encoder"):
            load_encoder(str(path))
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(UserError, match="not an exported encoder"):
        load_encoder(str(path))


# ---- where results go, and what a run's config may say -------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        "../../x", "/etc/passwd", "..", "a/../../b", "~/x", "C:\\x", "a\0b", "a\nb", "---",
        "\u00e9" * 900, "\U0001d49c" * 300, "\udcff", "x" * 5_000,
    ],
)  # fmt: skip
def test_a_result_stays_in_its_folder(tmp_path, source):
    name = file_name(f"knn20-encoder-on-{source}")
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / name).touch()
    assert (folder / name).resolve().parent == folder
    assert name.startswith("knn20-encoder-on-")
    assert len(f".{name}.json.4194304".encode()) < 256  # as written aside


def test_long_sources_have_files_of_their_own():
    assert len({file_name(f"knn20-encoder-on-{'x' * 300}{i}") for i in range(9)}) == 9


@pytest.mark.parametrize(
    "content",
    [
        [],
        "x",
        {},
        {"config": []},
        {"config": {"data": ["a"]}},
        {"config": {"data": "demo", "image_column": {"a": 1}}},
        {"config": {"data": "demo", "label_column": 3}},
    ],
)
def test_the_config_of_no_run(tmp_path, content):
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"config\.json: not of a run"):
        next(subjects(KNN(run=str(tmp_path), weights="random:resnet18")))
    with pytest.raises(UserError, match=r"config\.json: not of a run"):
        cli.parse("simclr", Config, RECIPES, ["--out", str(tmp_path)])


def test_a_hostile_source_in_a_whole_record(tmp_path, capsys):
    encoder = load_encoder("", "random:resnet18")
    folder = tmp_path / "run" / "results"
    folder.parent.mkdir()
    images = open_images("demo", "test")
    opened = {"splits": (images, images)}
    config, accelerator = {"data": "demo"}, launch("fp32")
    subject = Subject(
        encoder, "../../../escape", SourceConfig(), folder, config, accelerator, opened=opened
    )
    record(subject, task="knn", protocol="../x", metrics={"top1": 50.0}, interval=1.0, settings={})
    [path] = tmp_path.rglob("*.json")
    assert path.parent == folder and read(path).data == "../../../escape"
    assert path.name.startswith("knn-..-x-random-resnet18-on-..-..-..-escape-")


@pytest.mark.parametrize(
    "changes",
    [
        {"metrics": {"top1": "50"}}, {"metrics": {}}, {"metrics": []}, {"metric": ["top1"]},
        {"settings": []}, {"test_images": "many"}, {"run": None}, {"deviations": {}},
        {"version": 3}, {"version": None}, {"task": 5}, {"epochs": "ten"}, {"layer": None},
    ],
)  # fmt: skip
def test_a_record_that_no_judge_writes(tmp_path, changes):
    run = save_run(tmp_path / "run")
    path = judged(run)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match="not the record of a judgement") as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_a_table_of_results_is_text_whatever_the_names():
    names = ["<img src=x onerror=alert(1)>", "a|b", "two\nlines", "&lt;"]
    table = as_markdown([["subject", "Top-1"], *([name, "1.0"] for name in names)])
    assert "<" not in table and len(table.splitlines()) == 2 + len(names)
    assert "a\\|b" in table and "two lines" in table and "&amp;lt;" in table
