"""TensorBoard and Weights & Biases: where they log to, and what becomes of it on going on."""

import importlib.machinery
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.run import Run
from tests.helpers import pretrain, rows

PAIRS = 16 / 5120  # epochs of one step


@pytest.fixture
def wandb(monkeypatch):
    """A module in its place that notes what it is told."""
    module = ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    module.inits, module.rows, module.finished, settings = [], [], [], {}

    def init(**how):
        module.inits.append(how)
        return SimpleNamespace(
            log=lambda values, step: module.rows.append((step, values)),
            finish=lambda: module.finished.append(how["id"]),
        )

    module.init, module.Image = init, lambda image: tuple(image.shape)
    module.config = SimpleNamespace(update=lambda values, **_: settings.update(values))
    module.settings = settings
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


class Stopped(Exception):
    pass


def train(out, *trackers, stop=None):
    """Six steps with a checkpoint every two; or until `stop`, which is not logged."""
    end_step = Run.end_step

    def stopping(run, step, *args, **metrics):
        if step == stop:
            raise Stopped
        end_step(run, step, *args, **metrics)

    argv = ["--out", out, "--batch-size", 16, "--image-size", 8, "--knn-every", 0, "--log-every", 1,
            "--epochs", 6 * PAIRS, "--save-every", 2 * PAIRS, "--trackers", *trackers]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "end_step", stopping)
        pretrain("moco", "demo", *argv)


def steps_of(out, name="loss"):
    events = EventAccumulator(str(out))
    events.Reload()
    return [event.step for event in events.Scalars(name)], events


def test_a_run_goes_on_in_the_same_places(tmp_path, wandb):
    out = tmp_path / "run"
    with pytest.raises(Stopped):
        train(out, "tensorboard", "wandb", stop=5)
    train(out, "tensorboard", "wandb")  # from step 4

    first, again = wandb.inits
    assert first["id"] == again["id"] == (out / "wandb.id").read_text()
    assert first["resume"] == again["resume"] == "allow"
    assert first["name"] == "run" and first["dir"] == str(out)
    assert wandb.settings == json.loads((out / "config.json").read_text())["config"]
    assert [step for step, values in wandb.rows if "loss" in values] == [0, 1, 2, 3, 4, 4, 5]
    losses = [values["loss"] for _, values in wandb.rows if "loss" in values]
    assert losses[:4] + losses[5:] == [row["loss"] for row in rows(out)]
    assert any("timing/pairs_per_second" in values for _, values in wandb.rows)
    assert any("views" in values for _, values in wandb.rows) and wandb.finished == [first["id"]]

    assert len(list(out.glob("events.out.tfevents.*"))) == 2  # directly in RUN, once a launch
    assert not [path for path in out.rglob("events.out*") if path.parent != out]
    logged, events = steps_of(out)
    assert logged == [0, 1, 2, 3, 4, 5]  # step 4 of the first launch is purged
    assert events.Tags()["images"] and "timing/peak_memory_gb" in events.Tags()["scalars"]


def test_none_and_one_of_another_run(tmp_path, wandb):
    for name in ("a", "b"):
        train(tmp_path / name, "wandb")
    assert wandb.inits[0]["id"] != wandb.inits[1]["id"]
    assert not list(tmp_path.rglob("events.out*"))
    train(tmp_path / "c")
    assert len(wandb.inits) == 2 and not list((tmp_path / "c").glob("events*"))


def test_a_missing_wandb_is_one_line_that_names_the_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit) as caught:
        train(tmp_path / "run", "tensorboard", "wandb")
    said = capsys.readouterr().err
    assert caught.value.code == 2
    assert said == "error: wandb is not installed; pip install -e '.[wandb]'\n"
    assert not (tmp_path / "run").exists()
