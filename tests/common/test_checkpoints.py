"""Checkpoints: exact, whole or not there, the last two kept; also those of former versions."""

import json

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from byol.optim import LARS, parameter_groups
from common.checkpoints import Checkpoints, check_finite
from common.errors import UserError
from common.run import Run
from tests.helpers import METHODS, assert_same_run, checkpoints, pretrain


def parts(seed=0, lr=0.1):
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer}


@pytest.fixture
def folder(tmp_path):
    return tmp_path


def opened(folder, state):
    return Checkpoints(folder, state, Accelerator(cpu=True))


def weight(state):
    return state["model"].weight


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_brings_everything_back_but_the_settings_of_the_optimizer(folder):
    saved, fresh = parts(0), parts(1, lr=0.2)
    assert opened(folder, saved).load() == 0
    opened(folder, saved).save(7)
    assert not torch.equal(weight(fresh), weight(saved))
    assert opened(folder, fresh).load() == 7
    assert torch.equal(weight(fresh), weight(saved))
    momentum = [p["optimizer"].state_dict()["state"][0]["momentum_buffer"] for p in (fresh, saved)]
    assert torch.equal(*momentum)
    assert fresh["optimizer"].param_groups[0]["lr"] == 0.2  # a config's


def test_the_last_two_are_kept(folder):
    kept = opened(folder, parts())
    for step in (3, 12, 100, 1000):
        kept.save(step)
    assert names(folder) == ["step-00000100.pt", "step-00001000.pt"]


def test_a_torn_newest_checkpoint_gives_way_to_the_one_before(folder):
    for step in (5, 9):
        opened(folder, parts(step)).save(step)
    newest = folder / "step-00000009.pt"
    whole = newest.read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(weight(parts(9)).detach().numpy().tobytes())] ^= 1
    for content in (whole[:-100], b"", b"garbage", flipped):
        newest.write_bytes(content)
        fresh = parts(1)
        again = opened(folder, fresh)
        assert again.load() == 5 and torch.equal(weight(fresh), weight(parts(5)))
        [said] = again.unreadable
        assert "step-00000009.pt: cannot be read (" in said
    (folder / "step-00000005.pt").write_bytes(b"")
    assert opened(folder, parts()).load() == 0


def test_a_kill_while_saving_leaves_what_was_there(folder, monkeypatch):
    kept = opened(folder, parts(5))
    kept.save(5)

    def torn(state, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", torn)
        kept.save(6)
    assert names(folder) == ["step-00000005.pt"]
    (folder / ".step-00000006.pt.123").write_bytes(b"half")  # where nothing could be tidied up
    assert opened(folder, parts()).load() == 5


def test_what_is_not_finite_is_never_saved(folder):
    state = parts()
    kept = opened(folder, state)
    kept.save(5)
    with torch.no_grad():
        state["model"].bias[0] = torch.inf
    with pytest.raises(UserError, match=r"at step 9; the last checkpoint is kept.*--base-lr"):
        kept.save(9)
    assert names(folder) == ["step-00000005.pt"]
    with pytest.raises(UserError, match=r"at step 1,000"):
        check_finite(1000, {"a": [{"b": (torch.zeros(2), torch.tensor(torch.nan))}]})


# ---- of former versions --------------------------------------------------------------------------


def test_the_groups_of_an_optimizer_are_the_configs_under_their_names_of_today(folder):
    model = nn.Linear(3, 2)
    optimizer = LARS(parameter_groups(model, 1e-6, lr_multiplier=10.0))
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    opened(folder, {"optimizer": optimizer}).save(3)
    as_before(folder / "step-00000003.pt", "byol")
    fresh = LARS(parameter_groups(model, 1e-6, lr_multiplier=10.0))
    assert opened(folder, {"optimizer": fresh}).load() == 3
    for group, expected in zip(fresh.param_groups, optimizer.param_groups, strict=True):
        assert group.keys() == expected.keys() and group["lr_multiplier"] == 10.0
    for p in model.parameters():
        assert torch.equal(fresh.state[p]["v"], optimizer.state[p]["v"])


def as_before(path, method):
    """A checkpoint with the former names in its optimizer's groups."""
    state = torch.load(path)
    for group in state["optimizer"]["param_groups"]:
        if method != "moco":
            group["adapt"] = group.pop("lars_adaptation")
        if method == "byol":
            group["times"] = group.pop("lr_multiplier")
    torch.save(state, path)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("method", METHODS)
def test_a_run_of_before_goes_on_bit_for_bit(method, tmp_path, monkeypatch):
    """Its record has the former names, settings that are gone, and none that are new."""
    argv = ["demo", "--batch-size", 16, "--image-size", 8, "--eval-size", 16, "--knn-every", 0,
            "--epochs", 6 * 16 / 5120, "--save-every", 2 * 16 / 5120, "--log-every", 1]  # fmt: skip
    if method == "simclr":
        argv += ["--grad-cache-chunk", 8]
    pretrain(method, *argv, "--out", tmp_path / "whole")

    end_step = Run.end_step

    def stopping(run, step, *args, **metrics):
        if step == 3:
            raise Stopped
        end_step(run, step, *args, **metrics)

    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Run, "end_step", stopping)
        pretrain(method, *argv, "--out", out)
    [newest] = (out / "checkpoints").iterdir()
    assert newest.name == "step-00000002.pt"
    as_before(newest, method)
    record = json.loads((out / "config.json").read_text())
    settings = record["config"] | {"estimate": False, "profile": False}
    del settings["trackers"], record["overridden"]
    settings["test_size"] = settings.pop("eval_size")
    if method == "simclr":
        settings["cache_chunk"] = settings.pop("grad_cache_chunk")
    (out / "config.json").write_text(json.dumps(record | {"config": settings}))

    pretrain(method, *argv, "--out", out)
    assert checkpoints(out).keys() >= {"step-00000006.pt"}
    assert_same_run(tmp_path / "whole", out)
    record = json.loads((out / "config.json").read_text())
    assert len(record["launches"]) == 2 and "eval_size" in record["overridden"]
