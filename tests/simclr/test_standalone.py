"""simclr/ without pretrain.py works elsewhere, under another name, on torch and torchvision."""

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
from borrowed_method.config import CIFAR10
from borrowed_method.loss import nt_xent
from borrowed_method.model import SimCLR
from borrowed_method.optim import LARS, lr_at, parameter_groups, total_steps

torch.manual_seed(0)
torch.set_num_threads(1)
cfg = replace(CIFAR10, arch="demo", image_size=16, batch_size=8, epochs=4, warmup_epochs=1)
images = torch.randint(0, 256, (8, 3, 20, 24), dtype=torch.uint8)
one, two = views(cfg)
model = SimCLR(cfg)
optimizer = LARS(parameter_groups(model, cfg.weight_decay), cfg.momentum)
before_training = [p.detach().clone() for p in model.parameters() if p.requires_grad]
assert total_steps(cfg, 8) == 5
for step in range(3):
    for group in optimizer.param_groups:
        group["lr"] = lr_at(step, cfg, 8)
    z1, z2 = model(torch.stack([one(x) for x in images]), torch.stack([two(x) for x in images]))
    loss, logits = nt_xent(z1, z2, cfg.temperature)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    assert loss.isfinite()
after = [p for p in model.parameters() if p.requires_grad]
assert all(not torch.equal(a, b) for a, b in zip(before_training, after))
print("files", *sorted({m.split(".")[1] for m in sys.modules if m.startswith("borrowed_method.")}))
"""


@pytest.fixture
def borrowed(tmp_path):
    """A folder that holds simclr/ alone, without pretrain.py, as borrowed_method/."""
    left_out = shutil.ignore_patterns("pretrain.py", "__pycache__")
    shutil.copytree(ROOT / "simclr", tmp_path / "borrowed_method", ignore=left_out)
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
