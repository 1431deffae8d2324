"""The folder without pretrain.py works elsewhere, also under another name, with torch alone."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT

REFUSING = """
import builtins
import sys

real = builtins.__import__
allowed = {"torch", "torchvision", PACKAGE, *sys.stdlib_module_names}

def refusing(name, globals=None, locals=None, fromlist=(), level=0):
    importer = (globals or {}).get("__name__", "").split(".")[0]
    if importer in ("__main__", PACKAGE) and not level and name.split(".")[0] not in allowed:
        raise ImportError(f"{name} is not there")
    return real(name, globals, locals, fromlist, level)

builtins.__import__ = refusing
"""

TRAINS = """
import torch
from dataclasses import replace
from torch import nn

from borrowed_method.augment import views
from borrowed_method.config import DEMO
from borrowed_method.loss import byol_loss
from borrowed_method.model import Online, Target, ema_, group_norm_weight_standardised, init_weights
from borrowed_method.optim import lars, lr_at, tau_at, total_steps

torch.manual_seed(0)
images = torch.randint(0, 256, (8, 3, 20, 24), dtype=torch.uint8)
for norm in ("bn", "gn+ws"):
    cfg = replace(DEMO, norm=norm, image_size=16, batch_size=8, epochs=4, warmup_epochs=1)
    one, two = views(cfg)
    encoder = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    encoder.num_features = 32
    online = Online(encoder, cfg.hidden_dim, cfg.dim)
    if norm == "gn+ws":
        group_norm_weight_standardised(online)
    init_weights(online)
    target = Target(online)
    optimizer = lars(online, cfg)
    networks = [*online.parameters(), *target.parameters()]
    before_training = [p.detach().clone() for p in networks]
    assert total_steps(cfg, 8) == 4
    for step in range(3):
        view1, view2 = (torch.stack([t(x) for x in images]) for t in (one, two))
        p1, p2 = online(view1, view2)
        z1, z2 = target(view1, view2)
        loss = byol_loss(p1, z2) + byol_loss(p2, z1)
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = group["lr_multiplier"] * lr_at(step, cfg, 8)
        optimizer.step()
        optimizer.zero_grad()
        ema_(target, online, tau_at(step, cfg, 8))
        assert loss.isfinite()
    assert all(not torch.equal(a, b) for a, b in zip(before_training, networks))
print("trained")
"""


@pytest.fixture
def borrowed(tmp_path):
    """Copies byol/ alone, without pretrain.py, under a name; and runs a program beside it."""

    def run(package: str, program: str) -> subprocess.CompletedProcess:
        if not (tmp_path / package).exists():
            copy_method(tmp_path / package)
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        text = REFUSING.replace("PACKAGE", repr(package)) + program
        return subprocess.run(
            [sys.executable, "-c", text],
            cwd=tmp_path, env=environment, capture_output=True, text=True,
        )  # fmt: skip

    return run


def copy_method(folder: Path) -> Path:
    left_out = shutil.ignore_patterns("pretrain.py", "__pycache__")
    return Path(shutil.copytree(ROOT / "byol", folder, ignore=left_out))


def test_trains_three_steps_alone_under_another_name(borrowed):
    done = borrowed("borrowed_method", TRAINS)
    assert done.stdout == "trained\n", done.stderr


@pytest.mark.parametrize("line", ["from common.data import generator", "import numpy"])
def test_what_is_banned_cannot_be_imported(borrowed, tmp_path, line):
    """The check can fail: one import of something else ends it."""
    loss = copy_method(tmp_path / "borrowed_method") / "loss.py"
    loss.write_text(loss.read_text() + f"\n{line}\n")
    done = borrowed("borrowed_method", TRAINS)
    assert done.returncode != 0 and f"{line.split()[1]} is not there" in done.stderr


def test_the_readmes_loop_runs_as_it_stands(borrowed):
    text = (ROOT / "byol" / "README.md").read_text()
    section = text.split("## In your own project\n")[1].split("\n## ")[0]
    [loop] = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert sum(bool(line.strip()) for line in loop.splitlines()) <= 20
    after = "assert step > 9 and loss.isfinite() and 0 < loss < 8 and optimizer.state\n"
    done = borrowed("byol", f"{loop}{after}print('trained')\n")
    assert done.stdout == "trained\n", done.stderr
