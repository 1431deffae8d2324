"""moco/ without pretrain.py works elsewhere, under another name, on torch and torchvision."""

import os
import shutil
import subprocess
import sys

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
from borrowed_method.loss import info_nce
from borrowed_method.model import MoCo, own, split_batchnorm
from borrowed_method.optim import lr_at, sgd, total_steps

torch.manual_seed(0)
torch.set_num_threads(1)
cfg = replace(CIFAR10, arch="demo", image_size=16, batch_size=8, epochs=4, queue_size=20)
images = torch.randint(0, 256, (8, 3, 20, 24), dtype=torch.uint8)
one, two = views(cfg)
network = split_batchnorm(MoCo(cfg), 4)
optimizer = sgd(network.encoder_q, cfg)
before_training = [p.detach().clone() for p in network.encoder_q.parameters()]
assert total_steps(cfg, 8) == 4
for step in range(3):
    for group in optimizer.param_groups:
        group["lr"] = lr_at(step, cfg, 8)
    (q,) = network.encoder_q(torch.stack([one(x) for x in images]))
    network.update_key(cfg.key_momentum)
    k = network.keys(torch.stack([two(x) for x in images]), torch.randperm(8))
    loss, logits = info_nce(q, own(k), network.queue, cfg.temperature)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    network.enqueue(k)
    assert loss.isfinite()
assert network.queue_ptr == 4 and network.queue_fill == 20
after = list(network.encoder_q.parameters())
assert all(not torch.equal(a, b) for a, b in zip(before_training, after))
print("files", *sorted({m.split(".")[1] for m in sys.modules if m.startswith("borrowed_method.")}))
"""


@pytest.fixture
def borrowed(tmp_path):
    """A folder that holds moco/ alone, without pretrain.py, as borrowed_method/."""
    left_out = shutil.ignore_patterns("pretrain.py", "__pycache__")
    shutil.copytree(ROOT / "moco", tmp_path / "borrowed_method", ignore=left_out)
    return tmp_path


def run(folder, program):
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
