"""One process equals many, stopped or not: the real commands on 1, 2 and 3 linked CPU processes."""

import functools
import os

import pytest
import torch
from safetensors.torch import load_file

from common.files import read_json
from tests.eval.harness import save_images, save_run
from tests.helpers import ended, forked, leaves

COMMANDS = {
    # of 30 images; a batch of two leaves one of three processes without any
    "linear moco": ["--protocol", "moco", "--epochs", "2", "--batch-size", "4"],
    "linear byol": ["--protocol", "byol", "--epochs", "2", "--batch-size", "7"],
    "linear features": ["--protocol", "features", "--epochs", "2", "--batch-size", "7"],
    "finetune": ["--protocol", "simclr", "--epochs", "2", "--batch-size", "7"],
    "finetune lars": ["--protocol", "simclr-v2", "--epochs", "1", "--batch-size", "2"],
    "finetune frozen": ["--freeze", "2", "--epochs", "2", "--batch-size", "8"],
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_images(tmp_path_factory.mktemp("images"), gain=60)


def run_on(processes, command, run, *argv, before=None):
    name, log = command.split()[0], run.with_suffix(".log")
    argv = [run, *COMMANDS.get(command, ()), "--precision", "fp64", *argv]
    return ended(forked(f"eval.{name}", argv, log, processes, before)), log


def die_at(step):
    from eval import unfinished

    save = unfinished.Unfinished.save

    def deadly(self, **state):
        save(self, **state)
        if state.get("step") == step:
            os.kill(os.getpid(), 9)

    unfinished.PAUSE, unfinished.Unfinished.save = 0.0, deadly


def state_and_record(processes, command, run, step):
    """What a judgement saves at a step, when all its processes are killed, and its record, of the
    same command given again."""
    stopped, log = run_on(processes, command, run, before=functools.partial(die_at, step))
    assert stopped == [-9] * processes, log.read_text()
    (path,) = (run / "results" / "unfinished").iterdir()
    state = torch.load(path)
    assert run_on(processes, command, run)[0] == [0] * processes, log.read_text()
    assert "resuming" in log.read_text()
    return state, record_of(run)


def record_of(run):
    (path,) = (run / "results").iterdir()
    row = read_json(path)
    assert row.pop("judged")["processes"]
    del row["run"]["out"]
    return {key: value for key, value in row.items() if key not in ("seconds", "speed")}


def apart(one, other):
    """The largest difference of two states' numbers; all else is equal."""
    one, other = leaves(one), leaves(other)
    assert one.keys() == other.keys() and one
    numbers = [k for k, v in one.items() if isinstance(v, torch.Tensor | float) and k != "/seconds"]
    assert all(one[k] == other[k] for k in one.keys() - set(numbers) - {"/seconds"})
    pairs = [(torch.as_tensor(one[k]).double(), torch.as_tensor(other[k])) for k in numbers]
    return max(float((a - b).abs().max()) for a, b in pairs if a.numel())


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_judgement_by_training(command, source, tmp_path):
    runs = {n: save_run(tmp_path / str(n), data=str(source)) for n in (1, 2, 3)}
    found = {n: state_and_record(n, command, run, step=3) for n, run in runs.items()}
    for n in (2, 3):
        assert apart(found[1][0], found[n][0]) < 1e-10
        assert found[1][1] == found[n][1]
    whole = save_run(tmp_path / "whole", data=str(source))
    assert run_on(2, command, whole)[0] == [0, 0]
    assert record_of(whole) == found[2][1]


@pytest.mark.slow
@pytest.mark.parametrize("test_split", [True, False])
def test_knn(source, test_split, tmp_path):
    data = source if test_split else source / "train"
    rows, features = {}, {}
    for n in (1, 2, 3):
        run = save_run(tmp_path / str(n), data=str(data))
        done, log = run_on(n, "knn", run, "--k", "3")
        assert done == [0] * n, log.read_text()
        assert log.read_text().count("Top-1") == 1  # the first process alone speaks
        rows[n] = record_of(run)
        features[n] = [load_file(path) for path in sorted((run / "features").iterdir())]
    for n in (2, 3):
        assert rows[1] == rows[n]
        assert apart(features[1], features[n]) < 1e-10
    (one, *_) = features[1]
    assert one["features"].dtype == torch.float64 and len(one["features"]) in (12, 30)
