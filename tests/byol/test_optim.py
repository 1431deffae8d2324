"""LARS, its groups, the learning rate and tau against the paper, the official code, arithmetic."""

import ast
import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from byol.config import (
    DEMO,
    IMAGENET_100,
    IMAGENET_1000,
    IMAGENET_B512,
    IMAGENETTE,
    RECIPES,
    Config,
)
from byol.model import Online, group_norm_weight_standardised
from byol.optim import ETA, LARS, lars, lr_at, parameter_groups, tau_at, total_steps
from common import encoders
from tests.helpers import golden, rel

IMAGENET = 1_281_167  # training images

# ---- LARS ----------------------------------------------------------------------------------------

RUNS = {  # weight decay, momentum, eta
    "wd1.5em6": (1.5e-6, 0.9, 0.001),
    "wd1em4": (1e-4, 0.9, 0.001),
    "wd0_eta002_m095": (0.0, 0.95, 0.002),
}
PARAMETERS = [k.removeprefix("lars/init/") for k in golden("byol_basic") if "lars/init/" in k]
PRESENT = [run for run in RUNS if any(k.startswith(f"lars/{run}/") for k in golden("byol_basic"))]


def run_lars(run, dtype):
    """{parameter: its value after each recorded step}, and the buffers at the end."""
    data = golden("byol_basic")
    decay, momentum, eta = RUNS[run]
    params = {
        p: nn.Parameter(torch.tensor(data[f"lars/init/{p}"], dtype=dtype)) for p in PARAMETERS
    }
    flags = {p: bool(data[f"lars/adapted_and_decayed/{p}"]) for p in PARAMETERS}
    groups = [
        {
            "params": [params[p] for p in PARAMETERS if flags[p] == flag],
            "weight_decay": decay if flag else 0.0,
            "lars_adaptation": flag,
        }
        for flag in (True, False)
    ]
    optimizer = LARS(groups, momentum, eta)
    values = {p: [] for p in PARAMETERS}
    for step, lr in enumerate(data["lars/lr"]):
        for p, param in params.items():
            param.grad = torch.tensor(data[f"lars/grad/{p}"][step], dtype=dtype)
        for group in optimizer.param_groups:
            group["lr"] = float(lr)
        optimizer.step()
        for p, param in params.items():
            values[p].append(param.detach().clone())
    buffers = {p: optimizer.state[param]["v"] for p, param in params.items()}
    return {p: torch.stack(v) for p, v in values.items()}, buffers


@pytest.mark.parametrize("run", PRESENT)
def test_golden(run):
    """Twelve steps of the official optimiser, its exclusions as recorded."""
    data = golden("byol_basic")
    values, buffers = run_lars(run, torch.float32)
    compared = slots = 0
    for p in PARAMETERS:
        assert rel(values[p], data[f"lars/{run}/{p}"]) < 3e-6, p
        compared += 1
        if f"lars/{run}/{p}/momentum_final" in data:
            assert rel(buffers[p], data[f"lars/{run}/{p}/momentum_final"]) < 3e-6, p
            slots += 1
    assert compared >= 14 and slots == (compared if run == "wd1.5em6" else 0)


def test_golden_in_double_precision():
    data, ran = golden("byol_basic"), 0
    values, _ = run_lars("wd1.5em6", torch.float64)
    for p in PARAMETERS:
        assert rel(values[p][-1], data[f"lars/wd1.5em6_f64/{p}"]) < 1e-8, p
        ran += 1
    assert ran >= 14


def test_golden_runs_are_there():
    assert len(PRESENT) >= 2


def scalar_lars(w, grads, rates, decay, lars_adaptation, momentum=0.9, eta=0.001):
    """optimizers.py:84-188 over Python floats: decay, trust, momentum, and then the rate."""
    v = [0.0] * len(w)
    for grad, lr in zip(grads, rates, strict=True):
        g = [gi + decay * wi for gi, wi in zip(grad, w, strict=True)]
        trust = 1.0
        if lars_adaptation:
            w_norm, g_norm = math.hypot(*w), math.hypot(*g)
            trust = eta * w_norm / g_norm if w_norm > 0 and g_norm > 0 else 1.0
        v = [momentum * vi + trust * gi for vi, gi in zip(v, g, strict=True)]
        w = [wi - lr * vi for wi, vi in zip(w, v, strict=True)]
    return w


def our_lars(w, grads, rates, decay, lars_adaptation, momentum=0.9, eta=0.001):
    param = nn.Parameter(torch.tensor(w, dtype=torch.float64))
    group = {"params": [param], "weight_decay": decay, "lars_adaptation": lars_adaptation}
    optimizer = LARS([group], momentum, eta)
    for grad, lr in zip(grads, rates, strict=True):
        param.grad = torch.tensor(grad, dtype=torch.float64)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    return param.tolist()


@pytest.mark.parametrize("lars_adaptation", [True, False])
@pytest.mark.parametrize("decay", [0.0, 1e-6, 0.1])
@pytest.mark.parametrize("momentum, eta", [(0.9, 0.001), (0.5, 0.02)])
def test_scalar_transcription(lars_adaptation, decay, momentum, eta):
    generator = torch.Generator().manual_seed(0)
    w, *grads = torch.randn(21, 5, dtype=torch.float64, generator=generator).tolist()
    rates = [0.3 * step / 10 if step < 10 else 0.3 * (20 - step) / 10 for step in range(20)]
    expected = scalar_lars(w, grads, rates, decay, lars_adaptation, momentum, eta)
    ours = our_lars(w, grads, rates, decay, lars_adaptation, momentum, eta)
    assert ours == pytest.approx(expected, rel=1e-12)


def test_stated_values():
    """The learning rate is outside the buffer; inside it they would be 2.9928015 and 3.990402."""
    w = our_lars([3.0, 4.0], [[0.6, 0.8]] * 2, [1.0, 0.5], 0.1, True)
    assert w == pytest.approx([2.9941515, 3.992202], abs=5e-8)


def test_is_momentum_sgd_without_adaptation_whatever_the_rate():
    """torch's SGD too has the rate outside its buffer: equal under warm-up as well."""
    generator = torch.Generator().manual_seed(0)
    w, *grads = torch.randn(9, 4, dtype=torch.float64, generator=generator).tolist()
    rates = [0.0, 0.1, 0.2, 0.3, 0.2, 0.2, 0.1, 0.05]
    param = nn.Parameter(torch.tensor(w, dtype=torch.float64))
    sgd = torch.optim.SGD([param], lr=0.1, momentum=0.9)
    for grad, lr in zip(grads, rates, strict=True):
        param.grad = torch.tensor(grad, dtype=torch.float64)
        sgd.param_groups[0]["lr"] = lr
        sgd.step()
    assert our_lars(w, grads, rates, 0.0, False) == pytest.approx(param.tolist(), rel=1e-12)


@pytest.mark.parametrize(
    "w, grad, decay", [([0.0, 0.0], [3.0, 4.0], 0.1), ([3.0, 4.0], [0.0, 0.0], 0.0)]
)
def test_a_zero_norm_gives_trust_one(w, grad, decay):
    lr = 0.5
    moved = [wi - lr * gi for wi, gi in zip(w, grad, strict=True)]
    assert our_lars(w, [grad], [lr], decay, True) == moved


def test_parameters_without_gradient_stay():
    a, b = (nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    optimizer = LARS([{"params": [a, b], "weight_decay": 0.1, "lars_adaptation": True, "lr": 1.0}])
    a.grad = torch.ones(2, 2)
    optimizer.step()
    assert not torch.equal(a, torch.ones(2, 2)) and torch.equal(b, torch.ones(2, 2))


def test_gradients_are_left_as_they_are():
    param = nn.Parameter(torch.arange(4.0).view(2, 2))
    param.grad = torch.full((2, 2), 3.0)
    LARS([{"params": [param], "weight_decay": 0.1, "lr": 1.0}]).step()
    assert torch.equal(param.grad, torch.full((2, 2), 3.0))


def test_state_survives_a_checkpoint():
    def fresh():
        return nn.Parameter(torch.arange(4.0).view(2, 2))

    def steps(optimizer, param, rates):
        for lr in rates:
            param.grad = torch.sin(param.detach() + lr)
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()

    whole = fresh()
    steps(LARS([whole]), whole, [0.1, 0.2, 0.3])
    part = fresh()
    first = LARS([part])
    steps(first, part, [0.1, 0.2])
    rest = nn.Parameter(part.detach().clone())
    second = LARS([rest])
    second.load_state_dict(first.state_dict())
    steps(second, rest, [0.3])
    assert torch.equal(whole, rest)


# ---- parameter groups ----------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["bn", "gn+ws"])
@pytest.mark.parametrize("arch", ["demo", "resnet18-cifar", "resnet50"])
def test_settings_of_the_optimizer_of_a_run(arch, norm):
    """Four groups: weights and the rest of f and g, then of q, each parameter in one of them."""
    online = Online(encoders.build(arch, image_size=32), 32, 16)
    if norm == "gn+ws":
        group_norm_weight_standardised(online)
    cfg = replace(IMAGENET_100, weight_decay=1e-3, momentum=0.8, predictor_lr=30.0)
    optimizer = lars(online, cfg)
    expected = [(1e-3, True, 1.0), (0.0, False, 1.0), (1e-3, True, 30.0), (0.0, False, 30.0)]
    keys = ("weight_decay", "lars_adaptation", "lr_multiplier")
    assert [tuple(group[key] for key in keys) for group in optimizer.param_groups] == expected
    assert {(group["momentum"], group["eta"]) for group in optimizer.param_groups} == {(0.8, 0.001)}
    found = []
    for network in (nn.ModuleList([online.encoder, online.projector]), online.predictor):
        weights, others = [], []
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                weights.append(module.weight)
                others += [] if module.bias is None else [module.bias]
            elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.GroupNorm):
                others += [module.weight, module.bias]
        found += [weights, others]
    ids = [sorted(map(id, group["params"])) for group in optimizer.param_groups]
    assert ids == [sorted(map(id, params)) for params in found]
    assert sorted(i for group in ids for i in group) == sorted(map(id, online.parameters()))

    plain = lars(online, replace(cfg, optimizer="sgd")).param_groups
    assert [group["lars_adaptation"] for group in plain] == [False] * 4
    assert [group["weight_decay"] for group in plain] == [1e-3, 0.0, 1e-3, 0.0]


def test_groups_are_the_official_exclusions():
    """Of the recorded parameters, ours would exclude those that the official code excludes."""
    data, ran = golden("byol_basic"), 0
    for p in PARAMETERS:
        official = data[f"lars/init/{p}"]
        ours = official.squeeze() if p.rpartition("/")[2] in ("scale", "offset") else official
        assert (ours.ndim > 1) == bool(data[f"lars/adapted_and_decayed/{p}"]), p
        ran += 1
    assert ran >= 14


def test_groups_as_the_optimizer_uses_them():
    """A gain moves at the full rate; a weight at `eta` times its norm's share of it."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = LARS(parameter_groups(model, 1e-2))
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    optimizer.step()
    weight, *plain = (b - p.detach() for b, p in zip(before, model.parameters(), strict=True))
    for moved in plain:
        torch.testing.assert_close(moved, torch.full((4,), 0.5))
    assert weight.norm().item() == pytest.approx(0.5 * ETA * before[0].norm().item(), rel=1e-4)


def test_without_adaptation_it_is_sgd():
    """--optimizer sgd: torch's SGD with decay on the weights alone, to rounding.

    Its buffer has no rate either, so the two agree while the rate changes.
    """
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    theirs = copy.deepcopy(ours)
    optimizer = LARS(parameter_groups(ours, 0.1, lars_adaptation=False), momentum=0.9)
    weight, *others = theirs.parameters()
    groups = [{"params": [weight], "weight_decay": 0.1}, {"params": others}]
    reference = torch.optim.SGD(groups, lr=0.0, momentum=0.9)
    start = weight.detach().clone()
    x, y = torch.randn(2, 8, 4, dtype=torch.float64)
    for lr in (0.0, 0.5, 0.2, 0.1):
        for model, stepper in ((ours, optimizer), (theirs, reference)):
            for group in stepper.param_groups:
                group["lr"] = lr
            stepper.zero_grad()
            (model(x[:, :3]) - y).square().mean().backward()
            stepper.step()
    assert not torch.allclose(weight, start, atol=1e-3)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


# ---- learning rate and tau -----------------------------------------------------------------------

SCHEDULES = [
    k.split("/")[1] for k in golden("byol_basic") if k.startswith("sched/") and "settings" in k
]


def test_schedules_golden():
    data, ran = golden("byol_basic"), 0
    for name in SCHEDULES:
        given = ast.literal_eval(str(data[f"sched/{name}/settings"][0]))
        batch, total = given["batch_size"], given["total_steps"]
        count = batch * total  # one epoch of so many images has just so many steps
        cfg = replace(
            Config(),
            batch_size=batch,
            epochs=1,
            base_lr=given["base_learning_rate"],
            warmup_epochs=(given["warmup_steps"] + 0.5) / total,
            tau_base=given["base_ema"],
        )
        assert total_steps(cfg, count) == total
        steps = [int(step) for step in data[f"sched/{name}/steps"]]
        peak = cfg.base_lr * batch / 256
        for suffix in ("", "_f64"):
            rates, taus = (data[f"sched/{name}/{k}{suffix}"] for k in ("lr", "target_ema"))
            worst = max(abs(lr_at(s, cfg, count) - lr) for s, lr in zip(steps, rates, strict=True))
            assert worst < 1e-6 * peak, name
            far = max(abs(tau_at(s, cfg, count) - tau) for s, tau in zip(steps, taus, strict=True))
            assert far < (1e-12 if suffix else 1e-6), name
        ran += 1
    assert ran >= 4


@pytest.mark.parametrize(
    "epochs, total", [(40, 12_511), (100, 31_278), (300, 93_835), (1000, 312_784)]
)
def test_lengths_at_batch_4096(epochs, total):
    """Without SimCLR's + 1; the warm-up is 10 epochs."""
    cfg = replace(IMAGENET_100, epochs=epochs)
    assert total_steps(cfg, IMAGENET) == total
    assert lr_at(0, cfg, IMAGENET) == 0
    assert lr_at(3126, cfg, IMAGENET) < lr_at(3127, cfg, IMAGENET) == cfg.base_lr * 16
    assert lr_at(3128, cfg, IMAGENET) < cfg.base_lr * 16
    assert 0 < lr_at(total - 1, cfg, IMAGENET) < 1e-5 and lr_at(total, cfg, IMAGENET) < 1e-15


def test_schedule_over_floats():
    """schedules.py:27-53, transcribed."""
    cfg, count = replace(DEMO, batch_size=10, epochs=20, warmup_epochs=4, base_lr=0.5), 50
    for step in range(100):
        warm, total, peak = 20, 100, 0.5 * 10 / 256
        rate = step / warm * peak
        if step >= warm:
            rate = 0.5 * peak * (1 + math.cos(math.pi * (step - warm) / (total - warm)))
        assert lr_at(step, cfg, count) == pytest.approx(rate, rel=1e-12)
        tau = 1 - (1 - cfg.tau_base) * (math.cos(math.pi * step / total) + 1) / 2
        assert tau_at(step, cfg, count) == pytest.approx(tau, rel=1e-12)


def test_tau_at_both_ends_and_in_the_middle():
    cfg, count = replace(IMAGENET_1000, epochs=100), 4096 * 10  # 1000 steps
    assert tau_at(0, cfg, count) == pytest.approx(0.996, abs=1e-15)
    assert tau_at(500, cfg, count) == pytest.approx(0.998, abs=1e-12)
    assert tau_at(1000, cfg, count) == tau_at(2000, cfg, count) == 1.0
    taus = [tau_at(step, cfg, count) for step in range(1000)]
    assert taus == sorted(taus) and taus[-1] < 1


def test_peaks_of_the_recipes():
    assert max(cfg.base_lr * cfg.batch_size / 256 for cfg, _ in RECIPES.values()) <= 16
    assert IMAGENET_1000.base_lr * IMAGENET_1000.batch_size / 256 == pytest.approx(3.2)  # Sec. 3.3
    assert IMAGENET_B512.base_lr * IMAGENET_B512.batch_size / 256 == pytest.approx(0.8)  # App. G
    assert IMAGENETTE.base_lr * IMAGENETTE.batch_size / 256 == pytest.approx(2.0)  # README
