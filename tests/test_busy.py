"""On a machine that others use, a command slows down by its share of the cores, not to a halt."""

import json
import os
import subprocess
import sys
import time

import pytest

from tests.helpers import ROOT

BUSY = 4  # processes that compute without end
# it ends by itself if this process is killed
LOOP = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: sum(range(10_000))"
BATCH = 64


def pairs_per_second(out):
    """Of a short run of the demo as a user starts it: 100 steps, after 20 that warm up.

    At the half of a fair share it takes a minute; where it takes four, that is an answer too.
    """
    free = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-m", "simclr.pretrain", "demo", "--out", str(out)]
    command += ["--batch-size", str(BATCH), "--epochs", "1.5", "--warmup-epochs", "1"]
    command += ["--knn-every", "0", "--save-every", "0"]
    subprocess.run(command, cwd=ROOT, env=free, check=True, capture_output=True, timeout=240)
    rows = [json.loads(line) for line in (out / "timings.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 20, 40, 60, 80, 100, 120]
    return 5 / sum(1 / row["pairs_per_second"] for row in rows[2:])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="cores are counted as Linux does it")
def test_the_demo_beside_four_busy_processes_has_half_its_fair_share(tmp_path):
    """The demo computes on one thread. Its fair share is the part of a core that each of the busy
    processes has, at most min(1, n / 5) of n cores: on two cores 0.4, or less where still others
    compute. It is to make at least half that share of the pairs/s that it makes alone, so on two
    cores it takes 5 times as long at most. (Two threads that wait for each other at barriers make
    a few percent.)

    The better of two tries counts, as what else runs may come and go.
    """
    most = min(1, len(os.sched_getaffinity(0)) / (BUSY + 1))
    tries = []
    while len(tries) < 2 and not any(made >= share / 2 for made, share in tries):
        alone = pairs_per_second(tmp_path / f"alone-{len(tries)}")
        began = time.monotonic()
        loops = [subprocess.Popen([sys.executable, "-c", LOOP]) for _ in range(BUSY)]
        used = []
        try:
            beside = pairs_per_second(tmp_path / f"beside-{len(tries)}")
        finally:
            for loop in loops:
                loop.kill()
                used.append(os.wait4(loop.pid, 0)[2].ru_utime)
        share = min(most, sum(used) / BUSY / (time.monotonic() - began))
        tries.append((beside / alone, share))
    assert any(made >= share / 2 for made, share in tries), tries
