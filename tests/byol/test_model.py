"""Online, target, moving average, heads, and the network without batch statistics."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.resnet import BasicBlock, Bottleneck

from byol.loss import byol_loss
from byol.model import (
    Online,
    StandardisedConv2d,
    StandardisedLinear,
    Target,
    ema_,
    globalize,
    group_norm_weight_standardised,
    init_weights,
    mlp,
    standardise,
)
from common import encoders
from tests.helpers import golden, golden_json, rel, run_processes

DOUBLE = torch.float64


def count(module):
    return sum(p.numel() for p in module.parameters())


def build(arch, hidden_dim=32, dim=16, norm="bn"):
    """The online network as `pretrain.py` makes it."""
    online = Online(encoders.build(arch, image_size=32), hidden_dim, dim)
    if norm == "gn+ws":
        group_norm_weight_standardised(online)
    init_weights(online)
    return online


def make(norm="bn", seed=0):
    torch.manual_seed(seed)
    return build("demo", norm=norm).double()


def views(n=8, seed=0, size=16):
    generator = torch.Generator().manual_seed(seed)
    view1, view2 = torch.rand(2, n, 3, size, size, dtype=DOUBLE, generator=generator)
    return view1, 0.5 * view2  # other statistics


# ---- sizes and initial weights -------------------------------------------------------------------


@pytest.fixture(scope="module")
def headline():
    torch.manual_seed(0)
    return build("resnet50", 4096, 256)


def test_head_sizes(headline):
    """The numbers that the official networks have."""
    assert count(headline.projector) == 9_449_472
    assert count(headline.predictor) == 2_109_440
    assert count(Target(headline)) == 23_508_032 + 9_449_472


def official_names(online):
    """{end of the official name: ours} for encoder, projector and predictor of a ResNet-50."""
    encoder = online.encoder
    found = {"res_net50/initial_conv/w": encoder.conv1.weight}
    found |= norm("res_net50/initial_batchnorm", encoder.bn1)
    for g, stage in enumerate((encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4)):
        for b, block in enumerate(stage):
            at = f"res_net50/block_group_{g}/block_{b}"
            for i in range(3):
                found[f"{at}/conv_{i}/w"] = getattr(block, f"conv{i + 1}").weight
                found |= norm(f"{at}/batchnorm_{i}", getattr(block, f"bn{i + 1}"))
            if block.downsample is not None:
                found[f"{at}/shortcut_conv/w"] = block.downsample[0].weight
                found |= norm(f"{at}/shortcut_batchnorm", block.downsample[1])
    for name in ("projector", "predictor"):
        head = getattr(online, name)
        found |= {f"{name}/linear/w": head[0].weight, f"{name}/linear/b": head[0].bias}
        found |= norm(f"{name}/batch_norm", head[1])
        found[f"{name}/linear_1/w"] = head[3].weight
    return found


def norm(name, bn):
    return {f"{name}/scale": bn.weight, f"{name}/offset": bn.bias}


def test_initial_weights_are_distributed_like_the_official_ones(headline):
    """Variable by variable: size, mean, deviation and reach of both initial values."""
    stats = golden_json("variable_names")["byol"][
        "full_pretrain_resnet50/init_stats(shape,mean,std,min,max,std*sqrt(fan_in))"
    ]
    official = {k.replace("/~", ""): v for k, v in stats.items() if "classifier" not in k}
    ours = official_names(headline)
    assert ours.keys() == official.keys()
    ran = 0
    for name, (shape, mean, std, low, high, _) in official.items():
        tensor = ours[name].detach().double()
        assert tensor.numel() == torch.tensor(shape).prod(), name
        if std == 0:  # gains, shifts and biases: exactly
            assert torch.equal(tensor, torch.full_like(tensor, mean)), name
        else:
            n = tensor.numel()
            assert tensor.std().item() == pytest.approx(std, rel=8 * n**-0.5), name
            assert abs(tensor.mean().item()) < 6 * std * n**-0.5, name
            assert tensor.max().item() == pytest.approx(high, rel=0.02), name
            assert tensor.min().item() == pytest.approx(low, rel=0.02), name
        ran += 1
    assert ran == len(list(headline.parameters()))


@pytest.mark.parametrize("norm", ["bn", "gn+ws"])
def test_gain_of_the_last_normalisation_in_a_block(norm):
    """0 in bottlenecks, as in the released code; 1 in the basic blocks of a ResNet-18."""
    for arch, block, last, gain in (
        ("resnet50", Bottleneck, "bn3", 0.0),
        ("resnet18", BasicBlock, "bn2", 1.0),
    ):
        blocks = [module for module in build(arch, norm=norm).modules() if type(module) is block]
        assert len(blocks) == {"resnet50": 16, "resnet18": 8}[arch]
        for module in blocks:
            assert (getattr(module, last).weight == gain).all()


def test_an_encoder_of_ones_own_keeps_its_weights():
    """Only the heads are given the official initial weights."""
    encoder = encoders.build("demo")
    before = deepcopy(encoder.state_dict())
    online = Online(encoder, 512, 256)
    assert all(torch.equal(v, before[k]) for k, v in online.encoder.state_dict().items())
    for head in (online.projector, online.predictor):
        for layer in (head[0], head[3]):
            std = layer.weight[0].numel() ** -0.5
            assert layer.weight.abs().max() <= 2 * std
            assert layer.weight.std().item() == pytest.approx(0.88 * std, rel=0.02)
        assert not head[0].bias.any()


# ---- the heads against the official ones ---------------------------------------------------------


@pytest.mark.parametrize(
    "suffix, dtype, tolerance", [("", torch.float32, 1e-5), ("_f64", DOUBLE, 1e-9)]
)
def test_mlp_golden(suffix, dtype, tolerance):
    """Three training calls, gradients of sum(out * cotangent) at the first, running statistics."""
    data = golden("byol_basic")
    head = mlp(10, 12, 5).to(dtype)
    ours = {"linear/w": head[0].weight, "linear/b": head[0].bias, "linear_1/w": head[3].weight}
    ours |= norm("batch_norm", head[1])
    assert len(ours) == len(list(head.parameters()))

    def official(name, tensor):
        return tensor.T if name.endswith("/w") else tensor

    with torch.no_grad():
        for name, parameter in ours.items():
            values = torch.tensor(data[f"mlp/init/projector/{name}"], dtype=dtype)
            parameter.copy_(official(name, values).reshape(parameter.shape))
    for i in range(3):
        x = torch.tensor(data[f"mlp/x{i}"], dtype=dtype, requires_grad=True)
        out = head(x)
        assert rel(out, data[f"mlp/out_train{i}{suffix}"]) < tolerance
        if i == 0:
            (out * torch.tensor(data["mlp/cotangent"])).sum().backward()
            assert rel(x.grad, data[f"mlp/grad_x{suffix}"]) < tolerance
            for name, parameter in ours.items():
                theirs = data[f"mlp/grad/projector/{name}{suffix}"]
                if name == "linear/b":  # in front of BatchNorm: exactly 0 but for rounding
                    assert parameter.grad.abs().max() < 1e-5
                else:
                    grad = official(name, parameter.grad).reshape(theirs.shape)
                    assert rel(grad, theirs) < tolerance, name
        # Haiku's `hidden` starts at 0 and its variance is biased; torch's starts at 1 and is not
        after, n, kept = f"mlp/state_after{i}/projector/batch_norm/~", 6, 0.9 ** (i + 1)
        mean, var = head[1].running_mean, (head[1].running_var - kept) * (n - 1) / n
        assert rel(mean, data[f"{after}/mean_ema/hidden"].ravel()) < 1e-5
        assert rel(var, data[f"{after}/var_ema/hidden"].ravel()) < 1e-5
    with torch.no_grad():  # in evaluation: Haiku's averages, put in the place of ours
        head[1].running_mean.copy_(torch.tensor(data[f"{after}/mean_ema/average"].ravel()))
        head[1].running_var.copy_(torch.tensor(data[f"{after}/var_ema/average"].ravel()))
        x0 = torch.tensor(data["mlp/x0"], dtype=dtype)
        assert rel(head.eval()(x0), data[f"mlp/out_eval_after3{suffix}"]) < 1e-5


# ---- two views, two networks ---------------------------------------------------------------------


def test_each_view_has_a_forward_of_its_own():
    """BatchNorm sees the images of one view, first view 1 and then view 2."""
    online = make()
    twin = deepcopy(online)
    view1, view2 = views()
    p1, p2 = online(view1, view2)
    for p, view in ((p1, view1), (p2, view2)):
        assert torch.equal(p, twin.predictor(twin.projector(twin.encoder(view))))
    assert all(torch.equal(a, b) for a, b in zip(online.buffers(), twin.buffers(), strict=True))
    tracked = {b.item() for n, b in online.named_buffers() if n.endswith("tracked")}
    assert tracked == {2}  # twice a step
    together = twin.predictor(twin.projector(twin.encoder(torch.cat([view1, view2]))))
    assert rel(together[:8], p1) > 0.1  # as SimCLR does it: other embeddings


def test_order_of_the_views_shows_in_the_running_statistics_alone():
    one, other = make(), make()
    view1, view2 = views()
    p1, p2 = one(view1, view2)
    q2, q1 = other(view2, view1)
    assert torch.equal(p1, q1) and torch.equal(p2, q2)
    differ = [n for n, b in one.named_buffers() if not torch.equal(b, other.get_buffer(n))]
    assert differ and all("running" in n for n in differ)


def test_target_starts_as_a_copy_and_predicts_nothing():
    online = make()
    target = Target(online)
    state = online.state_dict()
    assert target.state_dict().keys() == {k for k in state if not k.startswith("predictor.")}
    for name, value in target.state_dict().items():
        assert torch.equal(value, state[name]) and value.data_ptr() != state[name].data_ptr()
    view1, view2 = views()
    twin = deepcopy(online)
    for z, view in zip(target(view1, view2), (view1, view2), strict=True):
        assert torch.equal(z, twin.projector(twin.encoder(view)))


def test_gradients_reach_all_of_online_and_nothing_of_target():
    online = make()
    target = Target(online)
    view1, view2 = views()
    p1, p2 = online(view1, view2)
    z1, z2 = target(view1, view2)  # even without torch.no_grad()
    assert not z1.requires_grad and not z2.requires_grad
    (byol_loss(p1, z2) + byol_loss(p2, z1)).backward()
    untouched = [n for n, p in online.named_parameters() if p.grad is None or not p.grad.any()]
    assert untouched == []
    assert all(p.grad is None and not p.requires_grad for p in target.parameters())


def test_target_uses_the_statistics_of_the_batch_and_keeps_its_own():
    """In training mode; the moving average touches no buffer."""
    online = make()
    target = Target(online)
    assert target.training
    with torch.no_grad():
        for p in online.parameters():
            p.add_(0.05)
    view1, view2 = views()
    online(view1, view2)
    z1, _ = target(view1, view2)
    assert rel(target.eval()(view1, view2)[0], z1) > 0.1
    buffers = {n: b.clone() for n, b in target.named_buffers()}
    assert any(not torch.equal(b, online.get_buffer(n)) for n, b in buffers.items())
    ema_(target, online, 0.5)
    assert all(torch.equal(b, buffers[n]) for n, b in target.named_buffers())


# ---- the moving average --------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.0, 0.3, 0.5, 0.97, 0.996, 1.0])
def test_moving_average_is_equation_1(tau):
    online, target = make(seed=0), Target(make(seed=1))
    before = {n: p.clone() for n, p in target.named_parameters()}
    theta = {n: p.clone() for n, p in online.named_parameters()}
    ema_(target, online, tau)
    for name, parameter in target.named_parameters():
        expected = tau * before[name] + (1 - tau) * theta[name]
        torch.testing.assert_close(parameter.data, expected.data, rtol=1e-13, atol=1e-15)
    assert all(torch.equal(p, theta[n]) for n, p in online.named_parameters())
    ends = {0.0: theta, 1.0: before}
    if tau in ends:
        assert all(torch.equal(p, ends[tau][n]) for n, p in target.named_parameters())


def test_moving_average_after_many_steps():
    """Towards a constant online network the distance shrinks by tau a step."""
    online, target = make(seed=0), Target(make(seed=1))
    begin = {n: p.clone() for n, p in target.named_parameters()}
    for _ in range(10):
        ema_(target, online, 0.9)
    for name, p in target.named_parameters():
        there = online.get_parameter(name)
        torch.testing.assert_close(
            p - there, 0.9**10 * (begin[name] - there), rtol=1e-9, atol=1e-12
        )


# ---- without batch statistics --------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["demo", "resnet18-cifar", "resnet50"])
def test_group_norm_and_weight_standardisation_replace_every_layer(arch):
    plain, other = build(arch), build(arch, norm="gn+ws")
    for (name, a), (same, b) in zip(plain.named_modules(), other.named_modules(), strict=True):
        assert name == same
        if isinstance(a, nn.BatchNorm1d | nn.BatchNorm2d):
            assert type(b) is nn.GroupNorm and (b.num_groups, b.eps) == (16, 1e-5), name
        elif isinstance(a, nn.Conv2d):
            assert type(b) is StandardisedConv2d and b.extra_repr() == a.extra_repr(), name
        elif isinstance(a, nn.Linear):
            assert type(b) is StandardisedLinear and b.extra_repr() == a.extra_repr(), name
        else:
            assert type(a) is type(b), name
    shapes = {n: p.shape for n, p in plain.named_parameters()}
    assert {n: p.shape for n, p in other.named_parameters()} == shapes
    assert list(other.buffers()) == [] and other.state_dict().keys() == shapes.keys()


def test_standardise_over_floats():
    weight = torch.randn(3, 2, 2, 2, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    for unit, ours in zip(weight, standardise(weight), strict=True):
        values = unit.flatten().tolist()
        mean = sum(values) / len(values)
        deviation = (sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5
        expected = [(v - mean) / (deviation + 1e-5) for v in values]
        assert ours.flatten().tolist() == pytest.approx(expected, rel=1e-12)
    assert standardise(torch.ones(2, 3)).abs().max() == 0  # a constant unit is finite


def test_standardised_layers_compute_with_standardised_weights():
    conv = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)).double()
    line = nn.Sequential(nn.Linear(4, 16)).double()
    images, rows = torch.rand(2, 3, 8, 8, dtype=DOUBLE), torch.rand(2, 4, dtype=DOUBLE)
    conv_weight = standardise(conv[0].weight)
    expected = F.conv2d(images, conv_weight, stride=2, padding=1)
    torch.testing.assert_close(group_norm_weight_standardised(conv)(images), expected)
    expected = rows @ standardise(line[0].weight).T + line[0].bias
    torch.testing.assert_close(group_norm_weight_standardised(line)(rows), expected)
    scaled = deepcopy(conv)
    with torch.no_grad():
        scaled[0].weight.mul_(7).add_(0.3)  # scale and shift of a unit have no influence
    torch.testing.assert_close(scaled(images), conv(images), rtol=1e-3, atol=1e-4)


def test_images_do_not_depend_on_one_another_without_batch_statistics():
    """Nor on the mode; with BatchNorm they do."""
    view1, view2 = views()
    online = make("gn+ws")
    p1, _ = online(view1, view2)
    q1, _ = online(view1[:3], view2[:3])
    torch.testing.assert_close(q1, p1[:3], rtol=1e-12, atol=1e-13)
    assert torch.equal(online.eval()(view1, view2)[0], p1)
    online = make()
    assert rel(online(view1[:3], view2[:3])[0], online(view1, view2)[0][:3]) > 0.1


def test_globalize_leaves_one_process_alone():
    online = make()
    kinds = [type(module) for module in online.modules()]
    assert globalize(online) is online and [type(m) for m in online.modules()] == kinds


# ---- over processes ------------------------------------------------------------------------------


def one_step(norm, view1, view2, parallel=False, synced=True):
    """Loss, gradients and buffers of one step on these images."""
    network = make(norm)
    target = Target(globalize(network) if synced else network)
    with torch.no_grad():
        for i, p in enumerate(target.parameters()):
            p.mul_(1 + 0.01 * (i % 7))  # not the online network
    online = DistributedDataParallel(network) if parallel else network
    p1, p2 = online(view1, view2)
    with torch.no_grad():
        z1, z2 = target(view1, view2)
    loss = byol_loss(p1, z2) + byol_loss(p2, z1)
    loss.backward()
    return {
        "loss": loss.detach(),
        "grads": {n: p.grad for n, p in network.named_parameters()},
        "buffers": {n: b for m in (network, target) for n, b in m.named_buffers()},
        "kinds": {type(m).__name__ for m in network.modules()},
    }


def share(rank, world):
    mine = [view.chunk(world)[rank] for view in views()]
    return {
        "bn": one_step("bn", *mine, parallel=True),
        "gn+ws": one_step("gn+ws", *mine, parallel=True),
        "own statistics": one_step("bn", *mine, parallel=True, synced=False),
        "refused": refused(globalize),
    }


class ClippedNorm(nn.BatchNorm1d):
    """Does more than BatchNorm."""


def refused(replace):
    """What `replace` says of a network with a layer of a derived class."""
    with pytest.raises(ValueError) as error:
        replace(nn.Sequential(nn.Linear(4, 16), ClippedNorm(16)))
    return str(error.value)


@pytest.fixture(scope="module")
def shares():
    return run_processes(share, 2)


# the bias in front of a BatchNorm has no influence: its gradient is rounding
MEANINGLESS = ("projector.0.bias", "predictor.0.bias")


def worst(ranks, alone, norm):
    every = [n for n in alone["grads"] if norm != "bn" or n not in MEANINGLESS]
    return max(rel(found["grads"][n], alone["grads"][n]) for found in ranks for n in every)


@pytest.mark.parametrize("norm", ["bn", "gn+ws"])
def test_two_processes_equal_one(shares, norm):
    """The same loss and gradients; without batch statistics, without any synchronisation."""
    alone = one_step(norm, *views())
    ranks = [found[norm] for found in shares]
    assert ("GlobalBatchNorm" in ranks[0]["kinds"]) == (norm == "bn")
    mean = sum(found["loss"] for found in ranks) / 2
    assert rel(mean, alone["loss"]) < 1e-12
    assert ranks[0]["loss"] != ranks[1]["loss"]  # each has its own images
    assert worst(ranks, alone, norm) < 1e-10
    for found in ranks:
        assert found["buffers"].keys() == alone["buffers"].keys()
        for name, buffer in alone["buffers"].items():
            assert rel(found["buffers"][name], buffer) < 1e-12, name


def test_the_comparison_has_teeth(shares):
    """With each process's own BatchNorm statistics the gradients are off by over 1 %."""
    alone = one_step("bn", *views())
    assert worst([found["own statistics"] for found in shares], alone, "bn") > 1e-2


def test_a_layer_of_a_derived_class_is_refused(shares):
    for said in (*(found["refused"] for found in shares), refused(group_norm_weight_standardised)):
        assert "1: a ClippedNorm" in said
