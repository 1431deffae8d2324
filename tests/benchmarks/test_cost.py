"""Operations are those of the layers; the run is the command's own, and is left unfinished."""

import importlib
import json
from copy import deepcopy

import pytest
import torch
from torch import nn

from common import encoders
from tests.benchmarks import cost
from tests.helpers import one_thread

BATCH, SIDE = 16, 16
SMALL = ["demo", "--batch-size", str(BATCH), "--image-size", str(SIDE)]


def products(module):
    """(multiplications of a forward pass of one image, of which in the first layer)."""
    found, hooks = [], []

    def note(layer, inputs, output):
        found.append(output[0].numel() * layer.weight[0].numel())

    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            hooks.append(layer.register_forward_hook(note))
    module.eval()(torch.rand(1, 3, SIDE, SIDE))
    return sum(found), found[0]


def expected_flops(method):
    """By the layers' sizes: a layer's backward costs two forwards, the first one's only one."""
    program, encoder = importlib.import_module(f"{method}.pretrain"), encoders.build("demo")
    cfg, _ = program.RECIPES["demo"]
    if method == "simclr":
        network = program.SimCLR(encoder, cfg.head_layers, cfg.head_dim)
        whole, first = products(nn.Sequential(network.encoder, network.head))
        similarities = 4 * BATCH * cfg.head_dim  # of an image: two views with two each
        return 2 * (2 * (3 * whole - first) + 3 * similarities)
    if method == "moco":
        network = program.MoCo(
            lambda: deepcopy(encoder), cfg.head, cfg.dim, cfg.queue_size
        ).encoder_q
        whole, first = products(nn.Sequential(network.encoder, network.head))
        against_queue = cfg.dim * cfg.queue_size  # the queue has no gradient
        return 2 * 2 * ((3 * whole - first) + whole + 2 * against_queue)
    network = program.Online(encoder, cfg.hidden_dim, cfg.dim)
    online = nn.Sequential(network.encoder, network.projector, network.predictor)
    whole, first = products(online)
    target, _ = products(online[:2])
    return 2 * 2 * ((3 * whole - first) + target)


@pytest.mark.parametrize("method", cost.METHODS)
def test_what_a_few_steps_say(method, tmp_path):
    trace = tmp_path / "trace.json"
    with one_thread():
        found = cost.measure(method, SMALL, str(trace))
    assert found["flops"] == expected_flops(method)
    parts = found["run"].checkpoints.parts
    network = parts["online" if method == "byol" else "model"]
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert found["parameters"] == trained > 241_184  # of the encoder
    assert found["rate"] > 0 < found["gb"] and 0 < found["wait"] < 1
    events = json.loads(trace.read_text())["traceEvents"]
    assert any("conv" in event.get("name", "") for event in events)
    assert not found["run"].folder.exists()
    lines = cost.report(found).splitlines()
    assert [line.split()[0] for line in lines] == [
        "parameters", "operations", "memory", "speed", "time"
    ]  # fmt: skip
    assert "h with 8 processes" in lines[-1] and "peak" not in lines[3]


def test_the_peak_of_a_device():
    assert cost.peak_flops("NVIDIA H200", "bf16") == 989.5e12
    assert cost.peak_flops("NVIDIA A100-SXM4-80GB", "fp32") == 156e12
    for unknown in ("CPU", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H200 MIG 1g.18gb"):
        assert cost.peak_flops(unknown, "bf16") is None
    assert cost.peak_flops("NVIDIA H200", "fp64") is None
