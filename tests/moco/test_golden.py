"""The loops of moco/pretrain.py against recorded runs of the official code and of its notebook."""

import ast
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from common import encoders
from moco.config import CIFAR10, CIFAR10_SYMMETRIC, MOCO_V1, MOCO_V2
from moco.loss import info_nce
from moco.model import MoCo, SplitBatchNorm, from_official
from moco.optim import lr_at
from tests.golden.det_formula import det, image
from tests.helpers import golden, rel, run_processes
from tests.moco.harness import Tiny, play

RECIPE = {"v1": MOCO_V1, "v2": MOCO_V2}


# ---- Eq. 1 and the queue -------------------------------------------------------------------------


def nce_cases():
    return sorted({key.split("/")[1] for key in golden("moco") if key.startswith("nce/")})


def empty(dim, size, dtype=torch.float32):
    """A MoCo whose queue is what is tested."""
    return MoCo(Tiny, dim=dim, queue_size=size).to(dtype)


@pytest.mark.parametrize("case", nce_cases())
@pytest.mark.parametrize(
    "suffix, dtype, tolerance", [("", "float32", 1e-5), ("_f64", "float64", 1e-10)]
)
def test_info_nce_and_enqueue(case, suffix, dtype, tolerance):
    data = {k.split("/")[2]: v for k, v in golden("moco").items() if k.startswith(f"nce/{case}/")}
    dtype = getattr(torch, dtype)
    q_raw, k_raw, queue = (torch.tensor(data[k]).to(dtype) for k in ("q_raw", "k_raw", "queue"))
    q_raw.requires_grad_()
    q, k = F.normalize(q_raw, dim=1), F.normalize(k_raw, dim=1)
    q.retain_grad()
    loss, logits = info_nce(q, k, queue, float(data["T"]))
    loss.backward()
    assert abs(loss.item() - data[f"loss{suffix}"]) <= tolerance * data[f"loss{suffix}"]
    assert rel(logits, data[f"logits{suffix}"]) <= tolerance
    assert rel(q.grad, data[f"grad_q_normalized{suffix}"]) <= tolerance
    assert rel(q_raw.grad, data[f"grad_q_raw{suffix}"]) <= tolerance

    network = empty(*queue.shape, dtype)
    network.queue.copy_(queue)
    network.dequeue_and_enqueue(k)
    assert rel(network.queue, data["queue_after"]) <= 1e-6
    assert network.queue_ptr.tolist() == data["ptr_after"].tolist()
    assert network.queue_fill.item() == len(k)


def test_number_of_nce_cases():
    assert len(nce_cases()) >= 4


def test_queue_content_and_pointer():
    data = golden("moco")
    network = empty(*data["queue/init"].shape)
    network.queue.copy_(torch.tensor(data["queue/init"]))
    for n, keys in enumerate(data["queue/keys"]):
        network.dequeue_and_enqueue(torch.tensor(keys))
        assert np.array_equal(network.queue.numpy(), data["queue/content_after"][n])
        assert network.queue_ptr.item() == data["queue/ptr_after"][n]
    assert n + 1 == 7


def test_queue_starts_as_unit_columns():
    assert rel(empty(128, 512).queue.norm(dim=0), np.ones(512)) < 1e-6


# ---- learning rates ------------------------------------------------------------------------------


def test_learning_rates():
    data, compared = golden("moco"), 0
    names = sorted({key.split("/")[1] for key in data if key.startswith("lr/")})
    for name in names:
        said = ast.literal_eval(str(data[f"lr/{name}/settings"][0]))
        cfg = replace(
            MOCO_V1,
            base_lr=said["lr"],
            schedule="cosine" if said["cos"] else "step",
            milestones=tuple(said["schedule"]),
            epochs=said["epochs"],
        )
        for epoch, theirs in enumerate(data[f"lr/{name}"]):
            for step in (3 * epoch, 3 * epoch + 2):  # an epoch of 3 batches and a remainder
                assert abs(lr_at(step, cfg, 3 * 256 + 100) - theirs) <= 1e-6 * said["lr"]
                compared += 1
    assert len(names) >= 4 and compared > 2000


def test_learning_rate_of_the_recipes():
    data = golden("moco")
    for cfg, key in ((MOCO_V1, "lr/v1_step"), (MOCO_V2, "lr/v2_cos")):
        steps = 1_281_167 // 256
        ours = [lr_at(epoch * steps, cfg, 1_281_167) for epoch in range(201)]
        assert rel(ours, data[key]) < 1e-6
    ours = [lr_at(epoch * 97, CIFAR10, 50_000) for epoch in range(200)]
    assert rel(ours, golden("moco_colab")["lr/epoch1_to_200"]) < 1e-6
    assert ours[-1] < 1e-9


# ---- five steps of the official train() ----------------------------------------------------------


def official(data, prefix, index):
    """The state before or after a step, under our names."""
    start = f"{prefix}state/"
    state = {k.removeprefix(start): v[index] for k, v in data.items() if k.startswith(start)}
    return from_official({k: torch.as_tensor(np.array(v)) for k, v in state.items()})


def trajectories():
    return sorted({key.split("/")[1] for key in golden("moco") if key.startswith("traj/v")})


def started(cfg, state):
    """A tiny network of the sizes of `cfg` with the weights `state`."""
    network = MoCo(Tiny, cfg.head, cfg.dim, cfg.queue_size)
    network.load_state_dict(state)
    return network


def settings(base, said, batch):
    """`base` with what the recording says of itself."""
    return replace(
        base,
        temperature=float(said["T"]),
        dim=int(said["dim"]),
        queue_size=int(said["K"]),
        key_momentum=float(said["m"]),
        batch_size=batch,
        base_lr=float(said["lr"]) * 256 / batch,
        schedule="step",
        momentum=float(said["momentum"]),
        weight_decay=float(said["wd"]),
    )


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.float64, 1e-9)])
@pytest.mark.parametrize("version", trajectories())
def test_trajectory(version, dtype, tolerance):
    data, prefix = golden("moco"), f"traj/{version}/"
    said = dict(item.split("=") for item in data[f"{prefix}settings"])
    cfg = replace(settings(RECIPE[version], said, int(said["batch"])), bn_splits=1)
    network = started(cfg, official(data, prefix, 0))
    shuffles = data[f"{prefix}randperm"][:, None]
    seen = play(cfg, network, data["traj/images"], shuffles, count=20, dtype=dtype)
    suffix = "_f64" if dtype == torch.float64 else ""
    assert rel(seen.losses, data[f"{prefix}loss{suffix}"]) <= tolerance
    assert rel(torch.stack(seen.logits), data[f"{prefix}logits{suffix}"]) <= tolerance
    if dtype == torch.float64:
        start = f"{prefix}state_f64/"
        final = {k.removeprefix(start): v[-1] for k, v in data.items() if k.startswith(start)}
        final = from_official({k: torch.as_tensor(np.array(v)) for k, v in final.items()})
        pairs = [(seen.states[-1], final)]
    else:
        pairs = [(seen.states[i], official(data, prefix, i)) for i in range(6)]
    for i, (ours, theirs) in enumerate(pairs):
        assert set(ours) == set(theirs)
        for key in theirs.keys() - {"queue_fill"}:
            assert rel(ours[key], theirs[key]) <= tolerance, (i, key)


def test_number_of_trajectories():
    assert len(trajectories()) >= 1


# ---- two real processes --------------------------------------------------------------------------


def ddp2(rank, world):
    data = golden("moco_ddp2")
    said = dict(item.split("=") for item in data["settings"])

    def broadcast(network):
        """What DistributedDataParallel does to the official MoCo at every forward."""
        for buffer in network.buffers():
            dist.broadcast(buffer, 0)

    # Accelerate wants to see these although the processes are linked already
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1", LOCAL_WORLD_SIZE=str(world))
    MoCo.average_statistics = lambda network: None
    cfg = replace(settings(MOCO_V2, said, 8), bn_splits=2)
    network = started(cfg, official(data, "rank0/", 0))
    views = data[f"rank{rank}/images"]
    seen = play(cfg, network, views, data["randperm"][:, None], 40, after_step=broadcast)
    return seen.states, seen.losses, torch.stack(seen.logits)


def test_two_processes():
    data, compared = golden("moco_ddp2"), 0
    for rank, (states, losses, logits) in enumerate(run_processes(ddp2, 2)):
        assert rel(losses, data[f"rank{rank}/loss"]) <= 2e-5
        assert rel(logits, data[f"rank{rank}/logits"]) <= 2e-5
        for i in range(6):
            theirs = official(data, "rank0/", i) | official(data, f"rank{rank}/", i)
            assert set(states[i]) == set(theirs)
            for key in theirs.keys() - {"queue_fill"}:
                assert rel(states[i][key], theirs[key]) <= 2e-5, (rank, i, key)
                compared += 1
    assert compared == 2 * 6 * 22


# ---- the notebook --------------------------------------------------------------------------------


def contiguous(batch, groups):
    """(B,) the order in which the notebook's strided groups are contiguous."""
    return torch.arange(batch).view(-1, groups).T.reshape(-1)


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_split_batchnorm(groups):
    data = {k: torch.tensor(v) for k, v in golden("moco_colab").items() if k.startswith("sbn/")}
    bn = SplitBatchNorm(3)
    bn.groups = groups
    bn.weight.data.copy_(data["sbn/weight"])
    bn.bias.data.copy_(data["sbn/bias"])
    order = contiguous(8, groups)
    back = order.argsort()
    x = data["sbn/x"].clone().requires_grad_()
    y = bn(x[order])[back]
    (y * data["sbn/cot"]).sum().backward()
    theirs = {k.split("/")[2]: v for k, v in data.items() if k.startswith(f"sbn/splits{groups}/")}
    assert rel(y, theirs["y_train"]) < 1e-5
    assert rel(x.grad, theirs["grad_x"]) < 1e-5
    assert rel(bn.weight.grad, theirs["grad_w"]) < 1e-5
    assert rel(bn.bias.grad, theirs["grad_b"]) < 1e-5
    assert rel(bn.running_mean, theirs["running_mean"]) < 1e-5
    assert rel(bn.running_var, theirs["running_var"]) < 1e-5
    assert rel(bn.eval()(x), theirs["y_eval"]) < 1e-5


def colab_name(name):
    """The notebook's `encoder_q.net.3.0.conv1.weight` is main_moco's `encoder_q.layer1.0...`."""
    names = {"0": "conv1", "1": "bn1", "9": "fc"} | {str(i + 2): f"layer{i}" for i in range(1, 5)}
    branch, net, index, rest = name.split(".", 3)
    assert net == "net"
    return f"{branch}.{names[index]}.{rest}"


def colab_network():
    network = MoCo(lambda: encoders.build("resnet18-cifar"), dim=16, queue_size=32)
    listed = golden("moco_colab")["train/state_dict_keys"]
    names = [str(line).split()[0] for line in listed if ".net." in line]
    state, own_state = {}, network.state_dict()
    for name in names:
        key = next(iter(from_official({colab_name(name): None})))
        shape = tuple(own_state[key].shape)
        parameter = name.split(".", 1)[1]
        if "running" in name or "num_batches" in name:
            continue
        x = det(f"colab/{parameter}", shape)
        if name.endswith("bias"):
            x = 0.1 * x
        elif len(shape) == 1:
            x = 1 + 0.1 * x
        else:
            x = x * np.sqrt(1 / np.prod(shape[1:]))
        state[key] = torch.tensor(x.astype(np.float32))
    missing = set(own_state) - set(state)
    assert len(state) == 2 * 62 and all(
        "running" in k or "num_" in k or "queue" in k for k in missing
    )
    network.load_state_dict(state, strict=False)
    queue = det("colab/queue", (16, 32))
    network.queue.copy_(torch.tensor(queue / np.linalg.norm(queue, axis=0)))
    return network


def colab_runs():
    return sorted(
        {k.split("/")[1] for k in golden("moco_colab") if k.endswith("/loss") and "train/" in k}
    )


@pytest.mark.parametrize("name", colab_runs())
def test_notebook_training(name):
    data, prefix = golden("moco_colab"), f"train/{name}/"
    groups = int(name[-1])
    cfg = replace(
        CIFAR10_SYMMETRIC if name.startswith("sym") else CIFAR10,
        dim=16,
        queue_size=32,
        batch_size=8,
        bn_splits=groups,
        base_lr=0.06 * 256 / 8,
    )
    order = contiguous(8, groups)
    back = order.argsort()
    views = np.stack(
        [[[image(f"colab/s{s}/v{v}/{j}", 32, 32) for j in order] for v in (0, 1)] for s in range(3)]
    ).transpose(0, 1, 2, 5, 3, 4)
    theirs = torch.tensor(data[f"{prefix}randperm"]).view(3, -1, 8)
    shuffles = back[theirs[:, :, order]]  # the same images in a group, in our order
    seen = play(cfg, colab_network(), views, shuffles, count=24, dtype=torch.float64)
    losses = np.array(seen.losses)
    f64 = f"{prefix}state_f64/" if f"{prefix}state_f64/queue" in data else None
    if f64:
        assert rel(losses, data[f"{prefix}loss_f64"]) <= 1e-6
    for ours, given, tolerance in zip(
        losses, data[f"{prefix}loss"], (5e-6, 1e-4, 5e-3), strict=True
    ):
        assert abs(ours - given) <= tolerance * given
    assert rel(seen.rates, [0.0599963] * 3) < 1e-6
    compared = 0
    start = f64 or f"{prefix}state/"
    tolerance = 1e-5 if f64 else 1e-2  # the recorded states are float32
    for key in (k for k in data if k.startswith(start)):
        name = key.removeprefix(start)
        if name in ("lr",) or name.endswith("num_batches_tracked"):
            continue  # the notebook's split BatchNorm does not count its batches
        for step, value in enumerate(data[key]):
            state = seen.states[step]
            if name == "queue":
                ours = state["queue"].unflatten(1, (-1, 8))[:, :, back].flatten(1)
                ours = torch.where(state["queue_fill"] > torch.arange(32), ours, state["queue"])
            elif name == "queue_ptr":
                ours = state["queue_ptr"]
            else:
                key_ = next(iter(from_official({colab_name(name): None})))
                full = state[key_].double().flatten()
                if full.numel() <= 64:
                    ours = full.view(value.shape)
                else:
                    ours = torch.cat([torch.stack([full.norm(), full.mean()]), full[:4]])
            assert rel(ours, value) <= tolerance, (name, step)
            compared += 1
    assert compared >= 4 * 20


def test_number_of_notebook_runs():
    assert len(colab_runs()) >= 2
