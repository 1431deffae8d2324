"""A run on disk: what it records, what it refuses, what it logs and exports, where it goes on."""

import json
import multiprocessing
import os
import signal
from dataclasses import dataclass

import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from torch import nn

from common.config import RunConfig
from common.data import ImageSplit
from common.errors import UserError
from common.files import read_json
from common.run import Run, lock
from eval.encoder import Preprocess, build_seeded, export_metadata, load_encoder
from tests.helpers import rows


@dataclass(frozen=True)
class Config:
    data: str = "x"
    arch: str = "demo"
    batch_size: int = 10
    temperature: float = 0.5

    def advice(self):
        return ["a word of advice"]


VIEWS = (torch.rand(10, 3, 4, 4), torch.rand(10, 3, 4, 4))
EMBEDDINGS = (torch.randn(10, 8), torch.randn(10, 8))


class Pairs:
    """A stream of view pairs."""

    unbatched = ()

    def __call__(self, first, last):
        return iter([VIEWS] * (last - first))


@pytest.fixture
def make(tmp_path):
    """A run that is not opened yet."""

    def call(count=100, total=20, cfg=None, **settings):
        run_cfg = RunConfig(
            **{"out": str(tmp_path / "run"), "log_every": 3, "workers": 2} | settings
        )
        images = ImageSplit("x", torch.zeros(count, 3, 4, 4, dtype=torch.uint8))
        images.store = images.encoded
        defaults = (Config(temperature=0.1), {"log_every": 3})
        return Run("simclr", "tiny", defaults, cfg or Config(), run_cfg, Accelerator(cpu=True),
                   images, total)  # fmt: skip

    return call


@pytest.fixture
def open_run(make):
    def call(measures=None, collapse_from=0, **settings):
        run = make(**settings)
        torch.manual_seed(0)
        network = nn.Linear(3, 2)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        state = {"model": network, "optimizer": optimizer}
        run.open(state, network, nn.Sequential(), {}, measures or {}, collapse_from)
        run.network = network
        return run

    return call


def play(run, until=None, loss=1.5, embeddings=EMBEDDINGS):
    """Every step of a run, or those before `until`, which all move the weights."""
    for step, views in run.steps(Pairs()):
        with torch.no_grad():
            run.network.weight.fill_(step + 1)
        run.end_step(step, views, embeddings, loss=torch.tensor(loss), lr=0.25)
        if step + 1 == until:
            return


# ---- the record ----------------------------------------------------------------------------------


def test_the_record_of_a_run(open_run, capsys):
    open_run()
    run = open_run()
    record = read_json(run.folder / "config.json")
    assert record["method"] == "simclr" and record["recipe"] == "tiny"
    assert record["images"] == 100 and record["steps"] == 20
    assert record["config"]["temperature"] == 0.5 and record["config"]["log_every"] == 3
    assert record["overridden"] == ["temperature", "workers"]
    assert len(record["launches"]) == 2
    launched = record["launches"][0]
    assert launched["processes"] == 1 and launched["versions"]["torch"] == torch.__version__
    assert {"command", "commit", "device", "started"} <= launched.keys()
    assert (run.folder / "results").is_dir()
    said = capsys.readouterr().err
    assert "a word of advice" in said and "x: 100 images, no labels, in memory" in said


def test_what_a_run_refuses(make, open_run, tmp_path):
    with pytest.raises(UserError, match="--batch-size 10: more than the 9 images"):
        make(count=9)
    with pytest.raises(UserError, match="--epochs: too few for one step on 100 images"):
        make(total=0)
    assert not (tmp_path / "run").exists()
    open_run()
    with pytest.raises(UserError, match=r"holds a run on 100 images \(now 99\)"):
        open_run(count=99)
    (tmp_path / "file").write_text("")
    for out in ("file", "file/sub"):
        with pytest.raises(UserError, match="cannot be written"):
            open_run(out=str(tmp_path / out))


def test_a_second_command_on_a_folder_is_refused_while_the_first_runs(open_run):
    run = open_run()

    def second():
        """What another process gets."""
        process = multiprocessing.get_context("fork").Process(target=try_lock, args=(run.folder,))
        process.start()
        process.join()
        return process.exitcode

    assert second() == 7
    run._lock.close()  # as the end of its process does
    assert second() == 0


def try_lock(folder):
    try:
        lock(folder)
    except UserError as error:
        assert "another command is training there" in str(error)
        os._exit(7)


# ---- steps ---------------------------------------------------------------------------------------


def test_a_run_from_beginning_to_end(open_run, capsys):
    calls = iter(range(99))
    run = open_run(measures={"knn": lambda: float(next(calls))}, knn_every=1, save_every=0.5)
    play(run)
    run.finish()
    found = rows(run.folder)
    assert [row["step"] for row in found] == [0, 3, 6, 9, 12, 15, 18, 19]
    assert found[3] == found[0] | {"step": 9, "knn": 0.0}  # one line a step, whatever is in it
    assert {"loss": 1.5, "lr": 0.25, "step": 0}.items() <= found[0].items()
    assert {"feature_std", "effective_rank", "alignment", "uniformity"} <= found[0].keys()
    assert found[-1]["knn"] == 1.0  # after epochs 1 and 2
    timings = [json.loads(row) for row in (run.folder / "timings.jsonl").read_text().splitlines()]
    assert [row["step"] for row in timings] == [row["step"] for row in found]
    assert timings[0].keys() == {"step", "pairs_per_second", "data_wait", "peak_memory_gb"}
    names = sorted(path.name for path in (run.folder / "checkpoints").iterdir())
    assert names == ["step-00000015.pt", "step-00000020.pt"]
    assert f"done: {run.folder}; next: python -m eval.neighbours" in capsys.readouterr().err


def test_going_on_truncates_the_logs_to_the_checkpoint(open_run, capsys):
    run = open_run(save_every=0.5, log_every=1)
    play(run, until=8)
    left = [run.folder / ".config.json.123", run.folder / "checkpoints" / ".step-00000006.pt.45"]
    for path in left:
        path.write_bytes(b"half")
    assert len(rows(run.folder)) == 8
    run._lock.close()
    again = open_run(save_every=0.5, log_every=1)
    assert again.start_step == 5 and again.network.weight.unique().item() == 5
    assert [row["step"] for row in rows(run.folder)] == [0, 1, 2, 3, 4]
    assert not any(path.exists() for path in left)
    assert "going on from step 5 of 20" in capsys.readouterr().err
    play(again)
    assert [row["step"] for row in rows(run.folder)] == list(range(20))


def test_a_checkpoint_is_never_ahead_of_the_metrics(open_run, monkeypatch):
    run = open_run(save_every=0.5, log_every=1)
    save, seen = run.checkpoints.save, []

    def watched(step):
        seen.append((step, rows(run.folder)[-1]["step"]))
        save(step)

    monkeypatch.setattr(run.checkpoints, "save", watched)
    play(run)
    assert seen == [(5, 4), (10, 9), (15, 14), (20, 19)]


@pytest.mark.parametrize(
    ("count", "total", "epochs", "expected"),
    [
        (100, 35, 1, [9, 19, 29, 34]),  # ten steps an epoch
        (100, 30, 0.5, [4, 9, 14, 19, 24, 29]),
        (95, 30, 1, [9, 18, 28, 29]),  # an epoch ends within a step
        (1000, 7, 1, [6]),  # less than one epoch: at the end
        (10, 4, 0.3, [0, 1, 2, 3]),  # several times a step
        (100, 4, 0, [3]),
        (100, 4, 1e-320, [0, 1, 2, 3]),
        (100, 4, 1e308, [3]),
        (3200, 20, 0.0125, [3, 7, 11, 15, 19]),  # every four steps, whatever a float rounds
    ],
)
def test_due_at_multiples_of_epochs_and_at_the_end(make, count, total, epochs, expected):
    run = make(count=count, total=total)
    assert [step for step in range(total) if run.is_due(step, epochs)] == expected


def test_a_collapse_is_said_once_until_it_is_over(open_run, capsys):
    run = open_run(collapse_from=6)
    alike = (torch.ones(10, 8),) * 2
    for step, views in run.steps(Pairs()):
        run.end_step(step, views, EMBEDDINGS if step == 12 else alike, loss=1.0)
    said = [line for line in capsys.readouterr().err.splitlines() if "COLLAPSE" in line]
    assert len(said) == 2  # from step 6, and again from 15


def test_a_loss_that_is_not_finite_ends_the_run_and_is_not_written(open_run):
    run = open_run()
    with pytest.raises(UserError, match=r"NaN or infinite at step 0; the last checkpoint is kept"):
        play(run, loss=torch.nan)
    assert not (run.folder / "metrics.jsonl").exists()
    with torch.no_grad():
        run.network.weight[0] = torch.inf
    with pytest.raises(UserError, match="at step 20"):
        run.end_step(19, VIEWS, EMBEDDINGS, loss=1.0)
    assert not (run.folder / "encoder.safetensors").exists()
    assert not list((run.folder / "checkpoints").iterdir())


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_the_step(open_run, capsys, signum):
    """A second one kills; afterwards the handlers are as before."""
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    run = open_run()
    with pytest.raises(SystemExit) as caught:
        for step, views in run.steps(Pairs()):
            run.end_step(step, views, EMBEDDINGS, loss=1.0)
            if step == 6:
                os.kill(os.getpid(), signum)
                assert signal.getsignal(signum) == signal.SIG_DFL
    assert caught.value.code == 128 + signum
    assert f"stopped by {signum.name} after step 7;" in capsys.readouterr().err
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before
    assert open_run().start_step == 7


# ---- export --------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_an_export_gives_the_same_features_bit_for_bit(make, precision):
    run, preprocess = make(precision=precision), Preprocess.of(32)
    encoder = build_seeded({"encoder": "demo"}, preprocess)
    for buffer in encoder.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    head = nn.Sequential(nn.Linear(encoder.num_features, 4), nn.ReLU())
    metadata = export_metadata("demo", encoder, preprocess, "a-row")
    encoder.to(run.dtype)
    run.open({"model": encoder}, encoder, head, metadata, {})
    run._export(13)

    again = load_encoder(str(run.folder))
    images = torch.rand(5, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again.network(images), encoder.eval().float()(images))
    assert not again.network.training and again.name == "encoder" and again.input == preprocess
    known = {"method": "simclr", "recipe": "tiny", "epochs": 1.3, "finished": False,
             "encoder": "demo", "norm": "bn", "published": "a-row"}  # fmt: skip
    assert known.items() <= again.metadata.items() and again.metadata["commit"]
    with safe_open(run.folder / "encoder.safetensors", framework="pt") as file:
        kept = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert {key for key in kept if key.startswith("head.")} == {"head.0.weight", "head.0.bias"}
    assert {t.dtype for t in kept.values()} == {torch.float32, torch.int64}
    run._export(20)
    assert load_encoder(str(run.folder)).metadata["finished"] is True
