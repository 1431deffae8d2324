"""README.md's loop for the reader's own project, run as it stands there.

moco/ is copied without pretrain.py; only torch and torchvision can be imported.
"""

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.helpers import ROOT

REFUSE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        known = {*sys.stdlib_module_names, *torch_needs, "torch", "torchvision", NAME}
        if name.split(".")[0] not in known:
            raise ImportError(f"{name} is not there")

torch_needs = set()
before = set(sys.modules)
import torch, torchvision
torch_needs = {name.split(".")[0] for name in set(sys.modules) - before}
sys.meta_path.insert(0, Refuse())
torch.manual_seed(1)
torch.set_num_threads(1)
"""


def block():
    """The one ```python block of README.md's section."""
    text = (ROOT / "moco" / "README.md").read_text()
    section = text.split("## In your own project\n")[1].split("\n## ")[0]
    [found] = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return found


def run(folder, program, name="moco", more=""):
    """`program` where moco/ is there as `name`, its loss.py ending in `more`."""
    left_out = shutil.ignore_patterns("pretrain.py", "__pycache__")
    shutil.copytree(ROOT / "moco", folder / name, ignore=left_out)
    with open(folder / name / "loss.py", "a") as file:
        file.write(more)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-c", f"NAME = {name!r}\n{REFUSE}\n{program}"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_is_short():
    assert 10 < sum(bool(line.strip()) for line in block().splitlines()) <= 20


@pytest.mark.parametrize("name", ["moco", "borrowed"])
def test_trains(tmp_path, name):
    files = {path.stem for path in (ROOT / "moco").glob("*.py")} - {"__init__", "pretrain"}
    program = f"{block()}\nfrom moco import {', '.join(files)}"  # all can be imported
    done = run(tmp_path, program.replace("from moco ", f"from {name} "), name)
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[1]) for line in done.stdout.splitlines()]
    assert [line.split()[0] for line in done.stdout.splitlines()] == [str(i) for i in range(80)]
    assert losses[0] < losses[4] and sum(losses[-20:]) < sum(losses[4:24]) - 5  # the queue is full


def test_what_is_refused_cannot_be_imported(tmp_path):
    """The check can fail: one import of anything else ends it."""
    done = run(tmp_path, block(), more="\nimport accelerate\n")
    assert done.returncode != 0 and "accelerate is not there" in done.stderr
