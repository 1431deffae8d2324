"""Gradient caching: a batch in chunks, with the gradients of the whole batch."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common import encoders
from simclr.grad_cache import GradCache
from simclr.loss import nt_xent
from simclr.model import SimCLR, globalize, init_weights
from tests.helpers import pretrain, rel, rows, run_processes

DOUBLE = torch.float64
BATCH = 24


def network(chunk, norm="group", dtype=DOUBLE, batch=BATCH):
    """The same weights whatever the chunk: the demo encoder and a head with hidden layers."""
    torch.manual_seed(0)
    model = SimCLR(encoders.build("demo"), head_layers=3)
    init_weights(model)
    if norm == "group":
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
                    setattr(module, name, nn.GroupNorm(8, child.num_features))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p + 0.05 * torch.randn(p.shape))  # no gradient is zero by symmetry
    return (GradCache(model, batch // chunk) if chunk else model).to(dtype)


def views(batch=BATCH, dtype=DOUBLE):
    torch.manual_seed(1)
    return torch.rand(2, batch, 3, 16, 16, dtype=DOUBLE).to(dtype).unbind()


def one_step(model, view1, view2):
    z1, z2 = model(view1, view2)
    loss, logits = nt_xent(z1, z2, 0.5)
    loss.backward()
    model = getattr(model, "module", model)  # inside DDP
    model = model.model if isinstance(model, GradCache) else model
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


def test_dropout_draws_the_same_masks_in_both_passes():
    """A linear model with dropout: its gradient is the sum of the masked inputs it has seen."""

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8, dtype=DOUBLE))
            self.seen = []

        def forward(self, view1, view2):
            masked = [nn.functional.dropout(view) for view in (view1, view2)]
            self.seen.append(sum(view.sum(0) for view in masked))
            return tuple(self.weight * view for view in masked)

    model = Masked()
    z1, z2 = GradCache(model, 3)(*torch.rand(2, 6, 8, dtype=DOUBLE))
    (z1.sum() + z2.sum()).backward()
    assert len(model.seen) == 6 and torch.equal(sum(model.seen[:3]), sum(reversed(model.seen[3:])))
    torch.testing.assert_close(model.weight.grad, sum(model.seen[:3]))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_in_single_precision(memory_format):
    """Beside the whole in single precision, whose own distance from double is not the chunks'."""

    def step(chunk):
        model = network(chunk, dtype=torch.float32).to(memory_format=memory_format)
        return one_step(model, *views(dtype=torch.float32))

    assert worst(step(4), step(0)) < 1e-5


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
        return [p.grad / scale for p in model.parameters() if p.requires_grad]

    whole, cached, scaled = gradients(0), gradients(4), gradients(4, scale=2.0**12)
    assert max(map(rel, cached, whole)) < 0.015
    assert all(map(torch.equal, scaled, cached))


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
    shrunk = {"arch": "demo", "image_size": 16, "batch_size": 64, "epochs": 0.03, "knn_every": 0}
    pairs = [(f"--{name.replace('_', '-')}", value) for name, value in shrunk.items()]
    return ["demo", "--out", out, *(w for p in pairs for w in p), *more]


def test_a_run_in_chunks(tmp_path):
    """Of the same first loss as the whole, but for the chunks' BatchNorm; by the old flag too."""
    for name, chunk in (("whole", ()), ("chunks", ("--grad-cache-chunk", 16))):
        pretrain("simclr", *flags(tmp_path / name, "--log-every", 1, *chunk))
    pretrain("simclr", *flags(tmp_path / "old", "--log-every", 1, "--cache-chunk", 16))
    whole, chunks, old = (rows(tmp_path / name) for name in ("whole", "chunks", "old"))
    assert chunks == old and [row["step"] for row in chunks] == [0, 1, 2]
    assert 0 < abs(chunks[0]["loss"] - whole[0]["loss"]) < 0.1 * whole[0]["loss"]


def test_chunks_that_do_not_make_up_the_batch(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        pretrain("simclr", *flags(tmp_path / "run", "--grad-cache-chunk", 48))
    said = capsys.readouterr().err
    assert caught.value.code == 2 and said.count("\n") == 1
    assert "--grad-cache-chunk 48: must divide --batch-size 64" in said
