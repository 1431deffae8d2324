"""The folder without pretrain.py works elsewhere, under another name, with torch alone."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT

PROGRAM = """
import sys

class Refuse:
    banned = set("accelerate tyro datasets common eval simclr moco byol tests safetensors"
                 " transformers huggingface_hub".split())
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.banned:
            raise ImportError(f"{name} is not there")

sys.meta_path.insert(0, Refuse())
import torch
from dataclasses import replace

from borrowed_method.augment import views
from borrowed_method.config import DEMO
from borrowed_method.loss import regression
from borrowed_method.model import Online, Target, ema_
from borrowed_method.optim import LARS, lr_at, parameter_groups, tau_at, total_steps

torch.manual_seed(0)
torch.set_num_threads(1)
images = torch.randint(0, 256, (8, 3, 20, 24), dtype=torch.uint8)
for norm in ("bn", "gn+ws"):
    cfg = replace(DEMO, norm=norm, image_size=16, batch_size=8, epochs=4, warmup_epochs=1)
    one, two = views(cfg)
    online = Online(cfg)
    target = Target(online)
    optimizer = LARS(parameter_groups(online, cfg.weight_decay), cfg.momentum)
    networks = [*online.parameters(), *target.parameters()]
    before_training = [p.detach().clone() for p in networks]
    assert total_steps(cfg, 8) == 4
    for step in range(3):
        view1, view2 = (torch.stack([t(x) for x in images]) for t in (one, two))
        p1, p2 = online(view1, view2)
        z1, z2 = target(view1, view2)
        loss = regression(p1, z2) + regression(p2, z1)
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, cfg, 8)
        optimizer.step()
        optimizer.zero_grad()
        ema_(target, online, tau_at(step, cfg, 8))
        assert loss.isfinite()
    assert all(not torch.equal(a, b) for a, b in zip(before_training, networks))
print("files", *sorted({m.split(".")[1] for m in sys.modules if m.startswith("borrowed_method.")}))
"""


@pytest.fixture
def borrowed(tmp_path):
    """A folder that holds byol/ alone, without pretrain.py, as borrowed_method/."""
    left_out = shutil.ignore_patterns("pretrain.py", "__pycache__")
    shutil.copytree(ROOT / "byol", tmp_path / "borrowed_method", ignore=left_out)
    return tmp_path


def run(folder: Path, program: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_trains_three_steps_alone(borrowed):
    done = run(borrowed, PROGRAM)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["files", "augment", "config", "loss", "model", "optim"]


def test_what_is_banned_cannot_be_imported(borrowed):
    """The check can fail: one import of the rest of the project ends it."""
    loss = borrowed / "borrowed_method" / "loss.py"
    loss.write_text(loss.read_text() + "\nfrom common.data import generator\n")
    done = run(borrowed, PROGRAM)
    assert done.returncode != 0 and "common is not there" in done.stderr
