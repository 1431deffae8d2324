"""Memory is what the formulas say, and a run holds no more after many epochs than after a few."""

import json
import subprocess
import sys

import pytest

from tests.benchmarks.memory import MB
from tests.helpers import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read off /proc")


def told(expression):
    """The value of an expression of the script's names, in a fresh process."""
    code = "import json; from pathlib import Path; from tests.benchmarks.memory import *; "
    code += f"import torch; torch.set_num_threads(1); print(json.dumps({expression}))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "count, more",
    [
        (15, ()),
        pytest.param(50, (), marks=pytest.mark.slow),
        pytest.param(50, ("--memory-gb", "0", "--workers", "2"), marks=pytest.mark.slow),
        pytest.param(50, ("--online-linear",), marks=pytest.mark.slow),
    ],
)
def test_nothing_grows_with_epochs(count, more, tmp_path):
    found = told(f"epochs(Path({str(tmp_path)!r}), {count}, *{more!r})")
    assert len(found) == count
    few, many = found[4], found[-2]  # the last one ends the run, and does more
    assert few["objects"] > 10_000 and few["tensors"] > 50
    for what in ("objects", "tensors", "descriptors", "threads", "children"):
        assert many[what] <= few[what], what
    assert many["resident MB"] < few["resident MB"] + 8


@pytest.mark.slow
def test_formulas():
    rows = told("[vars(row) for row in table(0.5)]")
    assert len(rows) == 14
    for row in rows:
        if "at most" in row["formula"]:
            assert row["measured"] < 1.1 * row["predicted"], row
        else:
            off = abs(row["measured"] - row["predicted"])
            slack = 0.2 if "decoded" in row["what"] else 0.1
            assert off < slack * row["predicted"] + 10 * MB, row  # small allocations leave gaps
