"""Gradient caching: a batch in chunks, with the gradients of the whole batch."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import simclr.pretrain
from common import cli
from simclr.config import CIFAR10
from simclr.loss import nt_xent
from simclr.model import SimCLR, globalize
from tests.helpers import rel, run_processes

DOUBLE = torch.float64
BATCH = 24


def network(chunk, norm="group", dtype=DOUBLE, batch=BATCH):
    """The same weights whatever the chunk: the demo encoder and a head with hidden layers."""
    torch.manual_seed(0)
    cfg = replace(CIFAR10, arch="demo", image_size=16, batch_size=batch, cache_chunk=chunk)
    model = SimCLR(cfg)
    if norm == "group":
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
                    setattr(module, name, nn.GroupNorm(8, child.num_features))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p + 0.05 * torch.randn(p.shape))  # no gradient is zero by symmetry
    return model.to(dtype)


def views(batch=BATCH, dtype=DOUBLE):
    torch.manual_seed(1)
    return torch.rand(2, batch, 3, 16, 16, dtype=DOUBLE).to(dtype).unbind()


def one_step(model, view1, view2):
    z1, z2 = model(view1, view2)
    loss, logits = nt_xent(z1, z2, 0.5)
    loss.backward()
    model = getattr(model, "module", model)
    return {
        "z": torch.cat([z1, z2]).detach(),
        "loss": loss.detach(),
        "logits": logits.detach(),
        "grads": {k: p.grad for k, p in model.named_parameters() if p.requires_grad},
        "buffers": {k: b.clone() for k, b in model.named_buffers()},
    }


def worst(one, other):
    assert one["grads"].keys() == other["grads"].keys() and len(one["grads"]) > 10
    assert all(grad.abs().max() > 1e-9 for grad in other["grads"].values())
    grads = [rel(one["grads"][k], grad) for k, grad in other["grads"].items()]
    return max(*grads, rel(one["loss"], other["loss"]), rel(one["z"], other["z"]))


# ---- exact ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 4, 12, 24])
def test_without_batch_statistics_chunks_are_the_whole(chunk):
    whole = one_step(network(0), *views())
    assert worst(one_step(network(chunk), *views()), whole) < 1e-10


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_in_single_precision(memory_format):
    whole = one_step(network(0), *views())
    narrow = network(4, dtype=torch.float32).to(memory_format=memory_format)
    assert worst(one_step(narrow, *views(dtype=torch.float32)), whole) < 1e-5


def test_gradient_accumulation_is_not_the_whole():
    """The comparison has teeth: the losses of the chunks alone have other gradients."""
    whole, model = one_step(network(0), *views()), network(0)
    for part1, part2 in zip(*(view.split(4) for view in views()), strict=True):
        (nt_xent(*model(part1, part2), 0.5)[0] / 6).backward()
    grads = {k: p.grad for k, p in model.named_parameters() if p.requires_grad}
    assert worst(whole | {"grads": grads}, whole) > 1e-2


def test_batch_statistics_are_those_of_a_chunk():
    """And running ones move once a step, by the chunks' mean, in the first pass alone."""
    found = one_step(network(6, norm="batch"), *views())
    copies = [network(0, norm="batch") for _ in range(4)]  # each chunk a network of its own
    parts = [c(*(view[k::4] for view in views())) for k, c in enumerate(copies)]
    z1, z2 = (torch.stack(z, 1).flatten(0, 1) for z in zip(*parts, strict=True))
    nt_xent(z1, z2, 0.5)[0].backward()
    assert rel(found["z"], torch.cat([z1, z2])) < 1e-12
    by_hand = [dict(c.named_parameters()) for c in copies]
    for name, grad in found["grads"].items():
        assert rel(grad, sum(parameters[name].grad for parameters in by_hand)) < 1e-10, name
    by_hand = [dict(c.named_buffers()) for c in copies]
    for name, buffer in found["buffers"].items():
        assert rel(buffer, sum(buffers[name] for buffers in by_hand) / 4) < 1e-12, name
    assert found["buffers"]["head.1.num_batches_tracked"] == 1
    whole = one_step(network(0, norm="batch"), *views())
    assert worst(found, whole) > 1e-3  # the deviation is real


# ---- mixed precision -----------------------------------------------------------------------------


def test_gradients_of_chunks_add_up_in_single_precision():
    """Under bfloat16 the whole's gradients, each rounded once; their sum in bfloat16 is off by 3 %.

    A scaled loss, as for float16, has the same gradients.
    """

    def gradients(chunk, scale=1.0):
        model = network(chunk, dtype=torch.float32, batch=96)
        with torch.autocast("cpu", torch.bfloat16):
            z1, z2 = model(*views(96, torch.float32))
        (nt_xent(z1, z2, 0.5)[0] * scale).backward()
        return {k: p.grad / scale for k, p in model.named_parameters() if p.requires_grad}

    whole, cached, scaled = gradients(0), gradients(4), gradients(4, scale=2.0**12)
    assert max(rel(cached[k], grad) for k, grad in whole.items()) < 0.015
    assert all(torch.equal(scaled[k], grad) for k, grad in cached.items())


# ---- several processes ---------------------------------------------------------------------------


def share(rank, world, images):
    found = {}
    for norm in ("group", "batch"):
        model = DistributedDataParallel(globalize(network(8, norm)))
        found[norm] = one_step(model, *(view.chunk(world)[rank] for view in images))
    return found


def test_two_processes_are_one():
    """In chunks too, with DDP and with the BatchNorm of all processes."""
    ranks = run_processes(share, 2, views())
    for norm in ("group", "batch"):
        alone = one_step(network(8, norm), *views())
        for found in (rank[norm] for rank in ranks):
            for name, grad in alone["grads"].items():
                assert rel(found["grads"][name], grad) < 1e-10, name
            for name, buffer in alone["buffers"].items():
                assert rel(found["buffers"][name], buffer) < 1e-10, name
        assert rel(sum(rank[norm]["loss"] for rank in ranks) / 2, alone["loss"]) < 1e-10


# ---- memory --------------------------------------------------------------------------------------


def kept_bytes(chunk, batch):
    """Bytes that a forward keeps for the backward, outside the views and the weights."""
    model, (view1, view2) = network(chunk, "batch", torch.float32, batch), views(batch)
    view1, view2 = view1.float(), view2.float()
    known = {t.untyped_storage().data_ptr() for t in (view1, view2, *model.state_dict().values())}
    sizes = {}

    def pack(t):
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(view1, view2)
    return sum(size for at, size in sizes.items() if at not in known)


def test_what_is_kept_does_not_grow_with_the_batch():
    whole = [kept_bytes(0, batch) for batch in (64, 128)]
    cached = [kept_bytes(16, batch) for batch in (64, 128)]
    assert whole[1] > 1.9 * whole[0] > 1e6
    assert max(cached) < 0.02 * whole[0]


# ---- the command ---------------------------------------------------------------------------------


def flags(out, *more):
    shrunk = {"arch": "demo", "image_size": 16, "batch_size": 64, "epochs": 0.2, "knn_every": 0}
    pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in shrunk.items()]
    return ["pretrain", "demo", "--out", str(out), *(w for p in pairs for w in p), *more]


def test_a_run_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", flags(tmp_path / "run", "--cache-chunk", "16"))
    monkeypatch.setattr(simclr.pretrain, "total_steps", lambda *_: 3)
    cli.run(simclr.pretrain.main)
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["step"] == 2 and json.loads(rows[-1])["loss"] > 0


def test_chunks_that_do_not_make_up_the_batch(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", flags(tmp_path / "run", "--cache-chunk", "48"))
    with pytest.raises(SystemExit) as caught:
        cli.run(simclr.pretrain.main)
    said = capsys.readouterr().err
    assert caught.value.code == 2 and said.count("\n") == 1
    assert "--cache-chunk 48: must divide --batch-size 64" in said
