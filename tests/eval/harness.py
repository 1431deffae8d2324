"""Small labelled images and networks to judge, a run's folder, and judgements that are stopped."""

import json

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from common.config import SourceConfig
from common.data import ImageSplit
from common.files import read_json
from common.launch import launch
from eval import unfinished
from eval.encoder import Encoder, Preprocess, build_seeded, export_metadata
from eval.results.record import Result, run_id, write
from eval.subjects import Subject


class Network(nn.Module):
    """A normalisation layer, with parameters and running statistics, then mean colours."""

    num_features = 3

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, images):
        return self.norm(images).mean((2, 3))


def coloured(count, size=12):
    """Images of three classes that mean colours tell apart."""
    labels = torch.arange(count) % 3
    generator = torch.Generator().manual_seed(count)
    pixels = torch.randint(60, (count, 3, size, size), generator=generator)
    pixels[torch.arange(count), labels] += 150
    return ImageSplit("coloured", pixels.byte(), labels, ("r", "g", "b"), store=pixels.byte())


def subject_of(folder, network=None, method="simclr", counts=(120, 30), name="encoder", **metadata):
    """A subject of a run in `folder` on `counts` coloured images to train and test on."""
    config = {"data": "x", "batch_size": 8, "seed": 1}
    network = (network or Network()).eval()
    encoder = Encoder(network, Preprocess(12, crop=1.0), name, {"method": method, **metadata})
    opened = {"splits": tuple(map(coloured, counts)), "validation": None}
    opened["labelled"] = opened["splits"]
    of_run = config.get("data") == "x"
    return Subject(
        encoder, "x", SourceConfig(), folder, config, launch("fp32"), of_run=of_run, opened=opened
    )


def save_encoder(path, network, name="demo", preprocess=None, **changes):
    """Write an encoder file as a run does; a change to None leaves the key out."""
    metadata = export_metadata(name, network, preprocess or Preprocess.of(32), "some-row")
    metadata |= {"method": "simclr", "recipe": "demo", "epochs": 1.0, "commit": "abc", "head": []}
    metadata |= {"finished": True} | changes
    tensors = dict(network.state_dict()) | {"head.0.weight": torch.ones(2, 2)}
    text = {key: json.dumps(value) for key, value in metadata.items() if value is not None}
    save_file(tensors, path, text)
    return str(path)


def save_run(folder, size=16, **config):
    """A run's folder with a demo encoder, its config and no judgement."""
    (folder / "results").mkdir(parents=True)
    network = build_seeded({"encoder": "demo"}, Preprocess.of(size))
    save_encoder(folder / "encoder.safetensors", network, preprocess=Preprocess.of(size))
    config = {"data": "demo", "out": str(folder), "seed": 9, "batch_size": 6, "epochs": 1} | config
    record = {"method": "simclr", "recipe": "demo", "config": config, "overridden": []}
    launch = {"command": f"python -m simclr.pretrain demo --out {folder}", "device": "CPU"}
    record |= {"images": 60, "steps": 20, "launches": [launch]}
    (folder / "config.json").write_text(json.dumps(record))
    return folder


def save_images(folder, classes=("a", "b", "c"), train=30, test=12, size=(16, 16), gain=200):
    """Folders of images of three classes; a class has more of one colour, by `gain`."""
    generator = torch.Generator().manual_seed(3)
    for split, count in (("train", train), ("test", test)):
        for i in range(count):
            path = folder / split / classes[i % 3] / f"{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            colour = torch.randint(0, 255 - gain, (3,), generator=generator).tolist()
            colour[i % 3] += gain
            Image.new("RGB", size, tuple(colour)).save(path)
    return folder


def judged(run, value=50.0, /, **changes):
    """Write a record as a judge does, of a run that `save_run` has made; its path."""
    known = json.loads((run / "config.json").read_text())
    cfg = known["config"]
    at = {"commit": "abcdef123456", "device": "CPU (2 cores)", "processes": 1}
    fields = {"task": "knn", "protocol": "weighted", "subject": "encoder", "layer": 0}
    fields |= {"data": cfg["data"], "columns": {}, "metric": "top1", "interval": 1.7}
    fields |= {"train_images": 50_000, "test_images": 10_000, "changed": {}, "deviations": ()}
    fields |= {"settings": {"k": 20, "temperature": 0.1}, "seed": cfg["seed"], "run": cfg}
    fields |= {"method": known["method"], "recipe": known["recipe"], "epochs": cfg["epochs"]}
    fields |= {"encoder": "demo", "published": cfg.get("published"), "pretrained_at": at["commit"]}
    fields |= {"run_id": run_id(known["method"], cfg), "seconds": 3.0}
    fields |= {"judged": at | {"command": f"python -m eval.knn {run}"}} | changes
    metrics = {fields["metric"]: value} | fields.pop("metrics", {})
    result = Result(metrics=metrics, **fields)
    path = run / "results" / f"{len(list((run / 'results').iterdir())):03}.json"
    write(result, path)
    return path


def records(run):
    """{file name without its digest: record} of a run's judgements."""
    paths = sorted((run / "results").glob("*.json"))
    found = {path.stem.rpartition("-")[0]: read_json(path) for path in paths}
    assert len(found) == len(paths)
    return found


def record_of(folder):
    """The one record in a folder."""
    (path,) = folder.glob("*.json")
    return read_json(path)


# ---- judgements that are stopped where they save their state, and begun again --------------------


class Stopped(Exception):
    pass


def again(monkeypatch, stops, judge):
    """Call `judge` until it ends; it is stopped after saving its state for the n-th time."""
    save, read, saved, stopped = unfinished.Unfinished.save, unfinished.Unfinished._read, 0, 0

    def read_what_was_saved(self):
        state = read(self)
        assert bool(state) == bool(stopped)  # it does resume
        return state

    def save_or_stop(self, **state):
        nonlocal saved
        save(self, **state)
        saved += 1
        if saved in stops:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(unfinished, "PAUSE", 0.0)  # after every step
        patch.setattr(unfinished.Unfinished, "save", save_or_stop)
        patch.setattr(unfinished.Unfinished, "_read", read_what_was_saved)
        while True:
            try:
                judge()
                break
            except Stopped:
                stopped += 1
    assert stopped == len(stops)


def assert_same_records(one, other):
    """But for when and how long; and nothing unfinished is left."""
    names = sorted(path.name for path in one.iterdir())
    assert names and names == sorted(path.name for path in other.iterdir())
    for name in names:
        rows = [read_json(folder / name) for folder in (one, other)]
        for row in rows:
            for name in ("seconds", "judged", "speed"):
                row.pop(name, None)
        assert rows[0] == rows[1]
