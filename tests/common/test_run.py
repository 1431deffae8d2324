"""A run on disk: what it refuses, what it keeps, and where it goes on."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from torch import nn

from common.cli import UserError
from common.run import FREE, Run, drop_rows_from, launch, read_json, written_aside
from eval.encoder import Input, build_seeded, load, metadata


@dataclass(frozen=True)
class Config:
    out: str
    batch_size: int = 10
    log_every: int = 3
    temperature: float = 0.5
    arch: str = "demo"
    workers: int = 2
    memory_gb: float = 1.0
    processes: int = 0
    compile: bool = False
    estimate: bool = False
    profile: bool = False
    precision: str = "fp32"


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture
def open_run(tmp_path, accelerator):
    def call(method="simclr", count=100, total=20, **other):
        cfg = replace(Config(str(tmp_path / "run")), **other)
        return Run(cfg, method, "tiny", accelerator, count, total)

    return call


def parts(seed=0):
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer}


def names(run):
    return sorted(path.name for path in (run.folder / "checkpoints").iterdir())


# ---- config.json ---------------------------------------------------------------------------------


def test_the_record_of_a_run(open_run):
    open_run()
    run = open_run()
    record = read_json(run.folder / "config.json")
    assert record["method"] == "simclr" and record["recipe"] == "tiny"
    assert record["images"] == 100 and record["steps"] == 20
    assert record["config"]["temperature"] == 0.5
    assert len(record["launches"]) == 2
    launched = record["launches"][0]
    assert launched["processes"] == 1 and launched["versions"]["torch"] == torch.__version__
    assert {"command", "commit", "device", "started"} <= launched.keys()
    assert (run.folder / "results").is_dir()


def test_a_changed_file_marks_the_commit_and_a_changed_record_does_not(tmp_path):
    def git(*args):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", tmp_path, *who, *args], check=True, capture_output=True)

    common = Path(__file__).resolve().parents[2] / "common"
    shutil.copytree(common, tmp_path / "common", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "a.json").write_text("{}")
    git("init")
    git("add", ".")
    git("commit", "-m", "all")

    def commit():
        code = "from common.run import commit; print(commit())"
        env = os.environ | {"PYTHONPATH": f"{tmp_path}:{common.parent}"}
        run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True,
                             capture_output=True, text=True)  # fmt: skip
        return run.stdout.strip()

    (tmp_path / "results" / "a.json").write_text("[]")
    assert re.fullmatch("[0-9a-f]{12}", commit())
    (tmp_path / "common" / "demo.py").write_text("")
    assert commit().endswith("+")


def test_a_second_command_on_a_folder_is_refused_while_the_first_runs(open_run):
    run = open_run()
    code = (
        "from accelerate import Accelerator; from common.run import Run; "
        "from tests.common.test_run import Config; "
        f"Run(Config({str(run.folder)!r}), 'simclr', 'tiny', Accelerator(cpu=True), 100, 20)"
    )
    second = [sys.executable, "-c", code]
    refused = subprocess.run(second, capture_output=True, text=True)
    assert refused.returncode and "another command is training there" in refused.stderr
    assert len(read_json(run.folder / "config.json")["launches"]) == 1
    run._lock.close()  # as the end of its process does
    subprocess.run(second, check=True)


def test_another_config_is_refused_by_the_fields_that_differ(open_run):
    open_run()
    before = read_json(open_run().folder / "config.json")
    with pytest.raises(UserError) as caught:
        open_run(temperature=0.1, batch_size=20, workers=9)
    line = str(caught.value)
    assert "temperature 0.5 (now 0.1)" in line and "batch_size 10 (now 20)" in line
    assert "arch" not in line and "workers" not in line and "\n" not in line
    with pytest.raises(UserError, match=r"method 'simclr' \(now 'byol'\)"):
        open_run(method="byol")
    with pytest.raises(UserError, match=r"images 100 \(now 99\)"):
        open_run(count=99)
    assert read_json(open_run().folder / "config.json")["config"] == before["config"]


def test_free_fields_may_differ(open_run):
    open_run()
    changed = {"workers": 5, "memory_gb": 9.0, "processes": 1, "compile": True, "profile": True}
    assert {*changed, "out", "estimate"} == FREE
    run = open_run(**changed)
    assert read_json(run.folder / "config.json")["config"]["workers"] == 5


def test_a_damaged_record_is_one_line(open_run):
    run = open_run()
    (run.folder / "config.json").write_text('{"method": ')
    with pytest.raises(UserError, match=r"config\.json: cannot be read"):
        open_run()


def test_an_output_that_cannot_be_written(tmp_path, open_run):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        open_run(out=str(tmp_path / "file" / "sub"))
    with pytest.raises(UserError, match="cannot be written"):
        open_run(out=str(tmp_path / "file"))


def test_launched_processes_are_counted():
    assert launch("fp32", 0).num_processes == launch("fp32", 1).num_processes == 1
    with pytest.raises(UserError, match="--processes 2 asked for, 1 launched"):
        launch("fp32", 2)


def test_single_precision_is_full_but_in_convolutions():
    torch.backends.cuda.matmul.allow_tf32 = True
    launch("fp32", 0)
    assert torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"


# ---- checkpoints ---------------------------------------------------------------------------------


def test_a_checkpoint_brings_everything_back(open_run):
    saved, run = parts(0), open_run()
    run.resume(saved)
    assert run.first == 0
    run.save(7, saved)
    again, fresh = open_run(), parts(1)
    assert not torch.equal(fresh["model"].weight, saved["model"].weight)
    again.resume(fresh)
    assert again.first == 7
    assert torch.equal(fresh["model"].weight, saved["model"].weight)
    momentum = [p["optimizer"].state_dict()["state"][0]["momentum_buffer"] for p in (fresh, saved)]
    assert torch.equal(*momentum)


def test_the_last_two_are_kept(open_run):
    run = open_run()
    for step in (3, 12, 100, 1000):
        run.save(step, parts())
    assert names(run) == ["step-00000100.pt", "step-00001000.pt"]


def test_a_torn_newest_checkpoint_gives_way_to_the_one_before(open_run, capsys):
    run = open_run()
    run.save(5, parts(5))
    run.save(9, parts(9))
    newest = run.folder / "checkpoints" / "step-00000009.pt"
    whole = newest.read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(parts(9)["model"].weight.detach().numpy().tobytes())] ^= 1
    for content in (whole[:-100], b"", b"garbage", flipped):
        newest.write_bytes(content)
        again, fresh = open_run(), parts(1)
        again.resume(fresh)
        assert again.first == 5
        assert torch.equal(fresh["model"].weight, parts(5)["model"].weight)
        said = capsys.readouterr().err
        assert "step-00000009.pt" in said and "cannot be read" in said and "step 5 of 20" in said
    (run.folder / "checkpoints" / "step-00000005.pt").write_bytes(b"")
    again = open_run()
    again.resume(parts(1))
    assert again.first == 0


def test_a_checkpoint_is_whole_or_not_there(open_run, monkeypatch):
    run = open_run()
    run.save(5, parts())

    def torn(state, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(KeyboardInterrupt):
        run.save(6, parts())
    assert names(run) == ["step-00000005.pt"]


def test_what_a_kill_left_aside_is_not_a_checkpoint(open_run):
    run = open_run()
    run.save(5, parts())
    (run.folder / "checkpoints" / ".step-00000006.pt.123").write_bytes(b"half")
    again = open_run()
    again.resume(parts())
    assert again.first == 5


def test_written_aside_leaves_the_old_file_on_failure(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(UserError, match="cannot be written"), written_aside(target) as aside:
        aside.write_text("new")
        assert target.read_text() == "old"
        raise OSError
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]
    with written_aside(target) as aside:
        aside.write_text("new")
    assert target.read_text() == "new" and list(tmp_path.iterdir()) == [target]


# ---- metrics -------------------------------------------------------------------------------------


def test_rows_from_the_resumed_step_on_and_torn_lines_go(tmp_path):
    path = tmp_path / "metrics.jsonl"
    drop_rows_from(path, 3)
    assert not path.exists()
    whole = b"".join(b'{"step": %d, "loss": 1.5}\n' % step for step in range(6))
    path.write_bytes(whole + b'{"step": 2, "lo')
    drop_rows_from(path, 4)
    assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:4])
    path.write_bytes(whole + b'{"step": 1}')  # whole but for its end: written again
    drop_rows_from(path, 9)
    assert path.read_bytes() == whole


def test_resuming_truncates_to_the_checkpoint(open_run):
    run = open_run()
    run.save(4, parts())
    for name in ("metrics.jsonl", "timings.jsonl"):
        lines = "".join(json.dumps({"step": step, "x": 0.1}) + "\n" for step in range(8))
        (run.folder / name).write_text(lines)
    again = open_run()
    again.resume(parts())
    for name in ("metrics.jsonl", "timings.jsonl"):
        rows = [json.loads(line) for line in (run.folder / name).read_text().splitlines()]
        assert [row["step"] for row in rows] == [0, 1, 2, 3]


def test_a_steps_values_are_one_line_and_a_checkpoint_is_never_ahead_of_it(open_run):
    run = open_run()
    run._bar = type("Bar", (), {"set_postfix": lambda *a, **k: None})()
    run.log(6, loss=torch.tensor(1.25), lr=0.5)
    run.log(6, knn=50.0)
    run.save(7, parts())
    run._write_row()
    assert (run.folder / "metrics.jsonl").read_text() == (
        '{"step": 6, "loss": 1.25, "lr": 0.5, "knn": 50.0}\n'
    )


def test_logged_steps(open_run):
    run = open_run(total=20, log_every=6)
    assert [step for step in range(20) if run.logs(step)] == [0, 6, 12, 18, 19]


@pytest.mark.parametrize(
    ("count", "total", "epochs", "expected"),
    [
        (100, 35, 1, [9, 19, 29, 34]),  # ten steps an epoch
        (100, 30, 0.5, [4, 9, 14, 19, 24, 29]),
        (95, 30, 1, [9, 18, 28, 29]),  # an epoch ends within a step
        (1000, 7, 1, [6]),  # less than one epoch: at the end
        (3, 4, 1, [0, 1, 2, 3]),  # several epochs a step
        (100, 4, 1e-320, [0, 1, 2, 3]),
        (100, 4, 1e308, [3]),
        (3200, 20, 0.0125, [3, 7, 11, 15, 19]),  # every four steps, whatever a float rounds
    ],
)
def test_due_at_multiples_of_epochs_and_at_the_end(open_run, count, total, epochs, expected):
    run = open_run(count=count, total=total)
    assert [step for step in range(total) if run.due(step, epochs)] == expected


def test_a_warning_is_said_once_until_it_is_over(open_run, capsys):
    run = open_run()
    for line in ("bad", "bad", None, "bad"):
        run.warn_once(line)
    assert capsys.readouterr().err.splitlines() == ["bad", "bad"]


# ---- export --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_export_gives_the_same_features_bit_for_bit(open_run, dtype):
    run = open_run(total=20)
    encoder = build_seeded({"arch": "demo", "stem": "imagenet"})
    for buffer in encoder.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    head = nn.Sequential(nn.Linear(encoder.num_features, 4), nn.ReLU())
    about = metadata("demo", "imagenet", Input.of(32), "a-row")
    run.export(13, encoder.to(dtype), head, **about)

    again = load(str(run.folder))
    images = torch.rand(5, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again.network(images), encoder.float()(images))
    assert not again.network.training and again.name == "encoder" and again.input == Input.of(32)
    known = {"method": "simclr", "recipe": "tiny", "epochs": 1.3, "finished": False}
    assert known.items() <= again.about.items() and again.about["published"] == "a-row"
    assert again.about["commit"]
    with safe_open(run.folder / "encoder.safetensors", framework="pt") as file:
        kept = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert {key for key in kept if key.startswith("head.")} == {"head.0.weight", "head.0.bias"}
    assert {t.dtype for t in kept.values()} == {torch.float32, torch.int64}
    run.export(20, encoder, head, **about)
    assert load(str(run.folder)).about["finished"] is True


# ---- before its time -----------------------------------------------------------------------------


def test_what_is_not_finite_is_never_saved(open_run):
    run, lost = open_run(), parts()
    run.save(5, lost)
    with pytest.raises(UserError, match=r"at step 6; the last checkpoint is kept.*--base-lr"):
        run.log(6, loss=torch.tensor(torch.nan), lr=0.1)
    with torch.no_grad():
        lost["model"].bias[0] = torch.inf
    with pytest.raises(UserError, match="at step 9"):
        run.save(9, lost)
    with pytest.raises(UserError, match="at step 9"):
        run.export(9, lost["model"], nn.Sequential())
    assert names(run) == ["step-00000005.pt"]
    assert not (run.folder / "metrics.jsonl").exists()
    assert not (run.folder / "encoder.safetensors").exists()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_the_step(open_run, capsys, signum):
    """A second one kills; afterwards the handlers are as before."""
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    run, state = open_run(), parts()
    run.resume(state)
    with pytest.raises(SystemExit) as caught:
        for step, _ in run.steps(lambda first, last: iter([torch.zeros(2, 1)] * (last - first))):
            run.log(step, loss=1.0)
            if step == 6:
                os.kill(os.getpid(), signum)
                assert signal.getsignal(signum) == signal.SIG_DFL
    assert caught.value.code == 128 + signum
    assert f"stopped by {signum.name} after step 7;" in capsys.readouterr().err
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before
    again = open_run()
    again.resume(state)
    assert again.first == 7


def test_what_a_kill_left_aside_goes(open_run):
    run = open_run()
    left = (".config.json.123", ".encoder.safetensors.45", "checkpoints/.step-00000006.pt.123")
    others = (".config.json.mine", ".vimrc.1")
    for name in (*left, *others):
        (run.folder / name).write_bytes(b"half")
    open_run()
    assert [name for name in (*left, *others) if (run.folder / name).exists()] == list(others)
