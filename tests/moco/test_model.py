"""Networks, key update, queue, BatchNorm in groups and its shuffle."""

import math
from collections import deque
from copy import deepcopy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common import encoders
from moco.config import CIFAR10, MOCO_V1, MOCO_V2
from moco.loss import contrastive_top1, info_nce
from moco.model import MoCo, SplitBatchNorm, from_official, local_shard, split_batchnorm
from moco.pretrain import permutation
from tests.helpers import golden_json, rel, run_processes
from tests.moco.harness import Tiny

DOUBLE = torch.float64


def count(module):
    return sum(p.numel() for p in module.parameters())


def tiny(dtype=DOUBLE, groups=1, size=10):
    torch.manual_seed(0)
    return split_batchnorm(MoCo(Tiny, dim=6, queue_size=size), groups).to(dtype)


def of_recipe(cfg, queue_size=2):
    name = encoders.full_name(cfg.arch, cfg.stem)
    return MoCo(partial(encoders.build, name), cfg.head, cfg.dim, queue_size)


def noise(*shape, seed=0, dtype=DOUBLE):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


# ---- networks ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cfg, head, network",
    [
        (MOCO_V1, 262_272, 23_770_304),
        (MOCO_V2, 4_458_624, 27_966_656),
        (CIFAR10, 65_664, 11_234_496),
    ],
)
def test_sizes(cfg, head, network):
    model = of_recipe(cfg)
    assert count(model.encoder_q.head) == head
    assert count(model.encoder_q) == count(model.encoder_k) == network
    assert not any(p.requires_grad for p in model.encoder_k.parameters())


def test_key_network_starts_as_a_copy():
    model = tiny()
    for q, k in zip(model.encoder_q.parameters(), model.encoder_k.parameters(), strict=True):
        assert torch.equal(q, k) and q.data_ptr() != k.data_ptr()


def test_initial_weights_are_torchvisions():
    model = of_recipe(MOCO_V1).encoder_q.encoder
    conv = model.layer3[0].conv2.weight  # Kaiming normal, fan out
    assert abs(conv.std().item() / math.sqrt(2 / (9 * 256)) - 1) < 0.02
    assert all((bn.weight == 1).all() for bn in model.modules() if isinstance(bn, nn.BatchNorm2d))


def test_output_is_of_unit_length_and_wide():
    model = tiny(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q1, q2 = model.encoder_q(noise(4, 3, 5, 5).float(), noise(4, 3, 5, 5, seed=1).float())
    assert q1.shape == q2.shape == (4, 6) and q1.dtype == torch.float32
    assert rel(q1.norm(dim=1), torch.ones(4)) < 1e-6


def test_views_have_their_own_statistics():
    one, both = tiny(), tiny()
    views = noise(4, 3, 5, 5), 3 + noise(4, 3, 5, 5, seed=1)
    apart = [one.encoder_q(view)[0] for view in views]
    for ours, theirs in zip(both.encoder_q(*views), apart, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name, cfg", [("resnet50_v1", MOCO_V1), ("resnet50_v2", MOCO_V2)])
def test_official_checkpoints_load(name, cfg):
    listed = golden_json("variable_names")["moco"][name]["state_dict"]
    given = {key: torch.zeros(shape, dtype=getattr(torch, kind[6:])) for key, shape, kind in listed}
    assert len(given) > 640
    mapped = from_official(given)
    model = of_recipe(cfg, cfg.queue_size)
    ours = model.state_dict()
    assert {k: (v.shape, v.dtype) for k, v in mapped.items()} == {
        k: (v.shape, v.dtype) for k, v in ours.items()
    }
    model.load_state_dict(mapped)
    assert model.queue_fill.item() == cfg.queue_size


# ---- Eq. 2 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.9, 0.999])
def test_key_update(momentum):
    model = tiny()
    for p in model.encoder_q.parameters():
        nn.init.ones_(p)
    for p in model.encoder_k.parameters():
        nn.init.zeros_(p)
    for k in range(1, 8):
        model.momentum_update(momentum)
        for p in model.encoder_k.parameters():
            assert (p - (1 - momentum**k)).abs().max() < 1e-14


def test_key_update_leaves_statistics_alone():
    model = tiny()
    model.encoder_q(noise(4, 3, 5, 5))
    before = {k: v.clone() for k, v in model.encoder_k.named_buffers()}
    model.momentum_update(0.5)
    after = dict(model.encoder_k.named_buffers())
    assert before and all(torch.equal(before[k], after[k]) for k in before)
    assert not torch.equal(
        after["encoder.bn1.running_mean"], model.encoder_q.encoder.bn1.running_mean
    )


def test_key_network_trains_its_own_statistics_without_gradient():
    model = tiny()
    keys = model.encode_keys(noise(4, 3, 5, 5), torch.randperm(4))
    assert not keys.requires_grad
    assert model.encoder_k.encoder.bn1.num_batches_tracked == 1
    assert model.encoder_q.encoder.bn1.num_batches_tracked == 0


# ---- the queue -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, batches", [(10, [4] * 9), (10, [3, 7, 1, 10, 4]), (5, [12, 3, 26, 5])]
)
def test_queue_is_a_deque(size, batches):
    model = tiny(size=size)
    oracle, seen = deque(maxlen=size), 0
    for n, batch in enumerate(batches):
        keys = noise(batch, 6, seed=n)
        model.dequeue_and_enqueue(keys)
        oracle.extend(keys.tolist())
        seen += batch
        assert model.queue_ptr.item() == seen % size
        assert model.queue_fill.item() == min(seen, size) == len(oracle)
        oldest_first = torch.arange(size) + model.queue_ptr
        ours = model.queue.T[oldest_first % size][size - len(oracle) :]
        assert ours.tolist() == list(oracle)


def test_unfilled_part_of_the_queue_is_untouched():
    model = tiny(torch.float32)
    before = model.queue.clone()
    model.dequeue_and_enqueue(noise(4, 6))
    assert torch.equal(model.queue[:, 4:], before[:, 4:])
    assert model.queue.dtype == torch.float32  # whatever the keys are
    assert model.queue_fill.item() == 4


def test_a_batch_is_not_among_its_own_negatives():
    """With the keys of the batch in the queue already, the loss would be at least log 2."""
    model = tiny(torch.float32)
    keys = F.normalize(noise(4, 6).float(), dim=1)
    early, _ = info_nce(keys, keys, model.queue, 0.01)
    model.dequeue_and_enqueue(keys)
    late, _ = info_nce(keys, keys, model.queue, 0.01)
    assert late > math.log(2) > early


# ---- BatchNorm in groups -------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_groups_are_networks_of_their_own(groups):
    x = noise(8, 3, 5, 4).requires_grad_()
    twin = x.detach().clone().requires_grad_()
    model = split_batchnorm(nn.Sequential(nn.BatchNorm2d(3)), groups).double()
    alone = [nn.BatchNorm2d(3).double() for _ in range(groups)]
    for step in range(2):
        ours = model(x + step)
        theirs = torch.cat(
            [bn(part) for bn, part in zip(alone, (twin + step).chunk(groups), strict=True)]
        )
        assert rel(ours, theirs) < 1e-12
    weight = noise(8, 3, 5, 4, seed=1)
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()
    assert rel(x.grad, twin.grad) < 1e-12
    assert rel(model[0].weight.grad, sum(bn.weight.grad for bn in alone)) < 1e-12
    for name in ("running_mean", "running_var"):
        mean = torch.stack([getattr(bn, name) for bn in alone]).mean(0)
        assert rel(getattr(model[0], name), mean) < 1e-12
    assert model[0].num_batches_tracked == 2


def test_conversion_keeps_names_and_tensors():
    model = MoCo(partial(encoders.build, "demo"), queue_size=10)
    before = model.state_dict(keep_vars=True)
    after = split_batchnorm(model, 4).state_dict(keep_vars=True)
    assert list(before) == list(after)
    assert all(before[k] is after[k] for k in before)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 8 and all(type(m) is SplitBatchNorm and m.groups == 4 for m in norms)


def test_batchnorm_of_vectors_is_cut_too():
    """(B, C) as well as (B, C, H, W), in one network."""

    def network():
        torch.manual_seed(0)
        maps = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten()
        return nn.Sequential(*maps, nn.Linear(45, 7), nn.BatchNorm1d(7)).double()

    cut, plain, x = split_batchnorm(network(), 2), network(), noise(8, 3, 5, 5)
    parts = [plain(part) for part in x.chunk(2)]
    assert rel(cut(x), torch.cat(parts)) < 1e-12
    assert rel(cut(x), plain(x)) > 1e-3


@pytest.mark.parametrize("name", ["efficientnet_b0", "mobilenetv3_small_100"])
def test_networks_of_timm(name):
    """In one group they are what they were, bit for bit; their BatchNorm also has an activation,
    and cannot be cut into groups without losing it."""
    pytest.importorskip("timm")
    model = MoCo(partial(encoders.build, f"timm:{name}"), queue_size=2)
    untouched = encoders.build(f"timm:{name}")
    untouched.load_state_dict(model.encoder_q.encoder.state_dict())
    assert split_batchnorm(model, 1) is model
    for branch in (model.encoder_q, model.encoder_k):
        for step in range(2):
            images = noise(4, 3, 64, 64, seed=step, dtype=torch.float32)
            outputs = []
            for network in (branch.encoder.train(), untouched.train()):
                torch.manual_seed(step)  # of dropout and stochastic depth
                outputs.append(network(images))
            assert torch.equal(*outputs) and outputs[0].std() > 0
        untouched.load_state_dict(model.encoder_k.encoder.state_dict())
    with pytest.raises(ValueError, match="a BatchNormAct2d that is no plain BatchNorm"):
        split_batchnorm(model, 2)


@pytest.mark.parametrize(
    "odd", [{"affine": False}, {"track_running_stats": False}, {"momentum": None}]
)
def test_batchnorm_that_cannot_be_cut(odd):
    with pytest.raises(ValueError, match="1: a BatchNorm2d that is no plain BatchNorm"):
        split_batchnorm(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(2, **odd)), 2)


def test_a_frozen_batchnorm_stays_frozen():
    cut = split_batchnorm(nn.Sequential(nn.BatchNorm2d(2).eval(), nn.BatchNorm2d(2)), 2)
    assert [layer.training for layer in cut] == [False, True]


def test_evaluation_is_plain_batchnorm():
    model, plain = tiny(groups=4), tiny(groups=1)
    model.encoder_q(noise(8, 3, 5, 5))
    plain.load_state_dict(model.state_dict())
    x = noise(5, 3, 5, 5, seed=1)
    assert torch.equal(model.eval().encoder_q(x)[0], plain.eval().encoder_q(x)[0])


# ---- the shuffle ---------------------------------------------------------------------------------


class Flat(nn.Module):
    num_features = 6

    def forward(self, images):
        return images.flatten(1)


def test_keys_come_back_in_order():
    model = MoCo(Flat, queue_size=10).double()
    for branch in (model.encoder_q, model.encoder_k):
        branch.head = nn.Sequential()
    images = noise(9, 6, 1, 1)
    for step in range(5):
        keys = model.encode_keys(images, permutation(1, 9, step, 0))
        assert torch.equal(keys, F.normalize(images.flatten(1), dim=1))


def test_groups_of_the_shuffled_keys_are_slices_of_the_permutation():
    model, plain = tiny(groups=2), tiny(groups=1)
    images, order = noise(8, 3, 5, 5), torch.tensor([3, 1, 6, 0, 7, 2, 5, 4])
    keys = model.encode_keys(images, order)
    for part in order.chunk(2):
        assert rel(keys[part], plain.encoder_k(images[part])[0]) < 1e-12


def test_permutation_of_a_step():
    """Another one for every seed, step and direction."""
    wanted = [(1, 0, 0), (1, 0, 1), (1, 1, 0), (1, 1, 1), (2, 0, 0)]
    drawn = [permutation(seed, 64, step, direction) for seed, step, direction in wanted]
    assert all(sorted(p.tolist()) == list(range(64)) for p in drawn)
    assert len({tuple(p.tolist()) for p in drawn}) == 5
    assert torch.equal(drawn[0], permutation(1, 64, 0, 0))


class Leak(nn.Module):
    """An encoder whose output is the statistics of its BatchNorm group, and nothing else.

    Every image has a pixel that is 0 in all images: after BatchNorm it shows the group's mean and
    deviation.
    """

    num_features = 16

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(16)

    def forward(self, images):
        return self.bn(images)[:, :, 0, 0]


def accuracy_of_the_leak(groups, shuffle, steps=24, batch=64):
    """Contrastive accuracy of `Leak` once the queue is full of keys."""
    torch.manual_seed(0)
    model = MoCo(Leak, dim=16, queue_size=8 * batch)
    for branch in (model.encoder_q, model.encoder_k):
        branch.head = nn.Sequential()
    split_batchnorm(model, groups)
    hits = []
    for step in range(steps):
        images = noise(batch, 16, 1, 2, seed=step, dtype=torch.float32)
        images[..., 0] = 0
        (q,) = model.encoder_q(images)
        k = model.encode_keys(images, shuffle(1, batch, step, 0))
        _, logits = info_nce(q, local_shard(k), model.queue, 0.1)
        model.dequeue_and_enqueue(k)
        if step >= 8:
            hits.append(contrastive_top1(logits).item())
    return sum(hits) / len(hits)


def no_shuffle(seed, size, step, direction):
    return torch.arange(size)


def test_without_the_shuffle_batch_statistics_give_the_answer_away():
    assert accuracy_of_the_leak(8, no_shuffle) > 0.98


def test_with_the_shuffle_they_do_not():
    """By pretrain's own permutation; were that the identity, the accuracy would be 1."""
    assert accuracy_of_the_leak(8, permutation) < 0.15


def test_one_group_of_all_images_is_no_substitute():
    """As SyncBatchNorm would be: then the shuffle has nothing to hide."""
    assert accuracy_of_the_leak(1, permutation) > 0.98


# ---- processes -----------------------------------------------------------------------------------


def keys_on(rank, world, groups, state, images, order):
    """A forward of each network on this process's share; keys, queue and statistics after it."""
    model = tiny(groups=groups // world)
    model.load_state_dict(state)
    mine = images.chunk(world)[rank]
    (q,) = model.encoder_q(mine)
    keys = model.encode_keys(mine, order)
    model.dequeue_and_enqueue(keys)
    model.average_statistics()
    return q.detach(), local_shard(keys), model.state_dict()


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_are_groups(world):
    """G groups on one process are G / R on each of R: queries, keys, queue, statistics."""
    state = deepcopy(tiny().state_dict())
    args = (4, state, noise(16, 3, 5, 5), permutation(1, 16, 3, 0))
    q, k, after = keys_on(0, 1, *args)
    results = run_processes(keys_on, world, *args)
    assert rel(torch.cat([r[0] for r in results]), q) < 1e-12
    assert rel(torch.cat([r[1] for r in results]), k) < 1e-12
    for _, _, theirs in results:
        assert set(theirs) == set(after)
        for key, value in after.items():
            assert rel(theirs[key], value) < 1e-12, key


def without_batchnorm(rank, world):
    """A step's key side on this process, of an encoder without any BatchNorm."""
    model = MoCo(Flat, dim=2, queue_size=4)
    model.average_statistics()
    return model.encode_keys(torch.ones(2, 3, 1, 2), torch.arange(4)).shape


def test_processes_without_batchnorm():
    assert run_processes(without_batchnorm, 2) == [(4, 2), (4, 2)]


def test_the_two_networks_must_not_share_their_encoder():
    encoder = Flat()
    with pytest.raises(ValueError, match="another encoder at each call"):
        MoCo(lambda: encoder, dim=2, queue_size=4)
