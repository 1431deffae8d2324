"""What a step costs: counted, timed, traced and foretold, on the training loops themselves."""

import contextlib
import gzip
import json
import sys

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import byol.pretrain
import moco.pretrain
import simclr.pretrain
from common import cli, speed
from common.run import Run

MAIN = {"simclr": simclr.pretrain, "moco": moco.pretrain, "byol": byol.pretrain}
BATCH, SIDE, STEPS = 16, 16, 8


def run(method, out, *more):
    """The real command in this process, on the embedded images, for a few steps."""
    shrunk = {"image_size": SIDE, "batch_size": BATCH, "log_every": 4, "knn_every": 0, "out": out}
    words = [str(w) for k, v in shrunk.items() for w in (f"--{k.replace('_', '-')}", v)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pretrain", "demo", *words, *more])
        patch.setattr(MAIN[method], "total_steps", lambda *_: STEPS)
        cli.run(MAIN[method].main)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- counting ------------------------------------------------------------------------------------


def test_the_peak_of_a_device():
    assert speed.peak_flops("NVIDIA H200", "bf16") == 989.5e12
    assert speed.peak_flops("NVIDIA A100-SXM4-80GB", "fp32") == 156e12
    for slower in ("NVIDIA H100 PCIe", "NVIDIA H200 NVL"):
        assert speed.peak_flops(slower, "fp16") < speed.peak_flops("NVIDIA H200", "fp16")
    for unknown in ("CPU", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H200 MIG 1g.18gb"):
        assert speed.peak_flops(unknown, "bf16") is None
    assert speed.peak_flops("NVIDIA H200", "fp64") is None


def test_one_step_is_counted_and_the_stream_is_as_it_was():
    layer, said = nn.Linear(5, 7), []
    views = [(torch.rand(4, 5), torch.rand(4, 5)) for _ in range(3)]
    for (view1, view2), (given, _) in zip(speed.counted(iter(views), said.append), views):  # noqa: B905
        assert view1 is given
        layer(torch.cat([view1, view2])).sum().backward()
    # two views, forward and the gradient of the weights, 2 FLOPs a product
    assert said == [2 * 2 * 2 * 5 * 7]


def products(module, side):
    """(multiplications of a forward pass of one image, of which in the first layer)."""
    found, hooks = [], []

    def note(layer, inputs, output):
        found.append(output[0].numel() * layer.weight[0].numel())

    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            hooks.append(layer.register_forward_hook(note))
    module.eval()(torch.rand(1, 3, side, side))
    return sum(found), found[0]


def expected_flops(method):
    """By the layers' sizes: a layer's backward costs two forwards, the first one's only one."""
    torch.manual_seed(0)
    cfg = MAIN[method].RECIPES["demo"]
    if method == "simclr":
        network = MAIN[method].SimCLR(cfg)
        whole, first = products(nn.Sequential(network.encoder, network.head), SIDE)
        similarities = 4 * BATCH * cfg.head_dim  # of an image: two views with two each
        return 2 * (2 * (3 * whole - first) + 3 * similarities)
    if method == "moco":
        network = MAIN[method].MoCo(cfg).encoder_q
        whole, first = products(nn.Sequential(network.encoder, network.head), SIDE)
        against_queue = cfg.dim * cfg.queue_size  # the queue has no gradient
        return 2 * 2 * ((3 * whole - first) + whole + 2 * against_queue)
    network = MAIN[method].Online(cfg)
    online = nn.Sequential(network.encoder, network.projector, network.predictor)
    whole, first = products(online, SIDE)
    target, _ = products(online[:2], SIDE)
    return 2 * 2 * ((3 * whole - first) + target)


@pytest.fixture(scope="module", params=MAIN)
def estimated(request, tmp_path_factory):
    """A method, its trial, and what it printed and left."""
    out, trials = tmp_path_factory.mktemp("estimate") / "run", []
    with pytest.MonkeyPatch.context() as patch:
        report = Run._report
        patch.setattr(Run, "_report", lambda run, t: (trials.append(t), report(run, t)))
        patch.setattr("builtins.print", lambda *args, **_: trials.append(" ".join(args)))
        run(request.param, out, "--estimate")
    return request.param, *trials, out


def test_flops_of_a_step_are_those_of_its_layers(estimated):
    method, trial, _, _ = estimated
    assert trial.flops == expected_flops(method)


# ---- estimating ----------------------------------------------------------------------------------


def test_an_estimate_says_what_it_takes_and_writes_nothing(estimated):
    method, trial, said, out = estimated
    assert not out.exists()
    assert trial.steps == STEPS - 3 and trial.pairs == BATCH and 0 <= trial.waited < trial.seconds
    head, *lines = said.splitlines()
    assert head == f"{method} demo, nothing trained or written"
    assert [line.split()[0] for line in lines] == [
        "parameters", "operations", "memory", "speed", "time"
    ]  # fmt: skip
    assert f"{trial.flops / 1e9:.2f} GFLOP a pair" in lines[1] and "16 pairs" in lines[2]
    assert f"{trial.rate:,.1f} pairs/s" in lines[3]
    seconds = STEPS * BATCH / trial.rate
    assert f"{STEPS} steps: {speed.duration(seconds)} with 1" in lines[4]


def test_an_estimate_leaves_the_run_that_is_there_alone(tmp_path):
    run("simclr", tmp_path / "run")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    run("simclr", tmp_path / "run", "--estimate", "--temperature", "0.3")
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_the_memory_that_fits(monkeypatch):
    """By the part that goes with the batch: 2 GB fixed, 8 GB for 100 pairs, 90 % of 80 GB."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    gpu = type("Properties", (), {"total_memory": 80 * 2**30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 10 * 2**30)
    trial = speed.Trial(10, 2.0, 0.1, 100, fixed_gb=2.0, flops=50e9)
    said = speed.report(trial, precision="bf16", parameters=28e6, total=31_279, processes=8)
    assert "about 875 pairs fit" in said and "28.00 million" in said and "5.0% of the time" in said
    assert "4,000.0 pairs/s, 8 x NVIDIA H200, 25 TFLOP/s each, 2.5% of its peak" in said
    assert "31,279 steps: 13.9 h with 1, 7.0 h with 2, 3.5 h with 4, 104.3 min with 8" in said


def test_a_run_too_short_to_measure():
    said = []
    views = iter([(torch.rand(2, 3), torch.rand(2, 3))] * 2)
    assert len(list(speed.tried(views, 0, said.append))) == 2
    assert said[0].steps == 0
    text = speed.report(said[0], precision="fp32", parameters=1, total=2, processes=1)
    assert "over before it can be measured" in text


def test_durations():
    said = [speed.duration(s) for s in (45, 119, 120, 7200, 3 * 86400)]
    assert said == ["45 s", "119 s", "2.0 min", "2.0 h", "3.0 days"]


# ---- while it runs -------------------------------------------------------------------------------


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_profiled_run_leaves_a_trace_and_is_the_same_run(tmp_path):
    run("simclr", tmp_path / "plain")
    run("simclr", tmp_path / "traced", "--profile")
    assert lines(tmp_path / "plain/metrics.jsonl") == lines(tmp_path / "traced/metrics.jsonl")
    trace = json.loads(gzip.decompress((tmp_path / "traced/trace.json.gz").read_bytes()))
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"step 3", "step 4", "step 5", "data", "aten::convolution"} <= names
    assert not {"step 2", "step 6"} & names
    assert not (tmp_path / "plain/trace.json.gz").exists()


def test_what_is_shown_and_recorded(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr("tqdm.tqdm.set_postfix", lambda bar, row, **_: shown.append(row))
    run("moco", tmp_path / "known")
    recorded = lines(tmp_path / "known/timings.jsonl")
    assert [row["step"] for row in recorded] == [0, 4, 7]
    assert "tflops" not in recorded[0]  # the first step is the one that is counted
    for row in recorded[1:]:
        flops = row["tflops"] * 1e12 / row["pairs_per_second"]
        assert flops == pytest.approx(expected_flops("moco"))
        assert row["peak_memory_gb"] > 0.1 and 0 <= row["data_wait"] < 1 and "mfu" not in row
    assert shown[-1].keys() == {"loss", "queue", "waiting", "memory", "TFLOP/s"}
    monkeypatch.setattr(speed, "peak_flops", lambda device, precision: 1e12)
    run("moco", tmp_path / "peak")
    recorded = lines(tmp_path / "peak/timings.jsonl")[1:]
    assert len(recorded) == 2 and all(row["mfu"] == row["tflops"] for row in recorded)
    assert shown[-1].keys() == {"loss", "queue", "waiting", "memory", "MFU"}


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
def watched(log_every_step=False):
    """Watch the body of the loop, between two batches, at steps that are not logged."""
    waits, steps = Waits(), Run.steps

    def between(run, pairs):
        for step, views in steps(run, pairs):
            waits.watching = log_every_step or not run.logs(step)
            yield step, views
            waits.watching = False

    with pytest.MonkeyPatch.context() as patch, waits:
        patch.setattr(Run, "steps", between)
        yield waits


@pytest.mark.parametrize("method", MAIN)
def test_no_step_waits_for_the_device_unless_it_is_logged(method, tmp_path):
    with watched() as waits:
        run(method, tmp_path / "run")
    assert waits.seen == []


def test_the_watch_can_see(tmp_path):
    with watched(log_every_step=True) as waits:
        run("simclr", tmp_path / "run")
    assert len(waits.seen) > 10


# ---- compiled ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method, encoders", [("simclr", 1), ("moco", 2), ("byol", 2)])
def test_every_encoder_is_compiled_on_request(method, encoders, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda module: compiled.append(module))
    run(method, tmp_path / "compiled", "--compile")
    assert len(compiled) == encoders == len(set(map(id, compiled)))
    assert all(type(module).__name__ == "DemoEncoder" for module in compiled)


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--cache-chunk", "4")])
def test_a_compiled_run_is_the_same_run(more, tmp_path):
    run("simclr", tmp_path / "plain", *more)
    run("simclr", tmp_path / "compiled", "--compile", *more)
    one, other = (lines(tmp_path / name / "metrics.jsonl") for name in ("plain", "compiled"))
    assert [row["step"] for row in one] == [row["step"] for row in other] == [0, 4, 7]
    for a, b in zip(one, other, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-3)
