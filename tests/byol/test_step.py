"""Five updates of the official BYOL on a small ResNet: loss, online and target after each, and the
classifier that the official code trains beside them (`--online-linear`).

The network is rebuilt here (Haiku pads as TensorFlow's "SAME" does); heads, target, loss,
optimiser, schedules, moving average and the loop that joins them are byol's:
`byol.pretrain.train`.
"""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torchvision.transforms import v2

from byol.config import Config
from byol.model import Online, mlp
from byol.optim import lr_at, tau_at, total_steps
from byol.pretrain import classifier_lars
from eval.online import FirstView, update
from tests.byol.harness import play
from tests.golden.det_formula import image, weight
from tests.helpers import golden, rel, run_processes

STEPS, BATCH, SIZE = 5, 8, 24
COUNT = 20 * BATCH  # 20 steps in all, of which 2 warm up
SETTINGS = replace(
    Config(),
    batch_size=BATCH,
    epochs=1,
    warmup_epochs=0.1,
    base_lr=64.0,
    weight_decay=1.5e-6,
    tau_base=0.9,
)
LOSS_F64, NORM_F64 = 3e-8, 1e-7  # measured: 3e-9 and 2e-8, both after the fifth update
VALUES = {0: 1e-6, 1: 2e-4, 2: 4e-4, 3: 1e-5, 4: 4e-4}  # 5 to 10 times measured; float32 drifts
BEFORE_NORM = ("projector/linear/b", "predictor/linear/b")  # their gradients are rounding noise


# ---- the official network ------------------------------------------------------------------------


def padding(size, kernel, stride):
    """ "SAME": (before, after) so that the result has ceil(size / stride) pixels."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def same(x, kernel, stride, value=0.0):
    height, width = x.shape[-2:]
    pads = (*padding(width, kernel, stride), *padding(height, kernel, stride))
    return F.pad(x, pads, value=value)


class Conv(nn.Conv2d):
    def __init__(self, before, width, kernel, stride):
        super().__init__(before, width, kernel, stride, bias=False)

    def forward(self, x):
        return super().forward(same(x, self.kernel_size[0], self.stride[0]))


class Block(nn.Module):
    def __init__(self, before, width, stride):
        super().__init__()
        self.conv_0, self.batchnorm_0 = Conv(before, width, 3, stride), nn.BatchNorm2d(width)
        self.conv_1, self.batchnorm_1 = Conv(width, width, 3, 1), nn.BatchNorm2d(width)
        self.shortcut_conv = Conv(before, width, 1, stride)
        self.shortcut_batchnorm = nn.BatchNorm2d(width)

    def forward(self, x):
        y = self.batchnorm_0(self.conv_0(x)).relu()
        return (
            self.batchnorm_1(self.conv_1(y)) + self.shortcut_batchnorm(self.shortcut_conv(x))
        ).relu()


class TinyResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_features = 8
        self.initial_conv, self.initial_batchnorm = Conv(3, 64, 7, 2), nn.BatchNorm2d(64)
        for i, (before, stride) in enumerate([(64, 1), (8, 2), (8, 2), (8, 2)]):
            setattr(self, f"block_group_{i}", Block(before, 8, stride))

    def forward(self, x):
        x = self.initial_batchnorm(self.initial_conv(x)).relu()
        x = F.max_pool2d(same(x, 3, 2, -torch.inf), 3, 2)
        for i in range(4):
            x = getattr(self, f"block_group_{i}")(x)
        return x.mean((2, 3))


@pytest.mark.parametrize(
    "size, kernel, stride, pads",
    [(224, 7, 2, (2, 3)), (112, 3, 2, (0, 1)), (14, 3, 2, (0, 1)), (225, 7, 2, (3, 3)),
     (113, 3, 2, (1, 1)), (32, 3, 1, (1, 1))],
)  # fmt: skip
def test_stated_paddings(size, kernel, stride, pads):
    assert padding(size, kernel, stride) == pads


# ---- its weights and images ----------------------------------------------------------------------

OURS = {"w": "weight", "b": "bias", "scale": "weight", "offset": "bias"}
KINDS = {"w": "kernel", "b": "bias", "scale": "gamma", "offset": "beta"}
HEADS = {"linear": 0, "batch_norm": 1, "linear_1": 3}


def ours_of(network, name):
    """Our parameter of an official name."""
    *path, last = name.replace("/~/", "/").replace("block_0/", "").split("/")
    module = network
    if path[0] in ("projector", "predictor"):
        module = getattr(network, path[0])[HEADS[path[1]]]
    else:
        for part in path[1:]:
            module = getattr(module if module is not network else network.encoder, part)
    return getattr(module, OURS[last])


def official_layout(parameter, name):
    """(in, out) and (h, w, in, out) there; gains and shifts are compared flat."""
    if not name.endswith("/w"):
        return parameter.detach().flatten()
    axes = (1, 0) if parameter.ndim == 2 else (2, 3, 1, 0)
    return parameter.detach().permute(axes)


def official_names():
    """Recorded as `module/name [shape]`, in the order of the recorded norms."""
    return [str(name).split()[0] for name in golden("byol_step")["param_names"]]


def names(network):
    """Official names of a network's parameters, none of them left out."""
    every = official_names()
    parts = dict(network.named_children())
    mine = [n for n in every if n.split("/")[0].replace("tiny_res_net", "encoder") in parts]
    assert len(mine) == len(list(network.parameters()))
    return mine


@torch.no_grad()
def set_weights(network, prefix):
    for name in names(network):
        parameter = ours_of(network, name)
        shape = official_layout(parameter, name).shape
        if name.endswith(("scale", "offset")):
            shape = (1,) * (1 if "batch_norm/" in name else 3) + tuple(shape)
        values = torch.tensor(weight(f"{prefix}/{name}", shape, KINDS[name.rpartition("/")[2]]))
        if name.endswith("/w"):
            values = values.permute((1, 0) if values.ndim == 2 else (3, 2, 0, 1))
        parameter.copy_(values.reshape(parameter.shape))


def views(step):
    normalize = v2.Normalize(Config().mean, Config().std)
    for v in (1, 2):
        every = [image(f"byol/step{step}/v{v}/{j}", SIZE, SIZE) for j in range(BATCH)]
        yield normalize(torch.tensor(np.stack(every)).permute(0, 3, 1, 2).double())


# ---- the updates ---------------------------------------------------------------------------------


def trajectory(rank, world, dtype):
    """Five updates on this process's share of each batch, recorded after each."""
    # Accelerate wants to see these although the processes are linked already
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1", LOCAL_WORLD_SIZE=str(world))
    network = Online(TinyResNet())
    network.projector, network.predictor = mlp(8, 12, 6), mlp(6, 10, 6)
    seen = {"online": [], "target": [], "momentum": [], "classifier": [], "top1": []}
    linear = nn.Linear(8, 7, dtype=dtype)
    linear_lars = classifier_lars(SETTINGS, linear)
    labels = torch.tensor(golden("byol_step")["labels"]).long().chunk(world, dim=1)[rank]
    caught = []

    def start(online, target):
        set_weights(online, "byol/w")
        set_weights(target, "byol/wt")
        with torch.no_grad():
            linear.weight.copy_(torch.tensor(weight("byol/w/classifier/w", (8, 7), "kernel")).T)
            linear.bias.copy_(torch.tensor(weight("byol/w/classifier/b", (7,), "bias")))
        caught.append(FirstView(online, online.projector, BATCH // world))

    def train_classifier(step):
        for group in linear_lars.param_groups:
            group["lr"] = lr_at(step, SETTINGS, COUNT)
        batch = caught[0].take(), labels[step]
        seen["top1"].append(update(linear, linear_lars, *batch, Accelerator(cpu=True)).item())

    def observe(online, target, optimizer):
        if seen["online"]:  # else nothing has been trained yet
            train_classifier(len(seen["online"]) - 1)
        slot = linear_lars.state[linear.weight].get("v", torch.zeros(1))
        three = (linear.weight.T, linear.bias, slot)
        seen["classifier"].append([value.detach().clone() for value in three])
        slots = {p: state["v"] for p, state in optimizer.state.items()}
        zero = torch.zeros(1)
        for key, module, value in (
            ("online", online, lambda p: p),
            ("target", target, lambda p: p),
            ("momentum", online, lambda p: slots.get(p, zero.expand_as(p))),
        ):
            seen[key].append(
                {n: official_layout(value(ours_of(module, n)), n).clone() for n in names(module)}
            )

    mine = [[view.to(dtype).chunk(world)[rank] for view in views(step)] for step in range(STEPS)]
    record = play(SETTINGS, COUNT, network.to(dtype), start, enumerate(mine), observe)
    return seen | {"loss": record.losses, "rates": record.rates}


@pytest.fixture(scope="module")
def runs():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", os.environ.copy())
        alone = {dtype: trajectory(0, 1, dtype) for dtype in (torch.float32, torch.float64)}
    return alone | {"two processes": run_processes(trajectory, 2, torch.float64)}


def test_settings_are_the_recorded_ones():
    logs = {
        k.rpartition("/")[2]: v
        for k, v in golden("byol_step").items()
        if k.startswith("dev1_f64/logs")
    }
    assert total_steps(SETTINGS, COUNT) == 20
    for step in range(STEPS):
        assert lr_at(step, SETTINGS, COUNT) == pytest.approx(logs["learning_rate"][step], rel=1e-7)
        assert tau_at(step, SETTINGS, COUNT) == pytest.approx(logs["tau"][step], rel=1e-12)


@pytest.mark.parametrize("processes", [1, 2])
def test_the_optimiser_has_the_recorded_rates(runs, processes):
    """Of every group, at every step."""
    theirs = golden("byol_step")["dev1_f64/logs/learning_rate"]
    for run in [runs[torch.float64]] if processes == 1 else runs["two processes"]:
        assert rel(run["rates"], np.stack([theirs[:STEPS]] * 4, axis=1)) < 1e-7


def norms(recorded, network_names):
    """(names, 1 + STEPS) norms of what `trajectory` recorded."""
    return torch.tensor([[after[n].double().norm() for after in recorded] for n in network_names])


@pytest.mark.parametrize("processes", [1, 2])
def test_double_precision(runs, processes):
    """The official run with jax's x64, but for its learning rates, which are float32."""
    data = golden("byol_step")
    every = [runs[torch.float64]] if processes == 1 else runs["two processes"]
    loss = torch.stack([torch.stack(run["loss"]) for run in every]).mean(0)
    assert rel(loss, data["dev1_f64/logs/repr_loss"]) < LOSS_F64
    order = {name: i for i, name in enumerate(official_names())}
    compared = 0
    for run in every:
        for key in ("online", "target", "momentum"):
            mine = [n for n in run[key][0] if n not in BEFORE_NORM]
            theirs = data[f"dev1_f64/norms_{key}"][[order[n] for n in mine]]
            ours = norms(run[key], mine)
            for name, a, b in zip(mine, ours, theirs, strict=True):
                assert rel(a, b) < NORM_F64, (key, name)
                compared += 1
    assert compared == processes * (47 + 43 + 47)


@pytest.mark.parametrize("processes", [1, 2])
def test_the_classifier(runs, processes):
    """Weights, bias and momentum after every update, and its Top-1 on view 1 of every batch."""
    data, order = golden("byol_step"), official_names()
    w, b = order.index("classifier/w"), order.index("classifier/b")
    kinds = (("online", w), ("online", b), ("momentum", w))
    theirs = np.stack([data[f"dev1_f64/norms_{kind}"][row] for kind, row in kinds])
    for run in [runs[torch.float64]] if processes == 1 else runs["two processes"]:
        ours = torch.tensor([[t.norm() for t in after] for after in run["classifier"]]).T
        for one, other in zip(ours, theirs, strict=True):
            assert rel(one, other) < NORM_F64
        assert rel(run["top1"], 100 * data["dev1_f64/logs/top1_accuracy"]) < 1e-12
        for i, name in enumerate(("online/classifier/w", "online/classifier/b")):
            for theirs_after, moment in zip(data[f"dev1/{name}"], (0, 1, 2, 5), strict=True):
                far = rel(run["classifier"][moment][i], theirs_after)
                assert far < (1e-3 if moment == 5 else 1e-5), (name, moment)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_single_precision(runs, dtype):
    """The recorded float32 run: losses within five times its own distance from float64."""
    data = golden("byol_step")
    tolerance = 5 * np.array([2e-6, 1e-5, 7e-5, 4e-4, 6e-4])  # tests/golden/README.md
    ours = torch.stack(runs[dtype]["loss"]).double().numpy()
    assert (np.abs(ours - data["dev1/logs/repr_loss"]) < tolerance).all()


def test_values_before_and_after(runs):
    """Element by element: before, and after the first updates, of the recorded float32 run."""
    data, compared = golden("byol_step"), 0
    for key in ("online", "target", "momentum"):
        for name in runs[torch.float64][key][0]:
            if name in BEFORE_NORM:
                continue
            after = [run[name] for run in runs[torch.float64][key]]
            for stored, moments in ((name, (0, 1, 2, 5)), (f"{name}/first64", range(6))):
                if f"dev1/{key}/{stored}" not in data:
                    continue
                for theirs, moment in zip(data[f"dev1/{key}/{stored}"], moments, strict=True):
                    if moment not in VALUES:  # the float32 run is off by 1e-2 there; see the norms
                        continue
                    ours = after[moment].flatten()[: theirs.size]
                    scale = max(np.abs(theirs).max(), 1e-30)
                    far = np.abs(ours.numpy() - theirs.flatten()).max() / scale
                    assert far < VALUES[moment] or (scale < 1e-20), (key, stored, moment)
                compared += 1
    assert compared == 47 + 43 + 2


def test_the_target_follows_after_the_step(runs):
    """target == tau * old target + (1 - tau) * online after the step."""
    run = runs[torch.float64]
    for step in range(STEPS):
        tau = tau_at(step, SETTINGS, COUNT)
        for name, old in run["target"][step].items():
            expected = tau * old + (1 - tau) * run["online"][step + 1][name]
            torch.testing.assert_close(
                run["target"][step + 1][name], expected, rtol=1e-13, atol=1e-15
            )


def test_two_processes_are_one(runs):
    for run in runs["two processes"]:
        for key in ("online", "target", "momentum"):
            for name, theirs in runs[torch.float64][key][-1].items():
                if name not in BEFORE_NORM:
                    assert rel(run[key][-1][name], theirs) < 1e-10, (key, name)
