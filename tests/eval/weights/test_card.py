"""Model cards say what was recorded and leak nothing; the Hub's calls, against a local stand-in."""

import base64
import hashlib
import http.server
import json
import re
import shutil
import threading

import huggingface_hub
import huggingface_hub.constants
import pytest
import yaml

import eval.compare
import eval.export
from common.errors import UserError
from eval.encoder import Preprocess, build_seeded, load_encoder
from eval.weights import card
from eval.weights.hub import from_hub
from tests.eval.harness import judged, save_encoder, save_run
from tests.helpers import evaluate


def run_of(folder, name="resnet18", size=32, **config):
    """A run's folder with a ResNet."""
    run = save_run(folder, **config)
    network = build_seeded({"encoder": name}, Preprocess.of(size))
    save_encoder(run / "encoder.safetensors", network, name, Preprocess.of(size))
    return run


def card_of(run, layout="timm", license="unknown", name=""):
    """The metadata and the text of a run's card."""
    text = card.card(load_encoder(str(run)), run, layout, license, name)
    read = huggingface_hub.ModelCard(text)
    return read.data.to_dict(), read.text


# ---- cards ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on a data set of the Hub with results of two protocols and a baseline."""
    run = run_of(tmp_path_factory.mktemp("runs") / "run", data="uoft-cs/cifar10")
    judged(run, 71.25)
    judged(run, 88.5, task="linear", protocol="simclr", settings={"seed": 1}, interval=0.6)
    judged(run, 41.0, subject="random")
    return run


@pytest.mark.parametrize("layout", ["timm", "transformers"])
def test_metadata(run, layout):
    about, _ = card_of(run, layout, "cc-by-4.0")
    assert about == {
        "library_name": layout,
        "pipeline_tag": "image-feature-extraction",
        "license": "cc-by-4.0",
        "datasets": ["uoft-cs/cifar10"],
        "tags": ["self-supervised-learning", "simclr"],
    }


def test_every_result_is_there_with_its_protocol_and_interval(run):
    _, text = card_of(run)
    rows = re.findall(r"^\| (.*) \|$", text.split("## Results")[1], re.MULTILINE)
    assert len(rows) == 2 + 3
    assert "SimCLR demo, 1 epoch | kNN (k 20) | uoft-cs/cifar10 | 71.2 ± 1.7 | 10,000" in rows
    [linear] = [row for row in rows if "88.5 ± 0.6" in row]
    assert "linear (SimCLR's protocol)" in linear
    assert any(row.startswith("random encoder | kNN") and "41.0" in row for row in rows)


def test_training_is_told_as_recorded(run):
    _, text = card_of(run)
    for row in (
        "| method | SimCLR |",
        "| recipe | demo |",
        "| network | resnet18 |",
        "| number of images | 60 |",
        "| batch (of all processes) | 6 |",
        "| seed | 9 |",
        "| commit of ssl-reference | abc |",
        "| started by | python -m simclr.pretrain demo --out run |",
    ):
        assert row in text.replace("---: |", ""), row
    assert "without the projection head g" in text
    assert "the central square of the shorter side, resized to 32 pixels (bicubic" in text
    assert "None was stated for the weights" in text


def test_no_folder_of_the_machine_is_in_it(tmp_path):
    run = run_of(tmp_path / "run", data=str(tmp_path / "private" / "photos"))
    judged(run, deviations=(f"the images of '{tmp_path}/private/list.txt'",))
    about, text = card_of(run)
    assert "datasets" not in about and "| images | photos |" in text and "list.txt" in text
    assert str(tmp_path) not in text and "private" not in text


def test_a_file_without_its_run_and_a_run_without_results(tmp_path):
    run = run_of(tmp_path / "run")
    assert "Nothing was measured." in card_of(run)[1]
    about, text = card_of(run / "encoder.safetensors")
    assert "Nothing was measured." in text and "| length | 1 epoch |" in text
    assert about["license"] == "unknown" and "datasets" not in about


@pytest.mark.parametrize(
    ("method", "said"),
    [("moco", "the query encoder"), ("byol", "the encoder of the online network")],
)
def test_which_of_two_networks_it_is(tmp_path, method, said):
    path = run_of(tmp_path / "run") / "encoder.safetensors"
    network = build_seeded({"encoder": "resnet18"}, Preprocess.of(32))
    save_encoder(path, network, "resnet18", method=method, finished=False, epochs=0.5)
    _, text = card_of(path)
    assert said in text and "0.5 epochs, not finished" in text


def test_names_cannot_break_the_card(tmp_path):
    path = run_of(tmp_path / "run") / "encoder.safetensors"
    network = build_seeded({"encoder": "resnet18"}, Preprocess.of(32))
    evil = "a|b\n---\nlicense: mit\n<script>x</script>"
    save_encoder(path, network, "resnet18", recipe=evil, published=evil, method=evil)
    about, text = card_of(path)
    assert about["license"] == "unknown" and about["tags"] == ["self-supervised-learning"]
    assert "<script>" not in text and "\n---\n" not in text


@pytest.mark.parametrize("license", ["unknown", "cc-by-nc-4.0"])
def test_weights_of_others_are_not_said_to_be_trained_here(run, tmp_path, capsys, license):
    """In a folder of their own, judged, which has no config of a run."""
    path = shutil.copytree(run / "results", tmp_path / "moco" / "results").parent
    network = build_seeded({"encoder": "resnet18"}, Preprocess.of(32))
    official = {"kind": "MoCo v2", "epoch": 200, "file": "a|b.pth.tar"}
    save_encoder(path / "encoder.safetensors", network, "resnet18", official=official)
    about, text = card_of(path, license=license)
    assert r"checkpoint: MoCo v2, epoch 200, file a\|b.pth.tar |" in text and "71.2" in text
    assert about["license"] == license and (license == "unknown" or license in text)
    said = text.rpartition("## Licence")[2]
    assert "under the terms of those who published them" in said and "MIT" not in said
    evaluate(eval.compare, str(path))
    assert "71.2" in (path / "compare.md").read_text()
    with pytest.raises(SystemExit):
        evaluate(eval.compare, str(path), "--report", str(tmp_path / "report"))
    assert f"error: --report: {path} holds an encoder alone" in capsys.readouterr().err


def test_a_damaged_record_is_one_line(tmp_path):
    run = run_of(tmp_path / "run")
    (run / "results" / "x.json").write_text("{}")
    with pytest.raises(UserError, match="not the record of a judgement"):
        card_of(run)


# ---- the Hub -------------------------------------------------------------------------------------


TIMMS = "timm/resnet18.a1_in1k"  # the model in which the Hub has timm's resnet18


class Hub(http.server.ThreadingHTTPServer):
    """What the Hub answers to `create_repo`, `upload_folder` and `snapshot_download`.

    `files` are those of owner/name; safetensors go and come as large files do.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.files, self.large, self.calls, self.status = {}, {}, [], 200
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


class Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    SHA = "5" * 40

    def log_message(self, *_):
        pass

    def say(self, content, status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do(self):
        hub, path = self.server, self.path.partition("?")[0]
        asked, path = path, path.replace(TIMMS, "owner/name")
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.calls.append((self.command, asked, self.headers.get("Authorization")))
        if path == "/api/agent-harnesses":  # which the client asks for, and can do without
            self.say({}, 404)
        elif hub.status != 200:
            self.say({"error": "no"}, hub.status)
        elif path == "/api/repos/create":
            self.say({"url": f"{hub.address}/owner/name", "name": "owner/name"})
        elif path == "/api/validate-yaml":
            told = json.loads(sent)["content"].split("---\n")[1]
            assert yaml.safe_load(told)["library_name"] == "timm"
            self.say({"errors": [], "warnings": []})
        elif path == "/api/models/owner/name/preupload/main":
            self.say({"files": [self.mode(file["path"]) for file in json.loads(sent)["files"]]})
        elif path == "/owner/name.git/info/lfs/objects/batch":
            objects = [
                each | {"actions": {"upload": {"href": f"{hub.address}/put/{each['oid']}"}}}
                for each in json.loads(sent)["objects"]
            ]
            self.say({"transfer": "basic", "objects": objects})
        elif path.startswith("/put/"):
            assert hashlib.sha256(sent).hexdigest() == path.removeprefix("/put/")
            hub.large[path.removeprefix("/put/")] = sent
            self.say({})
        elif path == "/api/models/owner/name/commit/main":
            for row in map(json.loads, sent.splitlines()):
                value = row["value"]
                if row["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif row["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.large[value["oid"]]
            url = f"{hub.address}/owner/name/commit/{self.SHA}"
            self.say({"commitUrl": url, "commitOid": self.SHA, "success": True})
        elif path in ("/api/models/owner/name", "/api/models/owner/name/revision/main"):
            self.say({"id": "owner/name", "sha": self.SHA, "siblings": []})
        elif path.startswith("/api/models/owner/name/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": self.oid(content)}
                for name, content in hub.files.items()
            ]
            self.say(tree)
        elif (name := path.rpartition("/")[2]) in hub.files and "/resolve/" in path:
            content = hub.files[name]
            self.say(content, ETag=f'"{self.oid(content)}"', X_Repo_Commit=self.SHA)
        else:
            self.say({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")

    do_GET = do_POST = do_PUT = do_HEAD = do

    def mode(self, name):
        kind = "lfs" if name.endswith(".safetensors") else "regular"
        return {"path": name, "uploadMode": kind, "shouldIgnore": False, "oid": None}

    @staticmethod
    def oid(content):
        return hashlib.sha1(content).hexdigest()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    hub = Hub()
    for name, value in {
        "ENDPOINT": hub.address,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_PROGRESS_BARS": True,
    }.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield hub
    hub.shutdown()
    hub.server_close()


def test_to_the_hub_and_back(hub, tmp_path, capsys):
    run, out = run_of(tmp_path / "run"), tmp_path / "out"
    evaluate(eval.export, run, "--to", "timm", "--out", out, "--push", "owner/name")
    assert f"{hub.address}/owner/name: README.md, config.json, model" in capsys.readouterr().out
    assert hub.files == {path.name: path.read_bytes() for path in out.iterdir()}
    assert hub.files.keys() == {"README.md", "config.json", "model.safetensors"}
    assert 'create_model("hf-hub:owner/name"' in hub.files["README.md"].decode()
    assert ("POST", "/api/repos/create", "Bearer hf_secret") in hub.calls

    hub.files |= {"pytorch_model.bin": b"a pickle", "run.py": b"raise SystemExit"}
    encoder, ours = from_hub("owner/name"), load_encoder(str(run))
    theirs = encoder.network.state_dict()
    assert all(value.equal(theirs[key]) for key, value in ours.network.state_dict().items())
    assert encoder.input == ours.input and encoder.metadata["encoder"] == "resnet18"
    fetched = {path.rpartition("/")[2] for _, path, _ in hub.calls if "/resolve/" in path}
    assert fetched == {"config.json", "model.safetensors"}


def test_weights_by_timms_name_and_by_the_hubs(hub, tmp_path, capsys):
    """As `--weights` of an evaluation."""
    run, out = run_of(tmp_path / "run"), tmp_path / "out"
    evaluate(eval.export, run, "--to", "timm", "--out", out, "--push", "owner/name")
    ours = load_encoder(str(run)).network.state_dict()
    for weights, model in (("timm:resnet18", TIMMS), ("hf:owner/name", "owner/name")):
        encoder = load_encoder("", weights)
        theirs = encoder.network.state_dict()
        assert encoder.name == weights and all(v.equal(theirs[k]) for k, v in ours.items())
        assert any(path.startswith(f"/{model}/resolve/") for _, path, _ in hub.calls)
    with pytest.raises(UserError, match="no such network, or not of that tag"):
        load_encoder("", "timm:resnet18.of_mine")


def test_other_files_of_the_folder_are_not_uploaded(hub, tmp_path):
    run, out = run_of(tmp_path / "run"), tmp_path / "out"
    evaluate(eval.export, run, "--to", "timm", "--out", out)
    (out / "notes.txt").write_text("mine")
    card.push(out, "owner/name", ["README.md", "config.json", "model.safetensors"])
    assert "notes.txt" not in hub.files and len(hub.files) == 3


def test_weights_are_not_fetched_for_a_config_that_is_refused(hub):
    hub.files = {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"x" * 1000}
    with pytest.raises(UserError, match=r"^hf:owner/name: config\.json is of 'llama'"):
        from_hub("owner/name")
    assert not [path for _, path, _ in hub.calls if path.endswith("model.safetensors")]


def test_an_encoder_of_ours_on_the_hub(hub, tmp_path):
    path = run_of(tmp_path / "run") / "encoder.safetensors"
    hub.files = {path.name: path.read_bytes()}
    assert from_hub("owner/name").metadata["recipe"] == "demo"


@pytest.mark.parametrize(
    ("status", "said"),
    [(401, "hf auth login"), (403, "hf auth login"), (500, "HfHubHTTPError")],
)
def test_what_the_hub_refuses_is_one_line(hub, tmp_path, status, said):
    hub.status = status
    (tmp_path / "README.md").touch()
    for call in (
        lambda: card.push(tmp_path, "owner/name", ["README.md"]),
        lambda: from_hub("owner/name"),
    ):
        with pytest.raises(UserError, match="owner/name") as caught:
            call()
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=f"--push owner/name: .*{said}"):
        card.push(tmp_path, "owner/name", ["README.md"])


def test_a_hub_that_is_not_there_is_one_line(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    (tmp_path / "README.md").touch()
    with pytest.raises(UserError, match="--push owner/name: ") as caught:
        card.push(tmp_path, "owner/name", ["README.md"])
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="hf:owner/name: cannot be fetched"):
        from_hub("owner/name")
    with pytest.raises(UserError, match="hf:nobody: no such folder, nor of the form owner/name"):
        from_hub("nobody")


def test_a_local_folder_is_not_asked_of_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = run_of(tmp_path / "run")
    shutil.copytree(run, tmp_path / "owner" / "name")
    assert from_hub("owner/name").metadata["recipe"] == "demo" and not hub.calls
