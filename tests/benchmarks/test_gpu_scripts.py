"""The script that measures on a GPU, as far as a CPU can say: its order, commands and records."""

import json
import math
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import byol.pretrain
import moco.pretrain
import simclr.pretrain
from common import cli
from common.config import flat
from common.encoders import full_name
from common.files import to_json
from eval.__main__ import parse as parse_judgements
from eval.results.page import read_folder
from eval.results.record import Result, write
from tests.benchmarks import jpegs, results_gpu
from tests.benchmarks.results_gpu import FIRST, LATER, Failed, Row, Settings

SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
PRETRAIN = {"simclr": simclr.pretrain, "moco": moco.pretrain, "byol": byol.pretrain}
CASES = results_gpu.CIFAR + results_gpu.R50 + results_gpu.SCHEDULES


def parsed(command):
    """(method's module, recipe, config, the run's) as the pretraining command itself reads it."""
    name, argv = command[0].removesuffix(".pretrain"), command[1:]
    module = PRETRAIN[name]
    return module, *cli.parse(name, module.Config, module.RECIPES, argv)


# ---- a machine that only notes what it is told, and how long that would take ---------------------


class Machine:
    """In the place of `execute` and of the clock: 15 s for a start, 20 for a judgement."""

    def __init__(self, folder, rate):
        self.keep, self.rate, self.now = folder / "results", rate, 1000.0
        self.commands, self.failing, self.pairs = [], set(), {}
        self.keep.mkdir()

    def monotonic(self):
        return self.now

    def spend(self, seconds, deadline):
        self.now, spent = min(deadline, self.now + seconds), self.now
        if self.now == deadline:
            raise TimeoutError
        return self.now - spent

    def execute(self, command, log, deadline, most=0):
        self.commands.append(command)
        self.spend(15, deadline)
        if any(word in " ".join(command) for word in self.failing):
            raise Failed("it says why")
        if command[0] == "eval":
            self.judge(command[1:], deadline)
        elif command[0] == results_gpu.RIGHT:
            figures = {"difference": 1e-12}
            known = {"title": "x", "command": "x", "device": "GPU", "commit": "x"}
            record = {"kind": "measurement", "figures": figures} | known
            for name in command[1 : command.index("--out")]:
                (self.keep / f"right-{name}.json").write_text(json.dumps(record))
        else:
            self.pretrain(command, deadline)

    def pretrain(self, command, deadline):
        module, recipe, cfg, run_cfg = parsed(command)
        folder, count = Path(run_cfg.out), 4096 if "jpegs" in cfg.data else 50_000
        folder.mkdir(parents=True, exist_ok=True)
        steps = module.total_steps(cfg, count)
        about = {"method": command[0].removesuffix(".pretrain"), "recipe": recipe}
        about |= {"config": flat(cfg, run_cfg), "images": count, "steps": steps, "launches": []}
        (folder / "config.json").write_text(to_json(about))
        done, begun = self.pairs.get(folder, 0), self.now
        try:
            self.spend((steps * cfg.batch_size - done) / self.rate, deadline)
        except TimeoutError:
            self.pairs[folder] = done + (self.now - begun) * self.rate
            raise
        row = {"pairs_per_second": self.rate, "data_wait": 0.01, "peak_memory_gb": 2.0}
        rows = [json.dumps({"step": step} | row) for step in range(0, steps, run_cfg.log_every)]
        (folder / "timings.jsonl").write_text("\n".join(rows) + "\n")
        save_file({"x": torch.ones(1)}, folder / "encoder.safetensors", {"finished": "true"})

    def judge(self, words, deadline):
        found = []
        for name, settings in parse_judgements(words):
            if name != "compare":
                self.spend(20, deadline)
                for k in settings.k if name == "knn" else (0,):
                    protocol = getattr(settings, "protocol", "weighted") or "simclr"
                    found.append((name, protocol, settings.layer or 0, k))
                continue
            row, epochs = row_of(Path(settings.runs[0]).name)
            for key in found:
                supervised = key[0] == "finetune"
                judged = result_of(row, epochs, key, subject="random" if supervised else "encoder")
                write(judged, Path(settings.keep) / f"{row.name}-{epochs}-{key}.json")


def row_of(run):
    """(row, epochs) of a run's folder."""
    settings = Settings(out="")
    [found] = {
        (row.method, row.recipe, row.seed, row.arch, row.batch_size, epochs)
        for row in FIRST + LATER
        for epochs in row.sizes
        if row.folder(epochs, settings).name == run
    }
    method, recipe, seed, arch, batch_size, epochs = found
    return Row(method, recipe, (epochs,), seed, arch, batch_size), epochs


def result_of(row, epochs, key, **changes):
    """The record of a judgement of a row."""
    task, protocol, layer, k = key
    fields = {"task": task, "protocol": protocol, "layer": layer, "epochs": epochs}
    fields |= {"subject": "encoder", "data": "cifar10-jpeg", "columns": {}, "deviations": ()}
    fields |= {"metric": "top1", "metrics": {"top1": 5.0}, "interval": 1.0}
    fields |= {"train_images": 9, "test_images": 9, "settings": {"k": k} if k else {}}
    fields |= {"changed": {}, "run_id": "", "method": row.method, "recipe": row.recipe}
    fields |= {"encoder": full_name(row.arch, "cifar"), "seed": row.seed, "published": None}
    fields |= {"run": {"seed": row.seed, "epochs": epochs, "batch_size": row.batch_size}}
    return Result(**fields | {"pretrained_at": None, "judged": {}, "seconds": None} | changes)


@pytest.fixture
def machine(tmp_path, monkeypatch, capsys):
    """Call the script on a machine of some pairs/s; it gives the commands that it executed.

    Then `shown` is what it printed, and `found` what became of each stage.
    """
    made = Machine(tmp_path, rate=12_500)  # 4 s an epoch

    def call(*words):
        made.commands.clear()
        argv = ["results_gpu.py", "--cpu", "--keep", str(made.keep), *words]
        monkeypatch.setattr(sys, "argv", [*argv, "--out", str(tmp_path / "runs")])
        capsys.readouterr()
        try:
            cli.run(results_gpu.main)
        finally:
            made.shown = capsys.readouterr().out
            made.found = outcomes(made.shown)
        return [" ".join(command) for command in made.commands]

    made.call, before = call, {s: signal.getsignal(s) for s in SIGNALS}
    monkeypatch.setattr(results_gpu, "time", SimpleNamespace(monotonic=made.monotonic))
    monkeypatch.setattr(results_gpu, "execute", made.execute)
    monkeypatch.setattr(results_gpu, "CHECKS", ["losses", "views"])
    monkeypatch.setattr(results_gpu, "jpegs", lambda *_: ("x/jpegs-2048", "generated JPEGs"))
    yield made
    for signum, handler in before.items():
        signal.signal(signum, handler)


def outcomes(shown):
    """{stage: what became of it} by the summary, which repeats what was said as each ended."""
    ended, summary = [
        [x for x in part.splitlines() if x[-3:] != "..."] for part in (*shown.split("\n\n"), "")[:2]
    ]
    assert ended == summary[: len(ended)] or not summary
    return {line[:57].strip(): line[57:] for line in summary}


def test_all_stages_in_order_and_each_once(machine):
    machine.call()
    found = machine.found
    names = [
        "right",
        *(f"speed-cifar10-{name}" for name in ("simclr", "byol", "moco", "moco-symmetric")),
        "speed-r50-256", "speed-r50-4096-cached",
        *(f"speed-imagenet-{name}" for name in ("simclr", "moco", "byol")),
        *(row.name for row in FIRST + LATER),
    ]  # fmt: skip
    assert [*found] == names and len({*names}) == len(names)
    assert all(outcome.startswith("measured") for outcome in found.values())
    assert machine.call() == []
    assert {*machine.found.values()} == {"was there"}
    shown = machine.shown
    assert "; seconds per epoch 4 (" in shown and "difference 1e-12" in shown  # the figures
    assert "SimCLR cifar10, 200 epochs" in shown and "5.0 ± 1.0" in shown


def test_what_another_gpu_has_measured_is_measured_here(machine, monkeypatch):
    machine.call("--only", "right")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU")
    assert machine.call("--only", "right") == []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "another GPU")
    assert len(machine.call("--only", "right")) == 1


def test_the_list_shows_and_does_nothing(machine):
    machine.call("--only", "right")
    assert machine.call("--list") == []
    lines = machine.shown.splitlines()
    others = len(CASES) + len(FIRST + LATER)
    assert [line.endswith(" not measured") for line in lines] == [False] + [True] * others


def test_some_minutes_at_a_time(machine):
    """A call ends in its time, rows without a figure come first, and more time betters one."""
    shown = []

    def call(minutes):
        began = machine.now
        machine.call("--minutes", str(minutes))
        assert machine.now <= began + minutes * 60
        shown.append(machine.found)
        return {row.name: most(row) for row in FIRST}

    def most(row):
        results = results_gpu.kept(str(machine.keep))
        return max((epochs for epochs, _ in results_gpu.there(results, row)), default=0)

    names = [row.name for row in FIRST]
    after = call(10)
    # seven short stages, of 15 s and their steps: 50 epochs fit into what is left, but not twice
    assert [after[name] for name in names] == [50, 0, 0, 0]
    assert shown[0]["right"].startswith("measured")
    assert shown[0][names[1]] == "no time" == shown[0][f"{names[0]}-protocols"]
    assert [*shown[0]][-3:] == [case.stage for case in results_gpu.SCHEDULES]
    after = call(11)
    assert [after[name] for name in names] == [50, 100, 0, 0]
    assert [name for name in shown[1] if name in names] == [*names[1:], names[0]]
    call(11)
    after = call(11)
    assert [after[name] for name in names] == [50, 100, 100, 100]
    after = call(30)  # 200 epochs take 15 minutes and a half: one row
    assert [after[name] for name in names] == [200, 100, 100, 100]


@pytest.mark.parametrize(
    "left, epochs, needs",
    [
        (math.inf, 200, 864 + 75), (939, 200, 939), (938, 100, 507), (507, 100, 507),
        (506, 50, 291), (290, 0, math.inf),
    ],
)  # fmt: skip
def test_the_most_epochs_that_fit(left, epochs, needs, machine):
    """4 s an epoch and 8 % more, 15 s for the start and 60 for the judgement."""
    figures = {"seconds_per_epoch": 4.0, "start_seconds": 15.0}
    record = {"title": "x", "figures": figures, "command": "x", "device": "x", "commit": "x"}
    path = machine.keep / "speed-cifar10-moco-symmetric.json"
    settings = Settings(keep=str(machine.keep), out=str(machine.keep / "runs"))
    row = FIRST[3]
    if left < math.inf:  # without its speed nothing is known to fit
        assert results_gpu.plan(row, False, settings, left) == (0, math.inf)
    path.write_text(json.dumps({"kind": "measurement"} | record))
    found = results_gpu.plan(row, False, settings, left)
    assert found == (epochs, pytest.approx(needs))
    for kept in (50, 100):  # there, if no more would fit
        for keys, _ in row.judgements("", kept):
            for key in keys:
                write(result_of(row, kept, key), machine.keep / f"{kept}-{key}.json")
        found = results_gpu.plan(row, False, settings, left)
        assert (found == (0, 0)) == (kept >= epochs)
    assert results_gpu.plan(row, True, settings, left)[0] == epochs  # --again


def test_a_run_that_was_begun_keeps_its_epochs(machine):
    machine.call("--only", "speed-cifar10")
    machine.rate /= 2  # slower than it was measured
    byol = FIRST[1].name
    machine.call("--only", byol, "--minutes", "9")
    assert machine.found == {byol: "no time, begun", f"{byol}-protocols": "no time"}
    [first] = machine.commands
    machine.call("--only", byol, "--minutes", "9")  # in which 100 epochs do not fit, but the rest
    assert machine.found[byol].startswith("measured")
    assert machine.commands[0] == first and first[0] == "byol.pretrain"
    machine.call("--only", f"{byol}-protocols")  # of the run that there is, which is not made again
    assert [command[0] for command in machine.commands] == ["eval"]


def test_a_failure_does_not_stop_the_queue(machine):
    machine.failing.update({"byol.pretrain cifar10", "right losses"})
    with pytest.raises(SystemExit) as caught:
        machine.call("--minutes", "60")
    failed = [name for name, outcome in machine.found.items() if outcome.startswith("FAILED")]
    assert caught.value.code == 1
    assert failed == ["right", "speed-cifar10-byol"]  # of whose row nothing is known to fit
    log = Path(sys.argv[sys.argv.index("--out") + 1]) / "right.log"
    assert machine.found["right"] == f"FAILED: it says why; see {log}"
    assert machine.found["speed-cifar10-moco"].startswith("measured")
    machine.failing.clear()
    [command] = machine.call("--only", "right")
    assert "right losses views --out" in command
    (machine.keep / "right-losses.json").unlink()
    [command] = machine.call("--only", "right")
    assert "right losses --out" in command


@pytest.mark.parametrize(
    "signum, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_stopped_by_a_signal_the_same_command_goes_on(signum, status, machine, monkeypatch):
    names = [case.stage for case in results_gpu.CIFAR]

    def stopped(command, *others, **named):
        if "byol" in command[0]:
            signal.raise_signal(signum)
        machine.execute(command, *others, **named)

    monkeypatch.setattr(results_gpu, "execute", stopped)
    # as in a terminal: a shell starts what is in the background with SIGINT ignored
    signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
    with pytest.raises(SystemExit) as caught:
        machine.call("--only", "speed-cifar10")
    assert caught.value.code == status
    assert [*machine.found.values()] == ["measured in 20 s", *["not reached"] * 3]
    monkeypatch.setattr(results_gpu, "execute", machine.execute)
    machine.call("--only", "speed-cifar10")
    assert [*machine.found] == names and machine.found[names[0]] == "was there"
    assert all(machine.found[name].startswith("measured") for name in names[1:])


def test_a_hangup_is_ignored_under_nohup(machine):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    machine.call("--only", "speed-cifar10-byol")
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_a_fault_that_nobody_thought_of_does_not_stop_the_queue(machine, monkeypatch):
    def odd(command, *others, **named):
        if "byol" in command[0]:
            raise RuntimeError("odd")
        machine.execute(command, *others, **named)

    monkeypatch.setattr(results_gpu, "execute", odd)
    with pytest.raises(SystemExit):
        machine.call("--only", "speed-cifar10")
    log = Path(sys.argv[sys.argv.index("--out") + 1]) / "speed-cifar10-byol.log"
    assert machine.found["speed-cifar10-byol"] == f"FAILED: RuntimeError: odd; see {log}"
    assert machine.found["speed-cifar10-moco"].startswith("measured")
    assert "Traceback" in log.read_text()


def test_one_measurement_at_a_time(machine, tmp_path):
    """Nor beside a command that one has left, which was killed."""
    (tmp_path / "runs").mkdir()
    with results_gpu.alone(tmp_path / "runs"):
        child = subprocess.Popen(sleeping_words(), close_fds=False)
    try:
        with pytest.raises(SystemExit) as caught:
            machine.call("--only", "speed-cifar10-byol")
        assert caught.value.code == 2 and not machine.commands
    finally:
        child.kill()
        child.wait()
    assert machine.call("--only", "speed-cifar10-byol")


def sleeping_words():
    return [sys.executable, *("-m", "timeit", "-n", "1", "-r", "1", "import time; time.sleep(60)")]


@pytest.mark.parametrize("figures", [[], {}, {"seconds_per_epoch": "x", "start_seconds": 1}])
def test_a_record_without_a_speed(figures, machine, capsys):
    known = {"kind": "measurement", "title": "x", "command": "x", "device": "x", "commit": "x"}
    path = machine.keep / "speed-cifar10-byol.json"
    path.write_text(json.dumps(known | {"figures": figures}))
    if figures == []:  # no measurement
        machine.call("--list", "--only", "byol")
        assert "speed-cifar10-byol" in machine.shown and " not measured" in machine.shown
        return
    with pytest.raises(SystemExit) as caught:
        machine.call("--list", "--only", "byol")
    assert caught.value.code == 2


def test_a_damaged_encoder_is_not_a_finished_run(tmp_path):
    (tmp_path / "encoder.safetensors").write_bytes(b"x" * 99)
    assert not results_gpu.is_finished(tmp_path)


def test_measured_anew_on_demand(machine):
    machine.call("--only", "speed-cifar10-moco")
    first = machine.call("--only", "speed-cifar10-moco", "--again", "symmetric")
    assert len(first) == 1 and "cifar10-symmetric" in first[0]
    name = FIRST[2].name
    machine.call("--only", name)
    assert machine.call("--only", name) == []
    anew = machine.call("--only", name, "--again", f"{name}-p")  # judged, but not trained
    assert [command.split()[0] for command in anew] == ["eval"]
    anew = machine.call("--only", name, "--again", name)
    assert [command.split()[0] for command in anew] == ["moco.pretrain", "eval", "eval"]


def test_every_command_is_what_was_asked_for():
    settings = Settings(out="OUT", flags="--log-every 7")
    for case in CASES:
        count = results_gpu.FILES if case.imagenet else 50_000
        command = results_gpu.speed_command(case, "demo", settings)
        module, recipe, cfg, run_cfg = parsed(command)
        assert abs(module.total_steps(cfg, count) - case.steps) <= 1
        assert cfg.batch_size == case.batch_size and run_cfg.precision == "bf16"
        assert run_cfg.log_every == 7
        if case in results_gpu.SCHEDULES:  # eight of these are the paper's batch
            assert case.batch_size * results_gpu.GPUS == module.RECIPES[recipe][0].batch_size
    for row in FIRST + LATER:
        epochs = row.sizes[-1]
        module, recipe, cfg, run_cfg = parsed(row.command(epochs, settings))
        assert (cfg.epochs, run_cfg.seed, run_cfg.precision) == (epochs, row.seed, "bf16")
        assert (recipe, cfg.arch, cfg.batch_size) == (row.recipe, row.arch, row.batch_size)
        assert (run_cfg.knn_every, run_cfg.save_every, run_cfg.log_every) == (20, 10, 7)
        assert cfg.stem == "cifar" and run_cfg.out.endswith(f"-{epochs}ep-seed{row.seed}")


def test_a_row_of_another_judgement_is_not_it():
    row, key = FIRST[0], ("knn", "weighted", 0, 200)
    assert results_gpu.there([result_of(row, 100, key)], row) == {(100, key)}
    for change in (
        {"encoder": "resnet18"}, {"subject": "pixels"}, {"seed": 2}, {"epochs": 10},
        {"run": {"batch_size": 128}}, {"recipe": "cifar10-r50"},
    ):  # fmt: skip
        assert not results_gpu.there([replace(result_of(row, 100, key), **change)], row), change


# ---- commands for real ---------------------------------------------------------------------------


def sleeping(stubborn=""):
    """A command that sleeps, and does not end when it is told to if it is stubborn."""
    ignoring = "import signal, time; signal.signal(15, signal.SIG_IGN); " * bool(stubborn)
    return ["timeit", "-n", "1", "-r", "1", "-s", "import time", f"{ignoring}time.sleep(60)"]


def test_a_command_is_ended_when_the_time_is_up(tmp_path, monkeypatch):
    monkeypatch.setattr(results_gpu, "GRACE", 0.5)
    log, began = tmp_path / "log", time.monotonic()
    with pytest.raises(TimeoutError):
        results_gpu.execute(sleeping("stubborn"), log, began + 0.7)
    with pytest.raises(Failed, match="takes more than 0 s"):
        results_gpu.execute(sleeping(), log, math.inf, most=0.1)
    with pytest.raises(Failed, match=r"no_such_module: .*No module"):
        results_gpu.execute(["no_such_module"], log, math.inf)
    results_gpu.execute(["timeit", "-n", "1", "-r", "1"], log, math.inf)
    assert time.monotonic() - began < 20 and log.read_text().count("$ python -m timeit") == 3


@pytest.mark.parametrize(
    "words, said",
    [
        (["--only", "none"], "--only none"),
        (["--again", "none"], "--again none"),
        (["--only", "byol"], "no GPU"),
        (["--minutes", "-1"], "--minutes -1"),
        (["--minutes", "nan"], "--minutes nan"),
        (["--images", "0"], "--images 0"),
        (["--workers", "0"], "--workers 0"),
        (["--flags", "'x"], "--flags 'x"),
        (["--cpu", "--keep", __file__], "--keep"),
        (["--cpu", "--keep", tempfile.gettempdir(), "--out", __file__], "--out"),
        (["--cpu", "--only", "byol"], "--keep"),
    ],
)
def test_mistakes_are_one_line(words, said, machine, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["results_gpu.py", *words])
    with pytest.raises(SystemExit) as caught:
        cli.run(results_gpu.main)
    assert caught.value.code == 2 and said in capsys.readouterr().err


def test_make_passes_on_the_minutes_and_where_cifar_10_is():
    words = ["make", "-n", "-o", ".venv/ready", "results-gpu", "MINUTES=7", "DATA=a folder"]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    said = subprocess.run(words, capture_output=True, text=True, check=True, env=alone).stdout
    assert shlex.split(said)[1:] == [
        *("-m", "tests.benchmarks.results_gpu", "--minutes", "7", "--data", "a folder")
    ]


def test_generated_images_have_the_sizes_of_imagenet(tmp_path):
    sizes = [jpegs.draw_size(np.random.default_rng(i)) for i in range(2000)]
    assert np.allclose(np.mean(sizes, axis=0), (480, 410), atol=30)
    assert np.median(sizes, axis=0).tolist() == [500, 375]
    folder, about = jpegs.jpegs(tmp_path, 11, 8, workers=2)
    paths = sorted(Path(folder).iterdir())
    assert len(paths) == 11 and "8 generated" in about
    assert paths[9].read_bytes() == paths[1].read_bytes() != paths[2].read_bytes()
    width, height = np.array([Image.open(path).size for path in paths[:8]]).T
    written = sum(path.stat().st_size for path in paths[:8])
    assert 0.4 < written / (width * height).sum() < 0.8  # bytes a pixel: 110 kB at 500 x 375
    assert jpegs.jpegs(tmp_path, 11, 8, 2, -math.inf) == (folder, about)  # not made again
    with pytest.raises(TimeoutError):
        jpegs.jpegs(tmp_path, 11, 9, 2, -math.inf)


def pictures(folder):
    """Noise of three colours, in class folders of two splits."""
    draw = np.random.default_rng(0)
    for i in range(96):
        path = folder / ("train" if i < 64 else "test") / "rgb"[i % 3] / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 180, (20, 20, 3))
        pixels[..., i % 3] += 70
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Call the script itself, with stages of few small images and steps."""

    def smaller(cases):
        for case in cases:
            flags = ["--arch", "demo", "--image-size", "32", "--epochs", "0.75"]
            flags += ["--bn-splits", "2"] if case.method == "moco" else []
            flags += ["--grad-cache-chunk", "4"] if "cached" in case.stage else []
            yield replace(case, batch_size=16, steps=case.steps // 5, flags=tuple(flags))

    for name in ("CIFAR", "R50", "SCHEDULES"):
        monkeypatch.setattr(results_gpu, name, [*smaller(getattr(results_gpu, name))])
    flags = "--image-size 32 --precision fp32 --workers 0 --log-every 1"

    def smallest(row, **changes):
        more = ("--bn-splits", "2") if row.method == "moco" else ()
        return replace(row, sizes=(1,), arch="demo", batch_size=16, flags=more, **changes)

    monkeypatch.setattr(results_gpu, "FIRST", [smallest(row) for row in FIRST])
    later = [smallest(row) for row in LATER[:1]] + [smallest(FIRST[1], judging="protocols")]
    monkeypatch.setattr(results_gpu, "LATER", later)
    monkeypatch.setattr(results_gpu, "FILES", 64)
    monkeypatch.setattr(results_gpu, "CHECKS", ["views", "grad-cache"])  # the quick ones
    monkeypatch.setenv("PYTHONPATH", f"{Path.cwd()}:{tmp_path}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    data, keep = pictures(tmp_path / "images"), tmp_path / "results"
    keep.mkdir()
    argv = ["--cpu", "--data", str(data), "--out", str(tmp_path / "runs"), "--keep", str(keep)]
    argv += ["--images", "6", f"--flags={flags}", "--workers", "1"]

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["results_gpu.py", *argv, *words])
        cli.run(results_gpu.main)
        return {path.stem: record for path, record in read_folder(keep)}

    return call


def test_one_stage_for_real(small, tmp_path, capsys):
    records = small("--only", "speed-cifar10-simclr", "--minutes", "3")
    [(name, record)] = records.items()
    assert name == "speed-cifar10-simclr" and "; images; --image-size 32" in record["title"]
    assert str(tmp_path) not in record["command"] and ".pretrain cifar10" in record["command"]
    figures = record["figures"]
    assert 0 <= figures["data_wait"] <= 1 and 1 < figures["start_seconds"] < 60
    rate = figures["pairs_per_second"]
    assert figures["seconds_per_epoch"] == pytest.approx(64 / rate, abs=1e-3)
    assert record["device"].startswith("CPU") and record["commit"]
    assert (tmp_path / "runs" / "speed-cifar10-simclr.log").exists()
    assert outcomes(capsys.readouterr().out)[name].startswith("measured in")


@pytest.mark.slow
def test_every_stage_for_real_on_a_small_scale(small, tmp_path, capsys):
    """Every stage with its own commands; then nothing is left to do."""
    records = small()
    stages = outcomes(capsys.readouterr().out)
    assert all(outcome.startswith("measured") for outcome in stages.values())
    for name in stages:
        assert name in records or name == "right" or name.startswith("row-")
    assert {f"right-{check}" for check in results_gpu.CHECKS} <= records.keys()
    for method in ("simclr", "moco", "byol"):
        record = records[f"speed-imagenet-{method}"]
        figures = record["figures"]
        assert "6 generated JPEGs" in record["title"] and figures["batch_size"] == 16
        hours = (
            figures["schedule_epochs"] * results_gpu.IMAGENET / figures["pairs_per_second"] / 3600
        )
        assert figures["schedule_hours_on_8"] == pytest.approx(hours / 8, rel=1e-3)
    cached = records["speed-r50-4096-cached"]["figures"]
    whole = records["speed-r50-256"]["figures"]["pairs_per_second"]
    more = 100 * (whole / cached["pairs_per_second"] - 1)
    assert cached["more_time_a_pair_percent"] == pytest.approx(more, abs=0.1)
    results = [record for record in records.values() if isinstance(record, Result)]
    for row in results_gpu.FIRST + results_gpu.LATER:
        assert not results_gpu.missing(results, row, 1)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    small()
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()} == before
