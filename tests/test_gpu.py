"""The checks of tests/benchmarks/right.py: on a GPU, and on a CPU at a reduced size.

python -m pytest tests/test_gpu.py -m gpu
"""

import json
import signal
import sys

import pytest
import torch

from common.augment import Batched
from common.errors import UserError
from common.run import Run
from eval.results.page import read_folder, results_page
from moco.model import MoCo
from simclr.grad_cache import GradCache
from tests.benchmarks import right
from tests.helpers import METHODS, forget_processes, one_thread

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def forgotten():
    yield
    forget_processes()


def in_time(name):
    """The check, among the slow tests if it takes long."""
    return pytest.param(name, marks=pytest.mark.slow if name in ("fp16", "bf16") else ())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", right.CHECKS)
def test_it_is_right_on_a_gpu(name, tmp_path):
    assert right.CHECKS[name](torch.device("cuda"), tmp_path)


@pytest.mark.parametrize("name", [in_time(name) for name in right.CHECKS])
def test_a_check_holds_on_a_cpu(name, tmp_path):
    with one_thread():
        figures = right.CHECKS[name](CPU, tmp_path)
    assert len(figures) >= 2 and all(isinstance(value, float | int) for value in figures.values())


# ---- each can fail -------------------------------------------------------------------------------


def every_other(function, change):
    """`function`, whose result is changed at every second call."""
    calls = []

    def changed(*args, **kwargs):
        calls.append(0)
        result = function(*args, **kwargs)
        return result if len(calls) % 2 else change(result)

    return changed


def miss(name, folder):
    """What a check says of a bound that is missed."""
    with one_thread(), pytest.raises(AssertionError) as caught:
        right.CHECKS[name](CPU, folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_losses_of_a_loss_that_is_a_little_off(tmp_path, monkeypatch):
    off = every_other(right.pretrain, lambda curve: [loss * (1 + 1e-8) for loss in curve])
    monkeypatch.setattr(right, "pretrain", off)
    assert miss("losses", tmp_path) == "; ".join(
        f"{name}: losses apart by 1.0e-08, more than 1e-09" for name in ("SimCLR", "MoCo", "BYOL")
    )


def test_views_that_are_a_little_off(tmp_path, monkeypatch):
    monkeypatch.setattr(Batched, "__call__", every_other(Batched.__call__, lambda v: v + 1e-4))
    assert "simclr demo, view 1, float32, 32 px: apart by" in miss("views", tmp_path)


@pytest.mark.slow
def test_a_queue_that_takes_the_keys_of_a_skipped_step(tmp_path, monkeypatch):
    encode, keep = MoCo.encode_keys, MoCo.dequeue_and_enqueue

    def eager(network, *args):
        keys = encode(network, *args)
        keep(network, keys)
        return keys

    monkeypatch.setattr(MoCo, "encode_keys", eager)
    with one_thread(), pytest.raises(AssertionError, match=r"queue.* moves in a step"):
        right.skipped_steps(CPU, tmp_path, "moco")


@pytest.mark.slow
def test_a_loss_that_bfloat16_changes(tmp_path, monkeypatch):
    off = every_other(right.pretrain, lambda curve: [loss * 1.04 for loss in curve])
    monkeypatch.setattr(right, "pretrain", off)
    said = miss("bf16", tmp_path)
    assert said.startswith("SimCLR: first losses ") and "more than 0.90%" in said


@pytest.mark.slow
def test_a_restart_that_forgets_the_optimiser(tmp_path, monkeypatch):
    opened = Run.open

    def forgetful(run, state, *args, **kwargs):
        opened(run, state, *args, **kwargs)
        state["optimizer"].state.clear()

    monkeypatch.setattr(Run, "open", forgetful)
    assert "SimCLR: apart by" in miss("resume", tmp_path)


def test_chunks_that_keep_everything_or_lose_something(tmp_path, monkeypatch):
    cached = GradCache.forward
    with monkeypatch.context() as patch:
        patch.setattr(GradCache, "forward", lambda model, *pair: model.model(*pair))
        assert "memory in chunks is 1.00 of the whole's" in miss("grad-cache", tmp_path)
    off = lambda model, *pair: [z + 0.01 for z in cached(model, *pair)]  # noqa: E731
    monkeypatch.setattr(GradCache, "forward", off)
    assert "gradients apart by" in miss("grad-cache", tmp_path)


@pytest.mark.slow
def test_a_graph_that_is_kept(tmp_path, monkeypatch):
    kept, end = [], Run.end_step

    def leaking(run, step, views, *args, **kwargs):
        kept.append(views)
        end(run, step, views, *args, **kwargs)

    monkeypatch.setattr(Run, "end_step", leaking)
    assert "SimCLR: the peak grows by" in miss("memory", tmp_path)


# ---- the command ---------------------------------------------------------------------------------


def test_every_recipe_s_views_are_compared():
    found = {name.split()[0] for name in right.distributions(32)}
    assert found == set(METHODS) and len(right.distributions(224)) >= 10


def test_what_is_wrong_is_one_line_and_the_others_are_made(tmp_path, monkeypatch, capsys):
    def wrong(device, folder):
        raise AssertionError("too far")

    def broken(device, folder):
        raise ValueError("first line\nsecond line")

    checks = {"wrong": wrong, "broken": broken, "fine": lambda device, folder: {"a figure": 1e-12}}
    monkeypatch.setattr(right, "CHECKS", checks)
    kept = tmp_path / "kept"
    argv = ["right.py", "--cpu", "--out", str(tmp_path / "out"), "--record-in", str(kept)]
    monkeypatch.setattr(sys, "argv", argv)
    assert right.main() == 1 and [path.name for path in kept.iterdir()] == ["right-fine.json"]
    wrong, broken, fine, summary = capsys.readouterr().out.splitlines()
    assert summary == "WRONG: wrong, broken"
    assert wrong.startswith("wrong: WRONG: too far (")
    assert broken.startswith("broken: WRONG: ValueError: first line (")
    assert fine.startswith("fine: right: a figure 1e-12; seconds ")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_and_nothing_is_called_wrong(signum, tmp_path, monkeypatch, capsys):
    def signalled(device, folder):
        stop = lambda run, step: signal.raise_signal(signum)  # noqa: E731
        right.pretrain("simclr", device, folder / "run", 3, 32, "--image-size", 16, each=stop)

    monkeypatch.setattr(right, "CHECKS", {"first": signalled, "second": lambda *_: {"x": 1.0}})
    monkeypatch.setattr(sys, "argv", ["right.py", "--cpu", "--out", str(tmp_path / "out")])
    with one_thread(), pytest.raises(SystemExit) as caught:
        right.main()
    assert caught.value.code == 128 + signum
    assert capsys.readouterr().out == ""


def test_a_folder_that_cannot_be_made_is_named_before_the_checks(monkeypatch):
    monkeypatch.setattr(right, "CHECKS", {"never": None})
    for flag in ("--out", "--record-in"):
        monkeypatch.setattr(sys, "argv", ["right.py", "--cpu", flag, __file__])
        with pytest.raises(UserError, match=f"^{flag} .*: cannot be made"):
            right.main()


def test_a_record(tmp_path, monkeypatch, capsys):
    path = tmp_path / "results" / "right-views.json"
    argv = ["views", "--cpu", "--out", tmp_path / "out", "--record-in", path.parent]
    monkeypatch.setattr(sys, "argv", ["right.py", *map(str, argv)])
    assert right.main() == 0 and capsys.readouterr().out.startswith("views: right: ")
    record = json.loads(path.read_text())
    assert record["kind"] == "measurement" and record["device"].startswith("CPU")
    assert record["command"] == "python -m tests.benchmarks.right views --cpu" and record["commit"]
    assert record["figures"].keys() == {"float32, 32 px", "float64, 32 px", "seconds"}
    assert record["title"] in results_page([read_folder(path.parent)[0][1]])


def test_a_mistake_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["right.py", "view"])
    with pytest.raises(SystemExit) as caught:
        right.main()
    assert caught.value.code == 2 and "not one of losses" in capsys.readouterr().err
