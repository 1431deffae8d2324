"""Each method's loop on the real command: it never waits for the device, compiled or not."""

import contextlib

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from common.run import Run, Waiting
from tests.helpers import METHODS, pretrain, rows

STEPS, BATCH, IMAGES = 8, 16, 5120


def run(method, out, *more):
    epochs = (STEPS - (method == "simclr")) * BATCH / IMAGES  # SimCLR's has one step more
    small = ("--image-size", 16, "--batch-size", BATCH, "--log-every", 4, "--knn-every", 0)
    pretrain(method, "demo", *small, "--epochs", epochs, "--out", out, *more)
    assert [row["step"] for row in rows(out)] == [0, 4, 7]


class Waits(TorchDispatchMode):
    """Names of operations that hand a value of a tensor to Python, while `watching`."""

    HAND_OVER = frozenset({"_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2"})

    def __init__(self):
        super().__init__()
        self.seen, self.watching = [], False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.watching and func.__name__.split(".")[0] in self.HAND_OVER:
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def watched(logged_too=False):
    """Watch the body of the loop, between two batches, at steps that are not logged."""
    waits, steps = Waits(), Run.steps

    def between(run, pairs):
        for step, views in steps(run, pairs):
            waits.watching = logged_too or not run.should_log(step)
            yield step, views
            waits.watching = False

    with pytest.MonkeyPatch.context() as patch, waits:
        patch.setattr(Run, "steps", between)
        yield waits


@pytest.mark.parametrize(
    ("method", "more"),
    [("simclr", ()), ("moco", ()), ("moco", ("--symmetric",)), ("byol", ()),
     ("byol", ("--accumulate", 2)), ("simclr", ("--grad-cache-chunk", 8)),
     ("byol", ("--online-linear",))],
)  # fmt: skip
def test_no_step_waits_for_the_device_unless_it_is_logged(method, more, tmp_path):
    with watched() as waits:
        run(method, tmp_path / "run", *more)
    assert waits.seen == []


def test_the_watch_can_see(tmp_path):
    with watched(logged_too=True) as waits:
        run("simclr", tmp_path / "run")
    assert len(waits.seen) > 10


@pytest.mark.parametrize("method", METHODS)
def test_every_encoder_is_compiled_on_request(method, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda module: compiled.append(module))
    run(method, tmp_path / "compiled", "--compile")
    assert len(set(map(id, compiled))) == len(compiled) == (1 if method == "simclr" else 2)
    assert all(type(module).__name__ == "DemoEncoder" for module in compiled)


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--grad-cache-chunk", 4, "--online-linear")])
def test_a_compiled_run_is_the_same_run(more, tmp_path):
    run("simclr", tmp_path / "plain", *more)
    torch._dynamo.utils.counters.clear()
    run("simclr", tmp_path / "compiled", "--compile", *more)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # none to be judged by kNN
    torch.compiler.reset()
    for a, b in zip(rows(tmp_path / "plain"), rows(tmp_path / "compiled"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-3)


def test_waiting_on_a_gpu_is_the_device_s_and_each_second_counts_once(monkeypatch):
    """On stand-ins, whose device is at 0, 1, 2, ... seconds when it comes to an event."""
    clock, awaited = iter(range(100)), []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(clock)

        def synchronize(self):
            awaited.append(self.at)

        def elapsed_time(self, end):
            assert end.at <= awaited[-1]
            return 1000 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    waiting = Waiting(torch.device("cuda"))
    for steps in (2, 3, 0):
        for _ in range(steps):
            with waiting:
                next(clock)
        assert waiting.taken() == 2 * steps
    assert awaited == [5, 14]
