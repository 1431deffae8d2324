"""What counts as overhead: all that is not within a network's forward or within backward."""

import json
import sys
import time

import pytest
import torch

from common import cli
from common.encoders import DemoEncoder
from common.run import Run
from tests.benchmarks import overhead

SMALL = "demo --batch-size 16 --image-size 16 --log-every 1 --knn-every 0"
PAUSE = 0.02  # seconds


def slowed(function):
    def slow(*args, **values):
        time.sleep(PAUSE)
        return function(*args, **values)

    return slow


@pytest.mark.parametrize("method, forwards", [("simclr", 1), ("moco", 2), ("byol", 4)])
def test_time_in_networks_is_told_from_time_around_them(method, forwards, tmp_path, monkeypatch):
    monkeypatch.setattr(DemoEncoder, "forward", slowed(DemoEncoder.forward))
    monkeypatch.setattr(Run, "end_step", slowed(Run.end_step))
    found = overhead.measure(method, tmp_path / "run", SMALL)
    inside = found["step"] * (1 - found["overhead"])
    assert inside > forwards * PAUSE
    assert found["step"] - inside > PAUSE
    assert 0 < found["views"] < 1 and found["views"] < found["overhead"]


def test_the_record(tmp_path, monkeypatch):
    monkeypatch.setattr(overhead, "FLAGS", SMALL)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["overhead.py", "--keep", str(tmp_path)])
    cli.run(overhead.main)
    record = json.loads((tmp_path / "overhead-cpu.json").read_text())
    assert record["kind"] == "measurement" and record["commit"] and len(record["figures"]) == 4
    assert all(value > 0 for row in record["figures"].values() for value in row.values())
